"""A stand-in for a CUDA device, for machines without one.

Its tensors are on the CPU and only say that they are on cuda:0. So values, shapes and gradients are real. The stand-in
checks what a card would refuse (tensors of two devices in one operation, a generator of another device, numpy), and
notes what would make the host wait for a card. It knows nothing of speed, of kernels, of NCCL, and of real graphs.

    with cuda_stand_in(capability=(8, 6)) as card:
        compute = choose_compute("cuda", "auto")
        ...
    assert not card.waits
"""

from __future__ import annotations

import contextlib
import sys
from collections import Counter
from typing import Any, Callable, Iterator
from unittest.mock import patch

import pytest
import torch
import torch._dynamo  # what is imported under the stand-in would make its tensors there
import torch_pruning  # noqa: F401
import torchvision  # noqa: F401
from torch.overrides import TorchFunctionMode

import cleanai.measure.costs  # noqa: F401  # thop
from cleanai.runtime.scenario import PROJECT

# The stand-in was tried on newer versions only.
needs_fused_adam = pytest.mark.skipif(torch.__version__ < (2, 4), reason="no fused Adam on a CPU before PyTorch 2.4")
CPU, CUDA = torch.device("cpu"), torch.device("cuda", 0)
GIB = 2**30
# An operation on a tensor of the card that gives the host a value, or a shape that depends on values.
_WAITING = {"item", "tolist", "__bool__", "__int__", "__float__", "__index__", "__contains__", "__format__", "__repr__"}
_WAITING |= {"nonzero", "masked_select", "unique", "unique_consecutive", "bincount", "repeat_interleave"}
_WAITING |= {"equal", "allclose", "is_nonzero"}
# Operations that do not take a CPU tensor beside one of the card, not even one without dimensions.
_STRICT = {"stack", "cat", "index_select", "gather", "scatter", "scatter_add", "embedding", "cross_entropy", "matmul"}
# What moves no data, or is checked by the operations within it.
_UNCHECKED = {"_has_compatible_shallow_copy_type", "_foreach_copy_", "__deepcopy__", "__reduce_ex__", "backward"}
_UNCHECKED |= {"__hash__", "as_subclass", "size", "stride", "is_contiguous", "untyped_storage", "register_hook"}


class DeviceMismatch(RuntimeError):
    """What a card would refuse."""


def device_of(tensor: torch.Tensor) -> torch.device:
    """Where a tensor says it is."""
    return tensor.__dict__.get("_stand_in_device", CPU)


def _put(value: Any, device: torch.device) -> Any:
    if isinstance(value, torch.Tensor):
        value.__dict__["_stand_in_device"] = device
    return value


def _tensors(*values: Any) -> list[torch.Tensor]:
    found = []
    for value in values:
        if isinstance(value, torch.Tensor):
            found.append(value)
        elif isinstance(value, (list, tuple)):
            found += _tensors(*value)
        elif isinstance(value, dict):
            found += _tensors(*value.values())
    return found


