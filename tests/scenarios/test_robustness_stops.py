"""Ctrl-C, SIGTERM, two runs at once, and a full disk: one line each, and nothing is lost."""

import ctypes
import os
import re
import signal
import subprocess
import sys

import pytest
import torch

from cleanai import UserError
from cleanai.runtime.checkpoints import load_checkpoint, save_checkpoint, write_record
from cleanai.runtime.lock import only_run
from cleanai.runtime.scenario import Scenario
from tests.helpers import (
    SCRIPTS,
    command_options,
    ended,
    fails,
    run,
    script_command,
    started,
    wait_for,
    wait_for_line,
)

posix = pytest.mark.skipif(os.name != "posix", reason="signals of POSIX")


def _scenario(folder, method="", dataset="Digits"):
    return Scenario("TS1", "ResNet18", dataset, folder, method)


def _digits(number, folder, *options):
    return command_options(number, folder, "--dataset", "Digits", *options)


def _assert_stopped(result, number):
    """The signal ended a script: by its status, and one line."""
    assert result.returncode == 128 + number, result.stderr
    assert re.fullmatch(r"Interrupted\. .*", result.stderr.strip()), result.stderr
    assert ("--fresh" in result.stderr) == ("--fresh" in result.args)


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

    with started(script_command(SCRIPTS[0], *options)) as process:
        wait_for(scenario.resume.exists, process)
        assert not any(path.exists() for path in stale), "a killed run left them half-written"
        assert all(path.exists() for path in others)
        fails(run(SCRIPTS[0], *options), f"Another run of this script is at work in {scenario.folder}: wait")
        assert run(SCRIPTS[0], "--help").returncode == 0

        epochs = load_checkpoint(scenario.resume)["epoch"]
        process.send_signal(signal.SIGINT)
        _assert_stopped(ended(process), signal.SIGINT)
    assert load_checkpoint(scenario.resume)["epoch"] <= epochs + 2, "it stops where it is"
    files = {path.name for path in scenario.folder.iterdir() if not re.search(r"epoch\d+\.pth$", path.name)}
    assert files == {scenario.pretrained.name, scenario.resume.name, *(path.name for path in others)}


@posix
@pytest.mark.parametrize("package", ["torch", "torchvision", "sklearn"])
def test_sigterm_ends_a_script_that_is_importing(tmp_path, package):
    options = _digits(0, tmp_path)
    with started(script_command(SCRIPTS[0], *options), PYTHONPROFILEIMPORTTIME="1") as process:
        wait_for_line(f" {package}.", process, "stderr")  # a part of the package is imported, the whole not yet
        process.send_signal(signal.SIGTERM)
        result = ended(process)
    result.stderr = re.sub(r"^import time:.*\n", "", result.stderr, flags=re.MULTILINE)
    _assert_stopped(result, signal.SIGTERM)


@posix
def test_a_second_ctrl_c_during_the_clean_up_after_the_first_is_no_traceback(signals_not_ignored):
    program = (
        "import time\nfrom cleanai.exit import run_script\ndef main():\n try:\n  print('ready'); time.sleep(999)\n"
        " finally:\n  print('cleaning'); time.sleep(999)\nrun_script(main)"
    )
    with started(["-c", program, "--fresh"]) as process:
        for line in ("ready", "cleaning"):
            wait_for_line(line, process)
            process.send_signal(signal.SIGINT)
        _assert_stopped(ended(process), signal.SIGINT)


@posix
def test_a_package_cannot_swallow_a_signal_while_it_is_imported(tmp_path):
    package = "import time\ntry:\n  print('ready'); time.sleep(999)\nexcept BaseException:\n  pass\n"
    (tmp_path / "swallowing.py").write_text(package, encoding="utf-8")
    program = (
        "from cleanai.exit import run_script\ndef main():\n import swallowing\n while True: pass\nrun_script(main)"
    )
    with started(["-c", program], PYTHONPATH=str(tmp_path)) as process:
        wait_for_line("ready", process)
        process.send_signal(signal.SIGTERM)
        _assert_stopped(ended(process), signal.SIGTERM)


HOLDER = """
import sys, time
from pathlib import Path
from cleanai.runtime.lock import only_run
from cleanai.runtime.scenario import Scenario
with only_run(Scenario("TS1", "ResNet18", "Digits", Path(sys.argv[1]), "Coverage")):
    print("locked"); time.sleep(999)
"""


