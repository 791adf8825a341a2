"""A step of the pruning: the channels that it removes, and the repair of those that stay."""

from __future__ import annotations

from typing import Any

import torch
import torch_pruning as tp
from torch import nn

from cleanai import UserError
from cleanai.network.activations import record_statistics
from cleanai.network.trial import copied
from cleanai.pruning.criteria import ActivationImportance, OBSImportance
from cleanai.pruning.groups import Group, find_groups, sound_groups
from cleanai.pruning.layers import find_layers, layer_widths
from cleanai.pruning.least_squares import gram_matrix
from cleanai.pruning.losses import group_losses, losses_of_cuts, sensitivity_of
from cleanai.pruning.planning import make_plan
from cleanai.pruning.refit import OriginalOutputs, original_outputs, refit
from cleanai.pruning.repair import Targets, recalibrate, reconstruct_in_order
from cleanai.pruning.rows import convolved, record_rows
from cleanai.pruning.settings import PruneImages, PruneSettings
from cleanai.pruning.tracing import prepared, refused, require_working
from cleanai.pruning.widths import Budget, Costs, allowed_cuts, choose_cuts, least_width
from cleanai.runtime import distributed
from cleanai.runtime.compute import Compute
from cleanai.runtime.files import one_line
from cleanai.runtime.memory import is_shortage

STEP_IMAGES = 1024  # of those for the repair, in each step


