"""Scores come of kept states where there are any: the frozen blocks are not computed, and the scores are the same."""

from __future__ import annotations

import json
import re
import shutil
from contextlib import redirect_stderr, redirect_stdout
from functools import partial
from io import StringIO
from pathlib import Path
from typing import Any

import pytest
from conftest import WORDS, Cli, Outcome, sentence, write_rows

from llmkit.cli.app import main
from llmkit.data.corpus import Corpus
from llmkit.model.anatomy import blocks_of
from llmkit.stages import scoring
from llmkit.stages import sweep as sweeping
from llmkit.tasks.scoring import fill

RECIPE = """\
name: tiny
task: TASK
model: MODEL
data: {train: DATA, eval: 40%}
freeze: {blocks: 0, embeddings: true}
finetune: {epochs: 2, eval_every: 4, lr: 1e-2, warmup: 0, precision: fp32}
evaluate: {precision: fp32, batch_size: BATCH, generate: 0, samples: 0, train_sample: 0}
"""
FOUND = r"the states of the held-out data for the (\S+) are there from before"
COMPUTED = r"the states of the held-out data for the (\S+) took"
BOTH = ["model", "parent"]
BATCH = 8  # examples
KINDS = ("chat", "classify")


def rows_of(kind: str, folder: Path) -> Path:
    """60 rows, of unlike length."""
    texts = [" ".join(sentence(i + n) for n in range(1 + i % 3)) for i in range(60)]
    chats = [
        [{"role": "user", "content": t}, {"role": "assistant", "content": WORDS[i % 12]}] for i, t in enumerate(texts)
    ]
    rows: dict[str, list[dict[str, Any]]] = {
        "chat": [{"messages": messages} for messages in chats],
        "classify": [{"text": text, "label": "abc"[i % 3]} for i, text in enumerate(texts)],
    }
    return write_rows(folder / f"{kind}.jsonl", rows[kind])


def recipe_of(kind: str, model: Path, folder: Path) -> Path:
    found = folder / "recipe.yaml"
    given = {"TASK": kind, "MODEL": str(model), "DATA": str(rows_of(kind, folder)), "BATCH": str(BATCH)}
    found.write_text(re.sub("|".join(given), lambda word: given[word[0]], RECIPE))
    return found


