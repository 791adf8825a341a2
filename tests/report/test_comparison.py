"""Script 4 on the records of two methods."""

import copy
import csv
import io
import json
import re

import numpy as np
import pytest

from cleanai import UserError
from cleanai.measure.significance import compare_paired, pack, unpack
from cleanai.report.comparison import compare_methods
from cleanai.report.comparison_pdf import pdf_comparison
from cleanai.report.comparison_text import comparison_csv, comparison_text, side_by_side_rows
from cleanai.report.run_pdf import pdf_report
from cleanai.report.run_text import comparison_table
from cleanai.runtime.checkpoints import read_record, write_record
from cleanai.runtime.lock import only_run
from cleanai.runtime.methods import METHODS, Method
from cleanai.runtime.scenario import Scenario
from tests.helpers import COMPARE, SCRIPTS, fails, pdf_pages, pdf_text, preparation_record, run, run_record

SCRIPT_OF = dict(zip(("", "Coverage", "Wanda"), SCRIPTS))
TITLES = {"Coverage": "Neuron Coverage", "Wanda": "WANDA"}


def scenario(folder, method="Comparison"):
    return Scenario("TS1", "ResNet18", "CIFAR10", folder, method)


@pytest.fixture
def records():
    """The records of scripts 1 to 3, by method."""
    return {"": preparation_record(), **{method: run_record(method) for method in TITLES}}


def write(folder, records):
    for method, record in records.items():
        write_record(scenario(folder, method).record, record)
    return folder


def compared(folder, records):
    return compare_methods(scenario(write(folder, records)))


def heldout(record):
    return unpack(record["heldout_bits"], 10_000)


def correct(record, stage):
    return unpack(record["models"][stage]["correct_bits"], 10_000)


def test_the_script_writes_what_it_prints(records, tmp_path):
    folder = write(tmp_path / "Çalışma Dosyaları", records)
    result = run(COMPARE, "--checkpoints-dir", folder)
    assert result.returncode == 0, result.stderr
    files = scenario(folder)
    assert sorted(path.name for path in files.record.parent.iterdir()) == [
        f"TS1_Comparison_ResNet18_CIFAR10.{suffix}" for suffix in ("csv", "json", "pdf")
    ]
    for path in (files.report, files.table, files.record):
        assert str(path) in result.stdout
    record = read_record(files.record)
    assert comparison_text(record) in result.stdout
    assert files.table.read_text(encoding="utf-8") == comparison_csv(record)
    assert files.record.stat().st_size < 30_000
    opening = " ".join(result.stdout[: result.stdout.index("\n\n")].split())
    assert opening == " ".join(record["answer"])
    assert len(record["answer"]) == 3


def test_differences_are_those_of_the_held_out_images_alone(records, tmp_path):
    record = compared(tmp_path, records)
    for difference in record["differences"]:
        stage, first, second = (difference[key] for key in ("stage", "first", "second"))
        of_second = records[second]
        before = correct(of_second, "original") if first == "original" else correct(records[first], stage)
        expected = compare_paired(before[heldout(of_second)], correct(of_second, stage)[heldout(of_second)])
        assert {key: difference[key] for key in expected} == expected
        assert difference["significant"] == (expected["p_value"] < 0.05)
    assert len(record["differences"]) == 6
    by_name = {(d["stage"], d["first"], d["second"]): d for d in record["differences"]}
    assert by_name["pruned", "original", "Wanda"]["significant"]
    assert not by_name["fine_tuned", "Coverage", "Wanda"]["significant"]


def test_the_answer_says_which_method_is_ahead_and_whether_significantly(records, tmp_path):
    wanda, coverage = records["Wanda"], records["Coverage"]
    wanda["models"]["fine_tuned"]["correct_bits"] = pack(correct(wanda, "fine_tuned") | ~heldout(wanda))
    answer = compared(tmp_path / "calibration images count for nothing", records)["answer"]
    assert answer[2].endswith("WANDA is 0.15 points ahead of Neuron Coverage, not significant (p = 0.666).")
    better = correct(coverage, "fine_tuned")
    better[np.flatnonzero(heldout(coverage) & ~better)[:100]] = True
    wanda["models"]["fine_tuned"]["correct_bits"] = pack(better)
    answer = compared(tmp_path / "better", records)["answer"]
    assert answer[2] == "After fine-tuning WANDA is 2.50 points ahead of Neuron Coverage, significant (p < 0.001)."
    assert answer[0].startswith(
        "Neuron Coverage removed 20.0% of the parameters and 20.0% of the FLOPs, made inference 1.14 times as fast, "
        "and lost 0.30 points of held-out accuracy (91.90% to 91.60%), not significant (p = "
    )
    coverage["models"]["fine_tuned"]["correct_bits"] = pack(better)
    answer = compared(tmp_path / "same", records)["answer"]
    assert answer[2] == "After fine-tuning Neuron Coverage and WANDA are equal."
    coverage["models"]["fine_tuned"]["correct_bits"] = pack(np.ones(10_000, dtype=bool))
    assert "tuning Neuron Coverage is " in compared(tmp_path / "worse", records)["answer"][2]


