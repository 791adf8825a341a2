"""The printed tables, against those of the scenario's own page."""
import copy

from cleanai.report.run_text import asked_for, comparison_table, origin_lines, preparation_table, repair_stages

PREPARATION = {
    "models": {
        "before": {"accuracy_percent": 15.0, "loss": 2.3, "parameters": 11173962, "trainable_parameters": 11173962},
        "after": {"accuracy_percent": 92.0, "loss": 0.25, "parameters": 11173962, "trainable_parameters": 11173962},
    }
}
# As on the scenario's page, less the ~ before its expected values.
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


def model(accuracy, heldout, size, parameters, macs, latency, throughput):
    return {
        "accuracy_percent": accuracy,
        "accuracy_heldout_percent": heldout,
        "loss": 0.3,
        "size_mib": size,
        "parameters": parameters,
        "macs": macs,
        "latency_ms": {"mean": latency, "p50": latency, "p90": latency, "p99": latency, "n": 200},
        "throughput_images_per_s": throughput,
    }


COMPARISON = {
    "scenario": "TS1_Coverage_ResNet18_CIFAR10",
    "method": "Coverage",
    "models": {
        "original": model(92.0, 91.9, 42.6, 11173962, 556_000_000, 2.45, 500),
        "pruned": model(90.2, 90.1, 34.08, 8939170, 445_000_000, 2.15, 600),
        "fine_tuned": model(91.7, 91.6, 34.08, 8939170, 445_000_000, 2.15, 600),
    },
    "summary": {
        "parameter_reduction_percent": 20.0,
        "size_reduction_percent": 20.0,
        "macs_reduction_percent": 20.0,
        "speedup": 2.45 / 2.15,
        "accuracy_recovery_points": 1.5,
        "final_accuracy_drop_points": -0.3,
    },
    "dataset": {"name": "CIFAR10", "source": "image folder", "train_images": 50000, "test_images": 10000},
}
EXPORT = {
    "file": "ResNet18_CIFAR10_FTAP_NC_final.onnx", "size_mib": 34.1, "opset": 20, "largest_difference": 8.1e-6,
    "device": "Some CPU", "cpu_threads": 2, "onnxruntime": "1.31.1",
    "latency_ms": {
        "onnx_runtime": {"original": {"mean": 1.5}, "pruned": {"mean": 1.25}, "fine_tuned": {"mean": 1.0}},
        "pytorch": {"original": {"mean": 3.0}, "pruned": {"mean": 2.5}, "fine_tuned": {"mean": 2.0}},
    },
}  # fmt: skip
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
  FLOPs Reduction                                         20.00%"""


def test_preparation_table_is_that_of_the_page():
    assert preparation_table(PREPARATION) == PREPARATION_TABLE


def test_comparison_table_is_that_of_the_page():
    assert comparison_table(COMPARISON) == COMPARISON_TABLE


def test_warnings_stand_under_the_table():
    table = comparison_table({**COMPARISON, "warnings": ["The pruned network is at chance level", "Second"]})
    assert table == COMPARISON_TABLE + "\n\n!!! WARNING: The pruned network is at chance level\n\n!!! WARNING: Second"


def test_wanda_has_its_own_title():
    assert comparison_table({**COMPARISON, "method": "Wanda"}).startswith("WANDA PRUNING - COMPREHENSIVE")


def test_a_gain_in_accuracy_is_printed_with_its_sign():
    record = copy.deepcopy(COMPARISON)
    record["summary"]["final_accuracy_drop_points"] = 0.42
    assert "  Final Accuracy Drop                                      +0.42%" in comparison_table(record)


def test_origin_names_source_and_held_out_images():
    record = copy.deepcopy(COMPARISON)
    record["dataset"]["calibration_images"] = 6400
    record["prepared_with"] = {"weights": "none", "epochs": 1, "train_samples": 5000, "seed": 3}
    assert origin_lines(record).splitlines() == [
        "Dataset: CIFAR10, image folder; 50,000 training and 10,000 test images",
        "Channels were measured on 6,400 of the test images; held-out accuracy is that on the other 3,600",
        "Original network: from random weights, 1 epoch on 5,000 images, seed 3",
    ]


def test_an_exported_network_is_timed_beside_pytorch():
    record = copy.deepcopy(COMPARISON)
    record["export"] = EXPORT
    lines = comparison_table(record).splitlines()
    added = [line for line in lines if line not in COMPARISON_TABLE.splitlines()]
    assert added == [
        "ONNX Runtime, CPU (ms)                  1.50                   1.25                   1.00",
        "PyTorch, CPU, beside it (ms)            3.00                   2.50                   2.00",
    ]
    assert lines[lines.index(added[1]) + 1] == "-" * 100


def test_the_stages_of_repair_that_were_measured_are_told():
    pruning = {"accuracy_raw_percent": 60.25, "accuracy_recalibrated_percent": 80.4}
    assert repair_stages(pruning) == "60.25% as cut, 80.40% with batch norm recalibrated"
    pruning["accuracy_reconstructed_percent"] = 81.0
    assert repair_stages(pruning).endswith(", 81.00% with the layers reconstructed as well")


def test_what_was_asked_for_is_told_for_each_budget():
    assert asked_for({"ratio": 0.2, "macs_ratio": 0.2}) == "20% of the parameters and of the arithmetic"
    assert asked_for({"ratio": 0.2, "macs_ratio": 0.35}) == "20% of the parameters and 35% of the arithmetic"
    assert asked_for({"ratio": None, "macs_ratio": 0.35}) == "35% of the arithmetic"
