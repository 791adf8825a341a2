"""Script 5: its points, how it resumes, and what it writes."""

import copy
import csv
import io
import json

import pytest
import torch
from reportlab.pdfbase.pdfmetrics import stringWidth

from cleanai import UserError
from cleanai.measure.costs import count_macs, count_parameters
from cleanai.pruning.settings import PruneImages
from cleanai.report.sweep_pdf import pdf_sweep, sweep_chart
from cleanai.report.sweep_text import chosen_networks, explanation, sweep_answer, sweep_csv, sweep_text
from cleanai.report.wording import origin_lines
from cleanai.runtime.checkpoints import read_record, write_record
from cleanai.runtime.files import file_digest
from cleanai.runtime.scenario import Scenario
from cleanai.sweep import Sweep, sweep_criteria
from tests.helpers import (
    SCRIPTS,
    SMALL_MODEL,
    SWEEP,
    ended,
    fails,
    own_scripts,
    pdf_text,
    prepare,
    run,
    run_record,
    script_command,
    started,
    wait_for_line,
)

RATIOS = [0.2, 0.5]
OPTIONS = ["--dataset", "Digits", "--ratios", "0.5", "--calibration-batches", "2", "--batch-size", "16"]


@pytest.fixture(scope="module")
def sweep(trained_small_network, digits, compute):
    """Run a sweep of a trained network: its points, and those that it saved after each new one."""
    calibration, heldout = digits.calibration_split(64, seed=0)
    images = PruneImages(calibration, digits.repair_sample(64, seed=0))

    def run_sweep(points=(), ratios=RATIOS, fine_tune=None):
        saved = []
        sweep = Sweep(copy.deepcopy(trained_small_network), ratios, images, digits.test.select(heldout), compute)
        sweep.points, sweep.fine_tune, sweep.round_to = list(points), fine_tune, [1]
        sweep.save = lambda points: saved.append(copy.deepcopy(points))
        return sweep.run(), saved

    return run_sweep


@pytest.fixture(scope="module")
def whole(sweep):
    return sweep()


def test_every_criterion_meets_every_ratio(whole, trained_small_network, digits):
    points, saved = whole
    assert [(point["criterion"], point["ratio"]) for point in points] == [
        (name, ratio)
        for name in ("Neuron Coverage", "WANDA", "OBS", "L2 magnitude", "random choice")
        for ratio in RATIOS
    ]
    parameters = count_parameters(trained_small_network)["parameters"]
    macs = count_macs(trained_small_network, next(digits.test.batches(1))[0])
    for point in points:
        assert 1 - point["parameters"] / parameters == pytest.approx(point["ratio"], abs=0.0015)
        assert 1 - point["macs"] / macs == pytest.approx(point["ratio"] + 0.0025, abs=0.004)
    assert [len(of_then) for of_then in saved] == list(range(1, 11))
    assert len({point["parameters"] for point in points if point["ratio"] == 0.5}) > 1, "they cut the same channels"


def test_an_interrupted_sweep_measures_what_is_missing_and_ends_like_an_uninterrupted_one(whole, sweep):
    points, saved = whole
    again, new = sweep(json.loads(json.dumps(saved[8])))
    assert again == points
    assert len(new) == 1


def test_points_of_another_network_are_measured_again(whole, sweep):
    points, saved = whole
    known = copy.deepcopy(saved[8])
    known[8].update(macs=known[8]["macs"] + 1, accuracy_percent=1.0)
    again, new = sweep(known)
    assert again == points
    assert len(new) == 2


def test_fine_tuning_works_on_copies_and_leaves_the_random_choice_alone(whole, sweep):
    points, saved = whole
    tuned = []

    def spoil(network):
        torch.rand(1000)
        tuned.append(network)
        with torch.no_grad():
            for parameter in network.parameters():
                parameter.zero_()

    again, _ = sweep(saved[7], fine_tune=spoil)
    for point, whole_point in zip(again, points):
        assert (point["parameters"], point["macs"]) == (whole_point["parameters"], whole_point["macs"])
    assert len(tuned) == 2
    assert all(point["accuracy_percent"] < 15 for point in again[8:])