def test_the_tables_hold_the_numbers_of_the_records(records, tmp_path):
    record = compared(tmp_path, records)
    rows = dict(side_by_side_rows(record))
    assert rows["Accuracy (%)"] == ["92.00", "90.20", "90.50", "91.70", "91.80"]
    assert rows["Avg Inference Time (ms)"] == ["2.45 / 2.50", "2.15", "2.20", "2.15", "2.25"]
    assert rows["Speedup"] == ["", "", "", "1.14x", "1.11x"]
    lines = list(csv.DictReader(io.StringIO(comparison_csv(record))))
    assert [(line["method"], line["network"]) for line in lines] == [
        (title, stage) for title in TITLES.values() for stage in ("original", "pruned", "fine_tuned")
    ]
    last = next(d for d in record["differences"] if (d["stage"], d["first"]) == ("fine_tuned", "Coverage"))
    assert float(lines[-1]["minus_coverage_points"]) == last["difference_points"] == 0.15
    assert float(lines[-1]["minus_coverage_p_value"]) == last["p_value"]
    assert float(lines[-1]["accuracy_percent"]) == 91.8
    printed, pages = comparison_text(record), pdf_pages(pdf_comparison(record))
    low, high = last["interval_points"]
    for shown in (f"{low:+.2f} to {high:+.2f}", "2.45 / 2.50", "4,000 held-out", "15.00% before that training"):
        assert shown in " ".join(printed.split())
        assert shown in " ".join(pages)
    assert max(map(len, printed.splitlines())) == 100
    for shown in ("Points 95% interval Discordant p Significant", "layer4.1.conv1", "seed 0", "PyTorch 2.", "Page 2"):
        assert shown in " ".join(pages)


def test_the_table_is_printed_where_nothing_can_be_written(records, tmp_path):
    files = scenario(write(tmp_path, records))
    files.folder.write_bytes(b"in the way of the folder")
    result = run(COMPARE, "--checkpoints-dir", tmp_path)
    fails(result, f"{files.report} cannot be written (")
    assert "COMPARISON TABLE" in result.stdout and "Report:" not in result.stdout
    files.folder.unlink()
    files.report.parent.mkdir(parents=True)
    left = files.report.with_name(f"{files.report.name}.123.tmp")
    left.write_bytes(b"left by a killed run")
    with only_run(files):
        fails(run(COMPARE, "--checkpoints-dir", tmp_path), "Another run of this script")
    left.write_bytes(b"left by a killed run")
    assert run(COMPARE, "--checkpoints-dir", tmp_path).returncode == 0
    assert files.report.exists() and not left.exists()


@pytest.mark.parametrize("missing", TITLES)
def test_a_method_that_has_not_run_shows_the_command_that_runs_it(records, tmp_path, missing):
    del records[missing]
    result = run(COMPARE, "--checkpoints-dir", write(tmp_path, records))
    assert result.returncode == 0, result.stderr
    command = f'python test_scenarios/{SCRIPT_OF[missing]} --checkpoints-dir "{tmp_path}"'
    assert f"- {TITLES[missing]} has not run. To run it: {command} --" in result.stdout
    (line,) = [line for line in result.stdout.splitlines() if line.startswith("Accuracy (%)")]
    assert line.split().count("-") == 2
    fails(run(COMPARE, "--data-dir", tmp_path), "--data-dir", "needs no images")
    assert "points ahead" not in result.stdout
    assert re.search(r"significant\s\(p\s[=<]", result.stdout), "the other method is compared with the original network"