class StandIn(TorchFunctionMode):
    """The card: `waits` and `copies` (from pageable memory, which wait as well) by what made them and where.

    `autocasts` holds each (device type, dtype, enabled). `replays` is the number of replayed graphs. `fail`, if set, is
    called before each operation on the card and may raise, for example an error of memory.
    """

    def __init__(self, capability: tuple[int, int], architectures: list[str], free_bytes: int) -> None:
        super().__init__()
        self.capability, self.architectures, self.free_bytes = capability, architectures, free_bytes
        self.waits: Counter[tuple[str, str]] = Counter()
        self.copies: Counter[tuple[str, str]] = Counter()
        self.autocasts: set[tuple[str, torch.dtype | None, bool]] = set()
        self.capturing, self.replays = False, 0
        self.debug_mode = "default"  # as torch.cuda.set_sync_debug_mode sets it
        self.fail: Callable[[str, list[torch.Tensor]], None] | None = None

    def forget(self) -> None:
        """Start to count again."""
        self.waits.clear()
        self.copies.clear()

    def note(self, counter: Counter[tuple[str, str]], what: str) -> None:
        """Count something that makes the host wait. No graph can record it."""
        if self.capturing:
            raise RuntimeError(f"CUDA error: operation not permitted when stream is capturing ({what})")
        if self.debug_mode == "error":
            raise RuntimeError(f"called a synchronizing CUDA operation ({what})")
        counter[what, _project_line()] += 1

    def runs_kernels(self) -> bool:
        """Whether one of the architectures that PyTorch was built for runs on this card."""
        major, minor = self.capability
        for name in self.architectures:
            kind, digits = name.split("_")
            built = int(digits[:-1]), int(digits[-1])
            if built <= (major, minor) and (kind == "compute" or built[0] == major):
                return True
        return False

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs, name = dict(kwargs or {}), getattr(function, "__name__", "")
        if name in ("__get__", "__set__"):
            return self._property(function, name, args)
        if name in ("to", "cpu", "cuda", "pin_memory", "is_pinned") and isinstance(args[0], torch.Tensor):
            return self._move(name, args[0], args[1:], kwargs)
        if kwargs.get("device") is not None:
            return self._make(function, name, args, kwargs)
        tensors = _tensors(args, kwargs)
        if not tensors or name in _UNCHECKED:
            made = function(*args, **kwargs)
            return _put(made, device_of(tensors[0])) if tensors else made
        if name in ("__getitem__", "__setitem__", "index_put_"):
            return self._index(function, name, args, kwargs)
        if name == "copy_":
            if device_of(args[0]) != device_of(args[1]):
                self.note(self.copies if device_of(args[0]) == CUDA else self.waits, "copy_")
            return function(*args, **kwargs)
        return self._compute(function, name, args, kwargs, tensors)

    def _property(self, function: Any, name: str, args: Any) -> Any:
        which, owner = getattr(function.__self__, "__name__", ""), args[0]
        if name == "__set__":
            function(*args)
            return _put(owner, device_of(args[1])) if which == "data" else None
        if which in ("device", "is_cuda", "is_cpu"):
            device = device_of(owner)
            return device if which == "device" else device.type == which[len("is_") :]
        value = function(*args)
        return value if value is owner else _put(value, device_of(owner))

    def _move(self, name: str, tensor: torch.Tensor, args: Any, kwargs: dict[str, Any]) -> Any:
        if name == "is_pinned":
            return tensor.__dict__.get("_pinned", False)
        if name == "pin_memory":
            pinned = tensor.clone()
            pinned.__dict__["_pinned"] = True
            return pinned
        target, dtype = (CPU if name == "cpu" else CUDA if name == "cuda" else device_of(tensor)), tensor.dtype
        for value in (*args, kwargs.pop("device", None), kwargs.pop("dtype", None), kwargs.pop("other", None)):
            if isinstance(value, torch.Tensor):
                target, dtype = device_of(value), value.dtype
            elif isinstance(value, torch.dtype):
                dtype = value
            elif isinstance(value, (str, torch.device)):
                target = CUDA if torch.device(value).type == "cuda" else CPU
        ahead = kwargs.pop("non_blocking", False) or (bool in map(type, args) and True in args)
        if target == device_of(tensor):
            moved = tensor.to(dtype=dtype, **kwargs)
            return moved if moved is tensor else _put(moved, target)
        if target == CPU:
            self.note(self.waits, "copy to the host")
        elif not (ahead and tensor.__dict__.get("_pinned")):
            self.note(self.copies, "copy from pageable memory")
        return _put(tensor.to(dtype=dtype, **{**kwargs, "copy": True}), target)

    def _make(self, function: Any, name: str, args: Any, kwargs: dict[str, Any]) -> Any:
        device = CUDA if torch.device(kwargs["device"]).type == "cuda" else CPU
        self._check_generator(name, device, kwargs)
        if device == CUDA:
            if not self.runs_kernels():
                raise RuntimeError("CUDA error: no kernel image is available for execution on the device")
            if name in ("tensor", "as_tensor"):
                self.note(self.copies, name)
            if self.fail is not None:
                self.fail(name, [])
        made = function(*args, **{**kwargs, "device": CPU})
        for value in _tensors(made):
            _put(value, device)
        return made

    def _index(self, function: Any, name: str, args: Any, kwargs: dict[str, Any]) -> Any:
        tensor, indices, device = args[0], _tensors(args[1]), device_of(args[0])
        for index in indices:
            if device == CPU and device_of(index) == CUDA:
                raise DeviceMismatch(f"indices should be on the same device as the tensor, at {_project_line()}")
            if device == CUDA and device_of(index) == CPU and index.dim() > 0:
                self.note(self.copies, "index from the host")
            if device_of(index) == CUDA and (index.dtype == torch.bool or index.dim() == 0):
                self.note(self.waits, "index by a mask" if index.dtype == torch.bool else "index by a scalar")
        values = _tensors(args[2:])
        if any(device_of(value) != device for value in values):
            if indices and any(value.dim() for value in values):
                raise DeviceMismatch(f"values of {device_of(values[0])} for {device}, at {_project_line()}")
            self.note(self.copies if device == CUDA else self.waits, "values")
        made = function(*args, **kwargs)
        return made if made is tensor else _put(made, device)

    def _compute(self, function: Any, name: str, args: Any, kwargs: Any, tensors: list[torch.Tensor]) -> Any:
        devices = [device_of(tensor) for tensor in tensors]
        if CUDA not in devices:
            return function(*args, **kwargs)
        if name in ("numpy", "__array__"):
            raise TypeError(f"can't convert cuda:0 device type tensor to numpy, at {_project_line()}")
        in_place = device_of(args[0]) == CPU if args and isinstance(args[0], torch.Tensor) else False
        in_place = in_place and ((name.endswith("_") and not name.endswith("__")) or name.startswith("__i"))
        for tensor, device in zip(tensors, devices):
            if device == CPU and (tensor.dim() > 0 or name in _STRICT or in_place):
                found = [(str(each), tuple(tensor.shape)) for tensor, each in zip(tensors, devices)]
                raise DeviceMismatch(f"Expected all tensors on one device: {name} got {found}, at {_project_line()}")
        self._check_generator(name, CUDA, kwargs)
        if name in _WAITING:
            self.note(self.waits, name)
        if self.fail is not None:
            self.fail(name, tensors)
        given = {id(tensor) for tensor in tensors}
        made = function(*args, **kwargs)
        for value in _tensors(made):
            if id(value) not in given:
                _put(value, CUDA)
        return made

    def _check_generator(self, name: str, device: torch.device, kwargs: dict[str, Any]) -> None:
        generator = kwargs.get("generator")
        if generator is not None and generator.device.type != device.type:
            raise DeviceMismatch(f"{name}: a generator of {generator.device} for {device}, at {_project_line()}")


