"""Files on disk: checkpoints (plain dictionaries of tensors, numbers and strings) and records (JSON).

Every write is atomic: a reader sees the old file or the new one, never a part. Nothing but plain data is unpickled.
Of several processes on one training the first alone writes and deletes.
PyTorch is imported where it is needed: printing the table of a finished run takes none of it.
"""
from __future__ import annotations

import contextlib
import hashlib
import json
import os
import pickle
import zipfile
from pathlib import Path
from typing import Any, BinaryIO, Iterator

from cleanai import UserError, distributed

FORMAT = "cleanai-checkpoint"
VERSION = 1


def save_checkpoint(path: Path, content: dict[str, Any]) -> None:
    """Write a dictionary of tensors, numbers, strings, and lists and dictionaries of these."""
    import torch

    if distributed.rank() > 0:
        return
    with replacing(path) as file:
        torch.save({"format": FORMAT, "version": VERSION, **content}, file)


def load_checkpoint(path: Path) -> dict[str, Any]:
    """Read what `save_checkpoint` wrote, tensors on the CPU; UserError when it is damaged or not ours."""
    import torch

    damaged = UserError(
        f"{path} is damaged or not a checkpoint of this project: delete it, and run the script again that made it"
    )
    if not zipfile.is_zipfile(path):  # torch.save writes a zip archive, whose directory is at the very end
        raise damaged
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except (RuntimeError, pickle.UnpicklingError, EOFError, ValueError, KeyError, zipfile.BadZipFile) as error:
        raise damaged from error
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        raise damaged
    if content["version"] > VERSION:
        raise UserError(f"{path} was written by a newer version of this project: update the project")
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
        record = json.loads(path.read_text(encoding="utf-8"))
        record["config"].items()
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{path} is damaged: delete it, and run again to measure anew") from error
    return record


def file_digest(path: Path) -> str:
    """The first 16 hexadecimal digits of a file's SHA-256."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        for block in iter(lambda: file.read(1 << 20), b""):
            digest.update(block)
    return digest.hexdigest()[:16]


def write_bytes(path: Path, content: bytes) -> None:
    """Write a whole file atomically."""
    if distributed.rank() > 0:
        return
    with replacing(path) as file:
        file.write(content)


def remove_file(path: Path) -> None:
    """Delete a file if it is there."""
    if distributed.rank() == 0:
        with contextlib.suppress(FileNotFoundError):
            path.unlink()


def _refuse_other_settings(path: Path, made_with: dict[str, Any], config: dict[str, Any]) -> None:
    for key in {**config, **made_with}:
        before, now = made_with.get(key), config.get(key)
        if before == now:
            continue
        if key == "fine_tuned_model":
            raise UserError(f"{path} was made from another fine-tuned model: start over with --fresh")
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


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[BinaryIO]:
    """Open a temporary file beside `path` that takes its place once it is whole and on the disk."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    try:
        with temporary.open("wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    finally:
        remove_file(temporary)
