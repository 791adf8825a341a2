"""Options of the scripts, and how they end: run as commands, or with their parts called."""

import contextlib
import re
import runpy
import signal
import sys

import pytest
import torch

from cleanai import UserError, cli, exit
from cleanai.options import TOGETHER
from cleanai.runtime.scenario import CHECKPOINTS_DIR, SCRIPTS_DIR, Scenario
from tests.helpers import COMPARE, SCRIPTS, SWEEP, ended, fails, run, started

COMMON = {"--data-dir", "--checkpoints-dir", "--fresh", "--device", "--deterministic", "--compile"}
OTHER_OPTIONS = {
    SCRIPTS[0]: COMMON | {"--models-dir"},
    SCRIPTS[1]: COMMON | {"--export", "--timing-seconds", "--robustness-images", "--strict"},
    SCRIPTS[2]: COMMON | {"--export", "--timing-seconds", "--robustness-images", "--strict"},
    COMPARE: {"--checkpoints-dir"},
    SWEEP: COMMON | {"--tolerance"},
}
PRUNING = runpy.run_path(str(SCRIPTS_DIR / SCRIPTS[2]))["SETTINGS"]
DEFAULTS = {  # what None means, where it is not "all"
    "image_size": "as the files are",
    "mean": "of the training images",
    "std": "of the training images",
    "accept_drop": "no verdict",
    "keep_layers": "none",
    "speedup": "no goal",
    "speedup_of": "single",
}


@pytest.mark.parametrize("script", OTHER_OPTIONS)
def test_help_explains_every_option_with_its_default(script):
    result = run(script, "--help")
    assert result.returncode == 0
    options = re.split(r"\n  (?=-)", result.stdout.split("\noption")[1])[1:]
    described = {option.replace("-h, ", "").split()[0]: " ".join(option.split()) for option in options}
    settings = runpy.run_path(str(SCRIPTS_DIR / script))["SETTINGS"]
    assert described.keys() == {"--help", *("--" + name.replace("_", "-") for name in settings), *OTHER_OPTIONS[script]}
    for name, default in settings.items():
        shown = " ".join(map(str, default)) if isinstance(default, list) else default
        if default is None:
            shown = DEFAULTS.get(name, "all")
        assert described["--" + name.replace("_", "-")].endswith(f"(default: {shown})")
    for option, text in described.items():
        assert len(text.split()) >= 4, f"{option} is not explained"
    assert f"python test_scenarios/{script}" in result.stdout


def test_a_script_without_work_does_not_import_pytorch(tmp_path):
    program = (
        "import runpy, sys\nsys.argv = sys.argv[1:]\ntry:\n  runpy.run_path(sys.argv[0], run_name='__main__')\n"
        "except SystemExit:\n  pass\nassert 'torch' not in sys.modules"
    )
    commands = [*([script, "--help"] for script in OTHER_OPTIONS), [SCRIPTS[0], "--epochs", "none"]]
    commands += [[script, "--checkpoints-dir", tmp_path] for script in (*SCRIPTS[1:], COMPARE, SWEEP)]
    for script, *options in commands:
        with started(["-c", program, SCRIPTS_DIR / script, *options]) as process:
            assert ended(process).returncode == 0, (script, options)


@pytest.mark.parametrize("script", OTHER_OPTIONS)
def test_a_missing_package_is_named_at_once(script):
    program = "import runpy, sys\nsys.modules['reportlab'] = None\nsys.argv = sys.argv[1:]\n"
    program += "runpy.run_path(sys.argv[0], run_name='__main__')"
    with started(["-c", program, SCRIPTS_DIR / script]) as process:
        fails(ended(process), "No module named 'reportlab'", "pip install -r requirements.txt")


