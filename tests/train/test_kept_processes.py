"""Stopped and resumed on two processes, or on another number of them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from test_processes import corpora, launch, weights  # noqa: F401  (a fixture is among them)

pytestmark = pytest.mark.slow
# 25 examples in batches of 4: the seventh batch of an epoch has one example, fewer than there are processes
CASE: dict[str, Any] = {"batch_size": 4, "steps": 9, "eval_every": 2, "keep": "last"}


def parts(folder: Path, processes: tuple[int, int], case: dict[str, Any]) -> list[list[dict[str, Any]]]:
    """A training that is stopped after its sixth step, and gone on with by so many processes."""
    stopped = launch(folder, processes[0], case | {"stop_after": 5})
    assert {own["status"] for own in stopped} == {"StoppedError"}
    assert {own["facts"]["step"] for own in stopped} == {6}, "all agree on the step"
    resumed = launch(folder, processes[1], case)
    assert {own["status"] for own in resumed} == {"done"}
    return [stopped, resumed]


@pytest.mark.parametrize("more", [{"precision": "bf16"}, {"ema": 0.7}, {"batch_size": None, "batch_tokens": 50}])
def test_two_processes_resume_to_the_same_bits(corpora: Path, more: dict[str, Any]) -> None:
    case = CASE | {"family": "gpt2", "dropout": 0.2} | more
    name = "-".join(more)
    launch(corpora / f"whole-{name}", 2, case)
    parts(corpora / f"parts-{name}", (2, 2), case)
    for rank in range(2):
        whole, resumed = (weights(corpora / f"{kind}-{name}", rank) for kind in ("whole", "parts"))
        assert all(torch.equal(value, resumed[key]) for key, value in whole.items())


def test_a_last_save_that_fails_in_one_process_is_no_stop_that_saved_in_another(corpora: Path) -> None:
    found = launch(corpora / "full-disk", 2, CASE | {"stop_after": 5, "full_disk": True})
    assert [own["status"] for own in found] == ["ResourceError"] * 2
    assert all("a checkpoint could not be written; there is none" in own["said"] for own in found)


@pytest.mark.parametrize("processes", [(1, 2), (2, 1)])
def test_local_steps_with_an_outer_optimizer_go_on_in_another_number(corpora: Path, processes: tuple[int, int]) -> None:
    outer = {"every": 3, "outer_lr": 0.7, "outer_momentum": 0.5}
    name = "outer-" + "-".join(map(str, processes))
    case = CASE | {"eval_every": 3, "lr": 1e-2}
    [alone] = launch(corpora / f"{name}-alone", 1, case)
    _, resumed = parts(corpora / name, processes, case | {"local": outer})
    assert all(own["resumed"] for own in resumed)
    assert [step["step"] for step in resumed[0]["steps"]] == [7, 8, 9]
    assert resumed[0]["evaluations"][-1][1] == pytest.approx(alone["evaluations"][-1][1], rel=0.05)


@pytest.mark.parametrize("processes", [(1, 2), (2, 1)])
def test_another_number_of_processes_goes_on_with_the_same_batches(corpora: Path, processes: tuple[int, int]) -> None:
    name = "-".join(map(str, processes))
    [alone] = launch(corpora / f"alone-{name}", 1, CASE)
    stopped, resumed = parts(corpora / f"changed-{name}", processes, CASE)
    steps = stopped[0]["steps"] + resumed[0]["steps"]
    assert [step["step"] for step in steps] == list(range(1, 10))
    for step, expected in zip(steps, alone["steps"], strict=True):
        assert step["tokens"] == expected["tokens"], "the same examples"
        assert step["loss"] == pytest.approx(expected["loss"], abs=1e-5)
        assert step["lr"] == expected["lr"]
    evaluations = stopped[0]["evaluations"] + resumed[0]["evaluations"]
    assert [step for step, _ in evaluations] == [step for step, _ in alone["evaluations"]]
    for (_, loss), (_, expected_loss) in zip(evaluations, alone["evaluations"], strict=True):
        assert loss == pytest.approx(expected_loss, abs=1e-5)
    for key, value in weights(corpora / f"changed-{name}", 0).items():
        torch.testing.assert_close(value, weights(corpora / f"alone-{name}", 0)[key], atol=1e-4, rtol=1e-3, msg=key)