def test_a_ratio_that_cannot_be_met_is_one_line(sweep):
    with pytest.raises(UserError, match=r"A ratio of 0\.999 cannot be met .* the nearest is [\d.]+% of the parameters"):
        sweep(ratios=[0.999])


@pytest.fixture
def record():
    """A sweep in which WANDA stays near the original up to 40%, Neuron Coverage to 20%, and the others not at all."""
    ratios = [0.1, 0.2, 0.3, 0.4, 0.5]
    lost = {
        "Neuron Coverage": [0.2, 1.0, 1.4, 0.5, 5],
        "WANDA": [-0.3, 0.1, 0.4, 0.9, 1.2],
        "L2 magnitude": [2, 4, 8, 16, 32],
        "random choice": [2, 5, 10, 20, 40],
    }
    points = [
        {
            "criterion": name,
            "ratio": ratio,
            "accuracy_percent": 80 - loss,
            "parameters": round(11_173_962 * (1 - ratio)),
            "macs": round(557_000_000 * (1 - ratio)),
        }
        for name, losses in lost.items()
        for ratio, loss in zip(ratios, losses)
    ]
    config = {"ratios": ratios, "epochs": 0, "calibration_batches": 50, "repair_batches": 8, "batch_size": 128}
    record = {
        "scenario": "TS1_Sweep_ResNet18_CIFAR10",
        "config": {**config, "lr": 0.001, "seed": 0},
        "environment": {"device": "a CPU", "precision": "float32", "torch": "2.0"},
        "dataset": {
            "name": "CIFAR10",
            "source": "Görüntü klasörü",
            "train_images": 50_000,
            "test_images": 10_000,
            "calibration_images": 6_400,
            "accuracy_images": 3_600,
        },
        "prepared_with": {"weights": "imagenet", "epochs": 20, "train_samples": None, "seed": 0},
        "original": {"accuracy_percent": 80.0, "parameters": 11_173_962, "macs": 557_000_000},
        "points": points,
        "chosen": [],
    }
    return {**record, "answer": sweep_answer(record)}


@pytest.fixture
def chosen(tmp_path):
    """The networks in the records of scripts 2 and 3, of which script 3 pruned the network of the sweep."""
    files = Scenario("TS1", "ResNet18", "CIFAR10", tmp_path, "Sweep")
    for method in ("Coverage", "Wanda"):
        record = run_record(method)
        record["config"]["fine_tuned_model"] = "abc" if method == "Wanda" else "another model"
        write_record(files.of(method).record, record)
    sweep = run_record("Wanda")
    sweep["config"]["fine_tuned_model"] = "abc"
    assert not chosen_networks(files, {**sweep, "config": {**sweep["config"], "calibration_batches": 1}})
    assert not chosen_networks(files, {**sweep, "dataset": {**sweep["dataset"], "test_sha256": "of other pictures"}})
    return chosen_networks(files, sweep)


def test_calibration_on_training_images_is_named(record):
    record["dataset"].update(calibrated_on="train", test_images=3_600)
    assert "Accuracy is on 3,600 test images, calibration used 6,400 training images." in explanation(record)
    assert "at most 50 x 128 training images" in pdf_text(pdf_sweep(record))
    assert "held-out accuracy is on all 3,600 test images" in origin_lines(record)[1]


def test_the_answer_names_the_ratio_up_to_which_accuracy_holds(record):
    assert record["answer"] == (
        "Without fine-tuning, WANDA can remove 40% of the parameters and of the FLOPs and stay within 1 point of the "
        "original network's 80.00% accuracy; Neuron Coverage 20%; L2 magnitude and random choice not even 10%."
    )
    record["config"]["epochs"] = 2
    for point in record["points"]:
        if point["criterion"] in ("WANDA", "random choice"):
            point["accuracy_percent"] = 80
    assert sweep_answer(record).startswith(
        "With 2 epochs of fine-tuning at each ratio, WANDA and random choice can remove 50% of the parameters and of "
        "the FLOPs, the highest ratio tried, and stay"
    )
    for point in record["points"]:
        point["accuracy_percent"] = 70
    assert sweep_answer(record).endswith(
        "no criterion stays within 1 point of the original network's 80.00% accuracy, not even with 10% removed."
    )


