"""Checkpoints (plain dictionaries of tensors, numbers and strings) and records (JSON).

Both are verified when they are read. Nothing but plain data is unpickled. PyTorch is imported where it is needed, so
that the table of a finished run is printed without it.
"""

from __future__ import annotations

import errno
import hashlib
import json
import warnings
import zipfile
from pathlib import Path
from typing import Any

from cleanai import UserError
from cleanai.runtime import distributed
from cleanai.runtime.files import one_line, printable, write_bytes, writing
from cleanai.runtime.foreign import foreign_code
from cleanai.runtime.scenario import NO_OPTIONS, option_text

FORMAT = "cleanai-checkpoint"
VERSION = 1
_MOST_SHARED = 64  # layers with one weight
_FOLDER = 0x10  # among the attributes of a member of an archive
# The types of a checkpoint's entries, where they are present.
_TYPES: dict[str, type] = {
    **dict.fromkeys(("config", "state_dict", "training", "pruning", "evaluation"), dict),
    **dict.fromkeys(("classes", "history", "image_size"), list),
}


class _Content(dict):
    """The entries of a file. A missing one is a UserError that names the file."""

    def __init__(self, path: Path, entries: Any) -> None:
        super().__init__(entries)
        self.path = path

    def __missing__(self, key: str) -> Any:
        raise UserError(
            f'{self.path} has no "{key}": another version of this project wrote it. Start over with --fresh'
        )


def save_checkpoint(path: Path, content: dict[str, Any]) -> None:
    """Write a dictionary of tensors, numbers, strings, and lists and dictionaries of these."""
    import torch

    if distributed.rank() > 0:
        return
    with writing(path) as file:
        torch.save({"format": FORMAT, "version": VERSION, **content}, file)


def load_checkpoint(path: Path, **expected: str) -> dict[str, Any]:
    """Read what `save_checkpoint` wrote, tensors on the CPU.

    Raises UserError when a byte of it has changed, when it is no checkpoint of ours or of a newer version, when a
    tensor in it holds NaN, and when an entry is not as `expected` (for example model="ResNet18"). Infinity is no fault
    except in the state of a training: the mask of a network may hold it.
    """
    damaged = _damaged(path)
    archive_bytes = require_intact(path)
    # A pickle can make torch.load raise anything. In a shortage of memory the file is not at fault.
    with foreign_code(lambda _: _damaged(path, "it holds other things than tensors and plain data"), (OSError,)):
        content = load_plain_data(path)
    if not isinstance(content, dict) or content.get("format") != FORMAT or type(content.get("version")) is not int:
        raise damaged
    if not all(isinstance(content.get(key, kind()), kind) for key, kind in _TYPES.items()):
        raise damaged
    if not is_within(content, archive_bytes):
        raise damaged
    if content["version"] > VERSION:
        raise UserError(f"{path} was written by a newer version of this project: update the project")
    failed = any(bool(tensor.isnan().any()) for tensor in _tensors(content))
    if failed or not all(bool(tensor.isfinite().all()) for tensor in _tensors(content.get("training"))):
        raise not_numbers(path)
    content = _Content(path, content)
    for key in ("config", "training", "pruning", "evaluation"):
        if key in content:
            content[key] = _Content(path, content[key])
    for key, value in expected.items():
        if content[key] != value:
            raise UserError(
                f"{path} is made for the {key} {content[key]}, and this run is for {value}: "
                "put the right file there, or use another --checkpoints-dir"
            )
    return content


def not_numbers(path: Path) -> UserError:
    """The error for a checkpoint with weights that no training should have left."""
    return UserError(
        f"{path} holds numbers that are not finite: run the script that made it again, with --fresh, and with a lower "
        "--lr if that made them"
    )


def load_plain_data(path: Path) -> Any:
    """`torch.load` on the CPU of tensors and plain data alone. A damaged file can raise anything."""
    import torch

    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "TypedStorage", UserWarning)  # PyTorch 2.0 warns of its own code
        return torch.load(path, map_location="cpu", weights_only=True)


def require_intact(path: Path) -> int:
    """The bytes of a checkpoint's members. UserError when one has changed. Unlike `load_checkpoint` without PyTorch."""
    with foreign_code(lambda error: _damaged(path, one_line(error)), (OSError,)):
        return verified_size(path)


def _damaged(path: Path, reason: str = "") -> UserError:
    return UserError(
        f"{path} is damaged or not a checkpoint of this project{reason and f' ({reason})'}: move it away, and run the "
        "script again that made it"
    )