def test_a_command_names_the_folder_of_the_images_that_the_other_run_names(records, tmp_path):
    del records["Coverage"]
    records["Wanda"]["commands"] = ['python test_scenarios/TS1_03_wanda_pruning.py --data-dir "my pictures" --seed 0']
    records["Wanda"]["config"].update(lr=0.5, epochs=30)
    (remark,) = [text for text in compared(tmp_path, records)["remarks"] if "has not run" in text]
    command = remark.split("To run it: ")[1]
    assert command.startswith("python test_scenarios/TS1_02_coverage_pruning.py --checkpoints-dir")
    assert '--data-dir "my pictures"' in command and "--lr 0.5" in command
    assert "--epochs" not in command, "only what differs from the defaults"


def test_without_the_record_of_script_1_its_number_is_missing(records, tmp_path):
    del records[""]
    printed = comparison_text(compared(tmp_path, records))
    assert "seed 0; test accuracy before that training: -\n" in printed
    assert f"python test_scenarios/{SCRIPTS[0]} --checkpoints-dir" in printed
    for record in (records["Coverage"], records["Wanda"]):
        record["prepared_with"].update(weights="mine.pth", weights_sha256="0" * 64)
    printed = comparison_text(compared(tmp_path, records))
    assert "To make it, with the folder of mine.pth: python" in printed and " --weights mine.pth" in printed


def test_a_network_that_was_prepared_with_other_settings_has_no_accuracy_before(records, tmp_path):
    records[""]["config"]["epochs"] = 21
    assert "test accuracy before that training: -\n" in comparison_text(compared(tmp_path, records))


def test_with_nothing_to_compare_it_says_what_to_run_and_writes_nothing(records, tmp_path):
    fails(run(COMPARE, "--dataset", "Digits", "--checkpoints-dir", tmp_path), *SCRIPTS, "--dataset Digits")
    result = run(COMPARE, "--checkpoints-dir", write(tmp_path, {"": records[""]}))
    fails(result, *SCRIPTS[1:])
    assert SCRIPTS[0] not in result.stderr
    assert not scenario(tmp_path).folder.exists()


def test_methods_that_pruned_different_networks_are_refused(records, tmp_path):
    records["Wanda"]["config"]["fine_tuned_model"] = "1" * 16
    with pytest.raises(UserError, match=rf"different fine-tuned models.*{SCRIPTS[1]} .*{SCRIPTS[2]} .*--fresh"):
        compared(tmp_path, records)


@pytest.mark.parametrize(
    "change",
    [
        {"heldout_bits": pack(np.arange(10_000) < 4000)},
        {"dataset": {**run_record("Wanda")["dataset"], "test_sha256": "of as many other images"}},
    ],
)
def test_other_images_are_not_compared_with_each_other(change, records, tmp_path):
    records["Wanda"].update(change)
    record = compared(tmp_path, records)
    assert {d["first"] for d in record["differences"]} == {"original"}
    printed = comparison_text(record)
    assert "- The methods used different held-out images (" in printed
    (line,) = [line for line in printed.splitlines() if line.startswith("After Pruning: WANDA - Neuron Coverage")]
    assert line.split()[-5:] == ["-"] * 5


def test_other_settings_are_named(records, tmp_path):
    records["Wanda"]["config"]["epochs"] = 30
    *of_methods, settings, between = compared(tmp_path, records)["answer"]
    assert len(of_methods) == 2 and between.startswith("After fine-tuning ")
    assert settings == "Their settings differ: --epochs 3 for Neuron Coverage, 30 for WANDA."


def test_networks_that_were_not_fine_tuned_are_compared_as_such(records, tmp_path):
    records["Wanda"]["config"].update(epochs=0, accept_drop=1.0)
    *_, settings, between = compared(tmp_path / "one", records)["answer"]
    assert between.startswith("WANDA is ") and "accept" not in settings
    records["Coverage"]["config"]["epochs"] = 0
    assert compared(tmp_path / "both", records)["answer"][-1].startswith("Without fine-tuning ")


@pytest.mark.parametrize("damage", ["no summary", "no latency", "no JSON", "edited"])
def test_a_damaged_record_is_named_and_nothing_is_written(records, tmp_path, damage):
    if damage == "no summary":
        del records["Wanda"]["summary"]
    if damage == "no latency":
        del records["Wanda"]["models"]["pruned"]["latency_ms"]
    path = scenario(write(tmp_path, records), "Wanda").record
    if damage == "no JSON":
        path.write_bytes(path.read_bytes()[:-9])
    if damage == "edited":
        content = json.loads(path.read_text(encoding="utf-8"))
        content["models"]["fine_tuned"]["accuracy_percent"] += 1
        path.write_text(json.dumps(content), encoding="utf-8")
    key = {"no summary": '"summary"', "no latency": '"latency_ms"'}.get(damage, "")
    fails(run(COMPARE, "--checkpoints-dir", tmp_path), str(path), key)
    assert not scenario(tmp_path).folder.exists()


