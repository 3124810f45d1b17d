"""`llmkit crossval` and `--learning-curve`: folds that are runs, done once, and what they say together."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import WORDS, Cli, Outcome, sentence, write_rows

from llmkit.errors import StoppedError
from llmkit.stages import prefix_cache
from llmkit.stages.finetune import Finetune

RECIPE = """\
name: folds
task: chat
model: MODEL
stages: [preprocess, freeze, finetune, evaluate, export]
data: {train: DATA, eval: 20%, max_length: 64, leaks: "off"}
freeze: {blocks: 0, embeddings: true}
finetune: {epochs: 2, batch_size: 8, lr: 1.0e-3, precision: fp32}
evaluate: {metrics: [loss, token_accuracy], generate: 0, samples: 0, train_sample: 0, precision: fp32, resamples: 100}
"""


@pytest.fixture
def recipe(tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A recipe of 48 conversations by six authors, and an empty cache."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    rows = (
        {"prompt": sentence(i), "completion": f"It is {WORDS[i % 12]} {i}.", "author": f"a{i % 6}"} for i in range(48)
    )
    data = write_rows(tmp_path / "rows.jsonl", rows)
    path = tmp_path / "recipe.yaml"
    path.write_text(RECIPE.replace("MODEL", str(tiny_llama)).replace("DATA", str(data)))
    return path


def done(outcome: Outcome) -> Outcome:
    assert outcome.code == 0, outcome.err
    return outcome


def held_out(run: Path) -> set[str]:
    lines = (run / "evaluate" / "predictions.jsonl").read_text(encoding="utf-8").splitlines()
    return {json.loads(line)["prompt"] for line in lines}


@contextmanager
def counting_tokens() -> Iterator[list[int]]:
    """The tokens that the first, frozen block computes, for each forward of it."""
    counted: list[int] = []

    def count(module: Any, inputs: Any, output: Any) -> None:
        if type(module).__name__ == "LlamaDecoderLayer" and module.self_attn.layer_idx == 0:
            counted.append(int(np.prod(inputs[0].shape[:2])))

    handle = torch.nn.modules.module.register_module_forward_hook(count)
    try:
        yield counted
    finally:
        handle.remove()


def test_every_row_is_held_out_once_and_folds_are_runs(cli: Cli, recipe: Path) -> None:
    found = done(cli("crossval", recipe, "--folds", 3, "-o", "out", "--json")).json
    assert found["artifacts"] == {"crossval": "out/crossval.json"}
    written = json.loads(Path("out/crossval.json").read_text())
    assert found["metrics"] == written
    parts = [held_out(Path("out") / run["run"]) for run in written["runs"]]
    assert [len(part) for part in parts] == [16, 16, 16]
    assert len(set.union(*parts)) == 48
    assert [run["train_examples"] for run in written["runs"]] == [32] * 3
    for number, run in enumerate(written["runs"], 1):
        results = json.loads(Path(f"out/fold-{number}/evaluate/results.json").read_text())
        assert run["scores"]["model"] == results["model"]
        assert not Path(f"out/fold-{number}/export").exists()
    losses = [run["scores"]["model"]["loss"] for run in written["runs"]]
    assert written["scores"]["model"]["loss"]["values"] == losses
    assert written["scores"]["model"]["loss"]["mean"] == pytest.approx(np.mean(losses))
    assert written["differences"]["parent"]["loss"]["mean"] < 0
    assert "unchanged" in done(cli("run", "out/fold-2")).err


def test_what_is_done_is_not_done_again(cli: Cli, recipe: Path) -> None:
    first = done(cli("crossval", recipe, "--folds", 2, "-o", "out"))
    before = json.loads(Path("out/crossval.json").read_text())
    again = done(cli("crossval", recipe, "--folds", 2, "-o", "out"))
    assert "it has not run yet" in first.err
    assert again.err.count("unchanged") == 2 * 4
    assert "it has not run yet" not in again.err
    after = json.loads(Path("out/crossval.json").read_text())
    assert {**after, "written": None} == {**before, "written": None}
    table = [line.split() for line in again.out.splitlines()]
    assert ["loss", *(f"{run['scores']['model']['loss']:.4f}" for run in after["runs"])] in [row[:3] for row in table]
    assert "95 % of the mean" in again.out


def test_who_is_stopped_goes_on_from_there(cli: Cli, recipe: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trained: list[str] = []
    original = Finetune.run

    def stop_in_the_second(self: Any, recipe: Any, run: Any) -> Any:
        trained.append(run.path.name)
        if len(trained) == 2:
            raise StoppedError("stopped by SIGTERM")
        return original(self, recipe, run)

    monkeypatch.setattr(Finetune, "run", stop_in_the_second)
    stopped = cli("crossval", recipe, "--folds", 3, "-o", "out", "--json")
    assert stopped.code == 75
    assert stopped.json["kind"] == "stopped"
    assert json.loads(Path("out/crossval.json").read_text())["done"] == 1
    found = done(cli("crossval", recipe, "--folds", 3, "-o", "out", "--json")).json
    assert trained == ["fold-1", "fold-2", "fold-2", "fold-3"]
    assert found["metrics"]["done"] == 3


def test_frozen_blocks_are_computed_once_for_all_folds(cli: Cli, recipe: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    computed: list[int] = []
    original = prefix_cache.compute_states
    monkeypatch.setattr(
        prefix_cache, "compute_states", lambda *given: (computed.append(len(given[4])), original(*given))[1]
    )
    tokens: dict[int, int] = {}
    for folds_done in range(1, 4):  # stops after each fold, to tell what it computed
        with counting_tokens() as counted:
            settings = [] if folds_done == 1 else ["--set", "freeze.cache=auto"]
            done(cli("run", recipe, "-o", f"fold-{folds_done}", *fold(folds_done), *settings))
        tokens[folds_done] = sum(counted)
    assert sum(computed) == 48, "every row once: of the first fold, what is learnt from and what is held out"
    tried = 500  # a few examples are tried with and without the prefix before it is relied on
    assert tokens[1] > 48 * 20
    assert max(tokens[2], tokens[3]) < tokens[1] / 2 + tried
    done(cli("crossval", recipe, "--folds", 3, "-o", "out", "-q"))
    assert sum(computed) == 48


def fold(number: int) -> list[str]:
    return ["--set", f"data.fold={number}/3", "--set", "stages=[preprocess, freeze, finetune, evaluate]"]


def test_kept_states_change_no_score(cli: Cli, recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shared = done(cli("crossval", recipe, "--folds", 2, "-o", "out", "--json")).json["metrics"]
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "another"))
    without = done(cli("crossval", recipe, "--folds", 2, "-o", "no", "--json", "--set", "freeze.cache=false")).json
    for metric, found in without["metrics"]["scores"]["model"].items():
        assert shared["scores"]["model"][metric]["values"] == pytest.approx(found["values"], abs=1e-4), metric


def test_groups_and_strata_are_those_of_the_recipe(cli: Cli, recipe: Path) -> None:
    done(cli("crossval", recipe, "--folds", 3, "-o", "out", "--set", "data.group=author"))
    parts = [{int(re.findall(r"item (\d+)", text)[0]) for text in held_out(Path(f"out/fold-{n}"))} for n in (1, 2, 3)]
    assert sorted(number for part in parts for number in part) == list(range(48))
    authors = [{number % 6 for number in part} for part in parts]
    assert sum(len(each) for each in authors) == len(set.union(*authors)) == 6, "no author on both sides"
    done(cli("crossval", recipe, "--folds", 2, "-o", "even", "--set", "data.stratify=author"))
    for number in (1, 2):
        items = [int(re.findall(r"item (\d+)", text)[0]) for text in held_out(Path(f"even/fold-{number}"))]
        assert Counter(item % 6 for item in items) == dict.fromkeys(range(6), 4)


def test_pretraining_on_data_of_its_own_is_done_once(cli: Cli, recipe: Path, text_rows: Path) -> None:
    text = recipe.read_text().replace("[preprocess, freeze", "[preprocess, pretrain, freeze")
    recipe.write_text(text + f"pretrain: {{data: {text_rows}, steps: 3, batch_size: 4, max_length: 32}}\n")
    outcome = done(cli("crossval", recipe, "--folds", 2, "-o", "out"))
    assert "pretrain unchanged: done on the same inputs in out/fold-1" in outcome.err
    records = [json.loads(Path(f"out/fold-{n}/run.json").read_text())["stages"]["pretrain"] for n in (1, 2)]
    assert records[0] == records[1]
    assert Path("out/fold-2/pretrain/model/model.safetensors").is_file()
    assert done(cli("crossval", recipe, "--folds", 2, "-o", "out")).err.count("unchanged") == 2 * 5 + 1


def test_a_dry_run_says_what_each_fold_would_do(cli: Cli, recipe: Path) -> None:
    found = done(cli("crossval", recipe, "--folds", 2, "-o", "out", "--dry-run", "--json")).json
    assert list(found["runs"]) == ["out/fold-1", "out/fold-2"]
    assert all(stage["runs"] for run in found["runs"].values() for stage in run.values())
    told = done(cli("crossval", recipe, "--folds", 2, "-o", "out", "--dry-run"))
    assert "out/fold-2" in told.out
    assert "running" not in told.err + told.out
    assert not Path("out").exists()


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--folds", "1"], "greater than or equal to 2"),
        (["--folds", "90"], "fewer rows than folds"),
        (["--set", "data.fold=1/2"], "sets `data.fold` itself"),
        (["--set", "data.eval=other.jsonl"], "divides `data.train`"),
        (["--set", "stages=[preprocess, evaluate]"], "trains a model several times"),
        (["--max-time", "1ms"], "max_time"),
    ],
)
def test_wrong_input_is_refused(arguments: list[str], said: str, cli: Cli, recipe: Path) -> None:
    outcome = cli("crossval", recipe, "-o", "out", *arguments)
    assert outcome.code in (2, 3, 75), outcome.err
    assert said in outcome.err


def test_a_learning_curve_has_a_run_for_each_share(cli: Cli, recipe: Path) -> None:
    done(cli("run", recipe, "-o", "run", "-q"))
    outcome = done(cli("evaluate", recipe, "-o", "run", "--learning-curve", "25%,50%,100%", "--json"))
    curve = json.loads(Path("run/learning_curve.json").read_text())
    assert outcome.json["metrics"] == curve
    assert outcome.json["artifacts"] == {"learning_curve": "run/learning_curve.json"}
    points = curve["points"]
    assert [point["share"] for point in points] == ["25%", "50%", "100%"]
    whole = points[-1]["train_examples"]
    assert [point["train_examples"] for point in points] == [round(whole * part) for part in (0.25, 0.5, 1)]
    results = json.loads(Path("run/evaluate/results.json").read_text())
    assert points[-1]["scores"] == results["model"]
    assert curve["before"]["scores"] == results["parent"]
    for point in points:
        low, high = point["intervals"]["loss"]
        assert low < point["scores"]["loss"] < high
        assert held_out(Path("run") / point["run"]) == held_out(Path("run")), "the same examples for all"
    learnt = [ids_of(Path("run") / point["run"]) for point in points]
    assert learnt[0] < learnt[1] < learnt[2]
    again = done(cli("evaluate", "run", "--learning-curve", "25%,50%,100%"))
    assert "it has not run yet" not in again.err
    assert "before" in again.out
    assert f"{points[0]['scores']['loss']:.4f}" in again.out


def test_shares_and_folds_with_tokenizers_of_their_own_are_compared_by_bytes(
    cli: Cli, text_rows: Path, tmp_path: Path
) -> None:
    recipe = tmp_path / "own.yaml"
    recipe.write_text(f"""\
