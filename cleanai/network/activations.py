"""The inputs of convolutions and linear layers: hooks to observe them, and their statistics per channel."""

from __future__ import annotations

import contextlib
import math
from collections import Counter
from dataclasses import dataclass
from typing import Callable, Iterable, Iterator, Sequence

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle

from cleanai import UserError
from cleanai.data.images import ImageSet
from cleanai.runtime.compute import Compute
from cleanai.runtime.memory import is_shortage

CONSUMERS = (nn.modules.conv._ConvNd, nn.Linear)
# The recorded means. PyTorch sums signs five times as fast as truth values.
MOMENTS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "mean_absolute": torch.abs,
    "frequency": lambda values: values.sign().clamp_min_(0),  # the share of values above zero
    "second_moment": torch.square,
}


@dataclass
class ChannelStatistics:
    """Means over all images and positions of the inputs of one layer, per channel: each (C,) float64, if recorded."""

    mean_absolute: torch.Tensor | None = None
    frequency: torch.Tensor | None = None
    second_moment: torch.Tensor | None = None

    @property
    def normalized_mean(self) -> torch.Tensor:
        """`mean_absolute` over its maximum in the layer (C,), in [0, 1]; zeros for a layer without any input."""
        return divide(self.mean_absolute, self.mean_absolute.max())


def divide(values: torch.Tensor, total: torch.Tensor) -> torch.Tensor:
    """`values / total`, and zeros where the total is zero."""
    return torch.where(total > 0, values / total, torch.zeros_like(values))


def record_statistics(
    network: nn.Module,
    images: ImageSet,
    compute: Compute,
    title: str = "Measuring channels",
    moments: Sequence[str] = tuple(MOMENTS),
) -> dict[nn.Module, ChannelStatistics]:
    """Run `images` through `network` and return the `moments` of the inputs of each convolution and linear layer.

    These inputs come after batch norm, activation and residual addition. Sums are streamed: memory does not grow with
    the images, and the batch size does not matter. The network runs in evaluation mode and keeps its mode, buffers and
    hooks. Raises UserError when a mean is not finite.
    """
    layers = [module for module in network.modules() if isinstance(module, CONSUMERS)]
    if not moments:
        return {layer: ChannelStatistics() for layer in layers}
    sums: dict[nn.Module, torch.Tensor] = {}  # (moments, C)
    counts: dict[nn.Module, int] = {}

    def add(layer: nn.Module, values: torch.Tensor) -> None:
        channel = values.ndim - 1 if isinstance(layer, nn.Linear) else 1
        others = [dim for dim in range(values.ndim) if dim != channel]
        of_batch = torch.stack([MOMENTS[name](values).sum(others) for name in moments])
        sums[layer] = sums.get(layer, 0) + of_batch.double()  # float64 over the batches
        counts[layer] = counts.get(layer, 0) + values.numel() // values.shape[channel]

    observe(network, layers, add, images, compute, title)
    if not all(total.isfinite().all() for total in sums.values()):
        raise not_finite()
    means = {layer: (total / counts[layer]).cpu().clone() for layer, total in sums.items()}
    return {layer: ChannelStatistics(**dict(zip(moments, mean))) for layer, mean in means.items()}


# Seven parameters: network, images and compute say what runs, the others what is observed.
def observe(
    network: nn.Module,
    layers: Iterable[nn.Module],
    callback: Callable[[nn.Module, torch.Tensor], None],
    images: ImageSet,
    compute: Compute,
    title: str,
    output: bool = False,
) -> None:
    """Run `images` through `network` and call `callback` with each of `layers` and its input, batch by batch.

    With `output` it is also called with the network and its output. Values are float32 in any precision, and so is
    the arithmetic in the callback. The network runs in evaluation mode and keeps its mode and hooks.

    A batch for which memory is too short is halved, as often as needed. No call is repeated, so the callback may add
    up; one that raises must not have changed anything yet.
    """
    most = math.inf  # images that pass at once
    calls: Counter[nn.Module] = Counter()  # in this pass
    done: Counter[nn.Module] = Counter()  # with these images, also in a pass that ran out of memory

    def call(module: nn.Module, values: torch.Tensor) -> None:
        calls[module] += 1
        if calls[module] > done[module]:
            with torch.autocast(values.device.type, enabled=False):
                callback(module, values.float())
            done[module] += 1

    def run(inputs: torch.Tensor, done_before: Counter[nn.Module]) -> None:
        nonlocal most
        if len(inputs) <= most:
            calls.clear()
            done.clear()
            done.update(done_before)
            try:
                with compute.autocast():
                    network(inputs)
                return
            except (MemoryError, RuntimeError) as error:
                if len(inputs) == 1 or not is_shortage(error):
                    raise
            most, done_before = (len(inputs) + 1) // 2, done.copy()
            torch.cuda.empty_cache()  # nothing is left of the failed pass, as its error is gone
        for half in inputs.chunk(2):
            run(half, done_before)

    was_training = network.training
    network.eval()
    hooks = [layer.register_forward_pre_hook(lambda layer, args: call(layer, args[0])) for layer in layers]
    if output:
        hooks.append(network.register_forward_hook(lambda network, args, outputs: call(network, outputs)))
    try:
        with removed_afterwards(hooks), torch.inference_mode():
            for inputs, _ in images.batches_for(compute, title):
                run(inputs, Counter())
    finally:
        network.train(was_training)


@contextlib.contextmanager
def removed_afterwards(hooks: Iterable[RemovableHandle]) -> Iterator[None]:
    """A context after which these hooks are gone."""
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def not_finite() -> UserError:
    """The error for a network whose activations are not finite."""
    return UserError(
        "The network computes values that are not finite numbers: its weights are damaged, or in float16 its values "
        "are too large (use --precision float32)"
    )


def has_finite_weights(network: nn.Module) -> bool:
    """Whether parameters and the statistics of batch norm are finite. Other buffers may hold infinity, as masks do."""
    norms = [module for module in network.modules() if isinstance(module, nn.modules.batchnorm._NormBase)]
    tensors = [*network.parameters(), *(buffer for norm in norms for buffer in norm.buffers(recurse=False))]
    return all(bool(tensor.isfinite().all()) for tensor in tensors)