@pytest.mark.parametrize(
    ("tolerance", "expected"),
    [
        (0.1, "WANDA can remove 20% of the parameters and of the FLOPs and stay within 0.1 points of"),
        (0.5, "WANDA can remove 30% of the parameters and of the FLOPs and stay within 0.5 points of"),
        (1.4, "WANDA can remove 50% of the parameters and of the FLOPs, the highest ratio tried, and stay within 1.4"),
        (8.0, "; L2 magnitude 30%; random choice 20%."),
    ],
)
def test_the_answer_goes_by_the_tolerance(record, tolerance, expected):
    record["tolerance_points"] = tolerance
    assert expected in sweep_answer(record)
    assert f"every accuracy is within {tolerance:g} points." in " ".join(sweep_text(record).split())


def test_an_answer_of_few_images_says_how_many_decide(record):
    record["dataset"].update(accuracy_images=90, test_images=360)
    record["original"]["accuracy_percent"] = 100 * 89 / 90
    for point in record["points"]:
        lost = {"WANDA": 0, "Neuron Coverage": 2}.get(point["criterion"], 5)
        point["accuracy_percent"] = 100 * (89 - lost) / 90
    answer = sweep_answer(record)
    assert "WANDA can remove 50%" in answer
    assert answer.endswith(
        "Few images decide this: one of the 90 test images is 1.1 points; Neuron Coverage loses 2 images at 10%, "
        "L2 magnitude loses 5 images at 10% and random choice loses 5 images at 10%."
    )
    record["tolerance_points"] = 100 * 2 / 90  # as many images as Neuron Coverage loses
    assert "Neuron Coverage and WANDA can remove 50%" in sweep_answer(record)


def test_any_number_of_criteria_fits(record):
    names = [f"a criterion with the number {number} and a long name" for number in range(11)]
    record["points"] = [
        {**point, "criterion": name} for name in names for point in record["points"] if point["criterion"] == "WANDA"
    ]
    printed, in_pdf = sweep_text(record), pdf_text(pdf_sweep(record))
    assert max(map(len, printed.splitlines())) == 100
    rows = " ".join(line for line in printed.splitlines() if line.startswith("20% "))
    assert " ".join(rows.split()).count("79.90 (-0.10)") == 11
    chart = sweep_chart(record)
    for text in [shape for shape in chart.contents if getattr(shape, "text", None) in names]:
        assert text.x >= 0 and text.x + stringWidth(text.text, text.fontName, text.fontSize) <= chart.width
        assert text.y < chart.height
    for name in names:
        assert name in in_pdf


def test_a_network_that_was_not_fine_tuned_is_shown_once(tmp_path):
    files, record = Scenario("TS1", "ResNet18", "CIFAR10", tmp_path, "Sweep"), run_record("Wanda")
    record["config"]["epochs"] = 0
    write_record(files.of("Wanda").record, record)
    assert [network["stage"] for network in chosen_networks(files, record)] == ["pruned"]


def test_a_cost_of_which_nothing_is_counted_is_not_reduced(record, chosen):
    record["chosen"] = chosen
    for network in (record["original"], *record["points"], *chosen):
        network["macs"] = 0
    assert "+0.0" in sweep_text(record)
    assert pdf_text(pdf_sweep(record))


def test_the_chosen_networks_are_those_pruned_from_this_model(record, chosen):
    assert [(network["criterion"], network["stage"]) for network in chosen] == [
        ("WANDA", "pruned"),
        ("WANDA", "fine_tuned"),
    ]
    in_pdf, printed = pdf_text(pdf_sweep(record)), sweep_text(record)
    assert "fine-tuned" not in in_pdf and "Stars" not in in_pdf and "After Pruning+FT" not in printed
    record["chosen"] = chosen
    in_pdf, printed = pdf_text(pdf_sweep(record)), " ".join(sweep_text(record).split())
    for shown in ("WANDA, After Pruning+FT", f"{chosen[1]['accuracy_percent']:.2f}", "Stars are the networks"):
        assert shown in in_pdf and shown in printed
    assert "WANDA, fine-tuned" in in_pdf, "the legend names the star"
    plots = [shape for shape in sweep_chart(record).contents if hasattr(shape, "xValueAxis")]
    assert len(plots) == 2
    for plot, cost in zip(plots, ("parameters", "macs")):
        removed = 100 * (1 - chosen[1][cost] / record["original"][cost])
        (star,) = [line for line in plot.data if line == [(pytest.approx(removed), chosen[1]["accuracy_percent"])]]
        assert star


