"""Work spread over processes: results in order, a process that dies replaced, and none left behind.

`make` is called once in each process and gives the function that does one task; it and the tasks are pickled.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
import time
import traceback
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from typing import Any, TypeVar

from llmkit.errors import LlmkitError, ResourceError

Task = TypeVar("Task")
Result = TypeVar("Result")
_TRIES = 3
_SINGLE_THREAD = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "RAYON_NUM_THREADS")


def cores() -> int:
    """How many cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def in_order(
    make: Callable[[], Callable[[Task], Result]], tasks: Sequence[Task], workers: int
) -> Iterator[tuple[Task, Result]]:
    """Each task with its result, in the order of the tasks; with fewer than two workers, in this process.

    Raises what a task raises (of those, that of the first in order), and ResourceError when a task's process died again
    and again.
    """
    if workers < 2 or len(tasks) < 2:
        do = make() if tasks else None
        for task in tasks:
            assert do is not None
            yield task, do(task)
        return
    pool = _Pool(make, tasks, min(workers, len(tasks)))
    try:
        yield from pool.results()
    finally:
        pool.close()


@dataclass
class _Worker:
    process: BaseProcess
    pipe: Connection
    number: int | None = None  # of the task that it is at


@dataclass
class _Pool:
    make: Any
    tasks: Sequence[Any]
    count: int
    _workers: list[_Worker] = field(default_factory=list)
    _found: dict[int, Any] = field(default_factory=dict)  # results that came before their turn

    def results(self) -> Iterator[tuple[Any, Any]]:
        waiting = deque(range(len(self.tasks)))
        tries = [0] * len(self.tasks)
        self._workers = [self._start() for _ in range(self.count)]
        for number, task in enumerate(self.tasks):
            while number not in self._found:
                self._hand_out(waiting, tries)
                self._collect(waiting, tries)
            found = self._found.pop(number)
            if isinstance(found, BaseException):
                raise found
            yield task, found

    def _start(self) -> _Worker:
        context = multiprocessing.get_context("spawn")
        ours, theirs = context.Pipe()
        process = context.Process(target=_work, args=(theirs,), daemon=True)
        process.start()
        theirs.close()
        ours.send(self.make)
        return _Worker(process, ours)

    def _hand_out(self, waiting: deque[int], tries: list[int]) -> None:
        for worker in self._workers:
            if worker.number is None and waiting:
                worker.number = waiting.popleft()
                tries[worker.number] += 1
                try:
                    worker.pipe.send(self.tasks[worker.number])
                except OSError:  # it has just died, which `_collect` meets
                    continue

    def _collect(self, waiting: deque[int], tries: list[int]) -> None:
        """Takes in what is ready; a worker that died is replaced, and its task goes back to the front."""
        pipes = {worker.pipe: place for place, worker in enumerate(self._workers) if worker.number is not None}
        for ready in wait(list(pipes)):
            worker = self._workers[pipes[ready]]  # type: ignore[index]
            number = worker.number
            assert number is not None
            try:
                self._found[number] = worker.pipe.recv()
                worker.number = None
            except (EOFError, OSError):
                worker.process.join()
                if tries[number] == _TRIES:
                    self._found[number] = _died(self.tasks[number], worker.process.exitcode)
                else:
                    waiting.appendleft(number)
                self._workers[pipes[ready]] = self._start()  # type: ignore[index]

    def close(self) -> None:
        for worker in self._workers:
            worker.process.terminate()
            worker.pipe.close()
        for worker in self._workers:
            worker.process.join()


def _died(task: Any, code: int | None) -> ResourceError:
    how = f"signal {-code}" if code is not None and code < 0 else f"exit code {code}"
    return ResourceError(
        f"a process died {_TRIES} times over the same work",
        got=f"{how}, at {task}",
        hint="most often memory is short: set data.workers to fewer; what is done stays, and is not done again",
    )


def _work(pipe: Connection) -> None:
    """What a worker does, until the pipe ends."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the parent too, which ends its workers
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    os.environ |= dict.fromkeys(_SINGLE_THREAD, "1") | {"TOKENIZERS_PARALLELISM": "false"}
    threading.Thread(target=_end_with_parent, args=(os.getppid(),), daemon=True).start()
    try:
        make, do = pipe.recv(), None
        while True:
            task = pipe.recv()
            try:
                do = do or make()
                result = do(task)
            except LlmkitError as error:
                result = error
            except Exception as error:
                result = _portable(error)
            pipe.send(result)
    except (EOFError, BrokenPipeError):
        return


def _portable(error: Exception) -> Exception:
    """The error itself where it is one of Python's own, which can be sent, with the place in this process it is from."""
    known = type(error).__module__ == "builtins"
    sent = error if known else RuntimeError(f"{type(error).__name__}: {error}")
    sent.add_note(f"in a worker process:\n{traceback.format_exc()}")
    return sent


def _end_with_parent(parent: int) -> None:
    while os.getppid() == parent:
        time.sleep(1)
    os._exit(1)
