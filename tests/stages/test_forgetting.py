"""Guards against forgetting: other rows are replayed, a general text is scored before and after."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from conftest import WORDS, Cli, sentence, write_rows

from llmkit.data.corpus import Corpus


@pytest.fixture
def other_rows(tmp_path: Path) -> Path:
    """15 conversations that the training data have not, and one that they have."""
    rows = [
        {"messages": [{"role": "user", "content": sentence(i)}, {"role": "assistant", "content": WORDS[(i + 5) % 12]}]}
        for i in (*range(500, 515), 0)
    ]
    return write_rows(tmp_path / "other.jsonl", rows)


@pytest.fixture
def run(cli: Cli, tiny_llama: Path, chat_rows: Path, tmp_path: Path) -> Any:
    """Runs a command on the tiny Llama and its conversations, with settings; gives how it ended, and the run."""

    def do(command: str, *settings: str) -> Any:
        options = [word for setting in ("data.eval=20%", *settings) for word in ("--set", setting)]
        return cli(command, "-m", tiny_llama, "-d", chat_rows, "-o", tmp_path / "run", *options), tmp_path / "run"

    return do


@pytest.mark.parametrize(("share", "least", "most"), [("20%", 0.15, 0.25), ("50%", 0.45, 0.55)])
def test_replayed_rows_have_their_share(share: str, least: float, most: float, run: Any, other_rows: Path) -> None:
    done, folder = run("preprocess", f"data.replay={other_rows}", f"data.replay_share={share}")
    assert done.code == 0, done.err
    plain, _ = run("preprocess")
    assert plain.code == 0
    count = Counter(map(_key, Corpus(folder / "preprocess" / "train")))
    with_replay = Counter(map(_key, _train_of_before(folder)))
    replayed = sum((with_replay - count).values())
    assert count <= with_replay
    assert least <= replayed / sum(with_replay.values()) <= most


def _key(example: dict[str, Any]) -> tuple[int, ...]:
    return tuple(example["input_ids"].tolist())


def _train_of_before(folder: Path) -> Corpus:
    (previous,) = (folder / "previous").iterdir()
    return Corpus(previous / "train")


def test_what_is_held_out_is_not_replayed(run: Any, chat_rows: Path) -> None:
    done, folder = run("preprocess", f"data.replay={chat_rows}", "data.replay_share=50%")
    assert done.code == 0, done.err
    train, held_out = (set(map(_key, Corpus(folder / "preprocess" / name))) for name in ("train", "eval"))
    assert held_out
    assert not train & held_out


def test_general_text_is_scored_before_and_after(run: Any, text_rows: Path) -> None:
    settings = ("finetune.steps=8", "finetune.lr=1e-2", "evaluate.generate=2", f"data.general={text_rows}")
    done, folder = run("run", *settings)
    assert done.code == 0, done.err
    results = json.loads((folder / "evaluate" / "results.json").read_text())
    for scores in (results["model"], results["parent"]):
        assert {"general_loss", "general_perplexity", "general_bits_per_byte"} <= scores.keys()
    assert results["model"]["general_loss"] != results["parent"]["general_loss"]
    assert "general_loss" in done.out
    again, _ = run("run", *settings)
    assert again.err.count("unchanged") >= 4


@pytest.mark.parametrize(
    ("settings", "needle"),
    [
        (("data.replay_share=100%", "data.replay=x.jsonl"), "replay_share"),
        (("data.replay_share=0%", "data.replay=x.jsonl"), "replay_share"),
        (("data.general=x.jsonl", "task=classify"), "data.general"),
        (("finetune.l2_sp=-1",), "l2_sp"),
    ],
)
def test_wrong_keys_are_named(settings: tuple[str, ...], needle: str, run: Any) -> None:
    done, _ = run("run", *settings)
    assert done.code == 2, done.err
    assert needle in done.err


def test_the_pull_towards_the_parent_keeps_a_model_near_it(run: Any, tiny_llama: Path) -> None:
    from safetensors.torch import load_file

    found = []
    for strength in (0, 20):
        done, folder = run("finetune", "finetune.steps=8", "finetune.lr=1e-2", f"finetune.l2_sp={strength}")
        assert done.code == 0, done.err
        before, after = (load_file(path / "model.safetensors") for path in (tiny_llama, folder / "finetune" / "model"))
        found.append(sum(float((after[name] - before[name]).square().sum()) for name in before))
    assert 0 < found[1] < found[0]
