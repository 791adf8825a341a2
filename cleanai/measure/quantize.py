"""An ONNX network with weights and activations of 8 bits (INT8), by ONNX Runtime's static quantisation."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any, Iterator

import torch

from cleanai import UserError
from cleanai.data.images import ImageSet
from cleanai.measure.onnx_export import INPUT
from cleanai.measure.standalone import silent
from cleanai.runtime.compute import Compute
from cleanai.runtime.files import one_line
from cleanai.runtime.foreign import foreign_code

QUANTIZE_IMAGES = 1024  # for the ranges of activations; more change little


def quantize_onnx(model: bytes, calibration: ImageSet, compute: Compute) -> bytes:
    """An ONNX model of `export_onnx` in 8 bits: one scale per output channel of a weight, one per activation.

    The ranges of activations are the lowest and highest values on up to QUANTIZE_IMAGES of the calibration images.
    The format is QDQ, which every runtime for ONNX reads. Raises UserError when ONNX Runtime cannot do it.
    """
    from onnxruntime.quantization import CalibrationDataReader, QuantFormat, quantize_static

    chosen = calibration.select(torch.arange(min(QUANTIZE_IMAGES, len(calibration))))

    class Reader(CalibrationDataReader):
        def __init__(self) -> None:
            self.batches: Iterator[Any] = iter(chosen.batches_for(compute, "Ranges for INT8"))

        def get_next(self) -> dict[str, Any] | None:
            inputs, _ = next(self.batches, (None, None))
            return None if inputs is None else {INPUT: inputs.cpu().contiguous().numpy()}

    def explain(error: BaseException) -> UserError:
        return UserError(f"ONNX Runtime cannot quantise the exported network: {one_line(error)[:200]}")

    with tempfile.TemporaryDirectory() as folder, foreign_code(explain), silent():
        files = [Path(folder) / name for name in ("float32.onnx", "int8.onnx")]
        files[0].write_bytes(model)
        reader = Reader()
        quantize_static(*map(str, files), reader, quant_format=QuantFormat.QDQ, per_channel=True)
        return files[1].read_bytes()