class Pruning:
    """The state of `prune_to_budget` between its steps."""

    def __init__(
        self,
        network: nn.Module,
        importance: tp.importance.Importance,
        images: PruneImages,
        compute: Compute,
        settings: PruneSettings,
    ) -> None:
        self.network, self.importance, self.images = network, importance, images
        self.compute, self.settings = compute, settings
        self.original: nn.Module
        self.targets: OriginalOutputs | None = None  # of the original network, for the end of the repair
        self.unrepaired: nn.Module
        if not (len(images.calibration) and len(images.repair)):
            raise UserError("Pruning needs at least one image for calibration, and one for the repair")
        self.example, two = (next(images.calibration.batches(count))[0] for count in (1, 2))
        require_working(network, two)
        self._require_repairable()
        self.sound = sound_groups(network, two)
        _, groups = self._groups(network)
        costs = Costs(network, groups, self.example)
        self.before = costs.now
        self.least = {group.name: least_width(group) for group in groups}
        kept = find_layers(network, settings.keep_layers)
        names = {layer: name for name, layer in network.named_modules()}
        for group in groups:
            if any(names[layer] in kept for layer in group.producers):
                self.least[group.name] = group.channels
        self.plan = make_plan(groups, costs, self.least, settings)
        self.remaining = _by_name(groups, self.plan.removed)  # channels that each group still loses, by the last plan
        self.step_images = images.repair.select(torch.arange(min(STEP_IMAGES, len(images.repair))))
        self.kept = {name: torch.arange(width) for name, width in layer_widths(network).items()}  # original outputs
        # The rows of the last repair, which a step starts from.
        self.rows: tuple[dict[nn.Module, torch.Tensor], dict[nn.Module, torch.Tensor]] = {}, {}
        self.sensitivity: list[dict[str, Any]] = []  # of the groups, before the first step

    def requested(self, fraction: float) -> list[float | None]:
        """The shares of both costs to remove after this fraction of the way."""
        return [None if share is None else share * fraction for share in self.plan.shares]

    def prepare(self) -> None:
        """Recalibrate batch norm before the first step: its statistics may come from other images."""
        if self.settings.repair == "full":
            spreads = _spreads(self._groups(self.network)[1])
            title = "Recalibrating batch norm"
            self.rows = reconstruct_in_order(self.network, Targets(), spreads, self.step_images, self.compute, title)

    def step(self, title: str, fraction: float) -> list[float]:
        """Prune up to a fraction of the way; return the shares of both costs that are removed then."""
        graph, groups = self._groups(self.network)
        costs = Costs(self.network, groups, self.example)
        targets = self._record(groups, title)
        grams = {layer: gram_matrix(rows) for layer, rows in targets.inputs.items()}
        if isinstance(self.importance, OBSImportance):
            self.importance.groups, self.importance.grams = groups, grams
        orders = [self._scores(group).reshape(-1, group.units).sum(0).argsort(stable=True) for group in groups]
        losses = [group_losses(group, order, grams) for group, order in zip(groups, orders)]
        self.sensitivity = self.sensitivity or sensitivity_of(self.network, groups, losses)
        removed = self._choose(groups, costs, losses, fraction)
        units = {
            group.name: order[: int(count) * group.units // group.channels].tolist()
            for group, order, count in zip(groups, orders, removed)
        }
        # Rounding must not lead processes to different networks.
        self.remaining, units = distributed.agreed((self.remaining, units))
        if self.settings.repair == "full":
            targets.removed = _removed_inputs(groups, units)
            self.rows = reconstruct_in_order(
                self.network, targets, _spreads(groups), self.step_images, self.compute, f"{title}, reconstructing"
            )
        self._cut(graph, groups, units, title)
        return (1 - Costs(self.network, [], self.example).now / self.before).tolist()

    def finish(self, network: nn.Module, last: bool) -> None:
        """The last part of the repair, of a network as if its present step were the last, which it may be."""
        if self.settings.repair == "full":
            with prepared(network), prepared(self.original):
                images, compute = self.images.repair, self.compute
                targets = self.targets or original_outputs(self.original, images, compute)
                self.targets = None if last else targets.copied()
                refit(network, targets, self.kept, images, compute, "Refitting to the original network")
            distributed.agree_on(network)
            self.compute.synchronize()

    def _record(self, groups: list[Group], title: str) -> Targets:
        """Score statistics for the importance, and the rows before this step."""
        if isinstance(self.importance, ActivationImportance):
            self.importance.statistics = record_statistics(
                self.network, self.images.calibration, self.compute, f"{title}, scoring", self.importance.moments
            )
        spreads = _spreads(groups)
        inputs, windows = self.rows
        if spreads.keys() <= inputs.keys():
            outputs = {layer: convolved(layer, windows.pop(layer)) for layer in list(windows)}
        else:  # without a full repair, or where a layer runs more than once
            inputs, outputs = record_rows(self.network, spreads, self.step_images, self.compute, f"{title}, rows")
        return Targets({layer: inputs[layer] for layer in spreads}, outputs)

    def _scores(self, group: Group) -> torch.Tensor:
        """The scores (C,) of a group's channels. UserError when an importance of torch_pruning has none for it."""
        scores = self.importance(group.item)
        if scores is None or scores.shape != (group.channels,):
            name = type(self.importance).__name__
            raise UserError(f"{name} gives no scores for the channels of {group.name}: use another criterion")
        return scores.cpu()

    def _choose(self, groups: list[Group], costs: Costs, losses: list[torch.Tensor], fraction: float) -> torch.Tensor:
        """The number of channels (G,) that each group loses in this step.

        The whole way is planned again in every step, and no step goes beyond the plan, so that the goal stays in reach.
        """
        cuts = [allowed_cuts(group, self.least[group.name], self.plan.multiple) for group in groups]
        known = torch.tensor([self.remaining[group.name] for group in groups])
        removed = planned = choose_cuts(costs, cuts, losses_of_cuts(losses, cuts, groups), self.plan.goal, known)
        if fraction < 1:
            cuts = [cut[: cut.index(int(most)) + 1] for cut, most in zip(cuts, planned)]
            budget = Budget.removing(self.before, *self.requested(fraction))
            removed = choose_cuts(costs, cuts, losses_of_cuts(losses, cuts, groups), budget)
        self.remaining = _by_name(groups, planned - removed)
        return removed

    def _cut(self, graph: tp.DependencyGraph, groups: list[Group], units: dict[str, list[int]], title: str) -> None:
        self._note_kept(groups, units)
        for of_graph, of_groups in ((graph, groups), self._groups(self.unrepaired)):
            for group in of_groups:
                if units[group.name]:
                    group.remove(of_graph, units[group.name])
        for network in (self.network, self.unrepaired):
            for weight in network.parameters():  # cutting loses the channels-last order of the weights
                if weight.ndim == 4:
                    weight.data = weight.data.contiguous(memory_format=self.compute.memory_format)
        if self.settings.repair == "bn":
            recalibrate(
                self.network, self.images.repair, self.compute, self.settings.batch_size, f"{title}, recalibrating"
            )
        distributed.agree_on(self.network)
        self.compute.synchronize()

    def _note_kept(self, groups: list[Group], units: dict[str, list[int]]) -> None:
        names = {layer: name for name, layer in self.network.named_modules() if name in self.kept}
        removed = {layer: torch.zeros(len(self.kept[name]), dtype=torch.bool) for layer, name in names.items()}
        for group in groups:
            for layer, unit in group.producers.items():
                if layer in removed:
                    removed[layer] |= torch.isin(unit, torch.tensor(units[group.name], dtype=torch.long))
        for layer, name in names.items():
            self.kept[name] = self.kept[name][~removed[layer]]

    def _groups(self, network: nn.Module) -> tuple[tp.DependencyGraph, list[Group]]:
        graph, groups = find_groups(network, self.example)
        return graph, [group for group in groups if group.name in self.sound]

    def _require_repairable(self) -> None:
        """UserError when batch norm cannot take its statistics from the images for the repair."""
        count = min(2, len(self.images.repair), self.settings.batch_size if self.settings.repair == "bn" else 2)
        if self.settings.repair == "none":
            return
        few = self.images.repair.select(torch.arange(count))
        try:
            recalibrate(copied(self.network), few, self.compute, count, "Trying the repair")
        except (RuntimeError, ValueError) as error:
            if is_shortage(error):
                raise
            raise refused(
                self.network,
                f"its batch norm cannot be recalibrated on {count} images at a time ({one_line(error)}): use more "
                "images for the repair, or repair none",
            ) from error


def _spreads(groups: list[Group]) -> dict[nn.Module, int]:
    return {layer: spread for group in groups for layer, spread in group.spreads.items()}


def _by_name(groups: list[Group], counts: torch.Tensor) -> dict[str, int]:
    return {group.name: count for group, count in zip(groups, counts.tolist())}


def _removed_inputs(groups: list[Group], units: dict[str, list[int]]) -> dict[nn.Module, torch.Tensor]:
    """Per layer the inputs (R,) that it loses with these units."""
    removed: dict[nn.Module, list[torch.Tensor]] = {}
    for group in groups:
        for layer in group.consumers:
            removed.setdefault(layer, []).append(group.inputs(layer)[units[group.name]].flatten())
    return {layer: torch.cat(inputs) for layer, inputs in removed.items()}
