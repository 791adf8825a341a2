"""Sections of a pruning script's PDF that an older record may lack; they are left out then."""

from __future__ import annotations

from typing import Any

from reportlab.platypus import Spacer

from cleanai.report.charts import WIDTH
from cleanai.report.page import section, table, text
from cleanai.report.wording import Record, changed_predictions


def changes(record: Record) -> list[Any]:
    """The predictions that pruning changed, and the confusions that grew most."""
    sentences = changed_predictions(record)
    if not sentences:
        return []
    confusions = record["churn"]["confusions"]
    rows = [["Confusion on held-out images", "Original (images)", "Final (images)", "Change"]]
    rows += [
        [
            f"{row['class']}, predicted {row['predicted']}",
            f"{row['before']:,}",
            f"{row['after']:,}",
            f"{row['after'] - row['before']:+,}",
        ]
        for row in confusions
    ]
    grown = [Spacer(1, 4), table(rows, [WIDTH * share for share in (0.4, 0.2, 0.2, 0.2)])] if confusions else []
    return section("Changed predictions", *map(text, sentences), *grown)
