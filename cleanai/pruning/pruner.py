"""Pruning in steps: score the channels, choose the widths, repair, and cut with torch_pruning."""

from __future__ import annotations

import fnmatch
import math
import time
from dataclasses import dataclass
from typing import Any, Callable, Iterable, Sequence

import torch
import torch_pruning as tp
from torch import nn

from cleanai import UserError
from cleanai.data.images import ImageSet
from cleanai.network.activations import CONSUMERS, record_statistics
from cleanai.network.trial import copied
from cleanai.pruning.criteria import OBS, ActivationImportance
from cleanai.pruning.groups import Group, find_groups, sound_groups
from cleanai.pruning.least_squares import gram_matrix, output_errors
from cleanai.pruning.refit import OriginalOutputs, original_outputs, refit
from cleanai.pruning.repair import Targets, recalibrate, reconstruct_in_order
from cleanai.pruning.rows import convolved, record_rows
from cleanai.pruning.tracing import prepared, refused, require_plain, require_working, unwrapped
from cleanai.pruning.widths import LEAST_KEPT, Budget, Costs, allowed_cuts, choose_cuts
from cleanai.runtime import distributed
from cleanai.runtime.compute import Compute
from cleanai.runtime.files import one_line
from cleanai.runtime.memory import is_shortage
from cleanai.runtime.progress import say

STEP_IMAGES = 1024  # of those for the repair, in each step
SENSITIVITY = tuple(tenth / 10 for tenth in range(1, 10))  # shares of a group's channels
NEAR = 0.02  # the largest distance from a requested share, and at most a tenth of the share that is to remain


def find_layers(network: nn.Module, patterns: Sequence[str]) -> set[str]:
    """The convolutions and linear layers whose names match a pattern, as names of files do.

    UserError for a pattern that matches none.
    """
    names = list(layer_widths(network))
    found: set[str] = set()
    for pattern in patterns:
        matching = {name for name in names if fnmatch.fnmatchcase(name, pattern)}
        if not matching:
            some = ", ".join(names if len(names) <= 8 else [*names[:6], "...", names[-1]])
            raise UserError(f"No layer matches {pattern!r}, which is to be kept; the layers are {some}")
        found |= matching
    return found


class BudgetMissed(UserError):
    """Shares that cannot be removed from a network.

    `nearest` are the nearest found, `possible` what can be met, as text; `shares` the nearest of both costs that can be
    met, tried, or None.
    """

    def __init__(
        self, requested: str, nearest: str, possible: Sequence[str], shares: Sequence[float | None] | None
    ) -> None:
        advice = f"These can be met: {'; '.join(possible)}" if possible else "Try other shares"
        super().__init__(f"{requested} cannot be met in this network: the nearest is {nearest}. {advice}")
        self.nearest, self.shares = nearest, shares


@dataclass(frozen=True)
class PruneSettings:
    """How a network is pruned.

    `ratio` and `macs_ratio` are the shares of the parameters and of the multiply-accumulates to remove; None leaves one
    of them free. `steps` is a number of equal steps, or the cumulative fractions after each step, ending in 1. Widths
    stay multiples of the first number in `round_to` that can meet the budget: tensor cores and AVX-512 are slow on odd
    widths. `repair` is "full", "bn" (batch norm only, in batches of `batch_size`) or "none". With `nearest`, shares
    that cannot be met exactly become the nearest that can, unless one of these differs by more than `NEAR` says.
    `keep_layers` are patterns of names (`find_layers`): these layers, and those that share channels with them, lose no
    output channel.
    """

    ratio: float | None
    macs_ratio: float | None
    steps: int | Sequence[float] = 5
    round_to: Sequence[int] = (32, 16, 8, 4, 2, 1)
    repair: str = "full"
    batch_size: int = 128
    nearest: bool = False
    keep_layers: Sequence[str] = ()

    @property
    def fractions(self) -> Sequence[float]:
        """The cumulative fractions after each step."""
        if isinstance(self.steps, int):
            return [step / self.steps for step in range(1, self.steps + 1)]
        return self.steps


@dataclass(frozen=True)
class PruneImages:
    """The images for pruning, no label of which is used: `calibration` to score channels, `repair` for the repair."""

    calibration: ImageSet
    repair: ImageSet


