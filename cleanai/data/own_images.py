"""Images of one's own as an `ImageSet`: from a folder of pictures, or from a tensor."""

from __future__ import annotations

from numbers import Integral
from pathlib import Path
from typing import Sequence

import torch

from cleanai import UserError
from cleanai.data.image_folder import decode
from cleanai.data.images import ImageSet
from cleanai.data.listing import list_pictures
from cleanai.data.sources import channel_statistics
from cleanai.runtime.files import expanded


def image_set(
    source: str | Path | torch.Tensor,
    labels: torch.Tensor | None = None,
    size: int | None = None,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
) -> ImageSet:
    """Images for `cleanai.prune` and the functions beside it, on the CPU.

    `source` is one of these:

    - a folder with pictures in it, or with one folder of pictures per class: `folder/<class>/*`. Labels are the indices
      of the sorted names of the classes. With `size` the shorter side of each picture becomes that many pixels, and the
      middle of the longer one is kept; without it all pictures must have one size.
    - a uint8 tensor (N, 3, H, W), RGB, 0 to 255;
    - a float tensor (N, 3, H, W), RGB, already normalised: (pixels / 255 - mean) / std, with the `mean` and `std` that
      must be given.

    `mean` and `std` hold a number per channel, of pixels between 0 and 1: those that the network was trained with. For
    a folder and for uint8 they are by default those of these images. `labels` (N,) are class indices, for a tensor;
    without them all are 0. Only pruning with "auto" uses them. Raises UserError when the images are not as described.
    """
    channels = _statistics(mean, std)
    if isinstance(source, torch.Tensor):
        if size is not None:
            raise UserError("size is for a folder of pictures: resize a tensor before, with torchvision's resize")
        pixels = _checked_pixels(source.detach().cpu(), channels)
        indices = torch.zeros(len(pixels), dtype=torch.long) if labels is None else _checked_labels(labels, len(pixels))
    elif isinstance(source, (str, Path)):
        if labels is not None:
            raise UserError("labels are for a tensor: a folder's labels are its class folders")
        if size is not None and (isinstance(size, bool) or not isinstance(size, Integral) or size < 1):
            raise UserError(f"size is {size!r}: give a whole number of pixels, for example size=224")
        folder = expanded(source)
        files = list_pictures(folder)
        pixels = torch.from_numpy(decode(files, folder, size, "size={}"))
        indices = torch.tensor([file.label for file in files])
    else:
        raise UserError(
            f"image_set takes a folder or a torch tensor, not a {type(source).__name__}: torch.from_numpy makes a "
            "tensor of an array, torch.stack one of a list"
        )
    return ImageSet(pixels, indices, *(channels or channel_statistics(pixels)))


def _statistics(mean: Sequence[float] | None, std: Sequence[float] | None) -> tuple[torch.Tensor, torch.Tensor] | None:
    """Both as tensors (3,), or None when neither is given."""
    if mean is None and std is None:
        return None
    try:
        values = [torch.as_tensor(each, dtype=torch.float32).cpu() for each in (mean, std)]
    except (TypeError, ValueError, RuntimeError):
        values = []
    if len(values) != 2 or any(each.shape != (3,) or not each.isfinite().all() for each in values):
        raise UserError("mean and std go together, each three numbers: mean=(0.485, 0.456, 0.406), for example")
    if min(values[0]) < 0 or max(values[0]) > 1 or min(values[1]) <= 0 or max(values[1]) > 1:
        raise UserError(
            "mean and std are of pixels between 0 and 1, so mean is from 0 to 1, and std above 0 and at most 1: divide "
            "those of pixels up to 255 by 255"
        )
    return values[0], values[1]


def _checked_pixels(images: torch.Tensor, channels: tuple[torch.Tensor, torch.Tensor] | None) -> torch.Tensor:
    """The pixels (N, 3, H, W) from 0 to 255 of a tensor of images: uint8, or float32 for images given as floats."""
    shape = " x ".join(map(str, images.shape))
    if images.ndim != 4 or images.shape[1] != 3:
        hint = ""
        if images.ndim == 4 and images.shape[3] == 3:
            hint = ": tensor.permute(0, 3, 1, 2) puts the channels second"
        elif images.ndim == 4 and images.shape[1] == 1:
            hint = ": tensor.repeat(1, 3, 1, 1) makes RGB of gray"
        elif images.ndim == 3:
            hint = ": tensor[None] makes a set of one image"
        raise UserError(f"The images are {shape}, and must be N x 3 x height x width{hint}")
    if not images.numel():
        raise UserError(f"There are no images: the tensor is {shape}")
    if images.dtype == torch.uint8:
        return images.contiguous()
    if not images.is_floating_point():
        raise UserError(
            f"The images are {str(images.dtype)[6:]}, and must be uint8 (0 to 255) or normalised floats: "
            "tensor.to(torch.uint8), if they are from 0 to 255"
        )
    if channels is None:
        raise UserError("Images given as floats need mean and std, those that they were normalised with")
    images = images.float()
    if not images.isfinite().all():
        raise UserError("The images hold numbers that are not finite")
    unit = images * channels[1][:, None, None] + channels[0][:, None, None]
    low, high = unit.min().item(), unit.max().item()
    if low < -0.5 or high > 1.5:  # some resizing overshoots a little
        raise UserError(
            f"The images are not normalised with this mean and std: before it, they would be from {low:.3g} to "
            f"{high:.3g} and not from 0 to 1. Give (pixels / 255 - mean) / std, or uint8 pixels"
        )
    return unit * 255


def _checked_labels(labels: torch.Tensor, count: int) -> torch.Tensor:
    if not isinstance(labels, torch.Tensor) or labels.is_floating_point() or labels.is_complex():
        raise UserError("labels must be a tensor of whole numbers, the index of each image's class")
    if labels.shape != (count,):
        raise UserError(
            f"labels are {' x '.join(map(str, labels.shape))} for {count:,} images: give one for each image"
        )
    labels = labels.detach().cpu().long()
    if labels.min() < 0:
        raise UserError(f"labels hold {int(labels.min())}: give the index of each image's class, 0 or more")
    return labels
