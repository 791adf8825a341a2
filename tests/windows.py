"""The locks of Windows on this system: the same code, on a stand-in for the module msvcrt."""
import errno
import fcntl
import importlib.util
import os
import sys
from types import SimpleNamespace
from unittest import mock

from cleanai.runtime import lock as locks


def _locking(descriptor, mode, count):
    """Lock `count` bytes from where the file stands; PermissionError when they are locked through another open file."""
    assert (os.lseek(descriptor, 0, os.SEEK_CUR), mode, count) == (0, _MSVCRT.LK_NBLCK, 1), "the same byte for all"
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        raise PermissionError(errno.EACCES, "Permission denied") from error


_MSVCRT = SimpleNamespace(LK_NBLCK=2, locking=_locking)


def windows_locks():
    """The module cleanai.runtime.lock as Windows would load it."""
    spec = importlib.util.spec_from_file_location("locks_of_windows", locks.__file__)
    module = importlib.util.module_from_spec(spec)
    with mock.patch.dict(sys.modules, msvcrt=_MSVCRT), mock.patch.object(os, "name", "nt"):
        spec.loader.exec_module(module)
    return module
