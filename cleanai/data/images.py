"""Images as tensors: uint8 pixels and labels on the compute device, where batches are made by indexing.

CIFAR-10 is 184 MB as uint8. On the device it needs no worker processes, so the same code runs on Windows, on a laptop,
and on a GPU that would otherwise wait for its data. A dataset that is large for a GPU stays in host memory.
"""

from __future__ import annotations

import functools
import hashlib
import os
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any, Iterable, Iterator, Sequence

import numpy as np
import torch
import torch.nn.functional as F

from cleanai import UserError
from cleanai.runtime.compute import Compute
from cleanai.runtime.progress import progress

_HASHED_AT_ONCE = 1000  # images


@dataclass(frozen=True)
class ImageSettings:
    """How images are read and augmented: settings of script 1, which the other scripts take from its network.

    `image_size`: each side in pixels; None as the files are. `flip`: "horizontal", "none", or None for what suits the
    dataset. `shift`: the largest random shift as a share of the height.
    """

    image_size: int | None = None
    flip: str | None = None
    shift: float = 1 / 8

    @staticmethod
    def of(config: dict[str, Any]) -> ImageSettings:
        """The settings in the config of script 1's run; those it lacks are the defaults."""
        return ImageSettings(**{each.name: config[each.name] for each in fields(ImageSettings) if each.name in config})


