"""One training step, alone or shared by several processes."""
from __future__ import annotations

import copy
import inspect
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from cleanai.data.images import ImageSet
from cleanai.runtime import distributed
from cleanai.runtime.compute import Compute


class TrainingStep:
    """Adam on one batch after the other; nothing is read from the device, so that it never waits.

    Of every batch each process takes its share.
    """

    def __init__(self, network: nn.Module, images: ImageSet, compute: Compute, weight_decay: float = 0.0):
        self._images, self._compute = images, compute
        self._network = _shared(network, compute) if distributed.processes() > 1 else network
        self._settings = {"lr": 0.0, "weight_decay": weight_decay, "fused": compute.device.type == "cuda"}
        self._optimizer = torch.optim.Adam(network.parameters(), **self._settings)
        self._scaler = compute.gradient_scaler()

    def state_dict(self) -> dict[str, Any]:
        """What an interrupted training goes on from, beside the network."""
        return {"optimizer": self._optimizer.state_dict(), "scaler": self._scaler.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from such a state, which may have been left on another device; ValueError when it does not fit."""
        optimizer = state["optimizer"]
        groups = [{**group, **self._settings} for group in optimizer["param_groups"]]
        self._optimizer.load_state_dict({**optimizer, "param_groups": groups})
        for parameter, held in self._optimizer.state.items():
            if not all(value.shape in ((), parameter.shape) for value in held.values()):
                raise ValueError("the optimizer's state is that of another network")
        self._scaler.load_state_dict(state["scaler"])

    def __call__(self, indices: torch.Tensor, moves: torch.Tensor, rate: float) -> tuple[torch.Tensor, torch.Tensor]:
        """Learn from the images at `indices` (B,), moved by `moves` (B, 3), at a learning rate.

        Returns the mean loss and the share recognised before the step, of this process's images.
        """
        for group in self._optimizer.param_groups:
            group["lr"] = rate
        share = len(indices) // distributed.processes()
        mine = slice(distributed.rank() * share, (distributed.rank() + 1) * share)
        inputs, labels = self._images.augmented_batch(indices[mine], moves[mine])
        with self._compute.autocast():
            outputs = self._network(inputs)
            loss = F.cross_entropy(outputs, labels)
        self._optimizer.zero_grad(set_to_none=True)
        self._scaler.scale(loss).backward()
        self._scaler.step(self._optimizer)
        self._scaler.update()
        return loss.detach(), (outputs.argmax(1) == labels).float().mean()



def _shared(network: nn.Module, compute: Compute) -> nn.Module:
    """A form of the network that trains the very same tensors in several processes as if they were one."""
    tensors = {id(tensor): tensor for tensor in (*network.parameters(), *network.buffers())}
    twin = copy.deepcopy(network, tensors)
    if compute.device.type == "cuda":
        twin = nn.SyncBatchNorm.convert_sync_batchnorm(twin)
    else:
        for module in twin.modules():
            if type(module) is nn.BatchNorm2d:
                module.__class__ = _SyncBatchNorm  # torch's own is for GPUs alone
    parallel = nn.parallel.DistributedDataParallel
    # Its buffers agree by themselves; the newest PyTorch calls this option by another name.
    renamed = "forward_sync_buffers" in inspect.signature(parallel).parameters
    return parallel(twin.train(), **{"forward_sync_buffers" if renamed else "broadcast_buffers": False})


class _SyncBatchNorm(nn.BatchNorm2d):
    """Batch norm over the images of all processes."""

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        """Normalise (B, C, H, W) by the statistics of all processes' batches together."""
        if not self.training:
            return super().forward(inputs)
        over, count = (0, 2, 3), inputs[:, 0].numel() * distributed.processes()
        with torch.autocast(inputs.device.type, enabled=False):
            values = inputs.float()
            mean = _SumOverProcesses.apply(values.sum(over)) / count
            centred = values - mean[:, None, None]
            variance = _SumOverProcesses.apply(centred.square().sum(over)) / count
            with torch.no_grad():
                self.running_mean.lerp_(mean, self.momentum)
                self.running_var.lerp_(variance * count / (count - 1), self.momentum)
                self.num_batches_tracked.add_(1)
            scale = self.weight * (variance + self.eps).rsqrt()
            return (centred * scale[:, None, None] + self.bias[:, None, None]).to(inputs.dtype)


class _SumOverProcesses(torch.autograd.Function):
    """A sum that every process gets, and whose gradient is the sum of what they all make of it."""

    @staticmethod
    def forward(ctx: Any, values: torch.Tensor) -> torch.Tensor:
        return distributed.sum_over_processes(values.clone().contiguous())

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> torch.Tensor:
        return distributed.sum_over_processes(gradient.clone().contiguous())
