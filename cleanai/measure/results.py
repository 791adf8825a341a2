"""The measured part of a pruning script's record: the networks in total, by layer, by class, and by test coverage."""

from __future__ import annotations

import base64
import io
from dataclasses import dataclass
from typing import Any

import torch
from PIL import Image
from torch import nn

from cleanai.data.images import Images, ImageSet
from cleanai.measure.activity import measure_activity
from cleanai.measure.churn import count_changes
from cleanai.measure.costs import count_layers, count_macs, count_parameters, size_mib
from cleanai.measure.coverage import THRESHOLD, measure_coverage, record_profiles
from cleanai.measure.latency import time_networks
from cleanai.measure.significance import pack
from cleanai.network.evaluation import Evaluation
from cleanai.runtime.compute import Compute
from cleanai.runtime.progress import say

HOOKED = 2  # a pass that observes all layers takes about so many times as long
# Test images (for calibration, if there are), and training images for the ranges: seconds, not minutes.
COVERAGE_IMAGES = 1024
SHOWN_CLASSES, SHOWN_PER_CLASS = 3, 4
SHOWN_SIDE = 64  # pixels at most, so that a record stays small


@dataclass(frozen=True)
class Split:
    """The images for calibration, and the indices (N,) of the held-out test images."""

    calibration: ImageSet
    heldout: torch.Tensor

    @staticmethod
    def of(images: Images, config: dict[str, Any]) -> Split:
        """The split that the settings of a script make. Older ones have calibration on test images only."""
        count = config["calibration_batches"] * config["batch_size"]
        return Split(*images.calibration_split(count, config["seed"], config.get("calibrate_on", "test")))


def measure_results(
    networks: dict[str, nn.Module],
    evaluations: dict[str, Evaluation],
    images: Images,
    split: Split,
    compute: Compute,
    seed: int,
) -> dict[str, Any]:
    """The measured entries of a record, for the networks original, pruned and fine_tuned.

    `evaluations` are on all test images. docs/reading-results.md describes the entries.
    """
    models = _measure_models(networks, evaluations, images.test, split.heldout, compute)
    is_heldout = torch.zeros(len(images.test), dtype=torch.bool)
    is_heldout[split.heldout] = True
    classes = compare_classes(evaluations, images)
    profiled = images.train.sample(COVERAGE_IMAGES, seed)
    whole = len(split.heldout) == len(images.test)  # no test images served for calibration
    of_test = images.test.select(split.heldout) if whole else split.calibration
    covered = of_test.select(torch.arange(min(COVERAGE_IMAGES, len(of_test))))
    passes = len(networks) * (len(profiled) + 2 * len(covered))
    seconds = HOOKED * passes / models["original"]["throughput_images_per_s"]
    say(f"Measuring test coverage on {len(covered):,} images: about {seconds:.0f} s")
    return {
        "models": models,
        "heldout_bits": pack(is_heldout),
        "summary": _summary(models),
        "layers": _compare_layers(networks["original"], networks["fine_tuned"], next(images.test.batches(1))[0]),
        **_churn(evaluations, images, split.heldout),
        "classes": classes,
        "newly_wrong": _newly_wrong(networks["fine_tuned"], evaluations, classes, images),
        "coverage": _compare_coverage(networks, profiled, covered, compute),
    }


def _measure_models(
    networks: dict[str, nn.Module],
    evaluations: dict[str, Evaluation],
    test: ImageSet,
    heldout: torch.Tensor,
    compute: Compute,
) -> dict[str, dict[str, Any]]:
    example = next(test.batches(1))[0]
    speed = time_networks(networks, test, compute)
    return {
        name: {
            "accuracy_percent": evaluations[name].accuracy_percent,
            "accuracy_heldout_percent": 100 * evaluations[name].correct[heldout].double().mean().item(),
            "loss": evaluations[name].loss,
            "size_mib": size_mib(network),
            "parameters": count_parameters(network)["parameters"],
            "macs": count_macs(network, example),
            **speed[name],
            "correct_bits": pack(evaluations[name].correct),
        }
        for name, network in networks.items()
    }


def _summary(models: dict[str, dict[str, Any]]) -> dict[str, float]:
    original, pruned, final = models["original"], models["pruned"], models["fine_tuned"]

    def reduction_percent(key: str) -> float:
        return 100 * (1 - final[key] / original[key]) if original[key] else 0.0  # where thop counts nothing

    return {
        "parameter_reduction_percent": reduction_percent("parameters"),
        "macs_reduction_percent": reduction_percent("macs"),
        "size_reduction_percent": reduction_percent("size_mib"),
        "speedup": original["latency_ms"]["p50"] / final["latency_ms"]["p50"],
        "accuracy_recovery_points": final["accuracy_percent"] - pruned["accuracy_percent"],
        "final_accuracy_drop_points": final["accuracy_percent"] - original["accuracy_percent"],
    }


