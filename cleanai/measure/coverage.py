"""Test coverage of a network: the criteria of DeepXplore and DeepGauge, streamed over images.

A neuron is one channel of a layer's output, and its value for an image the mean over all positions. A layer's output
is what it hands on, after batch norm, activation and residual addition: it is taken where the next convolution or
linear layer reads it, counted once however many layers do, and named after the first of them. What the last layer puts
out is counted as well, the images are not. Behind a flatten every feature that a linear layer reads is a neuron.
The places are the same in a network and in what pruning leaves of it, so their coverage can be compared layer by layer.
"""
from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

from cleanai import UserError
from cleanai.data.images import ImageSet
from cleanai.network.activations import CONSUMERS, not_finite, observe
from cleanai.runtime.compute import Compute

OUTPUT = "output"  # the name of the last layer's output, which no layer reads
CRITERIA = ("nc", "kmnc", "nbc", "snac", "tknc")


@dataclass
class Profile:
    """What each neuron of a layer was seen to do: lowest and highest value, standard deviation, each (C,) float64."""

    low: torch.Tensor
    high: torch.Tensor
    deviation: torch.Tensor


def record_profiles(
    network: nn.Module, images: ImageSet, compute: Compute, title: str = "Profiling neurons"
) -> dict[str, Profile]:
    """The profile of each layer of `network` on training images, by name. Memory does not grow with the images.

    The network is left as it was. Raises UserError when it computes values that are not finite.
    """
    layers = _layers(network, images, compute)
    seen: dict[str, tuple] = {}

    def see(layer: nn.Module, values: torch.Tensor) -> None:
        neurons = _spatial_means(layer, values)
        low, high, number = neurons.amin(0), neurons.amax(0), len(neurons)
        mean, squares = neurons.mean(0), neurons.var(0, unbiased=False) * number
        if layers[layer] in seen:  # merge by Chan's formula, which does not cancel as sums of squares do
            before_low, before_high, before_mean, before_squares, before = seen[layers[layer]]
            low, high, step = torch.minimum(low, before_low), torch.maximum(high, before_high), mean - before_mean
            squares = before_squares + squares + step.square() * before * number / (before + number)
            mean, number = before_mean + step * number / (before + number), before + number
        seen[layers[layer]] = (low, high, mean, squares, number)

    observe(network, list(layers)[:-1], see, images, compute, title, output=True)
    profiles = {
        name: Profile(low.cpu(), high.cpu(), (squares / number).sqrt().cpu())
        for name, (low, high, _, squares, number) in seen.items()
    }
    if not all((profile.high - profile.low).isfinite().all() for profile in profiles.values()):
        raise not_finite()
    return profiles


