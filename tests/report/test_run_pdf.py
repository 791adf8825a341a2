import io
import json
import re
from pathlib import Path

import numpy as np
import pytest
from pypdf import PdfReader
from reportlab.pdfbase import pdfmetrics
from statsmodels.stats.contingency_tables import mcnemar

from cleanai.measure.significance import pack, unpack
from cleanai.report.fonts import BOLD, FONT
from cleanai.report.notes import notes
from cleanai.report.run_pdf import pdf_report
from cleanai.report.wording import repair_stages
from tests.helpers import EXPORT, INT8, auto_record, pdf_pages, pdf_text, run_record

OLDER = Path(__file__).parent / "older"  # records of version 1.0.0

SECTIONS = (
    "Summary",
    "Result",
    "Accuracy and loss per epoch of fine-tuning",
    "Layers before and after pruning",
    "Sensitivity of the layers",
    "Test coverage",
    "Test coverage of the layers",
    "Accuracy per class",
    "Changed predictions",
    "Images that are newly wrong",
    "Accuracy on disturbed images",
    "Inference time",
    "Configuration",
    "Dataset and machine",
    "Checkpoints with their SHA-256",
    "Commands to repeat this",
)


def test_the_report_holds_what_a_reader_needs():
    text = pdf_text(pdf_report(run_record()))
    for expected in (
        "Neuron Coverage Pruning", "TS1_Coverage_ResNet18_CIFAR10", "Original (FT)", "After Pruning+FT",
        "92.00", "90.20", "91.70", "34.08", "8.94", "0.45", "2.15", "91.60",
        "Final Accuracy Drop", "-0.30%", "+1.50%", "1.14x", "Accuracy and loss per epoch", "74.12% as cut",
        "88.31% with batch norm", "Output channels", "layer4.1.conv1", "Some <GPU> & CPU", "torch 2.0.1",
        "image folder", "Page 2", "from ImageNet weights, 20 epochs, seed 0", "Seed", "Round to 32, 16, 8, 4, 2, 1",
    ):  # fmt: skip
        assert expected in text, expected


def test_the_first_page_answers_in_three_sentences():
    record = run_record()
    first = pdf_pages(pdf_report(record))[0]
    heldout = unpack(record["heldout_bits"], 10_000)
    correct = [unpack(record["models"][name]["correct_bits"], 10_000) for name in ("original", "fine_tuned")]
    before, after = (flags[heldout] for flags in correct)
    p_value = mcnemar([[0, (before & ~after).sum()], [(after & ~before).sum(), 0]], exact=True).pvalue
    assert 0.05 < p_value < 0.95
    for expected in (
        "the network lost 0.30 points of accuracy: it classifies 91.60% of the 4,000 held-out test images correctly, "
        "the original network 91.90%.",
        "It has 20.0% fewer parameters and 20.0% fewer FLOPs, takes 34.08 MB instead of 42.60 MB, and is "
        "1.14 times as fast on single images (median 2.15 ms instead of 2.45 ms).",
        f"is not significant (p = {p_value:.3f}) by McNemar's test: {(before & ~after).sum()} of these images only the "
        f"original network classifies correctly, {(after & ~before).sum()} only the final one.",
        "Avg Inference Time (ms)",
    ):
        assert expected in first, expected


def test_without_fine_tuning_the_report_shows_none():
    record = {**run_record(), "history": []}
    record["config"]["epochs"] = 0
    models = record["models"]
    models["pruned"], models["fine_tuned"] = models["fine_tuned"], models["pruned"]
    assert len(notes(record)) == 1 and "not fine-tuned" in notes(record)[0], "the accuracy is lower by chance"
    text = pdf_text(pdf_report(record))
    assert "in 5 steps, without fine-tuning, on CIFAR10" in text and "Pruned, the network" in text
    assert repair_stages(record["pruning"]) in text and "per epoch" not in text


@pytest.mark.parametrize(("correct", "expected"), [((1000, 1400), "is significant"), ((1000, 1000), "not significant")])
def test_the_answer_says_whether_the_difference_is_significant(correct, expected):
    record = run_record()
    record["heldout_bits"] = pack(np.arange(10_000) >= 6_000)
    for name, count in zip(("original", "fine_tuned"), correct):
        record["models"][name]["correct_bits"] = pack(np.arange(10_000) >= 10_000 - count)
    assert f"in accuracy {'is ' if 'not' in expected else ''}{expected} (p " in pdf_pages(pdf_report(record))[0]


