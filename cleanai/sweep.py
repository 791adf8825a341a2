"""How far a network can be pruned: its accuracy at several ratios, by several criteria."""
from __future__ import annotations

import copy
from typing import Any, Callable, Sequence

import torch
import torch_pruning as tp
from torch import nn

from cleanai import UserError
from cleanai.data.images import ImageSet
from cleanai.measure.costs import count_macs, count_parameters
from cleanai.network.evaluation import evaluate
from cleanai.pruning.criteria import NeuronCoverageImportance, WandaImportance
from cleanai.pruning.pruner import BudgetMissed, prune_to_budget
from cleanai.runtime.compute import Compute
from cleanai.runtime.progress import one_bar, say

# The two methods, and two that no calibration image has a part in.
CRITERIA: dict[str, Callable[[], tp.importance.Importance]] = {
    "Neuron Coverage": NeuronCoverageImportance,
    "WANDA": WandaImportance,
    "L2 magnitude": lambda: tp.importance.GroupMagnitudeImportance(p=2),
    "random choice": tp.importance.RandomImportance,
}

ROUND_TO = (8,)  # fine enough to meet every ratio, and not the highest alone


def measure_network(network: nn.Module, test: ImageSet, compute: Compute) -> dict[str, Any]:
    """Accuracy on `test` in percent, parameters, and multiply-accumulates for one image."""
    accuracy = evaluate(network, test, compute).accuracy_percent
    return {"accuracy_percent": accuracy, **_costs(network, test)}


def measure_sweep(
    network: nn.Module,
    ratios: Sequence[float],
    calibration: ImageSet,
    repair_on: ImageSet,
    test: ImageSet,
    compute: Compute,
    batch_size: int,
    seed: int,
    known: Sequence[dict[str, Any]],
    keep: Callable[[list[dict[str, Any]]], None],
    fine_tune: Callable[[nn.Module], None] | None = None,
) -> list[dict[str, Any]]:
    """Prune a network by each of CRITERIA to each of `ratios`: `criterion`, `ratio` and measures of every point.

    A criterion cuts one copy of the network from ratio to ratio, a step of `prune_to_budget` each; a ratio is a share
    of the parameters and, alike, of the multiply-accumulates, and `ratios` rise. With `fine_tune` a copy of what was
    cut is trained by it, in place, and measured instead.

    `keep` is given all points after each new one. Of the `known` points of an interrupted sweep those are not measured
    again whose network costs what it did then; the networks are cut again, from the first ratio of a criterion that
    was not finished. Raises UserError when the highest ratio cannot be met.
    """
    points = {(point["criterion"], point["ratio"]): point for point in known}

    def prune(name: str) -> None:
        def measure(step: int, pruned: nn.Module, _: nn.Module) -> None:
            key = name, ratios[step - 1]
            before = points.get(key)
            if before and _costs(pruned, test).items() <= before.items():
                return
            if fine_tune:
                pruned = copy.deepcopy(pruned)
                with torch.random.fork_rng(devices=[]):  # a random choice draws what it draws without
                    torch.manual_seed(seed)
                    fine_tune(pruned)
            points[key] = {"criterion": name, "ratio": ratios[step - 1], **measure_network(pruned, test, compute)}
            keep(list(points.values()))
            say(f"{name}, {100 * ratios[step - 1]:g}% removed: accuracy {points[key]['accuracy_percent']:.2f}%")
            if not before:
                tick()

        torch.manual_seed(seed)
        steps = [ratio / ratios[-1] for ratio in ratios]
        try:
            prune_to_budget(
                copy.deepcopy(network),
                CRITERIA[name](),
                calibration,
                repair_on,
                compute,
                parameters_ratio=ratios[-1],
                macs_ratio=ratios[-1],
                steps=steps,
                batch_size=batch_size,
                round_to=ROUND_TO,
                after_step=measure,
            )
        except BudgetMissed as error:
            raise UserError(
                f"--ratios {ratios[-1]:g} cannot be met in this network by {name}: the nearest is {error.nearest}. "
                "Ask for less"
            ) from error

    with one_bar("Sweep", "network", total=len(CRITERIA) * len(ratios), done=len(points)) as tick:
        for name in CRITERIA:
            if not all((name, ratio) in points for ratio in ratios):
                say(f"{name}:")
                prune(name)
    return [points[name, ratio] for name in CRITERIA for ratio in ratios]


def _costs(network: nn.Module, images: ImageSet) -> dict[str, int]:
    example = next(images.batches(1))[0]
    return {"parameters": count_parameters(network)["parameters"], "macs": count_macs(network, example)}
