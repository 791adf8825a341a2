"""Which weight decay makes a network that can be pruned? Accuracy before and after pruning, without fine-tuning.

Trains the network of script 1 once per weight decay on nine tenths of the training images. The other tenth judges it:
as trained, and after WANDA has removed 20, 50 and 70% of the parameters and of the multiply-accumulates, with batch
norm recalibrated and fully repaired. Test images take no part. An interrupted run resumes with the same command.

    python benchmarks/recipe.py --weights resnet18-imagenet.pth
"""

from __future__ import annotations

import copy
from dataclasses import replace

import torch
from reportlab.graphics.shapes import Drawing
from rows import known_rows, write_rows
from torch import nn

from cleanai import cli
from cleanai.data.images import Images, balanced_order
from cleanai.data.sources import load_images
from cleanai.exit import run_script
from cleanai.measure.provenance import checkpoint_facts
from cleanai.network.evaluation import evaluate
from cleanai.network.models import build
from cleanai.network.training import TrainSettings, fine_tune
from cleanai.network.weights import start_from
from cleanai.pruning.criteria import WandaImportance
from cleanai.pruning.pruner import prune_to_budget
from cleanai.pruning.repair import recalibrate
from cleanai.pruning.settings import PruneImages, PruneSettings
from cleanai.report.curves import Panel, curves_chart
from cleanai.report.drawing import svg_bytes
from cleanai.runtime.compute import Compute, choose_compute
from cleanai.runtime.files import write_bytes
from cleanai.runtime.scenario import PROJECT, Scenario

FOLDER = PROJECT / "results" / "recipe"
WEIGHT_DECAYS = (5e-4, 0.0, 1e-4, 1e-3)
RATIOS = (0.2, 0.5, 0.7)  # the accuracies that are measured
STEPS = [number / 7 for number in range(1, 8)]  # of the way to the last ratio: a tenth each
ROUND_TO = [8]  # fine enough to meet every ratio
CALIBRATION_IMAGES = REPAIR_IMAGES = 1024  # training images
SETTINGS = {
    "dataset": "CIFAR10",
    "weights": "imagenet",
    "epochs": 6,
    "batch_size": 128,
    "lr": 0.001,
    "train_samples": None,
    "seed": 0,
    "precision": "auto",
}


def main() -> None:
    args = cli.parse(__doc__, SETTINGS)
    compute = choose_compute(args.device, args.precision)
    print(compute.description)
    images = load_images(args.dataset, args.data_dir).with_train_samples(args.train_samples, args.seed)
    images = kept_aside(images).to(compute.device)
    name = Scenario("TS1", "ResNet18", args.dataset, args.checkpoints_dir).name
    path = FOLDER / f"{name}.csv"
    facts = {
        "weights": args.config["weights"],
        "weights_sha256": args.config.get("weights_sha256", ""),
        "batch_size": str(args.batch_size),
        "epochs": str(args.epochs),
        "lr": str(args.lr),
        "seed": str(args.seed),
        "train_images": str(len(images.train)),
        "judging_images": str(len(images.test)),
    }
    rows = known_rows(path, facts, args.fresh)
    for weight_decay in WEIGHT_DECAYS:
        if any(float(row["weight_decay"]) == weight_decay for row in rows):
            continue
        print(f"Weight decay {weight_decay:g}")
        scenario = Scenario("TS1", "ResNet18", args.dataset, args.checkpoints_dir / f"recipe_{weight_decay:g}")
        if args.fresh:
            scenario.remove_outputs()
        network = untrained(args, images, compute)
        settings = TrainSettings(args.epochs, args.batch_size, args.lr, weight_decay, args.seed)
        described = checkpoint_facts(scenario, images, compute, {**args.config, "weight_decay": weight_decay})
        _, trained = fine_tune(network, images, compute, settings, scenario, described)
        measured = [
            {"removed_percent": "0", "recalibrated_percent": "", "repaired_percent": f"{trained.accuracy_percent:.2f}"},
            *accuracies_after_pruning(network, images, compute, args.seed),
        ]
        rows += [{"weight_decay": f"{weight_decay:g}", **row, **facts} for row in measured]
        write_rows(path, rows)
        print(table(rows), flush=True)
    write_bytes(path.with_suffix(".svg"), svg_bytes(chart(rows)))
    print(f"\n{table(rows)}\n\n{path} and {path.with_suffix('.svg').name}")


