"""The sweep: accuracy of a network after pruning at several ratios, by every criterion."""

from __future__ import annotations

import copy
from dataclasses import dataclass, field
from typing import Any, Callable, Sequence

import torch
import torch_pruning as tp
from torch import nn

from cleanai import UserError
from cleanai.data.images import ImageSet
from cleanai.measure.costs import count_macs, count_parameters
from cleanai.network.evaluation import evaluate
from cleanai.pruning.criteria import CRITERIA, OBSImportance
from cleanai.pruning.planning import BudgetMissed
from cleanai.pruning.pruner import prune_to_budget
from cleanai.pruning.settings import PruneImages, PruneSettings
from cleanai.runtime.compute import Compute
from cleanai.runtime.methods import METHODS
from cleanai.runtime.progress import progress_bar, say

# Baselines that use no calibration images.
BASELINES: dict[str, Callable[[], tp.importance.Importance]] = {
    "OBS": OBSImportance,
    "L2 magnitude": lambda: tp.importance.GroupMagnitudeImportance(p=2),
    "random choice": tp.importance.RandomImportance,
}

ROUND_TO = (8, 4, 2, 1)  # 8 is fine enough to meet every ratio of ResNet-18, not only the highest


def sweep_criteria() -> dict[str, Callable[[], tp.importance.Importance]]:
    """The criteria of a sweep by name: the methods, then the baselines."""
    return {**{method.title: CRITERIA[name] for name, method in METHODS.items()}, **BASELINES}


def measure_network(network: nn.Module, test: ImageSet, compute: Compute) -> dict[str, Any]:
    """Accuracy on `test` in percent, parameters, and multiply-accumulates for one image."""
    accuracy = evaluate(network, test, compute).accuracy_percent
    return {"accuracy_percent": accuracy, **_costs(network, test)}


@dataclass
class Sweep:
    """Prunes a network by each criterion to each of the rising `ratios`, of parameters and multiply-accumulates alike.

    Each criterion prunes one copy of the network, one step of `prune_to_budget` per ratio. With `fine_tune` a copy of
    the pruned network is trained by it, in place, and measured instead. `save` gets all points after each new one.
    `points` are those of an interrupted sweep. They are not measured again if the network costs the same; the pruning
    itself is repeated from the first ratio of an unfinished criterion.
    """

    network: nn.Module
    ratios: Sequence[float]
    images: PruneImages
    test: ImageSet
    compute: Compute
    seed: int = 0
    fine_tune: Callable[[nn.Module], None] | None = None
    save: Callable[[list[dict[str, Any]]], None] = lambda points: None
    points: list[dict[str, Any]] = field(default_factory=list)
    round_to: Sequence[int] = ROUND_TO

    def run(self) -> list[dict[str, Any]]:
        """Measure all points: each with its `criterion`, `ratio`, accuracy and costs.

        Raises UserError when the highest ratio cannot be met.
        """
        criteria = sweep_criteria()
        known = {(point["criterion"], point["ratio"]): point for point in self.points}
        with progress_bar("Sweep", "network", len(criteria) * len(self.ratios), initial=len(known)) as bar:
            for name, make_importance in criteria.items():
                if not all((name, ratio) in known for ratio in self.ratios):
                    say(f"{name}:")
                    self._prune(name, make_importance(), known, bar.update)
        return [known[name, ratio] for name in criteria for ratio in self.ratios]

    def _prune(
        self,
        name: str,
        importance: tp.importance.Importance,
        known: dict[tuple[str, float], dict[str, Any]],
        advance: Callable[[], Any],
    ) -> None:
        def measure(step: int, pruned: nn.Module, _: nn.Module) -> None:
            key = name, self.ratios[step - 1]
            earlier = known.get(key)
            if earlier and _costs(pruned, self.test).items() <= earlier.items():
                return
            known[key] = {"criterion": name, "ratio": key[1], **self._measure(pruned)}
            self.save(list(known.values()))
            say(f"{name}, {100 * key[1]:g}% removed: accuracy {known[key]['accuracy_percent']:.2f}%")
            if not earlier:
                advance()

        torch.manual_seed(self.seed)
        highest = self.ratios[-1]
        steps = [ratio / highest for ratio in self.ratios]
        settings = PruneSettings(highest, highest, steps, self.round_to, nearest=True)
        try:
            prune_to_budget(copy.deepcopy(self.network), importance, self.images, self.compute, settings, measure)
        except BudgetMissed as error:
            raise UserError(
                f"A ratio of {highest:g} cannot be met in this network by {name}: the nearest is {error.nearest}. "
                "Ask for less"
            ) from error

    def _measure(self, pruned: nn.Module) -> dict[str, Any]:
        if self.fine_tune:
            pruned = copy.deepcopy(pruned)
            with torch.random.fork_rng(devices=[]):  # random choice must draw the same numbers with and without
                torch.manual_seed(self.seed)
                self.fine_tune(pruned)
        return measure_network(pruned, self.test, self.compute)


def _costs(network: nn.Module, images: ImageSet) -> dict[str, int]:
    example = next(images.batches(1))[0]
    return {"parameters": count_parameters(network)["parameters"], "macs": count_macs(network, example)}
