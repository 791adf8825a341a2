"""The one progress bar: drawn on a terminal, silent when the output goes to a file."""
from __future__ import annotations

from typing import Iterable, TypeVar

from tqdm import tqdm

from cleanai import distributed

Item = TypeVar("Item")


def progress(items: Iterable[Item], title: str, unit: str, total: int | None = None) -> Iterable[Item]:
    """Yield the items under a bar that is gone when they are done; `total` for those that have no length."""
    return tqdm(items, desc=title, unit=unit, total=total, leave=False, disable=True if distributed.rank() else None)
