"""What the tests of evaluate share: tiny models, rows, and the command with its results."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from conftest import WORDS, Cli, Outcome, sentence, write_rows

from llmkit.tasks.causal_objective import CausalObjective

QUICK = ("--set", "evaluate.precision=fp32", "--set", "evaluate.batch_size=8", "--set", "evaluate.max_new_tokens=4")


@pytest.fixture
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


@pytest.fixture
def chats(tmp_path: Path) -> Path:
    """40 conversations with columns beside the messages."""
    rows = []
    for i in range(40):
        text = " ".join(sentence(i + 7 * n) for n in range(1 + i % 3))
        messages = [
            {"role": "user", "content": text},
            {"role": "assistant", "content": f"{WORDS[i % 12]} {WORDS[i % 7]}"},
        ]
        rows.append({"messages": messages, "topic": "xyz"[i % 3], "size": i / 2})
    return write_rows(tmp_path / "chats.jsonl", rows)


@pytest.fixture
def other_llama(tiny_llama: Path, tmp_path: Path) -> Path:
    """The tiny Llama with other weights."""
    import torch
    from transformers import AutoModelForCausalLM

    folder = tmp_path / "other-llama"
    shutil.copytree(tiny_llama, folder)
    model = AutoModelForCausalLM.from_pretrained(tiny_llama)
    torch.manual_seed(3)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    model.save_pretrained(folder)
    return folder


@pytest.fixture
def classifier(tiny_bert: Path, tmp_path: Path) -> Path:
    """A tiny BERT that tells a from b and c."""
    from transformers import AutoModelForSequenceClassification, AutoTokenizer, set_seed

    set_seed(4)
    labels = dict(enumerate("abc"))
    model = AutoModelForSequenceClassification.from_pretrained(tiny_bert, num_labels=3, id2label=labels)
    model.save_pretrained(tmp_path / "classifier")
    AutoTokenizer.from_pretrained(tiny_bert).save_pretrained(tmp_path / "classifier")
    return tmp_path / "classifier"


class Bench:
    """`llmkit evaluate`, its results and its predictions."""

    def __init__(self, cli: Cli, folder: Path) -> None:
        self._cli, self.run = cli, folder / "scored"

    def __call__(self, *given: object, code: int = 0) -> Outcome:
        done = self._cli("evaluate", *QUICK, *given, "-o", self.run)
        assert done.code == code, done.err
        return done

    def again(self, *given: object, code: int = 0) -> Outcome:
        """The command on the run that is there."""
        done = self._cli("evaluate", self.run, *given)
        assert done.code == code, done.err
        return done

    @property
    def results(self) -> Any:
        return json.loads((self.run / "evaluate" / "results.json").read_text())

    def predictions(self, name: str = "predictions") -> list[dict[str, Any]]:
        return [json.loads(line) for line in (self.run / "evaluate" / f"{name}.jsonl").read_text().splitlines()]


@pytest.fixture
def bench(cli: Cli, tmp_path: Path, own_cache: None) -> Bench:
    return Bench(cli, tmp_path)


@pytest.fixture
def batches(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The supervised tokens of each batch that is scored from now on."""
    found: list[int] = []
    compute = CausalObjective.losses_and_hits

    def counted(objective: Any, batch: Any) -> Any:
        found.append(len(batch["targets"]))
        return compute(objective, batch)

    monkeypatch.setattr(CausalObjective, "losses_and_hits", counted)
    return found


def labelled(path: Path, labels: str, count: int = 40) -> Path:
    return write_rows(
        path, ({"text": sentence(i) * (1 + i % 2), "label": labels[i % len(labels)]} for i in range(count))
    )