def verified_size(path: Path) -> int:
    """The bytes of an archive's members. ValueError unless the archive is whole and every checksum is right.

    torch.load compares no checksums, and unpacks whatever size a forged archive claims. torch.save compresses nothing,
    so no member is larger than its file.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            members = archive.infolist()
            size = sum(member.file_size for member in members)
            packed = any(member.compress_type != zipfile.ZIP_STORED for member in members)
            folders = any(member.external_attr & _FOLDER for member in members)  # PyTorch would read nothing from it
            if packed or folders or size > path.stat().st_size:
                raise ValueError("it is no archive as PyTorch writes them")
            if archive.testzip() is not None:
                raise ValueError("a checksum in it is wrong")
    except zipfile.BadZipFile as error:
        raise ValueError("it is cut off, or no archive as PyTorch writes them") from error
    except OSError as error:
        if error.errno == errno.EINVAL:  # a damaged archive names a place before its beginning
            raise ValueError("it is cut off") from error
        raise
    return size


def is_within(content: Any, archive_bytes: int) -> bool:
    """Whether the tensors in nested containers need about as much memory as their archive has bytes.

    Forged ones can need more: by repeating the elements of their storage, or by a thousand tensors on one. Few are
    honest: layers that share a weight.
    """
    tensors = _tensors(content)
    storages = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in tensors}
    needed = sum(tensor.numel() * tensor.element_size() for tensor in tensors)
    return sum(storages.values()) <= archive_bytes and needed <= _MOST_SHARED * archive_bytes


def _tensors(content: Any) -> list[Any]:
    import torch

    waiting, visited, tensors = [content], set(), []
    while waiting:
        entry = waiting.pop()
        if id(entry) in visited:  # a pickle may hold the same list a million times
            continue
        visited.add(id(entry))
        if isinstance(entry, torch.Tensor):
            tensors.append(entry)
        elif isinstance(entry, dict):
            waiting += entry.values()
        elif isinstance(entry, (list, tuple)):
            waiting += entry
    return tensors


def find_checkpoint(path: Path, config: dict[str, Any], **expected: str) -> dict[str, Any] | None:
    """Read a checkpoint that an earlier run left, or None. UserError when that run had other settings."""
    if not path.exists():
        return None
    content = load_checkpoint(path, **expected)
    _refuse_other_settings(path, content["config"], config)
    return content


def write_record(path: Path, record: dict[str, Any]) -> None:
    """Write the measured numbers as JSON, with their checksum."""
    write_bytes(path, _json({**record, "sha256": _checksum(record)}).encode("utf-8"))


def find_record(path: Path, config: dict[str, Any]) -> dict[str, Any] | None:
    """Read the record of a finished run, or None. UserError when that run had other settings."""
    record = read_record(path)
    if record:
        _refuse_other_settings(path, record["config"], config)
    return record


def read_record(path: Path) -> dict[str, Any] | None:
    """Read a record, or None if there is none. UserError when it is not as `write_record` wrote it."""
    if not path.exists():
        return None
    try:
        record = json.loads(path.read_text(encoding="utf-8"), object_hook=lambda entries: _Content(path, entries))
        intact = isinstance(record, dict) and record.pop("sha256", None) == _checksum(record)
    except (ValueError, RecursionError):
        intact = False
    if not intact:
        raise UserError(f"{path} is damaged or was edited: move it away, and run its script again to measure again")
    return record


def _checksum(record: dict[str, Any]) -> str:
    return hashlib.sha256(_json(record).encode("utf-8")).hexdigest()


def _json(record: dict[str, Any]) -> str:
    return json.dumps(record, indent=1, ensure_ascii=False, allow_nan=False) + "\n"


_OF_IMAGES = ("train_sha256", "test_sha256")
_OLDER = {"calibrate_on": "test"}  # settings that older runs lack, with what they did


def _refuse_other_settings(path: Path, made_with: dict[str, Any], config: dict[str, Any]) -> None:
    pairs = {
        key: (made_with.get(key, _OLDER.get(key)), config.get(key, _OLDER.get(key))) for key in {**config, **made_with}
    }
    differing = {key: pair for key, pair in pairs.items() if pair[0] != pair[1]}
    options = {key: pair for key, pair in differing.items() if key not in NO_OPTIONS or key == "dataset"}
    if options:
        was, is_now = (_given({key: pair[side] for key, pair in options.items()}) for side in (0, 1))
        raise UserError(
            f"{path} was made {was}, and this run is {is_now}: "
            f"run {was}, use another --checkpoints-dir from script 1 on, or start over with --fresh"
        )
    for key, (before, now) in differing.items():
        if key in _OF_IMAGES and None in (before, now):  # older checkpoints lack them
            continue
        if key in _OF_IMAGES:
            raise UserError(
                f"{path} was made from other images than those that are there now: put the earlier ones back (and the "
                "earlier Pillow, which reads them), use another --checkpoints-dir from script 1 on, or start over with "
                "--fresh"
            )
        if key == "fine_tuned_model":
            raise UserError(f"{path} was made from another fine-tuned model: start over with --fresh")
        if key == "weights_sha256":
            raise UserError(
                f"{path} was made from another file called {config['weights']}: use another --checkpoints-dir, "
                "or start over with --fresh"
            )
        if key == "model":
            raise UserError(f"{path} was made with the network {before}, and this run is for {now}: change SCENARIO")
        if key == "conditions":
            raise UserError(
                f"{path} was made under other conditions ({before}) than this run has ({now}): "
                "use another --checkpoints-dir, or start over with --fresh"
            )


def _given(settings: dict[str, Any]) -> str:
    """These settings as options: "with --epochs 1 --lr 0.1 and without --train-samples"."""
    texts = {key: printable(option_text(key, value)) for key, value in settings.items()}
    given, others = [text for text in texts.values() if text], [key for key, text in texts.items() if not text]
    missing = [f"--{key.replace('_', '-')}" for key in others]
    return " and ".join(
        f"{word} {' '.join(options)}" for word, options in (("with", given), ("without", missing)) if options
    )
