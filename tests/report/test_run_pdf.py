import base64
import copy
import io
import json
import re

import numpy as np
import pytest
from PIL import Image
from pypdf import PdfReader
from reportlab.pdfbase import pdfmetrics
from statsmodels.stats.contingency_tables import mcnemar

from cleanai.measure.significance import pack, unpack
from cleanai.report.charts import BOLD, FONT
from cleanai.report.run_pdf import pdf_report, write_report
from cleanai.report.run_text import MODELS
from cleanai.runtime.scenario import PROJECT
from tests.report.test_run_text import COMPARISON, EXPORT

OLD_RECORDS = sorted((PROJECT / "tests" / "records").rglob("TS1_*_ResNet18_CIFAR10.json"))


@pytest.fixture
def record():
    layers = [("conv1", 64, 64), ("layer1.0.conv1", 64, 40), ("layer4.1.conv1", 512, 384), ("fc", 10, 10)]
    return {
        **copy.deepcopy(COMPARISON),
        "config": {
            "dataset": "CIFAR10", "ratio": 0.2, "macs_ratio": 0.2, "steps": 5, "epochs": 3, "train_samples": None,
            "lr": 0.001, "seed": 0, "coverage_metric": "normalized_mean", "round_to": 8, "calibration_batches": 50,
            "repair": "full", "repair_batches": 50, "batch_size": 128, "precision": "auto",
            "fine_tuned_model": "0" * 16,
        },
        "prepared_with": {"weights": "imagenet", "epochs": 20, "train_samples": None, "seed": 0},
        "environment": {
            "device": "Some <GPU> & CPU", "device_type": "cuda", "cpu_threads": 2, "precision": "bfloat16",
            "system": "Windows AMD64", "python": "3.8.10", "torch": "2.0.1", "torchvision": "0.15.2",
            "torch-pruning": "1.6.1", "thop": "0.1.1", "numpy": "1.24", "cleanai": "5.1.0",
        },
        "dataset": {
            "name": "CIFAR10", "source": "image folder", "train_images": 50000, "test_images": 10000,
            "calibration_images": 6400,
        },
        "pruning": {
            "accuracy_raw_percent": 74.12, "accuracy_recalibrated_percent": 88.31,
            "accuracy_reconstructed_percent": 90.2,
            "steps": [
                {"parameters_asked_percent": 4.0 * n, "parameters_removed_percent": 4.01 * n,
                 "macs_asked_percent": None, "macs_removed_percent": 4.1 * n}
                for n in range(1, 6)
            ],
            "layers": [{"name": name, "channels_before": a, "channels_after": b} for name, a, b in layers],
        },
        "history": [
            {"epoch": n, "train_loss": 0.3, "train_accuracy_percent": 90.0 + n, "test_loss": 0.3,
             "test_accuracy_percent": 91.0 + n / 10, "learning_rate": 0.0, "seconds": 9.0}
            for n in range(1, 4)
        ],
    }  # fmt: skip


def _whole(record):
    """The record as the scripts leave it today, with what earlier versions did not measure."""
    rng = np.random.default_rng(0)
    flags = {name: rng.random(10_000) < 0.9 for name in MODELS}
    for name, hits in flags.items():
        record["models"][name]["correct_bits"] = pack(hits)
        record["models"][name]["latency_quantiles_ms"] = [2 + n / 50 for n in range(49)]
    names = [layer["name"] for layer in record["pruning"]["layers"]]
    criteria = {f"{key}_percent": 41.5 for key in ("nc", "kmnc", "nbc", "snac", "tknc")}
    read = [{"name": name, "active_percent": 50.0, "normalized_mean_percent": 60.0} for name in names[1:]]
    coverage = {"neurons": 4800, **criteria, "layers": [*read, {"name": "output"}]}
    return {
        **record,
        "heldout_bits": pack(np.arange(10_000) >= 6400),
        "layers": [
            {"name": name, "parameters_before": 2_000_000, "parameters_after": 2_000_000 - gone,
             "macs_before": 50_000_000, "macs_after": 50_000_000 - 10 * gone}
            for name, gone in zip(names, (0, 111_000, 1_670_000, 223_000))
        ],
        "classes": [
            {"name": name, "images": 1000, "original_percent": 90.0, "pruned_percent": 85.0,
             "fine_tuned_percent": 90.0 + change, "newly_wrong": 37, "newly_right": 37 + round(10 * change)}
            for name, change in (("uçak", 1.5), ("kuş", -3.25), ("gemi", 0.0))
        ],
        "newly_wrong": [
            {"index": 5, "class": "kuş", "taken_for": "uçak", "png_base64": _png(shade)} for shade in (0, 9)
        ],
        "coverage": {"profile_images": 1024, "images": 1000, "threshold": 0.25,
                     "models": {name: {**coverage, "kmnc_percent": 40.0 + n} for n, name in enumerate(MODELS)}},
        "checkpoints": {"ResNet18_CIFAR10_FTAP_NC_final.pth": "0123456789abcdef" * 4},
        "commands": ['python test_scenarios/TS1_02_coverage_pruning.py --checkpoints-dir "D:\\Çalışma" --seed 0'],
    }  # fmt: skip


