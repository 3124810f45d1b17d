"""Work spread over processes: in order, with the task's own errors, whatever dies, and nothing left behind."""

from __future__ import annotations

import multiprocessing
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import psutil
import pytest

from llmkit.data.workers import in_order
from llmkit.errors import DataError, LlmkitError, Problem, RecipeError, ResourceError


def made(do: Callable[..., Any], *given: Any) -> Callable[[Any], Any]:
    return partial(do, *given)


def work(do: Callable[..., Any], *given: Any) -> Callable[[], Callable[[Any], Any]]:
    """What `in_order` takes: it can be sent to another process."""
    return partial(made, do, *given)


def slower_first(number: int) -> tuple[int, int]:
    time.sleep(0.2 if number == 0 else 0.0)
    return number * number, os.getpid()


@pytest.mark.parametrize("workers", [1, 2, 3])
def test_results_come_in_the_order_of_the_tasks(workers: int) -> None:
    done = list(in_order(work(slower_first), range(20), workers))
    assert [task for task, _ in done] == list(range(20))
    assert [result for _, (result, _) in done] == [number * number for number in range(20)]
    processes = {process for _, (_, process) in done}
    if workers == 1:
        assert processes == {os.getpid()}
    else:
        assert os.getpid() not in processes
        assert 1 <= len(processes) <= workers
    assert multiprocessing.active_children() == []


@pytest.mark.parametrize(("workers", "tasks"), [(0, 3), (1, 3), (8, 1), (8, 0)])
def test_what_pays_no_process_stays_in_this_one(workers: int, tasks: int) -> None:
    """Nothing is sent anywhere, so that it need not be possible to."""
    started: list[int] = []
    make = lambda: started.append(os.getpid()) or (lambda task: (task, os.getpid()))  # type: ignore[func-returns-value]  # noqa: E731
    done = list(in_order(make, range(tasks), workers))
    assert done == [(task, (task, os.getpid())) for task in range(tasks)]
    assert started == [os.getpid()] * bool(tasks)


def count_makes(folder: Path) -> Callable[[int], int]:
    (folder / str(os.getpid())).touch(exist_ok=False)
    return abs


def test_what_does_the_tasks_is_made_once_in_a_process(tmp_path: Path) -> None:
    assert [task for task, _ in in_order(partial(count_makes, tmp_path), range(30), 2)] == list(range(30))
    assert 1 <= len(list(tmp_path.iterdir())) <= 2


ERRORS: list[LlmkitError] = [
    DataError("bad data", got="x", expected="y", hint="mend it", where="a.jsonl:7"),
    RecipeError("two mistakes", where="data.train", problems=[Problem("one"), Problem("two", where="data.eval")]),
]


def fail(error: Exception, at: int, task: int) -> int:
    if task == at:
        raise error
    return task


@pytest.mark.parametrize("error", ERRORS, ids=lambda error: error.kind)
@pytest.mark.parametrize("workers", [1, 2])
def test_an_error_of_a_task_is_the_same_error_here(error: LlmkitError, workers: int) -> None:
    done = []
    with pytest.raises(type(error)) as caught:
        done += in_order(work(fail, error, 3), range(8), workers)
    assert vars(caught.value) == vars(error)
    assert str(caught.value) == str(error)
    assert multiprocessing.active_children() == []


def make_badly() -> Callable[[int], int]:
    raise ERRORS[0]


def test_an_error_while_a_process_makes_itself_ready_is_the_same_here() -> None:
    with pytest.raises(DataError, match="bad data"):
        list(in_order(make_badly, range(4), 2))


def divide(task: int) -> float:
    return 1 / (task - 2)


def test_any_other_error_is_told_with_the_place_where_it_happened() -> None:
    with pytest.raises(Exception, match="division by zero") as caught:
        list(in_order(work(divide), range(4), 2))
    assert "in divide" in "".join(caught.value.__notes__)
    assert multiprocessing.active_children() == []


@pytest.mark.parametrize("error", [MemoryError("2 TiB"), PermissionError(13, "denied"), OSError(28, "No space left")])
def test_a_lack_of_resources_is_the_same_error_here(error: Exception) -> None:
    """The pipeline tells by its type or number that it is none of llmkit's making."""
    with pytest.raises(type(error)) as caught:
        list(in_order(work(fail, error, 1), range(4), 2))
    assert getattr(caught.value, "errno", None) == getattr(error, "errno", None)


def fail_late_or_early(task: int) -> int:
    if task == 1:
        time.sleep(0.5)
        raise DataError("the first in order")
    if task == 2:
        raise DataError("the first in time")
    return task