def test_table_csv_and_pdf_hold_every_point(record, chosen):
    record["chosen"] = chosen
    printed, in_pdf = sweep_text(record), pdf_text(pdf_sweep(record))
    assert " ".join(printed.split()).startswith(record["answer"])
    assert max(map(len, printed.splitlines())) == 100
    (line,) = [line for line in printed.splitlines() if line.startswith("20%")]
    assert line.split() == ["20%", "79.00", "(-1.00)", "79.90", "(-0.10)", "76.00", "(-4.00)", "75.00", "(-5.00)"]
    for shown in (record["answer"], " ".join(line.split()), "3,600 test images", "Görüntü klasörü", "removed (%)"):
        assert shown in in_pdf
    lines = list(csv.DictReader(io.StringIO(sweep_csv(record))))
    assert [line["stage"] for line in lines] == ["original", *["sweep"] * 20, "pruned", "fine_tuned"]
    for line, point in zip(lines[1:], record["points"]):
        assert {key: line[key] for key in point} == {key: str(value) for key, value in point.items()}


def test_impossible_sweeps_are_refused_in_one_line(tmp_path):
    fails(run(SWEEP, "--dataset", "Digits", "--checkpoints-dir", tmp_path), SCRIPTS[0])
    fails(run(SWEEP, "--ratios", "0.5", "1.5", "--checkpoints-dir", tmp_path), "--ratios: 1.5")
    fails(run(SWEEP, "--ratios", "0.5", "0.2", "--checkpoints-dir", tmp_path), "--ratios: 0.5 0.2 are not rising")
    assert not any(tmp_path.iterdir())


def test_a_killed_sweep_resumes_and_a_finished_one_is_shown(tmp_path):
    folder = tmp_path / "Çalışma Dosyaları"
    scripts = own_scripts(tmp_path, MODEL=SMALL_MODEL)
    assert prepare(folder, "--dataset", "Digits", "--epochs", "1", script=scripts[SCRIPTS[0]]).returncode == 0
    files = Scenario("TS1", SMALL_MODEL, "Digits", folder, "Sweep")
    options = [*OPTIONS, "--epochs", "1", "--train-samples", "64", "--checkpoints-dir", folder]

    sweep = scripts[SWEEP]
    with started(script_command(sweep, *options)) as process:
        wait_for_line("WANDA, 50% removed", process)
        process.kill()
        ended(process)
    points = read_record(files.resume)["points"]
    assert len(points) >= 2 and not files.record.exists()

    finished = run(sweep, *options)
    assert finished.returncode == 0, finished.stderr
    assert f"Resuming after {len(points)} networks" in finished.stdout
    record = read_record(files.record)
    assert record["points"][: len(points)] == points
    assert len(record["points"]) == len(sweep_criteria())
    assert record["config"]["fine_tuned_model"] == file_digest(files.fine_tuned)[:16]
    names = sorted(path.name for path in files.folder.rglob("*") if path.is_file())
    assert names == [f"TS1_Sweep_SmallNetwork_Digits.{suffix}" for suffix in ("csv", "json", "pdf")]
    assert sweep_text(record) in finished.stdout

    files.report.unlink()
    again = run(sweep, *options)
    assert "Already finished" in again.stdout and sweep_text(record) in again.stdout
    assert files.report.exists() and read_record(files.record) == record
    fails(run(sweep, *options, "--seed", "1"), "--seed 0", "--fresh")
    fails(run(sweep, *options, "--ratios", "0.9", "0.999", "--fresh"), "0.999 cannot be met")
    assert read_record(files.record) == record
