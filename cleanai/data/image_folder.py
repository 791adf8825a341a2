"""A folder of image files as one array of pixels, decoded once and then read from a cache beside the folder."""
from __future__ import annotations

import hashlib
import json
import os
import warnings
from pathlib import Path
from typing import Iterator, NamedTuple

import numpy as np
import PIL
import torch
from PIL import Image
from torchvision.datasets.folder import IMG_EXTENSIONS

from cleanai import UserError
from cleanai.runtime.files import one_line, remove_leftovers, replacing
from cleanai.runtime.progress import progress

CACHE_VERSION = 1  # another one when the layout, or what becomes of a picture, changes
# What Pillow raises on files that are no images, damaged, or of a size that only an attack has.
BOMBS = (Image.DecompressionBombError, Image.DecompressionBombWarning)
BROKEN = (OSError, SyntaxError, ValueError, RuntimeError, EOFError, *BOMBS)


class _File(NamedTuple):
    path: str
    label: int
    size: int  # bytes
    changed_ns: int


def read_image_folder(folder: Path) -> tuple[tuple, tuple, list[str]]:
    """Pixels (N, 3, H, W) uint8 and labels (N,) of `folder/train` and of `folder/test`, and the names of the classes.

    The pixels are kept in `<folder>.cache`, which is taken when it is whole and the folder still holds the files it
    was made of: the same names, sizes and times of change.
    Raises UserError when the folder has other parts, classes or files than it should, or an image is broken.
    """
    parts = {part: _list_images(folder / part) for part in ("train", "test")}
    classes, different = parts["train"].keys(), parts["train"].keys() ^ parts["test"].keys()
    if different:
        only = ", ".join(sorted(different))
        raise UserError(f"{folder}: train and test must have the same class folders; only one of them has {only}")
    train, test = ([file for files in part.values() for file in files] for part in parts.values())
    files, cache = [*train, *test], folder.with_name(f"{folder.name}.cache")
    remove_leftovers(cache)
    listing = _fingerprint(files, folder)
    pixels = _read_cache(cache, listing, len(files))
    if pixels is None:
        pixels = _decode(files, folder)
        _write_cache(cache, listing, pixels)
    images, labels = torch.from_numpy(pixels), torch.tensor([file.label for file in files])
    return (images[: len(train)], labels[: len(train)]), (images[len(train) :], labels[len(train) :]), list(classes)


def _list_images(part: Path) -> dict[str, list[_File]]:
    """The image files of every class, both sorted by name."""
    try:
        with os.scandir(part) as entries:
            names = sorted(entry.name for entry in entries if entry.is_dir())
        found = {name: list(_files_under(part / name)) for name in names}
        images = {
            name: [
                _File(entry.path, label, entry.stat().st_size, entry.stat().st_mtime_ns)
                for entry in entries
                if entry.name.lower().endswith(IMG_EXTENSIONS)
            ]
            for label, (name, entries) in enumerate(found.items())
        }
    except OSError as error:
        raise UserError(f"{part} must hold images in class folders: {one_line(error)}") from error
    if not names:
        raise UserError(f"{part} must hold images in class folders: it has no folders")
    for name in names:
        if not images[name]:
            others = f"only other files, such as {found[name][0].name}" if found[name] else "no files"
            raise UserError(f"{part / name} holds {others}: put images there ({', '.join(IMG_EXTENSIONS)})")
    return images


def _files_under(folder: str | Path) -> Iterator[os.DirEntry]:
    with os.scandir(folder) as entries:
        for entry in sorted(entries, key=lambda entry: entry.name):
            if entry.is_dir():
                yield from _files_under(entry.path)
            elif entry.is_file() or entry.is_symlink():  # no pipes; a link that leads nowhere is named later
                yield entry


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
    """The picture with three channels of 8 bits: of 16 bits the upper 8 stay, what is transparent becomes white."""
    image.load()
    if image.mode.startswith("I;16") or (image.mode == "I" and image.format in ("PNG", "PPM")):
        # Pillow reads grayscale of 16 bits as it is, and would make white of all above 255. Of colours of 16 bits it
        # takes the upper half itself.
        image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
    if image.mode in ("I", "F"):
        raise ValueError("its pixels are numbers of 32 bits, of which none is known to be white: save it with 8 bits")
    if "transparency" in image.info or image.mode in ("RGBA", "RGBa", "LA", "La", "PA"):
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image.convert("RGBA"))
    return image.convert("RGB")


def _read_cache(cache: Path, listing: str, count: int) -> np.ndarray | None:
    """The pixels in `cache`, or None when they have to be decoded: one line says why, unless there is no cache."""
    try:
        with cache.open("rb") as file:
            header = json.loads(file.readline(1000))  # it takes less; a damaged file may be one long line
            if header["listing"] != listing:
                print(f"The images are not those that {cache} was made of: decoding them anew")
                return None
            pixels = np.fromfile(file, dtype=np.uint8)
        if header != _header(listing, header["size"], pixels):
            raise ValueError("its checksum is wrong")
        return pixels.reshape(count, 3, *header["size"])
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, TypeError) as error:
        print(f"{cache} cannot be used ({one_line(error)}): decoding the images anew")
        return None


def _write_cache(cache: Path, listing: str, pixels: np.ndarray) -> None:
    try:
        with replacing(cache) as file:
            file.write(json.dumps(_header(listing, pixels.shape[2:], pixels)).encode("ascii") + b"\n")
            file.write(pixels)
    except OSError as error:
        print(f"The decoded images cannot be kept for the next run ({one_line(error)})")


def _header(listing: str, size: tuple[int, int], pixels: np.ndarray) -> dict:
    """The first line of a cache, in JSON; the pixels follow as they lie in memory. `size` is (H, W)."""
    digest = hashlib.sha256(json.dumps([listing, *size]).encode("ascii"))
    digest.update(pixels)
    return {"listing": listing, "size": list(size), "sha256": digest.hexdigest()}
