"""Pruning to a budget: which channels go is decided here, how they are cut out is torch_pruning's work."""
from __future__ import annotations

import contextlib
import copy
import itertools
from dataclasses import dataclass
from typing import Any, Iterator

import torch
import torch_pruning as tp
from torch import nn
from torch.optim.swa_utils import update_bn

from cleanai import UserError
from cleanai.activations import CONSUMERS, record_statistics
from cleanai.compute import Compute
from cleanai.data import ImageSet
from cleanai.importance import CONSUMING, ActivationImportance
from cleanai.progress import progress

ROUND_TO = 8  # widths stay multiples of it: tensor cores and AVX-512 are slower on odd ones than on no pruning at all
LEAST_KEPT = 0.1  # of the channels a group began with
PARAMETERS_TOLERANCE = 0.001  # the share of parameters removed is the asked one, give or take this
MACS_TOLERANCE = 0.005  # the share of multiply-accumulates removed is the asked one, or up to this more


def prune_to_budget(
    network: nn.Module,
    importance: ActivationImportance,
    calibration: ImageSet,
    repair_on: ImageSet,
    compute: Compute,
    ratio: float,
    steps: int,
    batch_size: int,
) -> tuple[dict[str, Any], nn.Module]:
    """Remove `ratio` of a network's parameters and of its multiply-accumulates, in place.

    In each of `steps` equal steps the channels are measured anew on `calibration`, ranked over the whole network by
    `importance`, cut, and batch norm is recalibrated on `repair_on`, whose labels are not looked at. The layer that
    ends the network keeps its outputs.

    Returns what went (`steps`: shares removed after each, in percent; `layers`: widths before and after), and a copy
    of the network without the same channels that was not repaired. Raises UserError, before anything is touched, when
    so much cannot be removed.
    """
    example = next(calibration.batches(1))[0]
    unrepaired, history = copy.deepcopy(network), []
    widths_before = layer_widths(network)
    shares = []
    for step in range(1, steps + 1):
        graph = _dependency_graph(network, example)
        costs = _Costs(network, graph, example)
        if step == 1:
            before = costs.now
            least = {group.root: max(ROUND_TO, round(LEAST_KEPT * group.channels)) for group in costs.groups}
            _refuse_unreachable(costs, least, ratio)
        importance.statistics = record_statistics(
            network, calibration, compute, batch_size, f"Step {step}/{steps}, measuring channels"
        )
        scores = [importance(group.group).sort() for group in costs.groups]
        asked = ratio * step / steps
        removed = _choose(costs, [score.values for score in scores], least, before, before * (1 - asked))
        for group, score, count in zip(costs.groups, scores, removed.int().tolist()):
            if count:
                root, cut = group.group[0].dep.layer, group.group[0].dep.pruning_fn
                graph.get_pruning_group(root, cut, score.indices[:count].tolist()).prune()
        history += graph.pruning_history()
        compute.place(network)  # cutting takes the weights out of the channels-last order
        recalibrate(network, repair_on, compute, batch_size, f"Step {step}/{steps}, recalibrating batch norm")

        parameters, macs = (100 * (1 - costs(removed) / before)).tolist()
        shares.append(
            {"asked_percent": 100 * asked, "parameters_removed_percent": parameters, "macs_removed_percent": macs}
        )
        print(
            f"Step {step}/{steps}: {100 * asked:.1f}% asked, {parameters:.2f}% of the parameters "
            f"and {macs:.2f}% of the multiply-accumulates removed"
        )
    if abs(parameters - 100 * ratio) > 0.5:
        raise UserError(
            f"--ratio {ratio:g} cannot be met with widths in multiples of {ROUND_TO}: {parameters:.1f}% of the "
            "parameters went. Ask for that, or for another --ratio"
        )
    widths = layer_widths(network)
    layers = [
        {"name": name, "channels_before": width, "channels_after": widths[name]}
        for name, width in widths_before.items()
    ]
    _dependency_graph(unrepaired, example).load_pruning_history(history)
    return {"steps": shares, "layers": layers}, compute.place(unrepaired)


