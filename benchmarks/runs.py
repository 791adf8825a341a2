"""The committed runs of the pruning scripts: one table of all, and what they answer to a sceptic."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Sequence

import repair
from criteria import means
from rows import mean_and_spread

from cleanai.measure.significance import compare_paired
from cleanai.report.comparison import heldout_flags
from cleanai.report.wording import Record, counted, listed, method_title, row_text, speedup
from cleanai.runtime.methods import METHODS

_WIDTHS = [18, 16, 9, 8, 8, 8, 8, 10, 8, 11, 7]
_HEADING = ["Run", "Method", "Removed", "Epochs", "Images", "Rate", "Distil", "Original", "Pruned", "Fine-tuned", "p"]
_Rows = Sequence[dict]
_SHARES = (50.0, 70.0)  # percent removed, of criteria compared


def load_runs(folder: Path) -> dict[str, Record]:
    """The records of the pruning scripts in the folders of `folder`, by the folder's name and the method."""
    paths = (path for method in METHODS for path in folder.glob(f"*/TS1_{method}_*.json"))
    return {f"{path.parent.name} {path.stem}": json.loads(path.read_text(encoding="utf-8")) for path in sorted(paths)}


def table(runs: dict[str, Record]) -> str:
    """Of each run what was removed, held-out accuracy before, and its change after pruning and after fine-tuning."""
    lines = [row_text(_HEADING, _WIDTHS)]
    for name, run in runs.items():
        flags, trained = heldout_flags(run), run["config"]["epochs"] > 0
        changes = [compare_paired(flags["original"], flags[stage]) for stage in ("pruned", "fine_tuned")]
        values = [
            name.split()[0],
            method_title(run["method"]),
            f"{run['summary']['parameter_reduction_percent']:.1f}%",
            *([str(run["config"]["epochs"]), f"{run['dataset']['train_images']:,}"] if trained else ["0", ""]),
            *([str(run["config"][name]) for name in ("lr", "distil")] if trained else ["", ""]),
            f"{run['models']['original']['accuracy_heldout_percent']:.2f}",
            f"{changes[0]['difference_points']:+.2f}",
            f"{changes[1]['difference_points']:+.2f}" if trained else "",
            f"{changes[1]['p_value']:.3f}",
        ]
        lines.append(row_text(values, _WIDTHS))
    return "\n".join(lines)


def answers(runs: dict[str, Record], sweep: Record, of: dict[str, _Rows], latency: Record) -> list[str]:
    """A Markdown list of what a sceptic asks, answered by the figures of the page.

    `of` has the rows of the benchmarks "repair", "criteria" and "controls", none where one has not been run.
    """
    return [
        by_chance(sweep, of["criteria"]),
        by_repair(of["repair"]),
        by_epochs(runs, of["controls"]),
        faster(runs, latency),
        how_sure(runs),
    ]


def by_chance(sweep: Record, criteria: _Rows) -> str:
    """What the methods lose, and what random choice loses: with several seeds, or in the one run of the sweep."""
    original = sweep["original"]["accuracy_percent"]
    lost = {
        (point["criterion"], 100 * point["ratio"]): f"{original - point['accuracy_percent']:.2f}"
        for point in sweep["points"]
    }
    shares, how = _SHARES[:1], "one run each"
    if criteria:
        lost, shares = {}, _SHARES
        for name in dict.fromkeys(row["criterion"] for row in criteria):
            for share, percents in means(criteria, name, "reconstructed").items():
                losses = [float(criteria[0]["original_percent"]) - percent for percent in percents]
                lost[name, share] = mean_and_spread(losses, 2)
        how = f"{len(means(criteria, 'random', 'reconstructed')[shares[0]])} seeds, standard deviation in brackets"
    names = dict.fromkeys(name for name, _ in lost)
    shown = [f"{' and '.join(lost[name, share] for share in shares)} points by {name}" for name in names]
    return (
        "- **Do the methods choose better than chance?** With "
        f"{' and '.join(f'{share:.0f}%' for share in shares)} of the parameters and of the FLOPs removed, the same "
        f"repair and no fine-tuning, the network lost {', '.join(shown)} ({how})."
    )


