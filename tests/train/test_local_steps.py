"""Processes that train apart and meet: the outer step, the same state after a meeting, and exact resumption."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import sharded_processes
import torch
from fitting import random_corpus
from forked import ranks, start, wait_for_all
from outcomes import found
from pydantic import ValidationError
from safetensors.torch import load_file

from llmkit.recipe.training import LocalSteps, Training
from llmkit.train.local import Meetings

APART = {"batch_size": 6, "steps": 10, "eval_every": 3, "keep": "last", "lr": 1e-2}
CASES: dict[str, dict[str, Any]] = {
    "mean": APART | {"local": {"every": 3}},
    "outer": APART | {"local": {"every": 3, "outer_lr": 0.7, "outer_momentum": 0.5}, "precision": "bf16"},
    "together": APART,
}


class Others:
    """Masters of one weight, in a process whose neighbour has `other`."""

    def __init__(self, value: list[float]) -> None:
        self.weights = {"w": torch.nn.Parameter(torch.tensor(value))}
        self.published = 0

    def publish(self) -> None:
        self.published += 1


def test_the_outer_step_is_that_of_sgd_with_nesterovs_momentum(monkeypatch: pytest.MonkeyPatch) -> None:
    begin, moves = [1.0, -2.0], [([1.5, -2.0], [0.5, -3.0]), ([0.7, -1.5], [0.9, -1.1]), ([0.1, 0.2], [0.3, 0.0])]
    expected = torch.nn.Parameter(torch.tensor(begin))
    outer = torch.optim.SGD([expected], lr=0.7, momentum=0.9, nesterov=True)
    masters: Any = Others(begin)
    state: Any = SimpleNamespace(state={})
    meetings = Meetings(LocalSteps(every=2, outer_lr=0.7, outer_momentum=0.9), masters, state, 2)
    for mine, theirs in moves:
        expected.grad = expected.detach() - (torch.tensor(mine) + torch.tensor(theirs)) / 2
        outer.step()
        with torch.no_grad():
            masters.weights["w"].copy_(torch.tensor(mine))
        monkeypatch.setattr(torch.distributed, "all_reduce", lambda t, other=theirs: t.add_(torch.tensor(other)))
        meetings.meet()
        torch.testing.assert_close(masters.weights["w"].data, expected.data)
    assert masters.published == 3


def test_without_an_outer_optimizer_it_is_the_mean(monkeypatch: pytest.MonkeyPatch) -> None:
    masters: Any = Others([1.0, 2.0])
    moment = torch.tensor([4.0, 0.0])
    optimizer: Any = SimpleNamespace(state={0: {"exp_avg": moment, "step": torch.tensor(3.0)}})
    meetings = Meetings(LocalSteps(every=2), masters, optimizer, 2)
    monkeypatch.setattr(torch.distributed, "all_reduce", lambda t: t.add_(torch.tensor([3.0, 2.0])))
    meetings.meet()
    assert masters.weights["w"].tolist() == [2.0, 2.0]
    assert moment.tolist() == [3.5, 1.0], "moments meet as well"
    assert (meetings.saved(), meetings.outlines()) == ({}, {})


def test_when_they_meet() -> None:
    masters: Any = Others([1.0])
    meetings = Meetings(LocalSteps(every=4), masters, SimpleNamespace(state={}), 2)  # type: ignore[arg-type]
    assert [step for step in range(1, 11) if meetings.due(step, 10)] == [4, 8, 10]


@pytest.mark.parametrize(
    ("keys", "what"),
    [
        ({"ema": 0.9}, "`local` or `ema`"),
        ({"eval_every": 5}, "multiple of `local.every`"),
        ({"precision": "fp16"}, "bf16"),
        ({"local": {"every": 1}}, "greater than 1"),
    ],
)
def test_what_does_not_go_with_it(keys: dict[str, Any], what: str) -> None:
    with pytest.raises(ValidationError, match=what):
        Training(**({"local": {"every": 4}} | keys))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """All trainings, in two processes."""
    folder = tmp_path_factory.mktemp("local")
    random_corpus(folder / "train", 25)
    random_corpus(folder / "eval", 19, seed=9)
    jobs: list[tuple[str, str, dict[str, Any]]] = [
        (f"{name}, whole", f"{name}-w", case) for name, case in CASES.items()
    ]
    for name in ("mean", "outer"):
        jobs += [(f"{name}, stopped", f"{name}-r", CASES[name] | {"stop_after": 4})]
        jobs += [(f"{name}, resumed", f"{name}-r", CASES[name])]
    wait_for_all([start(sharded_processes.main, folder, json.dumps(jobs), env=rank) for rank in ranks(2)])
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("name", ["mean", "outer"])
def test_they_end_in_one_state_and_learn(name: str, folder: Path) -> None:
    one, other = found(folder, f"{name}, whole")
    assert (one["status"], other["status"]) == ("done", "done")
    assert one["sum"] == other["sum"]
    assert one["evaluations"] == other["evaluations"]
    assert [step for step, _ in one["evaluations"]] == [3, 6, 9, 10]
    assert [step["loss"] for step in one["steps"]] == [step["loss"] for step in other["steps"]], "that of all"
    assert one["steps"][1]["grad_norm"] != other["steps"][1]["grad_norm"], "each learns from its own share"
    together = found(folder, "together, whole")[0]
    assert one["steps"][0]["loss"] == pytest.approx(together["steps"][0]["loss"], abs=2e-2)
    assert one["evaluations"][-1][1] < one["evaluations"][0][1]
    assert one["evaluations"][-1][1] == pytest.approx(together["evaluations"][-1][1], rel=0.1)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["mean", "outer"])
def test_it_stops_at_a_meeting_and_ends_with_the_same_bits(name: str, folder: Path) -> None:
    stopped, resumed, whole = (found(folder, f"{name}, {what}") for what in ("stopped", "resumed", "whole"))
    assert [own["status"] for own in stopped] == ["StoppedError"] * 2
    assert [own["facts"]["step"] for own in stopped] == [6, 6]
    assert all(own["resumed"] and not own["said"] for own in resumed)
    assert [own["steps"] for own in resumed] == [own["steps"][6:] for own in whole]
    one, other = (load_file(folder / f"{name}, {what}.safetensors") for what in ("resumed", "whole"))
    assert all(torch.equal(value, other[key]) for key, value in one.items())
