"""The final network of a pruning script as ONNX: its accuracy and its time there, in float32 and in 8-bit integers."""

from __future__ import annotations

import functools
from dataclasses import replace
from pathlib import Path
from typing import Any, Callable

import torch
from torch import nn

from cleanai import UserError
from cleanai.data.images import Images, ImageSet
from cleanai.measure.latency import LATENCY_CALLS, LATENCY_TURNS, distribution_ms, time_in_turns
from cleanai.measure.onnx_export import INPUT, OUTPUT, export_onnx, onnx_model, open_session, runner
from cleanai.measure.provenance import image_digests
from cleanai.measure.quantize import QUANTIZE_IMAGES, quantize_onnx
from cleanai.measure.results import Split
from cleanai.measure.standalone import for_export, scenario_images, write
from cleanai.network.models import load_network
from cleanai.network.trial import in_fitting_order
from cleanai.runtime.compute import Compute, choose_compute
from cleanai.runtime.distributed import end_all_but_first
from cleanai.runtime.scenario import Scenario

_INT8 = "fine_tuned", "onnx_runtime_int8"


def export_scenario(
    scenario: Scenario, record: dict[str, Any], data_dir: Path, timing_s: float, int8: bool = False
) -> dict[str, Any]:
    """Export the final network of a finished pruning script; return the entry `export` of its record.

    The exported network classifies all held-out test images. With `int8` it is also written and measured with weights
    and activations of 8 bits. `latency_ms` holds the latency of one image on the CPU in float32, in ONNX Runtime and in
    PyTorch, for the networks original, pruned and fine_tuned, in turns of about `timing_s` seconds, with the same
    number of threads. docs/reading-results.md describes the entries.
    """
    import onnx
    import onnxruntime

    compute = replace(choose_compute("cpu", "float32"), timing_s=timing_s)
    end_all_but_first()
    networks = {name: load_network(path, scenario.model) for name, path in scenario.networks.items()}
    images = _same_images(scenario, record, data_dir)
    compute, images = in_fitting_order(networks["original"], images, None, compute)
    split = Split.of(images, record["config"])
    heldout = images.test.select(split.heldout)

    exported = export_onnx(networks["fine_tuned"], scenario.exported, images.test, list(images.classes))
    example = next(images.test.batches(2))[0].contiguous()
    models = {("fine_tuned", "onnx_runtime"): scenario.exported.read_bytes()}
    for name in ("original", "pruned"):
        network = for_export(networks[name], images.test)[0]
        models[name, "onnx_runtime"] = onnx_model(network, example, exported["free_image_size"])
    if int8:
        models[_INT8] = quantize_onnx(models["fine_tuned", "onnx_runtime"], split.calibration, compute)
        write(scenario.quantized, models[_INT8])
    placed = {name: compute.place(network) for name, network in networks.items()}
    measured = _accuracies(placed["fine_tuned"], models, heldout, compute)
    seconds = _time(placed, models, example[:1], compute)
    final = models["fine_tuned", "onnx_runtime"]
    of_int8: dict[str, Any] = {}
    if int8:
        of_int8["int8"] = {
            "file": scenario.quantized.name,
            "size_mib": len(models[_INT8]) / 2**20,
            "calibration_images": min(QUANTIZE_IMAGES, len(split.calibration)),
            **measured["onnx_runtime_int8"],
            "latency_ms": distribution_ms(seconds[_INT8]),
        }
    return {
        "file": scenario.exported.name,
        "size_mib": len(final) / 2**20,
        "opset": onnx.load_model_from_string(final).opset_import[0].version,
        **exported,
        "device": compute.device_name,
        "cpu_threads": torch.get_num_threads(),
        "onnxruntime": onnxruntime.__version__,
        "heldout_images": len(heldout),
        "pytorch_accuracy_percent": measured["pytorch"],
        **measured["onnx_runtime"],
        "latency_ms": {
            runtime: {name: distribution_ms(seconds[name, runtime]) for name in networks}
            for runtime in ("onnx_runtime", "pytorch")
        },
        **of_int8,
    }


def _same_images(scenario: Scenario, record: dict[str, Any], data_dir: Path) -> Images:
    """The images of a finished run, as it used them. UserError when there are others now."""
    config, dataset = record["config"], record["dataset"]
    images = scenario_images(scenario, data_dir).with_train_samples(config["train_samples"], config["seed"])
    counts = {"training": (len(images.train), dataset["train_images"])}
    counts["test"] = len(images.test), dataset["test_images"]
    for kind, (now, before) in counts.items():
        if now != before:
            raise UserError(
                f"{scenario.dataset} has {now:,} {kind} images now, and {scenario.record} was measured with "
                f"{before:,}: start over with --fresh"
            )
    now = image_digests(images)
    if any(dataset.get(part, digest) != digest for part, digest in now.items()):  # older records lack them
        raise UserError(
            f"{scenario.dataset} has other images now than those {scenario.record} was measured with: put these back "
            "(and the earlier Pillow, which reads them), or start over with --fresh"
        )
    return images


def _accuracies(
    network: nn.Module, models: dict[tuple[str, str], bytes], heldout: ImageSet, compute: Compute
) -> dict[str, Any]:
    """The accuracy of a network in PyTorch; for each of its ONNX models that, and how many images it sees otherwise."""
    expected = _predictions(network, heldout, compute, "Held-out images, PyTorch")

    def accuracy_percent(predicted: torch.Tensor) -> float:
        return 100 * int((predicted == heldout.labels.cpu()).sum()) / len(heldout)

    measured: dict[str, Any] = {"pytorch": accuracy_percent(expected)}
    for (name, runtime), model in models.items():
        if name == "fine_tuned":
            given = _predictions(runner(model), heldout, compute, "Held-out images, ONNX Runtime")
            measured[runtime] = {
                "accuracy_heldout_percent": accuracy_percent(given),
                "disagreements": int((given != expected).sum()),
            }
    return measured


def _predictions(
    run: Callable[[torch.Tensor], torch.Tensor], images: ImageSet, compute: Compute, title: str
) -> torch.Tensor:
    with torch.inference_mode():
        return torch.cat([run(inputs).argmax(1) for inputs, _ in images.batches_for(compute, title)])


def _time(
    networks: dict[str, nn.Module], models: dict[tuple[str, str], bytes], image: torch.Tensor, compute: Compute
) -> dict[tuple[str, str], Any]:
    """The times of all networks in PyTorch and of all ONNX models for one image, in turns."""
    calls: dict[tuple[str, str], Callable[[], Any]] = {}
    for key, model in models.items():
        calls[key] = functools.partial(open_session(model).run, [OUTPUT], {INPUT: image.numpy()})
    for name, network in networks.items():
        calls[name, "pytorch"] = functools.partial(network, image)
    with torch.inference_mode():
        return time_in_turns(calls, LATENCY_TURNS, LATENCY_CALLS, compute, "Timing ONNX Runtime and PyTorch")