@pytest.mark.parametrize(
    ("script", "options", "expected"),
    [
        (1, ["--ratio", "1.5"], "--ratio: 1.5 is not a number between 0 and 1"),
        (2, ["--ratio", "0"], "--ratio: 0 "),
        (1, ["--ratio", "nan"], "--ratio: nan "),
        (1, ["--macs-ratio", "most"], "--macs-ratio: most "),
        (2, ["--ratio", "none"], "--ratio: none leaves nothing to remove without a --macs-ratio"),
        (1, ["--round-to", "0"], "--round-to: 0 "),
        (1, ["--repair", "half"], "--repair"),
        (0, ["--epochs", "0"], "--epochs: 0 takes a trained network as it is"),
        (0, ["--epoch", "2", "--wieghts=none", "--epoch", "3"], "did you mean --epochs, --weights?"),
        (2, ["--weights", "my.pth"], "unrecognized arguments: --weights my.pth (--help lists the options)"),
        (2, ["--distil", "0.5", "--epochs", "0"], "--distil: it is for fine-tuning"),
        (1, ["--epochs", "-1"], "--epochs: -1 is not a whole number of at least 0"),
        (0, ["--weight-decay", "-1"], "--weight-decay: -1 "),
        (0, ["--mean", "123", "116", "103"], "--mean: 123 is not a number between 0 and 1, 1 excluded"),
        (0, ["--mean", "0.5", "0.5"], "--mean: expected 3 arguments"),
        (0, ["--std", "0", "0", "0"], "--std: 0 is not a number between 0 and 1, 0 excluded"),
        (0, ["--std", "0.2", "0.2", "0.2"], "--std: it belongs together with --mean"),
        (0, ["--batch-size", "-4"], "--batch-size"),
        (0, ["--lr", "fast"], "--lr: fast "),
        (0, ["--weights", "imagenet22k"], "--weights: imagenet22k "),
        (
            0,
            ["--weights", "~no-such-user/x.pth"],
            "--weights: ~no-such-user/x.pth is neither imagenet, none, nor a file",
        ),
        (1, ["--coverage-metric", "mean"], "--coverage-metric"),
        (1, ["--accept-drop", "0"], "--accept-drop: 0 is not a number between 0 and 100"),
        (2, ["--ratio", "auto"], "--ratio: auto needs --accept-drop or --speedup"),
        (1, ["--speedup", "1.5", "--ratio", "0.2"], "--ratio: --speedup decides how much is removed"),
        (1, ["--speedup", "1"], "--speedup: 1 is not a number between 1 and 100"),
        (1, ["--speedup-of", "batch"], "--speedup-of: it is for --speedup"),
        (2, ["--ratio", "auto", "--accept-drop", "1", "--macs-ratio", "0.3"], "--macs-ratio: with --ratio auto"),
        (2, ["--strict"], "--strict: there is no verdict without --accept-drop"),
        (1, ["--export", "tflite"], "--export"),
        (0, ["--export", "onnx"], "--export onnx"),
        (0, ["--epoch", "3"], "--epoch 3"),
        (0, ["--seed", str(2**31)], "--seed: 2147483648 is not a whole number from 0 to 2147483647"),
        (0, ["--shift", "1"], "--shift: 1 "),
        (0, ["--dataset", "Digits", "--flip", "horizontal"], "--flip: Digits are never mirrored"),
        (2, ["--image-size", "32"], "--image-size 32: give it to script 1"),
        (0, ["--dataset", "C:\\images"], "--dataset: C:\\images is not a name of letters, digits, _ and -"),
        (1, ["--dataset", "../CIFAR10"], "--dataset: ../CIFAR10 "),
    ],
)
def test_a_wrong_option_is_answered_in_one_line(script, options, expected):
    result = run(SCRIPTS[script], *options)
    fails(result, expected)
    assert result.returncode == 2


def _with_settings(monkeypatch, script, change):
    """The settings of a copy of a script in which some are changed, or removed by `...`."""
    monkeypatch.setattr(sys, "argv", ["my_script.py"])
    settings = {**runpy.run_path(str(SCRIPTS_DIR / script))["SETTINGS"], **change}
    return {name: value for name, value in settings.items() if value is not ...}


@pytest.mark.parametrize(
    ("script", "change", "expected"),
    [
        (SCRIPTS[1], {"repair": "Full"}, "SETTINGS, \"repair\": argument --repair: invalid choice: 'Full'"),
        (SCRIPTS[2], {"calibrate_on": "Train"}, "--calibrate-on: invalid choice: 'Train'"),
        (SCRIPTS[2], {"ratio": 20}, "--ratio: 20 is not a number between 0 and 1"),
        (SCRIPTS[2], {"steps": 0}, "--steps: 0 is not a whole number of at least 1"),
        (SCRIPTS[0], {"mean": 0.5}, "--mean: expected 3 arguments"),
        (SCRIPTS[0], {"mean": [0.5, 0.5, 0.5]}, "--mean: it belongs together with --std"),
        (SWEEP, {"epochs": None}, '"epochs": it cannot be None'),
        (SWEEP, {"lr": [0.001, 0.01]}, '"lr": it is one value, not 2'),
        (SCRIPTS[0], {"epoch": 5}, 'there is no "epoch"; did you mean "epochs"?'),
        (SCRIPTS[2], {"distil": ..., "seed": ...}, '"seed", "distil" missing: copy their lines'),
    ],
)
def test_a_wrong_setting_in_a_script_is_answered_like_a_wrong_option(monkeypatch, capsys, script, change, expected):
    settings = _with_settings(monkeypatch, script, change)
    with pytest.raises(SystemExit) as ending:
        cli.parse("A scenario.", settings)
    assert ending.value.code == 2
    assert expected in capsys.readouterr().err


