"""Progress bars: drawn on a terminal, silent when the output goes to a file."""

from __future__ import annotations

from typing import Any, Iterable, TypeVar

from tqdm import tqdm

from cleanai.runtime import distributed

Item = TypeVar("Item")


def progress(items: Iterable[Item], title: str, unit: str, total: int | None = None) -> Iterable[Item]:
    """Yield the items under a bar that disappears when they are done. `total` is for items without a length."""
    return progress_bar(title, unit, total, iterable=items)


def progress_bar(title: str, unit: str, total: int | None, **options: Any) -> tqdm:
    """A bar to be advanced with `update`; a context manager."""
    disable = True if distributed.rank() else None  # None: draw on terminals only
    return tqdm(desc=title, unit=unit, total=total, leave=False, disable=disable, **options)


def say(line: str) -> None:
    """Print a line above the progress bars."""
    tqdm.write(line)
