"""Options and errors of the scripts, run as commands."""
import signal
import sys

import pytest
import torch

from cleanai import cli
from tests.scripts import SCRIPTS, fails, run


@pytest.mark.parametrize("script", SCRIPTS)
def test_help_explains_every_option_with_its_default(script):
    result = run(script, "--help")
    assert result.returncode == 0
    text = " ".join(result.stdout.split())
    shared = ["--dataset", "--epochs", "--batch-size", "--lr", "--train-samples", "--seed", "--device", "--precision"]
    shared += ["--deterministic", "--weight-decay"]
    own = ["--weights", "--models-dir"] if script == SCRIPTS[0] else ["--ratio", "--macs-ratio", "--steps"]
    own += [] if script == SCRIPTS[0] else ["--calibration-batches", "--round-to", "--repair", "--repair-batches"]
    own += [] if script == SCRIPTS[0] else ["--export"]
    own += ["--coverage-metric"] if script == SCRIPTS[1] else []
    for option in [*shared, *own, "--data-dir", "--checkpoints-dir", "--fresh"]:
        assert option in text
    assert f"python test_scenarios/{script}" in text
    assert f"(default: {20 if script == SCRIPTS[0] else 30})" in text


@pytest.mark.parametrize(
    ("script", "options", "expected"),
    [
        (1, ["--ratio", "1.5"], "--ratio: 1.5 is not a number between 0 and 1"),
        (2, ["--ratio", "0"], "--ratio: 0 is not a number between 0 and 1"),
        (1, ["--ratio", "nan"], "--ratio: nan is not a number"),
        (1, ["--macs-ratio", "most"], "--macs-ratio: most is not a number between 0 and 1"),
        (2, ["--ratio", "none"], "--ratio: none leaves nothing to remove without a --macs-ratio"),
        (1, ["--round-to", "0"], "--round-to: 0 is not a whole number"),
        (1, ["--repair", "half"], "--repair"),
        (0, ["--epochs", "0"], "--epochs: 0 takes a trained network as it is"),
        (1, ["--epochs", "0"], "--epochs: 0 is not a whole number of at least 1"),
        (0, ["--weight-decay", "-1"], "--weight-decay: -1 is not a number"),
        (0, ["--batch-size", "-4"], "--batch-size"),
        (0, ["--lr", "fast"], "--lr: fast is not a number"),
        (0, ["--weights", "imagenet22k"], "--weights"),
        (1, ["--coverage-metric", "mean"], "--coverage-metric"),
        (1, ["--export", "tflite"], "--export"),
        (0, ["--export", "onnx"], "--export onnx"),
        (0, ["--epoch", "3"], "--epoch 3"),
        (0, ["--dataset", "C:\\images"], "--dataset: C:\\images is not a name of letters, digits, _ and -"),
        (1, ["--dataset", "../CIFAR10"], "--dataset: ../CIFAR10 is not a name"),
    ],
)
def test_a_wrong_option_is_answered_in_one_line(script, options, expected):
    fails(run(SCRIPTS[script], *options), expected)


@pytest.mark.parametrize("script", SCRIPTS[1:])
def test_pruning_before_preparing_names_the_command_to_run(script, tmp_path):
    result = run(script, "--checkpoints-dir", tmp_path)
    command = "python test_scenarios/TS1_01_prepare_model.py"
    fails(result, "Fine-tuned model not found: ", f'Run first: {command} --checkpoints-dir "{tmp_path}"')
    result = run(script, "--dataset", "Digits", "--checkpoints-dir", tmp_path)
    fails(result, f"{command} --dataset Digits")


@pytest.mark.parametrize("script", SCRIPTS)
def test_an_unknown_dataset_is_named(script, tmp_path):
    result = run(script, "--dataset", "CIFAR99", "--data-dir", tmp_path, "--checkpoints-dir", tmp_path / "out")
    fails(result, "Unknown dataset: CIFAR99", "--dataset CIFAR10 or Digits")
    assert not (tmp_path / "out").exists()


def test_cuda_without_cuda_is_refused(tmp_path):
    result = run(SCRIPTS[0], "--device", "cuda", "--checkpoints-dir", tmp_path, CUDA_VISIBLE_DEVICES="-1")
    fails(result, "--device cpu")


def test_a_damaged_fine_tuned_model_is_named(tmp_path):
    path = tmp_path / "TS1" / "ResNet18_Digits_FT_final.pth"
    path.parent.mkdir()
    path.write_bytes(b"not a checkpoint")
    result = run(SCRIPTS[1], "--dataset", "Digits", "--checkpoints-dir", tmp_path)
    fails(result, "ResNet18_Digits_FT_final.pth is damaged or not a checkpoint of this project")


def _ending(error, capsys):
    """How a script ends whose main raises `error`: the exit status, and what it prints."""

    def main():
        raise error

    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        with pytest.raises(SystemExit) as ending:
            cli.run(main)
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
    code = ending.value.code
    return (1, code) if isinstance(code, str) else (code, capsys.readouterr().err)


@pytest.mark.parametrize(
    "error",
    [
        torch.cuda.OutOfMemoryError("CUDA out of memory. Tried to allocate 9 GiB"),
        RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling cublasCreate(handle)"),
        MemoryError(),
        RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes"),
    ],
)
def test_too_little_memory_says_what_to_lower(error, capsys):
    status, message = _ending(error, capsys)
    assert status == 1
    assert "lower --batch-size" in message
    assert "\n" not in message.strip()


def test_an_interruption_says_how_to_go_on(capsys):
    status, message = _ending(KeyboardInterrupt(), capsys)
    assert status == 130
    assert "The same command, without --fresh, goes on" in message


def test_an_interruption_that_became_another_error_is_still_one(capsys, monkeypatch):
    monkeypatch.setattr(cli, "_received", [15])
    assert _ending(RuntimeError("unexpected pos 704 vs 598"), capsys)[0] == 143


def test_an_operation_without_a_deterministic_form_is_named(capsys):
    message = "max_pool3d_backward_cuda does not have a deterministic implementation, but you set 'torch.use_..."
    status, told = _ending(RuntimeError(message), capsys)
    assert status == 1
    assert told == "Error: max_pool3d_backward_cuda has no deterministic form in PyTorch: leave out --deterministic"


def test_an_error_of_ours_is_not_disguised(capsys):
    with pytest.raises(RuntimeError, match="a bug"):
        _ending(RuntimeError("a bug"), capsys)


@pytest.mark.parametrize(
    ("options", "expected"),
    [([], (0.2, 0.2)), (["--ratio", "0.5"], (0.5, 0.5)), (["--macs-ratio", "0.4"], (0.2, 0.4)),
     (["--macs-ratio", "none"], (0.2, None)), (["--ratio", "none", "--macs-ratio", "0.4"], (None, 0.4))],
)  # fmt: skip
def test_the_macs_follow_the_parameters_unless_told_otherwise(monkeypatch, options, expected):
    monkeypatch.setattr(sys, "argv", ["script", *options])
    args = cli.parse("A scenario.", ratio=0.2, macs_ratio="same")
    assert (args.ratio, args.macs_ratio) == expected
    assert args.config == {"ratio": expected[0], "macs_ratio": expected[1]}
