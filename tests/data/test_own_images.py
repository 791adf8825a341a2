"""Images of one's own: from folders of pictures and from tensors."""

import numpy as np
import pytest
import torch
from PIL import Image

from cleanai import UserError, image_set

MEAN, STD = (0.5, 0.4, 0.3), (0.25, 0.2, 0.1)


def _pictures(folder, *colours, size=(8, 8)):
    folder.mkdir(parents=True, exist_ok=True)
    for number, colour in enumerate(colours):
        Image.new("RGB", size, colour).save(folder / f"{number}.png")


def _batch(images):
    return next(images.batches(len(images)))[0]


def test_a_folder_of_classes_is_read_in_the_order_of_their_names(tmp_path, capsys):
    _pictures(tmp_path / "dog", (0, 0, 250), (10, 0, 250))
    _pictures(tmp_path / "cat", (250, 0, 0))
    for left in (".ipynb_checkpoints/0.png", "cat/._0.png"):
        (tmp_path / left).parent.mkdir(exist_ok=True)
        (tmp_path / left).write_bytes(b"left by a system")
    (tmp_path / "cat" / "notes.txt").write_text("a note", encoding="utf-8")
    (tmp_path / "notes.txt").write_text("a note", encoding="utf-8")
    images = image_set(tmp_path)
    assert images.labels.tolist() == [0, 1, 1]
    assert images.pixels.shape == (3, 3, 8, 8)
    assert images.pixels[:, :, 0, 0].tolist() == [[250, 0, 0], [0, 0, 250], [10, 0, 250]]
    assert images.mean.tolist() == pytest.approx(images.pixels.float().mean((0, 2, 3)).div(255).tolist(), abs=1e-5)
    assert capsys.readouterr().out.strip() == f"Left out of {tmp_path}: 1 .txt, 1 .txt outside of class folders"


def test_pictures_of_any_size_are_brought_to_one_and_turned_upright(tmp_path):
    picture = np.zeros((20, 40, 3), dtype=np.uint8)
    picture[:, 10:30] = 200  # the middle, which is kept
    Image.fromarray(picture).save(tmp_path / "wide.png")
    exif = Image.Exif()
    exif[0x0112] = 6  # the stored top is the right side
    stored = np.zeros((10, 10, 3), dtype=np.uint8)
    stored[:5] = 255
    Image.fromarray(stored).save(tmp_path / "turned.png", exif=exif)
    images = image_set(str(tmp_path), size=10, mean=MEAN, std=STD)
    turned, wide = images.pixels.float()
    assert wide.min() > 150
    assert turned[:, :, 7:].min() == 255 and turned[:, :, :3].max() == 0
    assert images.labels.tolist() == [0, 0]
    assert images.mean.tolist() == pytest.approx(MEAN)


def test_floats_come_back_as_they_were_given():
    generator = torch.Generator().manual_seed(0)
    given = (torch.rand(4, 3, 6, 6, generator=generator) - torch.tensor(MEAN)[:, None, None]) / 0.25
    before = given.clone()
    for dtype in (torch.float32, torch.float64):
        images = image_set(given.to(dtype), labels=torch.tensor([3, 1, 0, 2]), mean=MEAN, std=[0.25] * 3)
        for _ in range(2):  # a batch is a copy
            torch.testing.assert_close(_batch(images), before, atol=1e-5, rtol=0)
    assert torch.equal(given, before)
    assert images.labels.tolist() == [3, 1, 0, 2]
    assert images.to(torch.device("cpu")).pixels.dtype == torch.float32


PIXELS = torch.zeros(4, 3, 8, 8, dtype=torch.uint8)


@pytest.mark.parametrize(
    ("source", "options", "expected"),
    [
        (PIXELS[:0], {}, "no images"),
        (PIXELS[0], {}, r"are 3 x 8 x 8, .*tensor\[None\]"),
        (PIXELS.permute(0, 2, 3, 1), {}, r"are 4 x 8 x 8 x 3, .*permute\(0, 3, 1, 2\)"),
        (PIXELS[:, :1], {}, r"repeat\(1, 3, 1, 1\)"),
        (PIXELS.long(), {}, "are int64, and must be uint8"),
        (PIXELS.bool(), {}, "are bool"),
        (PIXELS.float(), {}, "need mean and std"),
        (PIXELS.float() + 100, {"mean": MEAN, "std": STD}, "not normalised with this mean and std"),
        (PIXELS.float() / 0, {"mean": MEAN, "std": STD}, "not finite"),
        (PIXELS, {"size": 4}, "size is for a folder"),
        (PIXELS, {"mean": MEAN}, "go together"),
        (PIXELS, {"mean": MEAN, "std": (0.1, 0.2)}, "go together"),
        (PIXELS, {"mean": 0.5, "std": 0.5}, "go together"),
        (PIXELS, {"mean": (125, 120, 110), "std": (60, 60, 60)}, "by 255"),
        (PIXELS, {"mean": MEAN, "std": (0.1, 0.2, 0)}, "std above 0"),
        (PIXELS, {"labels": torch.zeros(3).long()}, "labels are 3 for 4 images"),
        (PIXELS, {"labels": torch.zeros(4)}, "whole numbers"),
        (PIXELS, {"labels": [0, 1, 0, 1]}, "labels must be a tensor"),
        (PIXELS, {"labels": torch.tensor([0, 1, 2, -1])}, "labels hold -1"),
        (PIXELS.numpy(), {}, "not a ndarray: torch.from_numpy"),
        ([PIXELS], {}, "not a list: "),
        ("no such folder", {}, "There is no folder no such folder"),
    ],
)
def test_what_is_no_set_of_images_is_one_sentence(source, options, expected):
    with pytest.raises(UserError, match=expected) as error:
        image_set(source, **options)
    assert "\n" not in str(error.value)


def test_a_folder_that_does_not_hold_what_it_should_is_named(tmp_path):
    def refused(expected, **options):
        with pytest.raises(UserError, match=expected):
            image_set(tmp_path, **options)

    refused("holds no pictures")
    _pictures(tmp_path / "cat", (1, 2, 3))
    refused("one folder of pictures only, cat: give .*cat")
    _pictures(tmp_path / "dog", (1, 2, 3), size=(8, 9))
    refused(r"dog.*0\.png is 8 x 9 pixels and the first image is 8 x 8: .* size=8, ")
    refused(r"more memory than there is: use a smaller size=N", size=3_000_000)
    refused("size is -1", size=-1)
    refused("size is '8'", size="8")
    refused("labels are for a tensor", labels=torch.zeros(2).long())
    (tmp_path / "dog" / "0.png").write_bytes(b"no picture")
    refused(r"Broken image file: .*dog.*0\.png")
    (tmp_path / "dog" / "0.png").unlink()
    (tmp_path / "emu").mkdir()
    _pictures(tmp_path / "fox", (1, 2, 3))
    refused("dog holds no pictures")
    _pictures(tmp_path, (1, 2, 3))
    refused("both pictures and folders")
    (tmp_path / "0.png").unlink()
    (tmp_path / "cat").rename(tmp_path / "train")
    refused("not classes: give .*train itself")
