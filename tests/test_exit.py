"""How scripts end where their output goes somewhere unusual."""

import shutil
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from cleanai import exit
from cleanai.exit import run_script
from cleanai.runtime.scenario import PROJECT

# Runs the script in the second argument with cleanai from the folder in the first one, and the other packages of here.
_WITHOUT_SITE = f"""
import runpy, sys
paths = [path for path in {sys.path!r} if "site-packages" in path or "dist-packages" in path]
sys.path = [sys.argv[1], *[path for path in sys.path if path], *paths]
sys.argv = sys.argv[2:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""
COMPARE = str(PROJECT / "test_scenarios" / "TS1_04_compare_methods.py")


@pytest.mark.skipif(sys.platform == "win32", reason="the shell of other systems")
def test_a_reader_that_goes_away_ends_the_script_quietly():
    command = f"'{sys.executable}' -u '{COMPARE}' --help | head -1; exit ${{PIPESTATUS[0]}}"
    result = subprocess.run(["bash", "-c", command], capture_output=True, encoding="utf-8")
    assert result.returncode in (0, 141), result.stderr
    assert len(result.stdout.splitlines()) == 1
    assert result.stderr == ""


def test_a_reader_that_goes_away_in_the_middle_is_no_error():
    program = "from cleanai.exit import run_script\nrun_script(lambda: [print('x' * 1000) for _ in range(1000)])"
    process = subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    process.stdout.readline()
    process.stdout.close()
    stderr = process.stderr.read()
    process.stderr.close()
    assert process.wait(timeout=60) in (0, 141)
    assert stderr == b""


@pytest.mark.skipif(sys.platform == "win32", reason="the shell of other systems")
@pytest.mark.parametrize("closed", [">&-", "2>&-", ">&- 2>&-"])
def test_closed_outputs_do_no_harm(closed):
    program = "from cleanai.exit import run_script; run_script(lambda: print('a line'))"
    result = subprocess.run(["bash", "-c", f"'{sys.executable}' -c \"{program}\" {closed}"], capture_output=True)
    assert result.returncode == 0, result.stderr


class _Notebook:
    """An output as a notebook has it: it cannot be reconfigured."""

    closed = False

    def __init__(self):
        self.text = ""

    def write(self, text):
        self.text += text

    def flush(self):
        pass


@pytest.mark.parametrize("stdout", [_Notebook(), None])
def test_outputs_of_notebooks_and_of_programs_without_a_console_are_taken_as_they_are(monkeypatch, stdout):
    monkeypatch.setattr(sys, "stdout", stdout)
    statuses = []

    def run():
        with pytest.raises(SystemExit) as ending:
            run_script(lambda: print("a line"))
        statuses.append(ending.value.code)

    thread = threading.Thread(target=run)  # as some of them do
    thread.start()
    thread.join()
    assert statuses == [0]
    assert stdout is None or stdout.text == "a line\n"


_SESSION = """
import signal, sys
from cleanai import UserError
from cleanai.exit import run_script
sys.ps1 = ">>> "
def handlers(): return signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
def interrupted(): signal.raise_signal(signal.SIGINT)
def wrong(): raise UserError("what to do")
def bug(): raise ValueError
for main in (interrupted, wrong, bug, lambda: None):
    before = handlers()
    try:
        run_script(main)
    except (SystemExit, ValueError) as ending:
        print(getattr(ending, "code", None), handlers() == before)
