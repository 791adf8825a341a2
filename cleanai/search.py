"""Pruning as far as the accuracy allows, or until the network is fast enough, in steps."""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace
from typing import Any

import torch_pruning as tp
from torch import nn

from cleanai import UserError
from cleanai.measure.latency import compare_speed
from cleanai.network.evaluation import evaluate
from cleanai.network.trial import copied
from cleanai.pruning.layers import compare_widths
from cleanai.pruning.planning import BudgetMissed
from cleanai.pruning.pruner import prune_to_budget
from cleanai.pruning.settings import PruneImages, PruneSettings
from cleanai.runtime import distributed
from cleanai.runtime.compute import Compute
from cleanai.runtime.progress import say

STEP = 0.05  # share of both costs that a step removes
FURTHEST = 0.9  # share of both costs; a network that cannot lose so much is pruned as far as possible
_ROUNDING = 1e-9  # 97 - 96 points may be a little more than 1


@dataclass(frozen=True)
class Limits:
    """What ends the pruning; None where there is no such limit.

    `accept_drop`: the accuracy on the calibration images may fall by so many points. `speedup`: a network that is so
    many times as fast is fast enough, on single images, or in batches where `speedup_of` is "batch".
    """

    accept_drop: float | None = None
    speedup: float | None = None
    speedup_of: str = "single"


def prune_to_limits(
    network: nn.Module,
    importance: tp.importance.Importance,
    images: PruneImages,
    compute: Compute,
    settings: PruneSettings,
    limits: Limits,
) -> tuple[nn.Module, dict[str, Any], nn.Module]:
    """Prune a copy of a network in steps of `STEP` of both costs, up to the last step within the limits.

    It is a part of the way to `FURTHEST`, see `prune_to_budget`. Of `settings`, the steps do not count, and of the two
    shares only which of them is None, that is, left free. The calibration images need labels.

    Returns the pruned copy, a report, and the copy that was not repaired. The report is that of `prune_to_budget`, with
    `path`: the original network and each step, with the removed shares, the accuracy on the calibration images, the
    speed-up where one is asked for, and whether the step was `taken`; and with `ended_by`: "accuracy", "speedup" or
    "furthest". Raises UserError when the first step is beyond the accepted drop, or when no step is fast enough.
    """
    search = _Search(copied(network), images, compute, limits)
    goal = FURTHEST
    while True:
        ratio, macs_ratio = (None if share is None else goal for share in (settings.ratio, settings.macs_ratio))
        fractions = [step * STEP / goal for step in range(1, round(goal / STEP))] + [1.0]
        stepwise = replace(settings, ratio=ratio, macs_ratio=macs_ratio, steps=fractions, nearest=True)
        try:
            report, _ = prune_to_budget(copied(network), importance, images, compute, stepwise, search.judge)
            break
        except BudgetMissed as error:
            # The nearest found bounds what can be removed of both costs alike: by their mean.
            near = [share for share in error.shares or () if share is not None]
            most = sum(near) / len(near) if near else goal
            goal = STEP * math.floor(min(most, goal - STEP) / STEP + _ROUNDING)
            if goal <= 0:
                raise
    return search.result(report)


@dataclass
class _Search:
    """The steps that were judged, and the networks of the last one within the limits."""

    original: nn.Module
    images: PruneImages
    compute: Compute
    limits: Limits
    path: list[dict[str, Any]] = field(default_factory=list)
    ended_by: str = "furthest"

    def __post_init__(self) -> None:
        self.path.append(
            {"accuracy_calibration_percent": distributed.agreed(self._accuracy(self.original)), "taken": True}
        )
        self.pruned = self.unrepaired = self.original

    def judge(self, step: int, pruned: nn.Module, unrepaired: nn.Module) -> bool:
        """Whether pruning ends here: after this step, or before it where it costs too much accuracy.

        The first step beyond the accepted drop ends it. A later one that is within it again would be so by chance.
        """
        limits = self.limits
        measured = {"accuracy_calibration_percent": self._accuracy(pruned)}
        if limits.speedup is not None:
            measured.update(self._speed(pruned, limits.speedup))
        measured = distributed.agreed(measured)  # processes take different times
        lost = self.path[0]["accuracy_calibration_percent"] - measured["accuracy_calibration_percent"]
        taken = limits.accept_drop is None or lost <= limits.accept_drop + _ROUNDING
        self.path.append({**measured, "taken": taken})
        speed = f", {measured['speedup']:.2f} times as fast" if "speedup" in measured else ""
        beyond = "" if taken else f"; more than {limits.accept_drop:g} lost, so this step is not taken"
        say(
            f"Step {step}: accuracy on the calibration images {measured['accuracy_calibration_percent']:.2f}% "
            f"({round(-lost, 2) + 0.0:+.2f} points){speed}{beyond}"
        )
        if not taken:
            self.ended_by = "accuracy"
            return True
        self.pruned, self.unrepaired = pruned, copied(unrepaired)
        if limits.speedup is not None and measured["speedup"] >= limits.speedup:
            self.ended_by = "speedup"
            return True
        return False

    def result(self, report: dict[str, Any]) -> tuple[nn.Module, dict[str, Any], nn.Module]:
        """What `prune_to_limits` returns, from the report on all steps."""
        for entry, step in zip(self.path, [{}, *report["steps"]]):
            for key in ("parameters_removed_percent", "macs_removed_percent"):
                entry[key] = step.get(key, 0.0)
        if not self.path[1]["taken"]:
            self._refuse_first_step()
        if self.limits.speedup is not None and self.ended_by == "furthest":
            self._refuse_slow()
        steps = report["steps"][: sum(entry["taken"] for entry in self.path) - 1]
        layers = compare_widths({layer["name"]: layer["channels_before"] for layer in report["layers"]}, self.pruned)
        report = {**report, "steps": steps, "layers": layers, "path": self.path, "ended_by": self.ended_by}
        return self.pruned, report, self.unrepaired

    def _speed(self, network: nn.Module, goal: float) -> dict[str, Any]:
        """How fast a network is. Where the goal seems reached, the slower of two timings: the machine may be busy."""
        timings: list[dict[str, Any]] = []
        while len(timings) < (2 if timings and timings[0]["speedup"] >= goal else 1):
            timings.append(
                compare_speed(self.original, network, self.images.calibration, self.compute, self.limits.speedup_of)
            )
        return min(timings, key=lambda timing: timing["speedup"])

    def _accuracy(self, network: nn.Module) -> float:
        return evaluate(network, self.images.calibration, self.compute, "Judging accuracy").accuracy_percent

    def _refuse_first_step(self) -> None:
        original, first = self.path
        lost = original["accuracy_calibration_percent"] - first["accuracy_calibration_percent"]
        raise UserError(
            f"The first step alone, {_shares(first)}, costs {lost:.2f} points of accuracy on the calibration images, "
            f"and {self.limits.accept_drop:g} may be lost: accept a larger drop, or calibrate on more images"
        )

    def _refuse_slow(self) -> None:
        best = max(self.path[1:], key=lambda entry: entry["speedup"])
        how = "in batches" if self.limits.speedup_of == "batch" else "on single images"
        raise UserError(
            f"No step makes the network {self.limits.speedup:g} times as fast {how} on this device: the best is "
            f"{best['speedup']:.2f} times, with {_shares(best)} removed. Ask for less"
        )


def _shares(entry: dict[str, Any]) -> str:
    return (
        f"{entry['parameters_removed_percent']:.1f}% of the parameters and {entry['macs_removed_percent']:.1f}% of the "
        "FLOPs"
    )
