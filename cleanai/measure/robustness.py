"""Accuracy on disturbed images: five corruptions, mild and strong.

They are those of CIFAR-10-C at its levels 1 and 5 (Hendrycks and Dietterich 2019, arXiv 1903.12261). The blur, given
there for images of 32 x 32 pixels, grows with the images.
"""

from __future__ import annotations

import io
from dataclasses import replace
from typing import Any, Callable

import torch
from PIL import Image
from torch import nn
from torchvision.transforms.functional import gaussian_blur, pil_to_tensor

from cleanai.data.images import ImageSet
from cleanai.network.evaluation import evaluate
from cleanai.runtime.compute import Compute

LEVELS = ("mild", "strong")
IMAGES = 1000
LEAST_IMAGES = 100
AT_ONCE = 250  # images that are disturbed at once, for the memory; the noise repeats from part to part
MOST_VALUES = 1 << 26  # of these images: 256 MiB in float32
MACS = 6e11  # of a network on the images: those of ResNet-18 on 1,000 images of CIFAR-10


def _noise(pixels: torch.Tensor, deviation: float) -> torch.Tensor:
    # Drawn on the CPU: every device gets the same numbers.
    random = torch.randn(pixels.shape, generator=torch.Generator().manual_seed(0))
    return pixels + deviation * random.to(pixels.device)


def _blur(pixels: torch.Tensor, deviation_of_32: float) -> torch.Tensor:
    deviation = deviation_of_32 * min(pixels.shape[-2:]) / 32
    return gaussian_blur(pixels, [2 * round(3 * deviation) + 1] * 2, [deviation] * 2)


def _brightness(pixels: torch.Tensor, added: float) -> torch.Tensor:
    """More of the value of HSV; hue and saturation stay."""
    value = pixels.amax(1, keepdim=True)
    brighter = (value + added).clamp(max=1)
    return torch.where(value > 0, pixels * (brighter / value.clamp(min=1e-6)), brighter.expand_as(pixels))


def _contrast(pixels: torch.Tensor, kept: float) -> torch.Tensor:
    means = pixels.mean((2, 3), keepdim=True)
    return (pixels - means) * kept + means


def _jpeg(pixels: torch.Tensor, quality: float) -> torch.Tensor:
    compressed = []
    for picture in (pixels * 255).round().byte().cpu():
        file = io.BytesIO()
        Image.fromarray(picture.permute(1, 2, 0).contiguous().numpy()).save(file, "JPEG", quality=int(quality))
        compressed.append(pil_to_tensor(Image.open(file)))
    return torch.stack(compressed).to(pixels.device).float() / 255


# By name: pixels (N, 3, H, W) in [0, 1] and a strength give such pixels, which may leave [0, 1]; and both strengths.
CORRUPTIONS: dict[str, tuple[Callable[[torch.Tensor, float], torch.Tensor], tuple[float, float]]] = {
    "Gaussian noise": (_noise, (0.04, 0.1)),
    "Blur": (_blur, (0.4, 1.0)),
    "Brightness": (_brightness, (0.05, 0.3)),
    "Contrast": (_contrast, (0.75, 0.15)),
    "JPEG": (_jpeg, (80, 40)),
}
CASES = [("None", ""), *((name, level) for name in CORRUPTIONS for level in LEVELS)]


def corrupted(images: ImageSet, name: str, level: str) -> ImageSet:
    """The same images after a corruption of `CORRUPTIONS`, mild or strong. The same ones every time."""
    corrupt, strengths = CORRUPTIONS[name]
    at_once = max(1, min(AT_ONCE, MOST_VALUES // images.pixels[0].numel()))
    parts = (corrupt(part.float() / 255, strengths[LEVELS.index(level)]) for part in images.pixels.split(at_once))
    return replace(images, pixels=torch.cat([(part.clamp(0, 1) * 255).round().byte() for part in parts]))


def chosen_images(images: ImageSet, count: int | None, macs: int, seed: int) -> ImageSet:
    """A seeded choice of `count` images that is balanced over the classes.

    None chooses IMAGES, or fewer, down to LEAST_IMAGES, for a network that costs more than MACS on so many.
    """
    return images.sample(max(LEAST_IMAGES, min(IMAGES, int(MACS / max(1, macs)))) if count is None else count, seed)


def measure_robustness(networks: dict[str, nn.Module], images: ImageSet, compute: Compute) -> list[dict[str, Any]]:
    """Accuracy in percent of each network on each corruption of the images, beside that on the images themselves.

    One row per corruption and level: `corruption`, `level`, and `<network>_percent`. The first row is of the images as
    they are.
    """
    rows = []
    for name, level in CASES:
        disturbed = corrupted(images, name, level) if level else images
        title = f"Robustness, {name} {level}".rstrip()
        accuracies = {
            f"{network}_percent": evaluate(module, disturbed, compute, title).accuracy_percent
            for network, module in networks.items()
        }
        rows.append({"corruption": name, "level": level, **accuracies})
    return rows
