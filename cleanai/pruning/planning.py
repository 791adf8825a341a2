"""The plan for the whole way: which shares can be met, and how many channels each group loses."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Sequence

import torch

from cleanai import UserError
from cleanai.pruning.groups import Group
from cleanai.pruning.settings import NEAR, PruneSettings
from cleanai.pruning.widths import Budget, Costs, allowed_cuts, choose_cuts
from cleanai.runtime.progress import say


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
class Plan:
    """The shares of both costs that are to be removed, and how.

    `shares` are the requested ones, or the nearest that can be met where the settings allow these; `goal` the budget
    for them. `multiple` is the first number in `round_to` that can meet it, and `removed` (G,) the channels that the
    groups lose then.
    """

    shares: Sequence[float | None]
    goal: Budget
    multiple: int
    removed: torch.Tensor


def make_plan(groups: list[Group], costs: Costs, least: dict[str, int], settings: PruneSettings) -> Plan:
    """Plan the whole way. `least` is the number of channels that each group keeps, by name. Raises BudgetMissed."""
    planner = _Planner(groups, costs, least, settings)
    plan = planner.plan((settings.ratio, settings.macs_ratio))
    if plan.goal.missed(costs(plan.removed), costs.now) == 0:
        return plan
    return planner.plan(planner.nearest_shares(plan))


class _Planner:
    """Tries budgets on a network's groups."""

    def __init__(self, groups: list[Group], costs: Costs, least: dict[str, int], settings: PruneSettings) -> None:
        self._groups, self._costs, self._least, self._settings = groups, costs, least, settings

    def plan(self, shares: Sequence[float | None]) -> Plan:
        """The plan for these shares, which may miss them."""
        goal = Budget.removing(self._costs.now, *shares)
        return Plan(shares, goal, *self._cuts(goal, self._settings.round_to))

    def _cuts(self, goal: Budget, round_to: Sequence[int]) -> tuple[int, torch.Tensor]:
        """The first multiple in `round_to` that can meet the goal, or comes nearest to it, and cuts (G,) that do so."""
        plans = []
        for multiple in round_to:
            cuts = [allowed_cuts(group, self._least[group.name], multiple) for group in self._groups]
            planned = choose_cuts(self._costs, cuts, [torch.zeros(len(cut)) for cut in cuts], goal)
            plans.append((goal.missed(self._costs(planned), self._costs.now).item(), multiple, planned))
            if plans[-1][0] == 0:
                break
        return min(plans, key=lambda plan: plan[0])[1:]

    def nearest_shares(self, plan: Plan) -> Sequence[float | None]:
        """The nearest shares that can be met, where a plan misses its goal.

        Raises BudgetMissed when the settings do not allow them, or there are none near the requested ones.
        """
        missed = self._missed(plan)
        if not self._settings.nearest or not _are_near(plan.shares, missed.shares):
            raise missed
        say(f"Not exactly possible in this network; the nearest: {missed.nearest}")
        return missed.shares

    def _missed(self, plan: Plan) -> BudgetMissed:
        """The error for a plan that misses its goal, with shares that were tried and can be met."""
        asked, costs = plan.shares, self._costs

        def nearest(shares: Sequence[float | None], round_to: Sequence[int]) -> tuple[bool, list[float]]:
            goal = Budget.removing(costs.now, *shares)
            cost = costs(self._cuts(goal, round_to)[1])
            return goal.missed(cost, costs.now).item() == 0, (1 - cost / costs.now).tolist()

        removed = (1 - costs(plan.removed) / costs.now).tolist()
        parameters, macs = (100 * share for share in removed)
        possible, near = [], None
        for _ in range(5):  # the search is no exhaustive one: it may not find again what it found for another goal
            # Fewer MACs than requested are not allowed to be removed: round down.
            shares = [None if share is None else near for share, near in zip(asked, _rounded(removed))]
            if 0 in shares:
                break
            met, removed = nearest(shares, self._settings.round_to)
            if met:
                possible.append(_shares_text(shares))
                near = shares
                break
        if None not in asked:
            possible += [
                _shares_text(shares)
                for shares in ([asked[0], None], [None, asked[1]])
                if nearest(shares, self._settings.round_to)[0]
            ]
        if 1 not in self._settings.round_to and nearest(asked, [1])[0]:
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