def measure_coverage(
    network: nn.Module,
    images: ImageSet,
    profiles: dict[str, Profile],
    compute: Compute,
    threshold: float = 0.25,
    scaled: bool = True,
    sections: int = 1000,
    beyond: float = 0.0,
    top: int = 3,
    title: str = "Measuring coverage",
) -> dict[str, Any]:
    """How much of what the neurons of `network` can do `images` make them do, in percent; `profiles` are the network's.

    - `nc`: neurons above `threshold` for some image (Pei et al. 2017, DeepXplore, arXiv 1705.06640). With `scaled`, as
      in its code, a layer's values are first brought to [0, 1] by their lowest and highest for that image; without it,
      as in DeepGauge, they are taken as they are;
    - `kmnc`: of `sections` equal parts of each neuron's range [low, high], those that some image hits;
    - `nbc`: of each neuron's two sides, below low and above high, those that some image reaches; the boundaries may be
      put `beyond` standard deviations further out;
    - `snac`: of the neurons, those that some image takes above high, `beyond` as before;
    - `tknc`: of the neurons, those that are among the `top` highest of their layer for some image.

    The last four are of Ma et al. 2018, DeepGauge, arXiv 1803.07519; a value on a boundary is inside of it, and a
    neuron that never changed has no sections to hit. Returns `neurons` and `<criterion>_percent` of the whole
    network, and the same of each of `layers` with its `name`. Memory does not grow with the images, the network is left
    as it was. Raises UserError when it computes values that are not finite, or the profiles are of another network.
    """
    layers = _layers(network, images, compute)
    counts = {name: len(profile.low) for name, profile in profiles.items()}
    device = compute.device
    hit = {
        name: {
            "nc": torch.zeros(neurons, dtype=torch.bool, device=device),
            "kmnc": torch.zeros(neurons, sections, dtype=torch.bool, device=device),
            "nbc": torch.zeros(neurons, 2, dtype=torch.bool, device=device),
            "tknc": torch.zeros(neurons, dtype=torch.bool, device=device),
        }
        for name, neurons in counts.items()
    }
    limits = {
        name: [limit.to(device) for limit in (profile.low, profile.high, beyond * profile.deviation)]
        for name, profile in profiles.items()
    }
    finite = torch.ones((), dtype=torch.bool, device=device)

    def see(layer: nn.Module, values: torch.Tensor) -> None:
        name, neurons = layers[layer], _spatial_means(layer, values)  # (B, C)
        if counts.get(name) != neurons.shape[1]:
            raise UserError("These profiles are of another network: record those of the network as it is")
        (low, high, margin), covered = limits[name], hit[name]
        finite.logical_and_(neurons.isfinite().all())

        compared = _scaled(neurons, values) if scaled else neurons
        covered["nc"] |= (compared > threshold).any(0)

        image, neuron = ((low < high) & (low <= neurons) & (neurons <= high)).nonzero(as_tuple=True)
        share = (neurons[image, neuron] - low[neuron]) / (high - low)[neuron]
        covered["kmnc"][neuron, (share * sections).long().clamp_max(sections - 1)] = True

        covered["nbc"][:, 0] |= (neurons < low - margin).any(0)
        covered["nbc"][:, 1] |= (neurons > high + margin).any(0)
        covered["tknc"][neurons.topk(min(top, neurons.shape[1]), dim=1).indices.flatten()] = True

    observe(network, list(layers)[:-1], see, images, compute, title, output=True)
    if not finite:
        raise not_finite()
    for covered in hit.values():
        covered["snac"] = covered["nbc"][:, 1]
    shares = {  # (C,) per layer: of what there is to hit in each neuron
        name: {f"{key}_percent": 100 * covered[key].double().reshape(counts[name], -1).mean(1) for key in CRITERIA}
        for name, covered in hit.items()
    }
    whole = {key: torch.cat([share[key] for share in shares.values()]) for key in shares[OUTPUT]}
    return {
        "neurons": sum(counts.values()),
        **{key: share.mean().item() for key, share in whole.items()},
        "layers": [
            {"name": name, "neurons": counts[name], **{key: share[key].mean().item() for key in share}}
            for name, share in shares.items()
        ],
    }


def _layers(network: nn.Module, images: ImageSet, compute: Compute) -> dict[nn.Module, str]:
    """Where layers' outputs are seen, with their names: the first reader of each, and at last the network itself."""
    names = {module: name for name, module in network.named_modules()}
    seen: dict[int, torch.Tensor] = {}
    layers: dict[nn.Module, str] = {}

    def look(module: nn.Module, values: torch.Tensor) -> None:
        if id(values) not in seen:
            seen[id(values)] = values  # held, so that no later tensor is given its id
            layers[module] = names[module]

    consumers = [module for module in names if isinstance(module, CONSUMERS)]
    exact = replace(compute, precision="float32")  # in which `observe` hands on the very tensors
    observe(network, [network, *consumers], look, images.select(torch.arange(1)), exact, "Finding the layers")
    del layers[network]  # what it receives are the images
    return {**layers, network: OUTPUT}


def _spatial_means(layer: nn.Module, values: torch.Tensor) -> torch.Tensor:
    """The mean over all positions of each channel of what `layer` received: (B, C) float64."""
    channel = 1 if isinstance(layer, CONSUMERS) and not isinstance(layer, nn.Linear) else values.ndim - 1
    return (values.movedim(channel, 1).flatten(2).mean(2) if values.ndim > 2 else values).double()


def _scaled(neurons: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
    """The neurons (B, C) as they are when a layer's values are brought to [0, 1] image by image before averaging."""
    low, high = values.flatten(1).amin(1).double()[:, None], values.flatten(1).amax(1).double()[:, None]
    return torch.where(high > low, (neurons - low) / (high - low), torch.zeros_like(neurons))
