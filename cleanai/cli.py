"""The options that the scripts share, and how a script ends when something is wrong.

A script names the options it takes by giving their defaults: its own constants. Nothing heavy is imported here, so
that `--help` and a wrong option answer at once.
"""
from __future__ import annotations

import argparse
import importlib.util
import os
import re
import signal
import sys
import traceback
from pathlib import Path
from types import FrameType, TracebackType
from typing import Any, Callable, NoReturn

from cleanai import UserError
from cleanai.runtime import distributed
from cleanai.runtime.files import file_digest
from cleanai.runtime.scenario import CHECKPOINTS_DIR, PROJECT


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: {message} (--help lists the options)\n")


def _whole(least: int) -> Callable[[str], int]:
    def parse(text: str) -> int:
        if not text.isdigit() or int(text) < least:
            raise argparse.ArgumentTypeError(f"{text} is not a whole number of at least {least}")
        return int(text)

    return parse


def _between(low: float, high: float) -> Callable[[str], float]:
    def parse(text: str) -> float:
        try:
            number = float(text)
        except ValueError:
            number = low
        if not low < number < high:
            raise argparse.ArgumentTypeError(f"{text} is not a number between {low:g} and {high:g}, both excluded")
        return number

    return parse


def _at_least_zero(text: str) -> float:
    return 0.0 if text in ("0", "0.0") else _between(0, 1)(text)


def _share(word: str) -> Callable[[str], float | str | None]:
    """A share of something, or `word`; "none" stands for no share at all."""
    share = _between(0, 1)

    def parse(text: str) -> float | str | None:
        return None if text == "none" else text if text == word else share(text)

    return parse


def _dataset(text: str) -> str:
    # It becomes part of file names: nothing that Windows or a path has another use for.
    if not re.fullmatch(r"[\w-]+", text):
        raise argparse.ArgumentTypeError(f"{text} is not a name of letters, digits, _ and -")
    return text


def _weights(text: str) -> str | Path:
    """"imagenet", "none", or an existing file."""
    if text in ("imagenet", "none"):
        return text
    path = Path(text).expanduser()
    if not path.is_file():
        raise argparse.ArgumentTypeError(f"{text} is neither imagenet, none, nor a file")
    return path


