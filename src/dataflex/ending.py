"""How a process ends: by SIGTERM, by a signal that its parent passes on, and without threads that outlive Python.

A command ends at once on SIGTERM, with a message and exit code 143. A training run notes it (``TermWish``) and ends
after the step, with a checkpoint. SIGHUP, of a terminal that is closed, is taken as SIGTERM. Nothing here imports torch
unless it is imported already.
"""

from __future__ import annotations

import atexit
import contextlib
import gc
import os
import signal
import subprocess
import sys
import threading
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from types import FrameType, FunctionType
from typing import IO, Any, NoReturn

TERMINATED = 128 + signal.SIGTERM
"""Exit code of a command that SIGTERM ended."""

_Handler = Callable[[int, FrameType | None], Any]


class Terminated(BaseException):
    """SIGTERM ended the command; the text says what remains of it. No ``Exception``, so that nothing handles it."""


@contextmanager
def _handled(handler: _Handler, *names: str) -> Iterator[None]:
    """Handle signals while inside; off the main thread, where Python cannot, nothing is changed."""
    main = threading.current_thread() is threading.main_thread()
    numbers = [getattr(signal, name) for name in names if main and hasattr(signal, name)]
    before = {number: signal.getsignal(number) for number in numbers}
    for number in numbers:
        if before[number] is not signal.SIG_IGN:  # as under nohup
            signal.signal(number, handler)
    try:
        yield
    finally:
        for number, old in before.items():
            signal.signal(number, signal.SIG_DFL if old is None else old)


@contextmanager
def _on_term(act: Callable[[], None]) -> Iterator[None]:
    """Call ``act`` on SIGTERM or SIGHUP while inside; a child of this process ends instead, as without a handler."""
    pid = os.getpid()

    def handle(number: int, _: FrameType | None) -> None:
        if os.getpid() == pid:
            if number != signal.SIGTERM:
                _leave_terminal()
            act()
        else:
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)

    with _handled(handle, "SIGTERM", "SIGHUP"):
        yield


def _leave_terminal() -> None:
    """Let stdout and stderr lead nowhere where the terminal behind them is gone, which refuses every write."""
    for number in (1, 2):
        try:
            os.write(number, b"")
        except OSError:
            to_nowhere(number)


def to_nowhere(number: int) -> None:
    """Let a descriptor lead nowhere, so that what is still to be written into it fails no more."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, number)
    os.close(nowhere)


def heed_parent_only(_: int = 0) -> None:
    """Make a DataLoader's worker (as its ``worker_init_fn``) end on SIGTERM from its parent process only.

    torchrun and others signal whole process groups. The step in progress still reads from the worker: if it ended too,
    its parent would fail instead of ending in order.
    """
    if not hasattr(signal, "sigwaitinfo"):
        return
    parent = os.getppid()

    def wait() -> None:
        while signal.sigwaitinfo({signal.SIGTERM}).si_pid != parent:
            pass
        os._exit(0)

    signal.signal(signal.SIGHUP, signal.SIG_IGN)  # the parent hears of it too
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
    threading.Thread(target=wait, daemon=True).start()


def ends_on_term(what: str) -> AbstractContextManager[None]:
    """Turn SIGTERM and SIGHUP into ``Terminated``, with the text ``what``, while inside."""

    def end() -> None:
        raise Terminated(what)

    return _on_term(end)


class TermWish:
    """Notes SIGTERM in ``asked``, instead of ending, while ``noted`` is entered."""

    def __init__(self) -> None:
        self.asked = False

    def noted(self, tell: str = "") -> AbstractContextManager[None]:
        """Note SIGTERM while inside, and write ``tell`` to stderr the first time."""

        def note() -> None:
            first, self.asked = not self.asked, True
            if tell and first:
                with contextlib.suppress(OSError):  # not through a stream, which may be in the middle of a write
                    os.write(2, f"\n{tell}\n".encode())

        return _on_term(note)


def run_child(command: Sequence[str], env: Mapping[str, str] | None = None, out: IO[str] | None = None) -> int:
    """Run a command to its end and return its exit code; signals that end this process are passed on to it.

    ``out``: where its stdout goes; None: that of this process.

    Raises:
        Terminated: SIGTERM or SIGHUP came, and the command failed.
        KeyboardInterrupt: SIGINT came.
    """
    received: list[int] = []
    child: subprocess.Popen[bytes] | None = None

    def pass_on(number: int, _: FrameType | None) -> None:
        if number not in received:  # a group may be sent what its members are sent too
            received.append(number)
            if child is not None:
                child.send_signal(number)

    with _handled(pass_on, "SIGINT", "SIGTERM", "SIGHUP"):
        child = subprocess.Popen(command, env=env, stdout=out)
        for number in list(received):  # while it was started
            child.send_signal(number)
        code = child.wait()
    if signal.SIGINT in received:
        raise KeyboardInterrupt
    if received and code != 0:
        name = command[2] if command[1:2] == ["-m"] else os.path.basename(command[0])  # of 'python -m NAME'
        raise Terminated(f"ended by {signal.Signals(received[0]).name}, which was handed on to {name}")
    return code


def release_groups() -> None:
    """End the process groups of torch.distributed and their threads; no collective may be pending.

    A thread of gloo that frees a tensor while the interpreter is being torn down ends the process with SIGABRT.
    Destroying a group does not end its threads while it is referenced: modules that are imported when a group exists
    (``torch.distributed.nn``, ``deepspeed.comm``) keep it as the default of their arguments.
    """
    dist = sys.modules.get("torch.distributed")
    if dist is None or not dist.is_available() or "RANK" not in os.environ:  # only torchrun's ranks have any
        return
    if dist.is_initialized():
        dist.destroy_process_group()
    for function in [found for found in gc.get_objects() if type(found) is FunctionType]:
        held = function.__defaults__ or ()
        if any(isinstance(value, dist.ProcessGroup) for value in held):
            function.__defaults__ = tuple(None if isinstance(value, dist.ProcessGroup) else value for value in held)
        named = function.__kwdefaults__ or {}
        for key in [key for key, value in named.items() if isinstance(value, dist.ProcessGroup)]:
            named[key] = None
    gc.collect()  # a trainer and its model are cycles


def leave(action: Callable[[], int]) -> NoReturn:
    """Run ``action`` and end this process, one rank of several, with the exit code that it returns, or 1.

    After a failure, a collective may be pending that the other ranks never join; destroying its group would wait for
    it. Threads and exit functions of Python are then run as usual, but the interpreter is not torn down, so that the
    other ranks learn of the failure at once.
    """
    global _last_code
    code = 1
    try:
        code = action()
    except Exception:  # noqa: BLE001 (printed as Python does, but before the end)
        traceback.print_exc()
    with contextlib.suppress(ValueError):  # off the main thread
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # there is nothing left to interrupt
    dist = sys.modules.get("torch.distributed")
    if dist is not None and dist.is_available() and dist.is_initialized():
        _last_code = code
    sys.exit(code)


_last_code: int | None = None


def _end_here() -> None:
    if _last_code is None:
        return
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError, AttributeError):
            stream.flush()
    os._exit(_last_code)


atexit.register(_end_here)  # called last, since it is registered first: nothing heavy is imported by now
