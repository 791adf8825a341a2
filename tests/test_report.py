import io

import pytest
from pypdf import PdfReader
from reportlab.pdfbase import pdfmetrics

from cleanai.charts import BOLD, FONT
from cleanai.report import pdf_report, write_report
from tests.test_tables import COMPARISON, EXPORT


@pytest.fixture
def record():
    layers = [("conv1", 64, 64), ("layer1.0.conv1", 64, 40), ("layer4.1.conv1", 512, 384), ("fc", 10, 10)]
    return {
        **COMPARISON,
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


def _text(pdf):
    return "\n".join(page.extract_text() for page in PdfReader(io.BytesIO(pdf)).pages)


def test_the_report_holds_what_a_reader_needs(record):
    text = _text(pdf_report(record))
    for expected in (
        "Neuron Coverage Pruning", "TS1_Coverage_ResNet18_CIFAR10", "Original (FT)", "After Pruning+FT",
        "92.00", "90.20", "91.70", "34.08", "8.94", "0.45", "2.15", "91.60",
        "Final Accuracy Drop", "-0.30%", "+1.50%", "1.14x", "Accuracy over the epochs", "74.12% as cut",
        "88.31% with batch norm",
        "Channels per layer", "layer4.1.conv1", "20.05", "Some <GPU> & CPU", "torch 2.0.1", "image folder", "Page 2",
        "from ImageNet weights, 20 epochs, seed 0", "Seed",
    ):  # fmt: skip
        assert expected in text, expected


def test_an_export_is_in_the_report(record):
    pdf = pdf_report({**record, "export": EXPORT})
    text = " ".join(_text(pdf).split())
    for expected in ("ONNX Runtime, CPU (ms) 1.50 1.25 1.00", "8.1e-06", "ONNX Runtime 1.31.1", "Some CPU, 2 threads"):
        assert expected in text
    assert len(PdfReader(io.BytesIO(pdf)).pages) == 2


def test_warnings_stand_before_the_result(record):
    assert "Warning" not in _text(pdf_report(record))
    text = _text(pdf_report({**record, "warnings": ["The pruned network is at chance level: 9.5% < 10%"]}))
    assert text.index("Warning: The pruned network is at chance level: 9.5% < 10%") < text.index("Result")


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