# What decides the results; an earlier run's files are taken up only when all of these were the same.
_SETTINGS: dict[str, dict[str, Any]] = {
    "dataset": {
        "type": _dataset,
        "help": "CIFAR10 (downloaded), Digits (embedded, small), or a folder of images in --data-dir",
    },
    "weights": {
        "type": _weights,
        "help": "what training starts from: imagenet (downloaded), none (random weights), or a file with a state dict "
        "of the network (.pth, .safetensors)",
    },
    "epochs": {"type": _whole(1), "help": "epochs of fine-tuning"},
    "batch_size": {
        "type": _whole(1),
        "help": "images per training step and calibration batch; lower it when GPU memory runs out",
    },
    "lr": {"type": _between(0, 10), "help": "peak learning rate of Adam"},
    "weight_decay": {"type": _at_least_zero, "help": "weight decay of Adam; 0 turns it off"},
    "train_samples": {"type": _whole(1), "help": "train on that many images only, chosen evenly over the classes"},
    "test_samples": {"type": _whole(1), "help": "measure accuracy on that many of the held-out test images only"},
    "ratio": {"type": _share("none"), "help": "share of the parameters to remove; none: however many go"},
    "macs_ratio": {
        "type": _share("same"),
        "help": "share of the multiply-accumulates to remove: a number, the same as --ratio, or none",
    },
    "ratios": {
        "type": _between(0, 1),
        "nargs": "+",
        "help": "rising shares of the parameters, and of the multiply-accumulates, to remove; each is one step "
        "from the one before it",
    },
    "steps": {"type": _whole(1), "help": "prune in that many steps, measuring the channels anew at each"},
    "round_to": {
        "type": _whole(1),
        "nargs": "+",
        "help": "widths stay multiples, as hardware likes them, of the first of these that allows it; 1 takes any",
    },
    "repair": {
        "choices": ("full", "bn", "none"),
        "help": "after each step: full lets the channels that stay take over what they can and recalibrates batch "
        "norm, bn only recalibrates, none does neither",
    },
    "repair_batches": {"type": _whole(1), "help": "batches of training images, without their labels, for the repair"},
    "calibration_batches": {
        "type": _whole(1),
        "help": "batches of test images to measure the channels on; at most three quarters of the images are taken",
    },
    "coverage_metric": {
        "choices": ("normalized_mean", "frequency", "mean_absolute", "combined"),
        "help": "how a channel's coverage is measured",
    },
    "seed": {"type": _whole(0), "help": "the random numbers start from it"},
    "precision": {
        "choices": ("auto", "float32", "bfloat16", "float16"),
        "help": "arithmetic of training and evaluation; auto takes bfloat16, on older GPUs float16, where the "
        "hardware has it",
    },
}
_COMMON: dict[str, dict[str, Any]] = {
    "device": {"choices": ("auto", "cpu", "cuda"), "default": "auto", "help": "auto takes CUDA if it is there"},
    "deterministic": {
        "action": "store_true",
        "help": "let a GPU compute the same in every run, more slowly; a CPU does so anyway",
    },
    "data_dir": {"type": Path, "default": PROJECT / "downloaded_datasets", "help": "where datasets are"},
    "models_dir": {"type": Path, "default": PROJECT / "downloaded_models", "help": "where pretrained weights are"},
    "checkpoints_dir": {"type": Path, "default": CHECKPOINTS_DIR, "help": "where results go"},
    "export": {
        "choices": ("none", "onnx"),
        "default": "none",
        "help": "onnx writes the final model as ONNX too and times it in ONNX Runtime; works on a finished run as well",
    },
    "sweep": {
        "action": "store_true",
        "help": "prune the fine-tuned model at several ratios by both criteria, by L2 magnitude and at random, and "
        "draw the accuracies; an interrupted sweep keeps what it measured, and prunes again from the first ratio of "
        "the criterion it was at",
    },
    "fresh": {"action": "store_true", "help": "start over: delete what this script made before for this dataset"},
}
# Options of the scripts that have another one.
_ONLY_WITH = {
    "models_dir": "weights",
    "export": "ratio",
    "sweep": "ratios",
    **dict.fromkeys(("device", "data_dir", "fresh"), "precision"),
    "deterministic": "lr",
}
_WITHOUT_SWEEP = ("dataset", "checkpoints_dir", "sweep")  # all that comparing takes; the others are for --sweep
_EXPORT_PACKAGES = ("onnx", "onnxruntime", "onnxscript")  # the extra "onnx" of pyproject.toml


class Options(argparse.Namespace):
    """The parsed options; `config` holds those of them that decide the results."""

    config: dict[str, Any]


def parse(description: str, **defaults: Any) -> Options:
    """Parse the command line: the settings named in `defaults`, with these as their defaults, and the common options.

    Ends the program with one line when an option is wrong; UserError when packages for an export are missing.
    """
    form = argparse.RawDescriptionHelpFormatter
    parser = _Parser(description=description, formatter_class=form, allow_abbrev=False)
    common = {name: option for name, option in _COMMON.items() if _ONLY_WITH.get(name) in {None, *defaults}}
    options = {**{name: {**_SETTINGS[name], "default": default} for name, default in defaults.items()}, **common}
    if defaults.get("epochs") == 0 or "weights" in defaults:  # where training is a choice
        options["epochs"]["type"] = _whole(0)
    if "weights" in defaults:
        options["epochs"]["help"] += "; 0 takes the network in --weights FILE as it is"
    for_sweep = parser
    if "ratios" in defaults:
        for_sweep = parser.add_argument_group("with --sweep", "Fine-tuning is that of each network, at each ratio.")
    for name, option in options.items():
        nothing = "none" if "ratio" in name else "all"
        default = option.get("default")
        several = " ".join(map(str, default)) if isinstance(default, list) else "%(default)s"
        shown = nothing if default is None else several
        text = option["help"] if "action" in option else f"{option['help']} (default: {shown})"
        group = parser if name in _WITHOUT_SWEEP else for_sweep
        group.add_argument(_flag(name), **{**option, "help": text})
    args = parser.parse_args(namespace=Options())
    if "ratio" in defaults:
        args.macs_ratio = args.ratio if args.macs_ratio == "same" else args.macs_ratio
        if args.ratio is None and args.macs_ratio is None:
            parser.error("argument --ratio: none leaves nothing to remove without a --macs-ratio")
        if args.export == "onnx":
            _require_export_packages()
    if "ratios" in defaults:
        others = (_flag(name) for name in options if name not in _WITHOUT_SWEEP)
        unused = [flag for flag in others if any(given.split("=")[0] == flag for given in sys.argv[1:])]
        if unused and not args.sweep:
            parser.error(f"argument {unused[0]}: is for --sweep")
        if args.ratios != sorted(set(args.ratios)):
            parser.error(f"argument --ratios: {' '.join(map(str, args.ratios))} do not rise one after the other")
    processes = distributed.processes()
    if "lr" in defaults and args.batch_size % processes:
        raise UserError(f"--batch-size {args.batch_size} cannot be shared evenly by {processes} processes")
    if "weights" in defaults and args.epochs == 0 and not isinstance(args.weights, Path):
        parser.error("argument --epochs: 0 takes a trained network as it is: name its file with --weights")
    args.config = {name: getattr(args, name) for name in defaults}
    if isinstance(args.config.get("weights"), Path):
        args.config.update(weights=args.weights.name, weights_sha256=file_digest(args.weights))
    return args