def prune_to_budget(
    network: nn.Module,
    importance: tp.importance.Importance | OBS,
    images: PruneImages,
    compute: Compute,
    settings: PruneSettings,
    after_step: Callable[[int, nn.Module, nn.Module], Any] | None = None,
) -> tuple[dict[str, Any], nn.Module]:
    """Remove shares of a network's parameters and multiply-accumulates, in place.

    In each step `importance` orders the channels within each group, scored again on the calibration images. The number
    of channels that each group loses is chosen over the whole network so that both budgets are met and the consumers'
    outputs lose least (see `_losses`): first for the whole way, then for the part of this step. Then the repair runs,
    and the channels are cut. The network's outputs keep their width.

    Returns a report, and a copy of the network without the same channels, not repaired. The report has `steps` (shares
    requested and removed after each step, in percent, and its seconds), `layers` (widths before and after), and
    `sensitivity` (of each group before the first step, see `_Pruning.sensitivity_of`). `after_step` is called with the
    number of each step, the network as if this step were the last (one of its own, which may be kept), and that copy,
    and must not change them; a true answer ends the pruning. Both keep the mode, precision, device and frozen
    parameters of the network; weights that two layers share are not pruned. In DataParallel the network inside is
    pruned.

    Raises UserError, before anything is changed, when the shares cannot be met or the network cannot be pruned.
    """
    started = time.perf_counter()
    network = unwrapped(network)
    require_plain(network)
    with prepared(network):
        pruning = _Pruning(network, importance, images, compute, settings)
    with torch.inference_mode(False):
        pruning.original, pruning.unrepaired = copied(network), copied(network)
    widths_before = layer_widths(network)
    with prepared(network):
        pruning.prepare()
    steps = []
    for step, fraction in enumerate(settings.fractions, 1):
        title = f"Step {step}/{len(settings.fractions)}"
        with prepared(network), prepared(pruning.unrepaired):
            removed_shares = pruning.step(title, fraction)
        seconds = time.perf_counter() - started
        steps.append({**_report(title, pruning.requested(fraction), removed_shares, seconds), "seconds": seconds})
        finished = network
        if after_step is not None and step < len(settings.fractions):
            with torch.inference_mode(False):
                finished = copied(network)
        if after_step is not None or step == len(settings.fractions):
            pruning.finish(finished)
        if after_step is not None and after_step(step, finished, pruning.unrepaired):
            network.load_state_dict(finished.state_dict())
            break
        started = time.perf_counter()
    layers = compare_widths(widths_before, network)
    return {"steps": steps, "layers": layers, "sensitivity": pruning.sensitivity}, pruning.unrepaired


def layer_widths(network: nn.Module) -> dict[str, int]:
    """The number of output channels of every convolution and linear layer, by name."""
    return {
        name: layer.out_features if isinstance(layer, nn.Linear) else layer.out_channels
        for name, layer in network.named_modules()
        if isinstance(layer, CONSUMERS)
    }


def compare_widths(before: dict[str, int], network: nn.Module) -> list[dict[str, Any]]:
    """The `layer_widths` before, and those of a network now: per layer its `name` and both."""
    widths = layer_widths(network)
    return [{"name": name, "channels_before": width, "channels_after": widths[name]} for name, width in before.items()]


