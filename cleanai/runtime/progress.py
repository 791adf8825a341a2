"""The one progress bar: drawn on a terminal, silent when the output goes to a file."""
from __future__ import annotations

import contextlib
from typing import Callable, Iterable, Iterator, TypeVar

from tqdm import tqdm

from cleanai.runtime import distributed

Item = TypeVar("Item")

_whole: tqdm | None = None  # the bar of `one_bar`, while there is one


def progress(items: Iterable[Item], title: str, unit: str, total: int | None = None) -> Iterable[Item]:
    """Yield the items under a bar that is gone when they are done; `total` for those that have no length."""
    if _whole is not None:
        _whole.set_postfix_str(title)
        return items
    return _bar(items, desc=title, unit=unit, total=total)


@contextlib.contextmanager
def one_bar(title: str, unit: str, total: int, done: int) -> Iterator[Callable[[], None]]:
    """A bar for work of `total` parts, which yields what ticks one off; `progress` tells on it what is being done."""
    global _whole
    with _bar(desc=title, unit=unit, total=total, initial=done) as _whole:
        try:
            yield _whole.update
        finally:
            _whole = None


def say(line: str) -> None:
    """Print a line, above the bar if there is one."""
    tqdm.write(line)


def _bar(*items: Iterable[Item], **options: object) -> tqdm:
    return tqdm(*items, **options, leave=False, disable=True if distributed.rank() else None)
