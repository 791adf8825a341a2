"""Checkpoints (plain dictionaries of tensors, numbers and strings) and records (JSON).

What is read is checked before it is believed, and nothing but plain data is unpickled. PyTorch is imported where it is
needed: printing the table of a finished run takes none of it.
"""
from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

from cleanai import UserError
from cleanai.runtime import distributed
from cleanai.runtime.archives import all_finite, verified_size
from cleanai.runtime.files import write_bytes, writing

FORMAT = "cleanai-checkpoint"
VERSION = 1
# What the entries of a checkpoint are, of those that are there.
_TYPES = {
    **dict.fromkeys(("config", "state_dict", "training", "pruning", "evaluation"), dict),
    **dict.fromkeys(("classes", "history"), list),
}


def save_checkpoint(path: Path, content: dict[str, Any]) -> None:
    """Write a dictionary of tensors, numbers, strings, and lists and dictionaries of these."""
    import torch

    if distributed.rank() > 0:
        return
    with writing(path) as file:
        torch.save({"format": FORMAT, "version": VERSION, **content}, file)


class _Content(dict):
    """What a file holds; asking for what it lacks is a UserError that names the file."""

    def __init__(self, path: Path, entries: Any) -> None:
        super().__init__(entries)
        self.path = path

    def __missing__(self, key: str) -> Any:
        raise UserError(f'{self.path} lacks "{key}": delete it, and run the script again that made it')


def load_checkpoint(path: Path, **expected: str) -> dict[str, Any]:
    """Read what `save_checkpoint` wrote, tensors on the CPU.

    Raises UserError when a byte of it has changed, when it is not ours or of a newer version, when a number in it is
    not finite, and when an entry is not as `expected` (for example model="ResNet18").
    """
    import torch

    damaged = UserError(
        f"{path} is damaged or not a checkpoint of this project: delete it, and run the script again that made it"
    )
    try:
        archive_bytes = verified_size(path)
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "TypedStorage", UserWarning)  # PyTorch 2.0 warns of what it does itself
            content = torch.load(path, map_location="cpu", weights_only=True)
        if not isinstance(content, dict) or content.get("format") != FORMAT or type(content.get("version")) is not int:
            raise damaged
        if not all(isinstance(content.get(key, kind()), kind) for key, kind in _TYPES.items()):
            raise damaged
        finite = all_finite(content, archive_bytes)
    except (OSError, MemoryError, UserError):
        raise
    except Exception as error:  # a pickle can make torch.load raise anything
        if "allocate memory" in str(error):  # for no more than the file holds: that is no fault of the file
            raise
        raise damaged from error
    if content["version"] > VERSION:
        raise UserError(f"{path} was written by a newer version of this project: update the project")
    if not finite:
        raise UserError(
            f"{path} holds numbers that are not finite: delete it, and run the script again that made it, "
            "with a lower --lr if that made them"
        )
    content = _Content(path, content)
    for key, value in expected.items():
        if content[key] != value:
            raise UserError(
                f"{path} is made for the {key} {content[key]}, and this run is for {value}: "
                "put the right file there, or use another --checkpoints-dir"
            )
    return content


def find_checkpoint(path: Path, config: dict[str, Any]) -> dict[str, Any] | None:
    """Read a checkpoint that an earlier run left, or None; UserError when that run had other settings."""
    if not path.exists():
        return None
    content = load_checkpoint(path)
    _refuse_other_settings(path, content["config"], config)
    return content


def write_record(path: Path, record: dict[str, Any]) -> None:
    """Write the measured numbers as JSON."""
    write_bytes(path, (json.dumps(record, indent=1, ensure_ascii=False, allow_nan=False) + "\n").encode("utf-8"))


def find_record(path: Path, config: dict[str, Any]) -> dict[str, Any] | None:
    """Read the record of a finished run, or None; UserError when that run had other settings."""
    record = read_record(path)
    if record:
        _refuse_other_settings(path, record["config"], config)
    return record


def read_record(path: Path) -> dict[str, Any] | None:
    """Read the record of a finished run whatever its settings, or None if there is none."""
    if not path.exists():
        return None
    try:
        record = json.loads(path.read_text(encoding="utf-8"), object_hook=lambda entries: _Content(path, entries))
        record["config"].items()
    except (ValueError, TypeError, AttributeError, RecursionError) as error:
        raise UserError(f"{path} is damaged: delete it, and run again to measure anew") from error
    return record


def _refuse_other_settings(path: Path, made_with: dict[str, Any], config: dict[str, Any]) -> None:
    for key in {**config, **made_with}:
        before, now = made_with.get(key), config.get(key)
        if before == now:
            continue
        if key == "fine_tuned_model":
            raise UserError(f"{path} was made from another fine-tuned model: start over with --fresh")
        if key == "weights_sha256":
            raise UserError(
                f"{path} was made from another file called {config['weights']}: use another --checkpoints-dir, "
                "or start over with --fresh"
            )
        if key == "conditions":
            raise UserError(
                f"{path} was made under other conditions ({before}) than are found now ({now}): "
                "use another --checkpoints-dir, or start over with --fresh"
            )
        option = "--" + key.replace("_", "-")
        was, is_now = (f"without {option}" if value is None else f"with {option} {value}" for value in (before, now))
        raise UserError(
            f"{path} was made {was}, and this run is {is_now}: "
            f"run {was}, use another --checkpoints-dir, or start over with --fresh"
        )