def test_a_lock_keeps_the_same_script_away_and_no_other_and_dies_with_its_process(tmp_path, monkeypatch):
    own = _scenario(tmp_path, "Coverage")
    with started(["-c", HOLDER, tmp_path]) as process:
        wait_for_line("locked", process)
        with pytest.raises(UserError, match=own.folder.name), only_run(own):
            pass
        for other in (_scenario(tmp_path, "Wanda"), _scenario(tmp_path), _scenario(tmp_path, "Coverage", "CIFAR10")):
            with only_run(other):
                pass
        with monkeypatch.context() as torchrun:  # the first process of a run has the lock for all
            torchrun.setenv("RANK", "1")
            with only_run(own):
                pass
        with pytest.raises(UserError), only_run(own):
            pass
        process.kill()
        ended(process)
    with only_run(own):
        assert own.folder.exists()
    assert {path.name for path in tmp_path.iterdir()} == {".locks", own.folder.name}


def test_a_run_that_failed_leaves_no_new_empty_folders(tmp_path):
    own = _scenario(tmp_path / "new" / "checkpoints", "Coverage")
    with pytest.raises(ZeroDivisionError), only_run(own):
        assert own.folder.is_dir()
        raise ZeroDivisionError
    assert not any(tmp_path.iterdir())
    with pytest.raises(ZeroDivisionError), only_run(own):
        own.pruned.touch()
        raise ZeroDivisionError
    assert own.pruned.exists()
    with only_run(own):
        pass
    assert own.pruned.exists()


def _limited(limit):
    """Start what follows with files of `limit` bytes at most: writing more fails, as on a full disk."""
    import resource

    return lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))


@posix
def test_a_disk_that_is_full_during_training_costs_nothing_that_was_saved(tmp_path):
    scenario = _scenario(tmp_path)
    # The pretrained network takes 45 MB and the resume file 134 MB.
    result = run(SCRIPTS[0], *_digits(0, tmp_path), "--epochs", "3", preexec_fn=_limited(100_000_000))
    fails(result, str(scenario.resume), "File too large")
    assert [path.name for path in scenario.folder.iterdir()] == [scenario.pretrained.name]
    assert load_checkpoint(scenario.pretrained)["classes"]


@pytest.fixture
def small_disk(tmp_path):
    """A file system of 1 MB, where one can be made."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(folder)]
    try:
        subprocess.run(mount, check=True, capture_output=True, timeout=60)
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("no file system can be mounted here")
    yield folder
    subprocess.run(["umount", str(folder)], check=True, timeout=60)


def test_a_full_disk_is_named_and_every_earlier_file_is_intact(small_disk):
    path = small_disk / "a.pth"
    save_checkpoint(path, {"x": torch.ones(100_000)})
    for size in (200_000, 1_000_000):
        with pytest.raises(UserError, match=r"a\.pth .* Every earlier file is intact: "):
            save_checkpoint(path, {"x": torch.zeros(size)})
        assert list(small_disk.iterdir()) == [path]
        assert load_checkpoint(path)["x"].sum() == 100_000
    (small_disk / "filler").write_bytes(bytes(small_disk.stat().st_blksize * 138))
    with pytest.raises(UserError, match=r"a\.json .*No space"):
        write_record(small_disk / "a.json", {"config": {}, "x": "1" * 100_000})
    assert sorted(path.name for path in small_disk.iterdir()) == ["a.pth", "filler"]


def _bound_by_permissions():
    """Give up root's right to write anywhere (CAP_DAC_OVERRIDE, 1), so that permissions hold for a test run as root."""
    if os.geteuid() == 0:
        ctypes.CDLL(None).prctl(24, 1, 0, 0, 0)  # PR_CAPBSET_DROP: what it executes next has it no more


@posix
@pytest.mark.skipif(sys.platform != "linux" and os.name == "posix" and os.geteuid() == 0, reason="run as root")
def test_a_folder_that_cannot_be_written_is_named_at_once(tmp_path):
    (tmp_path / "file").touch()
    result = run(SCRIPTS[0], *_digits(0, tmp_path / "file"))
    fails(result, str(tmp_path / "file"), "Not a directory", "use another --checkpoints-dir")
    tmp_path.chmod(0o500)
    result = run(SCRIPTS[0], *_digits(0, tmp_path / "new"), preexec_fn=_bound_by_permissions)
    tmp_path.chmod(0o700)
    fails(result, str(tmp_path / "new"), "Permission denied")
    assert [path.name for path in tmp_path.iterdir()] == ["file"]
