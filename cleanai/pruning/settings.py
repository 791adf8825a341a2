"""How a network is pruned, and on which images."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Sequence

from cleanai.data.images import ImageSet

NEAR = 0.02  # the largest distance from a requested share, and at most a tenth of the share that is to remain


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
