"""Several processes on one training, as torchrun starts them.

Every process runs the same script and reaches the same results; only the first one prints and writes. PyTorch is
imported where it is needed, so that a finished script answers at once.
"""

from __future__ import annotations

import contextlib
import datetime
import inspect
import os
import sys
from typing import TYPE_CHECKING, Any, Iterator

from cleanai import UserError

if TYPE_CHECKING:
    import torch
    from torch import nn

_alone = False  # the other processes have ended


def rank() -> int:
    """The number of this process, 0 for the first or only one."""
    return int(os.environ.get("RANK", "0"))


def processes() -> int:
    """The number of processes."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def local_rank() -> int:
    """The number of this process on its machine, and of its GPU."""
    return int(os.environ.get("LOCAL_RANK", "0"))


def local_processes() -> int:
    """The number of processes on this machine."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", "1"))


def join(device: torch.device) -> None:
    """Join the other processes, if there are any, once. UserError when PyTorch cannot join those of several GPUs."""
    if processes() > 1 and not _alone and not _dist().is_initialized():
        on_gpu = device.type == "cuda"
        if on_gpu and not _dist().is_nccl_available():
            raise UserError(
                "Several GPUs need NCCL, which PyTorch has on Linux only: start the script without torchrun, or with "
                "--device cpu"
            )
        takes_device = "device_id" in inspect.signature(_dist().init_process_group).parameters  # PyTorch 2.3
        own_gpu = {"device_id": device} if on_gpu and takes_device else {}
        # The others wait while the first one downloads, which may take hours.
        _dist().init_process_group("nccl" if on_gpu else "gloo", timeout=datetime.timedelta(days=1), **own_gpu)


def end_all_but_first() -> None:
    """End every process but the first, which measures, prints and writes."""
    global _alone
    if processes() > 1 and not _alone:
        _alone = True
        _dist().barrier()
        _dist().destroy_process_group()
        if rank() > 0:
            sys.exit(0)


@contextlib.contextmanager
def first_before_others() -> Iterator[None]:
    """A context that the first process completes before the others enter it: they find what it wrote.

    When the first one fails in it, the others end.
    """
    if rank() > 0 and not agreed(True):
        sys.exit(1)  # the first one says why
    completed = False
    try:
        yield
        completed = True
    finally:
        if rank() == 0:
            agreed(completed)


def agreed(value: Any) -> Any:
    """The first process's value (plain data) in all of them."""
    values = [value]
    if _together():
        _dist().broadcast_object_list(values)
    return values[0]


def agree_on(network: nn.Module) -> None:
    """Give all processes the first one's weights and buffers."""
    if _together():
        for tensor in network.state_dict().values():
            _dist().broadcast(tensor, 0)


def sum_over_processes(tensor: torch.Tensor) -> torch.Tensor:
    """The sum of all processes' tensors, in place."""
    if _together():
        _dist().all_reduce(tensor)
    return tensor


def _together() -> bool:
    return processes() > 1 and _dist().is_initialized()


def _dist() -> Any:
    import torch.distributed

    return torch.distributed
