"""Killed between any two file operations of a publication, a whole checkpoint stands, and what is kept is never deleted."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from faults import lives_until
from safetensors.torch import load_file, save_file

from llmkit.run.checkpoint import Checkpoint, Checkpoints, checked_manifest, published, step_of


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def some(step: int, best: Path | None = None, mark: float = 0.0) -> Checkpoint:
    return Checkpoint(
        {"w": torch.full((5, 3), step + mark)},
        {"0.exp_avg": torch.full((5, 3), -step - mark)},
        {"state": {}, "groups": []},
        {"n": step, "mark": mark},
        best,
    )


def whole(found: Checkpoint, best: bool) -> bool:
    value = found.state["n"] + found.state["mark"]
    parts = torch.equal(found.weights["w"], torch.full((5, 3), value)) and torch.equal(
        found.optimizer_tensors["0.exp_avg"], torch.full((5, 3), -value)
    )
    return parts and (not best or load_file(found.best_weights)["b"].item() == 1.0)  # type: ignore[arg-type]


CASES: dict[str, dict[str, Any]] = {
    "the first": {"before": (), "step": 1},
    "a second": {"before": (1,), "step": 2},
    "in place of one": {"before": (1,), "step": 2, "keep": 1},
    "in place of two": {"before": (1, 2), "step": 3, "keep": 1},
    "beside one for good": {"before": (4, 5), "step": 6, "keep": 1, "keep_every": 4},
    "of the same step": {"before": (3,), "step": 3, "keep": 2},
    "of the same step, alone": {"before": (3,), "step": 3, "keep": 1},
    "with the best weights": {"before": (1,), "step": 2, "keep": 1, "best": True},
    "behind training": {"before": (1,), "step": 2, "keep": 1, "best": True, "behind": True},
}


@pytest.mark.parametrize("name", CASES)
def test_a_kill_at_any_file_operation_leaves_a_whole_checkpoint(tmp_path: Path, name: str) -> None:
    case = {"keep": 2, "keep_every": None, "best": False, "behind": False} | CASES[name]
    killed = 0
    for operation in range(1, 200):
        folder, best = tmp_path / str(operation), tmp_path / f"best-{operation}"
        save_file({"b": torch.ones(1)}, best)
        best_file = best if case["best"] else None
        keeping = (case["keep"], case["keep_every"])
        for step in case["before"]:
            Checkpoints(folder, "f", *keeping).write(step, some(step, best_file))
        lived = lives_until(operation, partial(_publish, folder, keeping, case, best_file))
        _look(folder, keeping, case, best_file, lived)
        if lived:
            break
        killed += 1
    assert killed >= 12, "each of its operations was the last one once"


def _publish(folder: Path, keeping: tuple[int, int | None], case: dict[str, Any], best: Path | None) -> None:
    checkpoints, new = Checkpoints(folder, "f", *keeping), some(case["step"], best, mark=0.5)
    if case["behind"]:
        checkpoints.write_behind(case["step"], new)
        checkpoints.wait()
    else:
        checkpoints.write(case["step"], new)


def _look(folder: Path, keeping: tuple[int, int | None], case: dict[str, Any], best: Path | None, lived: bool) -> None:
    """What the next process finds, and what it leaves."""
    for path in published(folder):
        checked_manifest(path)  # also one that was about to go
    warnings: list[str] = []
    found = Checkpoints(folder, "f", *keeping).newest(warnings.append)
    assert warnings == [], "none is damaged"
    if case["before"]:
        assert found is not None, "there was one before"
    if found is not None:
        assert whole(found, case["best"])
        assert found.state["n"] in (max((*case["before"], 0)), case["step"])
    assert not lived or (found is not None and found.state == {"n": case["step"], "mark": 0.5})
    for_good = [step for step in case["before"] if keeping[1] and step % keeping[1] == 0]
    assert {step_of(path) for path in published(folder)} >= set(for_good)
    Checkpoints(folder, "f", *keeping).write(9, some(9, best))
    names = {path.name for path in folder.iterdir()}
    assert not {name for name in names if name.startswith(".")}, "what was left unfinished is gone"
    assert len(names) <= keeping[0] + len(for_good)


@pytest.mark.parametrize(
    ("keep", "every", "left"), [(1, None, [12]), (3, None, [10, 11, 12]), (1, 5, [5, 10, 12]), (2, 6, [6, 11, 12])]
)
def test_the_newest_stay_and_multiples_stay_for_good(
    tmp_path: Path, keep: int, every: int | None, left: list[int]
) -> None:
    for step in range(1, 13):
        Checkpoints(tmp_path, "f", keep, every).write(step, some(step))
        assert step in [step_of(path) for path in published(tmp_path)]
    assert sorted(step_of(path) for path in published(tmp_path)) == left


def test_the_only_good_one_is_not_deleted_for_one_that_cannot_be_read_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from faults import flip, tearing

    from llmkit.run import checkpoint as module

    Checkpoints(tmp_path, "f", 1).write(1, some(1))
    with monkeypatch.context() as patch:
        patch.setattr(module, "save_file", tearing(module.save_file, flip, lambda: True))
        with pytest.raises(OSError, match="other numbers"):
            Checkpoints(tmp_path, "f", 1).write(2, some(2))
    assert [path.name for path in tmp_path.iterdir()] == ["step-00000001"]


def tears() -> dict[str, Callable[[Path], Any]]:
    from faults import flip

    return {
        "a bit at the end": flip,
        "cut short": lambda path: path.write_bytes(path.read_bytes()[:-4]),
        "nothing": lambda path: path.write_bytes(b""),
        "noughts": lambda path: path.write_bytes(bytes(path.stat().st_size)),
        "the last half is noughts": lambda path: path.write_bytes(
            path.read_bytes()[: path.stat().st_size // 2].ljust(path.stat().st_size, b"\0")
        ),
    }


@pytest.mark.parametrize("tear", tears())
@pytest.mark.parametrize("file", ["weights.safetensors", "optimizer.safetensors"])
def test_a_torn_write_is_noticed_before_it_is_published(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tear: str, file: str
) -> None:
    from safetensors import SafetensorError

    from llmkit.run import checkpoint as module

    def torn(tensors: Any, path: Path) -> None:
        save_file(tensors, path)
        if path.name == file:
            tears()[tear](path)

    Checkpoints(tmp_path, "f").write(1, some(1))
    monkeypatch.setattr(module, "save_file", torn)
    with pytest.raises((OSError, SafetensorError)):
        Checkpoints(tmp_path, "f").write(2, some(2))
    assert [path.name for path in tmp_path.iterdir()] == ["step-00000001"]


def test_a_torn_json_is_noticed_before_it_is_published(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The checksums are those of the bytes on the disk: what is written in JSON has to be compared with what was meant."""
    from llmkit.run import checkpoint as module

    real = module.write_json

    def torn(path: Path, value: Any) -> None:
        real(path, value)
        if path.name == "state.json":
            path.write_text(path.read_text().replace('"n": 2', '"n": 7'))

    Checkpoints(tmp_path, "f").write(1, some(1))
    monkeypatch.setattr(module, "write_json", torn)
    with pytest.raises(OSError, match="state"):
        Checkpoints(tmp_path, "f").write(2, some(2))
    assert [path.name for path in tmp_path.iterdir()] == ["step-00000001"]


