"""Killed at any moment, a script resumes when it is run again, and ends like an uninterrupted run. Takes minutes.

One kill, of script 1, is in test_scripts.py.
"""

import contextlib
import os
import random
import shutil
import subprocess
import time

import pytest

from tests.helpers import SCRIPTS, assert_same, command_options, ended, outcome, script_command, started

SEED = int(os.environ.get("CLEANAI_TEST_SEED", "0"))
KILLS = 25  # at least
EPOCHS = ["6", "5", "5"]  # as in the fixture digits_run
FEWER_EPOCHS = ["3", "2", "2"]
# Starts a script that dies in the n-th call of a function of os, or in the first whose first argument holds a text:
# in fsync with a temporary file written and not yet in place, in replace just before it is.
DYING = """
import functools, os, signal, sys
name, which = sys.argv[1:3]
call, calls = getattr(os, name), []
def dying(*args, **options):
    calls.append(args)
    if which == str(len(calls)) or (not which.isdigit() and which in str(args[0])):
        os.kill(os.getpid(), getattr(signal, "SIGKILL", signal.SIGTERM))
    return call(*args, **options)
setattr(os, name, functools.partial(dying))  # no function: Python 3.8 would make it a method of a class of pathlib
import runpy
sys.argv = sys.argv[3:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def _command(number, folder, epochs):
    return script_command(
        SCRIPTS[number], *command_options(number, folder, "--dataset", "Digits", "--epochs", epochs[number])
    )


def _killed(number, folder, epochs, moment, wait_s):
    """Run a script and kill it: `wait_s` after its start, or after a line it prints, or in a call (see DYING).

    False when it ended before.
    """
    command = _command(number, folder, epochs)
    dies_by_itself = isinstance(moment, tuple)
    with started(["-c", DYING, *moment, *command] if dies_by_itself else command) as process:
        if not dies_by_itself:
            while moment is not None and moment not in (process.stdout.readline() or moment):
                pass
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(wait_s)
            process.kill()
        result = ended(process)
    assert "Traceback" not in result.stderr and "Error" not in result.stderr, result.stderr
    return process.returncode != 0


def _finish(number, folder, epochs):
    with started(_command(number, folder, epochs)) as process:
        result = ended(process)
    assert result.returncode == 0, result.stderr


@pytest.mark.long
@pytest.mark.timeout(1800)
def test_killed_in_the_middle_of_each_kind_of_work(digits_run, tmp_path, capsys):
    reference, _ = digits_run
    shutil.copytree(reference / "TS1", tmp_path / "TS1")
    rng = random.Random(SEED)
    # Between two steps of pruning; a checkpoint whole but not in place; an epoch; the PDF.
    moments = ["Step 1/2", ("fsync", 2), "Epoch 2/5", ("replace", ".pdf.")]
    waits = [rng.uniform(0, 0.5) for _ in moments]
    for moment, wait_s in zip(moments, waits):
        assert _killed(1, tmp_path, EPOCHS, moment, wait_s), f"{moment}: the script ended first"
    _finish(1, tmp_path, EPOCHS)
    assert_same(
        outcome(tmp_path), {name: content for name, content in outcome(reference).items() if "Wanda" not in name}
    )
    with capsys.disabled():
        print(f"\n{len(moments)} kills, seed {SEED} (CLEANAI_TEST_SEED)")


@pytest.mark.long
@pytest.mark.timeout(7200)
def test_killed_again_and_again_at_random_moments(tmp_path):
    print(f"\nSeed {SEED} (CLEANAI_TEST_SEED)")
    rng, durations_s = random.Random(SEED), []
    for number in range(3):
        before = time.perf_counter()
        _finish(number, tmp_path / "whole", FEWER_EPOCHS)
        durations_s.append(time.perf_counter() - before)
    reference = outcome(tmp_path / "whole")

    kills, rounds = 0, 0
    while kills < KILLS:
        rounds += 1
        folder = tmp_path / f"killed{rounds}"
        for number in range(3):
            for _ in range(rng.randint(2, 4)):
                kind = rng.choice(["time", "time", "line", "fsync", "replace"])
                lines = ["Test accuracy, original", "Step 1/2", "After pruning", "Epoch 1/"]
                lines = ["An epoch takes", "Epoch 2/"] if number == 0 else lines
                moment = {"time": None, "line": rng.choice(lines)}.get(kind, (kind, rng.randint(1, 4)))
                wait_s = rng.uniform(0, durations_s[number] if moment is None else 1)
                died = _killed(number, folder, FEWER_EPOCHS, moment, wait_s)
                kills += died
                how = "killed" if died else "ended"
                print(f"Round {rounds}, script {number + 1}, {moment}, {wait_s:.2f} s: {how}", flush=True)
                if not died:
                    break
            _finish(number, folder, FEWER_EPOCHS)
        assert_same(outcome(folder), reference)
        shutil.rmtree(folder)
    print(f"{kills} kills in {rounds} rounds of the three scripts: every end as that of the uninterrupted ones")
