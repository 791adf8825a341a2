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
    """Adam, one batch after the other. Nothing is read from the device, so that it never waits.

    Each process takes its share of every batch.
    """

    def __init__(self, network: nn.Module, images: ImageSet, compute: Compute, weight_decay: float = 0.0):
        self._images, self._compute = images, compute
        self._network = _shared(network, compute) if distributed.processes() > 1 else network
        self._settings = {"lr": 0.0, "weight_decay": weight_decay, "fused": compute.device.type == "cuda"}
        self._optimizer = torch.optim.Adam(network.parameters(), **self._settings)
        self._scaler = compute.gradient_scaler()

    def state_dict(self) -> dict[str, Any]:
        """The state, besides the network, from which an interrupted training resumes."""
        return {"optimizer": self._optimizer.state_dict(), "scaler": self._scaler.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Resume from such a state, which may come from another device. ValueError when it does not fit."""
        optimizer = state["optimizer"]
        groups = [{**group, **self._settings} for group in optimizer["param_groups"]]
        self._optimizer.load_state_dict({**optimizer, "param_groups": groups})
        for parameter, averages in self._optimizer.state.items():
            if not all(value.shape in ((), parameter.shape) for value in averages.values()):
                raise ValueError("the optimizer's state is that of another network")
        self._scaler.load_state_dict(state["scaler"])

    def __call__(self, indices: torch.Tensor, moves: torch.Tensor, rate: float) -> tuple[torch.Tensor, torch.Tensor]:
        """Train on the images at `indices` (B,), augmented by `moves` (B, 3), at a learning rate.

        Returns the mean loss and the accuracy before the step, as a share, of this process's images.
        """
        for group in self._optimizer.param_groups:
            group["lr"] = rate
        share = len(indices) // distributed.processes()
        own = slice(distributed.rank() * share, (distributed.rank() + 1) * share)
        inputs, labels = self._images.augmented_batch(indices[own], moves[own])
        with self._compute.autocast():
            outputs = self._network(inputs)
            loss = F.cross_entropy(outputs, labels)
        self._optimizer.zero_grad(set_to_none=True)
        self._scaler.scale(loss).backward()
        self._scaler.step(self._optimizer)
        self._scaler.update()
        return loss.detach(), (outputs.argmax(1) == labels).float().mean()


def _shared(network: nn.Module, compute: Compute) -> nn.Module:
    """A wrapper that trains the tensors of `network` in several processes as if they were one."""
    tensors = {id(tensor): tensor for tensor in (*network.parameters(), *network.buffers())}
    twin = copy.deepcopy(network, tensors)
    if compute.device.type == "cuda":
        twin = nn.SyncBatchNorm.convert_sync_batchnorm(twin)
    else:
        for module in twin.modules():
            if type(module) is nn.BatchNorm2d:
                module.__class__ = _SyncBatchNorm  # torch's own is for GPUs only
    parallel = nn.parallel.DistributedDataParallel
    # Its buffers agree by themselves. The newest PyTorch calls this option by another name.
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
    """A sum over the processes, and in the backward pass the sum of their gradients."""

    @staticmethod
    def forward(ctx: Any, values: torch.Tensor) -> torch.Tensor:
        return distributed.sum_over_processes(values.clone().contiguous())

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> torch.Tensor:
        return distributed.sum_over_processes(gradient.clone().contiguous())
