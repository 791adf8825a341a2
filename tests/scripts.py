"""The three scripts as commands, for the tests that run them."""
import json
import os
import subprocess
import sys

import torch

from cleanai.runtime.scenario import PROJECT

SCRIPTS = ["TS1_01_prepare_model.py", "TS1_02_coverage_pruning.py", "TS1_03_wanda_pruning.py"]
SMALL = ["--train-samples", "64", "--batch-size", "16"]
# What differs from run to run: times, the checksums of files that hold some, and the folder.
TIMES = {"seconds", "latency_ms", "latency_quantiles_ms", "throughput_images_per_s", "speedup"}
TIMES |= {"fine_tuned_model", "checkpoints", "commands"}


def start(script, *options, preexec_fn=None, **environment):
    """Start a script as a command."""
    return subprocess.Popen(
        [sys.executable, str(PROJECT / "test_scenarios" / script), *map(str, options)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        encoding="utf-8",
        errors="replace",
        preexec_fn=preexec_fn,
        env={**os.environ, "PYTHONIOENCODING": "utf-8", **environment},
    )


def run(script, *options, **environment):
    """Run a script as a command to its end: its status, and what it printed."""
    process = start(script, *options, **environment)
    stdout, stderr = process.communicate()
    return subprocess.CompletedProcess(process.args, process.returncode, stdout, stderr)


def fails(result, *expected):
    """The command ended with one line that says all of `expected`, and no traceback."""
    assert result.returncode != 0
    assert "Traceback" not in result.stderr
    assert len(result.stderr.strip().splitlines()) == 1, result.stderr
    for text in expected:
        assert text in result.stderr


def command_options(number, folder, *options):
    """The options that run a script, by its index, on a few images."""
    few = ["--weights", "none"] if number == 0 else ["--calibration-batches", "2", "--steps", "2"]
    return [*few, *SMALL, "--checkpoints-dir", str(folder), *options]


def prepare(folder, *options, **environment):
    """Run script 1 on a few images."""
    return run(SCRIPTS[0], *command_options(0, folder, *options), **environment)


def prune(script, folder, *options, **environment):
    """Run script 2 or 3 on a few images."""
    return run(script, *command_options(SCRIPTS.index(script), folder, *options), **environment)


def outcome(folder):
    """All that the scripts left in a folder, less the times."""
    files = {path.relative_to(folder).as_posix(): path for path in folder.rglob("*") if path.is_file()}
    return {name: _timeless(_read(path)) for name, path in files.items()}


def _read(path):
    if path.suffix == ".pth":
        return torch.load(path, weights_only=True)
    return json.loads(path.read_text(encoding="utf-8")) if path.suffix == ".json" else path.read_bytes()[:4]


def _timeless(content):
    if isinstance(content, dict):
        return {key: _timeless(value) for key, value in content.items() if key not in TIMES}
    if isinstance(content, list):
        return [_timeless(value) for value in content]
    return (content.dtype, content.shape, content.numpy().tobytes()) if isinstance(content, torch.Tensor) else content


def assert_same(left, reference):
    """What scripts left is the same as what others did, but for the times."""
    assert sorted(left) == sorted(reference)
    for name, content in reference.items():
        assert left[name] == content, f"{name} differs"
