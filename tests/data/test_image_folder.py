"""Folders of images: every kind of picture, what is wrong with a folder, and the cache beside it."""

import io
import os
import pickle
import random
import shutil
import struct
import sys
import unicodedata
import zlib
from pathlib import Path

import numpy as np
import PIL
import pytest
import torch
from PIL import Image, ImageOps

from cleanai import UserError
from cleanai.data.images import ImageSettings
from cleanai.data.sources import load_images
from tests.helpers import copy_real_images, ended, make_image_folder, needs_real_images, started

OLD_PILLOW = int(PIL.__version__.split(".")[0]) < 10


def png(width, height, bits, kind, rows=b"", transparent=b""):
    """A PNG file made by hand: `kind` is 0 for gray and 2 for colour, `rows` the unfiltered bytes of the pixels."""

    def chunk(name, content):
        return struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))

    length = len(rows) // height
    lines = b"".join(b"\0" + rows[start : start + length] for start in range(0, len(rows), length or 1))
    header = struct.pack(">IIBBBBB", width, height, bits, kind, 0, 0, 0)
    chunks = [(b"IHDR", header), (b"tRNS", transparent), (b"IDAT", zlib.compress(lines)), (b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunk(*each) for each in chunks if each != (b"tRNS", b""))


def tiff(width, height, bits, white, content):
    """A grayscale TIFF file made by hand; `white` is 0 where the value 0 is white, else 1."""
    tags = {256: width, 257: height, 258: bits, 259: 1, 262: white, 273: 8, 277: 1, 278: height, 279: len(content)}
    entries = b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in tags.items())
    return b"II*\0" + struct.pack("<I", 8 + len(content)) + content + struct.pack("<H", len(tags)) + entries + bytes(4)


def test_an_image_folder_is_read_by_class(tmp_path):
    make_image_folder(tmp_path / "Pets")
    images = load_images("Pets", tmp_path)
    assert list(images.classes) == ["cat", "dog"]
    assert images.source == "image folder"
    assert images.train.pixels.shape == images.test.pixels.shape == (4, 3, 8, 8)
    assert images.train.pixels[:, :, 0, 0].tolist() == [[250, 0, 0]] * 2 + [[0, 0, 250]] * 2
    assert images.train.labels.tolist() == images.test.labels.tolist() == [0, 0, 1, 1]


@needs_real_images
def test_real_images_are_read_as_they_are(tmp_path):
    copy_real_images(tmp_path, per_class=50)
    images = load_images("CIFAR10", tmp_path)
    assert images.classes[3] == "cat"
    assert images.train.pixels.shape == (500, 3, 32, 32)
    assert images.train.mean == pytest.approx([0.49, 0.48, 0.45], abs=0.03)
    again = load_images("CIFAR10", tmp_path)
    for part, same in ((images.train, again.train), (images.test, again.test)):
        assert torch.equal(part.pixels, same.pixels)
        assert torch.equal(part.labels, same.labels)


def _half_transparent(mode):
    picture = Image.new(mode, (8, 8), (40, 100, 200, 255) if mode == "RGBA" else (40, 255))
    picture.putpixel((1, 0), (40, 100, 200, 0) if mode == "RGBA" else (40, 0))
    picture.putpixel((2, 0), (40, 100, 200, 51) if mode == "RGBA" else (40, 51))  # a fifth of it covers the white
    return picture


def _palette(**transparent):
    picture = Image.new("P", (8, 8), 1)
    picture.putpalette([9, 9, 9, 40, 100, 200])
    picture.putpixel((1, 0), 0)
    return picture, transparent


GRAY_16 = np.zeros((8, 8), dtype=np.uint16)
GRAY_16[0, :5] = 65535, 32768, 511, 256, 255
COLOUR_16 = np.zeros((8, 8, 3), dtype=">u2")
COLOUR_16[0, :2] = (65535, 32768, 255), (256, 511, 0)


