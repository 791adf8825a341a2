"""How many predictions pruning changed: two networks of the same accuracy may be wrong on different images."""

from __future__ import annotations

from typing import Any, Sequence

import torch

from cleanai.data.images import ImageSet
from cleanai.network.evaluation import Evaluation

MOST_CONFUSIONS = 5


def count_changes(
    before: Evaluation, after: Evaluation, images: ImageSet, indices: torch.Tensor, classes: Sequence[str]
) -> dict[str, Any]:
    """The predictions that differ between two evaluations of `images`, counted on those at `indices`.

    Returns `images`, `changed`, `changed_percent`; of the changed ones `right_to_wrong`, `wrong_to_right` and
    `wrong_to_other_wrong`; and `confusions`: the pairs of a true and a predicted class whose number grew most, each
    with `class`, `predicted`, and its numbers `before` and `after`.
    """
    labels = images.labels.cpu()[indices]
    old, new = (each.predicted[indices].long() for each in (before, after))
    changed, was_right, is_right = old != new, old == labels, new == labels
    count = len(classes)
    tables = [torch.bincount(labels * count + each, minlength=count**2).reshape(count, count) for each in (old, new)]
    growth = (tables[1] - tables[0]).fill_diagonal_(0)
    most = growth.flatten().argsort(descending=True, stable=True)[:MOST_CONFUSIONS].tolist()
    pairs = [divmod(pair, count) for pair in most]
    return {
        "images": len(indices),
        "changed": int(changed.sum()),
        "changed_percent": 100 * int(changed.sum()) / len(indices),
        "right_to_wrong": int((was_right & ~is_right).sum()),
        "wrong_to_right": int((~was_right & is_right).sum()),
        "wrong_to_other_wrong": int((changed & ~was_right & ~is_right).sum()),
        "confusions": [
            {
                "class": classes[true],
                "predicted": classes[predicted],
                "before": int(tables[0][true, predicted]),
                "after": int(tables[1][true, predicted]),
            }
            for true, predicted in pairs
            if growth[true, predicted] > 0
        ],
    }
