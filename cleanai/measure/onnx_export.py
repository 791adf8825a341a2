"""ONNX export: written, checked against PyTorch, and timed beside it. Needs the packages of the extra "onnx"."""

from __future__ import annotations

import copy
import functools
import tempfile
from importlib.metadata import version
from pathlib import Path
from typing import Any

import onnx
import onnxruntime
import torch
from torch import nn

from cleanai import UserError
from cleanai.data.images import ImageSettings
from cleanai.data.sources import load_images
from cleanai.measure.latency import LATENCY_CALLS, LATENCY_TURNS, distribution_ms, time_in_turns
from cleanai.network.models import load_network
from cleanai.runtime.checkpoints import load_checkpoint
from cleanai.runtime.compute import choose_compute
from cleanai.runtime.distributed import end_all_but_first
from cleanai.runtime.files import write_bytes
from cleanai.runtime.scenario import Scenario

CHECKED_IMAGES = 128
TOLERANCE = 1e-3  # of the largest output; rounding gives about 1e-6 in float32
INPUT, OUTPUT = "images", "logits"


def export_onnx(network: nn.Module, images: torch.Tensor, path: Path) -> float:
    """Write `network` as ONNX; return the largest absolute difference of its outputs from PyTorch's on `images`.

    The file holds float32 weights with batch norm folded into the convolutions. Its input `images` (B, 3, H, W) is
    normalised, with any batch size. At least three images are needed here. Raises UserError, and writes nothing, when
    the outputs differ by more than rounding.
    """
    network = copy.deepcopy(network).cpu().float().eval()
    images = images.cpu().float().contiguous()
    model = _onnx_model(network, images[:2])  # fewer than are checked below: the batch size must be free
    with torch.inference_mode():
        expected = network(images)
    given = torch.from_numpy(_session(model).run([OUTPUT], {INPUT: images.numpy()})[0])
    difference = (given - expected).abs().max().item()
    if not difference <= TOLERANCE * expected.abs().max().item():
        raise UserError(
            f"ONNX Runtime {version('onnxruntime')} gives other outputs than PyTorch (by up to {difference:.2g}), so "
            f"{path.name} is not written: try another version, pip install --upgrade onnx onnxruntime onnxscript"
        )
    write_bytes(path, model)
    return difference


def export_scenario(scenario: Scenario, data_dir: Path) -> dict[str, Any]:
    """Export the final network of a finished pruning script; return the entry `export` of its record.

    `latency_ms` holds the latency of one image on the CPU in float32, in ONNX Runtime and in PyTorch, for the networks
    original, pruned and fine_tuned, in turns, with the same number of threads.
    """
    compute = choose_compute("cpu", "float32")
    end_all_but_first()
    networks = {name: load_network(path) for name, path in scenario.networks.items()}
    settings = ImageSettings.of(load_checkpoint(scenario.fine_tuned)["config"])
    test = load_images(scenario.dataset, data_dir, settings).test.sample(CHECKED_IMAGES, seed=0)
    images = next(test.batches(CHECKED_IMAGES))[0]

    difference = export_onnx(networks["fine_tuned"], images, scenario.exported)
    models = {name: _onnx_model(network, images[:2]) for name, network in networks.items() if name != "fine_tuned"}
    models["fine_tuned"] = scenario.exported.read_bytes()

    calls = {}
    for name, network in networks.items():
        feed = {INPUT: images[:1].contiguous().numpy()}
        calls[name, "onnx_runtime"] = functools.partial(_session(models[name]).run, [OUTPUT], feed)
        calls[name, "pytorch"] = functools.partial(compute.place(network), images[:1])
    with torch.inference_mode():
        seconds = time_in_turns(calls, LATENCY_TURNS, LATENCY_CALLS, compute, "Timing ONNX Runtime and PyTorch")
    return {
        "file": scenario.exported.name,
        "size_mib": len(models["fine_tuned"]) / 2**20,
        "opset": onnx.load_model_from_string(models["fine_tuned"]).opset_import[0].version,
        "largest_difference": difference,
        "device": compute.device_name,
        "cpu_threads": torch.get_num_threads(),
        "onnxruntime": version("onnxruntime"),
        "latency_ms": {
            runtime: {name: distribution_ms(seconds[name, runtime]) for name in networks}
            for runtime in ("onnx_runtime", "pytorch")
        },
    }


def _onnx_model(network: nn.Module, example: torch.Tensor) -> bytes:
    # Both exporters fold batch norm into the convolutions of a network in evaluation mode.
    # PyTorch 2.9 deprecates the older exporter.
    if torch.__version__ >= (2, 9):
        batch = {"dynamo": True, "dynamic_shapes": ({0: "batch"},), "external_data": False, "verbose": False}
    else:
        batch = {"dynamic_axes": {INPUT: {0: "batch"}, OUTPUT: {0: "batch"}}}
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.onnx"
        torch.onnx.export(network, (example,), str(path), input_names=[INPUT], output_names=[OUTPUT], **batch)
        return path.read_bytes()


def _session(model: bytes) -> onnxruntime.InferenceSession:
    """ONNX Runtime on the CPU, with as many threads as PyTorch."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    # Idle threads would spin and slow down the next turn.
    options.add_session_config_entry("session.force_spinning_stop", "1")
    return onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])
