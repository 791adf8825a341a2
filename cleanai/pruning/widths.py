"""The choice of widths: how many channels each group loses so that both budgets are met at the least loss."""

from __future__ import annotations

import contextlib
import math
from dataclasses import dataclass
from typing import Iterator

import torch
from torch import nn

from cleanai.network.activations import CONSUMERS, removed_afterwards
from cleanai.pruning.groups import Group

LEAST_KEPT = 10  # a group keeps at least one in so many of its channels
PARAMETERS_TOLERANCE = 0.001  # on the share of parameters removed, to both sides
MACS_TOLERANCE = 0.005  # on the share of multiply-accumulates removed, upwards only
_ROUNDING = 1e-9  # of that share, which is calculated
_MOVES = 4096  # random changes that the search tries in each round
_ROUNDS, _ROUNDS_MISSED = 30, 200  # rounds without progress that end it: when the budget is met, and when not


class Costs:
    """Parameters and multiply-accumulates of a network as exact functions of its groups' widths.

    Multiply-accumulates are those of convolutions and linear layers for the input `example`, as
    `torch.utils.flop_counter` counts them (at two operations each).
    """

    def __init__(self, network: nn.Module, groups: list[Group], example: torch.Tensor):
        positions = _positions(network, example)
        layers = list(dict.fromkeys(layer for group in groups for layer in (*group.producers, *group.consumers)))
        layers += [layer for layer in positions if layer not in layers]
        table = torch.tensor([_layer_costs(layer, positions.get(layer, 0)) for layer in layers], dtype=torch.float64)
        self._inputs, self._outputs, self._weights, self._macs, self._biases, self._output_macs = table.T
        self._reads = _lost_per_channel(layers, [(group.consumers, group.channels) for group in groups])
        self._writes = _lost_per_channel(layers, [(group.producers, group.channels) for group in groups])
        self._rest = torch.zeros(2, dtype=torch.float64)
        nothing = torch.zeros(len(groups), dtype=torch.float64)
        self._rest[0] = sum(p.numel() for p in network.parameters()) - self(nothing)[0]
        self.now = self(nothing)

    def __call__(self, removed: torch.Tensor) -> torch.Tensor:
        """Parameters and multiply-accumulates (..., 2) after removing `removed` (..., G) channels of the groups."""
        outputs = self._outputs - removed @ self._writes
        products = (self._inputs - removed @ self._reads) * outputs
        parameters = products @ self._weights + outputs @ self._biases
        macs = products @ self._macs + outputs @ self._output_macs
        return torch.stack([parameters, macs], -1) + self._rest


def _lost_per_channel(layers: list[nn.Module], groups: list[tuple[dict[nn.Module, torch.Tensor], int]]) -> torch.Tensor:
    """How many inputs or outputs each layer loses with a channel of each group: (G, L)."""
    rows = [
        [(units[layer] >= 0).sum().item() / channels if layer in units else 0.0 for layer in layers]
        for units, channels in groups
    ]
    return torch.tensor(rows, dtype=torch.float64).reshape(len(groups), len(layers))


_WIDTHS = ("out_channels", "num_features", "num_parameters")  # of a convolution, a norm, a PReLU


def _layer_costs(layer: nn.Module, positions: int) -> tuple[float, ...]:
    """Inputs and outputs; parameters and multiply-accumulates per pair of these; both per output alone."""
    own = sum(parameter.numel() for parameter in layer.parameters(recurse=False))
    if isinstance(layer, nn.Linear):
        return layer.in_features, layer.out_features, 1, positions, float(layer.bias is not None), 0
    if isinstance(layer, CONSUMERS) and (layer.groups == 1 or layer.groups != layer.out_channels):
        weights = layer.weight[0, 0].numel() / layer.groups
        return layer.in_channels, layer.out_channels, weights, weights * positions, float(layer.bias is not None), 0
    # Each output has its own parameters: a depthwise convolution, or a norm.
    width = next(getattr(layer, name) for name in _WIDTHS if hasattr(layer, name))
    weights = layer.weight.numel() / width if isinstance(layer, CONSUMERS) else 0
    return 0, width, 0, 0, own / width, weights * positions


