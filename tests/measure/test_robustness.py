"""The corruptions against their definitions, and the table of accuracies."""

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.transforms.functional import adjust_contrast

from cleanai.measure.robustness import CORRUPTIONS, LEVELS, chosen_images, corrupted, measure_robustness
from cleanai.network.evaluation import evaluate
from cleanai.network.training import TrainSettings, train
from tests.helpers import random_images
from tests.small_network import SmallNetwork


def _changed(name, level, images):
    return corrupted(images, name, level).pixels.float() / 255 - images.pixels.float() / 255


def test_noise_has_its_deviation_and_is_the_same_every_time():
    grey = random_images(50, side=32)
    grey.pixels.fill_(128)
    for level, deviation in zip(LEVELS, (0.04, 0.1)):
        change = _changed("Gaussian noise", level, grey)
        assert change.std().item() == pytest.approx(deviation, rel=0.02)
        assert abs(change.mean().item()) < 0.002
        assert torch.equal(change, _changed("Gaussian noise", level, grey))


@pytest.mark.parametrize("side", [16, 32, 96])
def test_blur_spreads_a_line_by_its_deviation_which_grows_with_the_image(side):
    line = random_images(1, side=side)
    line.pixels.fill_(0)
    line.pixels[:, :, :, side // 2] = 255
    blurred = corrupted(line, "Blur", "strong").pixels[0, 0, side // 2].double()
    distance = torch.arange(side) - side // 2
    deviation = ((blurred * distance**2).sum() / blurred.sum()).sqrt().item()
    assert deviation == pytest.approx(side / 32, rel=0.12)


def test_brightness_raises_the_value_of_hsv_and_keeps_hue_and_saturation():
    images = random_images(20, side=8, below=200)
    images.pixels[0, :, 0, 0] = 0  # black has no hue
    brighter = corrupted(images, "Brightness", "mild").pixels

    def hsv(pixels):
        return np.stack([Image.fromarray(p.permute(1, 2, 0).numpy()).convert("HSV") for p in pixels]).astype(int)

    before, after = hsv(images.pixels), hsv(brighter)
    assert np.abs(after[..., 2] - before[..., 2] - 0.05 * 255).max() <= 1.5
    coloured = before[..., 2] > 30
    hue = np.abs(after[..., 0] - before[..., 0])[coloured]
    assert np.minimum(hue, 256 - hue).max() <= 4
    assert np.abs(after[..., 1] - before[..., 1])[coloured].max() <= 6
    assert corrupted(images, "Brightness", "strong").pixels[0, :, 0, 0].tolist() == [76, 76, 76]


@pytest.mark.parametrize(("side", "parts"), [(8, [100]), (600, [62, 38])])
def test_few_large_images_are_disturbed_at_once(monkeypatch, side, parts):
    sizes = []
    monkeypatch.setitem(CORRUPTIONS, "Blur", (lambda pixels, _: sizes.append(len(pixels)) or pixels, (0.4, 1.0)))
    images = random_images(100, side=side)
    assert torch.equal(corrupted(images, "Blur", "mild").pixels, images.pixels)
    assert sizes == parts


def test_contrast_shrinks_the_distance_from_the_mean_of_each_channel():
    images = random_images(4, side=16)
    grey = images.pixels[:, :1].repeat(1, 3, 1, 1)
    images.pixels.copy_(grey)  # for grey images torchvision's contrast is the same thing
    expected = adjust_contrast(images.pixels.float() / 255, 0.15)
    assert (corrupted(images, "Contrast", "strong").pixels / 255 - expected).abs().max() < 0.01


def test_jpeg_is_that_of_its_quality(tmp_path):
    images = random_images(2, side=16)
    Image.fromarray(images.pixels[1].permute(1, 2, 0).numpy()).save(tmp_path / "p.jpg", quality=40)
    expected = torch.from_numpy(np.array(Image.open(tmp_path / "p.jpg"))).permute(2, 0, 1)
    assert torch.equal(corrupted(images, "JPEG", "strong").pixels[1], expected)


def test_strong_is_stronger_than_mild():
    images = random_images(8, side=32)
    for name in CORRUPTIONS:
        mild, strong = (_changed(name, level, images).abs().mean() for level in LEVELS)
        assert 0 < mild < strong


def test_each_network_is_measured_on_the_same_disturbed_images(digits, compute):
    torch.manual_seed(0)
    network, few = SmallNetwork(10), digits.test
    train(network, digits, compute, TrainSettings(epochs=2, batch_size=32, lr=0.01))
    rows = measure_robustness({"original": network, "other": network}, few, compute)
    assert [(row["corruption"], row["level"]) for row in rows][:3] == [
        ("None", ""),
        ("Gaussian noise", "mild"),
        ("Gaussian noise", "strong"),
    ]
    assert len(rows) == 1 + 2 * len(CORRUPTIONS)
    assert rows[0]["original_percent"] == evaluate(network, few, compute).accuracy_percent
    expected = evaluate(network, corrupted(few, "Contrast", "strong"), compute).accuracy_percent
    (row,) = (row for row in rows if row["corruption"] == "Contrast" and row["level"] == "strong")
    assert row["original_percent"] == row["other_percent"] == expected
    assert len({row["original_percent"] for row in rows}) > 2


@pytest.mark.parametrize(
    ("count", "macs", "expected"), [(None, 1, 360), (None, int(3e9), 200), (None, 10**12, 100), (7, 1, 7)]
)
def test_a_large_network_gets_fewer_images_unless_their_number_is_given(digits, count, macs, expected):
    chosen = chosen_images(digits.test, count, macs, seed=0)
    assert len(chosen) == expected
    assert chosen.labels.bincount(minlength=10).min() >= expected // 10 - 3, "balanced over the classes"
