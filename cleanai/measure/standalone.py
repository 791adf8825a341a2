"""A network in a file that runs with PyTorch alone; and what every exported file says about its input."""

from __future__ import annotations

import contextlib
import copy
import io
import json
import logging
import re
import warnings
from pathlib import Path
from typing import Any, Iterator, Sequence

import torch
from torch import nn

from cleanai import UserError
from cleanai.data.images import Images, ImageSet, ImageSettings
from cleanai.data.sources import load_images
from cleanai.network.models import load_network
from cleanai.network.trial import copied, try_outputs
from cleanai.runtime.checkpoints import load_checkpoint
from cleanai.runtime.files import expanded, replacing
from cleanai.runtime.foreign import foreign_code
from cleanai.runtime.memory import is_shortage
from cleanai.runtime.packages import require_torch_export
from cleanai.runtime.scenario import Scenario

CHECKED_IMAGES = 128
TOLERANCE = 1e-3  # of the largest output; rounding gives about 1e-6 in float32
AS_FAR = 4  # times PyTorch's own error against float64, where the two differ by more


def save_standalone(
    network: nn.Module, path: str | Path, images: ImageSet, classes: Sequence[str] = ()
) -> dict[str, Any]:
    """Write a network as a `torch.export` program (.pt2), which PyTorch loads without this project or its class.

    The input is a float32 batch (B, 3, H, W) of any size B, normalised as `images` are, of their height and width.
    `images` are the network's own kind of images: they are only for the check and for what the file says. Its extra
    file `cleanai.json` holds `image_size` [H, W], `mean` and `std` (per channel, of pixels between 0 and 1) and
    `classes`, the names of the outputs, if they are given. docs/own-network.md shows how to load it.

    Returns `largest_difference`, of the outputs from the network's own. Raises UserError, and writes nothing, when
    PyTorch is older than 2.2, when it cannot export the network, and when the outputs differ by more than rounding.
    """
    require_torch_export("save_standalone")
    path = writable(path)
    network, inputs = for_export(network, images)
    facts = image_facts(network, images, classes)
    file = io.BytesIO()
    with exporting(network, f"torch.export of PyTorch {torch.__version__}"):
        batch = torch.export.Dim("batch")
        example = torch.zeros_like(inputs[:2])  # the file keeps it: none of the user's pictures
        program = torch.export.export(network, (example,), dynamic_shapes=({0: batch},))
        torch.export.save(program, file, extra_files={"cleanai.json": json.dumps(facts, ensure_ascii=False)})
        file.seek(0)
        run = torch.export.load(file).module()
    difference = compared(network, run, inputs, f"The program of PyTorch {torch.__version__}")
    write(path, file.getvalue())
    return {"largest_difference": difference}


def save_scenario(scenario: Scenario, data_dir: Path) -> None:
    """Write the final network of a finished pruning script with `save_standalone`."""
    images = scenario_images(scenario, data_dir)
    network = load_network(scenario.final, scenario.model)
    save_standalone(network, scenario.standalone, images.test, list(images.classes))


def scenario_images(scenario: Scenario, data_dir: Path) -> Images:
    """The images of a finished script, read as script 1 read them and normalised as its final network takes them."""
    checkpoint = load_checkpoint(scenario.final)
    settings = ImageSettings.of(load_checkpoint(scenario.fine_tuned)["config"])
    images = load_images(scenario.dataset, data_dir, settings)
    images.require_classes(checkpoint["classes"], scenario.final)
    return images.normalised_by(checkpoint["mean"], checkpoint["std"])


def image_facts(network: nn.Module, images: ImageSet, classes: Sequence[str]) -> dict[str, Any]:
    """What a program must know to feed a network: `image_size` [H, W], `mean`, `std`, and `classes` if they are given.

    `network` is as `for_export` gives it. UserError when there is not one name for each output.
    """
    facts: dict[str, Any] = {
        "image_size": list(images.pixels.shape[2:]),
        "mean": [round(value, 7) for value in images.mean.tolist()],
        "std": [round(value, 7) for value in images.std.tolist()],
    }
    if isinstance(classes, str) or not all(isinstance(name, str) for name in classes):
        raise UserError(f'classes is {classes!r}: give a list of names, for example classes=["cat", "dog"]')
    if len(classes):
        one, _ = next(images.select(torch.arange(1)).batches(1))
        outputs = try_outputs(network, one.cpu().contiguous(), "images").shape[1]
        if len(classes) != outputs:
            raise UserError(
                f"classes holds {len(classes)} names, and the network has {outputs} outputs: give one for each"
            )
        facts["classes"] = list(classes)
    return facts


