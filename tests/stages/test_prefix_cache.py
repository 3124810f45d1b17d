"""What leaves the frozen blocks is computed once for all epochs and runs, and nothing that goes wrong with it is silent."""

from __future__ import annotations

import errno
import json
import os
import re
import shutil
from collections.abc import Callable
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass
from io import StringIO
from pathlib import Path
from typing import Any

import pytest
from conftest import Cli, Outcome, sentence, write_rows
from safetensors.torch import load_file

from llmkit.cli.app import main
from llmkit.data.states import States, StatesWriter
from llmkit.run.log import read_metrics

SETTINGS = (
    "data.eval=20%",
    "freeze.blocks=0",
    "freeze.embeddings=true",
    "finetune.epochs=2",
    "finetune.batch_size=16",
    "finetune.warmup=0",
    "finetune.log_every=1",
    "finetune.eval_every=4",
    "finetune.lr=1e-3",
    "finetune.precision=fp32",
    "evaluate.metrics=[loss]",
)
COMPUTED = r"the states of the (\S+) data took"
FOUND = r"the states of the (\S+) data are there from before"
BOTH = ["training", "held-out"]


class Bench:
    """Fine-tunes a tiny model on top of its first block, each time in another run, all with one cache."""

    def __init__(self, cli: Cli, model: Path, folder: Path) -> None:
        self._cli = cli
        self.model, self.folder, self.run, self._runs = model, folder, folder / "run-0", 0
        self.home = folder / "cache"
        rows = (
            {"messages": [{"role": "user", "content": sentence(i)}, {"role": "assistant", "content": f"It is {i}."}]}
            for i in range(60)
        )
        self.data = write_rows(folder / "rows.jsonl", rows)

    def finetune(self, *settings: str) -> Outcome:
        self._runs += 1
        self.run = self.folder / f"run-{self._runs}"
        keys = {setting.partition("=")[0] for setting in settings}
        given = [setting for setting in SETTINGS if setting.partition("=")[0] not in keys]
        options = [word for setting in (*given, *settings) for word in ("--set", setting)]
        return self._cli("finetune", "-m", self.model, "-d", self.data, "-o", self.run, *options)

    @property
    def kept(self) -> list[Path]:
        cache = self.home / "llmkit" / "prefix"
        return sorted(cache.iterdir()) if cache.is_dir() else []

    @property
    def losses(self) -> list[float]:
        lines = read_metrics(self.run / "metrics.jsonl")
        return [line[key] for line in lines for key in ("loss", "eval_loss") if key in line]

    @property
    def guess(self) -> Any:
        return json.loads((self.run / "run.json").read_text())["guesses"].get("freeze.cache", {}).get("value")


@dataclass(frozen=True)
class Before:
    """A run without the cache, and one that filled it."""

    home: Path
    without: list[float]
    losses: list[float]
    models: tuple[Path, Path]
    err: str


