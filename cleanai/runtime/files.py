"""Files on disk: written whole or not at all.

Every write is atomic: a reader sees the old file or the new one, never a part. Of several processes on one training the
first alone writes and deletes.
"""
from __future__ import annotations

import contextlib
import hashlib
import os
import time
from pathlib import Path
from typing import BinaryIO, Iterator

from cleanai import UserError
from cleanai.runtime import distributed

ABANDONED_S = 3600  # a run at work never rests that long: a connection without data is given up after a minute


def write_bytes(path: Path, content: bytes) -> None:
    """Write a whole file atomically."""
    if distributed.rank() > 0:
        return
    with writing(path) as file:
        file.write(content)


def remove_file(path: Path) -> None:
    """Delete a file if it is there."""
    if distributed.rank() == 0:
        with contextlib.suppress(FileNotFoundError):
            path.unlink()


def file_digest(path: Path) -> str:
    """A file's SHA-256 in hexadecimal digits."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        for block in iter(lambda: file.read(1 << 20), b""):
            digest.update(block)
    return digest.hexdigest()


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[BinaryIO]:
    """Open a temporary file beside `path` that takes its place once it is whole and on the disk.

    A run that is killed leaves it: of what a script makes `Scenario.remove_unfinished` clears it away, of downloads and
    decoded images `remove_leftovers`.
    """
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        with temporary.open("wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    finally:
        with contextlib.suppress(OSError):  # it may never have come to be
            temporary.unlink()


def remove_leftovers(*paths: Path) -> None:
    """Delete the temporary files of these that killed runs left: those that nobody has written to for an hour."""
    for path in paths:
        for temporary in path.parent.glob(f"{path.name}.*.tmp"):
            with contextlib.suppress(OSError):  # another run may be faster, or the folder read-only
                if time.time() - temporary.stat().st_mtime > ABANDONED_S:
                    temporary.unlink()


@contextlib.contextmanager
def writing(path: Path) -> Iterator[BinaryIO]:
    """The same, with a UserError when the file cannot be written."""
    try:
        with replacing(path) as file:
            yield file
    except (OSError, RuntimeError) as error:
        # torch.save raises a RuntimeError of its own where its file does not take what it is given.
        reason = error.__context__ if isinstance(error, RuntimeError) else error
        if not isinstance(reason, OSError):
            raise
        raise cannot_write(path, reason) from error


def cannot_write(path: Path, error: OSError) -> UserError:
    """What a script ends with when the disk is full, say, or the folder read-only."""
    return UserError(
        f"{path} cannot be written ({error.strerror or error}). Every earlier file is intact: mend that and run the "
        "same command to go on, or use another --checkpoints-dir"
    )


def one_line(error: BaseException) -> str:
    """What went wrong, without line breaks."""
    return " ".join(str(error).split()) or type(error).__name__
