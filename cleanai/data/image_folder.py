"""An image folder as one array of pixels: decoded once, then read from a cache beside the folder."""

from __future__ import annotations

import hashlib
import json
import warnings
from pathlib import Path
from typing import NamedTuple

import numpy as np
import PIL
import torch
from PIL import Image
from torchvision.datasets.folder import IMG_EXTENSIONS, find_classes, make_dataset

from cleanai import UserError
from cleanai.runtime.files import one_line, remove_leftovers, replacing
from cleanai.runtime.progress import progress

CACHE_VERSION = 1  # raise it when the layout or the decoding changes
# What Pillow raises on files that are no images, are damaged, or are far too large.
BOMBS = (Image.DecompressionBombError, Image.DecompressionBombWarning)
BROKEN = (OSError, SyntaxError, ValueError, RuntimeError, EOFError, *BOMBS)


class _File(NamedTuple):
    path: str
    label: int
    size: int  # bytes
    changed_ns: int


def read_image_folder(folder: Path) -> tuple[tuple, tuple, list[str]]:
    """Pixels (N, 3, H, W) uint8 and labels (N,) of `folder/train` and of `folder/test`, and the names of the classes.

    The pixels are kept in `<folder>.cache`. It is used when it is intact and the folder still holds the same files:
    the same names, sizes and times of change. Raises UserError when the folder has other parts, classes or files than
    it should, or an image is broken.
    """
    (classes, train), (test_classes, test) = (_list_images(folder / part) for part in ("train", "test"))
    different = sorted({*classes} ^ {*test_classes})
    if different:
        raise UserError(
            f"{folder}: train and test must have the same class folders; only one of them has {', '.join(different)}"
        )
    files, cache = [*train, *test], folder.with_name(f"{folder.name}.cache")
    remove_leftovers(cache)
    listing = _fingerprint(files, folder)
    pixels = _read_cache(cache, listing, len(files))
    if pixels is None:
        pixels = _decode(files, folder)
        _write_cache(cache, listing, pixels)
    images, labels = torch.from_numpy(pixels), torch.tensor([file.label for file in files])
    return (images[: len(train)], labels[: len(train)]), (images[len(train) :], labels[len(train) :]), classes


def _list_images(part: Path) -> tuple[list[str], list[_File]]:
    """The classes and the image files of `part`, both sorted by name."""
    try:
        classes, labels = find_classes(str(part))
        found = make_dataset(str(part), labels, is_valid_file=_is_image)
        stats = [Path(path).stat() for path, _ in found]
    except OSError as error:
        raise UserError(f"{part} must hold images in class folders: {one_line(error)}") from error
    return classes, [_File(path, label, stat.st_size, stat.st_mtime_ns) for (path, label), stat in zip(found, stats)]


def _is_image(path: str) -> bool:
    return path.lower().endswith(IMG_EXTENSIONS) and (Path(path).is_file() or Path(path).is_symlink())  # no pipes


def _fingerprint(files: list[_File], folder: Path) -> str:
    names = len(str(folder))
    listing = [(file.path[names:], file.size, file.changed_ns) for file in files]
    decoder = [CACHE_VERSION, PIL.__version__]
    return hashlib.sha256(json.dumps([decoder, listing]).encode("ascii")).hexdigest()


def _decode(files: list[_File], folder: Path) -> np.ndarray:
    pixels, first = None, (0, 0)
    with warnings.catch_warnings():
        warnings.simplefilter("error", Image.DecompressionBombWarning)
        for number, file in enumerate(progress(files, f"Reading {folder.name}", "image")):
            try:
                with Image.open(file.path) as image:
                    size = image.size
                    decoded = _rgb(image) if number == 0 or size == first else None
            except BROKEN as error:
                raise UserError(f"Broken image file: {file.path} ({one_line(error)}). Replace or remove it") from error
            if decoded is None:
                raise UserError(
                    "{} is {} x {} pixels and the first image is {} x {}: all images must have one size".format(
                        file.path, *size, *first
                    )
                )
            if pixels is None:
                pixels, first = _room_for(len(files), size, folder), size
            pixels[number] = np.asarray(decoded).transpose(2, 0, 1)
    return pixels


def _room_for(count: int, size: tuple[int, int], folder: Path) -> np.ndarray:
    width, height = size
    try:
        return np.empty((count, 3, height, width), dtype=np.uint8)
    except MemoryError as error:
        gib = count * 3 * height * width / 2**30
        raise UserError(
            f"{folder}: {count:,} images of {width} x {height} pixels take {gib:,.0f} GiB, more memory than there is: "
            "make them smaller"
        ) from error


def _rgb(image: Image.Image) -> Image.Image:
    """The picture with three channels of 8 bits. 16-bit values keep their upper 8 bits; transparent becomes white."""
    image.load()
    if image.mode.startswith("I;16") or (image.mode == "I" and image.format in ("PNG", "PPM")):
        # Pillow would clip 16-bit grayscale at 255. Of 16-bit colours it takes the upper half itself.
        image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
    if image.mode in ("I", "F"):
        raise ValueError("32-bit images are not supported: save it with 8 bits per channel")
    if "transparency" in image.info or image.mode in ("RGBA", "RGBa", "LA", "La", "PA"):
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image.convert("RGBA"))
    return image.convert("RGB")


def _read_cache(cache: Path, listing: str, count: int) -> np.ndarray | None:
    """The pixels in `cache`, or None when they must be decoded. One line says why, unless there is no cache."""
    try:
        with cache.open("rb") as file:
            header = json.loads(file.readline(1000))  # it is shorter; a damaged file may be one long line
            if header["listing"] != listing:
                print(f"The images have changed since {cache} was written: decoding them again")
                return None
            pixels = np.fromfile(file, dtype=np.uint8)
        if header != _header(listing, header["size"], pixels):
            raise ValueError("its checksum is wrong")
        return pixels.reshape(count, 3, *header["size"])
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, TypeError) as error:
        print(f"{cache} cannot be used ({one_line(error)}): decoding the images again")
        return None


def _write_cache(cache: Path, listing: str, pixels: np.ndarray) -> None:
    try:
        with replacing(cache) as file:
            file.write(json.dumps(_header(listing, pixels.shape[2:], pixels)).encode("ascii") + b"\n")
            file.write(pixels)
    except OSError as error:
        print(f"The decoded images cannot be cached ({one_line(error)})")


def _header(listing: str, size: tuple[int, int], pixels: np.ndarray) -> dict:
    """The first line of a cache, as JSON. The pixels follow as they are in memory. `size` is (H, W)."""
    digest = hashlib.sha256(json.dumps([listing, *size]).encode("ascii"))
    digest.update(pixels)
    return {"listing": listing, "size": list(size), "sha256": digest.hexdigest()}
