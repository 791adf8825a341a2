"""Pruning in steps: measure the channels, choose, let what stays take over, cut with torch_pruning."""
from __future__ import annotations

import copy
import time
from typing import Any, Callable, Sequence

import torch
import torch_pruning as tp
from torch import nn

from cleanai import UserError
from cleanai.data.images import ImageSet
from cleanai.network.activations import CONSUMERS, convolved, record_rows, record_statistics
from cleanai.pruning.criteria import ActivationImportance
from cleanai.pruning.groups import Group, find_groups, sound_groups
from cleanai.pruning.least_squares import gram_matrix, output_errors
from cleanai.pruning.repair import recalibrate, reconstruct_in_order
from cleanai.pruning.widths import LEAST_KEPT, Budget, Costs, allowed_cuts, choose_cuts
from cleanai.runtime import distributed
from cleanai.runtime.compute import Compute
from cleanai.runtime.progress import say

ROUND_TO = (32, 16, 8)  # tensor cores and AVX-512 are slower on odd widths than on no pruning at all


class BudgetMissed(UserError):
    """Shares that a network cannot be rid of; `nearest` says which it can."""

    def __init__(self, asked: str, nearest: str) -> None:
        super().__init__(
            f"{asked} cannot be met in this network: the nearest is {nearest}. Ask for that, leave one free with none, "
            "or try --round-to 1"
        )
        self.nearest = nearest


