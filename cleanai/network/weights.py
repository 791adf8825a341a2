"""The weights that a network starts from: read from a file, adapted to the network, or refused in one line."""

from __future__ import annotations

import pickle
import textwrap
import zipfile
from pathlib import Path
from typing import Any

import torch
from torch import nn

from cleanai import UserError
from cleanai.network.models import download_imagenet_weights, imagenet_url
from cleanai.runtime.checkpoints import load_plain_data, verified_size
from cleanai.runtime.files import one_line, printable
from cleanai.runtime.foreign import foreign_code

_WRAPPERS = (
    "state_dict",
    "model_state_dict",
    "model",
)  # keys under which others, and our own checkpoints, keep a state dict
_PREFIXES = ("module.", "_orig_mod.")  # left by DataParallel and by torch.compile
_TRAINING_ONLY = ("aux1.", "aux2.", "AuxLogits.")  # extra classifiers of GoogLeNet and Inception, which are not built


def start_from(
    network: nn.Module, model: str, weights: str | Path, models_dir: Path, trained: bool = False
) -> nn.Module:
    """Load the weights that a network starts from, in place, and print which; return the network.

    `weights` is "imagenet" (torchvision's published file, downloaded into `models_dir` when missing), "none" (random
    weights stay), or a file for `load_weights`. Raises UserError as that and `download_imagenet_weights` do, and when
    the network is to be `trained` already and the file has no classifier for it.
    """
    if weights == "none":
        return network
    published = weights == "imagenet"
    path = download_imagenet_weights(models_dir, imagenet_url(model)) if published else Path(weights)
    if load_weights(network, path, model):
        print(f"Weights: {path}")
    elif trained:
        raise UserError(f"{path} has no classifier for these classes: train one, with --epochs 1 or more")
    else:
        print(f"Weights: {path}, without a classifier for these classes: that starts from random weights")
    return network


def require_weights(model: str, weights: str | Path) -> None:
    """Raise the UserErrors of `start_from` that do not depend on the network's shapes, before anything is loaded."""
    if weights == "imagenet":
        imagenet_url(model)
    elif weights != "none":
        read_weights(Path(weights))


def read_weights(path: Path) -> dict[str, torch.Tensor]:
    """The state dict in `path`, on the CPU: a .safetensors file, or what torch.save wrote.

    It may lie under one of `_WRAPPERS`. Nothing but plain data is unpickled. Raises UserError when the file is damaged
    or holds anything else.
    """
    content: Any
    how = "save the weights with torch.save(network.state_dict(), FILE), or as .safetensors"

    def explain(error: BaseException) -> UserError:
        if path.suffix != ".safetensors" and not zipfile.is_zipfile(path):
            reason = "it is damaged, or holds other things than tensors"
        elif isinstance(error, pickle.UnpicklingError):
            reason = "it holds a whole network or other Python objects, which are not loaded"
        else:
            reason = textwrap.shorten(one_line(error), 200, placeholder=" ...")
        return UserError(f"{path} cannot be read as weights ({reason}): {how}")

    with foreign_code(explain, (OSError,)):  # a pickle can make torch.load raise anything
        if path.suffix == ".safetensors":
            from safetensors.torch import load_file

            content = load_file(path)
        else:
            if zipfile.is_zipfile(path):  # files of PyTorch before 1.6 are not
                verified_size(path)
            content = load_plain_data(path)
    while isinstance(content, dict) and any(isinstance(content.get(key), dict) for key in _WRAPPERS):
        content = next(content[key] for key in _WRAPPERS if isinstance(content.get(key), dict))
    entries = content if isinstance(content, dict) else {}
    others = [printable(str(name)) for name, value in entries.items() if not isinstance(value, torch.Tensor)]
    if others or not entries:
        which = f" ({others[0]} is no tensor)" if others else ""
        raise UserError(f"{path} holds no state dict{which}, nor one under {' or '.join(_WRAPPERS)}: {how}")
    return {str(name): tensor for name, tensor in entries.items()}


def load_weights(network: nn.Module, path: Path, model: str) -> bool:
    """Load the weights in `path` into a network; return whether they include its classifier.

    Names may begin with "module." or "_orig_mod.". Of a larger kernel of the first convolution the centre is used. A
    classifier of another size is not loaded. Raises UserError, before the network is changed, that names the first
    tensor that is missing, has another shape, is not in the network called `model`, or is not finite (a mask may hold
    infinities where the network has them).
    """
    own = network.state_dict()
    given = _with_fitting_names(read_weights(path), own)
    _add_shared(given, own)
    layers = [name for name, module in network.named_modules() if isinstance(module, (nn.Conv2d, nn.Linear))]
    if not layers:
        raise UserError(f"{model} has no convolution and no linear layer")
    stem, classifier = f"{layers[0]}.weight", f"{layers[-1]}."
    if stem in given:
        given[stem] = _centre(given[stem], own[stem])
    of_classifier = [name for name in own if name.startswith(classifier)]
    has_classifier = all(name in given and given[name].shape == own[name].shape for name in of_classifier)
    if not has_classifier:
        given = {name: tensor for name, tensor in given.items() if not name.startswith(classifier)}
    needed = [name for name in own if has_classifier or name not in of_classifier]

    def refuse(reason: str) -> None:
        raise UserError(f"{path} does not fit {model}: {reason}")

    for name in needed:
        if name not in given:
            if not name.endswith("num_batches_tracked"):
                refuse(f"{name} is missing in it")
        elif given[name].shape != own[name].shape:
            refuse(f"{name} is {_shape(given[name])} in it, and {_shape(own[name])} in the network")
        elif not (given[name].isfinite() | (given[name] == own[name])).all():
            refuse(f"{name} holds numbers that are not finite")
    for name in given:
        if name not in own and not name.startswith(_TRAINING_ONLY):
            refuse(f"the network has no {name}")
    network.load_state_dict({name: given[name] for name in needed if name in given}, strict=False)
    return has_classifier


def _add_shared(given: dict[str, torch.Tensor], own: dict[str, torch.Tensor]) -> None:
    """Add the weights that layers share to all of them: safetensors keeps them once."""
    for name in own.keys() - given.keys():
        for other in own.keys() & given.keys():
            if own[name].data_ptr() == own[other].data_ptr() and own[name].shape == own[other].shape:
                given[name] = given[other]


def _with_fitting_names(given: dict[str, torch.Tensor], own: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The tensors without as many prefixes of wrappers as it takes for the most names of the network."""
    forms = [given]
    while any(name.startswith(_PREFIXES) for name in forms[-1]):
        forms.append(
            {name.split(".", 1)[1] if name.startswith(_PREFIXES) else name: x for name, x in forms[-1].items()}
        )
    return max(forms, key=lambda form: len(form.keys() & own.keys()))


def _centre(kernel: torch.Tensor, wanted: torch.Tensor) -> torch.Tensor:
    """The centre of a larger kernel (O, I, H, W), if the kernel size is the only difference."""
    if kernel.ndim != 4 or kernel.shape[:2] != wanted.shape[:2]:
        return kernel
    margins = [more - less for more, less in zip(kernel.shape[2:], wanted.shape[2:])]
    if any(margin < 0 or margin % 2 for margin in margins):
        return kernel
    top, left = (margin // 2 for margin in margins)
    return kernel[:, :, top : top + wanted.shape[2], left : left + wanted.shape[3]]


def _shape(tensor: torch.Tensor) -> str:
    return "x".join(map(str, tensor.shape)) or "one number"