def jpeg(picture):
    """A picture as JPEG, without loss where it is of one colour."""
    file = io.BytesIO()
    picture.save(file, "JPEG", quality=100)
    return file.getvalue()


@pytest.mark.parametrize(
    ("name", "picture", "row"),
    [
        ("gray.png", Image.fromarray((GRAY_16 >> 8).astype(np.uint8)), [(255,) * 3, (128,) * 3, (1,) * 3, (1,) * 3]),
        ("gray.jpg", Image.new("L", (8, 8), 77), [(77,) * 3]),
        ("black and white.png", Image.new("1", (8, 8), 1), [(255,) * 3]),
        ("palette.png", _palette(), [(40, 100, 200), (9, 9, 9)]),
        ("palette, one colour transparent.png", _palette(transparency=0), [(40, 100, 200), (255,) * 3]),
        ("alpha.png", _half_transparent("RGBA"), [(40, 100, 200), (255,) * 3, (212, 224, 244)]),
        ("gray with alpha.png", _half_transparent("LA"), [(40,) * 3, (255,) * 3, (212,) * 3]),
        ("16 bits.png", Image.fromarray(GRAY_16), [(255,) * 3, (128,) * 3, (1,) * 3, (1,) * 3, (0,) * 3]),
        ("16 bits.tif", Image.fromarray(GRAY_16), [(255,) * 3, (128,) * 3, (1,) * 3, (1,) * 3, (0,) * 3]),
        ("16 bits.pgm", b"P5 8 8 65535\n" + GRAY_16.astype(">u2").tobytes(), [(255,) * 3, (128,) * 3, (1,) * 3]),
        ("16 bits by hand.png", png(8, 8, 16, 0, GRAY_16.astype(">u2").tobytes()), [(255,) * 3, (128,) * 3]),
        ("16 bits of colour.png", png(8, 8, 16, 2, COLOUR_16.tobytes()), [(255, 128, 0), (1, 1, 0), (0, 0, 0)]),
        (
            "16 bits, one value transparent.png",
            png(8, 8, 16, 0, GRAY_16.astype(">u2").tobytes(), b"\x80\0"),
            [(255,) * 3, (255,) * 3, (1,) * 3],
        ),
        ("16 bits, white is 0.tif", tiff(8, 8, 16, 0, GRAY_16.tobytes()), [(0,) * 3, (127,) * 3, (254,) * 3]),
        ("12 bits.tif", tiff(8, 8, 12, 1, b"\xff\xf8\x00" + bytes(93)), [(255,) * 3, (128,) * 3, (0,) * 3]),
        ("cmyk.jpg", Image.new("RGB", (8, 8), (200, 50, 20)).convert("CMYK"), [(200, 50, 20)]),
        (
            "frames.gif",
            (
                Image.new("RGB", (8, 8), (1, 2, 3)),
                {"save_all": True, "append_images": [Image.new("RGB", (8, 8), "white")]},
            ),
            [(1, 2, 3)],
        ),
        ("browser.jfif", jpeg(Image.new("L", (8, 8), 77)), [(77,) * 3]),
        ("UPPER.PNG", Image.new("RGB", (8, 8), (1, 2, 3)), [(1, 2, 3)]),
        ("bitmap.bmp", Image.new("RGB", (8, 8), (1, 2, 3)), [(1, 2, 3)]),
    ],
)
def test_every_kind_of_picture_becomes_its_colours(tmp_path, name, picture, row):
    if OLD_PILLOW and name in ("16 bits, white is 0.tif", "frames.gif"):
        pytest.skip("this Pillow refuses the one, and writes the other in other colours")
    path = make_image_folder(tmp_path / "Pets") / "train" / "cat" / f"!{name}"  # before all others
    if isinstance(picture, bytes):
        path.write_bytes(picture)
    else:
        picture, options = picture if isinstance(picture, tuple) else (picture, {})
        picture.save(path, **options)
    pixels = load_images("Pets", tmp_path).train.pixels[0]
    assert [tuple(pixels[:, 0, column].tolist()) for column in range(len(row))] == row


