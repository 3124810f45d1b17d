"""Other models and data to score are looked for before anything is trained."""

from __future__ import annotations

import json
import shutil
import weakref
from pathlib import Path
from typing import Any

import pytest
from conftest import Cli, sentence, write_rows

from llmkit.errors import ArtifactError, DataError
from llmkit.recipe.load import validate
from llmkit.recipe.schema import Recipe
from llmkit.stages import scoring
from llmkit.stages.preflight import check_recipe


def recipe(**evaluate: object) -> Recipe:
    keys = {"name": "x", "task": "chat", "model": "m", "data": {"train": "rows.jsonl"}, "stages": ["evaluate"]}
    return validate(keys | {"evaluate": evaluate}, {})


def test_a_model_that_is_missing(tmp_path: Path) -> None:
    wrong = recipe(against=str(tmp_path / "nowhere"))
    with pytest.raises(ArtifactError):
        check_recipe(wrong, wrong.plan, tmp_path / "run")
    check_recipe(wrong, ("finetune",), tmp_path / "run")


def test_a_data_set_that_is_missing(tmp_path: Path) -> None:
    wrong = recipe(data_sets={"other": str(tmp_path / "nowhere.jsonl")})
    with pytest.raises(DataError, match="missing"):
        check_recipe(wrong, wrong.plan, tmp_path / "run")


def test_what_the_run_itself_will_make_may_be_missing(tmp_path: Path) -> None:
    own = tmp_path / "run" / "pretrain" / "model"
    made_later = recipe(against=["parent", str(own)], data_sets={"own": str(tmp_path / "run" / "rows.jsonl")})
    check_recipe(made_later, made_later.plan, tmp_path / "run")


def test_nothing_is_trained_for_a_comparison_that_cannot_be(
    cli: Cli, tiny_llama: Path, chat_rows: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    stages = "stages=[preprocess, finetune, evaluate]"
    against = f"evaluate.against={tmp_path / 'nowhere'}"
    done = cli("run", "-m", tiny_llama, "-d", chat_rows, "-o", run, "--set", stages, "--set", against, "--json")
    assert (done.code, done.json["kind"]) == (4, "artifact")
    assert not (run / "finetune").exists()


def test_a_classifier_is_not_scored_on_text(cli: Cli, tiny_bert: Path, tmp_path: Path) -> None:
    rows = write_rows(tmp_path / "rows.jsonl", ({"text": sentence(n)} for n in range(20)))
    classifier = shutil.copytree(tiny_bert, tmp_path / "classifier")
    config = json.loads((classifier / "config.json").read_text())
    (classifier / "config.json").write_text(json.dumps(config | {"architectures": ["BertForSequenceClassification"]}))
    done = cli("evaluate", classifier, "--task", "text", "--data", rows, "-o", tmp_path / "run", "--json")
    assert (done.code, done.json["what"]) == (2, "the model has another task")


def test_a_model_with_another_head_is_scored_as_a_new_one(cli: Cli, tiny_bert: Path, tmp_path: Path) -> None:
    numbers = write_rows(tmp_path / "rows.jsonl", ({"text": sentence(n), "score": n / 10} for n in range(20)))
    flags = ("--task", "regress", "--data", numbers, "--against", tiny_bert, "-o", tmp_path / "run", "--json")
    done = cli("evaluate", tiny_bert, *flags)
    assert done.code == 0, done.out
    assert done.json["metrics"]["model.loss"] == done.json["metrics"]["other.loss"]
    for _ in ("computed", "from the cache"):
        results = json.loads((tmp_path / "run" / "evaluate" / "results.json").read_text())
        assert {name: "classifier.weight" in new for name, new in results["untrained"].items()} == {
            "model": True,
            "other": True,
        }
        again = cli("evaluate", tiny_bert, *flags[:-1], "--no-resume")
        assert "the model has no trained" in again.err


def test_one_model_is_in_memory_at_a_time(
    cli: Cli, tiny_llama: Path, chat_rows: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    loaded: list[weakref.ref[Any]] = []
    alive: list[int] = []
    original = scoring.load_model

    def load(*given: Any, **more: Any) -> Any:
        alive.append(sum(model() is not None for model in loaded))
        found = original(*given, **more)
        loaded.append(weakref.ref(found.model))
        return found

    monkeypatch.setattr(scoring, "load_model", load)
    twin = shutil.copytree(tiny_llama, tmp_path / "twin")
    flags = ("--data", chat_rows, "--against", tiny_llama, "--against", twin, "-o", tmp_path / "run", "--json")
    done = cli("evaluate", tiny_llama, *flags, "--set", "evaluate.generate=0", "--set", "evaluate.cache=false")
    assert done.code == 0, done.out
    assert alive == [0, 0, 0]
