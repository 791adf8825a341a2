"""Accuracy and loss of a network on a set of images."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from cleanai.data.images import ImageSet
from cleanai.network.activations import observe
from cleanai.runtime.compute import Compute


@dataclass(frozen=True)
class Evaluation:
    """Accuracy and mean cross-entropy on a set of images. `correct` (N,) flags the images classified correctly."""

    accuracy_percent: float
    loss: float
    correct: torch.Tensor

    @staticmethod
    def stored_in(checkpoint: dict[str, Any]) -> Evaluation:
        """The evaluation of the network in a checkpoint. UserError when it has none."""
        stored = checkpoint["evaluation"]
        return Evaluation(stored["accuracy_percent"], stored["loss"], stored["correct"])


def evaluate(network: nn.Module, images: ImageSet, compute: Compute, title: str = "Evaluating") -> Evaluation:
    """Accuracy and mean cross-entropy of a network on all images. The network keeps its mode."""
    all_labels, correct = images.labels.to(compute.device), []
    loss = torch.zeros((), device=compute.device, dtype=torch.float64)

    def judge(_: nn.Module, outputs: torch.Tensor) -> None:
        start = sum(map(len, correct))
        labels = all_labels[start : start + len(outputs)]
        right = outputs.argmax(1) == labels
        loss.add_(F.cross_entropy(outputs, labels, reduction="sum"))
        correct.append(right)

    observe(network, (), judge, images, compute, title, output=True)
    flags = torch.cat(correct).cpu()
    accuracy_percent = 100 * int(flags.sum()) / len(images)
    return Evaluation(accuracy_percent, loss.item() / len(images), flags)