def _flag(name: str) -> str:
    return "--" + name.replace("_", "-")


def _require_export_packages() -> None:
    missing = [name for name in _EXPORT_PACKAGES if importlib.util.find_spec(name) is None]
    if missing:
        raise UserError(
            f"--export onnx needs packages that are not installed ({', '.join(missing)}): "
            f"pip install {' '.join(missing)}"
        )


_STOPPED = "\nInterrupted. The same command, without --fresh, goes on where it stopped."
_SIGNALS = [getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGBREAK") if hasattr(signal, name)]
_received: list[int] = []  # the signal that stopped the program


def run(main: Callable[[], None]) -> NoReturn:
    """Run a script's `main` and end the program: status 0, or one line on what is wrong and status 1.

    Ctrl-C and SIGTERM end it with one line, and status 130 and 143.
    """
    for stream in (sys.stdout, sys.stderr):
        stream.reconfigure(errors="replace")  # a console that cannot print a character prints ? instead of failing
    if distributed.rank() > 0:
        sys.stdout = Path(os.devnull).open("w", encoding="utf-8")  # noqa: SIM115
    for number in _SIGNALS:
        if signal.getsignal(number) is not signal.SIG_IGN:  # as in the background of a shell: it stays ignored
            signal.signal(number, _stop)
    try:
        try:
            main()
        except Exception as error:
            if not _received:
                raise
            # What an interruption became on its way: torch.save, for one, raises a RuntimeError of its own then.
            raise KeyboardInterrupt from error
    except UserError as error:
        sys.exit(f"Error: {error}" if distributed.rank() == 0 else 1)
    except KeyboardInterrupt:
        for number in _SIGNALS:
            signal.signal(number, signal.SIG_IGN)  # a second one has nothing more to stop
        if distributed.rank() == 0:
            print(_STOPPED, file=sys.stderr)
        sys.exit(128 + (_received or [signal.SIGINT])[0])
    except OSError as error:
        sys.exit(f"Error: {error}")
    except (RuntimeError, MemoryError) as error:
        shortage = "out of memory|can't allocate memory|not enough memory|ALLOC_FAILED"
        if "does not have a deterministic implementation" in str(error):
            sys.exit(f"Error: {str(error).split()[0]} has no deterministic form in PyTorch: leave out --deterministic")
        if not isinstance(error, MemoryError) and not re.search(shortage, str(error)):
            raise
        sys.exit("Error: there is too little free memory: lower --batch-size and add --fresh, or use another --device")
    sys.exit(0)


def _stop(number: int, frame: FrameType | None) -> NoReturn:
    for each in _SIGNALS:
        signal.signal(each, _stop_at_once)
    if any("importlib" in each.f_code.co_filename for each, _ in traceback.walk_stack(frame)):
        _stop_at_once(number, frame)  # packages being imported swallow what is raised, or abort
    _received.append(number)
    raise KeyboardInterrupt


def _stop_at_once(number: int, _: FrameType | None) -> NoReturn:
    # Where the first one was swallowed, as in a destructor, or is still being cleaned up after; the next run does that.
    os.write(2, f"{_STOPPED}\n".encode())
    os._exit(128 + number)


def _stop_before_run(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    if issubclass(kind, KeyboardInterrupt):
        _stop_at_once(signal.SIGINT, None)
    sys.__excepthook__(kind, error, trace)


sys.excepthook = _stop_before_run  # Ctrl-C while a script, which imports this module first, still imports the others
