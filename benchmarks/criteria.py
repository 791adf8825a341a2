"""Does a criterion choose better channels than others? Accuracy right after pruning, without fine-tuning.

From the fine-tuned model of script 1, each criterion removes 20, 35, 50 and 70% of the parameters and of the FLOPs,
with the same budgets, steps and repair, for three sets of calibration and repair images. After each step the accuracy
is measured as cut, with batch norm recalibrated, and reconstructed, always on the same held-out test images. An
interrupted run resumes with the same command.

    python benchmarks/criteria.py    # after script 1
"""

from __future__ import annotations

import copy
import statistics

import torch
import torch_pruning as tp
from reportlab.graphics.shapes import Drawing
from rows import known_rows, mean_and_spread, write_rows
from torch import nn

from cleanai import cli
from cleanai.data.images import ImageSet
from cleanai.exit import run_script
from cleanai.measure.standalone import scenario_images
from cleanai.network.evaluation import evaluate
from cleanai.network.models import load_network
from cleanai.pruning.criteria import NeuronCoverageImportance, OBSImportance, WandaImportance
from cleanai.pruning.pruner import prune_to_budget
from cleanai.pruning.repair import recalibrate
from cleanai.pruning.settings import PruneImages, PruneSettings
from cleanai.report.curves import Panel, curves_chart
from cleanai.report.drawing import svg_bytes
from cleanai.runtime.compute import Compute, choose_compute
from cleanai.runtime.files import write_bytes
from cleanai.runtime.scenario import PROJECT, Scenario

FOLDER = PROJECT / "results" / "criteria"
RATIOS = (0.2, 0.35, 0.5, 0.7)
ROUND_TO = [8]  # fine enough to meet every ratio
SEEDS = 3
BATCH_SIZE = 128
SETTINGS = {
    "dataset": "CIFAR10",
    "calibration_batches": 8,
    "repair_batches": 24,
    "test_samples": 2500,
    "precision": "auto",
}
CRITERIA = {
    "Neuron Coverage": NeuronCoverageImportance,
    "WANDA": WandaImportance,
    "OBS": OBSImportance,
    "L2": lambda: tp.importance.GroupMagnitudeImportance(p=2),
    "random": tp.importance.RandomImportance,
}
STAGES = {"raw": "As cut", "recalibrated": "Batch norm recalibrated", "reconstructed": "Reconstructed"}


def main() -> None:
    args = cli.parse(__doc__, SETTINGS)
    scenario = Scenario("TS1", "ResNet18", args.dataset, args.checkpoints_dir)
    scenario.require_fine_tuned(args.data_dir)
    compute = choose_compute(args.device, args.precision)
    print(compute.description)
    original = compute.place(load_network(scenario.fine_tuned))
    images = scenario_images(scenario, args.data_dir).to(compute.device)
    pool, heldout = images.calibration_split(len(images.test), seed=0)  # a quarter of the test images is held out
    test = images.test.select(heldout).sample(args.test_samples, seed=0)
    before = evaluate(original, test, compute).accuracy_percent
    print(f"Before pruning: {before:.2f}% of {len(test):,} held-out test images")

    path = FOLDER / f"{scenario.name}.csv"
    facts = {
        "original_percent": f"{before:.2f}",
        "test_images": str(len(test)),
        "calibration_images": str(min(args.calibration_batches * BATCH_SIZE, len(pool))),
        "repair_images": str(min(args.repair_batches * BATCH_SIZE, len(images.train))),
    }
    rows = known_rows(path, facts, args.fresh)
    runs = [(seed, name) for seed in range(SEEDS) for name in CRITERIA]
    for seed, name in runs:
        if not any((row["criterion"], row["seed"]) == (name, str(seed)) for row in rows):
            print(f"{name}, seed {seed}")
            calibration = pool.sample(args.calibration_batches * BATCH_SIZE, seed)
            repair_on = images.repair_sample(args.repair_batches * BATCH_SIZE, seed)
            torch.manual_seed(seed)
            measured = prune_and_measure(
                copy.deepcopy(original), CRITERIA[name](), PruneImages(calibration, repair_on), test, compute
            )
            rows += [{"criterion": name, "seed": str(seed), **row, **facts} for row in measured]
            write_rows(path, rows)
    print(f"\n{table(rows)}")
    write_bytes(path.with_suffix(".svg"), svg_bytes(chart(rows)))
    print(f"\n{path} and {path.with_suffix('.svg').name}")


