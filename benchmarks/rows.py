"""The rows of an interrupted benchmark, in a CSV file."""

from __future__ import annotations

import csv
import io
import statistics
from pathlib import Path
from typing import Sequence

from cleanai import UserError
from cleanai.runtime.files import write_bytes


def known_rows(path: Path, facts: dict[str, str], fresh: bool) -> list[dict[str, str]]:
    """The rows of an earlier run, none with `fresh`; UserError when it was about other `facts`."""
    rows = [] if fresh or not path.exists() else read_rows(path)
    if any({key: row.get(key) for key in facts} != facts for row in rows):
        raise UserError(f"{path} was measured with another network, other images or settings: start over with --fresh")
    return rows


def read_rows(path: Path) -> list[dict[str, str]]:
    """The rows of an earlier run."""
    with path.open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def mean_and_spread(values: Sequence[float], decimals: int) -> str:
    """The mean, and the standard deviation in brackets where there are several values."""
    spread = f" ({statistics.stdev(values):.{decimals}f})" if len(values) > 1 else ""
    return f"{statistics.mean(values):.{decimals}f}{spread}"


def write_rows(path: Path, rows: list[dict[str, str]]) -> None:
    """Write all rows, over those of an earlier run."""
    text = io.StringIO(newline="")
    writer = csv.DictWriter(text, rows[0], lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    write_bytes(path, text.getvalue().encode("utf-8"))
