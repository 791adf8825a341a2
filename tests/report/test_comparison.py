"""Script 4 on the records of a real run, with and without what each network got right."""
import csv
import io
import json
import re
import sys

import numpy as np
import pytest
from pypdf import PdfReader

from cleanai import UserError
from cleanai.measure.significance import compare_paired, pack
from cleanai.report.comparison import compare_methods
from cleanai.report.comparison_pdf import pdf_comparison
from cleanai.report.comparison_text import comparison_csv, comparison_text, side_by_side_rows
from cleanai.runtime.scenario import PROJECT, Scenario
from tests.test_cli import fails, run

SCRIPT = "TS1_04_compare_methods.py"
SCRIPTS = {"": "TS1_01_prepare_model.py", "Coverage": "TS1_02_coverage_pruning.py", "Wanda": "TS1_03_wanda_pruning.py"}
RIGHT = {"original": 0.80, "pruned": 0.76, "fine_tuned": 0.795}


def scenario(folder, method="Comparison"):
    return Scenario("TS1", "ResNet18", "CIFAR10", folder, method)


@pytest.fixture
def records():
    """The records as scripts 1 to 3 left them before they told which images a network gets right."""
    found = {}
    for method in SCRIPTS:
        path = PROJECT / "tests" / "records" / scenario(PROJECT, method).record.name
        found[method] = json.loads(path.read_text(encoding="utf-8"))
        found[method].pop("heldout_bits", None)
        for model in found[method]["models"].values():
            model.pop("correct_bits", None)
    return found


@pytest.fixture
def told(records):
    """The same, and which images each network got right: 10,000 flags, the same harder and easier images for all."""
    random = np.random.default_rng(3)  # with which the two fine-tuned networks differ by no more than chance
    hardness, heldout = random.random(10_000), np.zeros(10_000, dtype=bool)
    heldout[random.permutation(10_000)[:3600]] = True
    flags = {}
    for method in ("Coverage", "Wanda"):
        records[method]["heldout_bits"] = pack(heldout)
        for name, model in records[method]["models"].items():
            noise = 0 if name == "original" else random.normal(0, 0.03, 10_000)
            flags[method, name] = hardness + noise < RIGHT[name]
            model["correct_bits"] = pack(flags[method, name])
    return records, flags, heldout


def write(folder, records):
    for method, record in records.items():
        path = scenario(folder, method).record
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(record), encoding="utf-8")
    return folder


def compared(folder, records):
    return compare_methods(scenario(write(folder, records)), SCRIPTS)


def _pdf_text(record):
    return "\n".join(page.extract_text() for page in PdfReader(io.BytesIO(pdf_comparison(record))).pages)


def test_the_script_writes_what_it_prints(told, tmp_path):
    folder = write(tmp_path / "Çalışma Dosyaları", told[0])
    result = run(SCRIPT, "--checkpoints-dir", folder)
    assert result.returncode == 0, result.stderr
    files = scenario(folder)
    assert sorted(path.name for path in files.record.parent.iterdir()) == [
        f"TS1_Comparison_ResNet18_CIFAR10.{suffix}" for suffix in ("csv", "json", "pdf")
    ]
    for path in (files.report, files.table, files.record):
        assert str(path) in result.stdout
    record = json.loads(files.record.read_text(encoding="utf-8"))
    assert comparison_text(record) in result.stdout
    assert files.table.read_text(encoding="utf-8") == comparison_csv(record)
    assert files.record.stat().st_size < 30_000
    opening = " ".join(result.stdout[: result.stdout.index("\n\n")].split())
    assert opening == " ".join(record["answer"])
    assert len(record["answer"]) == 3


def test_differences_are_those_of_the_held_out_images_alone(told, tmp_path):
    records, flags, heldout = told
    record = compared(tmp_path, records)
    for difference in record["differences"]:
        stage, first, second = (difference[key] for key in ("stage", "first", "second"))
        one = flags[second, "original"] if first == "original" else flags[first, stage]
        expected = compare_paired(one[heldout], flags[second, stage][heldout])
        assert {key: difference[key] for key in expected} == expected
        assert difference["more_than_chance"] == (expected["p_value"] < 0.05)
    assert len(record["differences"]) == 6
    by_name = {(d["stage"], d["first"], d["second"]): d for d in record["differences"]}
    assert by_name["pruned", "original", "Wanda"]["more_than_chance"]
    assert not by_name["fine_tuned", "Coverage", "Wanda"]["more_than_chance"]


