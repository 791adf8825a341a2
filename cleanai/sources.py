"""Where images come from: an embedded dataset, a folder of image files, or torchvision's download."""
from __future__ import annotations

import http.client
import re
import tarfile
from pathlib import Path

import torch
import torch.nn.functional as F
from PIL import Image
from torchvision import datasets
from torchvision.datasets.utils import check_integrity
from torchvision.transforms.functional import pil_to_tensor

from cleanai import UserError
from cleanai.data import Images, ImageSet, balanced_order
from cleanai.progress import progress

DOWNLOADABLE = "CIFAR10"
EMBEDDED = "Digits"
DIGITS_SIZE = 16  # pixels; the originals are 8 x 8, and a four-stage ResNet wants some positions left at its end


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
            f"or put your images into {folder / '{train,test}' / '<class>' / '*.png'}"
        )
    mean, std = _channel_statistics(train[0])
    return Images(
        train=ImageSet(*train, mean, std),
        test=ImageSet(*test, mean, std),
        classes=classes,
        mirror=dataset != EMBEDDED,
        source=source,
    )


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
