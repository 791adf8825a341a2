"""Files on disk, written atomically: a reader finds the old file or the new one, never a part.

Of several processes on one training only the first writes and deletes.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import os
import time
import unicodedata
from pathlib import Path
from typing import BinaryIO, Callable, Iterator

from cleanai import UserError
from cleanai.runtime import distributed

_WINDOWS = os.name == "nt"
_TRIES, _TRY_AGAIN_S = 20, 0.25
ABANDONED_S = 3600  # a running download or decoding writes far more often than that


def write_bytes(path: Path, content: bytes) -> None:
    """Write a whole file atomically."""
    if distributed.rank() > 0:
        return
    with writing(path) as file:
        file.write(content)


def remove_file(path: Path) -> None:
    """Delete a file if it exists."""
    if distributed.rank() == 0:
        with contextlib.suppress(FileNotFoundError):
            _patiently(path.unlink)


def check_removable(path: Path) -> None:
    """Raise PermissionError when a file cannot be deleted, on Windows because another program holds it open."""
    if distributed.rank() > 0:
        return
    if not os.access(path.parent, os.W_OK):
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))
    if _WINDOWS:
        with contextlib.suppress(FileExistsError):
            _patiently(lambda: path.rename(path))


def file_digest(path: Path) -> str:
    """A file's SHA-256 in hexadecimal digits."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        for block in iter(lambda: file.read(1 << 20), b""):
            digest.update(block)
    return digest.hexdigest()


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[BinaryIO]:
    """Open a temporary file beside `path` that replaces it once it is complete and on the disk.

    A killed run leaves the temporary file; `Scenario.remove_unfinished` and `remove_leftovers` delete it.
    """
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        with temporary.open("wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        _patiently(lambda: temporary.replace(path))
    finally:
        with contextlib.suppress(OSError):  # replaced, or never created
            temporary.unlink()


def _patiently(change: Callable[[], object]) -> None:
    """Move or delete a file. On Windows a virus scanner may hold it for a moment."""
    for remaining in reversed(range(_TRIES)):
        try:
            change()
            return
        except PermissionError:
            if not _WINDOWS or not remaining:
                raise
            time.sleep(_TRY_AGAIN_S)


def remove_leftovers(*paths: Path) -> None:
    """Delete temporary files of these that killed runs left: those that were not written to for an hour."""
    for path in paths:
        for temporary in path.parent.glob(f"{path.name}.*"):
            with contextlib.suppress(OSError):  # another run may be faster, or the folder read-only
                old = time.time() - temporary.stat().st_mtime > ABANDONED_S
                if old and temporary.suffix in (".tmp", ".partial"):  # ours, and those of torch.hub
                    temporary.unlink()


@contextlib.contextmanager
def writing(path: Path) -> Iterator[BinaryIO]:
    """As `replacing`, with a UserError when the file cannot be written."""
    try:
        with replacing(path) as file:
            yield file
    except (OSError, RuntimeError) as error:
        # torch.save turns an OSError of its file into a RuntimeError.
        reason = error.__context__ if isinstance(error, RuntimeError) else error
        if not isinstance(reason, OSError):
            raise
        raise cannot_write(path, reason) from error


def cannot_write(path: Path, error: OSError) -> UserError:
    """The error for a full disk, a read-only folder and the like."""
    return UserError(
        f"{path} cannot be written ({error.strerror or error}). Every earlier file is intact: solve that and run the "
        "same command again, or use another --checkpoints-dir"
    )


def expanded(path: str | Path) -> Path:
    """A path with the user's folder for a leading ~; as it is where there is no such user."""
    try:
        return Path(path).expanduser()
    except RuntimeError:
        return Path(path)


def printable(name: str) -> str:
    """A name from the file system; what would break a line, or is no UTF-8, as escapes."""
    broken = ("Cc", "Cs", "Zl", "Zp")
    return "".join(ascii(c)[1:-1] if unicodedata.category(c) in broken else c for c in name)


def one_line(error: BaseException) -> str:
    """The message of an error without line breaks."""
    return " ".join(str(error).split()) or type(error).__name__