class Bench:
    """A run of a tiny model, fine-tuned on top of its first block, that is scored each time anew."""

    def __init__(self, cli: Cli, recipe: Path, folder: Path) -> None:
        self._cli, self.recipe = cli, recipe
        self.run, self.cache = folder / "run", folder / "cache" / "llmkit" / "prefix"

    def __call__(self, command: str, *settings: str) -> Outcome:
        options = [word for setting in settings for word in ("--set", setting)]
        outcome = self._cli(command, self.recipe, "-o", self.run, *options)
        assert outcome.code == 0, outcome.err
        return outcome

    def evaluate(self, *settings: str) -> Outcome:
        """Scores the model again, whether or not its inputs are the same."""
        for folder in (self.run / "evaluate", self.cache.with_name("predictions")):
            shutil.rmtree(folder, ignore_errors=True)
        return self("evaluate", *settings)

    @property
    def results(self) -> Any:
        return json.loads((self.run / "evaluate" / "results.json").read_text())

    @property
    def batches(self) -> int:
        """Of the held-out data."""
        return -(-len(Corpus(self.run / "preprocess" / "eval")) // BATCH)

    @property
    def without(self) -> list[int]:
        """How often the blocks of a model are computed to score it when nothing is known."""
        return [self.batches, self.batches]

    @property
    def behind(self) -> list[int]:
        """The same when what leaves its first block is known."""
        return [0, self.batches]

    @property
    def kept(self) -> list[Path]:
        return sorted(self.cache.iterdir()) if self.cache.is_dir() else []

    def of_held_out(self) -> Path:
        """The folder of the held-out data's states."""
        content = Corpus(self.run / "preprocess" / "eval").content
        (found,) = (f for f in self.kept if json.loads((f / "states.json").read_text())["meta"]["corpus"] == content)
        return found


@pytest.fixture(scope="module")
def trained(tiny_llama: Path, tiny_bert: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """For each task a run that is fine-tuned, and the states that it has left."""
    folders = {}
    for kind, model in zip(KINDS, (tiny_llama, tiny_bert), strict=True):
        folders[kind] = folder = tmp_path_factory.mktemp(kind)
        errors = StringIO()
        with pytest.MonkeyPatch.context() as patch, redirect_stdout(StringIO()), redirect_stderr(errors):
            patch.setenv("XDG_CACHE_HOME", str(folder / "cache"))
            given = ("finetune", recipe_of(kind, model, folder), "-o", folder / "run")
            patch.setattr("sys.argv", ["llmkit", *map(str, given)])
            with pytest.raises(SystemExit) as ended:
                main()
        assert ended.value.code == 0, errors.getvalue()
    return folders


@pytest.fixture(params=KINDS)
def bench(
    request: pytest.FixtureRequest, cli: Cli, trained: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Bench:
    """A copy of a fine-tuned run with the states that it has left."""
    before = trained[request.param]
    for name in ("run", "cache"):
        shutil.copytree(before / name, tmp_path / name)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return Bench(cli, before / "recipe.yaml", tmp_path)


chat_only = pytest.mark.parametrize("bench", ["chat"], indirect=True)


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[list[int]]:
    """How often each block of each model is computed while it is scored, from now on."""
    found: list[list[int]] = []

    def counting(table: Any, task: Any, model: Any, *given: Any) -> None:
        counts = [0] * len(blocks_of(model))

        def count(number: int, *given: Any) -> None:
            counts[number] += 1

        handles = [block.register_forward_pre_hook(partial(count, i)) for i, block in enumerate(blocks_of(model))]
        fill(table, task, model, *given)
        for handle in handles:
            handle.remove()
        found.append(counts)

    monkeypatch.setattr(scoring, "fill", counting)
    return found


def said(pattern: str, outcome: Outcome) -> list[str]:
    return re.findall(pattern, " ".join(outcome.err.split()))


def check_same(found: Any, expected: Any) -> None:
    """All metrics are those without, and what each model said of each class."""
    for name in BOTH:
        assert found[name].keys() == expected[name].keys()
        assert found[name] == pytest.approx(expected[name], rel=1e-5)
    assert found["tables"] == expected["tables"]


def test_the_frozen_blocks_are_not_computed_and_the_scores_are_the_same(bench: Bench, calls: list[list[int]]) -> None:
    outcome = bench.evaluate("freeze.cache=false")
    assert calls == [bench.without, bench.without]
    assert (said(FOUND, outcome), said(COMPUTED, outcome)) == ([], []), "it was not to be read"
    expected, kept = bench.results, bench.kept
    calls.clear()
    outcome = bench.evaluate()
    assert calls == [bench.behind, bench.behind]
    assert (said(FOUND, outcome), said(COMPUTED, outcome)) == (BOTH, [])
    check_same(bench.results, expected)
    assert expected["model"]["loss"] != pytest.approx(expected["parent"]["loss"], rel=1e-3)
    assert bench.kept == kept


def test_two_models_with_one_prefix_are_worth_computing_it_once(bench: Bench, calls: list[list[int]]) -> None:
    bench.evaluate("freeze.cache=false")
    expected = bench.results
    shutil.rmtree(bench.cache)
    calls.clear()
    outcome = bench.evaluate()
    assert (said(COMPUTED, outcome), said(FOUND, outcome)) == (["model"], ["parent"])
    assert calls == [bench.behind, bench.behind]
    check_same(bench.results, expected)


@chat_only
def test_one_model_is_not_unless_asked_for(bench: Bench, calls: list[list[int]]) -> None:
    shutil.rmtree(bench.cache)
    outcome = bench.evaluate("evaluate.against=null")
    assert (calls, bench.kept, said("frozen prefix", outcome)) == ([bench.without], [], [])
    outcome = bench.evaluate("evaluate.against=null", "freeze.cache=true")
    assert (calls[1], len(bench.kept), said(COMPUTED, outcome)) == (bench.behind, 1, ["model"])


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 4
    path.write_bytes(data)


def test_damaged_states_are_not_believed(bench: Bench, calls: list[list[int]]) -> None:
    bench.evaluate("freeze.cache=false")
    expected = bench.results
    calls.clear()
    damaged = bench.of_held_out()
    flip(damaged / "part-00000.bin")
    outcome = bench.evaluate()
    assert said("kept hidden states are damaged", outcome)
    assert damaged.name in outcome.err.replace("\n", "")
    assert (said(COMPUTED, outcome), said(FOUND, outcome)) == (["model"], ["parent"])
    check_same(bench.results, expected)
    flip(damaged / "part-00000.bin")
    calls.clear()
    outcome = bench.evaluate("evaluate.against=null")
    assert said("kept hidden states are damaged", outcome)
    assert calls == [bench.without]
    assert bench.results["model"] == expected["model"]


@chat_only
def test_answers_are_written_by_the_whole_model(bench: Bench, calls: list[list[int]]) -> None:
    answers = ("evaluate.generate=6", "evaluate.samples=3", "evaluate.max_new_tokens=6")
    bench.evaluate(*answers, "freeze.cache=false")
    expected, without = bench.results, calls.copy()
    calls.clear()
    bench.evaluate(*answers)
    assert bench.results["samples"] == expected["samples"]
    check_same(bench.results, expected)
    assert calls == [[first - bench.batches, last] for first, last in without]
    assert all(first > bench.batches for first, _ in without), "answers take passes too"


@chat_only
def test_another_precision_finds_nothing(bench: Bench, calls: list[list[int]]) -> None:
    outcome = bench.evaluate("evaluate.precision=bf16", "evaluate.against=null")
    assert (calls, said("frozen prefix", outcome)) == ([bench.without], [])


@chat_only
def test_rounded_states_are_for_training_alone(bench: Bench, calls: list[list[int]]) -> None:
    rounded = ("freeze.cache_precision=bf16", "seed=3")
    bench("finetune", *rounded)
    bench.evaluate(*rounded, "freeze.cache=false")
    expected = bench.results
    bench.evaluate(*rounded)
    assert calls[-2:] == [bench.behind, bench.behind]
    check_same(bench.results, expected)


@chat_only
def test_examples_without_room_are_computed(bench: Bench, calls: list[list[int]]) -> None:
    bench.evaluate("freeze.cache=false")
    expected = bench.results
    shutil.rmtree(bench.cache)
    calls.clear()
    outcome = bench.evaluate("freeze.cache_bytes=64KiB")
    (left_out,) = said(r"(\d+) of 24 examples have no room", outcome)
    assert 0 < int(left_out) < 24
    assert all(0 < first < last for first, last in calls)
    check_same(bench.results, expected)


@chat_only
def test_where_it_is_not_exact_it_says_why(
    bench: Bench, calls: list[list[int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("llmkit.stages.prefix.try_prefix", lambda *given: "later blocks use more")
    outcome = bench.evaluate()
    assert said(r"computed for the held-out data for the (\S+): later blocks use more", outcome) == BOTH
    assert calls == [bench.without, bench.without]


FROZEN: dict[str, tuple[str, ...]] = {
    "what thaws is not known": ("freeze.unfreeze=[{at: 50%, blocks: 0}]", "freeze.blocks=0"),
    "what stays frozen is": ("freeze.unfreeze=[{at: 50%, blocks: 1}]", "freeze.blocks=all"),
    "embeddings that move": ("freeze.embeddings=false",),
    "adapters above": ("finetune.adapter=lora", "freeze.embeddings=false"),
    "adapters in chosen blocks": ("finetune.adapter={blocks: 1}", "freeze={patterns: ['*norm*']}"),
}


@chat_only
@pytest.mark.parametrize("settings", FROZEN.values(), ids=FROZEN)
def test_what_never_moves_is_known(settings: tuple[str, ...], bench: Bench, calls: list[list[int]]) -> None:
    bench("finetune", *settings)
    bench.evaluate(*settings, "freeze.cache=false")
    expected = bench.results
    calls.clear()
    outcome = bench.evaluate(*settings)
    moves = settings in (FROZEN["what thaws is not known"], FROZEN["embeddings that move"])
    assert calls == ([bench.without, bench.without] if moves else [bench.behind, bench.behind])
    assert said(FOUND, outcome) == ([] if moves else BOTH)
    check_same(bench.results, expected)


@chat_only
def test_a_sweep_says_how_much_is_known(bench: Bench, calls: list[list[int]], monkeypatch: pytest.MonkeyPatch) -> None:
    def second(trials: Any) -> Any:
        return trials[1], "said"

    monkeypatch.setattr(sweeping, "recommend", second)
    swept = ("freeze={blocks: auto}", "finetune.epochs=1")
    bench("finetune", *swept)
    calls.clear()
    outcome = bench.evaluate(*swept)
    assert (calls, said(FOUND, outcome)) == ([bench.behind, bench.behind], BOTH)


@chat_only
def test_general_text_is_known_by_its_own_states(bench: Bench, tmp_path: Path, calls: list[list[int]]) -> None:
    general = write_rows(tmp_path / "general.jsonl", ({"text": sentence(i)} for i in range(20)))
    given = (f"data.general={general}",)
    bench("finetune", *given)
    bench.evaluate(*given, "freeze.cache=false")
    expected = bench.results
    outcome = bench.evaluate(*given)
    assert said(r"for the (\S+) on general text (took|are there)", outcome) == [
        ("model", "took"),
        ("parent", "are there"),
    ]
    assert any(name.startswith("general_") for name in expected["model"])
    check_same(bench.results, expected)
