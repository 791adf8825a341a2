"""Layer inputs as rows of a least-squares problem: one row per image and position."""

from __future__ import annotations

import torch
from torch import nn

from cleanai.data.images import ImageSet
from cleanai.network.activations import not_finite, observe
from cleanai.runtime.compute import Compute

NO_CHANNELS = torch.tensor([], dtype=torch.long)
ROWS = 2**14  # of a layer's inputs: 32 for each of 512 channels
WINDOWS = 2**13  # of a convolution's kernel windows
FIT_ROWS = 2**15  # of a layer's inputs and outputs at the end of the repair
ROWS_PER_WEIGHT = 4  # with fewer, least squares overfits the repair images


def record_rows(
    network: nn.Module,
    spreads: dict[nn.Module, int],
    images: ImageSet,
    compute: Compute,
    title: str = "Recording layer inputs",
) -> tuple[dict[nn.Module, torch.Tensor], dict[nn.Module, torch.Tensor]]:
    """Run `images` through `network`; return rows of layer inputs, and of the outputs of convolutions.

    The first are the `channel_rows` of each layer in `spreads`; the second, for layers that have `window_rows`, the
    `convolved` ones. The network is left as it was, see `observe`. Raises UserError when a row is not finite.
    """
    inputs: dict[nn.Module, list[torch.Tensor]] = {layer: [] for layer in spreads}
    outputs: dict[nn.Module, list[torch.Tensor]] = {}

    def record(layer: nn.Module, values: torch.Tensor) -> None:
        rows = channel_rows(layer, values, len(images), spreads[layer])
        windows = window_rows(layer, values, len(images))
        if windows is not None:
            outputs.setdefault(layer, []).append(convolved(layer, windows))
        inputs[layer].append(rows)

    observe(network, inputs, record, images, compute, title)
    input_rows, output_rows = (
        {layer: torch.cat(rows, 1) for layer, rows in parts.items()} for parts in (inputs, outputs)
    )
    if not all(rows.isfinite().all() for rows in (*input_rows.values(), *output_rows.values())):
        raise not_finite()
    return input_rows, output_rows