def _positions(network: nn.Module, example: torch.Tensor) -> dict[nn.Module, int]:
    """How often each layer applies its weights to `example`, one image: at its outputs, or inputs if transposed."""
    positions: dict[nn.Module, int] = {}

    def count(layer: nn.Module, args: tuple[torch.Tensor, ...], output: torch.Tensor) -> None:
        values = args[0] if getattr(layer, "transposed", False) else output
        channels = values.shape[-1] if isinstance(layer, nn.Linear) else values.shape[1]
        positions[layer] = positions.get(layer, 0) + values.numel() // channels

    hooks = [layer.register_forward_hook(count) for layer in network.modules() if isinstance(layer, CONSUMERS)]
    with removed_afterwards(hooks), torch.inference_mode():
        network.eval()(example)
    return positions


@dataclass
class Budget:
    """The target range of both costs: (2,) parameters and multiply-accumulates, from `low` to `high`."""

    low: torch.Tensor
    high: torch.Tensor

    @staticmethod
    def removing(before: torch.Tensor, parameters: float | None, macs: float | None) -> Budget:
        """The budget that removes these shares of the costs `before`; None leaves that cost free."""
        asked = [math.nan if share is None else share for share in (parameters, macs)]
        requested = torch.tensor(asked, dtype=torch.float64)
        less = torch.tensor([PARAMETERS_TOLERANCE, _ROUNDING], dtype=torch.float64)
        more = torch.tensor([PARAMETERS_TOLERANCE, MACS_TOLERANCE], dtype=torch.float64)
        low = (before * (1 - requested - more)).nan_to_num(nan=-math.inf)
        high = (before * (1 - requested + less)).nan_to_num(nan=math.inf)
        return Budget(low, high)

    def missed(self, cost: torch.Tensor, before: torch.Tensor) -> torch.Tensor:
        """The distance of costs (..., 2) from the range, in shares of the costs `before`, summed: (...)."""
        return (((cost - self.high).clamp_min(0) + (self.low - cost).clamp_min(0)) / before).sum(-1)


