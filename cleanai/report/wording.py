"""Phrases that several tables and reports share, made from a record alone."""

from __future__ import annotations

import shutil
import textwrap
from typing import Any, Dict

from cleanai.runtime.methods import METHODS

Record = Dict[str, Any]

STAGES = {"original": "Original (FT)", "pruned": "After Pruning", "fine_tuned": "After Pruning+FT"}
WIDTH = 100  # columns of a table
FULL_BATCH = 128  # images, in which throughput is measured where it is not too slow
_NARROWEST = 40  # columns that prose is wrapped to; some consoles call themselves 0 or 1 wide
_UNITS = {  # with the least value that is shown in each; the specification's unit comes first
    "macs": (("G", 1e9, 1e8), ("M", 1e6, 1e5), ("k", 1e3, 0)),
    "parameters": (("M", 1e6, 1e6), ("k", 1e3, 0)),
    "size_mib": (("MB", 1, 1), ("KB", 1 / 1024, 0)),
    "ms": (("ms", 1, 0.1), ("µs", 1e-3, 0)),
}


def method_title(method: str) -> str:
    """The name of a method in tables and reports."""
    return METHODS[method].title


def wrapped(text: str) -> str:
    """Prose wrapped to the terminal, at most to the width of the tables."""
    columns = shutil.get_terminal_size((WIDTH, 24)).columns
    return textwrap.fill(text, min(WIDTH, max(_NARROWEST, columns)), break_on_hyphens=False)  # of options


def origin_lines(record: Record) -> list[str]:
    """The images of a result, and for a pruning script the network it started from."""
    dataset = record["dataset"]
    lines = [
        f"Dataset: {dataset['name']}, {dataset['source']}; "
        f"{dataset['train_images']:,} training and {dataset['test_images']:,} test images"
    ]
    if "calibration_images" in dataset:
        heldout = f"{heldout_images(record):,}"
        if calibrated_on_train(record):
            calibrated, on = "training images", f"all {heldout} test images"
        else:
            calibrated, on = "of the test images", f"the other {heldout}"
        lines.append(f"Calibration: {dataset['calibration_images']:,} {calibrated}; held-out accuracy is on {on}")
    if "prepared_with" in record:
        lines.append(f"Original network: {prepared_with(record)}")
    return lines


def heldout_images(record: Record) -> int:
    """The number of test images that were not used for calibration."""
    dataset = record["dataset"]
    return dataset["test_images"] - (0 if calibrated_on_train(record) else dataset["calibration_images"])


def calibrated_on_train(record: Record) -> bool:
    """Whether calibration used training images. An older record has it on test images."""
    return record["dataset"].get("calibrated_on") == "train"


def have_same_pictures(records: list[Record]) -> bool:
    """Whether the test images of these records are the same, where they say which these are; older ones do not."""
    return len({record["dataset"].get("test_sha256") for record in records} - {None}) <= 1


def prepared_with(record: Record) -> str:
    """How the network that a pruning script started from was made."""
    config = record["prepared_with"]
    weights = {"imagenet": "ImageNet weights", "none": "random weights"}.get(config["weights"])
    if weights is None:
        weights = f"{config['weights']} ({config['weights_sha256'][:8]}…)"
    if not config["epochs"]:
        return f"from {weights}, taken as it is"
    samples = f" on {config['train_samples']:,} images" if config["train_samples"] else ""
    return f"from {weights}, {counted(config['epochs'], 'epoch')}{samples}, seed {config['seed']}"


def changed_predictions(record: Record) -> list[str]:
    """How many predictions on the held-out images pruning changed: a sentence, or none in an older record."""
    churn = record.get("churn")
    if not churn:
        return []
    return [
        f"The final network predicts another class than the original one on {churn['changed']:,} of the "
        f"{churn['images']:,} held-out test images ({churn['changed_percent']:.2f}%): "
        f"{churn['right_to_wrong']:,} right to wrong, {churn['wrong_to_right']:,} wrong to right, "
        f"{churn['wrong_to_other_wrong']:,} wrong to another wrong."
    ]


def robustness_means(record: Record) -> dict[str, float]:
    """The mean accuracy of each network over the corruptions of the held-out images, by stage."""
    rows = record["robustness"]["rows"][1:]  # the first is of the images as they are
    return {stage: sum(row[f"{stage}_percent"] for row in rows) / len(rows) for stage in STAGES}


def robustness_summary(record: Record) -> list[str]:
    """The accuracy on disturbed images: a sentence, or none where it was not measured."""
    if "robustness" not in record:
        return []
    means, robustness = robustness_means(record), record["robustness"]
    return [
        f"On {robustness['images']:,} held-out test images with {len(robustness['rows']) - 1} corruptions (noise, "
        f"blur, brightness, contrast, JPEG) the mean accuracy is {means['fine_tuned']:.2f}%, that of the original "
        f"network {means['original']:.2f}%."
    ]


def exported_as(export: Record) -> str:
    """The properties of an exported network."""
    return (
        f"opset {export['opset']}, {export['size_mib']:.2f} MB, "
        f"largest difference from PyTorch's outputs {export['largest_difference']:.1e}"
    )


