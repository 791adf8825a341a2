"""The printed tables, against the user's specification."""

import pytest

from cleanai.report.notes import notes
from cleanai.report.run_pdf import pdf_report
from cleanai.report.run_text import comparison_rows, comparison_table, deployed_rows, preparation_table, summary_rows
from cleanai.report.wording import origin_lines, repair_stages, requested_shares, verdict_text
from tests.helpers import EXPORT, INT8, pdf_pages, pdf_text, preparation_record, run_record

# As the user specified them, less the ~ before the expected values.
PREPARATION_TABLE = """\
FINE-TUNING RESULTS - COMPARISON TABLE
================================================================================
Metric                         Before Fine-Tuning        After Fine-Tuning
--------------------------------------------------------------------------------
Accuracy (%)                                 15.00                     92.00
Loss                                        2.3000                    0.2500
Total Parameters                        11,173,962                11,173,962
Trainable Parameters                    11,173,962                11,173,962
--------------------------------------------------------------------------------
✓ Accuracy Improvement: +77.00%"""


COMPARISON_TABLE = """\
NEURON COVERAGE PRUNING - COMPREHENSIVE COMPARISON TABLE
====================================================================================================
Metric                         Original (FT)          After Pruning       After Pruning+FT
----------------------------------------------------------------------------------------------------
Accuracy (%)                           92.00                  90.20                  91.70
Size (MB)                              42.60                  34.08                  34.08
Parameters (M)                         11.17                   8.94                   8.94
FLOPs (G)                               0.56                   0.45                   0.45
Avg Inference Time (ms)                 2.45                   2.15                   2.15
Held-out Accuracy (%)                  91.90                  90.10                  91.60
Throughput, batch 128 (images/s)         500                    600                    600
----------------------------------------------------------------------------------------------------

Summary
  Parameter Reduction                                     20.00%
  Size Reduction                                          20.00%
  Speedup                                                   1.14x
  Accuracy Recovery (FT)                                   +1.50%
  Final Accuracy Drop                                      -0.30%
  FLOPs Reduction                                         20.00%

Held-out accuracy changed by -0.30 points, not significant (p = 0.290); 95% interval -0.82 to +0.21
points.

The final network predicts another class than the original one on 143 of the 4,000 held-out test
images (3.58%): 60 right to wrong, 48 wrong to right, 35 wrong to another wrong.

On 1,000 held-out test images with 2 corruptions (noise, blur, brightness, contrast, JPEG) the mean
accuracy is 64.25%, that of the original network 65.25%."""


def test_preparation_table_is_the_specified_one():
    assert preparation_table(preparation_record()) == PREPARATION_TABLE


def test_what_was_not_trained_or_learnt_nothing_is_said_under_the_preparation():
    record = preparation_record()
    record["config"]["epochs"], record["warnings"] = 0, ["The network is at chance level"]
    _, below = preparation_table(record).split(PREPARATION_TABLE)
    assert below == (
        "\n\nNote: the network was taken as it is, not fine-tuned.\n\n!!! WARNING: The network is at chance level"
    )


def test_comparison_table_is_the_specified_one():
    assert comparison_table(run_record()) == COMPARISON_TABLE


@pytest.mark.parametrize("result", ["PASS", "FAIL", "NOT SHOWN"])
def test_a_verdict_is_printed_and_is_on_the_first_page(result):
    judged = {"accept_drop_points": 1.0, "difference_points": -0.3, "interval_points": [-0.8, 0.2]}
    record = {**run_record(), "verdict": {"result": result, **judged}}
    sentence = verdict_text(record)
    assert sentence.startswith(f"Verdict: {result}, ") and "1 point of accuracy" in sentence
    assert "-0.80 to +0.20 points" in sentence
    assert sentence in " ".join(comparison_table(record).split())
    assert sentence in pdf_pages(pdf_report(record))[0]


def test_warnings_stand_under_the_table():
    table = comparison_table({**run_record(), "warnings": ["The pruned network is at chance level", "Second"]})
    assert table == COMPARISON_TABLE + "\n\n!!! WARNING: The pruned network is at chance level\n\n!!! WARNING: Second"


def test_times_of_a_gpu_say_how_they_were_taken():
    record = run_record()
    for model in record["models"].values():
        model["latency_by"] = "as a CUDA graph"
    before, after = COMPARISON_TABLE.split("\n\nSummary")
    line = "Inference time: one image, as a CUDA graph. Throughput: batches of 128, without a graph."
    assert comparison_table(record) == f"{before}\n{line}\n\nSummary{after}"
    assert line in " ".join(pdf_text(pdf_report(record)).split())


def test_wanda_has_its_own_title():
    assert comparison_table(run_record("Wanda")).startswith("WANDA PRUNING - COMPREHENSIVE COMPARISON TABLE\n")


def test_a_gain_in_accuracy_is_printed_with_its_sign():
    record = run_record()
    record["summary"]["final_accuracy_drop_points"] = 0.42
    assert "  Final Accuracy Drop                                      +0.42%" in comparison_table(record)


def test_origin_names_source_and_held_out_images():
    record = run_record()
    record["prepared_with"] = {"weights": "none", "epochs": 1, "train_samples": 5000, "seed": 3}
    assert origin_lines(record) == [
        "Dataset: CIFAR10, image folder; 50,000 training and 10,000 test images",
        "Calibration: 6,000 of the test images; held-out accuracy is on the other 4,000",
        "Original network: from random weights, 1 epoch on 5,000 images, seed 3",
    ]
    record["dataset"]["calibrated_on"] = "train"
    assert origin_lines(record)[1] == (
        "Calibration: 6,000 training images; held-out accuracy is on all 10,000 test images"
    )