def least_width(group: Group) -> int:
    """The fewest channels that a group may keep.

    Those of a convolution with groups keep two in each: with one it would be a depthwise one, which is cut otherwise.
    """
    parallel = group.channels // group.units
    return max(-(-group.channels // LEAST_KEPT), 2 * parallel if parallel > 1 else 1)


def allowed_cuts(group: Group, least: int, round_to: int) -> list[int]:
    """The numbers of channels that a group can lose, from 0: the rest is a multiple of `round_to` and >= `least`."""
    parallel = group.channels // group.units
    multiple = parallel * round_to // math.gcd(parallel, round_to)
    return [0] + [group.channels - width for width in range(group.channels - 1, least - 1, -1) if width % multiple == 0]


@contextlib.contextmanager
def _one_thread() -> Iterator[None]:
    """A context for many small operations on the CPU.

    Threads gain little there, and wait for each other where other programs keep the cores busy.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


@_one_thread()
def choose_cuts(
    costs: Costs,
    cuts: list[list[int]],
    losses: list[torch.Tensor],
    budget: Budget,
    known: torch.Tensor | None = None,
) -> torch.Tensor:
    """The number of channels (G,) that each group loses so that the costs meet the budget at the least loss.

    `cuts` are the numbers that each group can lose, `losses` the loss of each. Channels are ranked by loss per cost,
    with an exchange rate between the two costs that bisection finds, so that both budgets are met at once. Since
    channels are removed in blocks, this only approximates the budget. A random search around it then meets the budget
    with the least loss that it finds: never more than that of `known` (G,), if given.
    """
    start = _by_exchange_rate(costs, cuts, losses, budget)
    table = torch.nn.utils.rnn.pad_sequence([torch.tensor(row, dtype=torch.float64) for row in cuts], True)  # (G, E)
    loss = torch.nn.utils.rnn.pad_sequence([row.double() for row in losses], True)
    last = torch.tensor([len(row) - 1 for row in cuts])
    generator = torch.Generator().manual_seed(0)

    def judge(rows: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        removed = table.T.gather(0, rows)
        return budget.missed(costs(removed), costs.now), loss.T.gather(0, rows).sum(-1)

    best = start[None]
    if known is not None:
        best = torch.stack([start, torch.tensor([row.index(int(count)) for row, count in zip(cuts, known)])])
        missed, lost = judge(best)
        best = best[(lost + missed * 1e9).argmin()][None]
    best_missed, best_loss = judge(best)
    rounds = 0
    while rounds < (_ROUNDS_MISSED if best_missed > 0 else _ROUNDS):
        # Up to four groups lose more or fewer blocks: one block as often as all larger numbers together.
        which = torch.randint(len(cuts), (_MOVES, 4), generator=generator)
        blocks = (1 / (1 - torch.rand(_MOVES, 4, generator=generator))).clamp_max(int(last.max())).long()
        step = blocks * torch.randint(-1, 2, (_MOVES, 4), generator=generator)
        moves = torch.zeros(_MOVES, len(cuts), dtype=torch.long).scatter_add_(1, which, step)
        # Half of them from the start: the first widths that meet the budget may be far from the best.
        rows = torch.cat([best + moves[::2], start + moves[1::2]])
        rows = torch.minimum(rows.clamp_min(0), last)
        missed, lost = judge(rows)
        first = (lost + missed * 1e9).argmin()
        if (missed[first], lost[first]) < (best_missed, best_loss):
            best, best_missed, best_loss, rounds = rows[first][None], missed[first], lost[first], 0
        else:
            rounds += 1
    return table.T.gather(0, best)[0]


def _by_exchange_rate(costs: Costs, cuts: list[list[int]], losses: list[torch.Tensor], budget: Budget) -> torch.Tensor:
    """The cuts (G,), as indices into `cuts`, that ranking by loss per cost selects."""
    groups = torch.tensor([number for number, row in enumerate(cuts) for _ in row[1:]], dtype=torch.long)
    sizes = torch.tensor([after - before for row in cuts for before, after in zip(row, row[1:])], dtype=torch.float64)
    slopes = torch.cat([_convex_slopes(row, loss) for row, loss in zip(cuts, losses)])  # loss per channel, per block
    one = torch.eye(len(cuts), dtype=torch.float64)
    per_channel = (costs.now - costs(one)) / costs.now  # (G, 2)

    def take(rate: float) -> tuple[torch.Tensor, torch.Tensor]:
        prices = ((1 - rate) * per_channel[:, 0] + rate * per_channel[:, 1])[groups]
        order = (slopes / prices).argsort(stable=True)
        order = order[prices[order] > 0]  # rates below 0 and above 1 make the scarcer cost worth keeping
        if not len(order):
            return torch.zeros(len(cuts), dtype=torch.long), costs.now
        taken = one[groups[order]].cumsum(0)
        spent = costs((one[groups[order]] * sizes[order, None]).cumsum(0))
        met = (spent <= budget.high)[:, 0 if budget.high[0] < math.inf else 1]
        stop = int(met.int().argmax()) if met.any() else len(order) - 1
        return taken[stop].long(), spent[stop]

    if (budget.high == math.inf).any():
        return take(0.0 if budget.high[0] < math.inf else 1.0)[0]
    low, high = -1.0, 2.0
    for _ in range(20):
        rate = (low + high) / 2
        taken, spent = take(rate)
        low, high = (rate, high) if spent[1] > budget.high[1] else (low, rate)
    return taken


def _convex_slopes(cuts: list[int], losses: torch.Tensor) -> torch.Tensor:
    """The loss per channel of each block along the lower convex hull of a group's losses: increasing."""

    def slope(start: int, end: int) -> float:
        return (losses[end] - losses[start]).item() / (cuts[end] - cuts[start])

    hull = [0]
    for point in range(1, len(cuts)):
        while len(hull) > 1 and slope(hull[-2], hull[-1]) >= slope(hull[-1], point):
            hull.pop()
        hull.append(point)
    return torch.tensor(
        [slope(start, end) for start, end in zip(hull, hull[1:]) for _ in range(start, end)], dtype=torch.float64
    )