def channel_rows(layer: nn.Module, values: torch.Tensor, images: int, spread: int = 1) -> torch.Tensor:
    """The inputs of `layer`, a row per image and position: (groups, rows, C), C the channels of each group.

    At most `ROWS` rows for that many `images`, from seeded random positions, the same in every image. A linear layer
    behind a flatten reads each channel as `spread` features, which count as positions.
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
    """The windows under the kernel of `layer`, a row per image and position: (groups, rows, C * kernel positions).

    At most `WINDOWS` rows for that many `images`, at least one per image, from seeded random output positions, the
    same in every image. Columns are in the order of the layer's weights, without those of the inputs `removed` (R,)
    from each group. None for layers that are not plain convolutions (`_has_windows`), kernels of 1x1, and when there
    are fewer than `ROWS_PER_WEIGHT` rows for each weight of an output.
    """
    if not _has_windows(layer) or layer.kernel_size == (1, 1):
        return None
    outputs = _output_sides(layer, values)
    chosen = _chosen(outputs[0] * outputs[1], WINDOWS // images)
    kept = is_kept(layer.weight.shape[1], removed)
    if min(WINDOWS, len(chosen) * images) < ROWS_PER_WEIGHT * int(kept.sum()) * layer.weight[0, 0].numel():
        return None
    return _windows(layer, values, chosen)[:, :, kept].flatten(2)


def input_windows(layer: nn.Module, values: torch.Tensor, images: int) -> torch.Tensor | None:
    """The inputs of each of the `output_rows` of `layer`: (groups, rows, C * kernel positions).

    None for layers other than plain convolutions (`_has_windows`) and plain linear layers.
    """
    if _is_plain(layer, nn.Linear):
        return output_rows(layer, values, images)[None]
    if not _has_windows(layer):
        return None
    height, width = _output_sides(layer, values)
    return _windows(layer, values, _chosen(height * width, FIT_ROWS // images)).flatten(2)


def output_rows(layer: nn.Module, values: torch.Tensor, images: int) -> torch.Tensor:
    """Values in the shape of the outputs of `layer`, a row per image and position: (rows, C).

    At most `FIT_ROWS` rows for that many `images`, at least one per image, from seeded random positions, the same in
    every image.
    """
    if isinstance(layer, nn.Linear):
        rows = values.reshape(len(values), -1, values.shape[-1])
    else:
        rows = values.flatten(2).movedim(1, 2)
    return rows[:, _chosen(rows.shape[1], FIT_ROWS // images).to(rows.device)].flatten(0, 1)


def _has_windows(layer: nn.Module) -> bool:
    """Whether a layer is a plain convolution in two dimensions that pads with zeros, by numbers."""
    plain = _is_plain(layer, nn.Conv2d) and type(layer)._conv_forward is nn.Conv2d._conv_forward
    return plain and layer.padding_mode == "zeros" and not isinstance(layer.padding, str)


def _is_plain(layer: nn.Module, kind: type[nn.Module]) -> bool:
    """Whether a layer runs as its `kind` does. Subclasses may pad by themselves, or compute with other weights."""
    return type(layer).forward is kind.forward and "forward" not in vars(layer)


def _output_sides(layer: nn.Conv2d, values: torch.Tensor) -> list[int]:
    return [
        (side + 2 * padding - dilation * (kernel - 1) - 1) // stride + 1
        for side, kernel, stride, padding, dilation in zip(
            values.shape[2:], layer.kernel_size, layer.stride, layer.padding, layer.dilation
        )
    ]


def _windows(layer: nn.Conv2d, values: torch.Tensor, chosen: torch.Tensor) -> torch.Tensor:
    """The windows under the kernel at the `chosen` outputs: (groups, rows, C of each group, kernel positions)."""
    places, inside = [], []  # per side (outputs, kernel): the input position, and whether it is not padding
    for side, outputs, kernel, stride, padding, dilation in zip(
        values.shape[2:], _output_sides(layer, values), layer.kernel_size, layer.stride, layer.padding, layer.dilation
    ):
        starts = stride * torch.arange(outputs) - padding
        unclamped = starts[:, None] + dilation * torch.arange(kernel)
        places.append(unclamped.clamp(0, side - 1))
        inside.append(unclamped == places[-1])
    row, column = chosen.div(len(places[1]), rounding_mode="floor"), chosen % len(places[1])
    down, right = (index.to(values.device) for index in (places[0][row][:, :, None], places[1][column][:, None]))
    rows = values.permute(0, 2, 3, 1)[:, down, right]  # (images, rows, kernel height and width, channels)
    rows *= (inside[0][row][:, :, None] & inside[1][column][:, None]).unsqueeze(-1).to(rows)
    return rows.movedim(-1, 2).flatten(0, 1).unflatten(1, (layer.groups, -1)).movedim(1, 0)


def convolved(layer: nn.Conv2d, windows: torch.Tensor) -> torch.Tensor:
    """The outputs of `layer` for `window_rows`, without bias: (groups, rows, outputs per group)."""
    return windows @ layer.weight.detach().to(windows).flatten(1).unflatten(0, (layer.groups, -1)).transpose(1, 2)


def is_kept(count: int, removed: torch.Tensor) -> torch.Tensor:
    """A mask (count,) on the CPU, False at the indices `removed` (R,)."""
    kept = torch.ones(count, dtype=torch.bool)  # indexing with it does not wait for a GPU
    kept[removed] = False
    return kept


def _chosen(positions: int, most: int) -> torch.Tensor:
    """Up to `most` of the positions, at least one, by a fixed random choice."""
    if positions <= most:
        return torch.arange(positions)
    return torch.randperm(positions, generator=torch.Generator().manual_seed(0))[: max(1, most)]