def _project_line() -> str:
    """The line of the project, outside of its tests, that is at work; else the innermost lines."""
    frame, inner = sys._getframe(1), []
    while frame is not None:
        path = frame.f_code.co_filename
        if path.startswith(str(PROJECT / "cleanai")):
            return f"{path[len(str(PROJECT)) + 1 :]}:{frame.f_lineno}"
        inner.append(f"{path}:{frame.f_lineno}")
        frame = frame.f_back
    return " < ".join(inner[1:6])


class _Stream:
    def wait_stream(self, other: _Stream) -> None:
        """Nothing to wait for: the CPU works in order."""


class _Graph:
    """A graph that records nothing: `replay` is only counted."""

    def __init__(self, card: StandIn) -> None:
        self._card, self.recorded = card, False

    def replay(self) -> None:
        """Count this."""
        assert self.recorded
        self._card.replays += 1


@contextlib.contextmanager
def cuda_stand_in(
    capability: tuple[int, int] = (8, 6),
    architectures: tuple[str, ...] = ("sm_50", "sm_60", "sm_70", "sm_75", "sm_80", "sm_86", "sm_90", "sm_120"),
    free_bytes: int = 6 * GIB,
    count: int = 1,
) -> Iterator[StandIn]:
    """PyTorch with a card of this capability, as PyTorch was built for these architectures."""
    card, autocast = StandIn(capability, list(architectures), free_bytes), torch.autocast

    class Autocast(autocast):
        def __init__(self, device_type: str, dtype: Any = None, enabled: bool = True, **others: Any) -> None:
            card.autocasts.add((device_type, dtype, enabled))
            super().__init__("cpu", dtype=dtype or torch.bfloat16, enabled=enabled, **others)

    @contextlib.contextmanager
    def stream(_: Any) -> Iterator[None]:
        yield

    @contextlib.contextmanager
    def graph(recording: _Graph, **_: Any) -> Iterator[None]:
        card.capturing = True
        try:
            yield
            recording.recorded = True
        finally:
            card.capturing = False

    make_subclass, optimizer = torch.Tensor._make_subclass, torch.optim.Optimizer
    group = getattr(optimizer, "_group_tensors_by_device_and_dtype", None)  # PyTorch 2.1

    def grouped(lists: Any, with_indices: bool = False) -> Any:  # it is made in C++, which sees the CPU
        found = group(lists, with_indices)
        return {(device_of(each[0][0][0]), key[1]): each for key, each in found.items()}

    functions = {
        "is_available": lambda: True,
        "device_count": lambda: count,
        "set_device": lambda device: None,
        "get_device_name": lambda device=None: "Stand-in",
        "get_device_capability": lambda device=None: capability,
        "get_arch_list": lambda: list(architectures),
        "is_bf16_supported": lambda *_, **__: True,  # newer versions count emulation
        "current_device": lambda: 0,
        "mem_get_info": lambda device=None: (card.free_bytes, 2 * card.free_bytes),
        "synchronize": lambda device=None: card.note(card.waits, "synchronize"),
        "set_sync_debug_mode": lambda mode: setattr(card, "debug_mode", mode),
        "empty_cache": lambda: None,
        "manual_seed_all": lambda seed: None,
        "get_rng_state": lambda device=None: torch.get_rng_state(),  # no number is drawn on the card
        "set_rng_state": lambda state, device=None: None,
        "is_current_stream_capturing": lambda: card.capturing,
        "current_stream": lambda device=None: _Stream(),
        "Stream": _Stream,
        "stream": stream,
        "CUDAGraph": lambda: _Graph(card),
        "graph": graph,
    }
    with contextlib.ExitStack() as stack:
        stack.enter_context(patch.multiple(torch.cuda, **functions))
        if hasattr(torch, "accelerator"):
            stack.enter_context(patch.object(torch.accelerator, "is_available", lambda: False))
        stack.enter_context(patch.object(torch, "autocast", Autocast))
        stack.enter_context(patch.object(torch.backends.cudnn, "version", lambda: 90100))
        wrapped = staticmethod(lambda cls, data, *rest: _put(make_subclass(cls, data, *rest), device_of(data)))
        stack.enter_context(patch.object(torch.Tensor, "_make_subclass", wrapped))
        if group is not None:
            stack.enter_context(patch.object(optimizer, "_group_tensors_by_device_and_dtype", staticmethod(grouped)))
        stack.callback(setattr, torch.backends.cudnn, "benchmark", torch.backends.cudnn.benchmark)
        yield stack.enter_context(card)
