"""What the options of the scripts are: their values, their defaults where a script gives none, and their help."""

from __future__ import annotations

import argparse
import math
from pathlib import Path
from typing import Any, Callable

from cleanai.runtime.files import expanded, printable
from cleanai.runtime.scenario import CHECKPOINTS_DIR, DATA_DIR, PROJECT, is_dataset_name

MOST_SEED = 2**31 - 1  # its products with epochs fit into PyTorch's seeds


def _whole(least: int, most: float = math.inf) -> Callable[[str], int]:
    def parse(text: str) -> int:
        if not text.isdigit() or not least <= int(text) <= most:
            range_ = f"of at least {least}" if most == math.inf else f"from {least} to {most}"
            raise argparse.ArgumentTypeError(f"{text} is not a whole number {range_}")
        return int(text)

    return parse


def _between(low: float, high: float, including: str = "") -> Callable[[str], float]:
    """A number between two others; `including` may name "low", "high" or "both", which are excluded otherwise."""
    included = {"": (), "low": (low,), "high": (high,), "both": (low, high)}[including]
    excluded = [f"{end:g}" for end in (low, high) if end not in included]
    shown = f", {'both' if len(excluded) == 2 else excluded[0]} excluded" if excluded else ""

    def parse(text: str) -> float:
        try:
            number = float(text)
        except ValueError:
            number = math.nan
        if not (low < number < high or number in included):
            raise argparse.ArgumentTypeError(f"{text} is not a number between {low:g} and {high:g}{shown}")
        return number

    return parse


def _share(word: str) -> Callable[[str], float | str | None]:
    """A share between 0 and 1, or `word`; "none" is None."""
    share = _between(0, 1)

    def parse(text: str) -> float | str | None:
        return None if text == "none" else text if text == word else share(text)

    return parse


def _dataset(text: str) -> str:
    if not is_dataset_name(text):
        raise argparse.ArgumentTypeError(f"{text} is not a name of letters, digits, _ and -")
    return text


def _folder(text: str) -> Path:
    if printable(text) != text:  # a record could not hold it
        raise argparse.ArgumentTypeError(f"{printable(text)} is not a name that can be printed: rename it")
    return expanded(text)  # a shell leaves --data-dir=~/images as it is


def _weights(text: str) -> str | Path:
    """ "imagenet", "none", or an existing file."""
    if text in ("imagenet", "none"):
        return text
    path = _folder(text)
    if not path.is_file():
        raise argparse.ArgumentTypeError(f"{text} is neither imagenet, none, nor a file")
    return path


