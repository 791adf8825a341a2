"""Images as tensors: uint8 pixels and labels on the compute device, batches made there by indexing.

CIFAR-10 is 184 MB as uint8. Held on the device it needs no worker processes, so the same code runs on Windows, on a
laptop, and on a GPU that would otherwise wait for its data.
"""
from __future__ import annotations

import http.client
import re
import tarfile
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Iterator, Sequence

import torch
import torch.nn.functional as F
from PIL import Image
from torchvision import datasets
from torchvision.datasets.utils import check_integrity
from torchvision.transforms.functional import pil_to_tensor

from cleanai import UserError
from cleanai.progress import progress

DOWNLOADABLE = "CIFAR10"
EMBEDDED = "Digits"
DIGITS_SIZE = 16  # pixels; the originals are 8 x 8, and a four-stage ResNet wants some positions left at its end


@dataclass(frozen=True)
class ImageSet:
    """Pixels (N, 3, H, W) uint8 and labels (N,) int64 on one device, with the channel means and deviations (3,)."""

    pixels: torch.Tensor
    labels: torch.Tensor
    mean: torch.Tensor
    std: torch.Tensor

    def __len__(self) -> int:
        return len(self.labels)

    def select(self, indices: torch.Tensor) -> ImageSet:
        """The images at `indices`, in that order."""
        indices = indices.to(self.labels.device)
        return replace(self, pixels=self.pixels[indices], labels=self.labels[indices])

    def sample(self, count: int, seed: int) -> ImageSet:
        """`count` of the images (all, if there are fewer), chosen at random and evenly over the classes."""
        return self.select(balanced_order(self.labels, seed)[:count])

    def to(self, device: torch.device) -> ImageSet:
        """The same images on another device."""
        return ImageSet(*(tensor.to(device) for tensor in (self.pixels, self.labels, self.mean, self.std)))

    def batches(self, size: int) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """Yield normalised inputs (B, 3, H, W) in channels-last memory, and labels (B,), in order."""
        for start in range(0, len(self), size):
            yield self._normalised(self.pixels[start : start + size]), self.labels[start : start + size]

    def augmented_batch(
        self, indices: torch.Tensor, mirror: bool, generator: torch.Generator
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Normalised inputs and labels at `indices`, each image shifted and, with `mirror`, flipped at random.

        A shift moves the image by up to an eighth of its side; what comes into view is black, as with torchvision's
        RandomCrop. `generator` is on the CPU, so that every device sees the same draws.
        """
        indices = indices.to(self.labels.device)
        count, (height, width) = len(indices), self.pixels.shape[-2:]
        reach = height // 8
        down, right = torch.randint(0, 2 * reach + 1, (2, count, 1), generator=generator)
        rows, columns = torch.arange(height) + down, torch.arange(width).repeat(count, 1)  # (N, H), (N, W)
        if mirror:
            flipped = torch.rand(count, 1, generator=generator) < 0.5
            columns = torch.where(flipped, width - 1 - columns, columns)
        rows, columns = rows.to(indices.device), (columns + right).to(indices.device)
        padded = F.pad(self.pixels[indices], (reach,) * 4)
        image = torch.arange(count, device=indices.device)
        # Indices around a slice put the channels last: (N, H, W, 3), which is the memory order the network wants.
        pixels = padded[image[:, None, None], :, rows[:, :, None], columns[:, None, :]]
        return self._normalised(pixels.permute(0, 3, 1, 2)), self.labels[indices]

    def _normalised(self, pixels: torch.Tensor) -> torch.Tensor:
        inputs = pixels.float().div_(255).sub_(self.mean[:, None, None]).div_(self.std[:, None, None])
        return inputs.contiguous(memory_format=torch.channels_last)


@dataclass(frozen=True)
class Images:
    """A dataset: training and test images, the names of the classes, and where it all came from."""

    train: ImageSet
    test: ImageSet
    classes: Sequence[str]
    mirror: bool  # whether a mirrored image still shows its class
    source: str

    def to(self, device: torch.device) -> Images:
        """The same images on another device."""
        return replace(self, train=self.train.to(device), test=self.test.to(device))

    def with_train_samples(self, count: int | None, seed: int) -> Images:
        """The same with `count` training images, chosen at random and evenly over the classes; None keeps all."""
        if count is None:
            return self
        if count > len(self.train):
            raise UserError(f"--train-samples {count:,}: there are only {len(self.train):,} training images")
        return replace(self, train=self.train.sample(count, seed))

    def require_classes(self, classes: Sequence[str], checkpoint: Path) -> None:
        """Raise UserError when a network in `checkpoint`, made for `classes`, was made for others than these."""
        if list(classes) != list(self.classes):
            raise UserError(
                f"{checkpoint} tells {len(classes)} classes apart ({', '.join(classes[:3])}, ...), and the dataset has "
                f"{len(self.classes)} ({', '.join(self.classes[:3])}, ...): prepare a model for it in another "
                "--checkpoints-dir"
            )

    def calibration_split(self, count: int, seed: int) -> tuple[ImageSet, torch.Tensor]:
        """`count` test images to measure channels on, and the indices of the held-out others.

        A quarter of the test images at least is held out, so that accuracy can be told on images no channel was
        measured on.
        """
        order = balanced_order(self.test.labels, seed)
        count = min(count, len(order) * 3 // 4)
        return self.test.select(order[:count]), order[count:]


def load_images(dataset: str, data_dir: Path) -> Images:
    """Load a dataset by name, on the CPU.

    The first of these that is there: the embedded dataset; an image folder
    `data_dir/<dataset>/{train,test}/<class>/*.{png,jpg}`; torchvision's dataset, downloaded when missing.
    Raises UserError when there is none, or an image is broken.
    """
    folder = data_dir / dataset
    if dataset == EMBEDDED:
        train, test, classes = _digits()
        source = "scikit-learn's handwritten digits (embedded)"
    elif re.fullmatch(r"[\w-]+", dataset) and any((folder / part).is_dir() for part in ("train", "test")):
        train, test, classes = _image_folder(folder)
        source = "image folder"
    elif dataset == DOWNLOADABLE:
        train, test, classes = _cifar10(data_dir)
        source = "torchvision.datasets.CIFAR10"
    else:
        raise UserError(
            f"Unknown dataset: {dataset}. Use --dataset {DOWNLOADABLE} or {EMBEDDED}, "
            f"or put your images into {folder / '{train,test}' / '<class>'}"
        )
    mean, std = _channel_statistics(train[0])
    return Images(
        train=ImageSet(*train, mean, std),
        test=ImageSet(*test, mean, std),
        classes=classes,
        mirror=dataset != EMBEDDED,
        source=source,
    )


def balanced_order(labels: torch.Tensor, seed: int) -> torch.Tensor:
    """A seeded random order (N,) of which every beginning holds the classes in nearly their overall shares.

    An image folder is sorted by class: a subset taken from its front would hold only some of them.
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


def _digits() -> tuple[tuple, tuple, list[str]]:
    from sklearn.datasets import load_digits  # takes a second to import, and only the demo and the tests need it

    digits = load_digits()
    images = torch.from_numpy(digits.images).float()[:, None] * (255 / 16)  # (N, 1, 8, 8), 16 grey levels
    images = F.interpolate(images, size=DIGITS_SIZE, mode="bilinear", align_corners=False)
    pixels, labels = images.round().byte().repeat(1, 3, 1, 1), torch.from_numpy(digits.target).long()
    order = balanced_order(labels, seed=0)
    train, test = order[: len(order) * 4 // 5], order[len(order) * 4 // 5 :]
    return (pixels[train], labels[train]), (pixels[test], labels[test]), [str(name) for name in digits.target_names]


def _image_folder(folder: Path) -> tuple[tuple, tuple, list[str]]:
    parts = {}
    for part in ("train", "test"):
        try:
            listing = datasets.ImageFolder(str(folder / part))
        except OSError as error:
            raise UserError(f"{folder / part} must hold images in class folders: {_one_line(error)}") from error
        parts[part] = listing
    classes = parts["train"].classes
    if parts["test"].classes != classes:
        different = ", ".join(sorted(set(classes) ^ set(parts["test"].classes)))
        raise UserError(f"{folder}: train and test must have the same class folders; only one of them has {different}")
    train, test = (_decode(parts[part].samples, f"Reading {folder.name} {part}") for part in ("train", "test"))
    if train[0].shape[1:] != test[0].shape[1:]:
        raise UserError(f"{folder}: training and test images differ in size; all must have the same")
    return train, test, classes


def _decode(samples: list[tuple[str, int]], title: str) -> tuple[torch.Tensor, torch.Tensor]:
    pixels = None
    for number, (path, _) in enumerate(progress(samples, title, "image")):
        try:
            with Image.open(path) as image:
                decoded = pil_to_tensor(image.convert("RGB"))
        except (OSError, SyntaxError, ValueError) as error:
            raise UserError(f"Broken image file: {path} ({_one_line(error)}). Replace or remove it") from error
        if pixels is None:
            pixels = torch.empty((len(samples), *decoded.shape), dtype=torch.uint8)
        if decoded.shape != pixels.shape[1:]:
            size, first = ("{2} x {1}".format(*shape) for shape in (decoded.shape, pixels.shape[1:]))
            raise UserError(f"{path} is {size} pixels and the first image is {first}: all images must have one size")
        pixels[number] = decoded
    return pixels, torch.tensor([label for _, label in samples])


def _cifar10(data_dir: Path) -> tuple[tuple, tuple, list[str]]:
    parts = []
    try:
        for train in (True, False):
            parts.append(datasets.CIFAR10(root=str(data_dir), train=train, download=True))
    except (OSError, RuntimeError, http.client.HTTPException, tarfile.TarError, EOFError) as error:
        by_hand = data_dir / datasets.CIFAR10.filename
        if by_hand.exists() and not check_integrity(str(by_hand), datasets.CIFAR10.tgz_md5):
            by_hand.unlink()  # what came of a broken download
        raise UserError(
            f"CIFAR-10 could not be downloaded ({_one_line(error)}): put {datasets.CIFAR10.url} by hand at {by_hand}, "
            f"or your own copy as images into {data_dir / DOWNLOADABLE / '{train,test}' / '<class>'}"
        ) from error
    train, test = (
        (torch.from_numpy(part.data).permute(0, 3, 1, 2).contiguous(), torch.tensor(part.targets)) for part in parts
    )
    return train, test, parts[0].classes


def _channel_statistics(pixels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    # Exact for any number of images: 256 counts per channel hold all there is to know.
    levels = torch.arange(256, dtype=torch.float64) / 255
    counts = torch.stack([torch.bincount(channel.flatten(), minlength=256) for channel in pixels.unbind(1)])
    shares = counts.double() / counts.sum(1, keepdim=True)
    mean = shares @ levels
    variance = shares @ levels**2 - mean**2
    # A channel that is constant over the whole dataset says nothing; it must not be divided by zero.
    return mean.float(), variance.clamp_min(1e-4).sqrt().float()


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split()) or type(error).__name__
