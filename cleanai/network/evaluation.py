"""Accuracy and loss of a network on a set of images."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from cleanai import UserError
from cleanai.data.images import ImageSet
from cleanai.network.activations import observe
from cleanai.runtime.compute import Compute


@dataclass(frozen=True)
class Evaluation:
    """Accuracy and mean cross-entropy on a set of images. `correct` (N,) flags the images classified correctly.

    `predicted` (N,) int32 are the classes that the network gives; None in older checkpoints.
    """

    accuracy_percent: float
    loss: float
    correct: torch.Tensor
    predicted: torch.Tensor | None = None

    @staticmethod
    def stored_in(checkpoint: dict[str, Any]) -> Evaluation:
        """The evaluation of the network in a checkpoint. UserError when it has none."""
        stored = checkpoint["evaluation"]
        return Evaluation(stored["accuracy_percent"], stored["loss"], stored["correct"], stored.get("predicted"))


def require_finite(evaluation: Evaluation, which: str) -> None:
    """Raise UserError when the loss of the network that is called `which` is not finite: it is no result."""
    if not math.isfinite(evaluation.loss):
        raise UserError(
            f"The loss on the test images, {which}, is not finite: where the precision is not float32, start over with "
            "--fresh --precision float32"
        )


def evaluate(network: nn.Module, images: ImageSet, compute: Compute, title: str = "Evaluating") -> Evaluation:
    """Accuracy and mean cross-entropy of a network on all images. The network keeps its mode.

    The loss is not finite where an output is not, or where one exceeds the others by too much.
    """
    all_labels, predicted = images.labels.to(compute.device), []
    loss = torch.zeros((), device=compute.device, dtype=torch.float64)

    def judge(_: nn.Module, outputs: torch.Tensor) -> None:
        start = sum(map(len, predicted))
        labels = all_labels[start : start + len(outputs)]
        classes = outputs.argmax(1)
        loss.add_(F.cross_entropy(outputs, labels, reduction="sum"))
        predicted.append(classes)

    observe(network, (), judge, images, compute, title, output=True)
    classes = torch.cat(predicted).cpu()
    flags = classes == all_labels.cpu()
    accuracy_percent = 100 * int(flags.sum()) / len(images)
    return Evaluation(accuracy_percent, loss.item() / len(images), flags, classes.int())
