"""What a network makes of a set of images."""
from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from cleanai import UserError
from cleanai.data.images import ImageSet
from cleanai.runtime.compute import Compute


@dataclass(frozen=True)
class Evaluation:
    """Accuracy and mean cross-entropy on a set of images; `correct` (N,) says of each whether it was recognised."""

    accuracy_percent: float
    loss: float
    correct: torch.Tensor

    @staticmethod
    def stored_in(checkpoint: dict[str, Any], path: Path) -> Evaluation:
        """The evaluation of the network in a checkpoint that was read from `path`; UserError when it is none."""
        try:
            return Evaluation(**checkpoint["evaluation"])
        except TypeError as error:
            raise UserError(f"{path} is damaged: delete it, and run the script again that made it") from error


def evaluate(network: nn.Module, images: ImageSet, compute: Compute, title: str = "Evaluating") -> Evaluation:
    """Accuracy and mean cross-entropy of a network on all images; the network's mode is left as it was."""
    was_training = network.training
    network.eval()
    correct, loss = [], torch.zeros((), device=images.labels.device, dtype=torch.float64)
    with torch.inference_mode():
        for inputs, labels in compute.batches(images, title):
            with compute.autocast():
                outputs = network(inputs)
            loss += F.cross_entropy(outputs.float(), labels, reduction="sum")
            correct.append(outputs.argmax(1) == labels)
    network.train(was_training)
    hits = torch.cat(correct).cpu()
    return Evaluation(
        accuracy_percent=100 * int(hits.sum()) / len(images), loss=loss.item() / len(images), correct=hits
    )