@pytest.mark.parametrize("ending", ["jpg", "png", "webp", "tif", "mpo.jpg"])
def test_a_picture_is_turned_as_its_camera_says(tmp_path, ending):
    """Against Pillow's own function, for each of the eight orientations."""
    if OLD_PILLOW and ending == "tif":
        pytest.skip("this Pillow writes no orientation into a TIFF")
    folder = make_image_folder(tmp_path / "Pets", size=(16, 16), per_class=1)
    picture = Image.new("RGB", (16, 16))
    picture.paste((250, 250, 250), (0, 0, 8, 4))  # the eight ways to turn it all differ
    options = {"webp": {"lossless": True}, "mpo.jpg": {"format": "MPO"}}.get(ending, {})
    expected = []
    for orientation in range(1, 9):
        exif = Image.Exif()
        exif[0x0112] = orientation
        path = folder / "train/cat" / f"!{orientation}.{ending}"
        picture.save(path, exif=exif, **options)
        with Image.open(path) as image:
            expected.append(np.asarray(ImageOps.exif_transpose(image).convert("RGB")).transpose(2, 0, 1))
    pixels = load_images("Pets", tmp_path).train.pixels[:8].numpy()
    assert len({each.tobytes() for each in expected}) == 8
    assert (pixels == np.stack(expected)).all()


@pytest.mark.parametrize("ending", ["jpg", "png"])
def test_damaged_exif_data_cost_no_picture(tmp_path, ending):
    folder = make_image_folder(tmp_path / "Pets", per_class=1)
    exif = Image.Exif()
    exif[0x0112], exif[0x010E], exif[0x8769] = 6, "a text", {0x9003: "2026:01:01 00:00:00", 0x829A: 0.5}
    content = exif.tobytes()
    generator, path = random.Random(0), folder / "train/cat" / f"!.{ending}"
    for _ in range(60):
        damaged = bytearray(content)
        for _ in range(3):
            damaged[generator.randrange(6, len(damaged))] = generator.randrange(256)
        Image.new("RGB", (8, 8), (77, 77, 77)).save(path, exif=bytes(damaged), quality=100)
        assert load_images("Pets", tmp_path).train.pixels[0, :, 0, 0].tolist() == [77] * 3


def _flip(content, position):
    return content[:position] + bytes([content[position] ^ 1]) + content[position + 1 :]


def _saved_as(path, mode, value):
    Image.new(mode, (8, 8), value).save(path)


def _emptied(folder):
    shutil.rmtree(folder)
    folder.mkdir()


def _moved_down(part, name):
    """Move all that is in a folder into a new folder in it."""
    (part / name).mkdir()
    for entry in [*part.iterdir()]:
        if entry.name != name:
            entry.rename(part / name / entry.name)