# The options that decide the results. An earlier run's files are used only when all of these are the same.
SETTINGS: dict[str, dict[str, Any]] = {
    "dataset": {
        "type": _dataset,
        "help": "CIFAR10 (downloaded), Digits (embedded, small), or an image folder in --data-dir",
    },
    "image_size": {
        "type": _whole(1),
        "help": "resize the shorter side of each image to that many pixels and crop the longer one to its middle; "
        "scripts 2, 3 and 5 take it, --flip and --shift from the network of script 1",
    },
    "flip": {
        "choices": ("auto", "none", "horizontal"),
        "help": "horizontal mirrors training images at random, also those of the repair after pruning; none for images "
        "that a mirror makes wrong, such as text; auto is none for Digits and horizontal for others",
    },
    "shift": {
        "type": _between(0, 1, "low"),
        "help": "largest random shift of training images, also of those of the repair, as a share of their height; "
        "0 turns it off",
    },
    "weights": {
        "type": _weights,
        "help": "what training starts from: imagenet (downloaded), none (random weights), or a file with a state dict "
        "of the network (.pth, .safetensors)",
    },
    "mean": {
        "type": _between(0, 1, "low"),
        "nargs": 3,
        "metavar": ("R", "G", "B"),
        "help": "means of the three channels, of pixels between 0 and 1, that inputs are normalised with; give those "
        "that your trained network was made for",
    },
    "std": {
        "type": _between(0, 1, "high"),
        "nargs": 3,
        "metavar": ("R", "G", "B"),
        "help": "standard deviations of the three channels, likewise",
    },
    "epochs": {"type": _whole(0), "help": "epochs of fine-tuning"},
    "batch_size": {
        "type": _whole(1),
        "help": "images per training step and per calibration batch; lower it when GPU memory runs out",
    },
    "lr": {"type": _between(0, 10), "help": "peak learning rate of Adam"},
    "weight_decay": {"type": _between(0, 1, "low"), "help": "weight decay of Adam; 0 turns it off"},
    "distil": {
        "type": _between(0, 1, "both"),
        "help": "distillation: share of the loss that compares the outputs with those of the original network, at a "
        "temperature of 4; the rest is for the labels; 0 turns it off",
    },
    "train_samples": {
        "type": _whole(1),
        "help": "train on that many images, balanced over the classes; scripts 2, 3 and 5 also repair on these only",
    },
    "test_samples": {"type": _whole(1), "help": "measure accuracy on that many of the held-out test images"},
    "ratio": {
        "type": _share("auto"),
        "help": "share of the parameters to remove, between 0 and 1; none = no limit; auto = in steps of 5%% until "
        "--accept-drop or --speedup ends it, so --steps does not count",
    },
    "macs_ratio": {
        "type": _share("same"),
        "help": "share of the multiply-accumulates (FLOPs) to remove: a number, same as --ratio, or none = no limit",
    },
    "accept_drop": {
        "type": _between(0, 100),
        "help": "percentage points of accuracy that may be lost, named beforehand: the report says PASS, FAIL or NOT "
        "SHOWN, by the 95%% interval on the held-out images; with --ratio auto, pruning ends at this drop on the "
        "calibration images",
    },
    "speedup": {
        "type": _between(1, 100),
        "help": "prune until the network is so many times as fast on this device, by the median; implies --ratio auto; "
        "without --accept-drop at any accuracy",
    },
    "speedup_of": {"choices": ("single", "batch"), "help": "what --speedup is measured on: one image, or a batch"},
    "keep_layers": {
        "nargs": "+",
        "metavar": "PATTERN",
        "help": "layers that keep all output channels, by name, as the report shows them; * stands for any characters: "
        'conv1 "layer4.*"',
    },
    "ratios": {
        "type": _between(0, 1),
        "nargs": "+",
        "help": "rising shares of the parameters and of the FLOPs to remove; each ratio is one pruning step",
    },
    "steps": {"type": _whole(1), "help": "prune in that many steps, scoring the channels again in each"},
    "round_to": {
        "type": _whole(1),
        "nargs": "+",
        "help": "keep layer widths multiples of the first of these that can meet the ratios; 1 allows any width",
    },
    "repair": {
        "choices": ("full", "distil", "bn", "none"),
        "help": "full adjusts layers by least squares, after each step and at the end to the original network, and "
        "recalibrates batch norm; distil then trains 300 batches, without labels, on the original network's "
        "outputs, which takes minutes on a CPU; bn only recalibrates batch norm; none does nothing",
    },
    "repair_batches": {
        "type": _whole(1),
        "help": "batches of training images for the repair, or as many as "
        "take about 3 GiB of memory; labels are not used",
    },
    "calibration_batches": {
        "type": _whole(1),
        "help": "batches of images to score channels on; of test images at most three quarters are used",
    },
    "calibrate_on": {
        "choices": ("test", "train"),
        "help": "score channels on test images, and hold out the others; or on training images, and hold out all test "
        "images, for those who must not use test images",
    },
    "coverage_metric": {
        "choices": ("normalized_mean", "frequency", "mean_absolute", "combined"),
        "help": "how the coverage of a channel is measured",
    },
    "seed": {"type": _whole(0, MOST_SEED), "help": "random seed"},
    "precision": {
        "choices": ("auto", "float32", "bfloat16", "float16"),
        "help": "precision of training and evaluation; auto takes the fastest that the hardware supports",
    },
}
COMMON: dict[str, dict[str, Any]] = {
    "device": {"choices": ("auto", "cpu", "cuda"), "default": "auto", "help": "auto takes CUDA if available"},
    "deterministic": {
        "action": "store_true",
        "help": "use deterministic algorithms on a GPU, more slowly; a CPU is always deterministic",
    },
    "compile": {
        "action": "store_true",
        "help": "compile the training steps with torch.compile: faster on a GPU after a minute or more of compiling; "
        "results differ by rounding",
    },
    "data_dir": {"type": _folder, "default": DATA_DIR, "help": "folder of the datasets"},
    "models_dir": {
        "type": _folder,
        "default": PROJECT / "downloaded_models",
        "help": "folder of the pretrained weights",
    },
    "checkpoints_dir": {"type": _folder, "default": CHECKPOINTS_DIR, "help": "folder of the results"},
    "timing_seconds": {
        "type": _between(0, 3600),
        "default": 20.0,
        "help": "about how many seconds each timing of the networks may take; less makes the times less certain",
    },
    "robustness_images": {
        "type": _whole(0),
        "help": "measure accuracy also on that many held-out test images with noise, blur, changed brightness and "
        "contrast, and JPEG compression; 0 leaves it out",
    },
    "tolerance": {
        "type": _between(0, 100, "low"),
        "default": 1.0,
        "help": "how many percentage points of accuracy the answer lets a network lose; changes no measurement",
    },
    "export": {
        "choices": ("none", "onnx", "onnx-int8", "pt2"),
        "default": "none",
        "help": "onnx: write the final model as ONNX too, and measure it in ONNX Runtime on the held-out test images; "
        "onnx-int8: also with weights and activations of 8 bits; pt2: write it as a program that PyTorch runs without "
        "this project; for a finished run, repeat its options",
    },
    "strict": {
        "action": "store_true",
        "help": "end with status 3 unless the verdict on --accept-drop is PASS; everything is written before",
    },
    "fresh": {"action": "store_true", "help": "start over: delete the results of this script for this dataset"},
}
# The common options that a script has because of one of its settings.
COME_WITH = {
    "dataset": ("checkpoints_dir",),
    "precision": ("device", "deterministic", "data_dir", "fresh"),
    "weight_decay": ("compile",),
    "weights": ("models_dir",),
    "ratio": ("export", "timing_seconds", "robustness_images"),
    "accept_drop": ("strict",),
    "ratios": ("tolerance",),
}
# The settings that a pruning script (with "ratio") and a sweep (with "ratios") need hours after their start.
_TRAINING = ("dataset", "epochs", "batch_size", "lr", "weight_decay", "train_samples", "seed", "precision")
_BOTH = (*_TRAINING, "calibration_batches", "calibrate_on", "repair_batches")
_PRUNING = (
    "macs_ratio",
    "accept_drop",
    "speedup",
    "speedup_of",
    "keep_layers",
    "steps",
    "round_to",
    "repair",
    "distil",
)
TOGETHER = {"ratio": (*_BOTH, *_PRUNING), "ratios": (*_BOTH, "test_samples")}
# What the default None means; for the others "all".
DEFAULT_WORDS = {
    **dict.fromkeys(("ratio", "macs_ratio"), "none"),
    **dict.fromkeys(("mean", "std"), "of the training images"),
    "image_size": "as the files are",
    "robustness_images": "1000, fewer for large networks",
    "accept_drop": "no verdict",
    "speedup": "no goal",
    "keep_layers": "none",
    "speedup_of": "single",
}
MAY_BE_NONE = {*DEFAULT_WORDS, "train_samples", "test_samples"}
