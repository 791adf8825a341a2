"""Packages that only some functions need."""

from __future__ import annotations

import importlib.util
import sys
from importlib.metadata import version
from typing import Sequence

from cleanai import UserError

ONNX = ("onnx", "onnxruntime", "onnxscript")  # the extra "onnx" of pyproject.toml

_NEEDED = [  # those of requirements.txt
    *("anyascii", "filelock", "numpy", "PIL", "reportlab", "safetensors", "scipy", "sklearn", "thop"),
    *("torch", "torch_pruning", "torchvision", "tqdm"),
    *(["setuptools"] if sys.version_info >= (3, 12) else []),
]

LEAST_TORCH = (2, 2)  # torch.export with a free batch size


def require_all() -> None:
    """Raise ModuleNotFoundError when a package of the scripts is missing, before the work. Imports none of them."""
    for name in _missing(_NEEDED):
        raise ModuleNotFoundError(f"No module named '{name}'", name=name)


def require_packages(what: str, packages: Sequence[str]) -> None:
    """Raise UserError when `what` needs packages that are not installed."""
    missing = _missing(packages)
    if missing:
        raise UserError(
            f"{what} needs packages that are not installed ({', '.join(missing)}): pip install {' '.join(missing)}"
        )


def _missing(packages: Sequence[str]) -> list[str]:
    return [name for name in packages if importlib.util.find_spec(name) is None]


def require_torch_export(what: str) -> None:
    """Raise UserError when PyTorch is too old for `what`. Does not import it."""
    installed = version("torch")
    if tuple(map(int, installed.split(".")[:2])) < LEAST_TORCH:
        least = ".".join(map(str, LEAST_TORCH))
        raise UserError(f"{what} needs PyTorch {least} or newer, and this is {installed}: pip install --upgrade torch")
