"""One training step, alone or shared by several processes."""

from __future__ import annotations

import contextlib
import copy
import inspect
from dataclasses import dataclass
from typing import Any, Callable, Iterator

import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from cleanai import UserError
from cleanai.data.images import ImageSet
from cleanai.runtime import distributed
from cleanai.runtime.compute import Compute
from cleanai.runtime.files import one_line
from cleanai.runtime.memory import is_shortage

TEMPERATURE = 4.0  # of distillation


@dataclass(frozen=True)
class Teacher:
    """The network whose outputs a training approximates, and the `weight` (0 to 1) of this part of the loss."""

    network: nn.Module
    weight: float


class TrainingStep:
    """Adam, one batch after the other. Nothing is read from the device, so that it never waits.

    Each process takes its share of every batch. With `compute.compiled` the passes through the network are compiled.
    With a `teacher` the loss is (1 - weight) of the cross-entropy and `weight` of the distillation: T^2 times the
    divergence of the softened outputs from the teacher's, T being `TEMPERATURE` (Hinton et al. 2015, arXiv 1503.02531).
    """

    def __init__(
        self,
        network: nn.Module,
        images: ImageSet,
        compute: Compute,
        weight_decay: float = 0.0,
        teacher: Teacher | None = None,
    ):
        self._images, self._compute, self._teacher = images, compute, teacher
        if teacher:
            teacher.network.eval()
        self._network = _shared(network) if distributed.processes() > 1 else network
        # Before PyTorch 2.2 fused Adam refuses the gradients of depthwise convolutions in channels-last order.
        fused = True if compute.device.type == "cuda" and torch.__version__ >= (2, 2) else None
        self._optimizer = torch.optim.Adam(network.parameters(), lr=0.0, weight_decay=weight_decay, fused=fused)
        self._scaler = compute.gradient_scaler()
        self._judge = _compiled(self._loss_and_accuracy) if compute.compiled else self._loss_and_accuracy
        self._explain_failures = _explained if compute.compiled else contextlib.nullcontext

    def state_dict(self) -> dict[str, Any]:
        """The state, besides the network, from which an interrupted training resumes."""
        return {"optimizer": self._optimizer.state_dict(), "scaler": self._scaler.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Resume from such a state, which may come from another device. ValueError when it does not fit."""
        optimizer = state["optimizer"]
        (own,) = self._optimizer.state_dict()["param_groups"]  # its settings suit the device
        groups = [{**own, "params": group["params"]} for group in optimizer["param_groups"]]
        # PyTorch 2.0 gives the number of steps the shape (1,) on a GPU.
        averages = {key: {**each, "step": _scalar(each["step"])} for key, each in optimizer["state"].items()}
        self._optimizer.load_state_dict({**optimizer, "state": averages, "param_groups": groups})
        for parameter, loaded in self._optimizer.state.items():
            if not all(value.shape == (() if name == "step" else parameter.shape) for name, value in loaded.items()):
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
        with self._compute.repeated_shapes(), self._explain_failures():
            self._optimizer.zero_grad(set_to_none=True)
            loss, accuracy = self._judge(inputs, labels, self._softened(inputs))
            self._scaler.scale(loss).backward()
        self._scaler.step(self._optimizer)
        self._scaler.update()
        return loss.detach(), accuracy

    def _softened(self, inputs: torch.Tensor) -> torch.Tensor | None:
        """The teacher's probabilities, softened: (B, classes)."""
        if self._teacher is None:
            return None
        with torch.no_grad(), self._compute.autocast():
            return F.softmax(self._teacher.network(inputs).float() / TEMPERATURE, 1)

    def _loss_and_accuracy(
        self, inputs: torch.Tensor, labels: torch.Tensor, softened: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        with self._compute.autocast():
            outputs = self._network(inputs)
            loss = F.cross_entropy(outputs, labels)
        if softened is not None and self._teacher is not None:
            own = F.log_softmax(outputs.float() / TEMPERATURE, 1)
            distilled = TEMPERATURE**2 * F.kl_div(own, softened, reduction="batchmean")
            loss = (1 - self._teacher.weight) * loss + self._teacher.weight * distilled
        return loss, (outputs.argmax(1) == labels).float().mean()


def _scalar(values: torch.Tensor) -> torch.Tensor:
    return values[0] if values.shape == (1,) else values


def _compiled(passes: Callable[..., Any]) -> Callable[..., Any]:
    """The same, compiled when it runs first; on a GPU it becomes CUDA graphs. UserError where that does not work."""
    torch.compiler.reset()  # or former networks count against a limit, beyond which nothing more is compiled
    try:
        return torch.compile(passes, mode="reduce-overhead")
    except RuntimeError as error:  # on this system, or with this Python
        raise UserError(f"torch.compile does not work here ({one_line(error)}): leave out --compile") from error


@contextlib.contextmanager
def _explained() -> Iterator[None]:
    """A context for a compiled step. UserError when it cannot be compiled."""
    torch.compiler.cudagraph_mark_step_begin()  # the outputs of the step before are not needed any more
    try:
        yield
    except torch._dynamo.exc.TorchDynamoException as error:
        if is_shortage(error):
            raise
        raise UserError(f"The network cannot be compiled ({one_line(error)[:200]}): leave out --compile") from error


def _shared(network: nn.Module) -> nn.Module:
    """A wrapper that trains the tensors of `network` in several processes as if they were one.

    Raises UserError for a batch norm of its own kind, which would only see the images of one process.
    """
    tensors = {id(tensor): tensor for tensor in (*network.parameters(), *network.buffers())}
    twin = copy.deepcopy(network, tensors)
    for name, module in twin.named_modules():
        if type(module) in (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm):
            module.__class__ = _SyncBatchNorm
        elif isinstance(module, _BatchNorm):
            raise UserError(f"{name}, a {type(module).__name__}, cannot be trained by several processes: use one")
    parallel = nn.parallel.DistributedDataParallel
    # Its buffers agree by themselves. The newest PyTorch calls this option by another name.
    renamed = "forward_sync_buffers" in inspect.signature(parallel).parameters
    return parallel(twin.train(), **{"forward_sync_buffers" if renamed else "broadcast_buffers": False})


class _SyncBatchNorm(_BatchNorm):
    """Batch norm over the images of all processes. torch's own is for GPUs only, and waits for them in every pass."""

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        """Normalise (B, C, ...) by the statistics of all processes' batches together."""
        if not self.training and self.running_mean is not None:
            return super().forward(inputs)
        over = [dim for dim in range(inputs.ndim) if dim != 1]
        each = (-1, *[1] * (inputs.ndim - 2))  # (C, 1, ...)
        count = inputs.numel() // inputs.shape[1] * distributed.processes()
        with torch.autocast(inputs.device.type, enabled=False):
            values = inputs.float()
            mean = _SumOverProcesses.apply(values.sum(over)) / count
            centred = values - mean.view(each)
            variance = _SumOverProcesses.apply(centred.square().sum(over)) / count
            if self.training and self.running_mean is not None:
                self._track(mean.detach(), variance.detach() * count / max(1, count - 1))
            normalised = centred * (variance + self.eps).rsqrt().view(each)
            if self.affine:
                normalised = normalised * self.weight.view(each) + self.bias.view(each)
            return normalised.to(inputs.dtype)

    def _track(self, mean: torch.Tensor, variance: torch.Tensor) -> None:
        self.num_batches_tracked.add_(1)
        share = 1 / self.num_batches_tracked.float() if self.momentum is None else self.momentum
        self.running_mean.lerp_(mean, share)
        self.running_var.lerp_(variance, share)

    def _check_input_dim(self, inputs: torch.Tensor) -> None:
        """Any number of dimensions."""


class _SumOverProcesses(torch.autograd.Function):
    """A sum over the processes, and in the backward pass the sum of their gradients."""

    @staticmethod
    def forward(ctx: Any, values: torch.Tensor) -> torch.Tensor:
        return distributed.sum_over_processes(values.clone().contiguous())

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> torch.Tensor:
        return distributed.sum_over_processes(gradient.clone().contiguous())
