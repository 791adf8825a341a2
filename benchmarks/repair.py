"""What does each part of the repair bring? Accuracy of finished networks after pruning, without fine-tuning.

WANDA, and random choice beside it, prune two networks for three sets of images and seeds: ResNet-18 of `results/base`,
by 20, 50 and 70% of the parameters and of the FLOPs, and, where --weights names its file, a ResNet-56 that others
trained, by 50 and 70% of the FLOPs. Accuracy is measured as cut, with batch norm recalibrated, with layers
reconstructed, and of ResNet-56 after WANDA also distilled, always on 5,000 test images that calibration does not use.
An interrupted run resumes with the same command.

    python benchmarks/repair.py
    python benchmarks/repair.py --weights resnet56-cifar10.th    # github.com/akamaster/pytorch_resnet_cifar10
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from pathlib import Path
from typing import Callable, Sequence

import torch
import torch_pruning as tp
from criteria import BATCH_SIZE, accuracies_by_part
from resnet56 import ResNet56
from rows import known_rows, mean_and_spread, write_rows
from torch import nn

from cleanai import UserError, cli
from cleanai.data.images import Images
from cleanai.data.sources import load_images
from cleanai.exit import run_script
from cleanai.network.evaluation import evaluate
from cleanai.network.models import build
from cleanai.network.training import distil
from cleanai.network.weights import start_from
from cleanai.pruning.criteria import WandaImportance
from cleanai.pruning.pruner import prune_to_budget
from cleanai.pruning.repair import recalibrate
from cleanai.pruning.settings import PruneImages, PruneSettings
from cleanai.runtime.compute import Compute, choose_compute
from cleanai.runtime.files import file_digest
from cleanai.runtime.scenario import PROJECT

PATH = PROJECT / "results" / "repair" / "CIFAR10.csv"
SEEDS, STEPS = 3, 5
CALIBRATION_IMAGES = 1024
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # of the images that the ResNet-56 was trained on
CRITERIA = {"WANDA": WandaImportance, "random": tp.importance.RandomImportance}
STAGES = {
    "raw": "As cut",
    "recalibrated": "Batch norm",
    "reconstructed": "Reconstructed",
    "distilled": "Distilled",
}
SETTINGS = {
    "weights": "none",
    "repair_batches": 24,
    "precision": "auto",
}


@dataclass(frozen=True)
class Subject:
    """A network to prune, by `ratios` of the FLOPs, and of the parameters if they count."""

    make: Callable[[], nn.Module]
    weights: Path
    ratios: Sequence[float]
    of_parameters: bool
    round_to: Sequence[int]
    distilled: bool = False  # after WANDA; it takes minutes
    mean: Sequence[float] | None = None
    std: Sequence[float] | None = None


def main() -> None:
    args = cli.parse(__doc__, SETTINGS)
    compute = choose_compute(args.device, args.precision)
    print(compute.description)
    all_images = load_images("CIFAR10", args.data_dir).to(compute.device)
    own = PROJECT / "results" / "base" / "resnet18-cifar10.pth"
    subjects = {"ResNet-18": Subject(lambda: build("ResNet18", 10), own, (0.2, 0.5, 0.7), True, [8])}
    if args.weights == "imagenet":
        raise UserError("--weights is the file of a trained ResNet-56")
    if args.weights != "none":
        subjects["ResNet-56"] = Subject(
            lambda: ResNet56(10), Path(args.weights), (0.5, 0.7), False, [1], distilled=True, mean=MEAN, std=STD
        )
    facts = {"repair_images": str(args.repair_batches * BATCH_SIZE), "calibration_images": str(CALIBRATION_IMAGES)}
    facts["precision"] = args.precision
    rows = known_rows(PATH, facts, args.fresh)
    for criterion in CRITERIA:
        for name, subject in subjects.items():
            images = all_images.normalised_by(subject.mean, subject.std)
            for seed in range(SEEDS):
                run = {"network": name, "criterion": criterion, "seed": str(seed)}
                run["weights_sha256"] = file_digest(subject.weights)
                if any(run.items() <= row.items() for row in rows):
                    continue
                print(f"{name}, {criterion}, seed {seed}")
                network = compute.place(start_from(subject.make(), name, subject.weights, args.models_dir))
                repair = images.repair_sample(args.repair_batches * BATCH_SIZE, seed)
                if subject.mean:  # it was trained on other files of these images
                    recalibrate(network, repair, compute, BATCH_SIZE, "Recalibrating batch norm")
                rows += [
                    {**run, **row, **facts}
                    for row in measured(network, subject, criterion, images, repair, compute, seed)
                ]
                write_rows(PATH, rows)
    print(f"\n{table(rows)}\n\n{PATH}")


def measured(network, subject, criterion, images: Images, repair, compute: Compute, seed: int) -> list[dict[str, str]]:
    """The accuracies of a network before pruning, and after each ratio and each part of the repair."""
    pool, heldout = images.calibration_split(len(images.test) // 2, seed=0)
    test = images.test.select(heldout)
    torch.manual_seed(seed)

    def accuracy(network: nn.Module) -> str:
        return f"{evaluate(network, test, compute).accuracy_percent:.2f}"

    before, rows = accuracy(network), []
    calibration = pool.sample(CALIBRATION_IMAGES, seed)
    for ratio in subject.ratios:
        repaired = copy.deepcopy(network)
        settings = PruneSettings(ratio if subject.of_parameters else None, ratio, STEPS, subject.round_to)
        _, unrepaired = prune_to_budget(
            repaired, CRITERIA[criterion](), PruneImages(calibration, repair), compute, settings
        )
        row = {"removed_percent": f"{100 * ratio:.0f}", "original_percent": before}
        row.update(accuracies_by_part(unrepaired, repaired, repair, test, compute), distilled_percent="")
        if subject.distilled and criterion == "WANDA":
            distil(repaired, network, images, compute, BATCH_SIZE, seed)
            row["distilled_percent"] = accuracy(repaired)
        rows.append(row)
    return rows


def table(rows: list[dict[str, str]]) -> str:
    """Mean points of accuracy lost, and the standard deviation over the seeds, by network, criterion and ratio."""
    lines = [f"{'POINTS LOST, WITHOUT FINE-TUNING':<36}" + "".join(f"{title:>16}" for title in STAGES.values())]
    keys = dict.fromkeys((row["network"], row["criterion"], row["removed_percent"]) for row in rows)
    for network, criterion, removed in sorted(keys, key=lambda key: (key[0], key[1] == "random", key[2])):
        own = [
            row
            for row in rows
            if (row["network"], row["criterion"], row["removed_percent"]) == (network, criterion, removed)
        ]
        name, cells = f"{network}, -{removed}%, {criterion}", points_lost(own)
        lines.append(f"{name:<36}" + "".join(f"{cells.get(stage, ''):>16}" for stage in STAGES).rstrip())
    return "\n".join(lines)


def points_lost(rows: list[dict[str, str]]) -> dict[str, str]:
    """Mean and standard deviation of the points lost after each of STAGES that was measured."""
    cells = {}
    for stage in STAGES:
        reached = [(float(row["original_percent"]), row[f"{stage}_percent"]) for row in rows]
        lost = [original - float(percent) for original, percent in reached if percent]
        if lost:
            cells[stage] = mean_and_spread(lost, 2)
    return cells


if __name__ == "__main__":
    run_script(main)
