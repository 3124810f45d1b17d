"""evaluate: what does not fit is refused before anything is scored, and it is said why."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from evaluating import Bench, bench, chats, classifier, labelled, own_cache  # noqa: F401


def no_tokens(folder: Path, tiny_llama: Path) -> Path:
    """A model with another vocabulary."""
    from transformers import AutoTokenizer

    shutil.copytree(tiny_llama, folder)
    tokenizer = AutoTokenizer.from_pretrained(tiny_llama)
    tokenizer.add_tokens(["unheard-of"])
    tokenizer.save_pretrained(folder)
    return folder


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


def test_an_empty_held_out_set(bench: Bench, tiny_llama: Path, tmp_path: Path) -> None:
    empty = tmp_path / "empty.jsonl"
    empty.write_text("")
    assert bench(tiny_llama, "--data", empty, "--task", "chat", code=3).code == 3