def prune_to_budget(
    network: nn.Module,
    importance: tp.importance.Importance,
    calibration: ImageSet,
    repair_on: ImageSet,
    compute: Compute,
    parameters_ratio: float | None,
    macs_ratio: float | None,
    steps: int | Sequence[float],
    batch_size: int,
    round_to: Sequence[int] = ROUND_TO,
    repair: str = "full",
    after_step: Callable[[int, nn.Module, nn.Module], None] | None = None,
) -> tuple[dict[str, Any], nn.Module]:
    """Remove shares of a network's parameters and of its multiply-accumulates, in place; None leaves one of them free.

    In each of `steps` equal steps the channels are measured anew on `calibration`, and `importance` puts those of each
    group in order. How many each group gives is chosen over the whole network, so that both shares are met, widths
    stay multiples of the first number in `round_to` that allows it, and the layers that read the channels lose least
    (see `_losses`): first for the whole way, then for the part of it that the step goes. With `repair` "full" these
    layers are reconstructed in order and batch norm is recalibrated; with "bn" only the latter, with "none" neither.
    `repair_on` serves for all this, all of it in one batch; no label is looked at. What the network puts out keeps its
    width. Instead of their number, `steps` can be the part of the way done after each, the last 1.

    Returns what went (`steps`: shares asked for and removed after each, in percent, and its seconds, the first with all
    that comes before; `layers`: widths before and after), and a copy of the network without the same channels that was
    not repaired. `after_step` is called with the number of each step, the network, and that copy, and must leave both
    as they are. Raises UserError, before anything is touched, when the shares cannot be met or the network cannot be
    pruned.
    """
    started = time.perf_counter()
    example = next(calibration.batches(1))[0]
    unrepaired = copy.deepcopy(network)
    widths_before = layer_widths(network)
    sound = sound_groups(network, next(calibration.batches(2))[0])
    if not sound:
        raise UserError(f"{type(network).__name__} has no channels that can be removed")
    _, groups = _groups(network, example, sound)
    costs = Costs(network, groups, example)
    before, shares = costs.now, (parameters_ratio, macs_ratio)
    goal = Budget.removing(before, *shares)
    least = {group.name: max(1, round(LEAST_KEPT * group.channels)) for group in groups}
    multiple, planned = _first_plan(groups, least, round_to, costs, goal)
    _require(shares, before, costs(planned))
    left = _by_name(groups, planned)
    met: tuple[dict[nn.Module, torch.Tensor], dict[nn.Module, torch.Tensor]] = {}, {}  # rows, in the last repair
    if repair == "full":  # what other images made of batch norm is nothing to come near to
        title = "Recalibrating, measuring relations"
        met = reconstruct_in_order(network, {}, {}, {}, _spreads(groups), repair_on, compute, title)

    achieved = []
    parts = [step / steps for step in range(1, steps + 1)] if isinstance(steps, int) else steps
    for step, part in enumerate(parts, 1):
        title = f"Step {step}/{len(parts)}, "
        asked = [None if share is None else share * part for share in shares]
        graph, groups = _groups(network, example, sound)
        costs = Costs(network, groups, example)

        if isinstance(importance, ActivationImportance):
            importance.statistics = record_statistics(
                network, calibration, compute, title + "measuring channels", importance.moments
            )
        spreads = _spreads(groups)
        received, seen = met
        if spreads.keys() <= received.keys():
            made = {layer: convolved(layer, seen.pop(layer)) for layer in list(seen)}
        else:  # without such a repair, or where a layer runs several times
            received, made = record_rows(network, spreads, repair_on, compute, title + "measuring relations")
        grams = {layer: gram_matrix(received[layer]) for layer in spreads}
        orders = [importance(group.item).cpu().reshape(-1, group.units).sum(0).argsort(stable=True) for group in groups]
        losses = [_losses(group, order, grams) for group, order in zip(groups, orders)]

        # The whole way is planned anew in every step, and no step goes beyond the plan: what is left can be met.
        cuts = [allowed_cuts(group, least[group.name], multiple) for group in groups]
        known = torch.tensor([left[group.name] for group in groups])
        removed = planned = choose_cuts(costs, cuts, _at(losses, cuts, groups), goal, known)
        if step < len(parts):
            cuts = [cut[: cut.index(int(most)) + 1] for cut, most in zip(cuts, planned)]
            removed = choose_cuts(costs, cuts, _at(losses, cuts, groups), Budget.removing(before, *asked))
        gone = {
            group.name: order[: int(count) * group.units // group.channels].tolist()
            for group, order, count in zip(groups, orders, removed)
        }
        # Rounding must not lead processes to different networks.
        left, gone = distributed.agreed((_by_name(groups, planned - removed), gone))

        if repair == "full":
            lost = _lost_inputs(groups, gone)
            title += "reconstructing"
            met = reconstruct_in_order(network, received, made, lost, spreads, repair_on, compute, title)
        _cut(graph, groups, gone)
        _cut(*_groups(unrepaired, example, sound), gone)
        for pruned in (network, unrepaired):
            compute.place(pruned)  # cutting takes the weights out of the channels-last order
        if repair == "bn":
            recalibrate(network, repair_on, compute, batch_size, title + "recalibrating batch norm")
        distributed.agree_on(network)
        compute.synchronize()

        seconds = time.perf_counter() - started
        went = (1 - costs(removed) / before).tolist()
        achieved.append({**_report(step, len(parts), asked, went, seconds), "seconds": seconds})
        if after_step is not None:
            after_step(step, network, unrepaired)
        started = time.perf_counter()
    widths = layer_widths(network)
    layers = [
        {"name": name, "channels_before": width, "channels_after": widths[name]}
        for name, width in widths_before.items()
    ]
    return {"steps": achieved, "layers": layers}, unrepaired


def layer_widths(network: nn.Module) -> dict[str, int]:
    """The number of output channels of every convolution and linear layer, by name."""
    return {
        name: layer.out_features if isinstance(layer, nn.Linear) else layer.out_channels
        for name, layer in network.named_modules()
        if isinstance(layer, CONSUMERS)
    }


def _groups(network: nn.Module, example: torch.Tensor, sound: set[str]) -> tuple[tp.DependencyGraph, list[Group]]:
    graph, groups = find_groups(network, example)
    return graph, [group for group in groups if group.name in sound]


def _spreads(groups: list[Group]) -> dict[nn.Module, int]:
    return {layer: spread for group in groups for layer, spread in group.spreads.items()}


def _by_name(groups: list[Group], counts: torch.Tensor) -> dict[str, int]:
    return {group.name: count for group, count in zip(groups, counts.tolist())}


def _lost_inputs(groups: list[Group], gone: dict[str, list[int]]) -> dict[nn.Module, torch.Tensor]:
    """Per layer the inputs (R,) that it loses with these units."""
    lost: dict[nn.Module, list[torch.Tensor]] = {}
    for group in groups:
        for layer in group.readers:
            lost.setdefault(layer, []).append(group.inputs(layer)[gone[group.name]].flatten())
    return {layer: torch.cat(inputs) for layer, inputs in lost.items()}


def _losses(group: Group, order: torch.Tensor, grams: dict[nn.Module, torch.Tensor]) -> torch.Tensor:
    """What the network loses without none, one, ... all of a group's units, lowest first as in `order`: (units + 1,).

    The importance says which channels of a group go first; how many go, and from which group, is decided by what the
    layers that read them lose. Of the power of its outputs a reader keeps a share 1 - e, e being the squared error that
    is left after reconstruction (`output_errors`). What is lost on the way multiplies, so losses are -log(1 - e),
    summed over the readers: a layer that is nearly wiped out costs far more than several that lose a little, and a
    residual stream, which many layers read, costs what they all lose. A score alone cannot tell this, since it does
    not know which channels can stand in for which.

    Accuracy with half of the parameters and of the multiply-accumulates gone in one step, each layer reconstructed by
    itself and without fine-tuning, on 2,500 training images that were not used for it (84.2% before), channels in the
    order of Neuron Coverage and of WANDA: this rule 77.9 and 79.4; e itself 77.8 and 79.1; e without reconstruction
    71.4 and 77.8; summed scores as shares of their layer 76.2 and 77.6, by LAMP 75.6 and 76.7; with Neuron Coverage
    also as z-scores 71.7, over their mean 65.2, raw 65.3; the same share of every layer 75.9.
    """
    kept = [
        1 - output_errors(layer, grams[layer], group.inputs(layer)[order], group.spreads[layer])
        for layer in group.readers
    ]
    lost = -torch.stack(kept).clamp_min(1e-9).log().sum(0)
    return torch.cat([lost.new_zeros(1), lost])


def _first_plan(
    groups: list[Group], least: dict[str, int], round_to: Sequence[int], costs: Costs, goal: Budget
) -> tuple[int, torch.Tensor]:
    """The first multiple in `round_to` that can meet the goal, or else comes nearest, and cuts (G,) that do so."""
    plans = []
    for multiple in round_to:
        cuts = [allowed_cuts(group, least[group.name], multiple) for group in groups]
        planned = choose_cuts(costs, cuts, [torch.zeros(len(cut)) for cut in cuts], goal)
        plans.append((goal.missed(costs(planned), costs.now).item(), multiple, planned))
        if plans[-1][0] == 0:
            break
    return min(plans, key=lambda plan: plan[0])[1:]


def _at(losses: list[torch.Tensor], cuts: list[list[int]], groups: list[Group]) -> list[torch.Tensor]:
    """Of the losses without so many units of a group, those without the channels of each of its allowed cuts."""
    return [
        loss[torch.tensor(cut) * group.units // group.channels] for loss, cut, group in zip(losses, cuts, groups)
    ]


def _cut(graph: tp.DependencyGraph, groups: list[Group], gone: dict[str, list[int]]) -> None:
    for group in groups:
        if gone[group.name]:
            group.remove(graph, gone[group.name])


def _require(shares: tuple[float | None, float | None], before: torch.Tensor, nearest: torch.Tensor) -> None:
    """Raise UserError when these costs, the nearest that were found, do not meet the shares to be removed."""
    if Budget.removing(before, *shares).missed(nearest, before) > 0:
        asked = " ".join(f"{name} {share:g}" for name, share in zip(("--ratio", "--macs-ratio"), shares) if share)
        parameters, macs = (100 * (1 - nearest / before)).tolist()
        can = f"{parameters:.2f}% of the parameters and {macs:.2f}% of the multiply-accumulates"
        raise BudgetMissed(asked, can)


def _report(
    step: int, steps: int, asked: list[float | None], removed: list[float], seconds: float
) -> dict[str, float | None]:
    shown = [
        f"{100 * went:.2f}% of the {name} removed ({'left free' if share is None else f'{100 * share:.2f}% asked'})"
        for name, share, went in zip(("parameters", "multiply-accumulates"), asked, removed)
    ]
    say(f"Step {step}/{steps}: {', '.join(shown)}, {seconds:.0f} s")
    return {
        f"{name}_{what}_percent": None if share is None else 100 * share
        for what, values in (("asked", asked), ("removed", removed))
        for name, share in zip(("parameters", "macs"), values)
    }