def for_export(network: nn.Module, images: ImageSet) -> tuple[nn.Module, torch.Tensor]:
    """A copy of a network on the CPU in float32 and evaluation mode, and up to 128 normalised images (N, 3, H, W).

    There are at least three, more than an export is made with. UserError when the network does not take them, or gives
    random or infinite outputs.
    """
    if not isinstance(network, nn.Module):
        raise UserError(f"network is a {type(network).__name__}, and must be a torch.nn.Module")
    if not isinstance(images, ImageSet):
        raise UserError(f"images is a {type(images).__name__}: make it with cleanai.image_set(folder or tensor)")
    chosen = images.sample(CHECKED_IMAGES, seed=0)
    chosen = chosen.select(torch.arange(max(3, len(chosen))) % len(chosen))
    inputs = next(chosen.batches(len(chosen)))[0].cpu().contiguous()
    network = copied(network).cpu().float().eval().to(memory_format=torch.contiguous_format)
    outputs, again = (try_outputs(network, inputs[:2], "images") for _ in range(2))
    if not outputs.isfinite().all():
        raise UserError(f"{type(network).__name__} gives outputs that are not finite: it is not exported")
    if (again - outputs).abs().max() > TOLERANCE * outputs.abs().max():
        raise UserError(
            f"{type(network).__name__} gives other outputs for the same images each time: an export cannot be checked"
        )
    return network, inputs


def compared(network: nn.Module, run: Any, inputs: torch.Tensor, name: str) -> float:
    """The largest absolute difference of the outputs of `run`, an exported network, from the network's own.

    Where it is more than rounding, both are compared with the network in float64: with large activations PyTorch's
    float32 may be as far from it. Raises UserError when `run` is farther.
    """
    with torch.inference_mode():
        expected, given = network(inputs), run(inputs)
    if given.shape != expected.shape:
        shapes = [" x ".join(map(str, outputs.shape)) for outputs in (given, expected)]
        raise UserError(f"{name} gives {shapes[0]} outputs, and PyTorch {shapes[1]}: it is not written")
    largest, difference = expected.abs().max().item(), (given - expected).abs().max().item()
    if difference <= TOLERANCE * largest:
        return difference
    exact = _in_float64(network, inputs)
    theirs, ours = ((outputs.double() - exact).abs().max().item() for outputs in (given, expected))
    if not theirs <= AS_FAR * ours:
        raise UserError(
            f"{name} gives other outputs than PyTorch (by up to {difference:.2g}; they are up to {largest:.2g}; from a "
            f"run in float64 it differs by up to {theirs:.2g}, PyTorch by {ours:.2g}): nothing is written, try another "
            "version of it"
        )
    return difference


def _in_float64(network: nn.Module, inputs: torch.Tensor) -> torch.Tensor:
    try:
        with torch.inference_mode():
            return copy.deepcopy(network).double()(inputs.double()).double()
    except RuntimeError as error:  # it makes float32 tensors of its own
        if is_shortage(error):
            raise
        with torch.inference_mode():
            return network(inputs).double()


@contextlib.contextmanager
def exporting(network: nn.Module, exporter: str) -> Iterator[None]:
    """Run an exporter in silence. What it raises, which may be anything, becomes a UserError of one line."""

    def explain(error: BaseException) -> UserError:
        return UserError(f"{type(network).__name__} cannot be exported by {exporter}: {_reason(network, error)}")

    with foreign_code(explain, (OSError,)), silent():
        yield


@contextlib.contextmanager
def silent() -> Iterator[None]:
    """Nothing is printed, logged or warned of."""
    level, nowhere = logging.root.manager.disable, io.StringIO()
    redirected = contextlib.redirect_stdout(nowhere), contextlib.redirect_stderr(nowhere)
    try:
        logging.disable(logging.CRITICAL)
        with warnings.catch_warnings(), redirected[0], redirected[1]:
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(level)


def _reason(network: nn.Module, error: BaseException) -> str:
    """The first sentence of the deepest cause, the layers with the operator in it, the line of code, where known."""
    place = re.search(r'File "([^"]+)", line (\d+), in forward\b', str(error))
    while error.__cause__ is not None:
        error = error.__cause__
    first = re.split(r"[.!] (?=[A-Z])|\n", str(error).strip())[0][:200] or type(error).__name__
    operator = re.search(r"aten(?:::|\.)_?(\w+)|operator '?(\w+)", first)
    kind = (operator[1] or operator[2]).replace("_", "") if operator else ""
    layers = [name for name, layer in network.named_modules() if type(layer).__name__.lower() == kind]
    shown = f" (layer {', '.join(layers[:3])})" if layers else ""
    return f"{first}{shown}" + (f" (in {Path(place[1]).name}, line {place[2]})" if place else "")


def writable(path: str | Path) -> Path:
    """The path of a file to write. UserError when it is a folder."""
    path = expanded(path)
    if path.is_dir():
        raise UserError(f"{path} is a folder: give the name of a file")
    return path


def write(path: Path, content: bytes) -> None:
    """Write a whole file atomically. UserError when it cannot be written."""
    try:
        with replacing(path) as file:
            file.write(content)
    except OSError as error:
        raise UserError(f"{path} cannot be written ({error.strerror or error}): give another path") from error
