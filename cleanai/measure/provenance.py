"""What a result says about where it came from."""
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
FEW_CHANNELS = 1 / 8  # of a layer's: pruning leaves a tenth at least, and widths are multiples of 8 or more


def checkpoint_facts(scenario: Scenario, images: Images, compute: Compute, config: dict[str, Any]) -> dict[str, Any]:
    """What stands in a checkpoint beside its weights, so that they can be used and an earlier run recognised.

    To the settings in `config` it adds what an interrupted run must find again to be the same run.
    """
    how = ", deterministic" if compute.deterministic and compute.device.type == "cuda" else ""
    conditions = f"{compute.precision}{how}, {len(images.train):,} + {len(images.test):,} images from {images.source}"
    return {
        "model": scenario.model,
        "dataset": scenario.dataset,
        "classes": list(images.classes),
        "mean": images.train.mean.tolist(),
        "std": images.train.std.tolist(),
        "config": {**config, "conditions": conditions},
    }


def describe_run(
    scenario: Scenario, images: Images, compute: Compute, config: dict[str, Any], calibration_images: int | None = None
) -> dict[str, Any]:
    """The parts of a record that are no measurements: scenario, configuration, environment and dataset."""
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
            **({} if calibration_images is None else {"calibration_images": calibration_images}),
        },
    }


def describe_environment(compute: Compute) -> dict[str, Any]:
    """What a measurement was made on and with."""
    return {
        "device": compute.device_name,
        "device_type": compute.device.type,
        "cpu_threads": torch.get_num_threads(),
        "precision": compute.precision,
        "deterministic": compute.deterministic,
        "processes": distributed.processes(),
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        "cleanai": cleanai.__version__,
        **{package: version(package) for package in PACKAGES},
    }


def find_warnings(models: dict[str, Any], layers: list[dict[str, Any]], images: Images) -> list[str]:
    """What a reader must not overlook in a pruning script's record: sentences, none when all is well.

    A network is at chance level when what it knows beyond guessing among the classes is a tenth at most of what the
    original network knows, or within three standard deviations of guessing on the test images. `models` and `layers`
    are those of the record.
    """
    guessing = 1 / len(images.classes)
    known = max(0.0, models["original"]["accuracy_percent"] / 100 - guessing)
    noise = 3 * math.sqrt(guessing * (1 - guessing) / len(images.test))
    limit_percent = 100 * (guessing + max(known / 10, noise))
    stages = {"original": "The original network", "pruned": "The pruned network", "fine_tuned": "The final network"}
    warnings = [
        f"{stage} is at chance level: {models[name]['accuracy_percent']:.2f}% accuracy, and guessing among "
        f"{len(images.classes)} classes gives {100 * guessing:.2f}%"
        for name, stage in stages.items()
        if models[name]["accuracy_percent"] <= limit_percent
    ]
    thin = [layer for layer in layers if layer["channels_after"] <= FEW_CHANNELS * layer["channels_before"]]
    if thin:
        widths = ", ".join(f"{x['name']} {x['channels_after']} of {x['channels_before']}" for x in thin)
        warnings.append(f"Hardly any channels are left in {widths}")
    return warnings
