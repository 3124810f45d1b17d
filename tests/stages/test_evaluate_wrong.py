"""evaluate: what does not fit is refused before anything is scored, and it is said why."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from conftest import Cli
from evaluating import Bench, bench, chats, classifier, labelled, own_cache  # noqa: F401


def no_tokens(folder: Path, tiny_llama: Path) -> Path:
    """A model with another vocabulary."""
    from transformers import AutoTokenizer

    shutil.copytree(tiny_llama, folder)
    tokenizer = AutoTokenizer.from_pretrained(tiny_llama)
    tokenizer.add_tokens(["unheard-of"])
    tokenizer.save_pretrained(folder)
    return folder


def three_inputs(file: Path) -> str:
    file.write_text("def three(references, predictions, more):\n    return 1.0\n")
    return f"{file}:three"


WRONG: dict[str, tuple[str, Callable[[Any], tuple[object, ...]], int, tuple[str, ...]]] = {
    "a metric of another task": (
        "chat",
        lambda f: ("--set", "evaluate.metrics=[accuracy]"),
        2,
        ("the task chat has no metric `accuracy`", "token_accuracy"),
    ),
    "a metric twice": ("chat", lambda f: ("--set", "evaluate.metrics=[loss, loss]"), 2, ("named twice",)),
    "an own metric that is not there": (
        "chat",
        lambda f: ("--set", "evaluate.metrics=[mine.py:f]"),
        2,
        ("the metric `mine.py:f` is not there",),
    ),
    "an own metric of three inputs": (
        "chat",
        lambda f: ("--set", f"evaluate.metrics=['{three_inputs(f('tmp_path') / 'own.py')}']"),
        2,
        ("own.py:three` cannot take 2 inputs", "missing a required argument"),
    ),
    "another vocabulary": (
        "chat",
        lambda f: ("--against", no_tokens(f("tmp_path") / "v", f("tiny_llama"))),
        2,
        ("another vocabulary", "1 entries differ"),
    ),
    "another task": ("chat", lambda f: ("--against", f("classifier")), 2, ("has another task", "BertForSequence")),
    "a model that is not there": ("chat", lambda f: ("--against", "no-such-model"), 4, ("no-such-model",)),
    "an unknown column": (
        "chat",
        lambda f: ("--set", "evaluate.slices=[topics]"),
        2,
        ("no held-out row has the column `topics`", "did you mean `topic`?"),
    ),
    "a data set that is not there": (
        "chat",
        lambda f: ("--set", "evaluate.data_sets.far=nowhere.jsonl"),
        3,
        ("nowhere.jsonl",),
    ),
    "a reserved name": (
        "chat",
        lambda f: ("--set", "evaluate.data_sets.train=x.jsonl"),
        2,
        ("should not use the names",),
    ),
    "nothing was learnt": ("chat", lambda f: ("--set", "evaluate.train_sample=5"), 2, ("no training examples",)),
    "too few resamples": ("chat", lambda f: ("--set", "evaluate.resamples=7"), 2, ("100 or more",)),
    "labels that the model has not": (
        "classify",
        lambda f: ("--eval-data", labelled(f("tmp_path") / "d.jsonl", "abd")),
        3,
        ("a held-out row has a label that the model has not", "d", "one of a, b, c"),
    ),
    "a metric twice given": (
        "chat",
        lambda f: ("--against", "x", "--set", "evaluate.against=y"),
        2,
        ("given twice",),
    ),
}


@pytest.mark.parametrize(("task", "given", "code", "needles"), WRONG.values(), ids=WRONG)
def test_wrong_input(
    task: str,
    given: Callable[[Any], tuple[object, ...]],
    code: int,
    needles: tuple[str, ...],
    bench: Bench,
    request: pytest.FixtureRequest,
    tmp_path: Path,
) -> None:
    extra = given(request.getfixturevalue)
    model = request.getfixturevalue("tiny_llama" if task == "chat" else "classifier")
    data = () if "--eval-data" in extra else ("--data", request.getfixturevalue("chats"))
    done = bench(model, *data, *extra, code=code)
    shown = " ".join(done.err.split())
    assert all(needle in shown for needle in needles), shown
    assert not (bench.run / "evaluate" / "results.json").exists()


def test_labels_in_another_order_are_refused(bench: Bench, classifier: Path, tmp_path: Path) -> None:
    other = tmp_path / "turned"
    shutil.copytree(classifier, other)
    config = json.loads((other / "config.json").read_text())
    config["id2label"] = {"0": "c", "1": "b", "2": "a"}
    config["label2id"] = {"c": 0, "b": 1, "a": 2}
    (other / "config.json").write_text(json.dumps(config))
    done = bench(classifier, "--data", labelled(tmp_path / "rows.jsonl", "abc"), "--against", other, code=2)
    assert "has other labels" in done.err


def test_what_was_made_before_a_mistake_stays(bench: Bench, tiny_llama: Path, chats: Path, tmp_path: Path) -> None:
    bench(tiny_llama, "--data", chats, "--set", "evaluate.generate=0")
    results, recipe = bench.results, (bench.run / "recipe.yaml").read_text()
    own = tmp_path / "own.py"
    own.write_text("def fails(references, predictions):\n    raise ValueError('no')\n")
    for setting, code in (("slices=[topics]", 2), (f"metrics=['{own}:fails']", 3), ("data_sets.far=nowhere.jsonl", 3)):
        bench.again("--set", "evaluate.generate=2", "--set", f"evaluate.{setting}", code=code)
        assert bench.results == results
        assert (bench.run / "recipe.yaml").read_text() == recipe
    assert "unchanged" in bench.again().err


def test_slices_are_looked_for_before_a_training(cli: Cli, tiny_llama: Path, chats: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    settings = ("stages=[preprocess, finetune, evaluate]", "evaluate.slices=[topics]", "finetune.steps=1")
    words = [word for setting in settings for word in ("--set", setting)]
    done = cli("run", "-m", tiny_llama, "-d", chats, "--set", "data.eval=20%", "-o", run, *words, "--json")
    assert (done.code, done.json["what"]) == (2, "no held-out row has the column `topics`")
    assert not (run / "finetune").exists()


def test_a_run_is_scored_where_it_is(bench: Bench, tiny_llama: Path, chats: Path, tmp_path: Path) -> None:
    bench(tiny_llama, "--data", chats, "--set", "evaluate.generate=0")
    done = bench.again("-o", tmp_path / "elsewhere", code=2)
    assert "leave out -o, or give --data" in done.err


def test_an_empty_held_out_set(bench: Bench, tiny_llama: Path, tmp_path: Path) -> None:
    empty = tmp_path / "empty.jsonl"
    empty.write_text("")
    assert bench(tiny_llama, "--data", empty, "--task", "chat", code=3).code == 3