@dataclass(frozen=True)
class ImageSet:
    """Pixels (N, 3, H, W) uint8 and labels (N,) int64, with the channel means and deviations (3,).

    Means and deviations are on the device of the batches. Pixels and labels are there, too, or in host memory.
    `shift`: the largest random shift of augmentation, as a share of the height.
    `memory_format`: the order of batches in memory; convolutions are fastest with channels last.
    """

    pixels: torch.Tensor
    labels: torch.Tensor
    mean: torch.Tensor
    std: torch.Tensor
    shift: float = 1 / 8
    memory_format: torch.memory_format = torch.channels_last

    def __len__(self) -> int:
        return len(self.labels)

    def select(self, indices: torch.Tensor) -> ImageSet:
        """The images at `indices`, in that order."""
        indices = indices.to(self.labels.device)
        return replace(self, pixels=self.pixels[indices], labels=self.labels[indices])

    def sample(self, count: int, seed: int) -> ImageSet:
        """`count` of the images (or all), a seeded random choice that is balanced over the classes."""
        return self.select(balanced_order(self.labels, seed)[:count])

    def to(self, device: torch.device, keep_pixels: bool = False) -> ImageSet:
        """The same images with batches on another device. With `keep_pixels`, pixels and labels stay where they are."""
        kept = self if keep_pixels else replace(self, pixels=self.pixels.to(device), labels=self.labels.to(device))
        return replace(kept, mean=self.mean.to(device), std=self.std.to(device))

    @functools.cached_property
    def sha256(self) -> str:
        """Of the pixels (N, 3, H, W) uint8, then of the labels (N,) as little-endian int64, in order."""
        digest = hashlib.sha256()
        for part in self.pixels.split(_HASHED_AT_ONCE):
            digest.update(part.cpu().contiguous().numpy())
        digest.update(self.labels.cpu().numpy().astype("<i8"))
        return digest.hexdigest()

    @property
    def reach(self) -> int:
        """The largest shift of augmentation in pixels."""
        return int(self.pixels.shape[-2] * self.shift + 1e-9)

    def batches(self, size: int) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """Yield normalised inputs (B, 3, H, W) in `memory_format`, and labels (B,), in order."""
        for start in range(0, len(self), size):
            batch = replace(self, pixels=self.pixels[start : start + size], labels=self.labels[start : start + size])
            yield batch._normalised()

    def batches_for(self, compute: Compute, title: str) -> Iterable[tuple[torch.Tensor, torch.Tensor]]:
        """As `batches`, in a size that suits the device, under a progress bar."""
        size = max(1, compute.inference_pixels // self.pixels[0, 0].numel())
        return progress(self.batches(size), title, "batch", total=-(-len(self) // size))

    def augmented_batch(self, indices: torch.Tensor, moves: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Normalised inputs and labels at `indices`, each image shifted and flipped by `moves` (see `draw_moves`).

        It does not wait for a GPU when `indices` are where the pixels are, and `moves` where the batches are.
        """
        return self.select(indices)._moved().augmented(moves)._normalised()

    def augmented(self, moves: torch.Tensor) -> ImageSet:
        """The same images, each shifted and flipped by `moves` (see `draw_moves`), with black borders.

        Does what torchvision's RandomCrop does, for the whole batch at once, on the images' device.
        """
        device, (height, width) = self.pixels.device, self.pixels.shape[-2:]
        down, right, flipped = moves.to(device).unsqueeze(-1).unbind(1)  # (N, 1) each
        rows = torch.arange(height, device=device) + down  # (N, H)
        columns = torch.arange(width, device=device)
        columns = torch.where(flipped > 0, width - 1 - columns, columns) + right  # (N, W)
        padded = F.pad(self.pixels, (self.reach,) * 4)
        image = torch.arange(len(self), device=device)
        # Indices around a slice put the channels last: (N, H, W, 3), the memory order that convolutions are fastest in.
        pixels = padded[image[:, None, None], :, rows[:, :, None], columns[:, None, :]]
        return replace(self, pixels=pixels.permute(0, 3, 1, 2))

    def draw_moves(self, count: int, mirror: bool, generator: torch.Generator) -> torch.Tensor:
        """Random shifts and flips for `count` images: (count, 3) int64, pixels down, pixels right, 1 for a flip.

        No shift is larger than `reach`. `generator` is on the CPU, so that every device gets the same
        random numbers, in one transfer.
        """
        shifts = torch.randint(0, 2 * self.reach + 1, (count, 2), generator=generator)
        flips = torch.randint(0, 2, (count, 1), generator=generator) if mirror else torch.zeros(count, 1).long()
        return torch.cat([shifts, flips], 1).to(self.mean.device)

    def _moved(self) -> ImageSet:
        """The same with pixels and labels on the device of the batches. From pinned memory that needs no waiting."""
        device = self.mean.device
        if self.pixels.device == device:
            return self
        pinned = (tensor.pin_memory().to(device, non_blocking=True) for tensor in (self.pixels, self.labels))
        return replace(self, **dict(zip(("pixels", "labels"), pinned)))

    def _normalised(self) -> tuple[torch.Tensor, torch.Tensor]:
        moved = self._moved()
        inputs = moved.pixels.to(torch.float32, copy=True).div_(255)
        inputs = inputs.sub_(self.mean[:, None, None]).div_(self.std[:, None, None])
        return inputs.contiguous(memory_format=self.memory_format), moved.labels


@dataclass(frozen=True)
class Images:
    """A dataset: training and test images, the names of the classes, and the source of the images."""

    train: ImageSet
    test: ImageSet
    classes: Sequence[str]
    mirror: bool  # a mirrored image still shows its class
    source: str

    def to(self, device: torch.device) -> Images:
        """The same images with batches on another device. `are_large` ones stay in host memory."""
        large = are_large(device, self.train, self.test)
        return replace(self, train=self.train.to(device, large), test=self.test.to(device, large))

    def ordered(self, memory_format: torch.memory_format) -> Images:
        """The same with batches in another order of memory."""
        parts = {name: replace(getattr(self, name), memory_format=memory_format) for name in ("train", "test")}
        return replace(self, **parts)

    def normalised_by(self, mean: Sequence[float] | None, std: Sequence[float] | None) -> Images:
        """The same, normalised by other channel means and deviations, of pixels between 0 and 1. None keeps them."""
        given = {name: torch.tensor(values) for name, values in (("mean", mean), ("std", std)) if values is not None}
        given = {name: values.to(self.train.mean) for name, values in given.items()}
        return replace(self, train=replace(self.train, **given), test=replace(self.test, **given))

    def with_train_samples(self, count: int | None, seed: int) -> Images:
        """The same with `count` training images, see `ImageSet.sample`. None keeps all."""
        if count is None:
            return self
        if count > len(self.train):
            raise UserError(f"--train-samples {count:,}: there are only {len(self.train):,} training images")
        return replace(self, train=self.train.sample(count, seed))

    @property
    def augmentation(self) -> str:
        """How training images are augmented, in words."""
        pixels = self.train.reach
        shifted = f"shifted at random by up to {pixels} pixel{'' if pixels == 1 else 's'}" if pixels else "not shifted"
        return f"{shifted}, {'and mirrored at random' if self.mirror else 'and not mirrored'}"

    def repair_sample(self, count: int, seed: int) -> ImageSet:
        """`count` training images, balanced over the classes, augmented as in training.

        Batch norm statistics of images without augmentation cost accuracy (docs/method.md).
        """
        chosen = self.train.sample(count, seed)
        return chosen.augmented(chosen.draw_moves(len(chosen), self.mirror, torch.Generator().manual_seed(seed)))

    def require_classes(self, classes: Sequence[str], checkpoint: Path) -> None:
        """Raise UserError when these classes are not the `classes` that the network in `checkpoint` was made for."""
        if list(classes) != list(self.classes):
            raise UserError(
                f"{checkpoint} is for {len(classes)} classes ({', '.join(classes[:3])}, ...), and the dataset has "
                f"{len(self.classes)} ({', '.join(self.classes[:3])}, ...): prepare a model for it in another "
                "--checkpoints-dir"
            )

    def calibration_split(self, count: int, seed: int, source: str = "test") -> tuple[ImageSet, torch.Tensor]:
        """`count` images for calibration, and the indices of the held-out test images, in a balanced order.

        Calibration images are test images, and the others are held out: at least a quarter, for an accuracy that the
        calibration did not influence. With the source "train" they are training images, the last that `repair_sample`
        takes, and all test images are held out.
        """
        order = balanced_order(self.test.labels, seed)
        if source == "train":
            return self.train.select(balanced_order(self.train.labels, seed).flip(0)[:count]), order
        count = min(count, len(order) * 3 // 4)
        return self.test.select(order[:count]), order[count:]


def are_large(device: torch.device, *images: ImageSet) -> bool:
    """Whether the pixels would take more than a third of a GPU's free memory. Then only their batches go there."""
    size = sum(each.pixels.numel() * each.pixels.element_size() for each in images)
    return device.type == "cuda" and size > torch.cuda.mem_get_info(device)[0] / 3


SIZE_OPTION = "--image-size {} of script 1"  # how a user of the scripts asks for an image size


def empty_pixels(name: str, count: int, height: int, width: int, option: str = SIZE_OPTION) -> np.ndarray:
    """Room for the pixels (N, 3, H, W) uint8 of the dataset `name`. UserError when the machine has less memory."""
    gib = count * 3 * height * width / 2**30
    memory_gib = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 2**30 if hasattr(os, "sysconf") else gib
    try:
        if gib > memory_gib:
            raise MemoryError
        return np.empty((count, 3, height, width), dtype=np.uint8)
    except (MemoryError, ValueError) as error:  # ValueError: more than can be addressed
        raise UserError(
            f"{name}: {count:,} images of {width} x {height} pixels take {gib:,.1f} GiB, more memory than there is: "
            f"use a smaller {option.format('N')}, or fewer images"
        ) from error


def balanced_order(labels: torch.Tensor, seed: int) -> torch.Tensor:
    """A seeded random order (N,) in which every prefix holds the classes in nearly their overall shares.

    An image folder is sorted by class: its first images show only some of the classes.
    """
    generator = torch.Generator().manual_seed(seed)
    labels = labels.cpu()
    position = torch.empty(len(labels), dtype=torch.float64)
    for label in labels.unique():
        members = (labels == label).nonzero().flatten()
        # The members of a class are spread evenly, in random order, over the whole length.
        rank = torch.randperm(len(members), generator=generator) + torch.rand(len(members), generator=generator)
        position[members] = rank.double() / len(members)
    return position.argsort()
