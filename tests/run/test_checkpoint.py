"""A checkpoint gives back what it was given, appears whole or not at all, and damage never goes unnoticed."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from llmkit.errors import ArtifactError
from llmkit.files import link_file
from llmkit.optim.state import optimizer_from_parts, optimizer_to_parts
from llmkit.run import checkpoint as module
from llmkit.run.checkpoint import Checkpoint, Checkpoints


def some(step: int, best: Path | None = None) -> Checkpoint:
    weights = {"a.weight": torch.full((3, 4), float(step)), "b": torch.tensor([step], dtype=torch.bfloat16)}
    return Checkpoint(
        weights, {"0.exp_avg": torch.rand(3, 4)}, {"state": {"0.x": None}, "groups": []}, {"n": step}, best
    )


def write(folder: Path, *steps: int, keep: int = 9, fingerprint: str = "f") -> None:
    for step in steps:
        Checkpoints(folder, fingerprint, keep).write(step, some(step))


def read(folder: Path, fingerprint: str = "f") -> tuple[Checkpoint | None, list[str]]:
    warnings: list[str] = []
    return Checkpoints(folder, fingerprint).newest(warnings.append), warnings


def step_of(found: Checkpoint | None) -> int | None:
    return None if found is None else found.state["n"]


def test_gives_back_what_it_was_given(tmp_path: Path) -> None:
    given = some(7)
    Checkpoints(tmp_path / "c", "f").write(7, given)
    found, warnings = read(tmp_path / "c")
    assert found is not None
    assert warnings == []
    assert torch.equal(found.weights["a.weight"], given.weights["a.weight"])
    assert found.weights["b"].dtype == torch.bfloat16
    assert torch.equal(found.optimizer_tensors["0.exp_avg"], given.optimizer_tensors["0.exp_avg"])
    assert (found.optimizer_values, found.state, found.best_weights) == (given.optimizer_values, {"n": 7}, None)


def test_a_folder_without_checkpoints(tmp_path: Path) -> None:
    assert read(tmp_path / "nothing") == (None, [])
    (tmp_path / "c").mkdir()
    assert read(tmp_path / "c") == (None, [])


def test_the_newest_is_read_and_old_ones_go(tmp_path: Path) -> None:
    write(tmp_path, 9, 10, 100, keep=2)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-00000010", "step-00000100"]
    assert step_of(read(tmp_path)[0]) == 100


def test_the_best_weights_are_a_part_that_later_ones_do_not_change(tmp_path: Path) -> None:
    best = tmp_path / "best.safetensors"
    save_file({"w": torch.ones(2)}, best)
    Checkpoints(tmp_path / "c", "f").write(1, some(1, best))
    save_file({"w": torch.zeros(2)}, tmp_path / "new")
    (tmp_path / "new").replace(best)
    found, _ = read(tmp_path / "c")
    assert found is not None
    assert found.best_weights is not None
    assert load_file(found.best_weights)["w"].tolist() == [1.0, 1.0]


def test_where_files_cannot_be_linked_they_are_copied(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*names: Any) -> None:
        raise OSError("not on this disk")

    monkeypatch.setattr(module.os, "link", refuse)
    test_the_best_weights_are_a_part_that_later_ones_do_not_change(tmp_path)


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


DAMAGE: dict[str, Callable[[Path], Any]] = {
    "a flipped bit in the weights": lambda c: flip(c / "weights.safetensors"),
    "a flipped bit in the moments": lambda c: flip(c / "optimizer.safetensors"),
    "a flipped bit in the state": lambda c: flip(c / "state.json"),
    "a flipped bit in the best weights": lambda c: flip(c / "best.safetensors"),
    "a file cut short": lambda c: (c / "weights.safetensors").write_bytes(
        (c / "weights.safetensors").read_bytes()[:-1]
    ),
    "an empty file": lambda c: (c / "optimizer.safetensors").write_bytes(b""),
    "a missing file": lambda c: (c / "state.json").unlink(),
    "missing best weights": lambda c: (c / "best.safetensors").unlink(),
    "no manifest": lambda c: (c / "manifest.json").unlink(),
    "an empty manifest": lambda c: (c / "manifest.json").write_bytes(b""),
    "an empty folder": lambda c: (shutil.rmtree(c), c.mkdir()),
    "another format": lambda c: (c / "manifest.json").write_text('{"format": 99}'),
}


@pytest.mark.parametrize("name", DAMAGE)
def test_a_damaged_one_is_set_aside_and_named_and_the_one_before_is_used(tmp_path: Path, name: str) -> None:
    folder, best = tmp_path / "c", tmp_path / "best.safetensors"
    save_file({"w": torch.ones(2)}, best)
    write(folder, 1)
    shutil.copy(best, tmp_path / "copy")
    Checkpoints(folder, "f", 5).write(2, some(2, tmp_path / "copy"))
    DAMAGE[name](folder / "step-00000002")
    found, warnings = read(folder)
    assert step_of(found) == 1
    assert len(warnings) == 1
    assert "step-00000002" in warnings[0]
    assert sorted(path.name for path in folder.iterdir()) == ["step-00000001", "unused-step-00000002"]
    assert read(folder)[1] == [], "once set aside it is not looked at again"
    write(folder, 2)
    DAMAGE["no manifest"](folder / "step-00000002")
    assert step_of(read(folder)[0]) == 1, "the same step may be damaged twice"


def test_who_may_not_set_aside_leaves_what_it_cannot_read(tmp_path: Path) -> None:
    write(tmp_path, 1, 2)
    DAMAGE["no manifest"](tmp_path / "step-00000002")
    with pytest.raises(ArtifactError, match="no manifest"):
        Checkpoints(tmp_path, "f").newest(lambda text: None, sets_aside=False)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-00000001", "step-00000002"]


def test_any_changed_byte_of_the_manifest_is_noticed_or_changes_nothing(tmp_path: Path) -> None:
    write(tmp_path, 1)
    path = tmp_path / "step-00000001" / "manifest.json"
    whole = path.read_bytes()
    for position in range(len(whole)):
        data = bytearray(whole)
        data[position] ^= 1
        path.write_bytes(data)
        found, warnings = read(tmp_path)
        assert (step_of(found), len(warnings)) in ((1, 0), (None, 1))
        if found is None:
            (tmp_path / "unused-step-00000001").rename(path.parent)
    path.write_bytes(whole)
    assert step_of(read(tmp_path)[0]) == 1


def test_one_of_other_inputs_is_not_used(tmp_path: Path) -> None:
    write(tmp_path, 1, fingerprint="mine")
    write(tmp_path, 2, fingerprint="another")
    found, warnings = read(tmp_path, "mine")
    assert step_of(found) == 1
    assert "it belongs to other inputs" in warnings[0]


@pytest.mark.parametrize("failing", ["save_file", "write_json", "digest_file", "sync_folder"])
def test_killed_while_it_is_written_the_one_before_stands(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, failing: str
) -> None:
    write(tmp_path, 1)

    def fail(*given: Any) -> None:
        raise MemoryError

    with monkeypatch.context() as patch:
        patch.setattr(module, failing, fail)
        with pytest.raises(MemoryError):
            write(tmp_path, 2)
    found, warnings = read(tmp_path)
    assert step_of(found) == (2 if failing == "sync_folder" else 1), "only the last one comes after it is published"
    assert warnings == []
    write(tmp_path, 3)
    assert not list(tmp_path.glob(".*")), "what was left unfinished is gone"


def test_the_bytes_are_safe_before_the_name_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    synced: set[str] = set()
    real = module.sync_file
    monkeypatch.setattr(module, "sync_file", lambda path: (synced.add(path.name), real(path)))
    save_file({"w": torch.ones(2)}, tmp_path / "best")
    Checkpoints(tmp_path / "c", "f").write(1, some(1, tmp_path / "best"))
    assert synced == {"weights.safetensors", "optimizer.safetensors", "best.safetensors"}, "JSON is written synced"


class TestOptimizerState:
    """An optimizer's state as tensors and JSON values, and back."""

    def build(self, kind: str) -> tuple[list[torch.nn.Parameter], torch.optim.Optimizer]:
        torch.manual_seed(0)
        parameters = [torch.nn.Parameter(torch.rand(3, 2)) for _ in range(3)]
        groups = [{"params": parameters[:1], "lr": 0.1, "names": ["a"]}, {"params": parameters[1:], "lr": 0.2}]
        kinds: dict[str, Callable[[], torch.optim.Optimizer]] = {
            "adamw": lambda: torch.optim.AdamW(groups),
            "fused": lambda: torch.optim.AdamW(groups, fused=True),
            "amsgrad": lambda: torch.optim.AdamW(groups, amsgrad=True),
            "sgd": lambda: torch.optim.SGD(groups),
            "momentum": lambda: torch.optim.SGD(groups, momentum=0.9),
            "adafactor": lambda: torch.optim.Adafactor(groups),
        }
        return parameters, kinds[kind]()

    def step(self, parameters: list[torch.nn.Parameter], optimizer: torch.optim.Optimizer, used: int) -> None:
        optimizer.zero_grad()
        sum((p * p).sum() for p in parameters[:used]).backward()  # type: ignore[union-attr]
        optimizer.step()

    @pytest.mark.parametrize("used", [0, 1, 3])
    @pytest.mark.parametrize("kind", ["adamw", "fused", "amsgrad", "sgd", "momentum", "adafactor"])
    def test_goes_on_with_the_same_bits(self, kind: str, used: int) -> None:
        """`used`: how many parameters had a gradient yet; the others have no state."""
        parameters, optimizer = self.build(kind)
        if used:
            self.step(parameters, optimizer, used)
        for group in optimizer.param_groups:
            group["lr"] *= 0.5
        tensors, values = optimizer_to_parts(optimizer)
        values = json.loads(json.dumps(values))
        others, other = self.build(kind)
        with torch.no_grad():
            for mine, theirs in zip(others, parameters, strict=True):
                mine.copy_(theirs)
        optimizer_from_parts(other, {name: value.clone() for name, value in tensors.items()}, values)
        for _ in range(3):
            self.step(parameters, optimizer, 3)
            self.step(others, other, 3)
        assert all(torch.equal(mine, theirs) for mine, theirs in zip(others, parameters, strict=True))
        assert [group["lr"] for group in other.param_groups] == [0.05, 0.1]
        assert other.param_groups[0]["names"] == ["a"]


def test_a_file_that_takes_its_own_place_leaves_nothing_beside_it(tmp_path: Path) -> None:
    source, target = tmp_path / "best.safetensors", tmp_path / "other.safetensors"
    source.write_bytes(b"weights")
    for _ in range(2):  # the second time both are names of one file
        link_file(source, target)
        assert sorted(path.name for path in tmp_path.iterdir()) == [source.name, target.name]
    assert target.read_bytes() == b"weights"