PARTS = ("train", "test")
BAD_FOLDERS = {  # what is done to a good folder, and what the one line names
    "text": (
        lambda f: (f / "train/dog/0.png").write_bytes(b"no image"),
        r"Broken image file: .*train.dog.0\.png \(its format is not recognised\)",
    ),
    "no bytes": (lambda f: (f / "test/dog/0.png").write_bytes(b""), r"test.dog.0\.png \(it is empty\)"),
    "a pickle": (lambda f: (f / "test/cat/0.png").write_bytes(pickle.dumps([1])), r"test.cat.0\.png"),
    "truncated PNG": (
        lambda f: (f / "test/cat/1.png").write_bytes((f / "test/cat/1.png").read_bytes()[:50]),
        r"test.cat.1\.png",
    ),
    "truncated JPEG": (
        lambda f: (_saved_as(f / "test/cat/a.jpg", "RGB", 9), os.truncate(f / "test/cat/a.jpg", 500)),
        r"test.cat.a\.jpg",
    ),
    "truncated BMP": (
        lambda f: (_saved_as(f / "test/cat/a.bmp", "RGB", 9), os.truncate(f / "test/cat/a.bmp", 99)),
        r"test.cat.a\.bmp",
    ),
    "flipped bit": (
        lambda f: (f / "train/cat/1.png").write_bytes(_flip((f / "train/cat/1.png").read_bytes(), 45)),
        r"train.cat.1\.png",
    ),
    "bomb": (
        lambda f: (f / "train/cat/a.png").write_bytes(png(30_000, 30_000, 1, 0)),
        r"train.cat.a\.png .*900000000 pixels",
    ),
    "small bomb": (
        lambda f: (f / "train/cat/a.png").write_bytes(png(10_000, 10_000, 1, 0)),
        r"train.cat.a\.png .*100000000 pixels",
    ),
    "fractions": (lambda f: _saved_as(f / "train/cat/a.tif", "F", 0.5), r"train.cat.a\.tif .*8 bits per channel"),
    "32 bits": (lambda f: _saved_as(f / "train/cat/a.tif", "I", 70_000), r"train.cat.a\.tif .*32-bit"),
    "link to nothing": (lambda f: (f / "train/cat/a.png").symlink_to(f / "missing.png"), r"train.cat.a\.png"),
    "other size": (
        lambda f: Image.new("RGB", (9, 8)).save(f / "train/cat/9.png"),
        r"train.cat.9\.png is 9 x 8 pixels and the first image is 8 x 8",
    ),
    "other size in test": (
        lambda f: Image.new("RGB", (8, 9)).save(f / "test/dog/1.png"),
        r"test.dog.1\.png is 8 x 9 pixels",
    ),
    "class empty": (lambda f: _emptied(f / "train/cat"), r"train.cat holds no pictures: put some there, or remove"),
    "class of others": (
        lambda f: (_emptied(f / "test/cat"), (f / "test/cat/a.heic").touch(), (f / "test/cat/.b.png").touch()),
        r"test.cat holds no pictures \(there are 1 \.heic\)",
    ),
    "class missing in test": (
        lambda f: shutil.rmtree(f / "test/dog"),
        'train and test must have the same class folders; only train has "dog"$',
    ),
    "class missing in train": (lambda f: shutil.rmtree(f / "train/cat"), 'only test has "cat"$'),
    "class of another name": (
        lambda f: (f / "test/dog").rename(f / "test/Dog"),
        'only train has "dog" and only test has "Dog". They differ only in capitals or spaces',
    ),
    "one class": (lambda f: [shutil.rmtree(f / part / "dog") for part in PARTS], "has only one class, cat:"),
    "a folder too many": (
        lambda f: [_moved_down(f / part, "images") for part in PARTS],
        r'train holds one folder, images, .* \("cat", "dog"\): move them up into .*train$',
    ),
    "no classes": (lambda f: _emptied(f / "train"), r"Pets.train holds no class folders"),
    "test missing": (lambda f: shutil.rmtree(f / "test"), r"Pets.test\b"),
    "train missing": (lambda f: shutil.rmtree(f / "train"), r"Pets.train\b"),
    "part is a file": (lambda f: (shutil.rmtree(f / "test"), (f / "test").write_bytes(b"")), r"Pets.test\b"),
    "loop of links": (
        lambda f: (f / "train/cat/all").symlink_to(f / "train", target_is_directory=True),
        r"train.cat.all is a link to a folder that holds it: remove the link",
    ),
}
if sys.platform != "win32":
    BAD_FOLDERS["link to itself"] = (lambda f: (f / "train/cat/a").symlink_to("a"), r"train.cat.a\b")
    BAD_FOLDERS["line break in a name"] = (
        lambda f: (f / "train/cat").rename(f / "train/c\nt"),
        r"train.c\\nt cannot be printed",
    )


