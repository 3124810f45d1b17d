"""evaluate: any model on any data, with intervals, slices and gaps; nothing is scored twice, and a kill loses a batch."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
from evaluating import Bench, batches, bench, chats, other_llama, own_cache  # noqa: F401

from llmkit.files import cache_folder
from llmkit.recipe.load import Override, load_recipe
from llmkit.stages import against, scoring
from llmkit.tasks.causal_objective import CausalObjective


def test_the_scores_are_sums_of_the_predictions(bench: Bench, tiny_llama: Path, chats: Path) -> None:
    done = bench(tiny_llama, "--data", chats, "--set", "evaluate.generate=6")
    assert "held-out scores over 40 examples" in done.out
    lines, model = bench.predictions(), bench.results["model"]
    assert [line["example"] for line in lines] == list(range(40))
    loss, tokens, correct = (sum(line["model"][name] for line in lines) for name in ("loss", "tokens", "correct"))
    assert model["loss"] == pytest.approx(loss / tokens, rel=1e-12)
    assert model["perplexity"] == pytest.approx(math.exp(loss / tokens), rel=1e-12)
    assert model["token_accuracy"] == correct / tokens
    assert sum("answer" in line["model"] for line in lines) == 6
    rows = [json.loads(line) for line in chats.read_text().splitlines()]
    for line in lines:
        row = rows[line["source"]["line"] - 1]
        assert line["source"]["file"] == line["source"]["uri"] == str(chats)
        assert line["reference"] == row["messages"][1]["content"]
        assert row["messages"][0]["content"] in line["prompt"]
    low, high = bench.results["intervals"]["model"]["loss"]
    assert low < model["loss"] < high
    assert bench.results["models"] == ["model"]


def test_nothing_is_computed_twice(
    bench: Bench, tiny_llama: Path, chats: Path, batches: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    given = (tiny_llama, "--data", chats, "--set", "evaluate.generate=6")
    bench(*given)
    before, count = bench.results, len(batches)
    assert count == 5
    assert "unchanged" in bench(*given).err

    def refused(*given: Any, **named: Any) -> None:
        raise AssertionError("the model is loaded")

    monkeypatch.setattr(scoring, "load_model", refused)
    done = bench(*given, "--no-resume")
    assert "are there from before" in done.err
    assert bench.results == before
    for setting in ("evaluate.metrics=[loss, chrf]", "evaluate.slices=[length]", "evaluate.samples=2", "seed=3"):
        bench(*given, "--set", setting)
    bench.run = bench.run.with_name("elsewhere")
    bench(*given)
    assert bench.results == before
    assert len(batches) == count


def test_answers_that_are_known_count_only_where_they_are_asked_for(
    bench: Bench, tiny_llama: Path, other_llama: Path, chats: Path
) -> None:
    def answered(count: int, *more: object) -> list[int]:
        bench(tiny_llama, "--data", chats, "--set", f"evaluate.generate={count}", *more)
        return [line["example"] for line in bench.predictions() if "answer" in line["model"]]

    alone = answered(3, "--set", "evaluate.cache=false")
    assert len(alone) == 3
    assert len(answered(7)) == 7
    assert answered(3) == alone, "whatever is kept"
    assert answered(0) == []
    assert "no answer" in bench.results["reasons"]["model"]["rouge1"]
    assert answered(3, "--against", other_llama) == alone
    assert bench.results["differences"]["other"]["rouge1"], "of the same examples"


def test_other_weights_other_precision_and_other_data_are_computed(
    bench: Bench, tiny_llama: Path, other_llama: Path, chats: Path, batches: list[int]
) -> None:
    given = ("--data", chats, "--set", "evaluate.generate=0", "--set", "evaluate.samples=0")
    bench(tiny_llama, *given)
    assert len(batches) == 5
    bench(other_llama, *given)
    assert len(batches) == 10
    bench(tiny_llama, *given, "--set", "evaluate.precision=bf16")
    assert len(batches) == 15
    bench(tiny_llama, *given, "--set", "data.max_length=60")
    assert len(batches) == 20
    bench(tiny_llama, *given, "--set", "evaluate.cache=false", "--no-resume")
    assert len(batches) == 25


@pytest.mark.parametrize("damage", ["killed", "cut", "flipped"])
def test_what_was_scored_before_a_kill_is_not_scored_again(
    damage: str, bench: Bench, tiny_llama: Path, chats: Path, batches: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    given = (tiny_llama, "--data", chats, "--set", "evaluate.generate=0", "--set", "evaluate.samples=0")
    bench(*given, "--set", "evaluate.cache=false")
    expected = bench.results
    batches.clear()
    if damage == "killed":
        with monkeypatch.context() as patch:
            compute = CausalObjective.losses_and_hits

            def killed(objective: Any, batch: Any) -> Any:
                if len(batches) == 3:
                    raise KeyboardInterrupt
                return compute(objective, batch)

            patch.setattr(CausalObjective, "losses_and_hits", killed)
            assert bench(*given, "--no-resume", code=130).code == 130
        again = bench(*given)
        assert "on 24 examples of the held-out data are there already" in again.err
        assert len(batches) == 5
    else:
        bench(*given, "--no-resume")
        (kept,) = cache_folder("predictions").glob("*/*.jsonl")
        data = kept.read_bytes()
        flipped = data.replace(b'"loss"', b'"lass"', 1)
        kept.write_bytes(data[:-9] if damage == "cut" else flipped)
        bench(*given, "--no-resume")
        assert len(batches) == 6
    assert bench.results == expected


def test_a_cache_that_cannot_be_written_is_done_without(
    bench: Bench, tiny_llama: Path, chats: Path, tmp_path: Path
) -> None:
    cache_folder("predictions").parent.mkdir(parents=True)
    cache_folder("predictions").write_text("in the way")
    done = bench(tiny_llama, "--data", chats, "--set", "evaluate.generate=0")
    assert "scores cannot be kept" in done.err
    assert bench.results["model"]["loss"] > 0


def test_models_are_held_against_each_other(bench: Bench, tiny_llama: Path, other_llama: Path, chats: Path) -> None:
    against = ("--against", tiny_llama, "--against", other_llama)
    done = bench(other_llama, "--data", chats, "--set", "evaluate.generate=4", *against)
    results = bench.results
    assert results["models"] == ["model", tiny_llama.parent.name, "other-llama"]
    same, apart = results["differences"]["other-llama"], results["differences"][tiny_llama.parent.name]
    assert same["loss"] == {"difference": 0.0, "low": 0.0, "high": 0.0, "p": 1.0}
    found = results["model"]["loss"] - results[tiny_llama.parent.name]["loss"]
    assert apart["loss"]["difference"] == pytest.approx(found, abs=1e-12)
    assert apart["loss"]["low"] < found < apart["loss"]["high"]
    assert 0 < apart["loss"]["p"] <= 1
    assert apart.keys() >= {"loss", "rougeL", "chrf"}
    assert "difference" in done.out
    line = bench.predictions()[0]
    assert line["other-llama"] == line["model"] != line[tiny_llama.parent.name]


def test_no_model_is_called_as_what_stands_beside_it(bench: Bench, tiny_llama: Path, chats: Path) -> None:
    slices = ("--set", "evaluate.slices=[length]", "--set", "evaluate.generate=4")
    bench(tiny_llama, "--data", chats, *slices)
    results, line = bench.results, bench.predictions()[0]
    taken = {*results, *line, *results["slices"][0], *results["samples"][0], "text"}
    assert taken <= set(against._TAKEN)
    uris = ["elsewhere/model", *sorted(taken)]
    settings = {"name": "r", "task": "chat", "model": "m", "data.train": "rows.jsonl", "evaluate.against": uris}
    recipe = load_recipe(None, [Override(key, value, key) for key, value in settings.items()])
    names = against.others(recipe)
    assert len(names) == len(uris)
    assert not taken & set(names)


def test_one_other_model_is_called_other(bench: Bench, tiny_llama: Path, other_llama: Path, chats: Path) -> None:
    bench(other_llama, "--data", chats, "--against", tiny_llama, "--set", "evaluate.generate=0", "--json")
    assert bench.results["models"] == ["model", "other"]
