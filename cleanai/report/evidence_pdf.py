"""Sections of a pruning script's PDF that an older record may lack; they are left out then."""

from __future__ import annotations

from typing import Any

from reportlab.platypus import Spacer

from cleanai.report.drawing import WIDTH
from cleanai.report.page import section, table, text
from cleanai.report.run_text import deployed_rows
from cleanai.report.wording import STAGES, Record, changed_predictions, robustness_means, with_change


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


def robustness(record: Record) -> list[Any]:
    """The accuracy of the networks on disturbed images, by corruption."""
    if "robustness" not in record:
        return []
    measured = record["robustness"]
    rows = [["Corruption", *STAGES.values(), "Change (points)"]]
    for row in measured["rows"]:
        name = f"{row['corruption']}, {row['level']}" if row["level"] else "None: the images as they are"
        rows.append([name, *with_change([row[f"{stage}_percent"] for stage in STAGES])])
    rows.append(["Mean of the corruptions", *with_change(list(robustness_means(record).values()))])
    return section(
        "Accuracy on disturbed images",
        text(
            f"Accuracy (%) on {measured['images']:,} held-out test images, balanced over the classes; one image is "
            f"{100 / measured['images']:.2g} points. Pruning made the network less robust where a change is clearly "
            "below that of the first row. Mild and strong are levels 1 and 5 of CIFAR-10-C."
        ),
        Spacer(1, 4),
        table(rows, [WIDTH * share for share in (0.36, 0.16, 0.16, 0.18, 0.14)]),
    )


def deployed(record: Record) -> list[Any]:
    """The exported network beside PyTorch's, on all held-out images."""
    rows = deployed_rows(record)
    if not rows:
        return []
    export = record["export"]
    images = f"All {export['heldout_images']:,} held-out test images"
    note = f"{images}, in PyTorch and in ONNX Runtime {export['onnxruntime']}."
    if "int8" in export:
        note += (
            " INT8: weights and activations have 8 bits; the ranges of activations are those of "
            f"{export['int8']['calibration_images']:,} calibration images. How fast that is depends on the processor."
        )
    columns = len(rows[0]) - 1
    return section(
        "Deployed network", text(note), Spacer(1, 4), table(rows, [WIDTH * 0.4, *[WIDTH * 0.6 / columns] * columns])
    )
