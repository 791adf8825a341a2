"""The sections of a report on layers: their widths and costs, and what each would lose."""

from __future__ import annotations

from typing import Any

from reportlab.platypus import Spacer

from cleanai.report.charts import layers_chart, small_charts
from cleanai.report.page import text
from cleanai.report.wording import Record

_MOST_GROUPS = 40  # with a chart of their sensitivity


def layers(record: Record) -> list[Any]:
    """The layers' widths and costs. Both parts of a record name the layers alike."""
    widths = record["pruning"]["layers"]
    names = [layer["name"] for layer in widths]
    panels = {"Output channels": _before_and_after(widths, "channels", 1)}
    costs = record["layers"]
    panels["Parameters (thousands)"] = _before_and_after(costs, "parameters", 1e3)
    panels["FLOPs for one image (millions)"] = _before_and_after(costs, "macs", 1e6)
    most = " ".join(
        f"Most of the {what} were removed from {_most_removed(record, key)}."
        for key, what in (("parameters", "parameters"), ("macs", "FLOPs"))
    )
    return [layers_chart(names, panels), text(f"{most} Batch norm and pooling are not shown.")]


def sensitivity(record: Record) -> list[Any]:
    """What each group of layers loses without some of its channels, and what was removed."""
    widths = {layer["name"]: layer for layer in record["pruning"]["layers"]}
    groups = record["pruning"]["sensitivity"]
    limit = sorted((group["lost_percent"][4] for group in groups), reverse=True)[:_MOST_GROUPS][-1]
    charts = []
    for group in [group for group in groups if group["lost_percent"][4] >= limit][:_MOST_GROUPS]:
        first, others = group["layers"][0], len(group["layers"]) - 1
        removed = 100 * (1 - widths[first]["channels_after"] / widths[first]["channels_before"])
        points = [(0.0, 0.0), *((10.0 * tenth, lost) for tenth, lost in enumerate(group["lost_percent"], 1))]
        charts.append((f"{first}{f' and {others} more' if others else ''} ({group['channels']})", points, removed))
    some = f" The {len(charts)} of {len(groups)} groups that lose most." if len(charts) < len(groups) else ""
    return [
        text(
            "Across: removed channels of a layer, in percent; in brackets the number it had. Upwards: how much of the "
            "outputs of the layers that read them is lost, in percent, when the channels with the lowest scores are "
            "removed and the rest is reconstructed. Measured on the original network, before the first step. Layers "
            f"that share channels are one chart. The dashed line is what was removed in all.{some}"
        ),
        Spacer(1, 4),
        *small_charts(charts),
    ]


def _before_and_after(layers: list[Record], key: str, unit: float) -> dict[str, list[float]]:
    return {when: [layer[f"{key}_{when.lower()}"] / unit for layer in layers] for when in ("Before", "After")}


def _most_removed(record: Record, key: str) -> str:
    """The three layers that lost most, each with its share of the total."""
    removed = {layer["name"]: layer[f"{key}_before"] - layer[f"{key}_after"] for layer in record["layers"]}
    total = record["models"]["original"][key] - record["models"]["fine_tuned"][key] or 1  # a tiny ratio removes nothing
    most = sorted(removed, key=lambda name: -removed[name])[:3]
    return ", ".join(f"{name} ({100 * removed[name] / total:.0f}%)" for name in most)
