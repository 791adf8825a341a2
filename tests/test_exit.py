"""How scripts end where their output goes somewhere unusual."""

import signal
import subprocess
import sys
import threading

import pytest

from cleanai.exit import run_script
from cleanai.runtime.scenario import PROJECT

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
