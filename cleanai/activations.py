"""Channel statistics at the inputs of the layers that read them."""
from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn

from cleanai.compute import Compute
from cleanai.data import ImageSet
from cleanai.progress import progress

CONSUMERS = (nn.Conv2d, nn.ConvTranspose2d, nn.Linear)


@dataclass
class ChannelStatistics:
    """Means over all images and positions of what reaches one layer, per channel: each (C,) float64."""

    mean_absolute: torch.Tensor
    frequency: torch.Tensor  # share of values above zero
    second_moment: torch.Tensor


def record_statistics(
    network: nn.Module, images: ImageSet, compute: Compute, batch_size: int, title: str = "Measuring channels"
) -> dict[nn.Module, ChannelStatistics]:
    """Run `images` through `network` and return what each convolution and linear layer received.

    The input of a layer is what its channels are worth to it: after batch norm, activation and residual addition. The
    sums are streamed, so memory does not grow with the images, and how they are split into batches does not matter.
    The network runs in evaluation mode and is left as it was: mode, buffers and hooks.
    """
    sums: dict[nn.Module, tuple] = {}

    def add(layer: nn.Module, args: tuple[torch.Tensor, ...]) -> None:
        values = args[0].float()  # sums in float32 whatever the network runs in, and over the batches in float64
        channel = values.ndim - 1 if isinstance(layer, nn.Linear) else 1
        rest = [dim for dim in range(values.ndim) if dim != channel]
        batch = torch.stack([values.abs().sum(rest), (values > 0).sum(rest), values.square().sum(rest)])  # (3, C)
        total, count = sums.get(layer, (0, 0))
        sums[layer] = (total + batch.double(), count + values.numel() // values.shape[channel])

    was_training = network.training
    network.eval()
    hooks = [m.register_forward_pre_hook(add) for m in network.modules() if isinstance(m, CONSUMERS)]
    try:
        with torch.inference_mode():
            batches = images.batches(batch_size)
            for inputs, _ in progress(batches, title, "batch", total=-(-len(images) // batch_size)):
                with compute.autocast():
                    network(inputs)
    finally:
        for hook in hooks:
            hook.remove()
        network.train(was_training)
    return {layer: ChannelStatistics(*(total / count).cpu().clone()) for layer, (total, count) in sums.items()}