def _png(shade):
    file = io.BytesIO()
    Image.new("RGB", (32, 32), (shade, 200, 100)).save(file, "PNG")
    return base64.b64encode(file.getvalue()).decode("ascii")


def _pages(pdf):
    return [" ".join(page.extract_text().split()) for page in PdfReader(io.BytesIO(pdf)).pages]


def _text(pdf):
    return "\n".join(page.extract_text() for page in PdfReader(io.BytesIO(pdf)).pages)


def test_the_report_holds_what_a_reader_needs(record):
    text = _text(pdf_report(record))
    for expected in (
        "Neuron Coverage Pruning", "TS1_Coverage_ResNet18_CIFAR10", "Original (FT)", "After Pruning+FT",
        "92.00", "90.20", "91.70", "34.08", "8.94", "0.45", "2.15", "91.60",
        "Final Accuracy Drop", "-0.30%", "+1.50%", "1.14x", "Accuracy and loss per epoch", "74.12% as cut",
        "88.31% with batch norm", "Output channels",
        "Layer by layer", "layer4.1.conv1", "Some <GPU> & CPU", "torch 2.0.1", "image folder", "Page 2",
        "from ImageNet weights, 20 epochs, seed 0", "Seed",
    ):  # fmt: skip
        assert expected in text, expected


def test_the_first_page_answers_in_three_sentences(record):
    whole = _whole(record)
    first = _pages(pdf_report(whole))[0]
    heldout = unpack(whole["heldout_bits"], 10_000)
    hits = [unpack(whole["models"][name]["correct_bits"], 10_000) for name in ("original", "fine_tuned")]
    before, after = (flags[heldout] for flags in hits)
    p_value = mcnemar([[0, (before & ~after).sum()], [(after & ~before).sum(), 0]], exact=True).pvalue
    assert p_value > 0.001
    for expected in (
        "the network lost 0.30 points of accuracy: it recognises 91.60% of the 3,600 held-out test images, "
        "the original network 91.90%.",
        "It has 20.0% fewer parameters, takes 34.1 MB instead of 42.6 MB, does 20.0% less arithmetic, and is 1.14 "
        "times as fast on single images (2.15 ms instead of 2.45 ms).",
        f"only the original network recognises {(before & ~after).sum()} of them, "
        f"only the final one {(after & ~before).sum()} (McNemar's test, p = {p_value:.3f};",
        f"show {'a' if p_value < 0.05 else 'no'} difference beyond chance",
        "Avg Inference Time (ms)",
    ):
        assert expected in first, expected


@pytest.mark.parametrize(
    ("hits", "expected"),
    [((1000, 1400), "a difference beyond chance"), ((1000, 1000), "no difference beyond chance")],
)
def test_the_answer_says_whether_it_is_chance(record, hits, expected):
    whole = _whole(record)
    for name, count in zip(("original", "fine_tuned"), hits):
        whole["models"][name]["correct_bits"] = pack(np.arange(10_000) >= 10_000 - count)
    assert expected in _pages(pdf_report(whole))[0]


def test_an_unchanged_accuracy_is_told_as_such(record):
    record["models"]["fine_tuned"]["accuracy_heldout_percent"] = 91.9
    first = _pages(pdf_report(record))[0]
    assert "kept its accuracy: it recognises 91.90% of the 3,600 held-out test images, as many as the original" in first


def test_the_pages_tell_layers_coverage_classes_latency_and_how_to_repeat_it(record):
    text = " ".join(_pages(pdf_report(_whole(record))))
    gone = (11173962 - 8939170) / 100
    for expected in (
        f"Most of the parameters went from layer4.1.conv1 ({1_670_000 / gone:.0f}%), fc ({223_000 / gone:.0f}%), "
        f"layer1.0.conv1 ({111_000 / gone:.0f}%).",
        "Parameters (thousands)", "Multiply-accumulates for one image (millions)",
        "KMNC: sections reached of each range 40.00 41.00 42.00 +2.00", "TKNC: neurons among a layer's top 3 41.50",
        "Neurons 4,800 4,800 4,800", "Measured on 1,000 of the calibration images", "on 1,024 training images",
        "Share of channels active", "Mean normalised coverage (%)",
        "kuş 90.00 85.00 86.75 -3.25 1,000 37 5 gemi 90.00 85.00 90.00 +0.00 1,000 37 37 uçak",
        "kuş, taken for uçak", "Time for one image (ms)", "90% took at most 2.45 2.15 2.15",
        "0123456789abcdef" * 4 + " ResNet18_CIFAR10_FTAP_NC_final.pth",
        'TS1_02_coverage_pruning.py --checkpoints-dir "D:\\Çalışma" --seed 0',
    ):  # fmt: skip
        assert expected in text, expected


