"""The sweep of script 4: its points, how it goes on, and what it writes."""
import copy
import csv
import io
import json

import pytest
import torch
from pypdf import PdfReader

from cleanai import UserError
from cleanai.measure.costs import count_macs, count_parameters
from cleanai.report.sweep_pdf import chosen_networks, pdf_sweep, sweep_answer, sweep_chart, sweep_csv, sweep_text
from cleanai.runtime.files import file_digest
from cleanai.runtime.scenario import PROJECT, Scenario, SweepScenario
from cleanai.sweep import CRITERIA, measure_sweep
from tests.scripts import fails, prepare, run, start

SCRIPT = "TS1_04_compare_methods.py"
RATIOS = [0.2, 0.5]
OPTIONS = ["--sweep", "--dataset", "Digits", "--ratios", "0.5", "--calibration-batches", "2", "--batch-size", "16"]


@pytest.fixture(scope="module")
def sweep(_trained, digits, compute):
    """Run a sweep of the trained network: its points, and all that it gave to keep."""
    calibration, heldout = digits.calibration_split(64, seed=0)

    def swept(known=(), ratios=RATIOS, fine_tune=None):
        kept = []
        points = measure_sweep(
            _trained,
            ratios,
            calibration,
            digits.repair_sample(64, seed=0),
            digits.test.select(heldout),
            compute,
            batch_size=64,
            seed=0,
            known=known,
            keep=lambda points: kept.append(copy.deepcopy(points)),
            fine_tune=fine_tune,
        )
        return points, kept

    return swept


@pytest.fixture(scope="module")
def whole(sweep):
    return sweep()


def test_every_criterion_meets_every_ratio(whole, _trained, digits):
    points, kept = whole
    assert [(point["criterion"], point["ratio"]) for point in points] == [
        (name, ratio) for name in ("Neuron Coverage", "WANDA", "L2 magnitude", "random choice") for ratio in RATIOS
    ]
    parameters = count_parameters(_trained)["parameters"]
    macs = count_macs(_trained, next(digits.test.batches(1))[0])
    for point in points:
        assert 1 - point["parameters"] / parameters == pytest.approx(point["ratio"], abs=0.0015)
        assert 1 - point["macs"] / macs == pytest.approx(point["ratio"] + 0.0025, abs=0.004)
    assert [len(of) for of in kept] == list(range(1, 9))
    assert len({point["parameters"] for point in points if point["ratio"] == 0.5}) > 1, "they cut the same channels"


def test_an_interrupted_sweep_measures_what_is_missing_and_ends_as_if_it_had_not_been(whole, sweep):
    points, kept = whole
    again, newly = sweep(known=json.loads(json.dumps(kept[6])))
    assert again == points
    assert len(newly) == 1


def test_what_was_measured_on_another_network_is_measured_again(whole, sweep):
    points, kept = whole
    known = copy.deepcopy(kept[6])
    known[6].update(macs=known[6]["macs"] + 1, accuracy_percent=1.0)
    again, newly = sweep(known=known)
    assert again == points
    assert len(newly) == 2


def test_fine_tuning_works_on_copies_and_leaves_the_random_choice_alone(whole, sweep):
    points, kept = whole
    seen = []

    def spoil(network):
        torch.rand(1000)
        seen.append(network)
        with torch.no_grad():
            for parameter in network.parameters():
                parameter.zero_()

    again, _ = sweep(known=kept[5], fine_tune=spoil)
    for point, whole_point in zip(again, points):
        assert (point["parameters"], point["macs"]) == (whole_point["parameters"], whole_point["macs"])
    assert len(seen) == 2
    assert all(point["accuracy_percent"] < 15 for point in again[6:])


def test_a_ratio_that_no_network_can_lose_is_one_line(sweep):
    with pytest.raises(UserError, match=r"--ratios 0\.99 cannot be met .* the nearest is [\d.]+% of the parameters"):
        sweep(ratios=[0.99])


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
        "scenario": "TS1_Comparison_ResNet18_CIFAR10_sweep",
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
    """The networks in the records of scripts 2 and 3, as real runs left them."""
    for method in ("Coverage", "Wanda"):
        part = Scenario("TS1", "ResNet18", "CIFAR10", tmp_path, method)
        part.record.parent.mkdir(parents=True)
        left = json.loads((PROJECT / "tests" / "records" / part.record.name).read_text(encoding="utf-8"))
        left["config"]["fine_tuned_model"] = "abc" if method == "Wanda" else "another model"
        part.record.write_text(json.dumps(left), encoding="utf-8")
    return chosen_networks(SweepScenario("TS1", "ResNet18", "CIFAR10", tmp_path, "Comparison"), "abc")


def _pdf_text(record):
    pages = PdfReader(io.BytesIO(pdf_sweep(record))).pages
    return " ".join(" ".join(page.extract_text() for page in pages).split())


