"""What a result says about where it came from."""
from __future__ import annotations

import platform
from importlib.metadata import version
from typing import Any

import torch

import cleanai
from cleanai import distributed
from cleanai.compute import Compute
from cleanai.data import Images
from cleanai.scenario import Scenario

PACKAGES = ("torch", "torchvision", "torch-pruning", "thop", "numpy")


def checkpoint_facts(scenario: Scenario, images: Images, compute: Compute, config: dict[str, Any]) -> dict[str, Any]:
    """What stands in a checkpoint beside its weights, so that they can be used and an earlier run recognised.

    To the settings in `config` it adds what an interrupted run must find again to be the same run.
    """
    conditions = f"{compute.precision}, {len(images.train):,} + {len(images.test):,} images from {images.source}"
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
        "processes": distributed.processes(),
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        "cleanai": cleanai.__version__,
        **{package: version(package) for package in PACKAGES},
    }
