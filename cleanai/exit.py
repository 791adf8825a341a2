"""How a script ends: its exit status, and one line on what is wrong."""

from __future__ import annotations

import os
import signal
import sys
import threading
import traceback
from pathlib import Path
from types import FrameType
from typing import Callable, NoReturn, TextIO

from cleanai import UserError
from cleanai.runtime import distributed
from cleanai.runtime.memory import is_shortage

_STOPPED = "\nInterrupted. The same command, without --fresh, resumes where it stopped."
_SIGNALS = [getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGBREAK") if hasattr(signal, name)]
_PIPE = 13  # SIGPIPE, which Windows does not have
_received: list[int] = []  # the signal that stopped the program


def run_script(main: Callable[[], None]) -> NoReturn:
    """Run a script's `main` and end the program: status 0, or one line on what is wrong and status 1.

    Ctrl-C and SIGTERM end it with one line, and status 130 and 143.
    """
    _prepare_streams()
    if threading.current_thread() is threading.main_thread():  # elsewhere Python allows no signal handlers
        for number in _SIGNALS:
            # Of several processes only the first has files to leave in order. The others wait for one another in C++,
            # where no handler runs: when one fails, torchrun's SIGTERM must end them at once.
            waits = number == signal.SIGTERM and distributed.rank() > 0
            if signal.getsignal(number) is not signal.SIG_IGN and not waits:  # ignored, as in the background of a shell
                signal.signal(number, _stop)
    try:
        try:
            main()
            sys.stdout.flush()
        except Exception as error:
            if not _received:
                raise
            raise KeyboardInterrupt from error  # torch.save, for one, turns an interruption into a RuntimeError
    except UserError as error:
        sys.exit(f"Error: {error}" if distributed.rank() == 0 else 1)
    except KeyboardInterrupt:
        for number in _SIGNALS:
            signal.signal(number, signal.SIG_IGN)  # a second one has nothing more to stop
        if distributed.rank() == 0:
            print(_STOPPED, file=sys.stderr)
        sys.exit(128 + (_received or [signal.SIGINT])[0])
    except BrokenPipeError:  # the reader went away, as `| head` does
        sys.stdout = sys.stderr = _nowhere()
        sys.exit(128 + _PIPE)
    except OSError as error:
        sys.exit(f"Error: {error}")
    except (RuntimeError, MemoryError) as error:
        message = _explained(error)
        if message is None:
            raise
        sys.exit(f"Error: {message}")
    sys.exit(0)


def _prepare_streams() -> None:
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is None or stream.closed:  # pythonw, or >&-
            setattr(sys, name, _nowhere())
        elif hasattr(stream, "reconfigure"):  # not in a notebook or in IDLE
            stream.reconfigure(errors="replace")  # a console that cannot print a character prints ?
    if distributed.rank() > 0:
        sys.stdout = _nowhere()


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


def _stop_at_once(number: int, _: FrameType | None) -> NoReturn:
    # The second signal: the first one was swallowed, as in a destructor, or the clean-up takes long.
    os.write(2, f"{_STOPPED}\n".encode())
    os._exit(128 + number)
