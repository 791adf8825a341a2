"""What a report tells beyond the totals: the networks layer by layer, class by class, and by test coverage."""
from __future__ import annotations

import base64
import io
from typing import Any

import torch
from PIL import Image
from torch import nn

from cleanai.data.images import Images, ImageSet
from cleanai.measure.costs import count_layers
from cleanai.measure.coverage import measure_coverage, record_profiles
from cleanai.network.activations import record_statistics
from cleanai.network.evaluation import Evaluation
from cleanai.pruning.criteria import NeuronCoverageImportance
from cleanai.runtime.compute import Compute

COVERAGE_IMAGES = 1024  # of the test images, and of the training images for the ranges: seconds, not minutes
THRESHOLD = 0.25  # above which a neuron counts as active
SHOWN_CLASSES, SHOWN_PER_CLASS = 3, 4
SHOWN_SIDE = 64  # pixels at most, so that a record stays small


def measure_details(
    networks: dict[str, nn.Module],
    evaluations: dict[str, Evaluation],
    images: Images,
    calibration: ImageSet,
    compute: Compute,
    seed: int,
) -> dict[str, Any]:
    """The `layers`, `classes`, `newly_wrong` and `coverage` of a record, for the networks original, pruned, fine_tuned.

    `evaluations` are theirs on all test images. Coverage is measured on the first of `calibration`, against what the
    neurons did on as many training images, drawn with `seed`.
    """
    classes = compare_classes(evaluations, images)
    profiled = images.train.sample(COVERAGE_IMAGES, seed)
    covered = calibration.select(torch.arange(min(COVERAGE_IMAGES, len(calibration))))
    return {
        "layers": _compare_layers(networks["original"], networks["fine_tuned"], next(images.test.batches(1))[0]),
        "classes": classes,
        "newly_wrong": _newly_wrong(networks["fine_tuned"], evaluations, classes, images),
        "coverage": {
            "profile_images": len(profiled),
            "images": len(covered),
            "threshold": THRESHOLD,
            "models": {
                name: _coverage(network, profiled, covered, compute, name.replace("_", "-"))
                for name, network in networks.items()
            },
        },
    }


def compare_classes(evaluations: dict[str, Evaluation], images: Images) -> list[dict[str, Any]]:
    """Of each class its name, number of test images, and accuracy of each network.

    And how many of its images the final network newly gets wrong and newly gets right, compared with the original.
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
                **{f"{stage}_percent": 100 * int(hits[members].sum()) / count for stage, hits in correct.items()},
                "newly_wrong": int((before & ~after)[members].sum()),
                "newly_right": int((after & ~before)[members].sum()),
            }
        )
    return rows


def _compare_layers(before: nn.Module, after: nn.Module, example: torch.Tensor) -> list[dict[str, Any]]:
    whole, cut = count_layers(before, example), count_layers(after, example)
    return [
        {
            "name": name,
            **{f"{key}_before": count for key, count in whole[name].items()},
            **{f"{key}_after": count for key, count in cut[name].items()},
        }
        for name in whole
    ]


def _newly_wrong(
    network: nn.Module, evaluations: dict[str, Evaluation], classes: list[dict[str, Any]], images: Images
) -> list[dict[str, Any]]:
    """Test images that `network` gets wrong and the original did not, of the classes that lost most accuracy."""
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
    # Of the wrong answers: in another precision an image on the edge might be recognised here.
    taken_for = outputs.scatter(1, right[:, None], -torch.inf).argmax(1)
    return [
        {
            "index": index,
            "class": images.classes[label],
            "taken_for": images.classes[wrong],
            "png_base64": _thumbnail(pixels),
        }
        for index, label, wrong, pixels in zip(chosen, right.tolist(), taken_for.tolist(), shown.pixels)
    ]


def _thumbnail(pixels: torch.Tensor) -> str:
    """An image (3, H, W) as a PNG of its size, or smaller, in base64."""
    picture = Image.fromarray(pixels.permute(1, 2, 0).cpu().contiguous().numpy())
    picture.thumbnail((SHOWN_SIDE, SHOWN_SIDE))
    file = io.BytesIO()
    picture.save(file, "PNG")
    return base64.b64encode(file.getvalue()).decode("ascii")


def _coverage(network: nn.Module, profiled: ImageSet, covered: ImageSet, compute: Compute, name: str) -> dict[str, Any]:
    """The coverage of a network, and of what each layer reads two of the metrics of `NeuronCoverageImportance`.

    Averaged over the channels, `frequency` is `active_percent`, the share of channels above zero on average over images
    and positions, and `normalized_mean` is `normalized_mean_percent`.
    """
    profiles = record_profiles(network, profiled, compute, f"Ranges of neurons, {name}")
    coverage = measure_coverage(network, covered, profiles, compute, THRESHOLD, title=f"Test coverage, {name}")
    statistics = record_statistics(
        network, covered, compute, f"Activity of channels, {name}", ("mean_absolute", "frequency")
    )
    modules = dict(network.named_modules())
    for layer in coverage["layers"][:-1]:  # no layer reads the last one's output
        reader = modules[layer["name"]]
        for key, metric in (("active", "frequency"), ("normalized_mean", "normalized_mean")):
            scores = NeuronCoverageImportance(metric).scores(reader, statistics[reader])
            layer[f"{key}_percent"] = 100 * scores.mean().item()
    return coverage
