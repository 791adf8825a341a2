"""Test coverage of a network: the criteria of DeepXplore and DeepGauge, streamed over images.

This is not the pruning criterion Neuron Coverage, which is in `pruning/criteria.py`.

A neuron is one channel of a layer's output; its value for an image is the mean over all positions. A layer's output
comes after batch norm, activation and residual addition: it is taken where the next convolution or linear layer reads
it, counted once, and named after the first layer that reads it. The network's output is counted as well, the images are
not. Behind a flatten every feature that a linear layer reads is a neuron. A network and its pruned form have the same
layers, so their coverage can be compared layer by layer.
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
CRITERIA = ("nc", "kmnc", "nbc", "snac", "tknc", "scc")
THRESHOLDS = (0.0, 0.25, 0.5, 0.75)  # above which a neuron counts as active: those of the field's papers
THRESHOLD = 0.25  # the one of `nc`
SECTIONS = 1000  # of each neuron's range
TOP = 3  # neurons per layer


@dataclass
class Profile:
    """The range of each neuron of a layer: lowest and highest value, each (C,) float64."""

    low: torch.Tensor
    high: torch.Tensor


def record_profiles(
    network: nn.Module, images: ImageSet, compute: Compute, title: str = "Profiling neurons"
) -> dict[str, Profile]:
    """The profile of each layer of `network` on training images, by name. Memory does not grow with the images.

    The network is left as it was. Raises UserError when it computes values that are not finite.
    """
    layers = _layers(network, images, compute)
    ranges: dict[str, tuple[torch.Tensor, torch.Tensor]] = {}

    def update(layer: nn.Module, values: torch.Tensor) -> None:
        neurons = _spatial_means(layer, values)
        low, high = neurons.amin(0), neurons.amax(0)
        if layers[layer] in ranges:
            earlier_low, earlier_high = ranges[layers[layer]]
            low, high = torch.minimum(low, earlier_low), torch.maximum(high, earlier_high)
        ranges[layers[layer]] = low, high

    observe(network, list(layers)[:-1], update, images, compute, title, output=True)
    profiles = {name: Profile(low.cpu(), high.cpu()) for name, (low, high) in ranges.items()}
    if not all((profile.high - profile.low).isfinite().all() for profile in profiles.values()):
        raise not_finite()
    return profiles


def measure_coverage(
    network: nn.Module,
    images: ImageSet,
    profiles: dict[str, Profile],
    compute: Compute,
    title: str = "Measuring coverage",
) -> dict[str, Any]:
    """Coverage in percent that `images` reach on `network`, by six criteria; `profiles` are those of the network.

    - `nc`: neurons above THRESHOLD for some image, after a layer's values were scaled to [0, 1] by their lowest and
      highest for that image, as in the code of DeepXplore (Pei et al. 2017, arXiv 1705.06640);
    - `kmnc`: of SECTIONS equal parts of each neuron's range [low, high], those that some image hits;
    - `nbc`: of each neuron's two sides, below low and above high, those that some image reaches;
    - `snac`: neurons that some image takes above high;
    - `tknc`: neurons that are among the TOP highest of their layer for some image;
    - `scc`: neurons that are above zero for some image, and zero or below for another (sign change coverage, ISTQB
      syllabus of AI testing 2021).

    Those from `kmnc` to `tknc` are of DeepGauge (Ma et al. 2018, arXiv 1803.07519). A value on a boundary is inside,
    and a constant neuron has no sections to hit. Returns `neurons` and `<criterion>_percent` of the network, and the
    same of each of `layers` with its `name`; and `nc_by_threshold`, a list of `threshold` and `percent` for each of
    THRESHOLDS. Raises UserError when values are not finite, or the profiles are of another network.
    """
    layers = _layers(network, images, compute)
    counts = {name: len(profile.low) for name, profile in profiles.items()}
    device = compute.device
    covered = {name: _nothing_covered(neurons, device) for name, neurons in counts.items()}
    limits = {name: (profile.low.to(device), profile.high.to(device)) for name, profile in profiles.items()}
    finite = torch.ones((), dtype=torch.bool, device=device)

    def update(layer: nn.Module, values: torch.Tensor) -> None:
        name, neurons = layers[layer], _spatial_means(layer, values)  # (B, C)
        if counts.get(name) != neurons.shape[1]:
            raise UserError("These profiles are of another network: record those of the network as it is")
        finite.logical_and_(neurons.isfinite().all())
        _mark(covered[name], neurons, _scaled(neurons, values), *limits[name])

    observe(network, list(layers)[:-1], update, images, compute, title, output=True)
    if not finite:
        raise not_finite()
    for flags in covered.values():
        flags["nc"], flags["snac"] = flags["highest"] > THRESHOLD, flags["nbc"][:, 1]
        flags["scc"] = flags["signs"].all(1)
    shares = {  # (C,) per layer
        name: {f"{key}_percent": 100 * flags[key].double().reshape(counts[name], -1).mean(1) for key in CRITERIA}
        for name, flags in covered.items()
    }
    whole = {key: torch.cat([share[key] for share in shares.values()]) for key in shares[OUTPUT]}
    highest = torch.cat([flags["highest"] for flags in covered.values()])
    return {
        "neurons": sum(counts.values()),
        "nc_by_threshold": [
            {"threshold": threshold, "percent": 100 * (highest > threshold).double().mean().item()}
            for threshold in THRESHOLDS
        ],
        **{key: share.mean().item() for key, share in whole.items()},
        "layers": [
            {"name": name, "neurons": counts[name], **{key: share[key].mean().item() for key in share}}
            for name, share in shares.items()
        ],
    }


def _nothing_covered(neurons: int, device: torch.device) -> dict[str, torch.Tensor]:
    """What the neurons of a layer have reached before the first image: flags, and the highest scaled value of each."""
    shapes = {"kmnc": (neurons, SECTIONS), "nbc": (neurons, 2), "tknc": (neurons,), "signs": (neurons, 2)}
    flags = {name: torch.zeros(shape, dtype=torch.bool, device=device) for name, shape in shapes.items()}
    return {**flags, "highest": torch.full((neurons,), -torch.inf, dtype=torch.float64, device=device)}


def _mark(
    covered: dict[str, torch.Tensor], neurons: torch.Tensor, scaled: torch.Tensor, low: torch.Tensor, high: torch.Tensor
) -> None:
    """Record what the neurons (B, C) of a layer reach; `scaled` are the same in [0, 1]."""
    covered["highest"] = torch.maximum(covered["highest"], scaled.amax(0))
    image, neuron = ((low < high) & (low <= neurons) & (neurons <= high)).nonzero(as_tuple=True)
    share = (neurons[image, neuron] - low[neuron]) / (high - low)[neuron]
    covered["kmnc"][neuron, (share * SECTIONS).long().clamp_max(SECTIONS - 1)] = True
    covered["nbc"][:, 0] |= (neurons < low).any(0)
    covered["nbc"][:, 1] |= (neurons > high).any(0)
    covered["tknc"][neurons.topk(min(TOP, neurons.shape[1]), dim=1).indices.flatten()] = True
    covered["signs"] |= torch.stack([(neurons > 0).any(0), (neurons <= 0).any(0)], 1)


def _layers(network: nn.Module, images: ImageSet, compute: Compute) -> dict[nn.Module, str]:
    """The modules at which outputs are observed, with their names: the first consumer of each, and the network."""
    names = {module: name for name, module in network.named_modules()}
    observed: dict[int, torch.Tensor] = {}
    layers: dict[nn.Module, str] = {}

    def add(module: nn.Module, values: torch.Tensor) -> None:
        if id(values) not in observed:
            observed[id(values)] = values  # kept, so that no later tensor gets its id
            layers[module] = names[module]

    consumers = [module for module in names if isinstance(module, CONSUMERS)]
    exact = replace(compute, precision="float32")  # in which `observe` passes the original tensors
    observe(network, [network, *consumers], add, images.select(torch.arange(1)), exact, "Finding the layers")
    del layers[network]  # its input is the images
    return {**layers, network: OUTPUT}


def _spatial_means(layer: nn.Module, values: torch.Tensor) -> torch.Tensor:
    """The mean over all positions of each channel of the layer's input: (B, C) float64."""
    channel = 1 if isinstance(layer, CONSUMERS) and not isinstance(layer, nn.Linear) else values.ndim - 1
    return (values.movedim(channel, 1).flatten(2).mean(2) if values.ndim > 2 else values).double()


def _scaled(neurons: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
    """The neurons (B, C) after a layer's values were scaled to [0, 1], image by image."""
    low, high = values.flatten(1).amin(1).double()[:, None], values.flatten(1).amax(1).double()[:, None]
    return torch.where(high > low, (neurons - low) / (high - low), torch.zeros_like(neurons))