"""


def test_a_session_goes_on_after_a_script_as_before_it():
    result = subprocess.run([sys.executable, "-c", _SESSION], capture_output=True, encoding="utf-8")
    assert result.stdout.splitlines() == ["130 True", "1 True", "None True", "0 True"], result.stderr
    assert "Error: what to do" in result.stderr


class _OnlyWrite:
    def __init__(self):
        self.text = ""

    def write(self, text):
        self.text += text


def test_outputs_that_can_only_write_get_everything(monkeypatch):
    from cleanai.runtime.progress import progress, say

    def main():
        say("above the bar")
        for _ in progress(range(3), "Working", "step"):
            print("a line")

    monkeypatch.setattr(exit, "_SIGNALS", [])
    outputs = _OnlyWrite(), _OnlyWrite()
    for name, output in zip(("stdout", "stderr"), outputs):
        monkeypatch.setattr(sys, name, output)
    with pytest.raises(SystemExit):
        run_script(main)
    assert outputs[0].text == "above the bar\n" + "a line\n" * 3
    assert outputs[1].text == ""


@pytest.mark.skipif(sys.platform != "linux", reason="no /dev/full")
@pytest.mark.parametrize(
    ("program", "redirection", "status", "line"),
    [
        ("print('a')", ">/dev/full", 1, "Error: the output cannot be written (No space left on device)"),
        ("print('a'); raise UserError('what to do')", ">/dev/full", 1, "Error: what to do"),
        ("print('a'); raise UserError('what to do')", "2>/dev/full", 1, ""),
        (
            "time.sleep(1); print('a'); raise UserError('what to do')",
            "| true; exit ${PIPESTATUS[0]}",
            1,
            "Error: what to do",
        ),
        ("time.sleep(1); print('a'); raise SystemExit", "| true; exit ${PIPESTATUS[0]}", 141, ""),
    ],
)
def test_outputs_that_fail_at_the_end_are_one_line_or_none(monkeypatch, program, redirection, status, line):
    monkeypatch.delenv("PYTHONUNBUFFERED", raising=False)
    lines = "import time\nfrom cleanai import UserError\nfrom cleanai.exit import run_script\n"
    lines += f"def main(): {program}\nrun_script(main)"
    result = subprocess.run(
        ["bash", "-c", f"'{sys.executable}' -c \"{lines}\" {redirection}"], capture_output=True, encoding="utf-8"
    )
    assert (result.returncode, result.stderr.strip()) == (status, line)


def _project(folder):
    """A project as far as a script needs it to begin."""
    shutil.copytree(PROJECT / "cleanai", folder / "cleanai", ignore=shutil.ignore_patterns("__pycache__"))
    (folder / "test_scenarios").mkdir()
    shutil.copy(COMPARE, folder / "test_scenarios")
    return folder


def test_a_copied_project_does_not_run_the_package_of_another(tmp_path):
    copy = _project(tmp_path / "a copy")
    (tmp_path / "elsewhere" / "scripts").mkdir(parents=True)
    shutil.copy(COMPARE, tmp_path / "elsewhere" / "scripts")

    def run(script, package_from):
        return subprocess.run(
            [sys.executable, "-I", "-S", "-c", _WITHOUT_SITE, str(package_from), str(script)],
            capture_output=True, encoding="utf-8", cwd=tmp_path,
        )  # fmt: skip

    script = copy / "test_scenarios" / Path(COMPARE).name
    foreign = run(script, PROJECT)
    assert foreign.returncode == 1
    assert len(foreign.stderr.splitlines()) == 1
    for expected in (str(copy), str(PROJECT), "-m pip install -e"):
        assert expected in foreign.stderr
    nowhere = run(script, tmp_path)
    assert nowhere.returncode == 1
    assert nowhere.stderr.startswith("Error: No module named 'cleanai'. ") and nowhere.stderr.count("\n") == 1
    own = run(script, copy)
    assert "There is nothing to compare yet" in own.stderr, "the project itself"
    alone = run(tmp_path / "elsewhere" / "scripts" / script.name, copy)
    assert "There is nothing to compare yet" in alone.stderr, "a script that was copied elsewhere"
    shutil.move(str(copy / "cleanai"), str(tmp_path / "cleanai"))
    (copy / "cleanai").mkdir()
    installed = run(script, tmp_path)
    assert "There is nothing to compare yet" in installed.stderr, "a normal installation"


@pytest.mark.parametrize("number", [0, 1])
def test_torchrun_can_end_a_process_that_waits_for_another(number, monkeypatch):
    """No handler of Python runs while it waits; the first process has one, for its files."""
    monkeypatch.setenv("RANK", str(number))
    handlers = {each: signal.getsignal(each) for each in (signal.SIGINT, signal.SIGTERM)}
    seen = []
    try:
        with pytest.raises(SystemExit):
            run_script(lambda: seen.extend(signal.getsignal(each) for each in handlers))
    finally:
        for each, handler in handlers.items():
            signal.signal(each, handler)
    assert (seen[1] is signal.SIG_DFL) == (number > 0)
    assert seen[0] is not signal.SIG_DFL


def test_a_tilde_is_the_home_folder(monkeypatch, tmp_path):
    from cleanai import cli

    for name in ("HOME", "USERPROFILE"):
        monkeypatch.setenv(name, str(tmp_path))
    monkeypatch.setattr(sys, "argv", ["script", "--checkpoints-dir=~/results", "--data-dir", "~/images"])
    args = cli.parse("A scenario.", {"dataset": "CIFAR10", "precision": "auto"})
    assert args.checkpoints_dir == tmp_path / "results"
    assert args.data_dir == tmp_path / "images"
