"""Statistics of what reaches the layers that read channels: per channel, and between channels."""
from __future__ import annotations

from dataclasses import dataclass
from typing import Callable, Iterable, Sequence

import torch
from torch import nn

from cleanai import UserError
from cleanai.data.images import ImageSet
from cleanai.runtime.compute import Compute

CONSUMERS = (nn.Conv2d, nn.ConvTranspose2d, nn.Linear)
NO_CHANNELS = torch.tensor([], dtype=torch.long)
ROWS = 2**14  # of a layer's inputs: 32 for each of 512 channels
WINDOWS = 2**13  # of what a convolution's kernel sees
ROWS_PER_WEIGHT = 4  # fewer, and least squares learns the images by heart; 3 was slower and no better
# What is averaged. Frequency is the share of values above zero: PyTorch sums signs five times as fast as truth values.
MOMENTS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "mean_absolute": torch.abs,
    "frequency": lambda values: values.sign().clamp_min_(0),
    "second_moment": torch.square,
}


@dataclass
class ChannelStatistics:
    """Means over all images and positions of what reaches one layer, per channel: each (C,) float64, if recorded."""

    mean_absolute: torch.Tensor | None = None
    frequency: torch.Tensor | None = None
    second_moment: torch.Tensor | None = None


def record_statistics(
    network: nn.Module,
    images: ImageSet,
    compute: Compute,
    title: str = "Measuring channels",
    moments: Sequence[str] = tuple(MOMENTS),
) -> dict[nn.Module, ChannelStatistics]:
    """Run `images` through `network` and return `moments` of what each convolution and linear layer received.

    The input of a layer is what its channels are worth to it: after batch norm, activation and residual addition. The
    sums are streamed, so memory does not grow with the images, and how they are split into batches does not matter.
    The network runs in evaluation mode and is left as it was: mode, buffers and hooks. Raises UserError when a mean is
    not finite.
    """
    sums: dict[nn.Module, torch.Tensor] = {}  # (moments, C)
    counts: dict[nn.Module, int] = {}

    def add(layer: nn.Module, values: torch.Tensor) -> None:
        channel = values.ndim - 1 if isinstance(layer, nn.Linear) else 1
        rest = [dim for dim in range(values.ndim) if dim != channel]
        more = torch.stack([MOMENTS[name](values).sum(rest) for name in moments])
        sums[layer] = sums.get(layer, 0) + more.double()  # float64 over the batches
        counts[layer] = counts.get(layer, 0) + values.numel() // values.shape[channel]

    observe(network, [m for m in network.modules() if isinstance(m, CONSUMERS)], add, images, compute, title)
    if not all(total.isfinite().all() for total in sums.values()):
        raise not_finite()
    means = {layer: (total / counts[layer]).cpu().clone() for layer, total in sums.items()}
    return {layer: ChannelStatistics(**dict(zip(moments, mean))) for layer, mean in means.items()}


def record_rows(
    network: nn.Module,
    spreads: dict[nn.Module, int],
    images: ImageSet,
    compute: Compute,
    title: str = "Measuring how channels go together",
) -> tuple[dict[nn.Module, torch.Tensor], dict[nn.Module, torch.Tensor]]:
    """Run `images` through `network` and return rows of what layers receive, and of what convolutions make of it.

    The first are those of each layer in `spreads`, as `channel_rows` says, the second, for layers that have
    `window_rows`, what `convolved` makes of these. The network is left as it was, as by `record_statistics`. Raises
    UserError when a row is not finite.
    """
    inputs: dict[nn.Module, list[torch.Tensor]] = {layer: [] for layer in spreads}
    outputs: dict[nn.Module, list[torch.Tensor]] = {}

    def keep(layer: nn.Module, values: torch.Tensor) -> None:
        inputs[layer].append(channel_rows(layer, values, len(images), spreads[layer]))
        seen = window_rows(layer, values, len(images))
        if seen is not None:
            outputs.setdefault(layer, []).append(convolved(layer, seen))

    observe(network, inputs, keep, images, compute, title)
    received, made = ({layer: torch.cat(rows, 1) for layer, rows in parts.items()} for parts in (inputs, outputs))
    if not all(rows.isfinite().all() for rows in (*received.values(), *made.values())):
        raise not_finite()
    return received, made


