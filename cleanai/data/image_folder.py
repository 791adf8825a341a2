"""An image folder as one array of pixels: decoded once, then read from a cache beside the folder."""

from __future__ import annotations

import contextlib
import hashlib
import json
import warnings
from pathlib import Path

import numpy as np
import PIL
import torch
from PIL import Image, ImageOps

from cleanai import UserError
from cleanai.data.images import SIZE_OPTION, empty_pixels
from cleanai.data.listing import ImageFile, list_image_folder
from cleanai.runtime.files import one_line, remove_leftovers, replacing
from cleanai.runtime.progress import progress

CACHE_VERSION = 2  # raise it when the layout or the decoding changes
ORIENTATION = 0x0112  # in EXIF; how to turn the stored pixels for each value but 1
TURNS = {
    2: Image.FLIP_LEFT_RIGHT,
    3: Image.ROTATE_180,
    4: Image.FLIP_TOP_BOTTOM,
    5: Image.TRANSPOSE,
    6: Image.ROTATE_270,
    7: Image.TRANSVERSE,
    8: Image.ROTATE_90,
}
USUAL_SIDE = 224  # pixels, of most published networks
# What Pillow raises on files that are no images, are damaged, or are far too large.
BOMBS = (Image.DecompressionBombError, Image.DecompressionBombWarning)
BROKEN = (OSError, SyntaxError, ValueError, RuntimeError, EOFError, *BOMBS)


def read_image_folder(folder: Path, image_size: int | None = None) -> tuple[tuple, tuple, list[str]]:
    """Pixels (N, 3, H, W) uint8 and labels (N,) of `folder/train` and of `folder/test`, and the names of the classes.

    With `image_size` the shorter side of each picture becomes that many pixels, and the middle of the longer one is
    kept. The pixels are kept in `<folder>.cache`. It is used when it is intact, for that size, and the folder still
    holds the same files: the same names, sizes and times of change. Raises UserError when the folder has other parts,
    classes or files than it should, an image is broken, or the images do not fit into memory.
    """
    classes, train, test = list_image_folder(folder)
    files, cache = [*train, *test], folder.with_name(f"{folder.name}.cache")
    remove_leftovers(cache)
    listing = _fingerprint(files, folder, image_size)
    pixels = _read_cache(cache, listing, len(files))
    if pixels is None:
        pixels = decode(files, folder, image_size)
        _write_cache(cache, listing, pixels)
    images, labels = torch.from_numpy(pixels), torch.tensor([file.label for file in files])
    return (images[: len(train)], labels[: len(train)]), (images[len(train) :], labels[len(train) :]), classes


def _fingerprint(files: list[ImageFile], folder: Path, image_size: int | None) -> str:
    names = len(str(folder))
    listing = [(file.path[names:], file.size, file.changed_ns) for file in files]
    decoder = [CACHE_VERSION, PIL.__version__, image_size]
    return hashlib.sha256(json.dumps([decoder, listing]).encode("ascii")).hexdigest()


def decode(files: list[ImageFile], folder: Path, image_size: int | None, option: str = SIZE_OPTION) -> np.ndarray:
    """Pixels (N, 3, H, W) uint8 of the pictures of `folder`, see `read_image_folder`.

    `option` is how a user asks for an image size, with {} in its place.
    """
    pixels = empty_pixels(str(folder), len(files), image_size, image_size, option) if image_size else None
    for number, file in enumerate(progress(files, f"Reading {folder.name}", "image")):
        picture = _read(file.path)
        if image_size:
            picture = ImageOps.fit(picture, (image_size, image_size), Image.BILINEAR)
        if pixels is None:
            pixels = empty_pixels(str(folder), len(files), picture.height, picture.width, option)
        height, width = pixels.shape[2:]
        if picture.size != (width, height):
            raise UserError(
                f"{file.path} is {picture.width} x {picture.height} pixels and the first image is {width} x "
                f"{height}: all must have one size. {option.format(_fitting_size(files))}, for example, makes it so"
            )
        pixels[number] = np.asarray(picture).transpose(2, 0, 1)
    return pixels


def _fitting_size(files: list[ImageFile]) -> int:
    """The shorter side that nine tenths of the pictures have at least; at most `USUAL_SIDE`."""
    sides = []
    for file in files:
        with contextlib.suppress(*BROKEN), Image.open(file.path) as image:  # only its header is read
            sides.append(min(image.size))
    return min(USUAL_SIDE, sorted(sides)[len(sides) // 10])


def _read(path: str) -> Image.Image:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of metadata that are not used
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            with Image.open(path) as image:
                return _rgb(image)
    except BROKEN as error:
        reason = one_line(error)
        if isinstance(error, PIL.UnidentifiedImageError):
            reason = "its format is not recognised" if Path(path).stat().st_size else "it is empty"
        raise UserError(f"Broken image file: {path} ({reason}). Replace or remove it") from error


def _rgb(image: Image.Image) -> Image.Image:
    """The picture upright, with three channels of 8 bits. Of more bits the upper 8 are kept; transparent becomes white.

    Of several frames the first is read. Colour profiles and gamma are not applied.
    """
    image.load()
    turn = TURNS.get(_orientation(image))
    if image.mode.startswith("I;16") or (image.mode == "I" and image.format in ("PNG", "PPM")):
        image = _gray_of_8_bits(image)
    if image.mode in ("I", "F"):
        raise ValueError("32-bit images are not supported: save it with 8 bits per channel")
    if "transparency" in image.info or image.mode in ("RGBA", "RGBa", "LA", "La", "PA"):
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image.convert("RGBA"))
    image = image.convert("RGB")
    return image if turn is None else image.transpose(turn)


def _gray_of_8_bits(image: Image.Image) -> Image.Image:
    """A picture of 12 or 16 bits. Pillow would clip it at 255; of 16-bit colours it takes the upper half itself."""
    tags = getattr(image, "tag_v2", {})  # of a TIFF: 258 is the number of bits, 262 is 0 where white is 0
    values = np.asarray(image)
    gray = (values >> (tags.get(258, (16,))[0] - 8)).astype(np.uint8)
    gray = 255 - gray if tags.get(262) == 0 else gray
    gray[values == image.info.get("transparency", -1)] = 255
    return Image.fromarray(gray)


def _orientation(image: Image.Image) -> int:
    """How the camera was held, 1 to 8. ImageOps.exif_transpose reads it, too, but fails on damaged other EXIF data."""
    try:
        return image.getexif().get(ORIENTATION, 1)
    except Exception:  # Pillow's parser raises anything; programs show such a picture as it is stored
        return 1


def _read_cache(cache: Path, listing: str, count: int) -> np.ndarray | None:
    """The pixels in `cache`, or None when they must be decoded. One line says why, unless there is no cache."""
    try:
        with cache.open("rb") as file:
            header = json.loads(file.readline(1000))  # it is shorter; a damaged file may be one long line
            if header["listing"] != listing:
                print(f"The images or --image-size have changed since {cache} was written: decoding them again")
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
