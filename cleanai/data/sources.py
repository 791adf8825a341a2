"""Where images come from: an embedded dataset, a folder of image files, or torchvision's download."""

from __future__ import annotations

import tarfile
from pathlib import Path

import torch
import torch.nn.functional as F
from torchvision import datasets
from torchvision.datasets.utils import check_integrity
from torchvision.transforms.functional import resize

from cleanai import UserError
from cleanai.data.image_folder import read_image_folder
from cleanai.data.images import Images, ImageSet, ImageSettings, balanced_order, empty_pixels
from cleanai.runtime.distributed import first_before_others
from cleanai.runtime.download import FAILURES, download
from cleanai.runtime.files import one_line, remove_leftovers, write_bytes
from cleanai.runtime.scenario import DOWNLOADABLE, EMBEDDED, has_image_folder, require_known_dataset, usual_flip

DIGITS_SIZE = 16  # pixels; the originals are 8 x 8, too few for the four stages of a ResNet


@first_before_others()  # the first process downloads and decodes for all
def load_images(dataset: str, data_dir: Path, settings: ImageSettings | None = None) -> Images:
    """Load a dataset by name, on the CPU.

    The first of these that exists: the embedded dataset; an image folder
    `data_dir/<dataset>/{train,test}/<class>/*.{png,jpg}`; torchvision's dataset, downloaded when missing.
    Raises UserError when there is none, an image is broken, or the images do not fit into memory.
    """
    settings = settings or ImageSettings()
    size = settings.image_size
    require_known_dataset(dataset, data_dir)
    if dataset == EMBEDDED:
        train, test, classes = _digits()
        source = "scikit-learn's handwritten digits (embedded)"
    elif has_image_folder(dataset, data_dir):
        train, test, classes = read_image_folder(data_dir / dataset, size)
        source = "image folder"
    else:
        train, test, classes = _cifar10(data_dir)
        source = "torchvision.datasets.CIFAR10"
    if size:
        if train[0].shape[-1] != size:
            train, test = _resized(dataset, train, test, size)
        source += f", resized to {size} x {size} pixels"
    mean, std = channel_statistics(train[0])
    return Images(
        train=ImageSet(*train, mean, std, settings.shift),
        test=ImageSet(*test, mean, std, settings.shift),
        classes=classes,
        mirror=(settings.flip or usual_flip(dataset)) == "horizontal",
        source=source,
    )


def _resized(dataset: str, train: tuple, test: tuple, side: int) -> tuple[tuple, tuple]:
    """Both parts, pixels (N, 3, H, H) and labels, with that side. A few at a time: in between they are float32."""
    pixels = torch.from_numpy(empty_pixels(dataset, len(train[0]) + len(test[0]), side, side))
    parts = pixels.split([len(train[0]), len(test[0])])
    for target, (source, _) in zip(parts, (train, test)):
        for start in range(0, len(source), 100):
            target[start : start + 100] = resize(source[start : start + 100], [side, side], antialias=True)
    return (parts[0], train[1]), (parts[1], test[1])


def _digits() -> tuple[tuple, tuple, list[str]]:
    from sklearn.datasets import load_digits  # takes a second to import

    digits = load_digits()
    images = torch.from_numpy(digits.images).float()[:, None] * (255 / 16)  # (N, 1, 8, 8), 16 grey levels
    images = F.interpolate(images, size=DIGITS_SIZE, mode="bilinear", align_corners=False)
    pixels, labels = images.round().byte().repeat(1, 3, 1, 1), torch.from_numpy(digits.target).long()
    order = balanced_order(labels, seed=0)
    train, test = order[: len(order) * 4 // 5], order[len(order) * 4 // 5 :]
    return (pixels[train], labels[train]), (pixels[test], labels[test]), [str(name) for name in digits.target_names]


def _cifar10(data_dir: Path) -> tuple[tuple, tuple, list[str]]:
    archive = data_dir / datasets.CIFAR10.filename
    places = _places(data_dir)
    remove_leftovers(archive, *places.values())
    try:
        parts = _extracted_cifar10(data_dir)
    except RuntimeError:  # torchvision's error for files that are missing or have another checksum
        if not archive.exists():
            _download(archive)
        elif not check_integrity(str(archive), datasets.CIFAR10.tgz_md5):
            raise UserError(f"{archive} is not the published file (its MD5 differs): delete it and run again") from None
        try:
            _extract(archive, places)
            parts = _extracted_cifar10(data_dir)
        except RuntimeError as error:
            raise UserError(f"{archive} does not hold CIFAR-10 ({one_line(error)}): delete it and run again") from error
    train, test = (
        (torch.from_numpy(part.data).permute(0, 3, 1, 2).contiguous(), torch.tensor(part.targets)) for part in parts
    )
    return train, test, parts[0].classes


def _extracted_cifar10(data_dir: Path) -> list[datasets.CIFAR10]:
    # Checks the MD5 of every file before it unpickles any.
    return [datasets.CIFAR10(root=str(data_dir), train=train) for train in (True, False)]


def _download(archive: Path) -> None:
    url = datasets.CIFAR10.url
    try:
        download(url, archive)
        if not check_integrity(str(archive), datasets.CIFAR10.tgz_md5):
            archive.unlink()
            raise OSError("the download is incomplete or not the published file: its MD5 differs")
    except FAILURES as error:
        raise UserError(
            f"CIFAR-10 could not be downloaded ({one_line(error)}): put {url} by hand at {archive}, "
            f"or your own copy as images into {archive.parent / DOWNLOADABLE / '{train,test}' / '<class>'}"
        ) from error


def _places(data_dir: Path) -> dict[str, Path]:
    """The target paths of the members that are needed, by name: no other member is extracted."""
    cifar10 = datasets.CIFAR10
    wanted = [cifar10.meta["filename"], *(name for name, _ in [*cifar10.train_list, *cifar10.test_list])]
    return {f"{cifar10.base_folder}/{name}": data_dir / cifar10.base_folder / name for name in wanted}


def _extract(archive: Path, places: dict[str, Path]) -> None:
    with tarfile.open(str(archive)) as tar:
        for member in tar:
            if member.isfile() and member.name in places:
                write_bytes(places[member.name], tar.extractfile(member).read())


def channel_statistics(pixels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The mean and the standard deviation (3,) of the channels of uint8 pixels (N, 3, H, W), scaled to [0, 1]."""
    # Exact for any number of images: from 256 counts per channel.
    levels = torch.arange(256, dtype=torch.float64) / 255
    counts = torch.stack([torch.bincount(channel.flatten(), minlength=256) for channel in pixels.unbind(1)])
    shares = counts.double() / counts.sum(1, keepdim=True)
    mean = shares @ levels
    variance = shares @ levels**2 - mean**2
    # A constant channel must not be divided by zero.
    return mean.float(), variance.clamp_min(1e-4).sqrt().float()
