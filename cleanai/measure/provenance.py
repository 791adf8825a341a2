"""Where a result comes from: settings, environment, dataset; and the warnings about it."""

from __future__ import annotations

import math
import platform
from importlib.metadata import version
from typing import Any

import torch

import cleanai
from cleanai.data.images import Images
from cleanai.runtime import distributed
from cleanai.runtime.compute import Compute
from cleanai.runtime.scenario import Scenario

PACKAGES = ("torch", "torchvision", "torch-pruning", "thop", "numpy")
FEW_CHANNELS = 1 / 8  # share of a layer's channels; pruning keeps a tenth or more


def checkpoint_facts(scenario: Scenario, images: Images, compute: Compute, config: dict[str, Any]) -> dict[str, Any]:
    """The entries of a checkpoint besides its weights. `config`, with conditions and images, identifies the run."""
    if compute.device.type == "cuda":
        how = ", deterministic" if compute.deterministic else ""
    else:  # another number of threads sums in another order
        how = f", CPU threads: {torch.get_num_threads()}"
    how += ", compiled" if compute.compiled else ""
    conditions = f"{compute.precision}{how}, {len(images.train):,} + {len(images.test):,} images from {images.source}"
    return {
        "model": scenario.model,
        "dataset": scenario.dataset,
        "classes": list(images.classes),
        "image_size": list(images.train.pixels.shape[-2:]),
        "mean": images.train.mean.tolist(),
        "std": images.train.std.tolist(),
        "config": {**config, "conditions": conditions, **_short_digests(images)},
    }


def describe_run(
    scenario: Scenario, images: Images, compute: Compute, config: dict[str, Any], calibration_images: int | None = None
) -> dict[str, Any]:
    """The entries of a record that are not measured: scenario, configuration, environment and dataset."""
    return {
        "scenario": scenario.name,
        "method": scenario.method,
        "config": config,
        "environment": describe_environment(compute),
        "dataset": {
            "name": scenario.dataset,
            "source": images.source,
            "train_images": len(images.train),
            "test_images": len(images.test),
            "classes": list(images.classes),
            **{f"{part}_per_class": _per_class(images, part) for part in ("train", "test")},
            **image_digests(images),
            **({} if calibration_images is None else _calibration(config, calibration_images)),
        },
    }


def _calibration(config: dict[str, Any], images: int) -> dict[str, Any]:
    return {"calibration_images": images, "calibrated_on": config["calibrate_on"]}


def _per_class(images: Images, part: str) -> list[int]:
    labels = getattr(images, part).labels.cpu()
    return torch.bincount(labels, minlength=len(images.classes)).tolist()


def image_digests(images: Images) -> dict[str, str]:
    """`train_sha256` and `test_sha256`: of the pixels and labels of the training and of the test images."""
    return {f"{part}_sha256": getattr(images, part).sha256 for part in ("train", "test")}


def _short_digests(images: Images) -> dict[str, str]:
    return {part: digest[:16] for part, digest in image_digests(images).items()}


def describe_environment(compute: Compute) -> dict[str, Any]:
    """The machine and the versions of the packages."""
    return {
        "device": compute.device_name,
        "device_type": compute.device.type,
        "cpu_threads": torch.get_num_threads(),
        "precision": compute.precision,
        "deterministic": compute.deterministic,
        "compiled": compute.compiled,
        "processes": distributed.processes(),
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        "cleanai": cleanai.__version__,
        **{package: version(package) for package in PACKAGES},
        **({"cudnn": torch.backends.cudnn.version()} if compute.device.type == "cuda" else {}),
    }


def at_chance_level(percents: dict[str, float], original_percent: float, images: Images) -> list[str]:
    """A warning about each network that is hardly better than guessing, from the accuracies by the networks' names.

    That is an accuracy above guessing of at most a tenth of the original network's, or within three standard deviations
    of guessing on the test images. Who guesses always says the class with the most of them.
    """
    guessing = int(images.test.labels.cpu().bincount().max()) / len(images.test)
    above_guessing = max(0.0, original_percent / 100 - guessing)
    noise = 3 * math.sqrt(guessing * (1 - guessing) / len(images.test))
    limit_percent = min(100, 100 * (guessing + max(above_guessing / 10, noise)))
    return [
        f"{name} is hardly better than guessing: {percent:.2f}% accuracy on {len(images.test):,} test images, and "
        f"the most frequent of the {len(images.classes)} classes alone gives {100 * guessing:.2f}%"
        for name, percent in percents.items()
        if percent < limit_percent
    ]


def find_warnings(models: dict[str, Any], layers: list[dict[str, Any]], images: Images) -> list[str]:
    """Warnings about a pruning script's record, from its `models` and `layers`."""
    stages = {"original": "The original network", "pruned": "The pruned network", "fine_tuned": "The final network"}
    percents = {stage: models[name]["accuracy_percent"] for name, stage in stages.items()}
    warnings = at_chance_level(percents, models["original"]["accuracy_percent"], images)
    thin = [layer for layer in layers if layer["channels_after"] <= FEW_CHANNELS * layer["channels_before"]]
    if thin:
        widths = ", ".join(f"{x['name']} {x['channels_after']} of {x['channels_before']}" for x in thin)
        warnings.append(f"Few channels remain in {widths}")
    return warnings