def test_the_answer_says_who_is_ahead_and_whether_it_is_chance(told, tmp_path):
    records, flags, heldout = told
    records["Wanda"]["models"]["fine_tuned"]["correct_bits"] = pack(flags["Wanda", "fine_tuned"] | ~heldout)
    level = compared(tmp_path / "calibration images count for nothing", records)["answer"][2]
    assert "no more than chance would make (p = " in level
    better = flags["Coverage", "fine_tuned"].copy()
    better[np.flatnonzero(heldout & ~better)[:100]] = True
    records["Wanda"]["models"]["fine_tuned"]["correct_bits"] = pack(better)
    answer = compared(tmp_path / "better", records)["answer"]
    assert answer[2] == (
        "After fine-tuning WANDA is 2.78 points ahead of Neuron Coverage, more than chance would make (p < 0.001)."
    )
    assert answer[0].startswith("Neuron Coverage removed 19.9% of the parameters and 20.0% of the FLOPs, made ")
    assert " inference 1.17 times as fast, and lost 0.31 points of held-out accuracy (80.08% to 79.78%), " in answer[0]
    records["Coverage"]["models"]["fine_tuned"]["correct_bits"] = pack(better)
    assert compared(tmp_path / "same", records)["answer"][2] == "After fine-tuning the two methods are level."
    records["Coverage"]["models"]["fine_tuned"]["correct_bits"] = pack(np.ones(10_000, dtype=bool))
    assert "tuning Neuron Coverage is " in compared(tmp_path / "worse", records)["answer"][2]


def test_the_tables_hold_the_numbers_of_the_records(told, tmp_path):
    record = compared(tmp_path, told[0])
    rows = dict(side_by_side_rows(record))
    assert rows["Accuracy (%)"] == ["81.64", "80.77", "80.98", "81.13", "81.47"]
    assert rows["Avg Inference Time (ms)"] == ["20.38 / 21.57", "18.34", "18.46", "17.47", "18.58"]
    assert rows["Speedup"] == ["", "", "", "1.17x", "1.16x"]
    lines = list(csv.DictReader(io.StringIO(comparison_csv(record))))
    assert [(line["method"], line["network"]) for line in lines[:2]] == [
        ("Neuron Coverage", "original"),
        ("Neuron Coverage", "pruned"),
    ]
    last = next(d for d in record["differences"] if (d["stage"], d["first"]) == ("fine_tuned", "Coverage"))
    assert float(lines[-1]["minus_neuron_coverage_points"]) == last["difference_points"]
    assert float(lines[-1]["minus_neuron_coverage_p_value"]) == last["p_value"]
    assert float(lines[-1]["accuracy_percent"]) == 81.47
    printed, pdf = comparison_text(record), _pdf_text(record)
    low, high = last["interval_points"]
    for shown in (f"{low:+.2f} to {high:+.2f}", "20.38 / 21.57", "3,600 held-out", "10.00% before that training"):
        assert shown in " ".join(printed.split())
        assert shown in " ".join(pdf.split())
    assert max(map(len, printed.splitlines())) <= 104
    for shown in ("Where the channels went", "layer4.1.conv2", "seed 0", "PyTorch 2.", "Page 2"):
        assert shown in pdf


def test_records_without_predictions_show_why_nothing_is_said_of_chance(records, tmp_path):
    record = compared(tmp_path, records)
    lines = comparison_text(record).splitlines()
    (line,) = [line for line in lines if line.startswith("After Pruning+FT: WANDA - Neuron Coverage")]
    assert line.split()[-5:] == ["+0.25", "-", "-", "-", "-"]
    assert record["answer"][2].endswith("the records do not tell whether any of this is more than chance.")
    (remark,) = [line for line in lines if "record of WANDA does not hold which images" in line]
    assert f"delete {scenario(tmp_path, 'Wanda').record} and run, with the options of that run: python" in remark
    assert "record of WANDA does not hold" in " ".join(_pdf_text(record).split())
    assert comparison_csv(record).splitlines()[-1].endswith(",,,")