def untrained(args: cli.Options, images: Images, compute: Compute) -> nn.Module:
    """The network that script 1 would train."""
    torch.manual_seed(args.seed)
    network = build("ResNet18", len(images.classes))
    return compute.place(start_from(network, "ResNet18", args.weights, args.models_dir))


def kept_aside(images: Images) -> Images:
    """The same with a tenth of the training images, evenly over the classes, in the place of the test images."""
    order = balanced_order(images.train.labels, seed=0)
    count = len(order) // 10
    return replace(images, train=images.train.select(order[count:]), test=images.train.select(order[:count]))


def accuracies_after_pruning(network: nn.Module, images: Images, compute: Compute, seed: int) -> list[dict[str, str]]:
    """For each of RATIOS the accuracies in percent, with batch norm recalibrated alone and fully repaired."""
    rows = []
    measured_at = {STEPS.index(step) + 1: ratio for ratio in RATIOS for step in STEPS if abs(step * 0.7 - ratio) < 1e-9}
    repair_on = images.repair_sample(REPAIR_IMAGES, seed)

    def measure(step: int, repaired: nn.Module, unrepaired: nn.Module) -> None:
        if step not in measured_at:
            return
        recalibrated = copy.deepcopy(unrepaired)
        recalibrate(recalibrated, repair_on, compute, 128, "Recalibrating the unrepaired network")
        rows.append(
            {
                "removed_percent": f"{100 * measured_at[step]:.0f}",
                "recalibrated_percent": f"{evaluate(recalibrated, images.test, compute).accuracy_percent:.2f}",
                "repaired_percent": f"{evaluate(repaired, images.test, compute).accuracy_percent:.2f}",
            }
        )

    calibration = images.train.sample(CALIBRATION_IMAGES, seed + 1)
    settings = PruneSettings(RATIOS[-1], RATIOS[-1], STEPS, ROUND_TO)
    prune_to_budget(
        copy.deepcopy(network), WandaImportance(), PruneImages(calibration, repair_on), compute, settings, measure
    )
    return rows


def table(rows: list[dict[str, str]]) -> str:
    """Accuracy in percent, a line for each weight decay."""
    columns = ["As trained"]
    columns += [f"-{100 * ratio:.0f}%, {how}" for ratio in RATIOS for how in ("BN only", "repaired")]
    lines = [f"{'Weight decay':<14}" + "".join(f"{column:>16}" for column in columns)]
    for weight_decay in sorted({row["weight_decay"] for row in rows}, key=float):
        own = [row for row in rows if row["weight_decay"] == weight_decay]
        values = [own[0]["repaired_percent"]]
        values += [row[key] for row in own[1:] for key in ("recalibrated_percent", "repaired_percent")]
        lines.append(f"{weight_decay:<14}" + "".join(f"{value:>16}" for value in values))
    return "\n".join(lines)


def chart(rows: list[dict[str, str]]) -> Drawing:
    """Accuracy over what was removed, a curve for each weight decay, without and with the full repair."""
    decays = sorted({row["weight_decay"] for row in rows}, key=float)

    def curve(decay: str, key: str) -> list[tuple[float, float]]:
        # As trained, both are the same network.
        own = [row for row in rows if row["weight_decay"] == decay]
        return [(float(row["removed_percent"]), float(row[key] or row["repaired_percent"])) for row in own]

    titles = {"recalibrated_percent": "Accuracy, batch norm only", "repaired_percent": "Accuracy, fully repaired"}
    panels = [
        Panel("Parameters and FLOPs removed (%)", {f"weight decay {d}": curve(d, key) for d in decays}, f"{title} (%)")
        for key, title in titles.items()
    ]
    return curves_chart(panels)


if __name__ == "__main__":
    run_script(main)