def test_origin_names_a_file_of_weights_with_its_checksum():
    record = run_record()
    record["prepared_with"].update(weights="own.pth", weights_sha256="0123456789abcdef")
    assert origin_lines(record)[-1] == "Original network: from own.pth (01234567…), 20 epochs, seed 0"
    record["prepared_with"].update(epochs=0)
    assert origin_lines(record)[-1] == "Original network: from own.pth (01234567…), taken as it is"


def test_an_exported_network_is_timed_beside_pytorch():
    lines = comparison_table({**run_record(), "export": EXPORT}).splitlines()
    added = [line for line in lines if line not in COMPARISON_TABLE.splitlines()]
    assert added[:2] == [
        "ONNX Runtime, CPU (ms)                  1.50                   1.25                   1.00",
        "PyTorch, CPU, beside it (ms)            3.00                   2.50                   2.00",
    ]
    assert lines[lines.index(added[1]) + 1] == "-" * 100


def test_a_deployed_network_is_shown_beside_pytorch_and_not_where_an_older_record_lacks_it():
    table = comparison_table({**run_record(), "export": {**EXPORT, "int8": INT8}})
    assert "DEPLOYED NETWORK - ON ALL 4,000 HELD-OUT TEST IMAGES" in table
    assert deployed_rows({**run_record(), "export": {**EXPORT, "int8": INT8}})[1:] == [
        ["Held-out Accuracy (%)", "91.60", "91.60", "91.45"],
        ["Other class than PyTorch (images)", "", "0", "31"],
        ["Size (MB)", "34.08", "34.10", "8.61"],
        ["Avg Inference Time (ms)", "2.00", "1.00", "0.60"],
    ]
    assert [len(row) for row in deployed_rows({**run_record(), "export": EXPORT})] == [3] * 5
    older = {key: value for key, value in EXPORT.items() if key != "disagreements"}
    for record in (run_record(), {**run_record(), "export": older}):
        assert deployed_rows(record) == []
        assert "DEPLOYED" not in comparison_table(record)


def test_the_measured_stages_of_repair_are_listed():
    pruning = {"accuracy_raw_percent": 60.25, "accuracy_recalibrated_percent": 80.4}
    assert repair_stages(pruning) == "60.25% as cut, 80.40% with batch norm recalibrated"
    pruning["accuracy_reconstructed_percent"] = 81.0
    assert repair_stages(pruning).endswith(", 81.00% with layers reconstructed")


def test_requested_shares_name_each_budget():
    assert requested_shares({"ratio": 0.2, "macs_ratio": 0.2}) == "20% of the parameters and of the FLOPs"
    assert requested_shares({"ratio": 0.2, "macs_ratio": 0.35}) == "20% of the parameters and 35% of the FLOPs"
    assert requested_shares({"ratio": None, "macs_ratio": 0.35}) == "35% of the FLOPs"


def test_small_networks_are_shown_in_smaller_units():
    record = run_record()
    for model, macs in zip(record["models"].values(), (3_120_000, 2_500_000, 2_500_000)):
        model.update(macs=macs, parameters=macs // 100, size_mib=macs / 1e8, throughput_batch=16)
        model["latency_ms"]["mean"] = macs / 1e8
    rows = dict(comparison_rows(record))
    assert rows["FLOPs (M)"] == ["3.12", "2.50", "2.50"]
    assert rows["Parameters (k)"] == ["31.20", "25.00", "25.00"]
    assert rows["Size (KB)"] == ["31.95", "25.60", "25.60"]
    assert rows["Avg Inference Time (µs)"] == ["31.20", "25.00", "25.00"]
    assert "Throughput, batch 16 (images/s)" in rows
    for model, throughput in zip(record["models"].values(), (9.0, 10.5, 0.42)):
        model["throughput_images_per_s"] = throughput
    assert dict(comparison_rows(record))["Throughput, batch 16 (images/s)"] == ["9.00", "10.50", "0.42"]


def test_speed_up_is_of_medians_in_older_records_too():
    record = run_record()
    record["models"]["original"]["latency_ms"].update(mean=9.0, p50=4.0)
    record["models"]["fine_tuned"]["latency_ms"].update(mean=1.0, p50=2.0)
    record["summary"]["speedup"] = 9.0
    assert dict(summary_rows(record))["Speedup"] == "2.00x"


def test_notes_stand_under_the_table_and_are_wrapped():
    record = run_record()
    assert notes(record) == []
    for model in record["models"].values():
        model["latency_ms"]["spread_percent"] = model["throughput_spread_percent"] = 10.0
    assert notes(record) == [], "an idle machine"
    record["models"]["pruned"]["throughput_spread_percent"] = 43.2
    record["models"]["original"].update(throughput_batch=4)
    for key in ("correct_bits", "accuracy_heldout_percent"):
        record["models"]["fine_tuned"][key] = run_record()["models"]["pruned"][key]
        record["models"]["pruned"][key] = run_record()["models"]["fine_tuned"][key]
    record["warnings"] = ["Few channels remain in " + ", ".join(f"layer{number} 1 of 64" for number in range(20))]
    table = comparison_table(record)
    busy, bounded = notes(record)[1:]
    assert busy.startswith("The machine was busy: times vary by 43% (batches) between turns.")
    assert "throughput is in batches of 4 images, not 128" in bounded
    assert "did not improve" in notes(record)[0] or "worse" in notes(record)[0]
    for note in notes(record):
        assert " ".join(table.split()).count(f"Note: {note}") == 1
    assert max(map(len, table.splitlines())) == 100
