"""Ctrl-C, SIGTERM, two runs at once, and a disk that takes no more: one line each, and nothing is lost."""
import ctypes
import os
import re
import signal
import subprocess
import sys
import time

import pytest
import torch

from cleanai import UserError
from cleanai.runtime import lock as locks
from cleanai.runtime.checkpoints import load_checkpoint, save_checkpoint, write_record
from cleanai.runtime.scenario import PROJECT, Scenario
from tests.scripts import SCRIPTS, command_options, fails, run, start

LIMIT_S = 2  # that an interrupted script may take to its end, beside the step it is in
GOES_ON = "Interrupted. The same command, without --fresh, goes on where it stopped."
posix = pytest.mark.skipif(os.name != "posix", reason="signals of POSIX")


def _scenario(folder, method="", dataset="Digits"):
    return Scenario("TS1", "ResNet18", dataset, folder, method)


def _digits(number, folder, *options):
    return command_options(number, folder, "--dataset", "Digits", *options)


def _until(condition, process):
    while process.poll() is None and not condition():
        time.sleep(0.05)
    assert condition(), process.communicate()


@pytest.fixture
def signals_not_ignored():
    """A test run in the background of a shell ignores Ctrl-C, and so would the scripts that it starts."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@posix
def test_a_second_run_is_refused_and_ctrl_c_ends_the_first(tmp_path, signals_not_ignored):
    scenario, options = _scenario(tmp_path), _digits(0, tmp_path, "--epochs", "1000")
    stale = [scenario.folder / f"{path.name}.4711.tmp" for path in (scenario.resume, scenario.epoch(15))]
    others = [scenario.folder / "ResNet18_CIFAR10_FT_resume.pth.4711.tmp", scenario.folder / "notes.tmp"]
    scenario.folder.mkdir()
    for path in stale + others:
        path.touch()

    process = start(SCRIPTS[0], *options)
    _until(scenario.resume.exists, process)
    assert not any(path.exists() for path in stale), "what a killed run left half-written"
    assert all(path.exists() for path in others)
    second = run(SCRIPTS[0], *options)
    fails(second, f"Another run of this script is at work in {scenario.folder}: wait", "--checkpoints-dir")
    assert run(SCRIPTS[0], "--help").returncode == 0

    interrupted = time.monotonic()
    process.send_signal(signal.SIGINT)
    _, message = process.communicate()
    assert time.monotonic() - interrupted < LIMIT_S + 1  # a step takes half a second on one slow core
    assert process.returncode == 130
    assert message.strip() == GOES_ON
    written = {path.name for path in scenario.folder.iterdir() if not re.search(r"epoch\d+\.pth$", path.name)}
    assert written == {scenario.pretrained.name, scenario.resume.name, *(path.name for path in others)}
    assert load_checkpoint(scenario.resume)["epoch"] >= 1


@posix
@pytest.mark.parametrize("wait_s", [0.4, 1.5])  # while Python, the package and PyTorch are imported
def test_sigterm_ends_a_script_that_has_hardly_begun(tmp_path, wait_s):
    process = start(SCRIPTS[0], *_digits(0, tmp_path))
    _until((tmp_path / "TS1").exists, process)
    time.sleep(wait_s)
    process.send_signal(signal.SIGTERM)
    _, message = process.communicate()
    assert process.returncode == 143
    assert message.strip() == GOES_ON


@posix
def test_ctrl_c_while_a_script_imports_its_modules_is_no_traceback(signals_not_ignored):
    for script in SCRIPTS:
        text = (PROJECT / "test_scenarios" / script).read_text(encoding="utf-8")
        assert re.search(r"^(from|import) .*$", text, re.MULTILINE).group() == "from cleanai import cli"
    program = "from cleanai import cli\nimport time\nprint('importing', flush=True)\ntime.sleep(60)"
    process = subprocess.Popen(
        [sys.executable, "-c", program], stdout=subprocess.PIPE, stderr=subprocess.PIPE, encoding="utf-8"
    )
    assert process.stdout.readline().strip() == "importing"
    process.send_signal(signal.SIGINT)
    _, message = process.communicate()
    assert process.returncode == 130
    assert message.strip() == GOES_ON


@posix
def test_a_second_ctrl_c_while_the_first_is_cleaned_up_after_is_no_traceback(tmp_path, signals_not_ignored):
    program = (
        "import time\nfrom cleanai import cli\ndef main():\n try:\n  print('ready', flush=True); time.sleep(60)\n"
        " finally:\n  print('cleaning', flush=True); time.sleep(60)\ncli.run(main)"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", program], stdout=subprocess.PIPE, stderr=subprocess.PIPE, encoding="utf-8"
    )
    for line in ("ready", "cleaning"):
        assert process.stdout.readline().strip() == line
        process.send_signal(signal.SIGINT)
    _, message = process.communicate()
    assert process.returncode == 130
    assert message.strip() == GOES_ON


@posix
def test_a_package_cannot_swallow_a_signal_while_it_is_imported(tmp_path):
    package = "import time\ntry:\n  print('ready', flush=True); time.sleep(60)\nexcept BaseException:\n  pass\n"
    (tmp_path / "swallowing.py").write_text(package, encoding="utf-8")
    program = "from cleanai import cli\ndef main():\n import swallowing\n while True: pass\ncli.run(main)"
    process = subprocess.Popen(
        [sys.executable, "-c", program],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        encoding="utf-8",
        env={**os.environ, "PYTHONPATH": str(tmp_path)},
    )
    assert process.stdout.readline().strip() == "ready"
    process.send_signal(signal.SIGTERM)
    try:
        _, message = process.communicate(timeout=20)
    finally:
        process.kill()
    assert process.returncode == 143
    assert message.strip() == GOES_ON


def _holds(process):
    return process.stdout.readline().strip() == "locked"


HOLDER = """
import sys, time; from pathlib import Path; from cleanai import locks; from cleanai.runtime.scenario import Scenario
if sys.argv[2] == "Windows":
    from tests.windows import windows_locks
    locks = windows_locks()
