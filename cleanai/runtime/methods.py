"""The pruning methods. Checkpoint names, tables, the comparison and the sweep take them from here.

A new method is a line here and a criterion in `cleanai/pruning/criteria.py`.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Method:
    """A pruning method: `tag` is its short form in checkpoint names, `title` its name in tables and reports."""

    tag: str
    title: str


METHODS = {
    "Coverage": Method("NC", "Neuron Coverage"),
    "Wanda": Method("W", "WANDA"),
}
