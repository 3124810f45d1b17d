"""What processes tell each other before a model is loaded, and what they learn of one that is gone."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import meeting
import pytest
from forked import ranks, start

from llmkit.errors import ResourceError, UsageError
from llmkit.launch.surroundings import check_place
from llmkit.stages.probe import (
    Facts,
    Speed,
    differences,
    flattened,
    in_words,
    problems_of,
    raise_all,
    who,
    wrong_clocks,
)
from llmkit.stages.processes import lost_process

RECIPE = """
name: met
task: text
model: some-model
data: {train: rows.jsonl}
finetune: {steps: 3, lr: 1.0e-3}
launch: {hang_after: 2s, connect_within: 20s}
"""
PLACE = {"RANK": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "a", "MASTER_PORT": "29500"}


def meet(folder: Path, **cases: dict[str, Any]) -> list[dict[str, Any]]:
    """The outcome of each of two processes; `first` and `second` say what is special about them."""
    recipe = folder / "recipe.yaml"
    recipe.write_text(RECIPE)
    case = json.dumps({"0": cases.get("first", {}), "1": cases.get("second", {})})
    hosts = {"LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1"}  # one process each, as it were
    started = [start(meeting.main, str(folder), str(recipe), case, env=place | hosts) for place in ranks(2)]
    for process in started:
        process.wait()
    assert all(process.returncode in (0, 3) for process in started), [process.err[-2000:] for process in started]
    return [meeting.place_of(folder, rank) for rank, process in enumerate(started) if process.returncode == 0]


def facts(rank: int, **changes: Any) -> Facts:
    about = Facts(rank, f"host-{rank // 2}", 100 + rank, {"torch": "2.13.0"}, "cpu", "", 2**30, {"seed": 17}, True)
    return replace(about, **changes)


def test_processes_that_fit_together_agree_and_see_what_the_first_wrote(tmp_path: Path) -> None:
    outcomes = meet(tmp_path, first={"alone": 3.0})  # longer than hang_after: whoever waits hears from it
    assert [found["decided"] for found in outcomes] == [{"rank": 0}] * 2
    assert [found["state"] for found in outcomes] == ["met"] * 2
    assert outcomes[0]["said"][0].startswith("2 processes on 1 host, all-reduce ")
    assert not list((tmp_path / "run").glob(".probe*"))


@pytest.mark.parametrize(
    ("second", "what", "got"),
    [
        ({"version": "0.0.9"}, "the processes do not run the same software", ("llmkit", "0.0.9 (rank 1 on ")),
        (
            {"seed": 18},
            "the processes do not have the same recipe",
            ("seed 17 (rank 0 on ", "18 (rank 1 on "),
        ),
        ({"folder": "elsewhere"}, "the run directory is not shared", ("not seen by rank 1 on ",)),
        (
            {"parent": "b"},
            "the inputs of finetune are not the same for all processes",
            ("parent a (rank 0", "b (rank 1"),
        ),
    ],
)
def test_processes_that_do_not_fit_together_say_why(
    tmp_path: Path, second: dict[str, Any], what: str, got: tuple[str, ...]
) -> None:
    outcomes = meet(tmp_path, second=second)
    assert [found["what"] for found in outcomes] == [what] * 2
    assert [found["kind"] for found in outcomes] == ["resource"] * 2
    for found in outcomes:
        assert all(words in found["got"] for words in got), found["got"]


def test_a_clock_that_is_wrong_is_warned_of(tmp_path: Path) -> None:
    first, second = meet(tmp_path, second={"ahead": 90.0})
    assert first["state"] == second["state"] == "met"
    assert any("the clock is off by up to +90 s on rank 1 on " in said for said in first["said"])


def test_whoever_waits_learns_that_the_one_that_works_alone_is_gone(tmp_path: Path) -> None:
    [left] = meet(tmp_path, first={"alone": 1.0, "leaves": True})
    assert left["what"] == "another process of this training is gone, or does not answer"
    assert "last checkpoint" in left["hint"]
    assert "by peer" in left["got"], "closed or reset"
    assert "typically" not in left["got"]


def test_whoever_works_alone_learns_it_at_the_next_meeting(tmp_path: Path) -> None:
    [lead] = meet(tmp_path, first={"alone": 2.0}, second={"leaves": True})
    assert lead["what"] == "another process of this training is gone, or does not answer"


def test_what_keeps_processes_apart() -> None:
    assert problems_of([facts(0), facts(1)]) == []
    gpu = {"device": "H100", "device_id": "GPU-1"}
    [shared] = problems_of([facts(0, **gpu), facts(1, **gpu), facts(2, **gpu | {"device_id": "GPU-2"})])
    assert shared.what == "there are more processes than GPUs"
    assert shared.got == "ranks 0, 1 on host-0 share one H100"
    [mixed] = problems_of([facts(0, **gpu), facts(2)])
    assert mixed.got == "device H100 (rank 0 on host-0), cpu (rank 2 on host-1)"
    several = problems_of([facts(0), facts(1, versions={"torch": "2.12.0"}, sees_folder=False)], Path("/run"))
    with pytest.raises(ResourceError) as raised:
        raise_all(several)
    assert raised.value.what == "these processes cannot train together"
    assert len(raised.value.problems) == 2
    assert "torch 2.13.0 (rank 0 on host-0), 2.12.0 (rank 1 on host-0)" in str(raised.value.got)


def test_words() -> None:
    four = [facts(rank) for rank in range(4)]
    speed = Speed(1.23e9, 3e-4, (0.0, 0.1, -7.0, 6.0))
    assert in_words(four, speed) == "4 processes on 2 hosts, all-reduce 1.2 GB/s, 0.3 ms"
    assert "-7 s on ranks 2, 3 on host-1" in str(wrong_clocks(four, speed))
    assert wrong_clocks(four[:2], speed) is None
    assert who([facts(rank, host="a") for rank in range(9)]) == "ranks 0, 1, ..., 8 on a"
    assert flattened({"a": {"b": 1, "c": {}}, "d": None}) == {"a.b": 1, "d": None}
    many = [facts(0), facts(1, recipe={f"key{n}": n for n in range(9)})]
    assert str(differences(many, lambda each: each.recipe)).endswith("; and 6 more")


def test_only_words_about_others_are_taken_for_theirs(monkeypatch: pytest.MonkeyPatch) -> None:
    closed = RuntimeError(
        "[/a/gloo/gloo/transport/tcp/pair.cc:553] Connection closed by peer [10.0.0.1]:68. This is typically"
    )
    assert lost_process(closed) is None, "there are no others"
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert str(getattr(lost_process(closed), "got", None)) == "Connection closed by peer [10.0.0.1]:68"
    assert lost_process(RuntimeError("mat1 and mat2 shapes cannot be multiplied")) is None
    assert lost_process(KeyError("Timed out waiting")) is None
    assert lost_process(ConnectionResetError(104, "Connection reset by peer")) is None, "of a download, say"


@pytest.mark.parametrize(
    ("changes", "got"),
    [
        ({"RANK": "2"}, "RANK is 2, and WORLD_SIZE 2"),
        ({"RANK": "-1"}, "RANK is `-1`"),
        ({"WORLD_SIZE": "two"}, "WORLD_SIZE is `two`"),
        ({"WORLD_SIZE": "0"}, "WORLD_SIZE 0"),
        ({"WORLD_SIZE": None}, "WORLD_SIZE is not set"),
        ({"RANK": None}, "RANK is not set"),
        ({"MASTER_ADDR": None}, "MASTER_ADDR is not set"),
        ({"MASTER_PORT": ""}, "MASTER_PORT is ``"),
        ({"MASTER_PORT": "70000"}, "MASTER_PORT is 70000"),
        ({"LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "1"}, "LOCAL_RANK is 1"),
        ({"LOCAL_WORLD_SIZE": "8"}, "LOCAL_WORLD_SIZE is 8"),
    ],
)
def test_a_place_that_makes_no_sense(changes: dict[str, str | None], got: str) -> None:
    env = {name: value for name, value in (PLACE | changes).items() if value is not None}
    with pytest.raises(UsageError) as raised:
        check_place(env)
    assert got in str(raised.value.got)


@pytest.mark.parametrize("env", [{}, PLACE, PLACE | {"LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1"}, {"WORLD_SIZE": "1"}])
def test_a_place_that_makes_sense(env: dict[str, str]) -> None:
    check_place(env)