def test_the_answer_names_the_ratio_up_to_which_all_is_well(record):
    assert record["answer"] == (
        "Without fine-tuning, WANDA can remove 40% of the parameters and of the multiply-accumulates and stay within "
        "1 point of the original network's 80.00% accuracy; Neuron Coverage 20%; L2 magnitude and random choice not "
        "even 10%."
    )
    record["config"]["epochs"] = 2
    for point in record["points"]:
        if point["criterion"] in ("WANDA", "random choice"):
            point["accuracy_percent"] = 80
    assert sweep_answer(record).startswith(
        "With 2 epochs of fine-tuning at each ratio, WANDA and random choice can remove 50% of the parameters and of "
        "the multiply-accumulates, the most that was tried, and stay"
    )
    for point in record["points"]:
        point["accuracy_percent"] = 70
    assert sweep_answer(record).endswith(
        "no criterion stays within 1 point of the original network's 80.00% accuracy, not even with 10% removed."
    )


def test_the_chosen_networks_are_those_made_of_this_model(record, chosen):
    assert [(network["criterion"], network["stage"]) for network in chosen] == [
        ("WANDA", "pruned"),
        ("WANDA", "fine_tuned"),
    ]
    without, printed = _pdf_text(record), sweep_text(record)
    assert "fine-tuned" not in without and "Stars" not in without and "After Pruning+FT" not in printed
    record["chosen"] = chosen
    told, printed = _pdf_text(record), " ".join(sweep_text(record).split())
    for shown in ("WANDA, After Pruning+FT", f"{chosen[1]['accuracy_percent']:.2f}", "Stars are the networks"):
        assert shown in told and shown in printed
    assert "WANDA, fine-tuned" in told, "the legend names the star"
    plots = [shape for shape in sweep_chart(record).contents if hasattr(shape, "xValueAxis")]
    for plot, cost in zip(plots, ("parameters", "macs")):
        removed = 100 * (1 - chosen[1][cost] / record["original"][cost])
        assert plot.data[-1] == [(pytest.approx(removed), chosen[1]["accuracy_percent"])]


def test_table_csv_and_pdf_hold_every_point(record, chosen):
    record["chosen"] = chosen
    printed, told = sweep_text(record), _pdf_text(record)
    assert " ".join(printed.split()).startswith(record["answer"])
    assert max(map(len, printed.splitlines())) <= 104
    (line,) = [line for line in printed.splitlines() if line.startswith("20%")]
    assert line.split() == ["20%", "79.00", "(-1.00)", "79.90", "(-0.10)", "76.00", "(-4.00)", "75.00", "(-5.00)"]
    for shown in (record["answer"], " ".join(line.split()), "3,600 test images", "Görüntü klasörü", "removed (%)"):
        assert shown in told
    lines = list(csv.DictReader(io.StringIO(sweep_csv(record))))
    assert [line["stage"] for line in lines] == ["original", *["sweep"] * 20, "pruned", "fine_tuned"]
    assert float(lines[10]["accuracy_percent"]) == record["points"][9]["accuracy_percent"]


def test_what_cannot_be_swept_is_one_line(tmp_path):
    fails(run(SCRIPT, "--sweep", "--dataset", "Digits", "--checkpoints-dir", tmp_path), "TS1_01_prepare_model.py")
    fails(run(SCRIPT, "--sweep", "--ratios", "0.5", "1.5"), "--ratios", "1.5 is not a number between 0 and 1")
    fails(run(SCRIPT, "--sweep", "--ratios", "0.5", "0.2"), "--ratios", "0.5 0.2 do not rise")
    fails(run(SCRIPT, "--epochs", "2"), "--epochs: is for --sweep")
    assert not any(tmp_path.iterdir())


def test_a_killed_sweep_goes_on_and_a_finished_one_is_shown(tmp_path):
    folder = tmp_path / "Çalışma Dosyaları"
    assert prepare(folder, "--dataset", "Digits", "--epochs", "1").returncode == 0
    files = SweepScenario("TS1", "ResNet18", "Digits", folder, "Comparison")
    options = [*OPTIONS, "--epochs", "1", "--train-samples", "64", "--checkpoints-dir", folder]

    process = start(SCRIPT, *options, PYTHONUNBUFFERED="1")
    while "WANDA, 50% removed" not in (line := process.stdout.readline()):
        assert line, process.stderr.read()
    process.kill()
    process.communicate()
    kept = json.loads(files.resume.read_text(encoding="utf-8"))["points"]
    assert len(kept) >= 2 and not files.record.exists()

    finished = run(SCRIPT, *options)
    assert finished.returncode == 0, finished.stderr
    assert f"Going on after {len(kept)} networks" in finished.stdout
    record = json.loads(files.record.read_text(encoding="utf-8"))
    assert record["points"][: len(kept)] == kept
    assert len(record["points"]) == len(CRITERIA)
    assert record["config"]["fine_tuned_model"] == file_digest(files.fine_tuned)[:16]
    names = sorted(path.name for path in files.folder.rglob("*") if path.is_file())
    assert names == [f"TS1_Comparison_ResNet18_Digits_sweep.{suffix}" for suffix in ("csv", "json", "pdf", "png")]
    assert sweep_text(record) in finished.stdout

    files.report.unlink()
    again = run(SCRIPT, *options)
    assert "Already finished" in again.stdout and sweep_text(record) in again.stdout
    assert files.report.exists() and json.loads(files.record.read_text(encoding="utf-8")) == record
    fails(run(SCRIPT, *options, "--seed", "1"), "--seed 0", "--fresh")
