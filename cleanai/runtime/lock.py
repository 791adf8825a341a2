"""One run of a script at a time on the same files."""

from __future__ import annotations

import contextlib
import errno
import os
from typing import Iterator

from filelock import FileLock, Timeout

from cleanai import UserError
from cleanai.runtime import distributed
from cleanai.runtime.files import cannot_write
from cleanai.runtime.scenario import Scenario

_NO_LOCKS = (errno.ENOLCK, errno.ENOTSUP, errno.ENOSYS)  # a network file system without locks: run unprotected


@contextlib.contextmanager
def only_run(scenario: Scenario) -> Iterator[None]:
    """Keep other runs of the same script off its files, and remove what a killed run left half-written.

    The operating system releases the lock when its process ends, however it ends. Under torchrun the first process
    holds it for all. Raises UserError when another run holds it, or when the folder cannot be written.
    """
    if distributed.rank() > 0:
        yield
        return
    folders = (scenario.folder, scenario.lock.parent, *scenario.lock.parent.parents)
    new_folders = [folder for folder in folders if not folder.exists()]
    lock = FileLock(scenario.lock, timeout=0)
    try:
        for folder in folders[:2]:
            folder.mkdir(parents=True, exist_ok=True)
        lock.acquire()
    except Timeout:
        raise UserError(
            f"Another run of this script is at work in {scenario.folder}: wait until it ends, "
            "or use another --checkpoints-dir"
        ) from None
    except (OSError, NotImplementedError) as error:
        if isinstance(error, OSError) and error.errno not in _NO_LOCKS:
            if scenario.folder in new_folders:
                _remove_empty(scenario, new_folders)
            only_locks = scenario.folder.is_dir() and os.access(scenario.folder, os.W_OK)
            result = scenario.report if scenario.method else scenario.record
            raise cannot_write(scenario.lock if only_locks else result, error) from error
    try:
        scenario.remove_unfinished()
        yield
    finally:
        lock.release()
        if scenario.folder in new_folders:
            _remove_empty(scenario, new_folders)


def _remove_empty(scenario: Scenario, new_folders: list) -> None:
    """Remove the folders of a run that failed before it wrote anything."""
    with contextlib.suppress(OSError):  # a folder that is not empty stays, and those around it
        scenario.folder.rmdir()
        scenario.lock.unlink(missing_ok=True)  # filelock may have removed it
        for folder in new_folders[1:]:
            folder.rmdir()
