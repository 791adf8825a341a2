"""What computes: the device and the precision, chosen once and handed to whatever runs a network."""
from __future__ import annotations

import platform
import sys
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from cleanai import UserError


@dataclass(frozen=True)
class Compute:
    """A device, the precision networks run in on it, and the reason for that precision."""

    device: torch.device
    precision: str
    reason: str

    def autocast(self) -> torch.autocast:
        """A context in which networks run in the chosen precision; weights and sums stay float32."""
        return torch.autocast(self.device.type, dtype=torch.bfloat16, enabled=self.precision == "bfloat16")

    def place(self, network: nn.Module) -> nn.Module:
        """Move a network to the device, its weights in the channels-last order that convolutions are fastest in."""
        return network.to(self.device, memory_format=torch.channels_last)

    def synchronize(self) -> None:
        """Wait until the device has done what it was given, so that a clock read afterwards is true."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    @property
    def description(self) -> str:
        """One line on the device and the precision."""
        return f"Device: {self.device.type} ({self.device_name}), precision: {self.precision} ({self.reason})"

    @property
    def device_name(self) -> str:
        """The name its maker gave the device."""
        return torch.cuda.get_device_name(self.device) if self.device.type == "cuda" else _processor_name()


def choose_compute(device: str, precision: str) -> Compute:
    """Choose by `device` (auto, cpu, cuda) and `precision` (auto, float32, bfloat16).

    Raises UserError when CUDA is asked for and is not there.
    """
    if device == "cuda" and not torch.cuda.is_available():
        raise UserError("CUDA was asked for and PyTorch finds none: use --device cpu, or install PyTorch's CUDA build")
    chosen = torch.device("cuda" if device != "cpu" and torch.cuda.is_available() else "cpu")
    if precision == "bfloat16" and chosen.type == "cuda" and not torch.cuda.is_bf16_supported():
        raise UserError("This GPU has no bfloat16: use --precision float32")
    if precision != "auto":
        return Compute(chosen, precision, "as asked for")
    if _has_bfloat16_units(chosen):
        return Compute(chosen, "bfloat16", "faster than float32 on this hardware")
    return Compute(chosen, "float32", "this hardware has no bfloat16 units")


def _has_bfloat16_units(device: torch.device) -> bool:
    # Without such units a CPU emulates bfloat16, which is slower than float32.
    if device.type == "cuda":
        return torch.cuda.get_device_capability(device) >= (8, 0)
    return any(flag in _cpu_flags() for flag in ("avx512_bf16", "amx_bf16"))


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
