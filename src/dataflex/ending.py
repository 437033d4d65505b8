"""How a process ends: by SIGTERM, by a signal that its parent hands on, and without threads that outlive Python.

A command ends at once on SIGTERM, with a message and exit code 143. A training run that can save what it has
takes SIGTERM as a wish (``TermWish``) and ends after the step. Nothing here imports torch unless it is there.
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
from contextlib import contextmanager
from types import FrameType, FunctionType
from typing import Any, NoReturn

TERMINATED = 128 + signal.SIGTERM
"""Exit code of a command that SIGTERM ended."""

_HANDED_ON = ("SIGINT", "SIGTERM", "SIGHUP")

_Handler = Callable[[int, FrameType | None], Any]


class Terminated(BaseException):
    """SIGTERM ended the command; the text says what is left of it. No ``Exception``: nothing may go on after it."""


@contextmanager
def _handled(handler: _Handler, *names: str) -> Iterator[None]:
    """Have signals handled while inside; nothing happens off the main thread, where Python cannot."""
    numbers = [getattr(signal, name) for name in names if hasattr(signal, name)]
    if threading.current_thread() is not threading.main_thread():
        numbers = []
    before = {number: signal.getsignal(number) for number in numbers}
    for number in numbers:
        if before[number] is not signal.SIG_IGN:  # as under nohup
            signal.signal(number, handler)
    try:
        yield
    finally:
        for number, old in before.items():
            signal.signal(number, signal.SIG_DFL if old is None else old)


def _own(pid: int) -> bool:
    """Whether this is the process ``pid``, or else a child of it, which ends as if nothing were handled."""
    if os.getpid() == pid:
        return True
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    os.kill(os.getpid(), signal.SIGTERM)
    return False


def heed_parent_only(_: int = 0) -> None:
    """Make a DataLoader's worker (this is its ``worker_init_fn``) end on SIGTERM from its own process only.

    torchrun and others signal whole process groups: a worker that ended there would take away what the step in
    progress reads from, and its process would fail instead of ending as it was asked to.
    """
    if not hasattr(signal, "sigwaitinfo"):
        return
    parent = os.getppid()

    def wait() -> None:
        while signal.sigwaitinfo({signal.SIGTERM}).si_pid != parent:
            pass
        os._exit(0)

    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
    threading.Thread(target=wait, daemon=True).start()


@contextmanager
def ends_on_term(what: str) -> Iterator[None]:
    """Turn SIGTERM into ``Terminated`` while inside.

    Args:
        what: Told to the user.
    """
    pid = os.getpid()

    def end(*_: Any) -> None:
        if _own(pid):
            raise Terminated(what)

    with _handled(end, "SIGTERM"):
        yield


class TermWish:
    """Notes SIGTERM instead of ending, while ``noted`` is entered."""

    def __init__(self) -> None:
        self.asked = False

    @contextmanager
    def noted(self, tell: str = "") -> Iterator[None]:
        """Note SIGTERM while inside, and write ``tell`` to stderr when it comes for the first time."""
        pid = os.getpid()

        def note(*_: Any) -> None:
            if _own(pid) and not self.asked:
                self.asked = True
                if tell:
                    with contextlib.suppress(OSError):  # not through a stream, which may be in the middle of a write
                        os.write(2, f"\n{tell}\n".encode())

        with _handled(note, "SIGTERM"):
            yield


class TermVote(TermWish):
    """Notes SIGTERM, and lets the ranks agree on the step after which they end.

    Ranks tell each other after every step and read what was told after the step before: nobody waits for the
    answer, all have the same one, and one that got the signal late or not at all stops with the others.

    Args:
        device: Where ranks exchange.
    """

    def __init__(self, device: Any) -> None:
        super().__init__()
        self.agreed = False
        self._device = device
        self._told: Any = None

    def after_step(self) -> bool:
        """Tell the other ranks and return whether all are to end after this step (collective)."""
        before, self._told = self._told, self._tell()
        self.agreed = self.agreed or self._read(before)
        return self.agreed

    def settle(self) -> bool:
        """Return whether the run is to end here, as every rank sees it (collective)."""
        self.agreed = self._read(self._told) or self._read(self._tell()) or self.agreed
        self._told = None
        return self.agreed

    def _tell(self) -> Any:
        import torch
        import torch.distributed as dist

        flag = torch.tensor(int(self.asked), device=self._device)
        return flag, dist.all_reduce(flag, op=dist.ReduceOp.MAX, async_op=True) if _several_ranks() else None

    def _read(self, told: Any) -> bool:
        if not _several_ranks():
            return self.asked
        if told is None:
            return False
        flag, work = told
        work.wait()
        return bool(flag)


def _several_ranks() -> bool:
    from dataflex import comm

    return comm.world() > 1


def run_child(command: Sequence[str], env: Mapping[str, str] | None = None) -> int:
    """Run a command to its end and return its exit code; signals that end this process are handed on to it.

    Raises:
        Terminated: SIGTERM or SIGHUP came, and the command did not end well.
        KeyboardInterrupt: SIGINT came.
    """
    received: list[int] = []
    child: subprocess.Popen[bytes] | None = None

    def hand_on(number: int, _: FrameType | None) -> None:
        if number not in received:  # a group may be sent what its members are sent too
            received.append(number)
            if child is not None:
                child.send_signal(number)

    with _handled(hand_on, *_HANDED_ON):
        child = subprocess.Popen(command, env=env)
        for number in list(received):  # came while it was started
            child.send_signal(number)
        code = child.wait()
    if signal.SIGINT in received:
        raise KeyboardInterrupt
    if received and code != 0:
        raise Terminated(f"ended by {signal.Signals(received[0]).name}, which was handed on to {_name(command)}")
    return code


def _name(command: Sequence[str]) -> str:
    """Return the words of a command that say what it is: ``python -m NAME`` is NAME."""
    return command[2] if len(command) > 2 and command[1] == "-m" else os.path.basename(command[0])


def release_groups() -> None:
    """End the process groups of torch.distributed, and the threads that serve them (no pending collective).

    A thread of gloo that lets go of a tensor while the interpreter is being torn down ends the process with
    SIGABRT. Destroying a group does not end its threads while something holds it: modules that are imported when
    a group is there (``torch.distributed.nn``, ``deepspeed.comm``) keep it as the default of their arguments.
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

    After a failure a collective may be pending that the other ranks never join, and destroying its group would
    wait for it. Threads and exit functions of Python are then ended as usual, but the interpreter is not torn
    down: the other ranks learn of the failure at once.
    """
    global _last_code
    code = 1
    try:
        code = action()
    except Exception:  # noqa: BLE001 (told as Python tells it, but here, so that it is over before the end)
        traceback.print_exc()
    with contextlib.suppress(ValueError):  # off the main thread
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # a second one has nothing left to interrupt
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


atexit.register(_end_here)  # the first that is registered is called last: nothing heavy is imported by now