def test_a_third_method_has_its_columns_and_the_tables_keep_their_width(records, tmp_path, monkeypatch):
    monkeypatch.setitem(METHODS, "L1", Method("T", "L1 norm"))
    printed = comparison_text(compared(tmp_path, records))
    rows = [line for line in printed.splitlines() if line.startswith("Accuracy (%)")]
    assert [line.split()[-4:] for line in rows] == [["92.00", "90.20", "90.50", "-"], ["92.00", "91.70", "91.80", "-"]]
    assert max(map(len, printed[printed.index("==") : printed.index("Several values of")].splitlines())) == 100
    assert "After Pruning+FT: L1 norm - WANDA " in printed
    assert "- L1 norm has not run. " in printed


@pytest.mark.parametrize("count", [1, 3, 8])
def test_any_number_of_methods_with_long_titles_fits(records, tmp_path, request, count):
    titles = [f"Method {number} & a title that is longer than any column of a table" for number in range(count)]
    usual = dict(METHODS)
    request.addfinalizer(lambda: (METHODS.clear(), METHODS.update(usual)))  # in their order, too
    METHODS.clear()
    for number, title in enumerate(titles):
        METHODS[f"M{number}"] = Method(f"M{number}", title)
        record = copy.deepcopy(records["Wanda"])
        record.update(method=f"M{number}", warnings=["The final network is at chance level: 10.00% accuracy"])
        for each in record["models"].values():
            each["latency_ms"].update(p50=2.0 + number, mean=2.0 + number)
        write_record(scenario(tmp_path, f"M{number}").record, record)
    record = compare_methods(scenario(tmp_path))
    printed, pages = comparison_text(record), pdf_pages(pdf_comparison(record))
    lines = [line for line in printed.splitlines() if not line.startswith("- ")]
    assert max(map(len, lines)) == 100
    rows = [line.split()[3:] for line in lines if line.startswith("Accuracy (%)")]
    assert sorted(value for row in rows for value in row) == ["90.50"] * count + ["91.80"] * count
    in_pdf = " ".join(pages)
    for title in titles:
        warning = f"WARNING: {title}: The final network is at chance level"
        assert warning in " ".join(printed.split())
        assert f"Warning: {title}: The final network" in in_pdf
    assert ("The machine was not equally fast" in printed) == (count > 1) == ("Compare speed-ups" in in_pdf)


def test_few_images_make_no_method_equal_or_unharmed(records, tmp_path):
    for method in TITLES:
        record = records[method]
        record["dataset"].update(test_images=16, calibration_images=8)
        record["heldout_bits"] = pack(np.arange(16) < 8)
        for model in record["models"].values():
            model.update(accuracy_heldout_percent=50.0, correct_bits=pack(np.arange(16) % 2 < 1))
    answer = compared(tmp_path, records)["answer"]
    for sentence in answer:
        assert re.search(r" 8 images are too few to be sure: the 95% interval is -\d\d\.\d\d to \+\d\d", sentence), (
            sentence
        )
        assert not re.search("kept|equal", sentence)


def test_where_the_test_and_the_interval_seem_to_contradict_each_other_a_sentence_says_why(records, tmp_path):
    images = np.flatnonzero(heldout(records["Wanda"]))
    for stage, wrong in (("original", images[:10]), ("fine_tuned", images[10:31])):
        flags = np.ones(10_000, dtype=bool)
        flags[wrong] = False
        records["Wanda"]["models"][stage]["correct_bits"] = pack(flags)
    texts = comparison_text(compared(tmp_path, records)), comparison_table(records["Wanda"])
    for text in (*texts, pdf_text(pdf_report(records["Wanda"]))):
        assert " ".join(text.split()).count("test is stricter than the interval") == 1, text
    assert "test is stricter" not in comparison_table(records["Coverage"])


def test_help_holds_the_two_options_that_it_takes():
    text = run(COMPARE, "--help").stdout
    assert set(re.findall(r"^  (?:-h, )?(--[\w-]+)", text, flags=re.MULTILINE)) == {
        "--help",
        "--dataset",
        "--checkpoints-dir",
    }