@pytest.mark.parametrize("fault", BAD_FOLDERS)
def test_a_bad_image_folder_is_named_in_one_line(tmp_path, fault):
    folder = make_image_folder(tmp_path / "Pets")
    load_images("Pets", tmp_path)  # a cache of the good folder hides nothing
    spoil, message = BAD_FOLDERS[fault]
    spoil(folder)
    for _ in range(2):
        with pytest.raises(UserError, match=message) as error:
            load_images("Pets", tmp_path)
        assert "\n" not in str(error.value)
        assert str(tmp_path) in str(error.value)


def test_more_images_than_the_machine_has_memory_for_are_refused(tmp_path, monkeypatch):
    make_image_folder(tmp_path / "Pets", size=(300, 300))
    monkeypatch.setattr(os, "sysconf", lambda name: 1000, raising=False)  # pages, and bytes of each
    with pytest.raises(UserError, match=r"Pets: 8 images of 300 x 300 pixels take 0\.0 GiB, more memory than there is"):
        load_images("Pets", tmp_path)


@pytest.mark.parametrize("dataset", ["Pets", "Digits"])
def test_more_images_than_memory_are_refused_before_they_are_read(tmp_path, dataset):
    folder = make_image_folder(tmp_path / "Pets")
    (folder / "train/cat/0.png").write_bytes(b"is not reached")
    with pytest.raises(UserError, match=rf"{dataset}: .* images of 2000000 x 2000000 pixels take [\d,.]+ GiB, more"):
        load_images(dataset, tmp_path, ImageSettings(image_size=2_000_000))
    with pytest.raises(UserError, match=r"train.cat.0\.png"):
        load_images("Pets", tmp_path)


class TestSize:
    @pytest.fixture
    def mixed(self, tmp_path) -> Path:
        """A data folder with pictures of four sizes, each white in the middle and coloured at its longer ends."""
        folder = make_image_folder(tmp_path / "Pets", size=(30, 30), per_class=5)
        for number, (width, height) in enumerate([(60, 30), (90, 40), (36, 120)]):
            picture = Image.new("RGB", (width, height), "blue")
            side = min(width, height)
            left, top = (width - side) // 2, (height - side) // 2
            picture.paste((255, 255, 255), (left, top, left + side, top + side))
            picture.save(folder / "train/cat" / f"!{number}.png")
        return tmp_path

    def test_mixed_sizes_are_refused_with_the_option_and_a_size_that_fits(self, mixed):
        with pytest.raises(UserError, match=r"!1\.png is 90 x 40 .* 60 x 30: .* --image-size 30\b"):
            load_images("Pets", mixed)

    def test_the_shorter_side_is_resized_and_the_longer_one_cropped(self, mixed, capsys):
        images = load_images("Pets", mixed, ImageSettings(image_size=24))
        assert images.train.pixels.shape == (13, 3, 24, 24)
        assert images.source == "image folder, resized to 24 x 24 pixels"
        assert images.train.pixels[:3, :, 1:-1, 1:-1].eq(255).all(), "all but a blurred border is the white middle"
        assert images.train.pixels[3, :, 0, 0].tolist() == [250, 0, 0]
        again = load_images("Pets", mixed, ImageSettings(image_size=24))
        assert torch.equal(again.train.pixels, images.train.pixels)
        assert capsys.readouterr().out == "", "read from the cache"
        assert load_images("Pets", mixed, ImageSettings(image_size=8)).train.pixels.shape[-1] == 8
        assert "--image-size" in capsys.readouterr().out

    def test_embedded_images_are_resized_too(self, digits, tmp_path):
        images = load_images("Digits", tmp_path, ImageSettings(image_size=32))
        assert (images.train.pixels.shape, images.test.pixels.shape) == ((1437, 3, 32, 32), (360, 3, 32, 32))
        halved = torch.nn.functional.avg_pool2d(images.test.pixels.float(), 2)
        assert (halved - digits.test.pixels).abs().mean() < 8
        assert torch.equal(images.test.labels, digits.test.labels)