def recalibrate(network: nn.Module, images: ImageSet, compute: Compute, batch_size: int, title: str) -> None:
    """Set the running means and variances of batch norm to plain averages over `images`."""
    # Every batch counts alike in these averages: a smaller last one is left out.
    whole = max(1, len(images) // batch_size)
    batches = itertools.islice((inputs for inputs, _ in images.batches(batch_size)), whole)
    with compute.autocast():
        update_bn(progress(batches, title, "batch", total=whole), network)


def layer_widths(network: nn.Module) -> dict[str, int]:
    """The number of output channels of every convolution and linear layer, by name."""
    return {
        name: layer.out_features if isinstance(layer, nn.Linear) else layer.out_channels
        for name, layer in network.named_modules()
        if isinstance(layer, CONSUMERS)
    }


@dataclass
class _Group:
    """Channels that can only go together, and how many each layer loses with one of them."""

    group: tp.dependency.Group
    root: nn.Module
    channels: int
    reads: list[float]  # per layer of _Costs: input channels lost
    writes: list[float]  # per layer of _Costs: output channels lost


class _Costs:
    """Parameters and multiply-accumulates of a network as exact functions of its groups' widths."""

    def __init__(self, network: nn.Module, graph: tp.DependencyGraph, example: torch.Tensor):
        positions = _output_positions(network, example)
        layers = [m for m in network.modules() if isinstance(m, (*CONSUMERS, nn.BatchNorm2d))]
        self.groups = [group for group in (_group(g, layers) for g in graph.get_all_groups()) if any(group.reads)]
        table = torch.tensor([_layer_costs(layer, positions) for layer in layers], dtype=torch.float64)
        self._inputs, self._outputs, self._weights, self._macs, self._biases = table.T
        self._reads = torch.tensor([group.reads for group in self.groups], dtype=torch.float64).T
        self._writes = torch.tensor([group.writes for group in self.groups], dtype=torch.float64).T
        self.now = self(torch.zeros(len(self.groups), dtype=torch.float64))

    def __call__(self, removed: torch.Tensor) -> torch.Tensor:
        """Parameters and multiply-accumulates (2,) without `removed` (G,) channels of the groups."""
        outputs = self._outputs - self._writes @ removed
        products = (self._inputs - self._reads @ removed) * outputs
        return torch.stack([self._weights @ products + self._biases @ outputs, self._macs @ products])


def _group(group: tp.dependency.Group, layers: list[nn.Module]) -> _Group:
    channels = len(group[0].idxs)
    reads, writes = [0.0] * len(layers), [0.0] * len(layers)
    for item in group:
        if item.dep.layer in layers:
            side = reads if item.dep.pruning_fn in CONSUMING else writes
            side[layers.index(item.dep.layer)] += len(item.idxs) / channels
    return _Group(group, group[0].dep.layer, channels, reads, writes)


def _layer_costs(layer: nn.Module, positions: dict[nn.Module, int]) -> tuple[float, float, float, float, float]:
    """Inputs, outputs; parameters and multiply-accumulates per pair of these; parameters per output."""
    if isinstance(layer, nn.BatchNorm2d):
        return 0, layer.num_features, 0, 0, 2
    bias = float(layer.bias is not None)
    if isinstance(layer, nn.Linear):
        return layer.in_features, layer.out_features, 1, positions[layer], bias
    weights = layer.weight[0, 0].numel() / layer.groups
    return layer.in_channels, layer.out_channels, weights, weights * positions[layer], bias


def _output_positions(network: nn.Module, example: torch.Tensor) -> dict[nn.Module, int]:
    """How often each layer applies its weights to one image."""
    positions = {}

    def count(layer: nn.Module, _: Any, output: torch.Tensor) -> None:
        positions[layer] = output[0].numel() // (output.shape[-1] if isinstance(layer, nn.Linear) else output.shape[1])

    hooks = [layer.register_forward_hook(count) for layer in network.modules() if isinstance(layer, CONSUMERS)]
    with contextlib.ExitStack() as stack, torch.inference_mode():
        for hook in hooks:
            stack.callback(hook.remove)
        network.eval()(example)
    return positions


def _dependency_graph(network: nn.Module, example: torch.Tensor) -> tp.DependencyGraph:
    # Evaluation mode: tracing must not move the running statistics of batch norm.
    return tp.DependencyGraph().build_dependency(network.eval(), example_inputs=example)


def _refuse_unreachable(costs: _Costs, least: dict[nn.Module, int], ratio: float) -> None:
    most = torch.tensor([_blocks(group.channels, least[group.root])[-1:] or [0] for group in costs.groups]).double()
    reachable = (1 - costs(most.flatten()) / costs.now).min().item()
    if ratio > reachable:
        raise UserError(f"--ratio {ratio:g} is more than can be removed from this network: at most {reachable:.2f}")


def _choose(
    costs: _Costs, scores: list[torch.Tensor], least: dict[nn.Module, int], before: torch.Tensor, target: torch.Tensor
) -> torch.Tensor:
    """How many channels (G,) to take from each group, lowest scores first, so that both costs fall to `target`.

    A channel is worth its score per cost, and the exchange rate between the two costs decides which layers give: of
    the rates that meet both budgets, the one is taken that gives up the least score. As channels go in blocks, that
    only comes near the budgets; giving and taking single blocks, two at a time, then meets them.
    """
    high = target + before * torch.tensor([PARAMETERS_TOLERANCE, 0.0])
    low = target - before * torch.tensor([PARAMETERS_TOLERANCE, MACS_TOLERANCE])
    ends = [[0, *_blocks(group.channels, least[group.root])] for group in costs.groups]
    lost = [torch.cat([score.new_zeros(1), score.cumsum(0)]).tolist() for score in scores]

    def channels(blocks: list[int]) -> torch.Tensor:
        return torch.tensor([end[block] for end, block in zip(ends, blocks)], dtype=torch.float64)

    def badness(blocks: list[int]) -> tuple[float, float]:
        cost = costs(channels(blocks))
        missed = (((cost - high).clamp_min(0) + (low - cost).clamp_min(0)) / before).sum().item()
        return missed, sum(loss[end[block]] for loss, end, block in zip(lost, ends, blocks))

    # Below 0 and above 1 the cost that would run out first is worth keeping.
    rates = torch.linspace(-0.5, 1.5, 41).tolist()
    blocks = min((_take_cheapest(costs, ends, lost, low, high, rate) for rate in rates), key=badness)
    while True:
        better = min(_neighbours(blocks, ends), key=badness)
        if badness(better) >= badness(blocks):
            return channels(blocks)
        blocks = better


def _take_cheapest(
    costs: _Costs, ends: list[list[int]], lost: list[list[float]], low: torch.Tensor, high: torch.Tensor, rate: float
) -> list[int]:
    """Take blocks of channels in the order of their score per cost until both costs are below `high`.

    A block that would bring a cost below `low` is passed over. Returns the number of blocks taken from each group.
    """
    per_channel = (costs.now - torch.stack([costs(row) for row in torch.eye(len(ends)).double()])) / costs.now
    prices = ((1 - rate) * per_channel[:, 0] + rate * per_channel[:, 1]).tolist()
    queue = sorted(
        ((loss[end] - loss[start]) / (end - start) / price, -price, number)
        for number, (group_ends, loss, price) in enumerate(zip(ends, lost, prices))
        if price > 0
        for start, end in zip(group_ends, group_ends[1:])
    )
    blocks, removed = [0] * len(ends), torch.zeros(len(ends), dtype=torch.float64)
    for *_, number in queue:
        trial = removed.clone()
        trial[number] = ends[number][blocks[number] + 1]
        cost = costs(trial)
        if (cost < low).any():
            continue
        blocks[number] += 1
        removed = trial
        if (cost <= high).all():
            break
    return blocks


def _neighbours(blocks: list[int], ends: list[list[int]]) -> Iterator[list[int]]:
    """Yield `blocks` with one block more or less in one or two groups."""
    for first, second in itertools.combinations_with_replacement(range(len(blocks)), 2):
        for give, take in itertools.product((-1, 1), (-1, 0, 1)):
            changed = list(blocks)
            changed[first] += give
            changed[second] += take if first != second else 0
            if all(0 <= count < len(end) for count, end in zip(changed, ends)):
                yield changed


def _blocks(channels: int, least: int) -> list[int]:
    """How many channels can go at a time, such that a multiple of ROUND_TO and at least `least` stay."""
    return [channels - width for width in range(channels - 1, least - 1, -1) if width % ROUND_TO == 0]