def channel_rows(layer: nn.Module, values: torch.Tensor, images: int, spread: int = 1) -> torch.Tensor:
    """What `layer` receives, a row per image and position: (groups, rows, C), C being the channels of each group.

    There are up to `ROWS` of them for so many `images`, from positions chosen at random, the same in every image. A
    linear layer behind a flatten reads each channel as `spread` features, which count as positions.
    """
    if isinstance(layer, nn.Linear):
        rows = values.reshape(len(values), -1, values.shape[-1] // spread, spread).movedim(2, 3).flatten(1, 2)
    else:
        rows = values.flatten(2).movedim(1, 2)  # (images, positions, channels)
    rows = rows[:, _chosen(rows.shape[1], ROWS // images).to(rows.device)]
    return rows.flatten(0, 1).unflatten(1, (getattr(layer, "groups", 1), -1)).movedim(1, 0)


def window_rows(
    layer: nn.Module, values: torch.Tensor, images: int, removed: torch.Tensor = NO_CHANNELS
) -> torch.Tensor | None:
    """What the kernel of `layer` sees, a row per image and position: (groups, rows, C * kernel positions).

    There are up to `WINDOWS` of them for so many `images`, one per image at least, from positions of the output chosen
    at random, the same in every image; columns are in the order of the layer's weights, but for those of the inputs
    `removed` (R,) from each group. There are none, and the answer is None, for layers other than convolutions, kernels
    of 1x1, padding by name or by other values than zero, and when an output has a weight for less than
    `ROWS_PER_WEIGHT` rows.
    """
    if (
        not isinstance(layer, nn.Conv2d)
        or layer.kernel_size == (1, 1)
        or layer.padding_mode != "zeros"
        or isinstance(layer.padding, str)
    ):
        return None
    seen, inside = [], []  # by each kernel position at each output, along one side: where, and whether that is padding
    for side, kernel, stride, padding, dilation in zip(
        values.shape[2:], layer.kernel_size, layer.stride, layer.padding, layer.dilation
    ):
        starts = torch.arange(-padding, side + padding - dilation * (kernel - 1), stride)
        places = starts[:, None] + dilation * torch.arange(kernel)
        seen.append(places.clamp(0, side - 1))
        inside.append(places == seen[-1])
    chosen = _chosen(len(seen[0]) * len(seen[1]), WINDOWS // images)
    kept = is_kept(layer.weight.shape[1], removed)
    if min(WINDOWS, len(chosen) * images) < ROWS_PER_WEIGHT * int(kept.sum()) * layer.weight[0, 0].numel():
        return None
    row, column = chosen.div(len(seen[1]), rounding_mode="floor"), chosen % len(seen[1])
    down, right = (places.to(values.device) for places in (seen[0][row][:, :, None], seen[1][column][:, None]))
    rows = values.permute(0, 2, 3, 1)[:, down, right]  # (images, rows, kernel height and width, channels)
    rows *= (inside[0][row][:, :, None] & inside[1][column][:, None]).unsqueeze(-1).to(rows)
    rows = rows.movedim(-1, 2).flatten(0, 1).unflatten(1, (layer.groups, -1)).movedim(1, 0)
    return rows[:, :, kept].flatten(2)


def convolved(layer: nn.Conv2d, seen: torch.Tensor) -> torch.Tensor:
    """What `layer` makes of `window_rows`, without bias: (groups, rows, outputs per group)."""
    return seen @ layer.weight.detach().flatten(1).unflatten(0, (layer.groups, -1)).transpose(1, 2)


def is_kept(count: int, removed: torch.Tensor) -> torch.Tensor:
    """Which of so many are not among the removed (R,), as truth values (count,) on the CPU, as these are."""
    kept = torch.ones(count, dtype=torch.bool)  # indexing with it does not wait for a GPU
    kept[removed] = False
    return kept


def _chosen(positions: int, most: int) -> torch.Tensor:
    """Up to so many of `positions`, at least one, at random and always the same."""
    if positions <= most:
        return torch.arange(positions)
    return torch.randperm(positions, generator=torch.Generator().manual_seed(0))[: max(1, most)]


def observe(
    network: nn.Module,
    layers: Iterable[nn.Module],
    see: Callable[[nn.Module, torch.Tensor], None],
    images: ImageSet,
    compute: Compute,
    title: str,
    output: bool = False,
) -> None:
    """Run `images` through `network` and call `see` with each of `layers` and what it received, batch by batch.

    With `output` it is called with the network and what that puts out, too. Values are float32, and so is what is
    computed of them, whatever the network runs in. It runs in evaluation mode and is left as it was: mode, hooks.
    """

    def show(module: nn.Module, values: torch.Tensor) -> None:
        with torch.autocast(values.device.type, enabled=False):
            see(module, values.float())

    was_training = network.training
    network.eval()
    hooks = [layer.register_forward_pre_hook(lambda layer, args: show(layer, args[0])) for layer in layers]
    if output:
        hooks.append(network.register_forward_hook(lambda network, args, outputs: show(network, outputs)))
    try:
        with torch.inference_mode():
            for inputs, _ in compute.batches(images, title):
                with compute.autocast():
                    network(inputs)
    finally:
        for hook in hooks:
            hook.remove()
        network.train(was_training)


def not_finite() -> UserError:
    """The error for a network whose activations are no finite numbers."""
    return UserError("The network computes values that are not finite numbers: its weights are damaged")