def test_a_class_may_begin_with_an_at_sign(tmp_path):
    folder = make_image_folder(tmp_path / "Pets")
    for part in ("train", "test"):
        (folder / part / "cat").rename(folder / part / "@alice")
    assert list(load_images("Pets", tmp_path).classes) == ["@alice", "dog"]


def test_what_systems_leave_in_folders_is_skipped_and_other_files_are_counted(tmp_path, capsys):
    folder = make_image_folder(tmp_path / "Pets")
    expected = load_images("Pets", tmp_path)
    junk = (".ipynb_checkpoints", "__MACOSX", "@eaDir", "$RECYCLE.BIN", "System Volume Information", "#recycle")
    for place in (folder, folder / "train", folder / "test/cat"):
        for name in junk:
            (place / name / "cat").mkdir(parents=True)
            (place / name / "cat" / "SYNOPHOTO.png").write_bytes(b"no picture")
        for name in (
            "._0.png",
            ".DS_Store",
            "Thumbs.db",
            "desktop.ini",
            "~$0.png",
            *(["Icon\r"] * (sys.platform != "win32")),
        ):
            (place / name).write_bytes(b"no picture")
    images = load_images("Pets", tmp_path)
    assert torch.equal(images.train.pixels, expected.train.pixels)
    assert list(images.classes) == ["cat", "dog"]
    assert capsys.readouterr().out == ""
    for name in ("train/cat/1.heic", "train/cat/2.HEIC", "test/dog/deep/er/3.heic", "train/dog/README", "test/0.png"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).touch()
    (folder / "val").mkdir()
    load_images("Pets", tmp_path)
    printed = capsys.readouterr().out
    assert printed.startswith(f"Left out of {folder}: 3 .heic, ")
    for count in ("1 without ending", "1 .png outside of class folders", "1 folder val"):
        assert count in printed


def test_names_in_two_unicode_forms_are_one_class(tmp_path):
    folder = make_image_folder(tmp_path / "Pets")
    forms = [unicodedata.normalize(form, "çiçek") for form in ("NFC", "NFD")]
    for part, form in zip(PARTS, forms):
        (folder / part / "cat").rename(folder / part / form)
    images = load_images("Pets", tmp_path)
    assert list(images.classes) == ["dog", forms[0]]
    assert images.test.pixels[:, 2, 0, 0].tolist() == [250, 250, 0, 0]
    shutil.copytree(folder / "test" / forms[1], folder / "test" / forms[0], dirs_exist_ok=True)
    if len([*(folder / "test").iterdir()]) == 3:  # a Mac takes both forms for the same folder
        with pytest.raises(UserError, match=r"test has two folders çiçek, in two Unicode forms"):
            load_images("Pets", tmp_path)


@pytest.mark.skipif(sys.platform in ("win32", "darwin"), reason="these systems have no such names")
def test_names_that_are_not_utf8_are_refused_for_classes_only(tmp_path, capsys):
    folder = make_image_folder(tmp_path / "Pets")
    picture = folder / "train/cat" / os.fsdecode(b"k\xf6pek.png")
    (folder / "train/cat/0.png").rename(picture)
    (folder / "train/cat" / os.fsdecode(b"k.\xf6")).touch()
    assert len(load_images("Pets", tmp_path).train) == 4
    assert r"1 .\udcf6" in capsys.readouterr().out
    picture.write_bytes(b"no picture")
    with pytest.raises(UserError, match=r"Broken image file: .*k\\udcf6pek\.png"):
        load_images("Pets", tmp_path)
    for part in PARTS:
        (folder / part / "dog").rename(folder / part / os.fsdecode(b"k\xf6pek"))
    with pytest.raises(UserError, match=r"train.k\\udcf6pek cannot be printed: rename it"):
        load_images("Pets", tmp_path)


def test_a_dataset_one_folder_too_deep_is_named(tmp_path):
    make_image_folder(tmp_path / "Pets" / "Pets v2")
    with pytest.raises(
        UserError, match=r"Pets v2 holds \{train,test\}, one folder too deep: move them up into .*Pets$"
    ):
        load_images("Pets", tmp_path)


