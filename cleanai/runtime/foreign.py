"""Code of others, such as a network of the user's, a pickle or an exporter."""

from __future__ import annotations

import contextlib
from typing import Callable, Iterator

from cleanai import UserError
from cleanai.runtime.memory import is_shortage


@contextlib.contextmanager
def foreign_code(
    explain: Callable[[BaseException], UserError], passing: tuple[type[BaseException], ...] = ()
) -> Iterator[None]:
    """A context for code that may raise anything: it becomes the error that `explain` makes of it.

    A UserError, a shortage of memory, an operation that --deterministic forbids, and the errors in `passing` are raised
    as they are.
    """
    try:
        yield
    except (Exception, SystemExit) as error:
        if isinstance(error, (UserError, *passing)) or is_shortage(error):
            raise
        if "does not have a deterministic implementation" in str(error):
            raise
        raise explain(error) from error
