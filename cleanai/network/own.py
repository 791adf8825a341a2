"""A network from a Python file of the user's."""

from __future__ import annotations

import importlib.util
import sys
import traceback
from pathlib import Path
from types import ModuleType

import torch
from torch import nn
from torch.nn.parameter import is_lazy

from cleanai import UserError
from cleanai.runtime.files import expanded, file_digest, one_line
from cleanai.runtime.foreign import foreign_code
from cleanai.runtime.scenario import PROJECT


def own_network(file: str, name: str, classes: int) -> nn.Module:
    """What `name(classes)` in a Python file returns, with random weights.

    A relative path starts from the project's folder. The file may import its neighbours. Raises UserError, with the
    line of the file that fails, when it gives no network.
    """
    path = (PROJECT / expanded(file)).resolve()
    if not path.is_file() or path.suffix != ".py":
        raise UserError(f"MODEL names the Python file {path}, which does not exist")
    with foreign_code(lambda error: _failed(path, "cannot be imported", error)):
        module = _imported(path)
    maker = getattr(module, name, None)
    if not callable(maker):
        raise UserError(f"MODEL names {name} in {path}, which has no function or class of that name")
    with foreign_code(lambda error: _failed(path, f"{name}({classes}) fails", error)):
        network = maker(classes)
    if not isinstance(network, nn.Module):
        raise UserError(f"{name}({classes}) of {path} returns a {type(network).__name__}, not a network (nn.Module)")
    if any(is_lazy(tensor) for tensor in (*network.parameters(), *network.buffers())):
        raise UserError(f"{name}({classes}) of {path} has lazy layers, without weights yet: give them their sizes")
    with foreign_code(lambda error: _failed(path, f"{name}({classes}) has a state dict that fails", error)):
        state = network.state_dict()
        others = [key for key, value in state.items() if not isinstance(value, torch.Tensor)]
        if others:
            raise UserError(
                f"{name}({classes}) of {path} has {others[0]} in its state dict, which is no tensor: remove its "
                "get_extra_state"
            )
        network.load_state_dict(state)
    return network


def _imported(path: Path) -> ModuleType:
    """The module in a file, imported once."""
    name = f"cleanai_own_{path.stem}_{file_digest(path)[:8]}"
    if name not in sys.modules:
        if str(path.parent) not in sys.path:
            sys.path.append(str(path.parent))
        spec = importlib.util.spec_from_file_location(name, path)
        assert spec and spec.loader
        sys.modules[name] = module = importlib.util.module_from_spec(spec)
        try:
            spec.loader.exec_module(module)
        except BaseException:
            del sys.modules[name]
            raise
    return sys.modules[name]


def _failed(path: Path, what: str, error: BaseException) -> UserError:
    """The error for a file of the user's, with the line of it that failed."""
    frames = traceback.extract_tb(error.__traceback__)
    lines = [frame.lineno for frame in frames if Path(frame.filename) == path]
    where = f", line {lines[-1]}" if lines else ""
    return UserError(f"{path}{where}: {what}: {type(error).__name__}: {one_line(error)}")
