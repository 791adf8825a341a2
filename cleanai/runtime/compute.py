"""The device and the precision, chosen once and passed to whatever runs a network."""

from __future__ import annotations

import os
import platform
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from cleanai import UserError
from cleanai.runtime import distributed

_LOW_PRECISION = {"bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass(frozen=True)
class Compute:
    """A device, the precision that networks run in on it, and the reason for that precision.

    `deterministic`: every run computes the same, as a CPU always does.
    `inference_pixels`: how many pixels pass a network at once where the batch size does not change the result.
    `timing_s`: about how many seconds each timing of networks may take.
    `memory_format`: the order of weights in memory; convolutions are fastest with channels last.
    """

    device: torch.device
    precision: str
    reason: str
    deterministic: bool = False
    inference_pixels: int = 32 * 32**2  # a hook's values of so few are still in the cache
    timing_s: float = 20.0
    memory_format: torch.memory_format = torch.channels_last

    def autocast(self) -> torch.autocast:
        """A context in which networks run in the chosen precision; weights and sums stay float32."""
        dtype = _LOW_PRECISION.get(self.precision, torch.bfloat16)
        return torch.autocast(self.device.type, dtype=dtype, enabled=self.precision in _LOW_PRECISION)

    def gradient_scaler(self) -> Any:
        """Keeps small gradients from becoming zero in float16; does nothing in other precisions."""
        enabled = self.precision == "float16"
        if hasattr(torch.amp, "GradScaler"):
            return torch.amp.GradScaler(self.device.type, enabled=enabled)
        return torch.cuda.amp.GradScaler(enabled=enabled)  # PyTorch before 2.3

    def place(self, network: nn.Module) -> nn.Module:
        """Move a network to the device, its weights in `memory_format`."""
        return network.to(self.device, memory_format=self.memory_format)

    def synchronize(self) -> None:
        """Wait until the device has finished its work. Call it before reading a clock."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    @property
    def description(self) -> str:
        """One line on the device and the precision."""
        return f"Device: {self.device.type} ({self.device_name}), precision: {self.precision} ({self.reason})"

    @property
    def device_name(self) -> str:
        """The product name of the device."""
        return torch.cuda.get_device_name(self.device) if self.device.type == "cuda" else _processor_name()


def choose_compute(device: str, precision: str, deterministic: bool = False) -> Compute:
    """Choose by `device` (auto, cpu, cuda) and `precision` (auto, float32, bfloat16, float16); join other processes.

    With `deterministic` PyTorch uses deterministic algorithms on a GPU, in the whole program.
    Raises UserError when the device or the precision asked for is not available.
    """
    if device == "cuda" and not torch.cuda.is_available():
        raise UserError("PyTorch finds no CUDA device: use --device cpu, or install PyTorch's CUDA build")
    on_gpu = device != "cpu" and torch.cuda.is_available()
    if precision == "float16" and not on_gpu:
        raise UserError("float16 is for GPUs: use --precision auto, bfloat16 or float32")
    if precision == "bfloat16" and on_gpu and not torch.cuda.is_bf16_supported():
        raise UserError("This GPU has no bfloat16: use --precision auto, float16 or float32")
    gpus = torch.cuda.device_count() if on_gpu else 0
    if on_gpu and distributed.local_processes() > gpus:
        raise UserError(f"PyTorch finds {gpus} GPUs: start torchrun with --nproc_per_node={gpus}")
    chosen = torch.device("cuda", distributed.local_rank()) if on_gpu else torch.device("cpu")
    if on_gpu:
        torch.cuda.set_device(chosen)
        # Batches keep their size, so the fastest algorithm is searched once. The choice differs from run to run.
        torch.backends.cudnn.benchmark = not deterministic
        if deterministic:
            _use_deterministic_algorithms()
    suited, reason = _suited_precision(chosen)
    if precision != "auto":
        suited, reason = precision, "as requested"
    distributed.join(chosen)
    return Compute(chosen, suited, reason, deterministic or not on_gpu, (1000 if on_gpu else 32) * 32**2)


def _use_deterministic_algorithms() -> None:
    """Limit PyTorch to deterministic algorithms. An operation that has none is an error."""
    os.environ["CUBLAS_WORKSPACE_CONFIG"] = ":4096:8"  # cuBLAS reads it when it is used first
    torch.use_deterministic_algorithms(True)
    if hasattr(torch.utils, "deterministic"):  # PyTorch 2.2; filling memory costs time and changes nothing here
        torch.utils.deterministic.fill_uninitialized_memory = False


def _suited_precision(device: torch.device) -> tuple[str, str]:
    if device.type == "cuda":
        generation = torch.cuda.get_device_capability(device)
        if generation >= (8, 0):
            return "bfloat16", "faster than float32 on this hardware"
        if generation >= (7, 0):
            return "float16", "faster than float32 on this hardware, which has no bfloat16"
        return "float32", "this GPU is not faster in a lower precision"
    # A CPU without these units emulates bfloat16, more slowly than float32.
    if any(flag in _cpu_flags() for flag in ("avx512_bf16", "amx_bf16")):
        return "bfloat16", "faster than float32 on this hardware"
    return "float32", "this hardware has no bfloat16 units"


def _cpu_flags() -> str:
    # Older versions of PyTorch cannot be asked; without an answer the precision is float32.
    if hasattr(torch.cpu, "get_capabilities"):
        return " ".join(name for name, present in torch.cpu.get_capabilities().items() if present is True)
    return _proc_cpuinfo()


def _processor_name() -> str:
    for line in _proc_cpuinfo().splitlines():
        if line.startswith("model name"):
            return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


def _proc_cpuinfo() -> str:
    return Path("/proc/cpuinfo").read_text(encoding="utf-8") if sys.platform == "linux" else ""
