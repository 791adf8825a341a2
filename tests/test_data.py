import hashlib
import io
import pickle
import shutil
import tarfile

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision import datasets

from cleanai import UserError
from cleanai.data import Images, ImageSet, balanced_order
from cleanai.sources import load_images
from tests.conftest import copy_real_images, make_image_folder, needs_real_images
from tests.servers import serving


def test_digits_are_all_there_and_the_split_is_balanced(digits):
    assert (len(digits.train), len(digits.test)) == (1437, 360)
    assert digits.train.pixels.shape[1:] == (3, 16, 16)
    assert digits.train.pixels.dtype == torch.uint8
    assert digits.test.labels.bincount().min() >= 34
    assert not digits.mirror


def test_an_image_folder_is_read_by_class(tmp_path):
    make_image_folder(tmp_path / "Pets")
    images = load_images("Pets", tmp_path)
    assert list(images.classes) == ["cat", "dog"]
    assert images.source == "image folder"
    assert images.train.pixels.shape == (4, 3, 8, 8)
    assert images.train.pixels[0, :, 0, 0].tolist() == [250, 0, 0]
    assert images.train.labels.tolist() == [0, 0, 1, 1]


def test_batches_have_mean_zero_and_deviation_one(digits):
    inputs = torch.cat([inputs for inputs, _ in digits.train.batches(100)])
    assert inputs.mean().abs() < 1e-4
    assert (inputs.std() - 1).abs() < 1e-3
    assert inputs.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        ("not an image", r"Broken image file: .*0\.png"),
        ("truncated", r"Broken image file: .*1\.png"),
        ("other size", r"9\.png is 9 x 8 pixels and the first image is 8 x 8"),
        ("class empty", "train must hold images"),
        ("class missing", "same class folders; only one of them has dog"),
        ("part missing", "test must hold images"),
    ],
)
def test_a_bad_image_folder_is_named_in_one_line(tmp_path, fault, message):
    folder = make_image_folder(tmp_path / "Pets")
    if fault == "not an image":
        (folder / "train/dog/0.png").write_bytes(b"no image")
    elif fault == "truncated":
        picture = folder / "test/cat/1.png"
        picture.write_bytes(picture.read_bytes()[:50])
    elif fault == "other size":
        Image.new("RGB", (9, 8)).save(folder / "train/cat/9.png")
    elif fault == "class empty":
        for path in (folder / "train/cat").iterdir():
            path.unlink()
    else:
        shutil.rmtree(folder / ("test/dog" if fault == "class missing" else "test"))
    with pytest.raises(UserError, match=message) as error:
        load_images("Pets", tmp_path)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("name", ["CIFAR99", "../Pets", ""])
def test_an_unknown_dataset_is_never_replaced_by_another(tmp_path, name):
    make_image_folder(tmp_path / "Pets")
    with pytest.raises(UserError, match="Unknown dataset: "):
        load_images(name, tmp_path / "data")


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
    seen = set()
    for image, source in zip((inputs * 255).round().byte(), padded):
        candidates = {
            (down, right, flip): (window.flip(2) if flip else window)
            for down in range(5)
            for right in range(5)
            for flip in (False, True)
            for window in [source[:, down : down + 16, right : right + 16]]
        }
        seen.add(next(draw for draw, candidate in candidates.items() if torch.equal(candidate, image)))
    assert len({(down, right) for down, right, _ in seen}) == 25
    assert {flip for *_, flip in seen} == ({False, True} if mirror else {False})


def test_a_subset_is_balanced_and_too_large_a_one_is_refused(digits):
    assert digits.with_train_samples(None, 0) is digits
    shares = digits.with_train_samples(100, 0).train.labels.bincount()
    assert shares.sum() == 100
    assert 9 <= shares.min() <= shares.max() <= 11
    with pytest.raises(UserError, match="--train-samples 2,000: there are only 1,437"):
        digits.with_train_samples(2000, 0)


