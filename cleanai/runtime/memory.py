"""Shortages of memory, under all the names that they have. PyTorch is not imported."""

from __future__ import annotations

import re

# What PyTorch, CUDA and their libraries say when an allocation failed. A library that cannot make its handle or find an
# algorithm rarely says that memory was the reason.
_MESSAGES = re.compile(
    r"out of memory|out_of_memory|(can't|cannot) allocate memory|not enough memory|bad allocation|MemoryAllocation"
    r"|ALLOC(ATION)?_FAILED|CU(BLAS|SOLVER|DNN|SPARSE)_STATUS_NOT_INITIALIZED|CU(DNN|SOLVER)_STATUS_INTERNAL_ERROR"
    r"|unable to find an engine to execute|unable to find a valid cudnn algorithm",
    re.IGNORECASE,
)


def is_shortage(error: BaseException) -> bool:
    """Whether an error means that memory ran out, of the machine or of a GPU.

    PyTorch raises most of these as a RuntimeError, so `except RuntimeError` also catches them.
    """
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":
        return True
    return isinstance(error, RuntimeError) and _MESSAGES.search(str(error)) is not None
