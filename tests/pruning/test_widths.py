import itertools
import math

import pytest
import torch
from torch import nn

from cleanai.pruning.groups import find_groups
from cleanai.pruning.widths import Budget, Costs, allowed_cuts, choose_cuts
from tests.helpers import parameter_count, torch_macs

EXAMPLE = torch.zeros(1, 3, 8, 8)


def _network(widths=(16, 16, 16)):
    a, b, c = widths
    return nn.Sequential(
        nn.Conv2d(3, a, 3, padding=1), nn.BatchNorm2d(a), nn.ReLU(),
        nn.Conv2d(a, a, 3, padding=1, groups=a), nn.ReLU(),
        nn.ConvTranspose2d(a, b, 2, stride=2, bias=False), nn.ReLU(), nn.Conv2d(b, c, 3, groups=2, stride=4), nn.ReLU(),
        nn.Flatten(), nn.Linear(c * 16, 10),
    )  # fmt: skip


def _groups(network):
    return sorted(find_groups(network, EXAMPLE)[1], key=lambda group: int(group.name))


def _costs(network):
    groups = _groups(network)
    return groups, Costs(network, groups, EXAMPLE)


def test_costs_are_exact_for_every_kind_of_layer():
    groups, costs = _costs(_network())
    assert [group.channels for group in groups] == [16, 16, 16]
    for widths in ((16, 16, 16), (8, 16, 16), (16, 10, 16), (16, 16, 6), (4, 6, 2)):
        narrow = _network(widths)
        removed = 16 - torch.tensor(widths, dtype=torch.float64)
        expected = [parameter_count(narrow), torch_macs(narrow, 8)]
        assert costs(removed).tolist() == pytest.approx(expected)
    both = costs(torch.tensor([[0.0, 0, 0], [8, 0, 0]], dtype=torch.float64))
    assert torch.equal(both[0], costs.now)


def test_allowed_cuts_keep_a_multiple_and_the_least_width():
    single, _, double = _groups(_network())  # a convolution of two groups produces the third
    assert (single.units, double.units) == (16, 8)
    assert allowed_cuts(single, least=2, round_to=8) == [0, 8]
    assert allowed_cuts(single, least=10, round_to=1) == [0, 1, 2, 3, 4, 5, 6]
    assert allowed_cuts(double, least=9, round_to=1) == [0, 2, 4, 6]  # one from each of its groups
    assert allowed_cuts(double, least=6, round_to=3) == [0, 4, 10]  # multiples of 2 and of 3


@pytest.mark.parametrize("shares", [(0.2, 0.2), (0.3, None), (None, 0.4), (0.3, 0.45)])
def test_the_chosen_cuts_meet_the_budget_at_nearly_the_least_loss(shares):
    groups, costs = _costs(_network((24, 24, 24)))
    cuts = [allowed_cuts(group, least=4, round_to=1) for group in groups]
    generator = torch.Generator().manual_seed(0)
    losses = [torch.rand(len(cut), generator=generator).cumsum(0) for cut in cuts]
    budget = Budget.removing(costs.now, *shares)
    # A wider range, so that this small network has several choices.
    budget.low -= costs.now * 0.02
    removed = choose_cuts(costs, cuts, losses, budget)
    assert budget.missed(costs(removed), costs.now) == 0
    loss = sum(row[cut.index(int(count))] for row, cut, count in zip(losses, cuts, removed))
    # Against all choices.
    choices = torch.tensor(list(itertools.product(*cuts)), dtype=torch.float64)
    in_budget = budget.missed(costs(choices), costs.now) == 0
    loss_of_each = torch.tensor([sum(parts) for parts in itertools.product(*(row.tolist() for row in losses))])
    assert loss <= loss_of_each[in_budget].min() * 1.001


def test_a_budget_is_a_range_around_the_requested_shares():
    before = torch.tensor([1000.0, 2000.0], dtype=torch.float64)
    budget = Budget.removing(before, 0.2, 0.3)
    assert budget.low.tolist() == pytest.approx([799, 1390])
    assert budget.high.tolist() == pytest.approx([801, 1400])
    assert budget.missed(torch.tensor([800.0, 1395.0]), before) == 0
    assert budget.missed(torch.tensor([811.0, 1420.0]), before).item() == pytest.approx(0.01 + 0.01)
    free = Budget.removing(before, None, 0.3)
    assert (free.low[0], free.high[0]) == (-math.inf, math.inf)


@pytest.mark.parametrize("share", [0.1, 0.2, 0.3, 0.4, 0.6, 0.7, 0.8])
def test_costs_that_are_exactly_those_requested_miss_nothing(share):
    before = torch.tensor([1000.0, 130_000_000_000.0], dtype=torch.float64)
    cost = (before * round(10 * (1 - share)) / 10).round()
    assert Budget.removing(before, None, share).missed(cost, before) == 0


def test_with_many_groups_the_chosen_cuts_are_near_the_optimum():
    """Sixty groups, whose costs are linear in the removed channels and whose losses are quadratic: a known optimum."""
    shares = torch.rand(60, 2, generator=torch.Generator().manual_seed(0)).double()
    shares /= shares.sum(0)

    class Proportional:
        now = torch.ones(2, dtype=torch.float64)

        def __call__(self, removed):
            return self.now - removed / 100 @ shares  # each group has a hundred channels

    cuts = [list(range(0, 91))] * 60
    weights = torch.rand(60, generator=torch.Generator().manual_seed(1)).double() + 0.5
    losses = [weight * (torch.arange(91).double() / 100) ** 2 for weight in weights]
    costs = Proportional()
    budget = Budget.removing(costs.now, 0.3, 0.4)
    removed = choose_cuts(costs, cuts, losses, budget)
    assert budget.missed(costs(removed), costs.now) == 0
    # Least squares under two equations, without blocks and bounds: no choice has a smaller loss.
    spread = shares / weights[:, None]
    target = torch.tensor([0.3 - 0.001, 0.4], dtype=torch.float64)
    best = target @ torch.linalg.solve(shares.T @ spread, target)
    loss = (weights * (removed / 100) ** 2).sum()
    assert best * 0.999 <= loss <= best * 1.011  # a search without the start by exchange rate does not reach this