def test_of_several_errors_that_of_the_first_task_is_raised() -> None:
    done = []
    with pytest.raises(DataError, match="the first in order"):
        done.extend([task for task, _ in in_order(work(fail_late_or_early), range(6), 3)])


def die_once(folder: Path, task: int) -> int:
    mark = folder / str(task)
    if task % 3 == 1 and not mark.exists():
        mark.touch()
        os.kill(os.getpid(), signal.SIGKILL)
    return task * 10


def test_a_process_that_dies_is_replaced_and_its_task_done_again(tmp_path: Path) -> None:
    done = list(in_order(work(die_once, tmp_path), range(7), 2))
    assert done == [(task, task * 10) for task in range(7)]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["1", "4"]
    assert multiprocessing.active_children() == []


def test_processes_that_are_killed_from_outside_are_replaced() -> None:
    results = in_order(work(slower_first), range(12), 2)
    found = [next(results), next(results)]
    for process in multiprocessing.active_children():
        process.kill()
    found += results
    assert [(task, result) for task, (result, _) in found] == [(task, task * task) for task in range(12)]


def die_always(folder: Path, how: int, task: str) -> str:
    if task == "the bad piece":
        with (folder / "tries").open("a") as file:
            file.write("x")
        os._exit(how) if how > 0 else os.kill(os.getpid(), -how)
    return task


@pytest.mark.parametrize(("how", "said"), [(-signal.SIGKILL, "signal 9"), (7, "exit code 7")])
def test_a_task_whose_process_dies_again_and_again_ends_the_work_by_name(tmp_path: Path, how: int, said: str) -> None:
    done = []
    with pytest.raises(ResourceError) as caught:
        done.extend([task for task, _ in in_order(work(die_always, tmp_path, how), ["a", "the bad piece", "b"], 2)])
    assert "the bad piece" in str(caught.value.got)
    assert said in str(caught.value.got)
    assert "data.workers" in str(caught.value.hint)
    assert (tmp_path / "tries").read_text() == "xxx"
    assert multiprocessing.active_children() == []


def linger(task: int) -> int:
    time.sleep(0.0 if task == 0 else 900.0)
    return os.getpid()


def test_closed_early_it_leaves_no_process_behind() -> None:
    results = in_order(work(linger), range(6), 3)
    next(results)
    processes = [psutil.Process(process.pid) for process in multiprocessing.active_children()]
    assert len(processes) == 3
    results.close()  # type: ignore[attr-defined]
    assert [process for process in processes if process.is_running()] == []


def test_an_exception_in_the_one_who_asks_leaves_no_process_behind() -> None:
    def ask() -> None:
        for _ in in_order(work(linger), range(4), 2):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        ask()
    deadline = time.monotonic() + 120
    while multiprocessing.active_children() and time.monotonic() < deadline:
        time.sleep(0.05)
    assert multiprocessing.active_children() == []


PARENT = """
import sys
sys.path.insert(0, {folder!r})
from test_workers import in_order, note_and_linger, work
if __name__ == "__main__":
    list(in_order(work(note_and_linger, sys.argv[1]), range(4), 2))
"""


def note_and_linger(folder: str, task: int) -> None:
    (Path(folder) / f"{os.getpid()}").touch()
    time.sleep(900)


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT])
def test_the_processes_end_with_the_one_that_started_them(tmp_path: Path, number: int) -> None:
    script, notes = tmp_path / "parent.py", tmp_path / "notes"
    notes.mkdir()
    script.write_text(PARENT.format(folder=str(Path(__file__).parent)))
    # a shell starts what it runs in the background with SIGINT ignored
    restore = partial(signal.signal, signal.SIGINT, signal.default_int_handler)
    parent = subprocess.Popen([sys.executable, script, notes], stderr=subprocess.DEVNULL, preexec_fn=restore)
    deadline = time.monotonic() + 300
    while len(list(notes.iterdir())) < 2 and time.monotonic() < deadline:
        time.sleep(0.05)
    workers = [psutil.Process(int(path.name)) for path in notes.iterdir()]
    assert len(workers) == 2
    parent.send_signal(number)
    parent.wait(300)
    _, alive = psutil.wait_procs(workers, timeout=120)
    assert alive == []


def environment(task: int) -> list[str | None]:
    return [os.environ.get(name) for name in ("OMP_NUM_THREADS", "RAYON_NUM_THREADS", "TOKENIZERS_PARALLELISM")]


def test_a_process_uses_one_core() -> None:
    for _, found in in_order(work(environment), range(2), 2):
        assert found == ["1", "1", "false"]