def by_repair(rows: _Rows, removed_percent: int = 50) -> str:
    """What each part of the repair leaves lost, of ResNet-18."""
    chosen = [
        row
        for row in rows
        if (row["network"], row["criterion"], row["removed_percent"]) == ("ResNet-18", "WANDA", str(removed_percent))
    ]
    lost = repair.points_lost(chosen)
    shown = (
        f"{lost['raw']} as cut, {lost['recalibrated']} with batch norm recalibrated, {lost['reconstructed']} with "
        "layers reconstructed"
    )
    return (
        f"- **What does the repair bring?** WANDA removed {removed_percent}% of the parameters and of the FLOPs of "
        f"ResNet-18, without fine-tuning. Points lost: {shown} ({len(chosen)} seeds, standard deviation in brackets)."
    )


def by_epochs(runs: dict[str, Record], controls: _Rows) -> str:
    """How fine-tuning changed the held-out accuracy of pruned networks, and of the original one."""
    gains: dict[str, list[float]] = {}
    for run in runs.values():
        config, models = run["config"], run["models"]
        if config["epochs"]:
            how = f"{counted(config['epochs'], 'epoch')} of {run['dataset']['train_images']:,} images, peak rate "
            how += f"{config['lr']}, {'distilled' if config['distil'] == 1 else 'with labels'}"
            how += f" and distilled, weight {config['distil']}" if 0 < config["distil"] < 1 else ""
            gain = models["fine_tuned"]["accuracy_heldout_percent"] - models["pruned"]["accuracy_heldout_percent"]
            gains.setdefault(how, []).append(gain)
    changed = "; ".join(
        f"{how}: {spanned(values, '+.2f')} points ({counted(len(values), 'run')})" for how, values in gains.items()
    )
    text = f"- **What do the epochs bring?** Fine-tuning changed the held-out accuracy of pruned networks. {changed}."
    dense = {row["trained"]: row["heldout_percent"] for row in controls if row["network"] == "Not pruned"}
    if dense:
        before, after = dense.values()
        text += f" The network that was not pruned went from {before}% to {after}% by the same training."
    return text


def faster(runs: dict[str, Record], latency: Record) -> str:
    """The speed-ups of the runs, and where a pruned network is slower."""
    single = [speedup(run["models"]) for run in runs.values()]
    models = [run["models"] for run in runs.values()]
    batch = [m["fine_tuned"]["throughput_images_per_s"] / m["original"]["throughput_images_per_s"] for m in models]
    removed = [run["summary"]["macs_reduction_percent"] for run in runs.values()]
    slower = [
        f"{name} in {precision} ({timed['original']['latency_ms']['p50'] / one['latency_ms']['p50']:.2f}x)"
        for precision, timed in latency["precisions"].items()
        for name, one in timed.items()
        if name.startswith("multiples") and one["latency_ms"]["p50"] > timed["original"]["latency_ms"]["p50"]
    ]
    text = (
        f"- **Is the pruned network faster?** With {spanned(removed, '.0f')}% of the FLOPs removed, single images were "
        f"{spanned(single, '.2f')} times as fast and batches {spanned(batch, '.2f')} times, in float32."
    )
    if slower:
        text += f" Not always: on {latency['environment']['device']} single images were slower at {listed(slower)}."
    return text


def how_sure(runs: dict[str, Record]) -> str:
    """How wide the intervals are, and what they do not cover."""
    half_widths, images = [], []
    for run in runs.values():
        flags = heldout_flags(run)
        low, high = compare_paired(flags["original"], flags["fine_tuned"])["interval_points"]
        half_widths.append((high - low) / 2)
        images.append(len(flags["original"]))
    seeds = sorted({run["config"]["seed"] for run in runs.values()})
    used = f"seed {seeds[0]}" if len(seeds) == 1 else f"the seeds {listed([str(seed) for seed in seeds])}"
    return (
        f"- **How sure is it?** On {min(images):,} held-out images the 95% interval of a change reaches "
        f"{spanned(half_widths, '.1f')} points to either side. It covers the choice of the test images, not that of "
        f"the seed. The runs of the scripts used {used}."
    )


def spanned(values: list[float], form: str) -> str:
    """For example "1.2 to 1.5"; one number when both would read the same."""
    low, high = (format(value, form) for value in (min(values), max(values)))
    return low if low == high else f"{low} to {high}"
