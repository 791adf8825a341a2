"""What a reader must know beside the numbers of a pruning script: sentences, made from its record alone."""

from __future__ import annotations

from cleanai.measure.significance import LEVEL, compare_paired, heldout_flags, verdict
from cleanai.report.wording import FULL_BATCH, Record, counted_points, speedup_of

BUSY_PERCENT = 15  # a larger spread between the turns of a timing
_FEW_CALLS = 30


def notes(record: Record) -> list[str]:
    """The notes on a pruning script's record; an older record may lack what some of them are about."""
    untrained = [] if record["config"]["epochs"] else ["The final network is the pruned one: it was not fine-tuned."]
    return [*untrained, *_not_reached(record), *_worse_after_fine_tuning(record), *_busy(record), *_bounded(record)]


def path_end(record: Record) -> str:
    """Why a pruning that went on up to a limit ended where it did."""
    config, ended_by = record["config"], record["pruning"]["ended_by"]
    if ended_by == "speedup":
        return f"The pruning ended when it reached a speed-up of {config['speedup']:g} {speedup_of(config)}."
    if ended_by == "accuracy":
        return (
            "The pruning ended because the next step lost more than "
            f"{counted_points(config['accept_drop'])} of accuracy on the calibration images."
        )
    return "The pruning ended because the network cannot be pruned much further."


def _not_reached(record: Record) -> list[str]:
    """That the accuracy ended a pruning that was to reach a speed-up."""
    config, pruning = record["config"], record["pruning"]
    if config.get("speedup") is None or pruning["ended_by"] == "speedup":
        return []
    reached = pruning["path"][len(pruning["steps"])]["speedup"]
    return [
        f"A speed-up of {config['speedup']:g} {speedup_of(config)} was not reached: {reached:.2f} is that of the last "
        f"step that lost no more than {counted_points(config['accept_drop'])} on the calibration images."
    ]


def _worse_after_fine_tuning(record: Record) -> list[str]:
    before, after = (record["models"][name]["accuracy_heldout_percent"] for name in ("pruned", "fine_tuned"))
    if after >= before or not record["config"]["epochs"]:
        return []
    flags = heldout_flags(record)
    tested = compare_paired(flags["pruned"], flags["fine_tuned"])
    file = list(record["checkpoints"])[1]  # original, pruned, fine-tuned
    change = "made the pruned network worse" if tested["p_value"] < LEVEL else "did not improve the pruned network"
    return [
        f"Fine-tuning {change}: held-out accuracy {before:.2f}% before it, {after:.2f}% after it, "
        f"{verdict(tested['p_value'])}. The network before it is {file}, in the same folder as the final one. Try a "
        "lower --lr, or other --epochs."
    ]


def _busy(record: Record) -> list[str]:
    models = record["models"].values()
    singles = [model["latency_ms"].get("spread_percent", 0) for model in models]
    batches = [model.get("throughput_spread_percent", 0) for model in models]
    exported = record.get("export", {}).get("latency_ms", {}).values()
    beside = [latency.get("spread_percent", 0) for runtime in exported for latency in runtime.values()]
    kinds = {"single images": max(singles), "batches": max(batches), "exported networks": max(beside, default=0)}
    busy = [f"{spread:.0f}% ({kind})" for kind, spread in kinds.items() if spread > BUSY_PERCENT]
    if not busy:
        return []
    return [f"The machine was busy: times vary by {', '.join(busy)} between turns. Read the times with care."]


def _bounded(record: Record) -> list[str]:
    original = record["models"]["original"]
    calls, batch = original["latency_ms"]["n"], original.get("throughput_batch", FULL_BATCH)
    few = [f"inference times are from only {calls} calls of each network"] if calls < _FEW_CALLS else []
    small = [f"throughput is in batches of {batch} images, not {FULL_BATCH}"] if batch < FULL_BATCH else []
    if not few + small:
        return []
    return [f"To keep the timing short, {' and '.join(few + small)}. A higher --timing-seconds allows more."]
