"""Which channels go: the costs of a network as functions of its widths, and the choice that meets a budget."""
from __future__ import annotations

import itertools
from dataclasses import dataclass
from typing import Any, Iterator

import torch
import torch_pruning as tp
from torch import nn

from cleanai import UserError
from cleanai.activations import CONSUMERS
from cleanai.importance import CONSUMING

ROUND_TO = 8  # widths stay multiples of it: tensor cores and AVX-512 are slower on odd ones than on no pruning at all
LEAST_KEPT = 0.1  # of the channels a group began with
PARAMETERS_TOLERANCE = 0.001  # the share of parameters removed is the asked one, give or take this
MACS_TOLERANCE = 0.005  # the share of multiply-accumulates removed is the asked one, or up to this more


@dataclass
class Group:
    """Channels that can only go together, and how many each layer loses with one of them."""

    group: tp.dependency.Group
    root: nn.Module
    channels: int
    reads: list[float]  # per layer of Costs: input channels lost
    writes: list[float]  # per layer of Costs: output channels lost


class Costs:
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


def _group(group: tp.dependency.Group, layers: list[nn.Module]) -> Group:
    channels = len(group[0].idxs)
    reads, writes = [0.0] * len(layers), [0.0] * len(layers)
    for item in group:
        if item.dep.layer in layers:
            side = reads if item.dep.pruning_fn in CONSUMING else writes
            side[layers.index(item.dep.layer)] += len(item.idxs) / channels
    return Group(group, group[0].dep.layer, channels, reads, writes)


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
    try:
        with torch.inference_mode():
            network.eval()(example)
    finally:
        for hook in hooks:
            hook.remove()
    return positions


def refuse_unreachable(costs: Costs, least: dict[nn.Module, int], ratio: float) -> None:
    """Raise UserError when narrowing every group to its `least` width removes less than `ratio` of a cost."""
    most = torch.tensor([_blocks(group.channels, least[group.root])[-1:] or [0] for group in costs.groups]).double()
    reachable = (1 - costs(most.flatten()) / costs.now).min().item()
    if ratio > reachable:
        raise UserError(f"--ratio {ratio:g} is more than can be removed from this network: at most {reachable:.2f}")


def choose_channels(
    costs: Costs, scores: list[torch.Tensor], least: dict[nn.Module, int], before: torch.Tensor, target: torch.Tensor
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
    costs: Costs, ends: list[list[int]], lost: list[list[float]], low: torch.Tensor, high: torch.Tensor, rate: float
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