def test_an_unchanged_accuracy_is_named():
    record = run_record()
    record["models"]["fine_tuned"]["accuracy_heldout_percent"] = 91.9
    first = pdf_pages(pdf_report(record))[0]
    assert "the network kept its accuracy: it classifies 91.90% of the 4,000 held-out test images" in first
    assert "as many as the original network" in first


def test_the_pages_show_layers_coverage_classes_latency_and_how_to_repeat_it():
    text = pdf_text(pdf_report(run_record()))
    removed = (11_173_962 - 8_939_170) / 100
    for expected in (
        f"Most of the parameters were removed from layer4.1.conv1 ({1_670_000 / removed:.0f}%), "
        f"fc ({223_000 / removed:.0f}%), layer1.0.conv1 ({111_000 / removed:.0f}%).",
        "Parameters (thousands)", "FLOPs for one image (millions)",
        "KMNC: sections of ranges reached 40.00 41.00 42.00 +2.00", "TKNC: neurons among a layer's top 3 41.50",
        "NC: neurons above 0.75 on some image 35.00 35.00 35.00 +0.00", "SCC: neurons with both signs 41.50",
        "Neurons 4,800 4,800 4,800 Dead channels 2 2 2", "in the final network: layer1.0.conv1 3, 17.",
        "16,000 (uçak) to 17,000 (kuş) of a class", "SHA-256 of the test images: " + "c" * 64,
        "Measured on 1,000 of the calibration images", "from 1,024 training images",
        "Active channels", "Mean normalised coverage (%)",
        "kuş 90.00 85.00 86.75 -3.25 1,000 37 5 gemi 90.00 85.00 90.00 +0.00 1,000 37 37 uçak",
        "kuş, predicted uçak", "gemi, predicted uçak 12 21 +9",
        "Gaussian noise, strong 50.50 48.50 49.50 -1.00", "Mean of the corruptions 65.25 63.25 64.25 -1.00",
        "Time for one image (ms)", "90th percentile 2.45 2.15 2.15",
        "a" * 64 + " ResNet18_CIFAR10_FTAP_NC_final.pth",
        'TS1_02_coverage_pruning.py --checkpoints-dir "D:\\Çalışma" --seed 0',
    ):  # fmt: skip
        assert expected in text, expected


@pytest.mark.parametrize("method", ["Coverage", "Wanda"])
def test_a_record_of_an_earlier_version_is_shown_without_what_it_lacks(method):
    path = OLDER / f"TS1_{method}_ResNet18_CIFAR10.json"
    text = pdf_text(pdf_report(json.loads(path.read_text(encoding="utf-8"))))
    assert "Layers before and after pruning" in text
    assert text.count("NC: neurons above") == 1
    for lacking in (
        "Verdict", "Sensitivity of the layers", "How far the pruning went", "Keep layers", "Changed predictions",
        "disturbed", "Deployed", "Dead channels", "SCC", "SHA-256 of the",
    ):  # fmt: skip
        assert lacking not in text, lacking


def test_only_the_pictures_are_no_vectors():
    reader = PdfReader(io.BytesIO(pdf_report(run_record())))
    images = [image.image for page in reader.pages for image in page.images]
    assert sorted(image.getpixel((3, 3)) for image in images) == [(0, 200, 100), (9, 200, 100)]


def test_the_outline_leads_to_every_section_and_every_page_has_its_number():
    record = run_record()
    record["classes"] = [{**row, "name": f"class {number}"} for number, row in enumerate(record["classes"] * 20)]
    pdf = pdf_report(record)
    pages, reader = pdf_pages(pdf), PdfReader(io.BytesIO(pdf))
    assert tuple(entry.title for entry in reader.outline) == SECTIONS
    for entry in reader.outline:
        number = reader.get_destination_page_number(entry)
        assert entry.title in pages[number], entry.title
    assert "The 20 of 60 classes that lost most." in " ".join(pages)
    for number, page in enumerate(pages, 1):
        assert f"Page {number}" in page


