"""ONNX export: written, and checked against PyTorch. Needs the packages of the extra "onnx"."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any, Callable, Sequence

import torch
import torch.nn.functional as F
from torch import nn

from cleanai import UserError
from cleanai.data.images import ImageSet
from cleanai.measure.standalone import compared, exporting, for_export, image_facts, writable, write
from cleanai.runtime.foreign import foreign_code
from cleanai.runtime.memory import is_shortage
from cleanai.runtime.packages import ONNX, require_packages

if TYPE_CHECKING:
    import onnxruntime

INPUT, OUTPUT = "images", "logits"


def export_onnx(network: nn.Module, path: str | Path, images: ImageSet, classes: Sequence[str] = ()) -> dict[str, Any]:
    """Write a network as ONNX with float32 weights, batch norm folded into the convolutions.

    The input `images` is a batch (B, 3, H, W) of any size B, normalised as the argument `images` are; the output
    `logits` is (B, classes). Height and width are free, too, where the network takes other sizes and gives the right
    outputs there; otherwise they are those of `images`. A line says which. `images` are the network's own kind of
    images, for the check and for the metadata of the file: `image_size` [H, W], `mean`, `std` (per channel, of pixels
    between 0 and 1) and `classes`, if they are given, each as JSON.

    Returns `largest_difference`, of ONNX Runtime's outputs from PyTorch's on `images`, and `free_image_size`. Raises
    UserError, and writes nothing, when packages are missing, when the network cannot be exported, and when the outputs
    differ by more than rounding.
    """
    require_packages("export_onnx", ONNX)
    path = writable(path)
    network, inputs = for_export(network, images)
    facts = image_facts(network, images, classes)
    model, free = _smallest_limits(network, inputs, facts)
    difference = compared(network, runner(model), inputs, runtime_name())
    write(path, model)
    height, width = facts["image_size"]
    print(f"{path.name}: any batch size, {'any image size' if free else f'images of {height} x {width} pixels only'}")
    return {"largest_difference": difference, "free_image_size": free}


def _smallest_limits(network: nn.Module, inputs: torch.Tensor, facts: dict[str, Any]) -> tuple[bytes, bool]:
    """The network as ONNX, and whether its height and width are free: checked with images of other sizes."""
    others = [_resized(inputs[:2], *sides) for sides in _other_sizes(*inputs.shape[2:])]
    if all(_takes(network, other, inputs) for other in others):
        try:
            model = _with_metadata(onnx_model(network, inputs[:2], True), facts)
            run = runner(model)
            for other in others:
                compared(network, run, other, "ONNX Runtime")
            return model, True
        except UserError:
            pass  # not with other sizes
    return _with_metadata(onnx_model(network, inputs[:2], False), facts), False


def _other_sizes(height: int, width: int) -> list[tuple[int, int]]:
    return [(2 * height, 3 * width), (height + 7, width + 3)]


def _resized(images: torch.Tensor, height: int, width: int) -> torch.Tensor:
    return F.interpolate(images, (height, width), mode="bilinear", align_corners=False)


def _takes(network: nn.Module, other: torch.Tensor, images: torch.Tensor) -> bool:
    """Whether a network gives as many outputs for images of another size."""
    try:
        with torch.inference_mode():
            return network(other).shape == network(images[: len(other)]).shape
    except Exception as error:  # of the network, for a size that it was not made for
        if is_shortage(error):
            raise
        return False


def onnx_model(network: nn.Module, example: torch.Tensor, free_size: bool) -> bytes:
    """A network as ONNX, for a batch of any size; of images of any size, too, with `free_size`."""
    # Both exporters fold batch norm into the convolutions of a network in evaluation mode.
    # PyTorch 2.9 deprecates the older exporter.
    sides = {0: "batch", **({2: "height", 3: "width"} if free_size else {})}
    options: dict[str, Any]
    if torch.__version__ >= (2, 9):
        options = {"dynamo": True, "dynamic_shapes": (sides,), "external_data": False, "verbose": False}
    else:
        options = {"dynamic_axes": {INPUT: sides, OUTPUT: {0: "batch"}}}
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.onnx"
        with exporting(network, f"torch.onnx.export of PyTorch {torch.__version__}"):
            torch.onnx.export(network, (example,), str(path), input_names=[INPUT], output_names=[OUTPUT], **options)
        return path.read_bytes()


def _with_metadata(model: bytes, facts: dict[str, Any]) -> bytes:
    """An ONNX model with `facts` in its metadata, each as JSON."""
    import onnx

    loaded = onnx.load_model_from_string(model)
    del loaded.metadata_props[:]  # every entry is ours
    for key, value in facts.items():
        loaded.metadata_props.add(key=key, value=json.dumps(value, ensure_ascii=False))
    return loaded.SerializeToString()


def runner(model: bytes) -> Callable[[torch.Tensor], torch.Tensor]:
    """A function of normalised images (B, 3, H, W) that runs an ONNX model. UserError when ONNX Runtime cannot."""

    def explain(_: BaseException) -> UserError:  # the errors of ONNX Runtime have no common class
        return UserError(
            f"{runtime_name()} cannot run the exported network: try another version, "
            "pip install --upgrade onnx onnxruntime onnxscript"
        )

    def run(images: torch.Tensor) -> torch.Tensor:
        with foreign_code(explain):
            return torch.from_numpy(session.run([OUTPUT], {INPUT: images.contiguous().numpy()})[0])

    with foreign_code(explain):
        session = open_session(model)
    return run


def runtime_name() -> str:
    """For example "ONNX Runtime 1.20.0", by whichever package it was installed (onnxruntime, onnxruntime-gpu, ...)."""
    import onnxruntime

    return f"ONNX Runtime {onnxruntime.__version__}"


def open_session(model: bytes) -> onnxruntime.InferenceSession:
    """ONNX Runtime on the CPU, with as many threads as PyTorch."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    options.log_severity_level = 4  # errors are raised as well
    # Idle threads would spin and slow down the next turn.
    options.add_session_config_entry("session.force_spinning_stop", "1")
    return onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])
