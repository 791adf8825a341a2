from dataclasses import replace
from pathlib import Path

import pytest
import torch

from cleanai import UserError
from cleanai.cli import Options
from cleanai.data.images import ImageSet, ImageSettings, balanced_order
from cleanai.data.sources import load_images
from cleanai.run import open_run
from cleanai.runtime.checkpoints import save_checkpoint
from cleanai.runtime.files import file_digest
from cleanai.runtime.scenario import Scenario
from tests.helpers import make_image_folder


def test_digits_are_all_there_and_the_split_is_balanced(digits):
    assert (len(digits.train), len(digits.test)) == (1437, 360)
    assert digits.train.pixels.shape[1:] == (3, 16, 16)
    assert digits.train.pixels.dtype == torch.uint8
    assert digits.test.labels.bincount().min() >= 34
    assert not digits.mirror


def test_batches_have_mean_zero_and_deviation_one(digits):
    inputs = torch.cat([inputs for inputs, _ in digits.train.batches(100)])
    assert inputs.mean().abs() < 1e-4
    assert (inputs.std() - 1).abs() < 1e-3
    assert inputs.is_contiguous(memory_format=torch.channels_last)


def test_every_beginning_of_a_balanced_order_is_balanced():
    labels = torch.arange(10).repeat_interleave(50)  # sorted by class, like an image folder
    order = balanced_order(labels, seed=3)
    assert sorted(order.tolist()) == list(range(500))
    for count in (20, 100, 250):
        shares = labels[order[:count]].bincount(minlength=10)
        assert shares.max() - shares.min() <= 2
    assert torch.equal(order, balanced_order(labels, seed=3))
    assert not torch.equal(order, balanced_order(labels, seed=4))


def _pictures(count: int, size: int = 16) -> ImageSet:
    pixels = torch.randint(1, 256, (count, 3, size, size), dtype=torch.uint8)
    return ImageSet(pixels, torch.arange(count), torch.zeros(3), torch.ones(3))


@pytest.mark.parametrize("mirror", [False, True])
def test_augmented_images_are_shifted_and_flipped_copies(mirror):
    pictures = _pictures(200)
    indices = torch.randperm(200)
    moves = pictures.draw_moves(200, mirror, torch.Generator().manual_seed(0))
    inputs, labels = pictures.augmented_batch(indices, moves)
    assert torch.equal(labels, indices)
    padded = torch.nn.functional.pad(pictures.pixels[indices], (2, 2, 2, 2))
    draws = set()
    for image, source in zip((inputs * 255).round().byte(), padded):
        candidates = {
            (down, right, flip): (window.flip(2) if flip else window)
            for down in range(5)
            for right in range(5)
            for flip in (False, True)
            for window in [source[:, down : down + 16, right : right + 16]]
        }
        draws.add(next(draw for draw, candidate in candidates.items() if torch.equal(candidate, image)))
    assert len({(down, right) for down, right, _ in draws}) == 25  # of an eighth of 16 pixels
    assert {flip for *_, flip in draws} == ({False, True} if mirror else {False})


@pytest.mark.parametrize(("shift", "reach"), [(0, 0), (0.05, 0), (0.1, 1), (0.3, 3), (0.7, 7)])
def test_images_are_shifted_by_a_share_of_their_height_at_most(shift, reach):
    pictures = replace(_pictures(500, size=10), shift=shift)
    moved = pictures.augmented(pictures.draw_moves(500, False, torch.Generator().manual_seed(0))).pixels
    black = moved.eq(0).all(1)  # the borders; no pixel of these pictures is black
    assert black.all(2).sum(1).max() == black.all(1).sum(1).max() == reach
    assert torch.equal(moved, pictures.pixels) == (reach == 0)
    assert replace(_pictures(1, size=100), shift=0.29).reach == 29  # 0.29 * 100 is a little less