def test_calibration_on_training_images_is_named():
    record = run_record()
    record["dataset"]["calibrated_on"] = "train"
    record["heldout_bits"] = pack(np.ones(10_000, dtype=bool))
    text = pdf_text(pdf_report(record))
    for expected in (
        "of the 10,000 held-out test images correctly",
        "Measured on 1,000 of the held-out test images.",
        "10,000, all held out; calibration used 6,000 training images",
    ):
        assert expected in text, expected


def test_an_export_is_in_the_report():
    text = pdf_text(pdf_report({**run_record(), "export": {**EXPORT, "int8": INT8}}))
    assert "Other class than PyTorch (images) 0 31" in text
    assert "1,024 calibration images" in text
    for expected in ("ONNX Runtime, CPU (ms) 1.50 1.25 1.00", "8.1e-06", "ONNX Runtime 1.31.1", "Some CPU, 2 threads"):
        assert expected in text


def test_the_steps_up_to_a_limit_are_in_the_report():
    assert "How far the pruning went" not in pdf_text(pdf_report(run_record()))
    record = auto_record()
    text = pdf_text(pdf_report(record))
    for expected in (
        "pruned in 5 steps, to end before the accuracy on the calibration images fell by more than 1 point or at a "
        "speed-up of 1.5 on single images, then 3 epochs",
        "The pruning ended because the next step lost more than 1 point of accuracy",
        "Original 0.0 0.0 97.20 1 5.0 5.1 97.00 -0.20 1.95 1.05x yes",
        "6 30.0 30.6 95.90 -1.30 1.70 1.30x no",
    ):
        assert expected in text, expected
    (note,) = notes(record)
    assert "speed-up of 1.5 on single images was not reached: 1.25 is that of the last step" in note
    assert notes(auto_record("speedup")) == []
    for step in record["pruning"]["path"]:
        for key in ("speedup", "latency_median_ms", "latency_images"):
            step.pop(key, None)
    record["config"].update(speedup=None, speedup_of=None)
    assert "1 5.0 5.1 97.00 -0.20 yes" in pdf_text(pdf_report(record))


def test_warnings_stand_before_the_summary():
    assert "Warning" not in pdf_text(pdf_report(run_record()))
    message = "The pruned network is at chance level: 9.5% < 10%"
    text = pdf_text(pdf_report({**run_record(), "warnings": [message]}))
    assert text.index(f"Warning: {message}") < text.index("Summary")


def test_a_record_without_newly_wrong_images_has_no_section_for_them():
    assert "Images that are newly wrong" not in pdf_text(pdf_report({**run_record(), "newly_wrong": []}))


def test_turkish_letters_survive():
    record = run_record()
    record["environment"]["device"] = "Çalışma İstasyonu ğüşıöç"
    assert "Çalışma İstasyonu ğüşıöç" in pdf_text(pdf_report(record))
    for font in (FONT, BOLD):
        glyphs = pdfmetrics.getFont(font).face.charToGlyph
        assert all(ord(letter) in glyphs for letter in "çÇğĞıİöÖşŞüÜ")


def test_letters_that_the_fonts_lack_are_written_in_latin_ones():
    written = {
        "кошка": "koshka", "γάτα": "gata", "ねこ": "neko", "猫": "Mao", "고양이": "GoYangI", "बिल्ली": "billi",
        "żółw": "zółw", "قطة": "qth", "חתול": "htvl", "🐈": ":cat2:", "🐈\u200d⬛": ":cat2: :black_large_square:",
        "\ue000": "U+E000", "c\u0327a": "ça", "\udcf6": "U+DCF6",
    }  # fmt: skip
    record, glyphs = run_record(), pdfmetrics.getFont(FONT).face.charToGlyph
    assert glyphs.keys() == pdfmetrics.getFont(BOLD).face.charToGlyph.keys()
    record["classes"] = [{**record["classes"][0], "name": name} for name in written]
    record["scenario"] = "TS1_猫"  # at the foot of each page
    text = pdf_text(pdf_report(record))
    for name, expected in written.items():
        assert f"{expected} 90.00" in text, name
        assert all(ord(character) in glyphs for character in expected)
    assert "TS1_Mao" in text