def test_only_the_pictures_are_no_vectors(record):
    reader = PdfReader(io.BytesIO(pdf_report(_whole(record))))
    images = [image.image for page in reader.pages for image in page.images]
    assert sorted(image.getpixel((3, 3)) for image in images) == [(0, 200, 100), (9, 200, 100)]


def test_a_long_report_begins_with_a_table_of_contents(record):
    whole = _whole(record)
    whole["classes"] *= 20
    for number, row in enumerate(whole["classes"]):
        whole["classes"][number] = {**row, "name": f"class {number}"}
    pdf = pdf_report(whole)
    pages = _pages(pdf)
    assert len(pages) > 4
    sections = ("Accuracy and loss per epoch of fine-tuning", "Layer by layer, before and after pruning",
                "Test coverage", "Accuracy per class", "Images that are newly wrong", "Inference time", "Configuration",
                "Dataset and machine", "Checkpoints, with their SHA-256", "Commands that repeat this")  # fmt: skip
    contents = PdfReader(io.BytesIO(pdf)).pages[0].extract_text(extraction_mode="layout")
    for section in sections:
        number = int(re.search(rf"{section}[ .]+(\d+)", contents).group(1))
        assert section in pages[number - 1], section
        assert [n for n, page in enumerate(pages, 1) if page.count(section) and n > 1] == [number], "no section twice"
    assert "The 20 of 60 classes that lost most." in " ".join(pages)
    for number, page in enumerate(pages, 1):
        assert f"Page {number}" in page


def test_a_short_report_has_no_table_of_contents(record):
    pages = _pages(pdf_report(record))
    assert len(pages) == 2
    assert "What follows" not in pages[0]


@pytest.mark.parametrize("path", OLD_RECORDS, ids=lambda path: f"{path.parent.name}/{path.stem}")
def test_records_of_earlier_versions_still_give_a_report(path):
    record = json.loads(path.read_text(encoding="utf-8"))
    text = " ".join(_pages(pdf_report(record)))
    assert f"{record['models']['fine_tuned']['accuracy_percent']:.2f}" in text
    assert f"{record['models']['fine_tuned']['latency_ms']['p99']:.2f}" in text
    assert record["config"]["fine_tuned_model"] in text
    known = "heldout_bits" in record
    assert ("McNemar" in text) == known
    assert ("does not tell whether the difference in accuracy is more than chance" in text) != known
    for part in ("Test coverage", "Accuracy per class", "Images that are newly wrong", "their SHA-256", "repeat this"):
        assert part not in text


def test_an_export_is_in_the_report(record):
    pdf = pdf_report({**record, "export": EXPORT})
    text = " ".join(_text(pdf).split())
    for expected in ("ONNX Runtime, CPU (ms) 1.50 1.25 1.00", "8.1e-06", "ONNX Runtime 1.31.1", "Some CPU, 2 threads"):
        assert expected in text
    assert len(PdfReader(io.BytesIO(pdf)).pages) == 2


def test_warnings_stand_before_the_result(record):
    assert "Warning" not in _text(pdf_report(record))
    text = _text(pdf_report({**record, "warnings": ["The pruned network is at chance level: 9.5% < 10%"]}))
    assert text.index("Warning: The pruned network is at chance level: 9.5% < 10%") < text.index("In short")


def test_turkish_letters_survive(record):
    record["environment"]["device"] = "Çalışma İstasyonu ğüşıöç"
    assert "Çalışma İstasyonu ğüşıöç" in _text(pdf_report(record))
    for font in (FONT, BOLD):
        glyphs = pdfmetrics.getFont(font).face.charToGlyph
        assert all(ord(letter) in glyphs for letter in "çÇğĞıİöÖşŞüÜ")


@pytest.mark.parametrize("epochs", [1, 2, 30])
def test_any_number_of_epochs_can_be_drawn(record, epochs):
    record["history"] = [{**record["history"][0], "epoch": n} for n in range(1, epochs + 1)]
    assert len(PdfReader(io.BytesIO(pdf_report(record))).pages) == 2


def test_the_report_is_written_with_its_folder(record, tmp_path):
    path = tmp_path / "reports" / "a.pdf"
    write_report(path, record)
    assert path.read_bytes().startswith(b"%PDF")