@pytest.mark.parametrize(
    ("dataset", "settings", "words"),
    [
        ("Digits", {}, "shifted at random by up to 2 pixels, and not mirrored"),
        ("Pets", {}, "shifted at random by up to 1 pixel, and mirrored at random"),
        ("Pets", {"flip": "none", "shift": 0.25}, "shifted at random by up to 2 pixels, and not mirrored"),
        ("Pets", {"flip": "none", "shift": 0.0, "seed": 7}, "not shifted, and not mirrored"),
    ],
)
def test_images_are_augmented_as_the_config_of_script_1_says(tmp_path, dataset, settings, words):
    make_image_folder(tmp_path / "Pets")
    images = load_images(dataset, tmp_path, ImageSettings.of(settings))
    assert images.augmentation == words
    sample = images.repair_sample(4, seed=0)
    assert torch.equal(sample.pixels, images.train.sample(4, seed=0).pixels) == words.startswith("not")


@pytest.mark.parametrize("method", ["Coverage", "Wanda", "Sweep"])
def test_pruning_reads_and_augments_images_as_script_1_did(tmp_path, capsys, method):
    make_image_folder(tmp_path / "Pets", size=(30, 40))
    scenario = Scenario("T", "ResNet18", "Pets", tmp_path)
    config = {"image_size": 16, "flip": "none", "shift": 0.25}
    facts = {
        "model": "ResNet18",
        "dataset": "Pets",
        "config": config,
        "mean": [0.5, 0.25, 0.0],
        "std": [1.0, 0.5, 0.25],
    }
    save_checkpoint(scenario.fine_tuned, facts)
    args = Options(
        dataset="Pets", data_dir=tmp_path, device="cpu", precision="float32", deterministic=False, train_samples=2,
        seed=0, config={"seed": 0, "fine_tuned_model": file_digest(scenario.fine_tuned)[:16]},
    )  # fmt: skip
    run = open_run(scenario.of(method), args)
    assert run.images.train.pixels.shape == (2, 3, 16, 16)
    assert (run.images.train.reach, run.images.mirror) == (4, False)
    for images in (run.images.train, run.images.test):
        assert (images.mean.tolist(), images.std.tolist()) == (facts["mean"], facts["std"])
    assert "Training images are shifted at random by up to 4 pixels, and not mirrored\n" in capsys.readouterr().out


def test_a_subset_is_balanced_and_too_large_a_one_is_refused(digits):
    assert digits.with_train_samples(None, 0) is digits
    shares = digits.with_train_samples(100, 0).train.labels.bincount()
    assert shares.sum() == 100
    assert 9 <= shares.min() <= shares.max() <= 11
    with pytest.raises(UserError, match=r"--train-samples 2,000: .*1,437"):
        digits.with_train_samples(2000, 0)


def test_held_out_images_are_those_not_used_for_calibration(digits):
    calibration, heldout = digits.calibration_split(100, seed=0)
    assert (len(calibration), len(heldout)) == (100, 260)
    together = torch.cat([calibration.pixels, digits.test.pixels[heldout]]).flatten(1)
    assert torch.equal(together.unique(dim=0), digits.test.pixels.flatten(1).unique(dim=0))
    assert len(digits.calibration_split(6400, seed=0)[0]) == 270, "a quarter of the test images stays held out"


def test_calibration_on_training_images_holds_out_all_test_images_and_leaves_those_of_the_repair(digits):
    calibration, heldout = digits.calibration_split(400, seed=0, source="train")
    assert sorted(heldout.tolist()) == list(range(360))
    assert calibration.labels.bincount().min() >= 35, "balanced over the classes"
    training = digits.train.pixels.flatten(1).tolist()
    places = {tuple(pixels): number for number, pixels in enumerate(training)}
    used = {places[tuple(pixels)] for pixels in calibration.pixels.flatten(1).tolist()}
    repair = {places[tuple(pixels)] for pixels in digits.train.sample(1024, seed=0).pixels.flatten(1).tolist()}
    assert len(used) == 400 and not used & repair
    assert len(digits.calibration_split(6400, seed=0, source="train")[0]) == 1437


@pytest.mark.parametrize("classes", [["0"], [str(number) for number in range(100)], list("9876543210")])
def test_a_checkpoint_for_other_classes_is_named(digits, classes):
    digits.require_classes([str(number) for number in range(10)], Path("fits.pth"))
    with pytest.raises(UserError, match=rf"^other\.pth is for {len(classes)} classes .*, and the dataset has 10 "):
        digits.require_classes(classes, Path("other.pth"))
