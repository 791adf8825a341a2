"""One run of a script at a time on the same files."""
from __future__ import annotations

import contextlib
import errno
import os
from pathlib import Path
from typing import BinaryIO, Iterator

from cleanai import UserError
from cleanai.runtime import distributed
from cleanai.runtime.files import cannot_write
from cleanai.runtime.scenario import Scenario


@contextlib.contextmanager
def only_run(scenario: Scenario) -> Iterator[None]:
    """Keep other runs of the same script off its files, and clear away what a killed one left half-written.

    The operating system lets the lock go with its process, however that ends. Raises UserError when another run has
    it, or the folder cannot be written. Of the processes of one run under torchrun the first has it for all.
    """
    if distributed.rank() > 0:
        yield
        return
    made = [folder for folder in (scenario.folder, *scenario.folder.parents) if not folder.exists()]
    try:
        scenario.folder.mkdir(parents=True, exist_ok=True)
        file = _acquired(scenario.lock)
    except OSError as error:
        raise cannot_write(scenario.lock, error) from error
    if file is None:
        raise UserError(
            f"Another run of this script is at work in {scenario.folder}: wait for its end, "
            "or use another --checkpoints-dir"
        )
    try:
        scenario.remove_unfinished()
        yield
    finally:
        _release(file, scenario.lock)
        for folder in made:  # a run that failed before it wrote anything leaves nothing
            with contextlib.suppress(OSError):
                folder.rmdir()


if os.name == "nt":
    import msvcrt

    def _acquired(path: Path) -> BinaryIO | None:
        """The locked file, or None when another process has it."""
        file = path.open("ab")
        file.seek(0)
        try:
            msvcrt.locking(file.fileno(), msvcrt.LK_NBLCK, 1)
        except OSError:
            file.close()
            return None
        return file

    def _release(file: BinaryIO, path: Path) -> None:
        file.close()
        with contextlib.suppress(OSError):  # another run may have opened it by now, and removes it in its turn
            path.unlink()

else:
    import fcntl

    def _acquired(path: Path) -> BinaryIO | None:
        """The locked file, or None when another process has it."""
        while True:
            file = path.open("ab")
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                if path.exists() and os.path.samestat(os.fstat(file.fileno()), path.stat()):
                    return file
            except BlockingIOError:
                file.close()
                return None
            except OSError as error:
                if error.errno in (errno.ENOLCK, errno.ENOTSUP, errno.ENOSYS):
                    return file  # a network file system, say, that knows no locks: nothing keeps a second run away
                raise
            file.close()  # its last owner removed it between the two calls: this lock would keep nobody away

    def _release(file: BinaryIO, path: Path) -> None:
        with contextlib.suppress(OSError):
            path.unlink()
        file.close()
