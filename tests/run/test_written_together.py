"""Several processes write one checkpoint, each its rows of every tensor; here they are threads."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from llmkit.errors import ResourceError
from llmkit.run import checkpoint as module
from llmkit.run.checkpoint import Checkpoint, Checkpoints, Writers, published

WHOLE = {"w": torch.arange(21.0).reshape(7, 3), "b": torch.arange(2, dtype=torch.bfloat16)}
MOMENTS = {"0.exp_avg": torch.arange(21.0).reshape(7, 3) / 7, "0.step": torch.tensor(5.0)}


def rows(tensors: dict[str, torch.Tensor], number: int, count: int) -> dict[str, torch.Tensor]:
    """As `fully_shard` cuts: the last processes may have no row at all; what is no rows is in the first one."""
    found = {}
    for name, tensor in tensors.items():
        parts = tensor.chunk(count) if tensor.ndim else (tensor,)
        if number < len(parts):
            found[name] = parts[number].contiguous()
        elif tensor.ndim:
            found[name] = tensor[:0]
    return found


class Processes:
    """`count` threads that call the same methods of checkpoints of their own."""

    def __init__(self, folder: Path, count: int = 3, **keeping: Any) -> None:
        self.count, self._barrier, self._given = count, threading.Barrier(count, timeout=20), [None] * count
        self.all = [
            Checkpoints(folder, "f", writers=Writers(number, count, self._exchange(number)), **keeping)
            for number in range(count)
        ]

    def _exchange(self, number: int) -> Callable[[Any], list[Any]]:
        def exchange(own: Any) -> list[Any]:
            self._given[number] = own
            self._barrier.wait()
            found = list(self._given)
            self._barrier.wait()
            return found

        return exchange

    def each(self, work: Callable[[Checkpoints, int], Any]) -> list[Any]:
        """What each process's work gives, or the error that it raises."""

        def one(number: int) -> Any:
            try:
                return work(self.all[number], number)
            except (OSError, ResourceError) as error:
                return error

        with ThreadPoolExecutor(self.count) as pool:
            return list(pool.map(one, range(self.count)))

    def write(self, step: int, before: Callable[[], None] = lambda: None) -> list[Any]:
        return self.each(lambda own, number: own.write(step, self.part(number, step), before))

    def part(self, number: int, step: int) -> Checkpoint:
        mine = [rows(tensors, number, self.count) for tensors in (WHOLE, MOMENTS)]
        return Checkpoint(*mine, {"state": {}, "groups": []}, {"n": step})


def read(folder: Path) -> tuple[Checkpoint | None, list[str]]:
    warnings: list[str] = []
    return Checkpoints(folder, "f").newest(warnings.append), warnings


def failing(part: str) -> Callable[..., None]:
    """In place of `save_file`: the disk is full for files of some names."""
    real = module.save_file

    def save(tensors: Any, file: Path) -> None:
        if part in file.name:
            raise OSError(28, "No space left on device")
        real(tensors, file)

    return save


@pytest.mark.parametrize("count", [2, 3, 8])  # of 7 rows
def test_anybody_reads_what_they_wrote_as_a_whole(tmp_path: Path, count: int) -> None:
    assert Processes(tmp_path, count).write(4) == [tmp_path / "step-00000004"] * count
    found, warnings = read(tmp_path)
    assert found is not None
    assert (warnings, found.state) == ([], {"n": 4})
    for given, read_back in ((WHOLE, found.weights), (MOMENTS, found.optimizer_tensors)):
        assert set(read_back) == set(given)
        for name, tensor in given.items():
            assert read_back[name].dtype == tensor.dtype
            assert torch.equal(read_back[name], tensor)
    outlined = found.outlined()
    assert {name: tensor.shape for name, tensor in outlined.weights.items()} == {n: t.shape for n, t in WHOLE.items()}
    assert all(tensor.is_meta for tensor in outlined.weights.values())
    names = {path.name for path in (tmp_path / "step-00000004").glob("*.safetensors")}
    assert names == {
        f"{k}-{i:05d}-of-{count:05d}.safetensors" for k in ("weights", "optimizer") for i in range(1, count + 1)
    }


