"""Whether an archive that torch.save wrote can be believed: files come from disks that fail and from other people."""
from __future__ import annotations

import zipfile
from pathlib import Path
from typing import Any


def verified_size(path: Path) -> int:
    """The bytes that a checkpoint's members take; ValueError unless the archive is whole and each checksum right.

    torch.load compares no checksums, and would unpack whatever size a forged archive claims: torch.save compresses
    nothing, so no member is larger than its file.
    """
    with zipfile.ZipFile(path) as archive:
        members = archive.infolist()
        size = sum(member.file_size for member in members)
        packed = any(member.compress_type != zipfile.ZIP_STORED for member in members)
        if packed or size > path.stat().st_size or archive.testzip() is not None:
            raise ValueError(path)
    return size


def all_finite(content: Any, limit: int) -> bool:
    """Whether all numbers of all tensors in nested containers are finite; ValueError when they need over `limit` bytes.

    A forged tensor can claim more memory than its file has bytes, and grow when it is copied.
    """
    import torch

    waiting, seen, tensors = [content], set(), []
    while waiting:
        some = waiting.pop()
        if id(some) in seen:  # a pickle may hold the same list a million times
            continue
        seen.add(id(some))
        if isinstance(some, torch.Tensor):
            tensors.append(some)
        elif isinstance(some, dict):
            waiting += some.values()
        elif isinstance(some, (list, tuple)):
            waiting += some
    storages = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in tensors}
    if max(sum(storages.values()), sum(tensor.numel() * tensor.element_size() for tensor in tensors)) > limit:
        raise ValueError("tensors larger than their file")
    return all(bool(tensor.isfinite().all()) for tensor in tensors)
