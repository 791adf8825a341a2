"""How a script ends: its exit status, and one line on what is wrong."""

from __future__ import annotations

import contextlib
import io
import os
import signal
import sys
import threading
import time
import traceback
from pathlib import Path
from types import FrameType
from typing import Any, Callable, Iterator, NoReturn, TextIO

from cleanai import UserError
from cleanai.runtime import distributed
from cleanai.runtime.memory import is_shortage
from cleanai.runtime.scenario import PROJECT, SCRIPTS_DIR

_SIGNALS = [getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGBREAK") if hasattr(signal, name)]
_PIPE = 13  # SIGPIPE, which Windows does not have
_received: list[int] = []  # the signal that stopped the program


def run_script(main: Callable[[], None]) -> NoReturn:
    """Run a script's `main` and end the program: status 0, or one line on what is wrong and status 1.

    Ctrl-C and SIGTERM end it with one line, and status 130 and 143. A script of another folder than this package's is
    not run. A `main` that raises SystemExit ends with its status, as --strict does. In a session (%run of IPython) the
    handlers of signals are those of before again.
    """
    _prepare_streams()
    with _handling_signals():
        status, message = _run(main)
        problem = _flush("stdout")
        if isinstance(problem, BrokenPipeError):  # the reader went away, as `| head` does
            status = status or 128 + _PIPE
        elif problem and not status:
            status, message = 1, f"Error: the output cannot be written ({problem.strerror})"
        if status and distributed.rank() > 0:
            time.sleep(5)  # torchrun ends all processes as soon as one fails: the first one must say why
        if message and distributed.rank() == 0:
            with contextlib.suppress(OSError):
                print(message, file=sys.stderr)
        _flush("stderr")
        sys.exit(status)


@contextlib.contextmanager
def _handling_signals() -> Iterator[None]:
    """A context in which Ctrl-C and SIGTERM raise KeyboardInterrupt; afterwards, too, but not in a session."""
    _received.clear()
    if threading.current_thread() is not threading.main_thread():  # there Python allows no signal handlers
        yield
        return
    before = {number: signal.getsignal(number) for number in _SIGNALS}
    for number in _SIGNALS:
        # Of several processes only the first has files to leave in order. The others wait for one another in C++, where
        # no handler runs: when one fails, torchrun's SIGTERM must end them at once.
        waits = number == signal.SIGTERM and distributed.rank() > 0
        if before[number] is not signal.SIG_IGN and not waits:  # ignored, as in the background of a shell
            signal.signal(number, _stop)
    try:
        yield
    finally:
        if hasattr(sys, "ps1") or sys.flags.interactive:
            for number, handler in before.items():
                signal.signal(number, handler or signal.SIG_DFL)


def _run(main: Callable[[], None]) -> tuple[int, str]:
    """The status that `main` ends with, and the line to print."""
    try:
        _require_own_package(main)
        try:
            main()
        except Exception as error:
            if not _received:
                raise
            raise KeyboardInterrupt from error  # torch.save, for one, turns an interruption into a RuntimeError
    except SystemExit as ending:  # of --help, or of a wrong option
        return (1, ending.code) if isinstance(ending.code, str) else (int(ending.code or 0), "")
    except UserError as error:
        return 1, f"Error: {error}"
    except KeyboardInterrupt:
        for number in _SIGNALS:
            signal.signal(number, signal.SIG_IGN)  # a second one has nothing more to stop
        return 128 + (_received or [signal.SIGINT])[0], _stopped()
    except BrokenPipeError:
        return 128 + _PIPE, ""
    except OSError as error:
        return 1, f"Error: {error}"
    except (RuntimeError, MemoryError) as error:
        message = _explained(error)
        if message is None:
            raise
        return 1, f"Error: {message}"
    return 0, ""


def _require_own_package(main: Callable[[], None]) -> None:
    """UserError when a project's script runs with the package of another project, as in a copy with its .venv."""
    file = Path(main.__code__.co_filename)
    if not file.is_file():  # a cell of a notebook
        return
    own = file.resolve().parent.parent
    two_projects = (own / "cleanai").is_dir() and SCRIPTS_DIR.is_dir()  # neither a script alone nor a mere package
    if two_projects and not own.samefile(PROJECT):
        raise UserError(
            f"This script is in {own}, and Python takes cleanai from {PROJECT}: install it from here, "
            f'"{sys.executable}" -m pip install -e "{own}", or delete .venv and install everything again'
        )


def _prepare_streams() -> None:
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if not _is_open(stream):  # pythonw, or >&-
            setattr(sys, name, _nowhere())
        elif hasattr(stream, "reconfigure"):  # not in a notebook or in IDLE
            stream.reconfigure(errors="replace")  # a console that cannot print a character prints ?
        elif not all(hasattr(stream, needed) for needed in ("flush", "isatty")):
            setattr(sys, name, _Output(stream))
    if distributed.rank() > 0:
        sys.stdout = _nowhere()


class _Output(io.TextIOBase):
    """An output of an object that can do no more than `write`."""

    def __init__(self, stream: Any) -> None:
        self._stream = stream

    def write(self, text: str) -> int:
        self._stream.write(text)
        return len(text)


def _is_open(stream: Any) -> bool:
    try:
        return stream is not None and not getattr(stream, "closed", False)
    except ValueError:  # detached
        return False


def _flush(name: str) -> OSError | None:
    """Write what an output still holds. If that fails, drop it: Python would complain once more at the end."""
    try:
        getattr(sys, name).flush()
    except OSError as error:
        setattr(sys, name, _nowhere())
        return error
    return None


def _nowhere() -> TextIO:
    return Path(os.devnull).open("w", encoding="utf-8")


def _explained(error: Exception) -> str | None:
    """What the user can do about an error of PyTorch, or None for a bug."""
    if "does not have a deterministic implementation" in str(error):
        return f"{str(error).split()[0]} has no deterministic form in PyTorch: leave out --deterministic"
    if is_shortage(error):
        return "there is too little free memory: lower --batch-size and add --fresh, or use another --device"
    return None


def _stop(number: int, frame: FrameType | None) -> NoReturn:
    for each in _SIGNALS:
        signal.signal(each, _stop_at_once)
    if any("importlib" in each.f_code.co_filename for each, _ in traceback.walk_stack(frame)):
        _stop_at_once(number, frame)  # a package that is being imported may swallow the exception, or abort
    _received.append(number)
    raise KeyboardInterrupt


def _stopped() -> str:
    fresh = " Leave out --fresh when it has deleted the earlier results." if "--fresh" in sys.argv else ""
    return f"\nInterrupted. The same command goes on from the last epoch or stage that was finished.{fresh}"


def _stop_at_once(number: int, _: FrameType | None) -> NoReturn:
    # The second signal: the first one was swallowed, as in a destructor, or the clean-up takes long.
    with contextlib.suppress(OSError):
        os.write(2, f"{_stopped()}\n".encode())
    os._exit(128 + number)
