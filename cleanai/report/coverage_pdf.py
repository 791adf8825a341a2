"""The sections on test coverage in a pruning script's PDF."""

from __future__ import annotations

from typing import Any

from reportlab.platypus import Spacer

from cleanai.report.charts import layers_chart
from cleanai.report.drawing import WIDTH
from cleanai.report.page import table, text
from cleanai.report.wording import STAGES, Record, calibrated_on_train, counted, with_change

_CRITERIA = {
    "kmnc": "KMNC: sections of ranges reached",
    "nbc": "NBC: range boundaries exceeded",
    "snac": "SNAC: upper boundaries exceeded",
    "tknc": "TKNC: neurons among a layer's top 3",
    "scc": "SCC: neurons with both signs",
}


def coverage(record: Record) -> list[Any]:
    """The content of the section on test coverage: its criteria, of each network."""
    measured = record["coverage"]
    covered = "held-out test images" if calibrated_on_train(record) else "calibration images"
    models = [measured["models"][name] for name in STAGES]
    rows = [["Coverage (%)", *STAGES.values(), "Change (points)"]]
    rows += [[label, *with_change(values)] for label, values in _coverage_values(models, measured["threshold"])]
    rows.append(["Neurons", *(f"{model['neurons']:,}" for model in models), ""])
    if all("dead" in model for model in models):
        rows.append(["Dead channels", *(f"{sum(each['count'] for each in model['dead']):,}" for model in models), ""])
    return [
        text(
            "How thoroughly the test images exercise each network; this does not measure its quality. Where coverage "
            "has not fallen, these images test the pruned network as thoroughly as the original one."
        ),
        Spacer(1, 4),
        table(rows, [WIDTH * share for share in (0.4, 0.15, 0.15, 0.16, 0.14)]),
        text(
            f"Measured on {measured['images']:,} of the {covered}. A neuron is one channel of a layer's "
            "output; its value for an image is the mean over all positions. For NC the layer's "
            "values are scaled to [0, 1], image by image. Ranges are from "
            f"{measured['profile_images']:,} training images, in 1,000 sections. TKNC rises by itself when layers get "
            f"narrower.{_dead_channels(models[-1])}"
        ),
    ]


def layer_coverage(record: Record) -> list[Any]:
    """The content of the section on the test coverage of each layer."""
    hidden = [record["coverage"]["models"][name]["layers"][:-1] for name in STAGES]  # the last one's are the classes
    panels = {
        title: {name: [layer[key] for layer in layers] for name, layers in zip(STAGES.values(), hidden)}
        for title, key in (
            ("Active channels, mean over images and positions (%)", "active_percent"),
            ("Mean normalised coverage (%)", "normalized_mean_percent"),
        )
    }
    return [
        layers_chart([layer["name"] for layer in hidden[0]], panels),
        text(
            "A channel is active above zero; its normalised coverage is its mean absolute value over the largest one "
            "in the layer. An output is named after the first layer that reads it."
        ),
    ]


def _coverage_values(models: list[Record], threshold: float) -> list[tuple[str, list[float]]]:
    """The criteria of coverage, each with its values of the networks. An older record lacks some of them."""
    by_threshold = [
        model.get("nc_by_threshold", [{"threshold": threshold, "percent": model["nc_percent"]}]) for model in models
    ]
    values = [
        (f"NC: neurons above {first['threshold']:g} on some image", [each["percent"] for each in (first, *others)])
        for first, *others in zip(*by_threshold)
    ]
    keys = [key for key in _CRITERIA if f"{key}_percent" in models[0]]
    return [*values, *((_CRITERIA[key], [model[f"{key}_percent"] for model in models]) for key in keys)]


def _dead_channels(model: Record) -> str:
    """The dead channels of the final network by layer."""
    dead = [
        f"{each['layer']} {', '.join(map(str, each.get('channels', []))) or counted(each['count'], 'channel')}"
        for each in model.get("dead", [])
    ]
    if not dead:
        return ""
    return f" A channel is dead when it is zero on all these images; in the final network: {'; '.join(dead)}."