class _Pruning:
    """The state of `prune_to_budget` between its steps."""

    def __init__(
        self,
        network: nn.Module,
        importance: tp.importance.Importance | OBS,
        images: PruneImages,
        compute: Compute,
        settings: PruneSettings,
    ) -> None:
        self.network, self.importance, self.images = network, importance, images
        self.compute, self.settings = compute, settings
        self.shares: Sequence[float | None] = (settings.ratio, settings.macs_ratio)  # to remove, of both costs
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
        self.least = {group.name: max(1, round(LEAST_KEPT * group.channels)) for group in groups}
        kept = find_layers(network, settings.keep_layers)
        names = {layer: name for name, layer in network.named_modules()}
        for group in groups:
            if any(names[layer] in kept for layer in group.producers):
                self.least[group.name] = group.channels
        self.goal = Budget.removing(self.before, *self.shares)
        self.multiple, planned = self._plan(groups, costs, self.goal, settings.round_to)
        if self.goal.missed(costs(planned), self.before) > 0:
            self.shares = self._nearest_shares(groups, costs, planned)
            self.goal = Budget.removing(self.before, *self.shares)
            self.multiple, planned = self._plan(groups, costs, self.goal, settings.round_to)
        self.remaining = _by_name(groups, planned)  # channels that each group still loses, by the last plan
        self.step_images = images.repair.select(torch.arange(min(STEP_IMAGES, len(images.repair))))
        self.kept = {name: torch.arange(width) for name, width in layer_widths(network).items()}  # original outputs
        # The rows of the last repair, which a step starts from.
        self.rows: tuple[dict[nn.Module, torch.Tensor], dict[nn.Module, torch.Tensor]] = {}, {}
        self.sensitivity: list[dict[str, Any]] = []  # of the groups, before the first step

    def requested(self, fraction: float) -> list[float | None]:
        """The shares of both costs to remove after this fraction of the way."""
        return [None if share is None else share * fraction for share in self.shares]

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
        orders = [self._order(group, grams) for group in groups]
        losses = [_losses(group, order, grams) for group, order in zip(groups, orders)]
        self.sensitivity = self.sensitivity or self.sensitivity_of(groups, losses)
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

    def finish(self, network: nn.Module) -> None:
        """The last part of the repair, of the network after its last step."""
        if self.settings.repair == "full":
            with prepared(network), prepared(self.original):
                images, compute = self.images.repair, self.compute
                self.targets = self.targets or original_outputs(self.original, images, compute)
                refit(network, self.targets, self.kept, images, compute, "Refitting to the original network")
            distributed.agree_on(network)
            self.compute.synchronize()

    def sensitivity_of(self, groups: list[Group], losses: list[torch.Tensor]) -> list[dict[str, Any]]:
        """Per group the `layers` that produce its channels, the `readers`, the `channels`, and `lost_percent`.

        That is the share of the readers' outputs that is lost, at each share of the channels in `SENSITIVITY`.
        """
        names = {layer: name for name, layer in self.network.named_modules()}
        order = {name: number for number, name in enumerate(names.values())}

        def named(layers: Iterable[nn.Module]) -> list[str]:
            return sorted((names[layer] for layer in layers if isinstance(layer, CONSUMERS)), key=order.__getitem__)

        entries = []
        for group, loss in zip(groups, losses):
            lost = [1 - math.exp(-loss[round(share * group.units)].item()) for share in SENSITIVITY]
            entries.append(
                {
                    "layers": named(group.producers),
                    "readers": named(group.consumers),
                    "channels": group.channels,
                    "lost_percent": [round(100 * share, 3) for share in lost],
                }
            )
        return sorted(entries, key=lambda entry: order[entry["layers"][0]])

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

    def _order(self, group: Group, grams: dict[nn.Module, torch.Tensor]) -> torch.Tensor:
        """The units of a group, the least important first."""
        if isinstance(self.importance, OBS):
            return self.importance.order(group, grams)
        return self.importance(group.item).cpu().reshape(-1, group.units).sum(0).argsort(stable=True)

    def _choose(self, groups: list[Group], costs: Costs, losses: list[torch.Tensor], fraction: float) -> torch.Tensor:
        """The number of channels (G,) that each group loses in this step.

        The whole way is planned again in every step, and no step goes beyond the plan, so that the goal stays in reach.
        """
        cuts = [allowed_cuts(group, self.least[group.name], self.multiple) for group in groups]
        known = torch.tensor([self.remaining[group.name] for group in groups])
        removed = planned = choose_cuts(costs, cuts, _losses_of_cuts(losses, cuts, groups), self.goal, known)
        if fraction < 1:
            cuts = [cut[: cut.index(int(most)) + 1] for cut, most in zip(cuts, planned)]
            budget = Budget.removing(self.before, *self.requested(fraction))
            removed = choose_cuts(costs, cuts, _losses_of_cuts(losses, cuts, groups), budget)
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

    def _plan(
        self, groups: list[Group], costs: Costs, goal: Budget, round_to: Sequence[int]
    ) -> tuple[int, torch.Tensor]:
        """The first multiple in `round_to` that can meet the goal, or comes nearest to it, and cuts (G,) that do so."""
        plans = []
        for multiple in round_to:
            cuts = [allowed_cuts(group, self.least[group.name], multiple) for group in groups]
            planned = choose_cuts(costs, cuts, [torch.zeros(len(cut)) for cut in cuts], goal)
            plans.append((goal.missed(costs(planned), costs.now).item(), multiple, planned))
            if plans[-1][0] == 0:
                break
        return min(plans, key=lambda plan: plan[0])[1:]

    def _nearest_shares(self, groups: list[Group], costs: Costs, planned: torch.Tensor) -> Sequence[float | None]:
        """The nearest shares that can be met, where the `planned` cuts do not meet the goal.

        Raises BudgetMissed when the settings do not allow them, or there are none near the requested ones.
        """
        missed = self._missed(groups, costs, planned)
        if not self.settings.nearest or not _are_near(self.shares, missed.shares):
            raise missed
        say(f"Not exactly possible in this network; the nearest: {missed.nearest}")
        return missed.shares

    def _missed(self, groups: list[Group], costs: Costs, planned: torch.Tensor) -> BudgetMissed:
        """The error for cuts that do not meet the goal, with settings that were tried and do."""
        asked = self.shares

        def nearest(shares: Sequence[float | None], round_to: Sequence[int]) -> tuple[bool, list[float]]:
            goal = Budget.removing(self.before, *shares)
            cost = costs(self._plan(groups, costs, goal, round_to)[1])
            return goal.missed(cost, self.before).item() == 0, (1 - cost / self.before).tolist()

        removed = (1 - costs(planned) / self.before).tolist()
        parameters, macs = (100 * share for share in removed)
        possible, near = [], None
        for _ in range(5):  # the search is no exhaustive one: it may not find again what it found for another goal
            # Fewer MACs than requested are not allowed to be removed: round down.
            shares = [None if share is None else near for share, near in zip(asked, _rounded(removed))]
            if 0 in shares:
                break
            met, removed = nearest(shares, self.settings.round_to)
            if met:
                possible.append(_shares_text(shares))
                near = shares
                break
        if None not in asked:
            possible += [
                _shares_text(shares)
                for shares in ([asked[0], None], [None, asked[1]])
                if nearest(shares, self.settings.round_to)[0]
            ]
        if 1 not in self.settings.round_to and nearest(asked, [1])[0]:
            possible.append("the same with round_to 1")
        return BudgetMissed(
            _shares_text(asked),
            f"{parameters:.2f}% of the parameters and {macs:.2f}% of the multiply-accumulates",
            possible,
            near,
        )