with locks.only_run(Scenario("TS1", "ResNet18", "Digits", Path(sys.argv[1]), "Coverage")):
    print("locked", flush=True); time.sleep(60)
"""


@pytest.mark.parametrize("system", ["this", pytest.param("Windows", marks=posix)])
def test_a_lock_dies_with_its_process_and_keeps_no_other_script_away(tmp_path, monkeypatch, system):
    only_run = locks.only_run
    if system == "Windows":
        from tests.windows import windows_locks

        only_run = windows_locks().only_run
    own = _scenario(tmp_path, "Coverage")
    command = [sys.executable, "-c", HOLDER, str(tmp_path), system]
    process = subprocess.Popen(command, cwd=PROJECT, stdout=subprocess.PIPE, encoding="utf-8")
    assert _holds(process)
    with pytest.raises(UserError, match="Another run of this script"), only_run(own):
        pass
    assert own.lock.exists(), "the refused one takes nothing from the other"
    for other in (_scenario(tmp_path, "Wanda"), _scenario(tmp_path), _scenario(tmp_path, "Coverage", "CIFAR10")):
        with only_run(other):
            pass
    with monkeypatch.context() as torchrun:  # the first process of a run has the lock for all
        torchrun.setenv("RANK", "1")
        with only_run(own):
            pass
    process.kill()
    process.communicate()
    assert own.lock.exists()
    with only_run(own):
        pass
    assert list(tmp_path.iterdir()) == [own.folder], "folders that a lock made, and nothing else, go with it"
    assert list(own.folder.iterdir()) == []


def _limited(limit):
    """Start what follows with files of `limit` bytes at most: writing more fails, as on a full disk."""
    import resource

    return lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))


@posix
def test_a_disk_that_is_full_in_the_midst_of_training_costs_nothing_that_was_saved(tmp_path):
    scenario = _scenario(tmp_path)
    # The pretrained network takes 45 MB and the resume file 134 MB.
    result = run(SCRIPTS[0], *_digits(0, tmp_path), "--epochs", "3", preexec_fn=_limited(100_000_000))
    fails(result, f"{scenario.resume} cannot be written (File too large)", "run the same command to go on")
    assert [path.name for path in scenario.folder.iterdir()] == [scenario.pretrained.name]
    assert load_checkpoint(scenario.pretrained)["classes"]


@pytest.fixture
def small_disk(tmp_path):
    """A file system of 1 MB, where one can be made."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(folder)]
    try:
        subprocess.run(mount, check=True, capture_output=True)
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("no file system can be mounted here")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


def test_a_full_disk_is_told_and_every_earlier_file_is_intact(small_disk):
    path = small_disk / "a.pth"
    save_checkpoint(path, {"x": torch.ones(100_000)})
    for size in (200_000, 1_000_000):
        with pytest.raises(UserError, match=r"a\.pth cannot be written \(No space left on device\)\. Every earlier"):
            save_checkpoint(path, {"x": torch.zeros(size)})
        assert list(small_disk.iterdir()) == [path]
        assert load_checkpoint(path)["x"].sum() == 100_000
    (small_disk / "filler").write_bytes(bytes(small_disk.stat().st_blksize * 138))
    with pytest.raises(UserError, match=r"a\.json cannot be written \(No space left on device\)"):
        write_record(small_disk / "a.json", {"config": {}, "x": "1" * 100_000})
    assert sorted(path.name for path in small_disk.iterdir()) == ["a.pth", "filler"]


def _bound_by_permissions():
    """Give up root's right to write anywhere (CAP_DAC_OVERRIDE, 1), so that permissions hold for a test run as root."""
    if os.geteuid() == 0:
        ctypes.CDLL(None).prctl(24, 1, 0, 0, 0)  # PR_CAPBSET_DROP: what it executes next has it no more


@posix
@pytest.mark.skipif(sys.platform != "linux" and os.name == "posix" and os.geteuid() == 0, reason="run as root")
def test_a_folder_that_cannot_be_written_is_told_at_once(tmp_path):
    (tmp_path / "file").touch()
    result = run(SCRIPTS[0], *_digits(0, tmp_path / "file"))
    fails(result, "cannot be written (Not a directory)", "use another --checkpoints-dir")
    tmp_path.chmod(0o500)
    result = run(SCRIPTS[0], *_digits(0, tmp_path / "new"), preexec_fn=_bound_by_permissions)
    tmp_path.chmod(0o700)
    fails(result, str(tmp_path / "new"), "cannot be written (Permission denied)", "use another --checkpoints-dir")
    assert [path.name for path in tmp_path.iterdir()] == ["file"]