def test_best_weights_that_rot_before_they_are_kept_are_noticed(tmp_path: Path) -> None:
    """A kept best file is the only copy of those weights: what cannot be read is not published as if it were whole."""
    best = tmp_path / "best"
    save_file({"b": torch.ones(1)}, best)
    best.write_bytes(best.read_bytes()[:-2])
    Checkpoints(tmp_path / "c", "f").write(1, some(1))
    with pytest.raises(Exception, match=r"best|safetensors|header|incomplete"):
        Checkpoints(tmp_path / "c", "f").write(2, some(2, best))


@pytest.mark.parametrize("failing", [1, 2])
def test_a_replacement_that_fails_half_way_leaves_the_one_that_was_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, failing: int
) -> None:
    """The same step is written again; a disk fails at a rename, and then at all that comes after it."""
    import shutil

    from faults import FailingDisk

    folder = tmp_path / "c"
    Checkpoints(folder, "f", 1).write(3, some(3))
    with monkeypatch.context() as patch:
        disk = FailingDisk(patch, "rename")
        disk.chosen = lambda number: number == failing
        with pytest.raises(OSError, match="No space left"):
            Checkpoints(folder, "f", 1).write(3, some(3, mark=0.5))
    shutil.copytree(folder, tmp_path / "killed now")
    with monkeypatch.context() as patch:
        FailingDisk(patch, "save_file")
        with pytest.raises(OSError, match="No space left"):
            Checkpoints(folder, "f", 1).write(4, some(4))
    for place in (folder, tmp_path / "killed now"):
        found = Checkpoints(place, "f", 1).newest(lambda text: None)
        assert found is not None
        assert found.state["n"] == 3