def compare_classes(evaluations: dict[str, Evaluation], images: Images) -> list[dict[str, Any]]:
    """Per class its name, number of test images, the accuracy of each network, and the numbers of changed images.

    `newly_wrong` are images that only the original network classifies correctly, `newly_right` only the final one.
    """
    labels = images.test.labels.cpu()
    correct = {name: evaluation.correct for name, evaluation in evaluations.items()}
    before, after = correct["original"], correct["fine_tuned"]
    rows = []
    for label, name in enumerate(images.classes):
        members = labels == label
        count = int(members.sum())
        rows.append(
            {
                "name": name,
                "images": count,
                **{f"{stage}_percent": 100 * int(flags[members].sum()) / count for stage, flags in correct.items()},
                "newly_wrong": int((before & ~after)[members].sum()),
                "newly_right": int((after & ~before)[members].sum()),
            }
        )
    return rows


def _churn(evaluations: dict[str, Evaluation], images: Images, heldout: torch.Tensor) -> dict[str, Any]:
    before, after = evaluations["original"], evaluations["fine_tuned"]
    if after.predicted is None:  # an older version fine-tuned the network, and did not store it
        return {}
    return {"churn": count_changes(before, after, images.test, heldout, images.classes)}


def _compare_layers(before: nn.Module, after: nn.Module, example: torch.Tensor) -> list[dict[str, Any]]:
    counts_before, counts_after = count_layers(before, example), count_layers(after, example)
    return [
        {
            "name": name,
            **{f"{key}_before": count for key, count in counts_before[name].items()},
            **{f"{key}_after": count for key, count in counts_after[name].items()},
        }
        for name in counts_before
    ]


def _newly_wrong(
    network: nn.Module, evaluations: dict[str, Evaluation], classes: list[dict[str, Any]], images: Images
) -> list[dict[str, Any]]:
    """Test images that only the original network classifies correctly, of the classes that lost most accuracy."""
    lost = evaluations["original"].correct & ~evaluations["fine_tuned"].correct
    labels = images.test.labels.cpu()
    changes = [row["fine_tuned_percent"] - row["original_percent"] for row in classes]
    lost_most = sorted((label for label, change in enumerate(changes) if change < 0), key=lambda label: changes[label])
    chosen = [
        index
        for label in lost_most[:SHOWN_CLASSES]
        for index in (lost & (labels == label)).nonzero().flatten().tolist()[:SHOWN_PER_CLASS]
    ]
    if not chosen:
        return []
    shown = images.test.select(torch.tensor(chosen))
    inputs, right = next(shown.batches(len(shown)))
    with torch.inference_mode():
        outputs = network.eval()(inputs).float()
    # Among the wrong classes: in another precision a borderline image might be classified correctly here.
    predicted = outputs.scatter(1, right[:, None], -torch.inf).argmax(1)
    return [
        {
            "index": index,
            "class": images.classes[label],
            "predicted": images.classes[wrong],
            "png_base64": _thumbnail(pixels),
        }
        for index, label, wrong, pixels in zip(chosen, right.tolist(), predicted.tolist(), shown.pixels)
    ]


def _thumbnail(pixels: torch.Tensor) -> str:
    """An image (3, H, W) as a PNG of its size, or smaller, in base64."""
    picture = Image.fromarray(pixels.permute(1, 2, 0).cpu().contiguous().numpy())
    picture.thumbnail((SHOWN_SIDE, SHOWN_SIDE))
    file = io.BytesIO()
    picture.save(file, "PNG")
    return base64.b64encode(file.getvalue()).decode("ascii")


def _compare_coverage(
    networks: dict[str, nn.Module], profiled: ImageSet, covered: ImageSet, compute: Compute
) -> dict[str, Any]:
    """Test coverage by the images `covered`, with ranges from the training images `profiled`."""
    return {
        "profile_images": len(profiled),
        "images": len(covered),
        "threshold": THRESHOLD,
        "models": {
            name: _coverage(network, profiled, covered, compute, name.replace("_", "-"))
            for name, network in networks.items()
        },
    }


def _coverage(network: nn.Module, profiled: ImageSet, covered: ImageSet, compute: Compute, name: str) -> dict[str, Any]:
    """The coverage of a network, with the activity of the channels that each layer reads."""
    profiles = record_profiles(network, profiled, compute, f"Ranges of neurons, {name}")
    coverage = measure_coverage(network, covered, profiles, compute, title=f"Test coverage, {name}")
    layers = coverage["layers"][:-1]  # no layer reads the output of the last one
    names = [layer["name"] for layer in layers]
    activity, dead = measure_activity(network, names, covered, compute, f"Activity of channels, {name}")
    for layer in layers:
        layer.update(activity[layer["name"]])
    return {**coverage, "dead": dead}