@pytest.mark.parametrize("missing", ["Coverage", "Wanda"])
def test_a_method_that_has_not_run_shows_the_command_that_runs_it(told, tmp_path, missing):
    records = {method: record for method, record in told[0].items() if method != missing}
    result = run(SCRIPT, "--checkpoints-dir", write(tmp_path, records))
    assert result.returncode == 0, result.stderr
    name = {"Coverage": "Neuron Coverage", "Wanda": "WANDA"}[missing]
    command = f'python test_scenarios/{SCRIPTS[missing]} --checkpoints-dir "{tmp_path}"'
    assert f"{name} has not run; what runs it: {command}" in result.stdout
    (line,) = [line for line in result.stdout.splitlines() if line.startswith("Accuracy (%)")]
    assert line.split().count("-") == 2
    assert "points ahead" not in result.stdout
    assert re.search(r"\(p\s[=<]", result.stdout), "the other method is compared with the original all the same"


def test_without_the_record_of_script_1_its_number_is_missing(told, tmp_path):
    del told[0][""]
    printed = comparison_text(compared(tmp_path, told[0]))
    assert "seed 0; test accuracy before that training: -\n" in printed
    assert "python test_scenarios/TS1_01_prepare_model.py --checkpoints-dir" in printed


def test_with_nothing_to_compare_it_says_what_to_run_and_writes_nothing(records, tmp_path):
    fails(run(SCRIPT, "--dataset", "Digits", "--checkpoints-dir", tmp_path), *SCRIPTS.values(), "--dataset Digits")
    fails(run(SCRIPT, "--checkpoints-dir", write(tmp_path, {"": records[""]})), SCRIPTS["Coverage"], SCRIPTS["Wanda"])
    assert not scenario(tmp_path).folder.exists()


def test_methods_that_pruned_different_networks_are_refused(told, tmp_path):
    told[0]["Wanda"]["config"]["fine_tuned_model"] = "0" * 16
    with pytest.raises(UserError, match=r"different fine-tuned models.*TS1_03_wanda_pruning\.py .*--fresh"):
        compared(tmp_path, told[0])


def test_other_images_are_not_compared_with_each_other(told, tmp_path):
    records = told[0]
    records["Wanda"]["heldout_bits"] = pack(np.arange(10_000) < 3600)
    record = compared(tmp_path, records)
    assert {d["first"] for d in record["differences"]} == {"original"}
    assert "measured on different held-out images" in comparison_text(record)
    (line,) = [line for line in comparison_text(record).splitlines() if line.startswith("After Pruning: WANDA - Neu")]
    assert line.split()[-5:] == ["-"] * 5


def test_other_settings_are_named(told, tmp_path):
    told[0]["Wanda"]["config"]["epochs"] = 30
    printed = comparison_text(compared(tmp_path, told[0]))
    assert "- The settings differ: --epochs 1 for Neuron Coverage, 30 for WANDA" in printed
    assert "--coverage-metric" not in printed


@pytest.mark.parametrize("damage", ["short bits", "no summary", "no json"])
def test_a_damaged_record_is_named_and_nothing_is_written(told, tmp_path, damage):
    records = told[0]
    if damage == "short bits":
        records["Wanda"]["models"]["pruned"]["correct_bits"] = "ff"
    if damage == "no summary":
        del records["Wanda"]["summary"]
    write(tmp_path, records)
    if damage == "no json":
        scenario(tmp_path, "Wanda").record.write_text("{", encoding="utf-8")
    said = 'lacks "summary": delete it' if damage == "no summary" else "is damaged: delete it"
    fails(run(SCRIPT, "--checkpoints-dir", tmp_path), f"TS1_Wanda_ResNet18_CIFAR10.json {said}")
    assert not scenario(tmp_path).folder.exists()


def test_help_holds_the_options_that_it_takes_and_sets_those_of_the_sweep_apart():
    text, of_the_sweep = run(SCRIPT, "--help").stdout.split("\nwith --sweep:")
    options = text.split("\noptional arguments:" if sys.version_info < (3, 10) else "\noptions:")[1]
    for option in ("--dataset", "--checkpoints-dir", "--sweep"):
        assert f"\n  {option}" in options and f"\n  {option}" not in of_the_sweep
    for option in ("--ratios", "--fresh", "--device", "--epochs", "--data-dir"):
        assert f"\n  {option}" in of_the_sweep and f"\n  {option}" not in options