def test_settings_may_be_written_as_is_natural(monkeypatch):
    change = {"round_to": 32, "keep_layers": "layer4.*", "lr": 1e-5, "ratio": None, "macs_ratio": 0.3}
    config = cli.parse("A scenario.", _with_settings(monkeypatch, SCRIPTS[1], change)).config
    assert config.items() >= {**change, "round_to": [32], "keep_layers": ["layer4.*"]}.items()
    none = cli.parse("A scenario.", _with_settings(monkeypatch, SCRIPTS[1], {"keep_layers": []})).config
    assert none["keep_layers"] is None
    lost = _with_settings(monkeypatch, SCRIPTS[0], {"weights": "lost.pth"})
    monkeypatch.setattr(sys, "argv", ["my_script.py", "--weights", "none"])
    assert cli.parse("A scenario.", lost).config["weights"] == "none"


def test_a_setting_that_a_copy_of_an_older_script_lacks_is_named(monkeypatch):
    args = cli.parse("A scenario.", _with_settings(monkeypatch, SCRIPTS[0], {"mean": ..., "std": ...}))
    with pytest.raises(UserError, match='SETTINGS has no "mean"'):
        print(args.mean)


@pytest.mark.parametrize(("script", "key"), [(SCRIPTS[1], "ratio"), (SCRIPTS[2], "ratio"), (SWEEP, "ratios")])
def test_what_a_script_needs_late_is_what_it_has(script, key):
    settings = runpy.run_path(str(SCRIPTS_DIR / script))["SETTINGS"].keys() - {key, "coverage_metric"}
    assert settings == {*TOGETHER[key]}


@pytest.mark.parametrize("script", SCRIPTS[1:])
def test_pruning_before_preparing_names_the_command_to_run(script, tmp_path):
    command = f"python test_scenarios/{SCRIPTS[0]}"
    fails(run(script, "--checkpoints-dir", tmp_path), f'{command} --checkpoints-dir "{tmp_path}"')
    fails(run(script, "--dataset", "Digits", "--checkpoints-dir", tmp_path), f"{command} --dataset Digits")
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize("script", SCRIPTS)
def test_an_unknown_dataset_is_named(script, tmp_path):
    result = run(script, "--dataset", "CIFAR99", "--data-dir", tmp_path, "--checkpoints-dir", tmp_path / "out")
    fails(result, "CIFAR99", "--dataset CIFAR10 or Digits")
    assert not (tmp_path / "out").exists()


def test_cuda_without_cuda_is_refused(tmp_path):
    result = run(SCRIPTS[0], "--device", "cuda", "--checkpoints-dir", tmp_path / "out", CUDA_VISIBLE_DEVICES="-1")
    fails(result, "--device cpu")
    assert not (tmp_path / "out").exists()


def test_a_damaged_fine_tuned_model_is_named(tmp_path):
    path = tmp_path / "TS1" / "ResNet18_Digits_FT_final.pth"
    path.parent.mkdir()
    path.write_bytes(b"not a checkpoint")
    fails(run(SCRIPTS[1], "--dataset", "Digits", "--checkpoints-dir", tmp_path), str(path))


def _ending(error, capsys, interruption=None):
    """How a script ends whose main raises `error`, after a signal if given: the exit status, and what it prints."""

    def main():
        with contextlib.suppress(KeyboardInterrupt):
            if interruption:
                signal.raise_signal(interruption)
        raise error

    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        with pytest.raises(SystemExit) as ending:
            exit.run_script(main)
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
    return ending.value.code, capsys.readouterr().err


