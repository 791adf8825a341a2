"""The networks of scripts 2 and 3 beside three controls, trained with the epochs, images and settings of these scripts.

The network of script 1 without pruning shows what the further epochs bring, one with randomly chosen channels what the
choice of the methods brings. Networks with the pruned widths and random weights show what the kept weights are worth.
Writes to the folder of the scripts' results. An interrupted run resumes with the same command.

    python benchmarks/controls.py                     # after scripts 1 to 3
    python benchmarks/controls.py --dataset Digits    # after scripts 1 to 3 with Digits
"""

from __future__ import annotations

from typing import Any

import torch
import torch_pruning as tp
from rows import known_rows, write_rows
from torch import nn

from cleanai import UserError, cli
from cleanai.data.images import Images
from cleanai.exit import run_script
from cleanai.measure.results import Split
from cleanai.measure.standalone import scenario_images
from cleanai.network.evaluation import evaluate
from cleanai.network.models import load_network
from cleanai.network.training import TrainSettings, train
from cleanai.pruning.pruner import prune_to_budget
from cleanai.pruning.repair import most_images
from cleanai.pruning.settings import PruneImages, PruneSettings
from cleanai.report.wording import method_title
from cleanai.runtime.checkpoints import read_record
from cleanai.runtime.compute import Compute, choose_compute
from cleanai.runtime.files import file_digest
from cleanai.runtime.scenario import Scenario

METHODS = ("Coverage", "Wanda")
AT_RANDOM = "Pruned at random"
SETTINGS = {"dataset": "CIFAR10", "precision": "auto"}
TRAIN_SETTINGS = ("epochs", "batch_size", "lr", "weight_decay", "seed")  # of TrainSettings
PRUNE_SETTINGS = ("ratio", "macs_ratio", "steps", "round_to", "repair", "batch_size")  # of PruneSettings
SAME = (
    *(*TRAIN_SETTINGS, *PRUNE_SETTINGS, "keep_layers", "repair_batches", "train_samples"),
    *("calibration_batches", "calibrate_on", "distil"),
)


def main() -> None:
    args = cli.parse(__doc__, SETTINGS)
    preparation = Scenario("TS1", "ResNet18", args.dataset, args.checkpoints_dir)
    scenarios = {method: preparation.of(method) for method in METHODS}
    records = {method: finished(scenario) for method, scenario in scenarios.items()}
    configs = [record["config"] for record in records.values()]
    if any(configs[0].get(name) != configs[1].get(name) for name in SAME):
        raise UserError("Scripts 2 and 3 were run with different settings: run both with the same, --fresh")
    config = configs[0]
    if config["ratio"] == "auto" or config["repair"] == "distil" or config.get("distil") or not config["epochs"]:
        raise UserError("The controls are for runs with a --ratio and with fine-tuning, without distillation")
    settings = TrainSettings(**{name: config[name] for name in TRAIN_SETTINGS})
    compute = choose_compute(args.device, config["precision"])
    print(compute.description)
    images = scenario_images(scenarios["Coverage"], args.data_dir)
    images = images.with_train_samples(config["train_samples"], settings.seed).to(compute.device)
    split = Split.of(images, config)

    path = preparation.of("Controls").table
    path.parent.mkdir(parents=True, exist_ok=True)
    facts = {"epochs": settings.epochs, "train_images": len(images.train), "lr": settings.lr, "seed": settings.seed}
    facts = {name: str(value) for name, value in facts.items()}
    facts.update({f"{method}_sha256": file_digest(scenario.final) for method, scenario in scenarios.items()})
    rows = known_rows(path, facts, args.fresh)

    def add(network: str, trained: str, accuracy_percent: float, heldout_percent: float) -> None:
        figures = {"accuracy_percent": f"{accuracy_percent:.2f}", "heldout_percent": f"{heldout_percent:.2f}"}
        rows.append({"network": network, "trained": trained, **figures, **facts})
        write_rows(path, rows)

    def add_measured(network: str, trained: str, measured: dict[str, Any]) -> None:
        add(network, trained, measured["accuracy_percent"], measured["accuracy_heldout_percent"])

    def add_control(network: str, trained: str, control: nn.Module) -> None:
        if any((row["network"], row["trained"]) == (network, trained) for row in rows):
            return
        print(f"{network}, {trained}", flush=True)
        train(compute.place(control), images, compute, settings)
        correct = evaluate(control, images.test, compute).correct.double()
        add(network, trained, 100 * correct.mean().item(), 100 * correct[split.heldout].mean().item())

    if not rows:
        add_measured("Not pruned", "as script 1 left it", records["Coverage"]["models"]["original"])
        for method, record in records.items():
            add_measured(f"Pruned by {method_title(method)}", "trained on", record["models"]["fine_tuned"])
    add_control("Not pruned", "trained on", load_network(scenarios["Coverage"].fine_tuned))
    if not any(row["network"] == AT_RANDOM for row in rows):
        torch.manual_seed(settings.seed)
        network = load_network(scenarios["Coverage"].fine_tuned)
        add_control(AT_RANDOM, "trained on", pruned_at_random(compute.place(network), images, split, config, compute))
    for method, scenario in scenarios.items():
        torch.manual_seed(settings.seed)
        control = load_network(scenario.pruned)
        for module in control.modules():
            if hasattr(module, "reset_parameters"):
                module.reset_parameters()
        add_control(f"Pruned by {method_title(method)}", "its widths alone, from random weights", control)
    print(f"\n{table(rows)}\n\n{path}")


def pruned_at_random(
    network: nn.Module, images: Images, split: Split, config: dict[str, Any], compute: Compute
) -> nn.Module:
    """Prune a network in place as the scripts did with this `config`, but for the choice of channels; return it."""
    most = most_images(network, next(images.train.batches(1))[0])
    repair = images.repair_sample(min(most, config["repair_batches"] * config["batch_size"]), config["seed"])
    kept = config.get("keep_layers") or ()
    settings = PruneSettings(**{name: config[name] for name in PRUNE_SETTINGS}, nearest=True, keep_layers=kept)
    chosen, used = tp.importance.RandomImportance(), PruneImages(split.calibration, repair)
    prune_to_budget(network, chosen, used, compute, settings)
    return network


def finished(scenario: Scenario) -> dict[str, Any]:
    """The record of a script. UserError when there is none."""
    record = read_record(scenario.record)
    if record is None:
        raise UserError(f"There is no record {scenario.record}. Run first: {scenario.command()}")
    return record


def table(rows: list[dict[str, str]]) -> str:
    """Accuracy after training, a line for each network."""
    epochs, count = int(rows[0]["epochs"]), int(rows[0]["train_images"])
    trained = f"AFTER {epochs} FURTHER EPOCH{'S' if epochs > 1 else ''} OF {count:,} IMAGES - ACCURACY (%)"
    lines = [f"{trained:<66}{'All test images':>17}{'Held-out':>12}"]
    for row in sorted(rows, key=lambda row: row["network"]):  # stable: what belongs together stands together
        name = f"{row['network']}, {row['trained']}"
        lines.append(f"{name:<66}{row['accuracy_percent']:>17}{row['heldout_percent']:>12}")
    return "\n".join(lines)


if __name__ == "__main__":
    run_script(main)
