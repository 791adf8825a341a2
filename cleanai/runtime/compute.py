"""The device and the precision, chosen once and passed to whatever runs a network."""

from __future__ import annotations

import contextlib
import os
import platform
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Iterator

import torch
from torch import nn

from cleanai import UserError
from cleanai.runtime import distributed
from cleanai.runtime.files import one_line
from cleanai.runtime.memory import is_shortage

_LOW_PRECISION = {"bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass(frozen=True)
class Compute:
    """A device, the precision that networks run in on it, and the reason for that precision.

    `deterministic`: every run computes the same, as a CPU always does.
    `compiled`: training steps are compiled by torch.compile, which rounds otherwise.
    `unused_gpu`: why a GPU that is there is not used.
    `inference_pixels`: how many pixels pass a network at once where the batch size does not change the result.
    `timing_s`: about how many seconds each timing of networks may take.
    `memory_format`: the order of weights in memory; convolutions are fastest with channels last.
    """

    device: torch.device
    precision: str
    reason: str
    deterministic: bool = False
    compiled: bool = False
    unused_gpu: str = ""
    inference_pixels: int = 32 * 32**2  # a hook's values of so few are still in the cache
    timing_s: float = 20.0
    memory_format: torch.memory_format = torch.channels_last

    def autocast(self) -> torch.autocast:
        """A context in which networks run in the chosen precision; weights and sums stay float32."""
        # PyTorch 2.0 refuses bfloat16 on older GPUs even where it is not enabled.
        dtype = _LOW_PRECISION.get(self.precision)
        return torch.autocast(self.device.type, dtype=dtype, enabled=dtype is not None)

    @contextlib.contextmanager
    def repeated_shapes(self) -> Iterator[None]:
        """A context in which batches keep their shape, so that cuDNN searches its fastest algorithm once for each.

        The choice differs from run to run. Where shapes change, the search takes longer than it saves.
        """
        before = torch.backends.cudnn.benchmark
        torch.backends.cudnn.benchmark = self.device.type == "cuda" and not self.deterministic
        try:
            yield
        finally:
            torch.backends.cudnn.benchmark = before

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
        unused = f"; {self.unused_gpu}" if self.unused_gpu else ""
        return f"Device: {self.device.type} ({self.device_name}), precision: {self.precision} ({self.reason}){unused}"

    @property
    def device_name(self) -> str:
        """The product name of the device."""
        return torch.cuda.get_device_name(self.device) if self.device.type == "cuda" else _processor_name()


def choose_compute(device: str, precision: str, deterministic: bool = False, compiled: bool = False) -> Compute:
    """Choose by `device` (auto, cpu, cuda) and `precision` (auto, float32, bfloat16, float16); join other processes.

    With `deterministic` PyTorch uses deterministic algorithms on a GPU, in the whole program. With `compiled` training
    steps are compiled. Raises UserError when what is asked for is not available.
    """
    if compiled and torch.__version__ < (2, 1):
        raise UserError("--compile needs PyTorch 2.1 or newer: leave it out")
    if compiled and distributed.processes() > 1:
        raise UserError("--compile is for one process: leave it out, or start the script without torchrun")
    chosen, unused_gpu = _choose_device(device)
    on_gpu = chosen.type == "cuda"
    if precision == "float16" and not on_gpu:
        raise UserError("float16 is for GPUs: use --precision auto, bfloat16 or float32")
    # Newer versions of PyTorch count as support that older GPUs emulate bfloat16, which is slow.
    if precision == "bfloat16" and on_gpu and torch.cuda.get_device_capability(chosen) < (8, 0):
        raise UserError("This GPU has no bfloat16: use --precision auto, float16 or float32")
    if on_gpu and deterministic:
        _use_deterministic_algorithms()
    suited, reason = _suited_precision(chosen)
    if precision != "auto":
        suited, reason = precision, "as requested"
    distributed.join(chosen)
    pixels = (1000 if on_gpu else 32) * 32**2
    return Compute(chosen, suited, reason, deterministic or not on_gpu, compiled, unused_gpu, pixels)


def _choose_device(device: str) -> tuple[torch.device, str]:
    """The device of this process, and why a GPU that is there is not used. UserError when it cannot be used."""
    if device == "cpu" or (device == "auto" and not torch.cuda.is_available()):
        return torch.device("cpu"), ""
    if not torch.cuda.is_available():
        raise UserError("PyTorch finds no CUDA device: use --device cpu, or install PyTorch's CUDA build")
    gpus = torch.cuda.device_count()
    if distributed.local_processes() > gpus:
        raise UserError(f"PyTorch finds {gpus} GPUs: start torchrun with --nproc_per_node={gpus}")
    chosen = torch.device("cuda", distributed.local_rank())
    try:
        torch.cuda.set_device(chosen)
        torch.ones(1, device=chosen).add_(1).cpu()  # a card that is too old or too new is found by its first kernel
        torch.backends.cudnn.version()  # raises where cuDNN is too new for the card
    except RuntimeError as error:
        if is_shortage(error):
            raise
        reason = _unusable(chosen, error)
        if device == "cuda" or distributed.processes() > 1:  # several processes must not choose differently
            raise UserError(f"{reason}. Use --device cpu, or install the PyTorch for this GPU") from error
        return torch.device("cpu"), reason
    return chosen, ""


def _unusable(device: torch.device, error: RuntimeError) -> str:
    """Why a GPU cannot be used, whose first kernel failed with `error`."""
    if "no kernel image" not in str(error):
        return f"the GPU cannot be used: {one_line(error).split(' CUDA kernel errors might')[0]}"
    major, minor = torch.cuda.get_device_capability(device)
    return (
        f"the GPU, a {torch.cuda.get_device_name(device)} of compute capability {major}.{minor}, cannot be used: this "
        f"PyTorch is made for {' '.join(torch.cuda.get_arch_list())}"
    )


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