@pytest.fixture(scope="module")
def before(tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Before:
    def cli(*arguments: object) -> Outcome:
        errors = StringIO()
        patch.setattr("sys.argv", ["llmkit", *map(str, arguments)])
        with redirect_stdout(StringIO()), redirect_stderr(errors), pytest.raises(SystemExit) as ended:
            main()
        return Outcome(int(str(ended.value.code)), "", errors.getvalue())

    with pytest.MonkeyPatch.context() as patch:
        bench = Bench(cli, tiny_llama, tmp_path_factory.mktemp("before"))
        patch.setenv("XDG_CACHE_HOME", str(bench.home))
        done(bench.finetune("freeze.cache=false"))
        assert (bench.kept, bench.guess) == ([], None)
        without, plain = bench.losses, bench.run / "finetune" / "model"
        outcome = done(bench.finetune())
        return Before(bench.home, without, bench.losses, (plain, bench.run / "finetune" / "model"), outcome.err)


@pytest.fixture
def bench(cli: Cli, tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Bench:
    """With nothing in the cache."""
    found = Bench(cli, tiny_llama, tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", str(found.home))
    return found


@pytest.fixture
def filled(bench: Bench, before: Before) -> Bench:
    """With what a run before has left in the cache."""
    shutil.copytree(before.home, bench.home)
    return bench


def done(outcome: Outcome) -> Outcome:
    assert outcome.code == 0, outcome.err
    return outcome


def said(pattern: str, outcome: Outcome) -> list[str]:
    return re.findall(pattern, " ".join(outcome.err.split()))


def part_of(bench: Bench, what: str) -> Path:
    """The folder of the training data's states, which are the larger, or of the held-out data's."""
    by_size = sorted(bench.kept, key=lambda folder: (folder / "part-00000.bin").stat().st_size)
    return by_size[-1 if what == "training" else 0]


def test_the_second_run_finds_what_the_first_computed(filled: Bench, before: Before) -> None:
    assert said(COMPUTED, Outcome(0, "", before.err)) == BOTH
    kept = filled.kept
    assert len(kept) == 2
    outcome = done(filled.finetune())
    assert (said(COMPUTED, outcome), said(FOUND, outcome)) == ([], BOTH)
    assert (filled.guess, filled.kept) == (True, kept)
    assert filled.losses == before.losses, "read or computed, to the bit"


def test_the_model_is_the_one_that_there_would_be_without(before: Before, tiny_llama: Path) -> None:
    assert len(before.losses) == 6 + 2, "steps and evaluations"
    assert before.losses == pytest.approx(before.without, abs=1e-5)
    expected, found = (load_file(model / "model.safetensors") for model in before.models)
    assert found.keys() == expected.keys()
    assert all(found[name].allclose(expected[name], atol=1e-5) for name in expected)
    parent = load_file(tiny_llama / "model.safetensors")
    still = {name for name in parent if parent[name].equal(found[name])}
    assert still == {name for name in parent if name.startswith(("model.embed_tokens.", "model.layers.0."))}


def test_one_epoch_is_not_worth_it_and_asking_makes_it_so(bench: Bench) -> None:
    once = ("finetune.epochs=1", "finetune.eval_every=null")
    outcome = done(bench.finetune(*once))
    assert (said(COMPUTED, outcome), bench.kept, bench.guess) == ([], [], False)
    outcome = done(bench.finetune(*once, "freeze.cache=true"))
    assert said(COMPUTED, outcome) == BOTH


def test_a_model_whose_later_blocks_have_moved_has_the_same_states(filled: Bench, before: Before) -> None:
    filled.model = before.models[1]
    assert said(FOUND, done(filled.finetune())) == BOTH
    assert len(filled.kept) == 2


def test_other_data_and_deeper_prefixes_have_their_own(filled: Bench) -> None:
    filled.data.write_text("".join(filled.data.read_text().splitlines(keepends=True)[:40]))
    assert said(COMPUTED, done(filled.finetune("freeze.blocks=all"))) == BOTH
    assert len(filled.kept) == 4


def test_states_in_bf16_take_half_and_what_was_kept_before_makes_room(filled: Bench) -> None:
    sizes = [(part_of(filled, what) / "part-00000.bin").stat().st_size for what in BOTH]
    oldest = part_of(filled, "training")
    room = sum(file.stat().st_size for folder in filled.kept for file in folder.iterdir()) - 1
    done(filled.finetune("freeze.cache_precision=bf16", f"freeze.cache_bytes={room}"))
    assert [2 * (part_of(filled, what) / "part-00000.bin").stat().st_size for what in BOTH] == sizes
    assert oldest not in filled.kept


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 4
    path.write_bytes(data)


DAMAGES: dict[str, Callable[[Path], None]] = {
    "a bit": lambda folder: flip(folder / "part-00000.bin"),
    "another's": lambda folder: flip_key(folder / "states.json"),
}


def flip_key(manifest: Path) -> None:
    found = json.loads(manifest.read_text())
    found["meta"]["key"] = found["meta"]["key"][::-1]
    manifest.write_text(json.dumps(found))


@pytest.mark.parametrize("damage", DAMAGES.values(), ids=DAMAGES)
def test_what_is_damaged_is_said_and_computed_again(
    damage: Callable[[Path], None], filled: Bench, before: Before
) -> None:
    kept, damaged = filled.kept, part_of(filled, "training")
    damage(damaged)
    outcome = done(filled.finetune())
    assert said("they are computed again", outcome)
    assert damaged.name in outcome.err.replace("\n", "")
    assert (said(COMPUTED, outcome), said(FOUND, outcome)) == (["training"], ["held-out"])
    assert filled.losses == before.losses
    assert filled.kept == kept
    assert States(damaged).complete


def full(*given: Any) -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def full_after(examples: int) -> Callable[..., None]:
    """In place of `StatesWriter.add`: room for so many examples."""
    add, added = StatesWriter.add, []

    def write(writer: StatesWriter, *given: Any) -> None:
        added.append(given)
        add(writer, *given) if len(added) <= examples else full()

    return write


FULL: dict[str, tuple[str, Callable[..., None]]] = {
    "after 20 examples": ("llmkit.data.states.StatesWriter.add", full_after(20)),
    "at the end": ("llmkit.data.states.StatesWriter.close", full),
    "when parts are joined": ("llmkit.stages.prefix_cache.join_parts", full),
}


@pytest.mark.parametrize(("where", "stand_in"), FULL.values(), ids=FULL)
def test_a_full_disk_is_said_and_training_goes_on_without(
    where: str, stand_in: Callable[..., None], bench: Bench, before: Before, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(where, stand_in)
    outcome = done(bench.finetune())
    assert said(r"cannot be kept in .*No space left on device", outcome)
    assert (bench.kept, bench.guess) == ([], False), "nothing half-written stays"
    assert bench.losses == before.without


def test_examples_without_room_are_computed_each_time(bench: Bench, before: Before) -> None:
    outcome = done(bench.finetune("freeze.cache_bytes=64KiB", "finetune.eval_every=null"))
    (left_out,) = said(r"(\d+) of \d+ examples have no room", outcome)
    assert int(left_out) > 0
    (kept,) = bench.kept
    assert (kept / "part-00000.bin").stat().st_size <= 64 * 1024
    expected = [*before.without[:4], *before.without[5:]]  # without the evaluation after the fourth step
    assert bench.losses == pytest.approx(expected, abs=1e-5)


def test_states_that_a_run_needs_do_not_make_room_for_each_other(bench: Bench) -> None:
    few = "freeze.cache_bytes=64KiB"
    assert "training" in said(COMPUTED, done(bench.finetune(few)))
    kept = bench.kept
    outcome = done(bench.finetune(few))
    assert "training" in said(FOUND, outcome)
    assert (said(COMPUTED, outcome), bench.kept) == ([], kept)


REFUSED: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "embeddings that move": (("freeze.cache=true", "freeze.embeddings=false"), ("freeze.cache", "the embeddings")),
    "noise": (("freeze.cache=true", "finetune.neftune_alpha=5"), ("freeze.cache", "neftune_alpha")),
    "size in words": (("freeze.cache_bytes=lots",), ("--set freeze.cache_bytes=lots", "20GB")),
    "size below nothing": (("freeze.cache_bytes=-3",), ("--set freeze.cache_bytes=-3", "above 0")),
    "precision": (("freeze.cache_precision=fp8",), ("--set freeze.cache_precision=fp8", "bf16")),
    "neither yes nor no": (("freeze.cache=maybe",), ("--set freeze.cache=maybe", "auto")),
}


@pytest.mark.parametrize(("settings", "needles"), REFUSED.values(), ids=REFUSED)
def test_what_cannot_be_is_an_error(settings: tuple[str, ...], needles: tuple[str, ...], bench: Bench) -> None:
    outcome = bench.finetune(*settings)
    assert outcome.code == 2, outcome.err
    assert not [needle for needle in needles if needle not in outcome.err], outcome.err
    assert bench.kept == []


RECIPE = """\
name: tiny
task: chat
model: MODEL
stages: [preprocess, freeze, finetune]
data: {train: DATA, eval: 20%}
freeze:
  blocks: 0
  embeddings: true
  cache_bytes: a lot
finetune: {epochs: 3}
"""


def test_a_wrong_size_is_named_with_its_line(cli: Cli, bench: Bench, tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(RECIPE.replace("MODEL", str(bench.model)).replace("DATA", str(bench.data)))
    outcome = cli("run", recipe, "-o", tmp_path / "run")
    assert outcome.code == 2
    assert f"{recipe}:9" in outcome.err.replace("\n", "")
    assert "cache_bytes" in outcome.err


def test_noise_leaves_the_cache_out_by_itself(bench: Bench) -> None:
    outcome = done(bench.finetune("finetune.neftune_alpha=5"))
    assert (bench.kept, bench.guess) == ([], False)
    assert said("neftune_alpha puts noise", outcome)


def test_a_cache_that_was_asked_for_and_has_no_room_is_said(bench: Bench) -> None:
    outcome = bench.finetune("freeze.cache=true", "freeze.cache_bytes=10")
    assert outcome.code == 2 or said(r"(?:freeze\.cache|hidden states|frozen prefix)", outcome)


def test_a_cache_folder_that_cannot_be_made_is_said(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    file = bench.folder / "file"
    file.write_text("no folder")
    monkeypatch.setenv("XDG_CACHE_HOME", str(file))
    assert said("cannot be kept in", done(bench.finetune()))