@pytest.mark.parametrize(
    ("dataset", "advice"), [("Digits", "another name"), ("CIFAR10", "holds no images"), ("Pets", "no images")]
)
def test_a_folder_that_would_be_ignored_is_refused(tmp_path, dataset, advice):
    (make_image_folder(tmp_path / dataset) / "test").rename(tmp_path / dataset / "testing")
    (tmp_path / dataset / "train").rename(tmp_path / dataset / "training")
    with pytest.raises(UserError, match=advice) as error:
        load_images(dataset, tmp_path)
    assert str(tmp_path / dataset) in str(error.value)


@pytest.mark.parametrize("name", ["CIFAR99", "../Pets", "", "Dogs.cache"])
def test_an_unknown_dataset_is_never_replaced_by_another(tmp_path, name):
    make_image_folder(tmp_path / "Pets")
    make_image_folder(tmp_path / "data" / "Dogs")
    load_images("Dogs", tmp_path / "data")
    with pytest.raises(UserError, match=r"Unknown dataset: .*Use --dataset CIFAR10, Digits or Dogs, or put"):
        load_images(name, tmp_path / "data")


def test_a_data_dir_that_is_not_there_or_is_the_dataset_itself_is_named(tmp_path):
    make_image_folder(tmp_path / "Dogs")
    with pytest.raises(UserError, match=r"There is no folder .*nowhere: give --data-dir the folder in which Dogs lies"):
        load_images("Dogs", tmp_path / "nowhere")
    with pytest.raises(UserError, match=r'Dogs is the dataset itself: use --data-dir ".*"$'):
        load_images("Dogs", tmp_path / "Dogs")


def test_images_in_folders_within_a_class_and_links_are_read(tmp_path):
    folder = make_image_folder(tmp_path / "Pets")
    (folder / "train/cat/more").mkdir()
    Image.new("RGB", (8, 8), (0, 250, 0)).save(folder / "train/cat/more/0.png")
    (folder / "train/dog/a.png").symlink_to(folder / "test/cat/0.png")
    (folder / "train/dog/note.txt").touch()
    colours = load_images("Pets", tmp_path).train.pixels[:, :, 0, 0].tolist()
    assert colours == [[250, 0, 0]] * 2 + [[0, 250, 0]] + [[0, 0, 250]] * 2 + [[250, 0, 0]]