def timing_lines(record: Record) -> list[str]:
    """How the times of networks were taken on a GPU: a sentence, or none."""
    original = record["models"]["original"]
    how, batch = original.get("latency_by"), original.get("throughput_batch", FULL_BATCH)
    return [f"Inference time: one image, {how}. Throughput: batches of {batch}, without a graph."] if how else []


def pruning_goal(record: Record) -> str:
    """What was to be removed, and in how many steps."""
    config, steps = record["config"], counted(len(record["pruning"]["steps"]), "step")
    if config["ratio"] != "auto":
        return f"{requested_shares(config)} to be removed, in {steps}"
    ends = []
    if config["accept_drop"] is not None:
        ends.append(
            f"before the accuracy on the calibration images fell by more than {counted_points(config['accept_drop'])}"
        )
    if config["speedup"] is not None:
        ends.append(f"at a speed-up of {config['speedup']:g} {speedup_of(config)}")
    return f"pruned in {steps}, to end {' or '.join(ends)}"


def speedup_of(config: Record) -> str:
    """What the speed-up is of that was to be reached."""
    return "in batches" if config["speedup_of"] == "batch" else "on single images"


def requested_shares(config: Record) -> str:
    """The shares that were to be removed."""
    parameters, macs = config["ratio"], config["macs_ratio"]
    if parameters == macs:
        return f"{100 * parameters:g}% of the parameters and of the FLOPs"
    shares = ((parameters, "parameters"), (macs, "FLOPs"))
    return " and ".join(f"{100 * share:g}% of the {name}" for share, name in shares if share is not None)


def repair_stages(pruning: Record) -> str:
    """The accuracy right after pruning, and after each part of the repair."""
    stages = [
        ("accuracy_raw_percent", "as cut"),
        ("accuracy_recalibrated_percent", "with batch norm recalibrated"),
        ("accuracy_reconstructed_percent", "with layers reconstructed"),
        ("accuracy_distilled_percent", "distilled from the original network"),
    ]
    return ", ".join(f"{pruning[key]:.2f}% {text}" for key, text in stages if key in pruning)


def in_unit(quantity: str, values: list[float]) -> tuple[str, list[str]]:
    """A unit in which the first of the values is not almost zero, and all of them in it, with two decimals."""
    unit, size = next((unit, size) for unit, size, least in _UNITS[quantity] if values[0] >= least)
    return unit, [f"{value / size:.2f}" for value in values]


def with_change(values: list[float]) -> list[str]:
    """Values of the networks, and the change from the first to the last, with two decimals."""
    change = round(values[-1] - values[0], 2) + 0.0  # never -0.00
    return [*(f"{value:.2f}" for value in values), f"{change:+.2f}"]


def interval_text(interval_points: list[float]) -> str:
    """For example "-0.50 to +0.25"."""
    low, high = interval_points
    return f"{low:+.2f} to {high:+.2f}"


def verdict_text(record: Record) -> str:
    """Whether the accepted drop of accuracy was kept, with the reason; empty where no drop was named beforehand."""
    if "verdict" not in record:
        return ""
    judged = record["verdict"]
    points = counted_points(judged["accept_drop_points"])
    shown = {
        "PASS": f"the held-out images show that the final network loses less than {points} of accuracy",
        "FAIL": f"the held-out images show that the final network loses more than {points} of accuracy",
        "NOT SHOWN": f"the held-out images leave open whether the final network loses more or less than {points} of "
        "accuracy",
    }[judged["result"]]
    interval = interval_text(judged["interval_points"])
    return f"Verdict: {judged['result']}, {shown} (95% interval of the difference: {interval} points)."


def counted_points(number: float) -> str:
    """For example "1 point" or "0.5 points"."""
    return "1 point" if number == 1 else f"{number:g} points"


def is_narrow(interval_points: list[float]) -> bool:
    """Whether an interval shows that accuracy was kept: no change of more than a point is in it."""
    return max(map(abs, interval_points)) <= 1


def speedup(models: Record, network: str = "fine_tuned") -> float:
    """How many times as fast as the original network a network is on single images, by their median times."""
    return models["original"]["latency_ms"]["p50"] / models[network]["latency_ms"]["p50"]


def counted(number: int, noun: str) -> str:
    """For example "1 epoch" or "30 epochs"."""
    return f"{number:,} {noun}{'' if number == 1 else 's'}"


def listed(names: list[str]) -> str:
    """For example "A, B and C"."""
    return " and ".join([", ".join(names[:-1]), names[-1]] if len(names) > 1 else names)


def row_text(values: list[str], widths: list[int]) -> str:
    """A row of a table: the first value to the left, the others to the right of their columns.

    A value that is too long for its column is broken into lines; all values end in the last line.
    """
    room = [widths[0], *(width - 1 for width in widths[1:])]
    cells = [textwrap.wrap(value, width) for value, width in zip(values, room)]
    height = max(1, *map(len, cells))
    cells = [[""] * (height - len(cell)) + cell for cell in cells]
    lines = [
        "".join(f"{text:{'>' if column else '<'}{widths[column]}}" for column, text in enumerate(line))
        for line in zip(*cells)
    ]
    return "\n".join(line.rstrip() for line in lines)


def table_text(rows: list[list[str]], widths: list[int]) -> list[str]:
    """A table whose first row is its heading."""
    heading, *lines = (row_text(row, widths) for row in rows)
    return [heading, "-" * WIDTH, *lines, "-" * WIDTH]