@pytest.mark.parametrize("epochs", [1, 2, 30])
def test_any_number_of_epochs_can_be_drawn(epochs):
    record = run_record()
    record["history"] = [{**record["history"][0], "epoch": epoch} for epoch in range(1, epochs + 1)]
    assert len(pdf_pages(pdf_report(record))) == len(pdf_pages(pdf_report(run_record())))


def _squeezed(text):
    return re.sub(r"\s", "", text)


@pytest.mark.parametrize(
    ("layers", "warnings", "name"), [(1, 0, "a"), (47, 2, "layer3.{}.downsample.0"), (120, 6, "x" * 60 + "{}")]
)
def test_a_report_of_any_length_is_made_and_no_text_is_lost(layers, warnings, name):
    record = {**run_record(), "export": EXPORT, "scenario": "TS1_" + "s" * 200}
    names = [name.format(number) for number in range(layers)]
    for part in (record, record["pruning"]):
        part["layers"] = [{**part["layers"][1], "name": each} for each in names]
    (group,) = record["pruning"]["sensitivity"]
    record["pruning"]["sensitivity"] = [{**group, "layers": [each, "x"]} for each in names]
    for model in record["coverage"]["models"].values():
        model["layers"] = [*({**model["layers"][0], "name": each} for each in names), model["layers"][-1]]
    record["warnings"] = [f"Warning {number}: the network is at chance level" for number in range(warnings)]
    classes = [f"{'Klasse' * 20}{number}" for number in range(1000)]
    record["classes"] = [{**record["classes"][0], "name": each} for each in classes]
    record["commands"] = ["python " + "".join(f"/folder{number}" for number in range(200))]
    record["config"]["round_to"] = list(range(900, 0, -1))
    text = re.sub(r"TS1_s+Page\d+", "", _squeezed(pdf_text(pdf_report(record))))
    assert text.count("and1more(64)") == min(layers, 40)
    assert ("The40of" in text) == (layers > 40)
    for expected in (*names, *record["warnings"], *classes[:5], *(f"/folder{number}/" for number in range(199))):
        assert _squeezed(expected) in text, expected
    assert sum(f",{number}," in text for number in range(2, 900)) > 880, "a page may end within some of them"


def test_what_a_reader_must_know_is_in_the_summary():
    record = run_record()
    for model in record["models"].values():
        model["latency_ms"].update(n=2, spread_percent=34.0)
    bits = pack(np.arange(10_000) < 3_660)  # 1,464 of 4,000 held-out ones
    record["models"]["fine_tuned"].update(correct_bits=bits, accuracy_heldout_percent=36.6)
    before = f"{record['models']['pruned']['accuracy_heldout_percent']:.2f}%"
    first = pdf_pages(pdf_report(record))[0]
    for expected in (
        f"Fine-tuning made the pruned network worse: held-out accuracy {before} before it, 36.60% after it",
        "ResNet18_CIFAR10_pruned_NC.pth",
        "The machine was busy: times vary by 34% (single images) between turns.",
        "only 2 calls of each network",
    ):
        assert expected in first, expected
    assert "Spread between turns 34% 34% 34%" in pdf_text(pdf_report(record))


def test_few_images_do_not_show_that_accuracy_was_kept():
    record = run_record()
    record["dataset"].update(test_images=32, calibration_images=24)
    record["heldout_bits"] = pack(np.arange(32) < 8)
    for name in record["models"]:
        record["models"][name].update(accuracy_heldout_percent=50.0, correct_bits=pack(np.arange(32) % 2 < 1))
    first = pdf_pages(pdf_report(record))[0]
    assert "kept" not in first
    assert "shows no change of accuracy, but on too few images to be sure: it classifies 50.00% of the 8 held" in first
    low, high = re.search(r"difference is ([+-][\d.]+) to ([+-][\d.]+) points", first).groups()
    assert float(low) < -10 and float(high) > 10


def test_an_epoch_that_leaves_images_out_is_named():
    record = run_record()
    assert "whole batches only" not in pdf_text(pdf_report(record))
    record["dataset"]["train_images"], record["config"]["batch_size"] = 90, 16
    assert "whole batches only: 80 of the 90 images" in pdf_text(pdf_report(record))