def prune_and_measure(network, importance, images, test, compute) -> list[dict[str, str]]:
    """Prune step by step, and return the accuracies after each."""
    rows = []

    def measure(_: int, repaired: nn.Module, unrepaired: nn.Module) -> None:
        rows.append(accuracies_by_part(unrepaired, repaired, images.repair, test, compute))

    settings = PruneSettings(RATIOS[-1], RATIOS[-1], [ratio / RATIOS[-1] for ratio in RATIOS], ROUND_TO)
    pruning, _ = prune_to_budget(network, importance, images, compute, settings, measure)
    for row, step in zip(rows, pruning["steps"]):
        for key in ("parameters_asked_percent", "parameters_removed_percent", "macs_removed_percent"):
            row[key] = f"{step[key]:.2f}"
    return rows


def accuracies_by_part(
    unrepaired: nn.Module, repaired: nn.Module, repair: ImageSet, test: ImageSet, compute: Compute
) -> dict[str, str]:
    """Accuracy on `test` in percent after each of STAGES; prints it."""
    recalibrated = copy.deepcopy(unrepaired)
    recalibrate(recalibrated, repair, compute, BATCH_SIZE, "Recalibrating the unrepaired network")
    networks = dict(zip(STAGES, (unrepaired, recalibrated, repaired)))
    accuracies = {stage: evaluate(each, test, compute).accuracy_percent for stage, each in networks.items()}
    print("  test accuracy " + ", ".join(f"{stage} {value:.2f}%" for stage, value in accuracies.items()), flush=True)
    return {f"{stage}_percent": f"{value:.2f}" for stage, value in accuracies.items()}


def means(rows: list[dict[str, str]], name: str, stage: str) -> dict[float, list[float]]:
    """The accuracies of a criterion after a stage, over the seeds, by the percentage that was to be removed."""
    values: dict[float, list[float]] = {}
    for row in rows:
        if row["criterion"] == name:
            values.setdefault(float(row["parameters_asked_percent"]), []).append(float(row[f"{stage}_percent"]))
    return values


def table(rows: list[dict[str, str]]) -> str:
    """For each stage and criterion the mean accuracy over the seeds, and the standard deviation behind it."""
    asked = sorted({float(row["parameters_asked_percent"]) for row in rows})
    lines = []
    for stage, title in STAGES.items():
        lines.append(f"{title + ', %':<28}" + "".join(f"{f'{-percent:.0f}%':<14}" for percent in asked))
        for name in dict.fromkeys(row["criterion"] for row in rows):
            values = means(rows, name, stage)
            cells = [mean_and_spread(values[p], 1) for p in asked]
            lines.append(f"  {name:<26}" + "".join(f"{cell:<14}" for cell in cells))
    return "\n".join(line.rstrip() for line in lines)


def chart(rows: list[dict[str, str]]) -> Drawing:
    """Mean accuracy over what was removed, a panel for each stage."""
    original = float(rows[0]["original_percent"])
    panels = [
        Panel(
            "Parameters and FLOPs removed (%)",
            {
                name: [(0, original), *((p, statistics.mean(v)) for p, v in means(rows, name, stage).items())]
                for name in dict.fromkeys(row["criterion"] for row in rows)
            },
            f"{title}, accuracy (%)",
        )
        for stage, title in STAGES.items()
    ]
    return curves_chart(panels, original)


if __name__ == "__main__":
    run_script(main)
