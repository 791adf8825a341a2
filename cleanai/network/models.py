"""Networks: ResNet-18 for small images, those of torchvision, and pruned networks rebuilt from their weights."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import torch
import torchvision
from torch import nn
from torchvision.models import ResNet, resnet18

from cleanai import UserError
from cleanai.network.activations import has_finite_weights
from cleanai.network.own import own_network
from cleanai.runtime.checkpoints import load_checkpoint, not_numbers, save_checkpoint
from cleanai.runtime.distributed import first_before_others
from cleanai.runtime.download import FAILURES, download
from cleanai.runtime.files import file_digest, one_line, remove_leftovers
from cleanai.runtime.foreign import foreign_code
from cleanai.runtime.scenario import is_from_file, network_source


def build(model: str, classes: int) -> nn.Module:
    """The network that a scenario calls `model`, with `classes` outputs and random weights.

    "ResNet18" is `resnet18_for_small_images`. "nets/my_net.py:MyNet" is what MyNet(classes) of that Python file
    returns, see `own_network`. Any other name is that of a classification network of torchvision, without regard to
    capitals and underscores: "MobileNetV2" is mobilenet_v2, and "torchvision:resnet18" the ResNet-18 with a 7x7 stem.
    Raises UserError when there is none.
    """
    source, name = network_source(model)
    if is_from_file(model):
        return own_network(source, name, classes)
    name = _torchvision_name(model)
    if name == "resnet18" and not source:
        return resnet18_for_small_images(classes)
    without_extra_outputs = {"aux_logits": False, "init_weights": True} if name in ("googlenet", "inception_v3") else {}
    return torchvision.models.get_model(name, num_classes=classes, **without_extra_outputs)


def imagenet_url(model: str) -> str:
    """The address of torchvision's ImageNet weights for the network that a scenario calls `model`.

    UserError when it is not one of torchvision's.
    """
    if is_from_file(model):
        raise UserError(f"There are no ImageNet weights for {model}: use --weights none, or a file with your own")
    return torchvision.models.get_model_weights(_torchvision_name(model)).DEFAULT.url


def _torchvision_name(model: str) -> str:
    # Underscores between digits stay: regnet_y_1_6gf is not regnet_y_16gf.
    names = {_short(name): name for name in torchvision.models.list_models(module=torchvision.models)}
    try:
        return names[_short(network_source(model)[1])]
    except KeyError as error:
        raise UserError(
            f"There is no network called {model}: MODEL in the script is ResNet18, another of torchvision's such as "
            "MobileNetV2, or your own, as nets/my_net.py:MyNet"
        ) from error


def _short(name: str) -> str:
    return re.sub(r"(?<!\d)_|_(?!\d)", "", name.lower())


def resnet18_for_small_images(classes: int) -> ResNet:
    """ResNet-18 with a 3x3 stem of stride 1, no max-pool, and `classes` outputs (11,173,962 parameters for 10)."""
    network = resnet18(weights=None)
    network.conv1 = nn.Conv2d(3, 64, kernel_size=3, stride=1, padding=1, bias=False)
    nn.init.kaiming_normal_(network.conv1.weight, mode="fan_out", nonlinearity="relu")  # as torchvision does
    network.maxpool = nn.Identity()
    network.fc = nn.Linear(network.fc.in_features, classes)
    return network


@first_before_others()
def download_imagenet_weights(models_dir: Path, url: str) -> Path:
    """The file of ImageNet weights from `url` in `models_dir`, downloaded when missing, its checksum verified.

    Raises UserError when it cannot be downloaded, or when the file there is not the published one.
    """
    path = models_dir / url.rsplit("/", 1)[-1]
    checksum = path.stem.rsplit("-", 1)[-1]  # the name ends in the first digits of the SHA-256
    remove_leftovers(path)
    if not path.exists():
        try:
            download(url, path, checksum)
        except FAILURES as error:
            raise UserError(
                f"The ImageNet weights could not be downloaded ({one_line(error)}): put {url} by hand at {path}, "
                "or start from random weights with --weights none"
            ) from error
    elif not file_digest(path).startswith(checksum):
        raise UserError(f"{path} is not the published file (its SHA-256 differs): delete it and run again")
    return path


def save_network(path: Path, network: nn.Module, facts: dict[str, Any]) -> None:
    """Write a checkpoint: the network's weights, and `facts` (model, dataset, classes, config, ...) beside them.

    Subnormal weights become zero first, in the network too, so that the saved network is the measured one. They would
    slow a CPU down tenfold and change nothing.
    """
    state = network.state_dict()
    with torch.no_grad():
        for tensor in state.values():
            if tensor.is_floating_point():
                tensor.masked_fill_(tensor.abs() < torch.finfo(tensor.dtype).tiny, 0)
    for name in list(state):
        state[name] = state[name].cpu()  # in place: a new dictionary would lose the versions of the modules
    save_checkpoint(path, {**facts, "state_dict": state})


def load_network(path: Path, model: str | None = None) -> nn.Module:
    """The network in a checkpoint, pruned or not, in evaluation mode on the CPU. UserError when it cannot be read.

    `model` is the MODEL that it must be of. A network from a Python file is only loaded when `model` names that file:
    a checkpoint must not choose which code runs.
    """
    checkpoint = load_checkpoint(path, **({} if model is None else {"model": model}))
    if model is None and is_from_file(checkpoint["model"]):
        raise UserError(f"{path} holds a network from {checkpoint['model']}: load_network(path, model=...) loads it")
    return network_from(checkpoint, path)


def network_from(checkpoint: dict[str, Any], path: Path) -> nn.Module:
    """The network in a checkpoint that was read from `path`. UserError when its weights do not fit the model."""
    model, classes, state = checkpoint["model"], len(checkpoint["classes"]), checkpoint["state_dict"]
    network = build(model, classes).eval()
    for name, tensor in network.state_dict().items():
        stored = state.get(name)
        kind = tensor.ndim, tensor.is_floating_point()
        if not isinstance(stored, torch.Tensor) or kind != (stored.ndim, stored.is_floating_point()):
            raise UserError(f"{path} does not hold a {model}: {name} is missing or of another kind")
    give_shapes(network, state)
    load_into(network, state, path)
    if not has_finite_weights(network):
        raise not_numbers(path)
    weight = next(network.parameters())

    def explain(error: BaseException) -> UserError:
        return UserError(f"{path} does not hold a {model} that works: {type(error).__name__}: {one_line(error)}")

    with foreign_code(explain), torch.inference_mode():  # finds layers whose shapes do not fit each other
        outputs = network(torch.zeros(1, 3, *checkpoint["image_size"]).to(weight.dtype))
    shape = tuple(outputs.shape) if isinstance(outputs, torch.Tensor) else type(outputs).__name__
    if shape != (1, classes):
        raise UserError(f"{path} does not hold a {model} of {classes} classes: its outputs are {shape}")
    return network


def load_into(network: nn.Module, state: dict[str, torch.Tensor], path: Path) -> None:
    """Load a state dict that was read from `path`. UserError when it is that of another network."""
    own = network.state_dict()
    if own.keys() != state.keys() or any(own[name].shape != state[name].shape for name in own):
        raise UserError(f"{path} does not fit this network: it is from a run with another one. Start over with --fresh")
    own.update(state)  # with the versions of this network's modules: older checkpoints have none
    network.load_state_dict(own)


def give_shapes(network: nn.Module, state: dict[str, torch.Tensor]) -> None:
    """Give every layer of an unpruned network the shape its tensors have in `state`. Shared weights stay shared.

    Raises KeyError when `state` lacks a tensor of the network.
    """
    shaped: dict[nn.Parameter, nn.Parameter] = {}
    for name, module in network.named_modules():
        prefix = f"{name}." if name else ""
        for key, tensor in module._parameters.items():
            if tensor is not None:
                like = torch.empty_like(state[prefix + key])  # its order in memory, too
                shaped.setdefault(tensor, nn.Parameter(like, requires_grad=tensor.requires_grad))
                module.register_parameter(key, shaped[tensor])
        for key, buffer in module._buffers.items():
            if buffer is not None and key not in module._non_persistent_buffers_set:
                module.register_buffer(key, torch.empty_like(state[prefix + key]))
        if isinstance(module, nn.modules.conv._ConvNd):
            if module.weight.shape[0] % module.groups:  # a depthwise one: one group per channel
                module.groups = module.weight.shape[0]
            widths = module.weight.shape[0], module.weight.shape[1] * module.groups
            module.in_channels, module.out_channels = widths if module.transposed else widths[::-1]
        elif isinstance(module, nn.modules.batchnorm._NormBase):
            sized = module.weight if module.running_mean is None else module.running_mean
            module.num_features = module.num_features if sized is None else len(sized)
        elif isinstance(module, nn.PReLU):
            module.num_parameters = len(module.weight)
        elif isinstance(module, nn.Linear):
            module.out_features, module.in_features = module.weight.shape
