"""CleanAI: prunes a network and measures what that cost."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from cleanai.api import measure_sweep, prune
    from cleanai.data.own_images import image_set
    from cleanai.measure.onnx_export import export_onnx
    from cleanai.measure.standalone import save_standalone

__version__ = "1.0.0"
__all__ = ["UserError", "export_onnx", "image_set", "measure_sweep", "prune", "save_standalone"]

# Imported when they are used first: they need PyTorch, which takes seconds.
_MODULES = {
    "export_onnx": "cleanai.measure.onnx_export",
    "image_set": "cleanai.data.own_images",
    "measure_sweep": "cleanai.api",
    "prune": "cleanai.api",
    "save_standalone": "cleanai.measure.standalone",
}


class UserError(Exception):
    """A problem that the user can solve. The message is the one line that a script prints; it says what to do next.

    Line breaks and other control characters in it, as in a name that comes from a file, are escaped.
    """

    def __init__(self, message: str) -> None:
        printable = (each if each.isprintable() else each.encode("unicode_escape").decode() for each in message)
        super().__init__("".join(printable))


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    globals()[name] = getattr(importlib.import_module(_MODULES[name]), name)
    return globals()[name]


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