class TestCache:
    @pytest.fixture
    def folder(self, tmp_path, capsys) -> Path:
        """A folder of images that has been read once."""
        folder = make_image_folder(tmp_path / "Pets")
        Image.new("RGB", (8, 8), (100, 0, 0)).save(folder / "train/cat/1.png")
        for picture in folder.rglob("*.png"):
            os.utime(picture, (10**9, 10**9))  # all at once, as out of an archive
        load_images("Pets", tmp_path)
        assert capsys.readouterr().out == ""
        assert sorted(path.name for path in tmp_path.iterdir()) == ["Pets", "Pets.cache"]
        return folder

    def _colours(self, folder) -> list:
        return load_images("Pets", folder.parent).train.pixels[:, :, 0, 0].tolist()

    def test_it_is_what_the_second_run_reads(self, folder, capsys):
        picture = folder / "train/cat/0.png"
        times = picture.stat().st_atime_ns, picture.stat().st_mtime_ns
        content = picture.read_bytes()
        picture.write_bytes(b"x" * len(content))
        os.utime(picture, ns=times)  # a change that cannot be seen in the folder
        assert self._colours(folder)[0] == [250, 0, 0]
        assert capsys.readouterr().out == ""

    @pytest.mark.parametrize("change", ["content", "time", "new", "removed", "renamed", "moved to the other class"])
    def test_a_folder_that_changed_is_decoded_anew(self, folder, capsys, change):
        picture, expected = folder / "train/cat/0.png", [[250, 0, 0], [100, 0, 0], [0, 0, 250], [0, 0, 250]]
        if change == "content":
            Image.new("RGB", (8, 8), (0, 250, 0)).save(picture)
            expected[0] = [0, 250, 0]
        elif change == "time":
            os.utime(picture, ns=(0, picture.stat().st_mtime_ns + 1_000_000_000))
        elif change == "new":
            Image.new("RGB", (8, 8), (0, 250, 0)).save(folder / "train/cat/00.png")
            expected.insert(1, [0, 250, 0])
        elif change == "removed":
            picture.unlink()
            del expected[0]
        elif change == "renamed":
            picture.rename(picture.with_name("2.png"))
            expected[:2] = expected[1::-1]
        else:
            picture.rename(folder / "train/dog/2.png")
            expected.append(expected.pop(0))
        assert self._colours(folder) == expected
        assert capsys.readouterr().out.startswith("The images or --image-size have changed since ")
        assert self._colours(folder) == expected
        assert capsys.readouterr().out == "", "the new cache is good"

    def test_however_it_is_damaged_the_images_are_right(self, folder, capsys):
        cache = folder.with_name("Pets.cache")
        good, right = cache.read_bytes(), load_images("Pets", folder.parent)
        generator = random.Random(0)
        damaged = [_flip(good, position) for position in range(0, len(good), 13)]
        damaged += [good[: generator.randrange(len(good))] for _ in range(40)]
        damaged += [b"", b"\n", b"[]\n", b"null\n", b'{"listing": 1}\n', good + b"x", pickle.dumps([1]), bytes(9999)]
        for content in damaged:
            cache.write_bytes(content)
            images = load_images("Pets", folder.parent)
            assert torch.equal(images.train.pixels, right.train.pixels)
            assert torch.equal(images.test.pixels, right.test.pixels)
            assert cache.read_bytes() == good
            printed = capsys.readouterr().out
            assert printed.count("\n") == 1
            assert "decoding" in printed

    def test_leftovers_of_killed_runs_are_removed(self, folder):
        abandoned, written, own = (folder.with_name(f"Pets.{end}") for end in ("cache.1.tmp", "cache.2.tmp", "tmp"))
        for path in (abandoned, written, own):
            path.touch()
        for path in (abandoned, own):
            os.utime(path, (0, 0))
        load_images("Pets", folder.parent)
        assert [path.exists() for path in (abandoned, written, own)] == [False, True, True]

    def test_without_room_for_it_the_images_are_right(self, folder, capsys):
        cache = folder.with_name("Pets.cache")
        cache.unlink()
        cache.mkdir()  # cannot be read or replaced
        assert self._colours(folder)[0] == [250, 0, 0]
        assert capsys.readouterr().out.splitlines()[-1].startswith("The decoded images cannot be cached (")
        assert sorted(path.name for path in folder.parent.iterdir()) == ["Pets", "Pets.cache"]

    @pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="root may write everywhere")
    def test_in_a_folder_that_is_read_only_the_images_are_right(self, folder, capsys):
        folder.with_name("Pets.cache").unlink()
        folder.parent.chmod(0o555)
        try:
            assert self._colours(folder)[0] == [250, 0, 0]
        finally:
            folder.parent.chmod(0o755)
        assert "cannot be cached" in capsys.readouterr().out

    def test_two_processes_may_make_it_at_once(self, folder):
        program = (
            "import sys; from pathlib import Path; from cleanai.data.image_folder import read_image_folder\n"
            "folder = Path(sys.argv[1])\n"
            "for _ in range(5):\n"
            "    try: folder.with_name('Pets.cache').unlink()\n"
            "    except OSError: pass\n"
            "    (pixels, labels), *_ = read_image_folder(folder)\n"
            "    assert pixels[:, 0, 0, 0].tolist() == [250, 100, 0, 0], pixels\n"
        )
        with started(["-c", program, folder]) as first, started(["-c", program, folder]) as second:
            for process in (first, second):
                result = ended(process)
                assert (result.stderr, result.returncode) == ("", 0)