name: own
task: text
stages: [preprocess, pretrain, evaluate]
data: {{train: {text_rows}, eval: 20%, max_length: 32, leaks: "off"}}
pretrain:
  steps: 2
  batch_size: 4
  lr: 1.0e-3
  precision: fp32
  architecture: {{model_type: gpt2, n_layer: 1, n_head: 2, n_embd: 16, n_positions: 32}}
  tokenizer: {{train: bpe, vocab_size: 400}}
evaluate: {{generate: 0, samples: 0, train_sample: 0, precision: fp32, resamples: 100}}
""")
    done(cli("run", recipe, "-o", "run", "-q"))
    outcome = done(cli("evaluate", recipe, "-o", "run", "--learning-curve", "20%,100%"))
    assert "by share of the training rows" in outcome.out
    assert "loss, perplexity cannot be compared: the runs' tokenizers differ" in " ".join(outcome.out.split())
    curve = json.loads(Path("run/learning_curve.json").read_text())
    assert curve["left_out"]["metrics"] == ["loss", "perplexity"]
    for point in curve["points"]:
        assert set(point["scores"]) == {"bits_per_byte"} >= set(point["intervals"])
    folds = done(cli("crossval", recipe, "--folds", "2", "-o", "folds"))
    assert "loss, perplexity cannot be compared: the runs' tokenizers differ" in " ".join(folds.out.split())
    found = json.loads(Path("folds/crossval.json").read_text())
    assert set(found["scores"]["model"]) == {"bits_per_byte"}
    done(cli("report", "folds"))
    assert "Not compared: loss and perplexity, because" in Path("folds/report.html").read_text()


def ids_of(run: Path) -> set[bytes]:
    from llmkit.data.corpus import Corpus

    return {example["input_ids"].tobytes() for example in Corpus(run / "preprocess" / "train")}


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--learning-curve", "10"], "takes shares"),
        (["--learning-curve", "10%", "--set", "data.train_share=5%"], "sets `data.train_share` itself"),
        (["--learning-curve", "10%"], "finetune is not done yet"),
    ],
)
def test_a_curve_that_cannot_be_is_refused(arguments: list[str], said: str, cli: Cli, recipe: Path) -> None:
    outcome = cli("evaluate", recipe, "-o", "run", *arguments)
    assert outcome.code in (2, 4)
    assert said in outcome.err
