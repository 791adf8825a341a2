"""What makes the network of script 1 classify unseen images better? Trainings that differ in one thing each.

Script 1's training classifies nearly all training images correctly, and far fewer of the test images. Beside it: label
smoothing, cut-out, a shorter warm-up, and the mean of the last epochs' weights. Trains on nine tenths of the training
images; the other tenth judges, test images take no part. An interrupted run resumes with the same command.

    python benchmarks/overfitting.py --weights resnet18-imagenet.pth
"""

from __future__ import annotations

from typing import Any
from unittest import mock

import torch
import torch.nn.functional as F
from recipe import kept_aside, untrained
from rows import known_rows, write_rows
from torch import nn
from torch.optim.swa_utils import AveragedModel

from cleanai import cli
from cleanai.data.sources import load_images
from cleanai.exit import run_script
from cleanai.network import training
from cleanai.network.evaluation import evaluate
from cleanai.network.training import TrainSettings, train
from cleanai.network.training_step import TrainingStep
from cleanai.pruning.repair import recalibrate
from cleanai.runtime.compute import choose_compute
from cleanai.runtime.scenario import PROJECT, Scenario

FOLDER = PROJECT / "results" / "overfitting"
SMOOTHING = 0.1
CUT_PIXELS = 8
AVERAGED_SHARE = 0.25  # of the steps, the last ones
RECALIBRATION_IMAGES = 4096
SETTINGS = {
    "dataset": "CIFAR10",
    "weights": "imagenet",
    "epochs": 20,
    "batch_size": 128,
    "lr": 0.001,
    "weight_decay": 0.0001,
    "train_samples": None,
    "seed": 0,
    "precision": "auto",
}


class Smoothed(TrainingStep):
    """The target of the right class is 1 - `SMOOTHING`, the rest is shared by all (Szegedy et al. 2016)."""

    def _loss_and_accuracy(
        self, inputs: torch.Tensor, labels: torch.Tensor, _: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        with self._compute.autocast():
            outputs = self._network(inputs)
            loss = F.cross_entropy(outputs, labels, label_smoothing=SMOOTHING)
        return loss, (outputs.argmax(1) == labels).float().mean()


class CutOut(TrainingStep):
    """A square of `CUT_PIXELS` is grey in each image, at random, partly outside (DeVries and Taylor 2017)."""

    def _loss_and_accuracy(self, inputs: torch.Tensor, *rest: Any) -> tuple[torch.Tensor, torch.Tensor]:
        count, (height, width) = len(inputs), inputs.shape[2:]
        row, column = (torch.randint(0, side, (count, 1), device=inputs.device) for side in (height, width))
        near = [
            (torch.arange(side, device=inputs.device) - centre).abs() * 2 < CUT_PIXELS
            for side, centre in ((height, row), (width, column))
        ]
        square = near[0][:, None, :, None] & near[1][:, None, None, :]
        return super()._loss_and_accuracy(inputs.masked_fill(square, 0), *rest)


class Averaged(TrainingStep):
    """Averages the weights after each of the last steps (Izmailov et al. 2018, arXiv 1803.05407)."""

    average: AveragedModel  # that of the last training

    def __init__(self, network: nn.Module, *rest: Any, **options: Any) -> None:
        super().__init__(network, *rest, **options)
        Averaged.average = AveragedModel(network)
        self._peak = self._rate = 0.0

    def __call__(self, indices: torch.Tensor, moves: torch.Tensor, rate: float) -> tuple[torch.Tensor, torch.Tensor]:
        result = super().__call__(indices, moves, rate)
        falling, self._rate, self._peak = rate < self._rate, rate, max(self._peak, rate)
        if falling and rate < self._peak * AVERAGED_SHARE / (1 - training.WARM_UP):
            self.average.update_parameters(self._network)
        return result


TRIALS: dict[str, dict[str, Any]] = {  # what of the module `training` is another
    "as it is": {"WARM_UP": training.WARM_UP},
    "label smoothing": {"TrainingStep": Smoothed},
    "cut-out": {"TrainingStep": CutOut},
    "warm-up of 5%": {"WARM_UP": 0.05},
    "averaged weights": {"TrainingStep": Averaged},
}


def main() -> None:
    args = cli.parse(__doc__, SETTINGS)
    compute = choose_compute(args.device, args.precision)
    print(compute.description)
    images = kept_aside(load_images(args.dataset, args.data_dir))
    images = images.with_train_samples(args.train_samples, args.seed).to(compute.device)
    name = Scenario("TS1", "ResNet18", args.dataset, args.checkpoints_dir).name
    path = FOLDER / f"{name}.csv"
    facts = {"weights": args.config["weights"], "epochs": args.epochs, "lr": args.lr, "weight_decay": args.weight_decay}
    facts.update(
        weights_sha256=args.config.get("weights_sha256", ""),
        batch_size=args.batch_size,
        seed=args.seed,
        train_images=len(images.train),
        judging_images=len(images.test),
    )
    facts = {key: str(value) for key, value in facts.items()}
    rows = known_rows(path, facts, args.fresh)
    settings = TrainSettings(args.epochs, args.batch_size, args.lr, args.weight_decay, args.seed)
    for trial, changes in TRIALS.items():
        if any(row["trial"] == trial for row in rows):
            continue
        print(trial)
        network = untrained(args, images, compute)
        with mock.patch.multiple(training, **changes):
            train(network, images, compute, settings)
        if changes.get("TrainingStep") is Averaged:
            network = Averaged.average.module
            few = images.repair_sample(min(len(images.train), RECALIBRATION_IMAGES), args.seed)
            recalibrate(network, few, compute, args.batch_size, "Recalibrating batch norm")
        row = {"trial": trial}
        for part, judged in (("trained_on", images.train.sample(len(images.test), 0)), ("kept_aside", images.test)):
            result = evaluate(network, judged, compute)
            row.update({f"{part}_percent": f"{result.accuracy_percent:.2f}", f"{part}_loss": f"{result.loss:.4f}"})
        rows.append({**row, **facts})
        write_rows(path, rows)
        print(table(rows), flush=True)
    print(f"\n{path}")


def table(rows: list[dict[str, str]]) -> str:
    """Accuracy and loss, a line for each training."""
    columns = ("Trained on (%)", "Kept aside (%)", "Loss, trained on", "Loss, kept aside")
    lines = [f"{'Training':<20}" + "".join(f"{column:>18}" for column in columns)]
    for row in rows:
        lines.append(
            f"{row['trial']:<20}{row['trained_on_percent']:>18}{row['kept_aside_percent']:>18}"
            f"{row['trained_on_loss']:>18}{row['kept_aside_loss']:>18}"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    run_script(main)