def test_behind_training_too(tmp_path: Path) -> None:
    processes = Processes(tmp_path)
    processes.each(lambda own, number: own.write_behind(4, processes.part(number, 4)))
    processes.each(lambda own, number: own.write_behind(6, processes.part(number, 6)))
    assert processes.each(lambda own, number: own.wait()) == [True] * 3
    assert [path.name for path in published(tmp_path)] == ["step-00000006", "step-00000004"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-00000004", "step-00000006"]


@pytest.mark.parametrize("part", ["weights-00001", "weights-00003", "optimizer-00002"])
def test_where_one_cannot_write_all_know_and_the_one_before_stands(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, part: str
) -> None:
    processes = Processes(tmp_path)
    processes.write(4)
    with monkeypatch.context() as patch:
        patch.setattr(module, "save_file", failing(part))
        for number, error in enumerate(processes.write(6)):
            assert isinstance(error, OSError)
            assert "No space left" in str(error)
            assert (f"process {int(part[-1]) - 1}" in str(error)) == (number != int(part[-1]) - 1)
    assert [path.name for path in tmp_path.iterdir()] == ["step-00000004"], "the disk gets its space back"
    assert processes.write(8) == [tmp_path / "step-00000008"] * 3


def test_what_comes_before_has_to_have_worked(tmp_path: Path) -> None:
    def refuse() -> None:
        raise OSError("the log is not on the disk")

    errors = Processes(tmp_path).write(4, refuse)
    assert [str(error).removeprefix("process 0: ") for error in errors] == ["the log is not on the disk"] * 3
    assert not list(tmp_path.iterdir())


def test_saving_is_rehearsed_by_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert Processes(tmp_path / "c").each(lambda own, number: own.rehearse(9)) == [None] * 3
    assert not list((tmp_path / "c").iterdir())
    with monkeypatch.context() as patch:
        patch.setattr(module, "save_file", failing("weights-00002"))
        errors = Processes(tmp_path / "c").each(lambda own, number: own.rehearse(9))
    assert [type(error) for error in errors] == [ResourceError] * 3


def forget(path: Path, *names: str) -> None:
    manifest = json.loads((path / "manifest.json").read_text())
    for name in names:
        del manifest["files"][name]
        (path / name).unlink()
    (path / "manifest.json").write_text(json.dumps(manifest))


DAMAGE: dict[str, Callable[[Path], Any]] = {
    "a part is missing": lambda path: (path / "weights-00002-of-00003.safetensors").unlink(),
    "a part is unknown": lambda path: forget(path, "weights-00002-of-00003.safetensors"),
    "a process's parts": lambda path: forget(
        path, "weights-00003-of-00003.safetensors", "optimizer-00003-of-00003.safetensors"
    ),
    "all weights": lambda path: forget(path, *(f"weights-{i:05d}-of-00003.safetensors" for i in (1, 2, 3))),
}


@pytest.mark.parametrize("name", DAMAGE)
def test_one_that_is_not_complete_is_set_aside(tmp_path: Path, name: str) -> None:
    processes = Processes(tmp_path)
    processes.write(4)
    processes.write(6)
    DAMAGE[name](tmp_path / "step-00000006")
    found, [warning] = read(tmp_path)
    assert found is not None
    assert found.step == 4
    assert "step-00000006" in warning


UNFIT: dict[str, dict[str, torch.Tensor]] = {
    "a number in two files": {"0.step": torch.tensor(5.0)},
    "other columns": {"0.exp_avg": torch.zeros(2, 4)},
    "another type": {"0.exp_avg": torch.zeros(2, 3, dtype=torch.float64)},
    "more dimensions": {"0.exp_avg": torch.zeros(2, 3, 1)},
}


@pytest.mark.parametrize("name", UNFIT)
def test_rows_that_do_not_go_together_are_refused(tmp_path: Path, name: str) -> None:
    processes = Processes(tmp_path)
    processes.write(4)

    def write(own: Checkpoints, number: int) -> Path:
        part = processes.part(number, 6)
        return own.write(
            6, replace(part, optimizer_tensors={**part.optimizer_tensors, **(UNFIT[name] if number else {})})
        )

    processes.each(write)
    found, [warning] = read(tmp_path)
    assert found is not None
    assert found.step == 4
    assert "do not go together" in warning


@pytest.mark.parametrize("failing_call", ["write_json", "sync_folder"])
def test_where_the_first_one_cannot_publish_the_others_know(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, failing_call: str
) -> None:
    def refuse(*given: Any) -> None:
        raise OSError(28, "No space left on device")

    processes = Processes(tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(module, failing_call, refuse)
        errors = processes.write(4)
    assert [type(error) for error in errors] == [OSError] * 3
    assert all("No space left" in str(error) for error in errors)


def test_an_error_of_one_does_not_leave_the_others_waiting(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = module.save_file

    def exhaust(tensors: Any, file: Path) -> None:
        if "00002" in file.name:
            raise MemoryError
        real(tensors, file)

    monkeypatch.setattr(module, "save_file", exhaust)
    processes = Processes(tmp_path)

    def write(own: Checkpoints, number: int) -> Any:
        try:
            return own.write(4, processes.part(number, 4))
        except MemoryError as error:
            return error

    first, second, third = processes.each(write)
    assert isinstance(second, MemoryError)
    assert (type(first), type(third)) == (OSError, OSError)


def test_older_ones_are_deleted_once(tmp_path: Path) -> None:
    processes = Processes(tmp_path, keep=1)
    for step in (2, 4, 6):
        processes.write(step)
    assert [path.name for path in tmp_path.iterdir()] == ["step-00000006"]
