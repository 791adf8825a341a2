"""Accuracy and loss of a network on a set of images."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from cleanai import UserError
from cleanai.data.images import ImageSet
from cleanai.runtime.compute import Compute
from cleanai.runtime.files import one_line


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
    was_training = network.training
    network.eval()
    correct, loss = [], torch.zeros((), device=images.labels.device, dtype=torch.float64)
    with torch.inference_mode():
        for inputs, labels in images.batches_for(compute, title):
            with compute.autocast():
                outputs = network(inputs)
            loss += F.cross_entropy(outputs.float(), labels, reduction="sum")
            correct.append(outputs.argmax(1) == labels)
    network.train(was_training)
    flags = torch.cat(correct).cpu()
    accuracy_percent = 100 * int(flags.sum()) / len(images)
    return Evaluation(accuracy_percent, loss.item() / len(images), flags)


def copied(network: nn.Module) -> nn.Module:
    """A copy of a network. UserError when it cannot be copied."""
    try:
        return copy.deepcopy(network)
    except RuntimeError as error:  # it holds a tensor with a gradient that is no parameter
        raise UserError(f"{type(network).__name__} cannot be copied ({one_line(error)[:200]})") from error


def try_outputs(network: nn.Module, inputs: torch.Tensor, name: str) -> torch.Tensor:
    """The outputs (B, K, ...) of a network in evaluation mode for images that it may not take, called `name`.

    Raises UserError when it cannot run on them, or gives anything but one tensor with a row per image.
    """
    title = type(network).__name__
    try:
        with torch.inference_mode():
            outputs = network(inputs)
    except (torch.cuda.OutOfMemoryError, MemoryError):
        raise
    except Exception as error:  # a network of the user's can raise anything
        raise UserError(
            f"{title} does not take {name} of {' x '.join(map(str, inputs.shape[1:]))} ({one_line(error)[:200]}): "
            "give images of the size that it was trained on, image_set(folder, size=N)"
        ) from error
    if not isinstance(outputs, torch.Tensor) or outputs.ndim < 2 or len(outputs) != len(inputs):
        found = "x".join(map(str, getattr(outputs, "shape", ()))) or f"a {type(outputs).__name__}"
        raise UserError(f"{title} gives {found} for {len(inputs)} images, and must give one tensor, a row per image")
    return outputs
