"""``dataflex score --engine ray``: actors that hold the model score batches of rows which a queue hands out.

Every actor runs the command as one process would. Where a pass of the model begins, the batches are the same for all
of them, and each takes the next one that nobody has; values go into the files of the stored pass, which all share.
Batches of an actor that died are handed out again, and it is replaced; after the driver died, the same command goes on
from the files. Scores are those of one process, since a row's batch depends on neither actors nor deaths.

The folder of the stored passes must be one that all nodes see. Actors do not talk to each other.
"""

from __future__ import annotations

import logging
import os
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any, cast

import numpy as np
from numpy.typing import NDArray

from dataflex.errors import DataFlexError, UnsupportedError
from dataflex.offline.request import score_request
from dataflex.signals.store import ResumablePass
from dataflex.signals.sweep import Share
from dataflex.version import install

logger = logging.getLogger(__name__)

WAIT = -1
"""What a queue gives while nothing is left to hand out, but a batch may come back."""
_POLL_SECONDS = 0.1
_REPLACEMENTS = 3


class Queue:
    """Hands out the numbers of the batches of each pass, and at its end the number after the last: merging them."""

    def __init__(self) -> None:
        self._left: dict[str, list[int]] = {}
        self._given: dict[str, dict[int, str]] = defaultdict(dict)
        self._merge: dict[str, int] = {}

    def next(self, key: str, left: list[int], merge: int, worker: str, finished: int | None) -> int | None:
        """Return the next number for a worker, WAIT, or None where the pass is done.

        ``left`` are the batches of the pass that earlier runs did not finish; ``finished`` is what the worker was given
        last, whose values are on disk by now.
        """
        if key not in self._left:
            self._left[key], self._merge[key] = left[::-1], merge
        given = self._given[key]
        if finished is not None:
            given.pop(finished, None)
            if finished == merge:
                self._merge[key] = WAIT
        if not self._left[key] and not given and self._merge[key] != WAIT:
            self._left[key].append(merge)
        if self._left[key]:
            given[self._left[key][-1]] = worker
            return self._left[key].pop()
        return WAIT if given else None

    def lost(self, worker: str) -> None:
        """Take back what a worker that died had been given."""
        for key, given in self._given.items():
            back = [number for number, of in given.items() if of == worker]
            self._left[key] += back
            for number in back:
                del given[number]


def shared(queue: Any, worker: str, ask: Callable[[Any], Any]) -> Callable[[ResumablePass], Share]:
    """Return how a worker gets its batches of a pass: ``ask`` waits for an answer of the queue."""

    def share(work: ResumablePass, batches: list[NDArray[np.int64]]) -> Iterator[NDArray[np.int64]]:
        left = [index for index, batch in enumerate(batches) if not work.done_at_start[batch].all()]
        finished = None
        while (number := ask(queue.next.remote(work.name, left, len(batches), worker, finished))) is not None:
            if number == WAIT:
                time.sleep(_POLL_SECONDS)
            elif number == len(batches):
                work.finish()
            else:
                yield batches[number]
            finished = None if number == WAIT else number

    return lambda work: partial(share, work)


class Worker:
    """Scores in a process of its own."""

    def where(self) -> str:
        """Return node and process."""
        return f"{os.uname().nodename}, process {os.getpid()}"

    def run(self, folder: Path, options: Mapping[str, Any], name: str, queue: Any) -> tuple[Any, Any]:
        """Return the columns and the table, equal for all workers."""
        import ray

        from dataflex.offline.scoring import scored_table

        os.chdir(folder)
        scored, table = scored_table(score_request(**options), share=shared(queue, name, ray.get))
        return scored.columns, table


def scored_by_ray(options: Mapping[str, Any], workers: int | None) -> tuple[Any, Any]:
    """Score on a cluster of Ray and return columns and table; by default on as many workers as it has GPUs or nodes.

    A cluster is that of ``RAY_ADDRESS``, or one on this machine for the time of the call.

    Raises:
        UnsupportedError: Ray is not installed.
        DataFlexError: Workers died again and again; or what a worker raised.
    """
    try:
        import ray
    except ImportError as error:
        raise UnsupportedError(f"--engine ray: {error}; install the extra: {install('ray')}") from error
    started = not ray.is_initialized()
    if started:
        local = {} if "RAY_ADDRESS" in os.environ else {"num_cpus": workers, "include_dashboard": False}
        ray.init(log_to_driver=False, logging_level="warning", **local)
    try:
        gpus = int(ray.cluster_resources().get("GPU", 0))
        actor = ray.remote(Worker).options(num_gpus=1) if gpus else ray.remote(Worker).options(num_cpus=1)
        queue = ray.remote(Queue).options(num_cpus=0).remote()
        running: dict[Any, tuple[int, str, Any]] = {}

        def start(number: int, name: str) -> None:
            made = actor.remote()
            for task in (made.where.remote(), made.run.remote(Path.cwd(), dict(options), name, queue)):
                running[task] = number, name, made

        count = workers or gpus or len(ray.nodes())
        for number in range(count):
            start(number, f"{number}")
        died = 0
        while died <= count * _REPLACEMENTS:
            task = ray.wait(list(running))[0][0]
            number, name, _ = running.pop(task)
            try:
                found: Any = ray.get(task)
            except ray.exceptions.RayTaskError as error:
                raise error.cause or error from None
            except ray.exceptions.RayError as error:
                if any(name == other for _, other, _ in running.values()):
                    continue  # it died before it could say where it is
                died += 1
                logger.warning("worker %s died: %s", name, " ".join(str(error).split())[:300])
                ray.get(queue.lost.remote(name))
                start(number, f"{number}.{died}")
                continue
            if not isinstance(found, str):
                return cast(tuple[Any, Any], found)
            logger.info("worker %s: %s", name, found)
        raise DataFlexError(f"--engine ray: workers died {died} times, the last reason is told above")
    finally:
        if started:
            ray.shutdown()