def _are_near(asked: Sequence[float | None], found: Sequence[float | None] | None) -> bool:
    """Whether shares that were found differ from those asked for by less than `NEAR` says."""
    pairs = [] if found is None else [(share, near) for share, near in zip(asked, found) if share is not None]
    return bool(pairs) and all(abs(near - share) < min(NEAR, (1 - share) / 10) for share, near in pairs)


def _rounded(removed: Sequence[float]) -> list[float]:
    """Shares of both costs with four digits that a budget allows for these: that of the MACs is rounded down."""
    return [round(removed[0], 4), math.floor(removed[1] * 10_000) / 10_000]


def _shares_text(shares: Sequence[float | None]) -> str:
    return " and ".join(
        f"{name} {'none' if share is None else f'{share:g}'}" for name, share in zip(("ratio", "macs_ratio"), shares)
    )


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


def _losses(group: Group, order: torch.Tensor, grams: dict[nn.Module, torch.Tensor]) -> torch.Tensor:
    """The network's loss without the first 0, 1, ... all of a group's units in `order`: (units + 1,).

    A consumer keeps a share 1 - e of its outputs' power, e being the squared error after reconstruction
    (`output_errors`). Such shares multiply along the network, so the loss is -log(1 - e), summed over the consumers:
    a layer that is nearly wiped out costs far more than several that lose a little. docs/method.md compares this rule
    with others.
    """
    kept = [
        1 - output_errors(layer, grams[layer], group.inputs(layer)[order], group.spreads[layer])
        for layer in group.consumers
    ]
    losses = -torch.stack(kept).clamp_min(1e-9).log().sum(0)
    return torch.cat([losses.new_zeros(1), losses])


def _losses_of_cuts(losses: list[torch.Tensor], cuts: list[list[int]], groups: list[Group]) -> list[torch.Tensor]:
    """Of the losses per unit, those of each allowed cut."""
    return [loss[torch.tensor(cut) * group.units // group.channels] for loss, cut, group in zip(losses, cuts, groups)]


def _report(title: str, requested: list[float | None], removed: list[float], seconds: float) -> dict[str, Any]:
    shown = [
        f"{100 * share:.2f}% of {name} ({'free' if target is None else f'{100 * target:.2f}% requested'})"
        for name, target, share in zip(("parameters", "MACs"), requested, removed)
    ]
    say(f"{title}: removed {' and '.join(shown)}, {seconds:.0f} s")
    return {
        f"{name}_{what}_percent": None if share is None else 100 * share
        for what, values in (("asked", requested), ("removed", removed))
        for name, share in zip(("parameters", "macs"), values)
    }