def test_held_out_images_are_those_not_used_for_calibration(digits):
    calibration, heldout = digits.calibration_split(100, seed=0)
    assert (len(calibration), len(heldout)) == (100, 260)
    together = torch.cat([calibration.pixels, digits.test.pixels[heldout]]).flatten(1)
    assert torch.equal(together.unique(dim=0), digits.test.pixels.flatten(1).unique(dim=0))
    assert len(digits.calibration_split(6400, seed=0)[0]) == 270, "a quarter of the test images stays held out"


class TestDownload:
    """torchvision's own download and extraction, from a server of the test, with a tiny archive in its format."""

    @pytest.fixture
    def archive(self, monkeypatch) -> bytes:
        generator = np.random.default_rng(0)
        parts = {}
        for name in ("data_batch_1", "test_batch"):
            data = generator.integers(0, 256, (10, 3072), dtype=np.uint8)
            parts[name] = pickle.dumps({"data": data, "labels": list(range(10))})
        parts["batches.meta"] = pickle.dumps({"label_names": [f"class{n}" for n in range(10)]})
        file = io.BytesIO()
        with tarfile.open(fileobj=file, mode="w:gz") as tar:
            for name, content in parts.items():
                info = tarfile.TarInfo(f"cifar-10-batches-py/{name}")
                info.size = len(content)
                tar.addfile(info, io.BytesIO(content))
        md5 = {name: hashlib.md5(content).hexdigest() for name, content in parts.items()}
        meta = {"filename": "batches.meta", "key": "label_names", "md5": md5["batches.meta"]}
        monkeypatch.setattr(datasets.CIFAR10, "train_list", [["data_batch_1", md5["data_batch_1"]]])
        monkeypatch.setattr(datasets.CIFAR10, "test_list", [["test_batch", md5["test_batch"]]])
        monkeypatch.setattr(datasets.CIFAR10, "meta", meta)
        monkeypatch.setattr(datasets.CIFAR10, "tgz_md5", hashlib.md5(file.getvalue()).hexdigest())
        return file.getvalue()

    def _load(self, tmp_path, monkeypatch, content: bytes, cut_off: bool = False) -> Images:
        with serving({"cifar.tar.gz": content}, cut_off) as address:
            monkeypatch.setattr(datasets.CIFAR10, "url", f"{address}/cifar.tar.gz")
            return load_images("CIFAR10", tmp_path)

    def test_the_right_archive_is_read(self, tmp_path, monkeypatch, archive):
        images = self._load(tmp_path, monkeypatch, archive)
        assert images.source == "torchvision.datasets.CIFAR10"
        assert images.train.pixels.shape == (10, 3, 32, 32)
        assert images.test.labels.tolist() == list(range(10))
        assert images.classes[3] == "class3"
        monkeypatch.setattr(datasets.CIFAR10, "url", "http://127.0.0.1:9/gone")
        assert len(load_images("CIFAR10", tmp_path).train) == 10, "downloaded once, then read from the disk"

    @pytest.mark.parametrize("fault", ["wrong checksum", "cut off"])
    def test_a_bad_archive_is_refused_and_a_second_try_succeeds(self, tmp_path, monkeypatch, archive, fault):
        content = archive[:-4] + b"1234" if fault == "wrong checksum" else archive
        with pytest.raises(UserError, match="CIFAR-10 could not be downloaded") as error:
            self._load(tmp_path, monkeypatch, content, cut_off=fault == "cut off")
        assert "\n" not in str(error.value)
        assert "by hand" in str(error.value)
        assert list(tmp_path.rglob("*.tar.gz*")) == [], "nothing half-written is left"
        assert len(self._load(tmp_path, monkeypatch, archive).train) == 10


@needs_real_images
def test_real_images_are_read_as_they_are(tmp_path):
    copy_real_images(tmp_path, per_class=50)
    images = load_images("CIFAR10", tmp_path)
    assert images.classes[3] == "cat"
    assert images.train.pixels.shape == (500, 3, 32, 32)
    assert images.train.mean == pytest.approx([0.49, 0.48, 0.45], abs=0.03)
