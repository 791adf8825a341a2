"""Whether a network of the user's does what it is to do, found on a few images before the work."""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from cleanai import UserError
from cleanai.data.images import Images
from cleanai.runtime import distributed
from cleanai.runtime.compute import Compute
from cleanai.runtime.files import one_line
from cleanai.runtime.foreign import foreign_code
from cleanai.runtime.memory import is_shortage

# Pixels, tried when pictures do not fit.
_SIDES = (16, 32, 48, 64, 96, 128, 160, 192, 224, 256, 299, 320, 384, 448, 512)


def copied(network: nn.Module) -> nn.Module:
    """A deep copy of a network. UserError when it holds something that cannot be copied."""

    def explain(error: BaseException) -> UserError:
        return UserError(f"{type(network).__name__} cannot be copied ({type(error).__name__}: {one_line(error)[:200]})")

    with foreign_code(explain):
        return copy.deepcopy(network)


def try_run(network: nn.Module, inputs: torch.Tensor, name: str) -> Any:
    """What a network in evaluation mode gives for images that it may not take, called `name`; UserError then."""

    def explain(error: BaseException) -> UserError:
        size = " x ".join(map(str, inputs.shape[1:]))
        return UserError(
            f"{type(network).__name__} does not take {name} of {size} ({one_line(error)[:200]}): "
            "give images of the size that it was trained on, image_set(folder, size=N)"
        )

    with foreign_code(explain), torch.inference_mode():
        return network(inputs)


def try_outputs(network: nn.Module, inputs: torch.Tensor, name: str) -> torch.Tensor:
    """The outputs (B, K, ...) of a network as `try_run` gives them. UserError unless one tensor, a row per image."""
    outputs, title = try_run(network, inputs, name), type(network).__name__
    if not isinstance(outputs, torch.Tensor) or outputs.ndim < 2 or len(outputs) != len(inputs):
        found = "x".join(map(str, getattr(outputs, "shape", ()))) or f"a {type(outputs).__name__}"
        raise UserError(f"{title} gives {found} for {len(inputs)} images, and must give one tensor, a row per image")
    return outputs


def in_fitting_order(
    network: nn.Module, images: Images, batch_size: int | None, compute: Compute, trained: bool = True
) -> tuple[Compute, Images]:
    """`compute` and `images` in the order of memory in which a network works; UserErrors of `try_network` when in none.

    That is channels last, which is fastest, or for a network that flattens with `view` the usual order.
    """
    try:
        try_network(compute.place(copied(network)), images, batch_size, compute, trained)
        return compute, images
    except UserError:
        usual = replace(compute, memory_format=torch.contiguous_format)
        ordered = images.ordered(usual.memory_format)
        try_network(usual.place(copied(network)), ordered, batch_size, usual, trained)
        return usual, ordered


def try_network(
    network: nn.Module, images: Images, batch_size: int | None, compute: Compute, trained: bool = True
) -> None:
    """Raise UserError when a network cannot classify these images, or cannot be trained on them in such batches.

    A copy of the network, on the device of `compute`, runs on one and two images in evaluation mode, and in training
    mode on as many as a batch has, at most two, if it is `trained` backward, too. None leaves that out. Network and
    random numbers stay as they are. What the network raises by itself, other than a lack of memory, becomes one line.
    """
    trial, classes, name = copied(network), len(images.classes), type(network).__name__
    height, width = images.test.pixels.shape[2:]
    size = f"{height} x {width} pixels"
    devices = [compute.device] if compute.device.type == "cuda" else []
    with torch.random.fork_rng(devices), torch.no_grad(), compute.autocast():
        for count in (1, 2):
            inputs = next(images.test.select(torch.arange(count) % len(images.test)).batches(count))[0]
            fault, advice = _fault(trial.eval(), inputs, classes)
            if fault and not advice:
                sides = sorted(_SIDES, key=lambda side: abs(side - min(height, width)))
                pictures = (F.interpolate(inputs, (side, side)) for side in sides)
                fitting = next((each.shape[-1] for each in pictures if not _fault(trial, each, classes)[0]), None)
                advice = (
                    f"{fitting} x {fitting} pixels fit: use --image-size {fitting} in script 1"
                    if fitting
                    else "Use another network"
                )
            if fault:
                raise UserError(f"{name} does not work on images of {size}: {fault}. {advice}")
        if batch_size is None:
            return
        count = min(2, batch_size, len(images.train))
        inputs = next(images.train.select(torch.arange(count)).batches(count))[0]
        fault, advice = _fault(trial.train(), inputs, classes)
        if fault and count == 1 and not _fault(trial, inputs.repeat(2, 1, 1, 1), classes)[0]:
            option = "--batch-size 1" if batch_size == 1 else "One training image"
            raise UserError(f"{option} is too little for batch norm in {name}: {fault}. Use at least 2")
        if fault:
            raise UserError(f"{name} cannot be trained on images of {size}: {fault}. {advice or 'Use another network'}")
    if not trained:
        return
    with torch.random.fork_rng(devices):
        _require_gradients(trial, inputs, compute)


def _require_gradients(network: nn.Module, inputs: torch.Tensor, compute: Compute) -> None:
    """UserError unless the weights of a network in training mode get gradients."""
    name = type(network).__name__

    def explain(error: BaseException) -> UserError:
        return UserError(f"{name} cannot be trained: its backward pass fails ({one_line(error)[:200]})")

    with foreign_code(explain), torch.enable_grad():
        with compute.autocast():
            outputs = network(inputs)
        if not outputs.requires_grad:
            raise UserError(f"{name} cannot be trained: no weight that its outputs depend on has requires_grad")
        outputs.float().logsumexp(1).sum().backward()
    unused = [title for title, weight in network.named_parameters() if weight.requires_grad and weight.grad is None]
    if unused and distributed.processes() > 1:
        raise UserError(f"{name} cannot be trained by several processes: its outputs do not depend on {unused[0]}")


def _fault(network: nn.Module, inputs: torch.Tensor, classes: int) -> tuple[str, str]:
    """What is wrong with a network or its outputs for these inputs, and what to do if it is not their size."""
    running = [""]

    def enter(module: nn.Module, args: tuple[Any, ...]) -> None:
        running.append(names[module])

    names = {module: name for name, module in network.named_modules() if name and not list(module.children())}
    hooks = [module.register_forward_pre_hook(enter) for module in names]
    try:
        outputs = network(inputs)
    except Exception as error:  # the network may be anybody's
        if is_shortage(error):
            raise
        layer = dict(network.named_modules())[running[-1]]
        wanted, given = getattr(layer, "in_channels", None), inputs.shape[1]
        if len(running) == 2 and wanted not in (None, given):
            return f"its first layer {running[-1]} reads {wanted} channels, not {given} (RGB)", f"Let it read {given}"
        return f"{one_line(error)}{f' (layer {running[-1]})' if running[-1] else ''}", ""
    finally:
        for hook in hooks:
            hook.remove()
    shape = tuple(outputs.shape) if isinstance(outputs, torch.Tensor) else type(outputs).__name__
    expected = (len(inputs), classes)
    if shape == expected:
        return "", ""
    return f"its outputs are {shape}, not {expected}", f"Let it return one number for each of {classes} classes"
