"""Several processes on one training, as torchrun starts them: who this process is, and what all must agree on.

Every process runs the same script and comes to the same results; the first one alone prints and writes. PyTorch is
imported where it is needed, so that a script which has nothing to do answers at once.
"""
from __future__ import annotations

import contextlib
import datetime
import os
import sys
from typing import TYPE_CHECKING, Any, Iterator

if TYPE_CHECKING:
    import torch
    from torch import nn


_left = False  # the others have ended, and this process goes on alone


def rank() -> int:
    """The number of this process, 0 for the first or only one."""
    return int(os.environ.get("RANK", "0"))


def processes() -> int:
    """How many processes take part."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def local_rank() -> int:
    """The number of this process on its machine: the GPU it takes."""
    return int(os.environ.get("LOCAL_RANK", "0"))


def local_processes() -> int:
    """How many processes take part on this machine."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", "1"))


def join(device: torch.device) -> None:
    """Meet the other processes, if there are any and that was not done yet."""
    import torch.distributed as dist

    if processes() > 1 and not _left and not dist.is_initialized():
        # The others wait while the first one downloads, which may take hours.
        backend = "nccl" if device.type == "cuda" else "gloo"
        dist.init_process_group(backend, timeout=datetime.timedelta(days=1))


def end_all_but_first() -> None:
    """End every process but the first: what is left to do is measured, printed and written once."""
    global _left
    if processes() > 1 and not _left:
        import torch.distributed as dist

        _left = True
        dist.barrier()
        dist.destroy_process_group()
        if rank() > 0:
            sys.exit(0)


@contextlib.contextmanager
def first_before_others() -> Iterator[None]:
    """A context that the first process goes through before the others enter it: what it wrote is there for them."""
    if _together() and rank() > 0:
        _barrier()
    yield
    if _together() and rank() == 0:
        _barrier()


def agreed(value: Any) -> Any:
    """The first process's value (plain data) in all of them."""
    if not _together():
        return value
    import torch.distributed as dist

    values = [value]
    dist.broadcast_object_list(values)
    return values[0]


def agree_on(network: nn.Module) -> None:
    """Give all processes the first one's weights and buffers."""
    if _together():
        import torch.distributed as dist

        for tensor in network.state_dict().values():
            dist.broadcast(tensor, 0)


def sum_over_processes(tensor: torch.Tensor) -> torch.Tensor:
    """The sum of all processes' tensors, in place."""
    if _together():
        import torch.distributed as dist

        dist.all_reduce(tensor)
    return tensor


def _together() -> bool:
    if processes() == 1:
        return False
    import torch.distributed as dist

    return dist.is_initialized()


def _barrier() -> None:
    import torch.distributed as dist

    dist.barrier()