@pytest.mark.parametrize(
    "error",
    [
        torch.cuda.OutOfMemoryError("CUDA out of memory. Tried to allocate 9 GiB"),
        MemoryError(),
        *map(
            RuntimeError,
            (
                "CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`",
                "CUDA error: CUBLAS_STATUS_NOT_INITIALIZED when calling `cublasCreate(handle)`",
                "cusolver error: CUSOLVER_STATUS_INTERNAL_ERROR, when calling `cusolverDnCreate(handle)`",
                "cuDNN error: CUDNN_STATUS_INTERNAL_ERROR",
                "cuDNN error: CUDNN_STATUS_INTERNAL_ERROR_DEVICE_ALLOCATION_FAILED",
                "GET was unable to find an engine to execute this computation",
                "Unable to find a valid cuDNN algorithm to run convolution",
                "CUDA error: out of memory\nCUDA kernel errors might be asynchronously reported at some other API call",
                "[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes",
                "[enforce fail at alloc_cpu.cpp:114] data. DefaultCPUAllocator: not enough memory: you tried",
                "unable to mmap 44 bytes from file <ResNet18.pth>: Cannot allocate memory (12)",
            ),
        ),
    ],
)
def test_too_little_memory_says_what_to_lower(error, capsys):
    status, message = _ending(error, capsys)
    assert status == 1
    assert "lower --batch-size" in message
    assert "\n" not in message.strip()


def test_an_interruption_says_how_to_resume(capsys):
    status, message = _ending(KeyboardInterrupt(), capsys)
    assert status == 130
    assert message.startswith("\nInterrupted. The same command goes on")
    assert "--fresh" not in message


def test_an_interruption_that_became_another_error_is_still_one(capsys):
    assert _ending(RuntimeError("unexpected pos 704 vs 598"), capsys, signal.SIGTERM)[0] == 128 + signal.SIGTERM


def test_an_operation_without_a_deterministic_form_is_named(capsys):
    message = "max_pool3d_backward_cuda does not have a deterministic implementation, but you set 'torch.use_..."
    assert _ending(RuntimeError(message), capsys) == (
        1,
        "Error: max_pool3d_backward_cuda has no deterministic form in PyTorch: leave out --deterministic\n",
    )


def test_an_error_of_ours_is_not_disguised(capsys):
    with pytest.raises(RuntimeError, match="a bug"):
        _ending(RuntimeError("a bug"), capsys)


@pytest.mark.parametrize(
    ("options", "expected"),
    [([], (0.2, 0.2)), (["--ratio", "0.5"], (0.5, 0.5)), (["--macs-ratio", "0.4"], (0.2, 0.4)),
     (["--macs-ratio", "none"], (0.2, None)), (["--ratio", "none", "--macs-ratio", "0.4"], (None, 0.4))],
)  # fmt: skip
def test_the_macs_follow_the_parameters_unless_given(monkeypatch, options, expected):
    monkeypatch.setattr(sys, "argv", ["script", *options])
    args = cli.parse("A scenario.", PRUNING)
    assert (args.ratio, args.macs_ratio) == expected
    assert args.config == {**PRUNING, "ratio": expected[0], "macs_ratio": expected[1]}


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        (["--ratio", "auto", "--accept-drop", "1"], ("auto", "same", 1.0, None, None)),
        (["--speedup", "1.5"], ("auto", "same", None, 1.5, "single")),
        (
            ["--speedup=2", "--speedup-of=batch", "--ratio=auto", "--macs-ratio=none"],
            ("auto", None, None, 2.0, "batch"),
        ),
        ([], (0.2, 0.2, None, None, None)),
    ],
)
def test_the_limits_of_the_pruning_are_settings_and_repeat_the_run(monkeypatch, options, expected):
    monkeypatch.setattr(sys, "argv", ["script", *options])
    config = cli.parse("A scenario.", PRUNING).config
    assert tuple(config[name] for name in ("ratio", "macs_ratio", "accept_drop", "speedup", "speedup_of")) == expected
    command = Scenario("TS1", "ResNet18", "CIFAR10", CHECKPOINTS_DIR, "Wanda").command(config)
    monkeypatch.setattr(sys, "argv", command.split()[1:])
    assert cli.parse("A scenario.", PRUNING).config == config


@pytest.mark.parametrize(
    ("options", "flip"), [([], "horizontal"), (["--flip", "none"], "none"), (["--dataset", "Digits"], "none")]
)
def test_the_config_says_whether_images_are_mirrored(monkeypatch, options, flip):
    monkeypatch.setattr(sys, "argv", ["script", *options])
    assert cli.parse("A scenario.", {"dataset": "Pets", "flip": "auto"}).config["flip"] == flip
