"""How processes share a training: chosen from the memory there is, with the reason, and refused where it cannot be."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import forked
import forked_workers
import pytest
from conftest import Cli
from safetensors.torch import load_file

from llmkit.errors import RecipeError
from llmkit.recipe.training import LocalSteps
from llmkit.run.log import read_metrics
from llmkit.stages.parallel import choose_parallel

GIB = 2**30


def choose(
    wanted: str,
    *,
    processes: int = 4,
    precision: str = "bf16",
    optimizer: str = "adamw",
    thaws: Any = (),
    local: Any = None,
) -> tuple[tuple[int, bool], dict[str, tuple[Any, str]]]:
    """Over how many the sizing spreads, and whether training does; and what was guessed. 40 GiB in all, 16 a process."""
    guesses: dict[str, tuple[Any, str]] = {}
    job: Any = SimpleNamespace(
        stage="finetune",
        recipe=SimpleNamespace(parallel=wanted),
        run=SimpleNamespace(guess=lambda key, value, why: guesses.update({key: (value, why)})),
        training=SimpleNamespace(optimizer=SimpleNamespace(name=optimizer), local=local),
        thaws=thaws,
        adapter=None,
    )

    def size(shards: int) -> Any:
        return SimpleNamespace(memory=SimpleNamespace(total=40 * GIB // shards), shards=shards)

    accelerator = SimpleNamespace(num_processes=processes)
    sizing, spread = choose_parallel(job, accelerator, precision, 16 * GIB, size)
    return (sizing.shards, spread), guesses  # type: ignore[attr-defined]


def test_auto_spreads_what_does_not_fit_and_says_why() -> None:
    found, guesses = choose("auto")
    assert found == (4, True)
    kind, why = guesses["finetune.parallel"]
    assert kind == "fsdp"
    assert why == "the whole model takes 40.0 GiB a process, and there are 16.0; spread, it takes 10.0"


def test_what_is_asked_for_is_done() -> None:
    assert choose("ddp") == ((1, False), {})
    assert choose("fsdp") == ((4, True), {})
    alone, guesses = choose("fsdp", processes=1)
    assert alone == (1, False)
    assert "one process" in guesses["finetune.parallel"][1]
    assert "one process" in choose("auto", processes=1, local=LocalSteps())[1]["finetune.local"][1]


@pytest.mark.parametrize(
    ("given", "what"),
    [
        ({"optimizer": "muon"}, "optimizer: muon"),
        ({"precision": "fp16"}, "precision: fp16"),
        ({"thaws": ({"at": 3},)}, "freeze.unfreeze"),
        ({"local": LocalSteps()}, "finetune.local"),
    ],
)
def test_what_needs_whole_parameters(given: dict[str, Any], what: str) -> None:
    with pytest.raises(RecipeError, match=f"parallel: fsdp does not go with {what}"):
        choose("fsdp", **given)
    found, guesses = choose("auto", **given)
    assert found == (1, False)
    assert what in guesses["finetune.parallel"][1]


def in_two_processes(*words: object) -> forked.Forked:
    process = forked.start(forked_workers.command, *map(str, words), "--processes", "2", "--json")
    assert process.wait() == 0, process.out + process.err
    return process


@pytest.mark.slow
def test_a_run_with_adapters_in_two_processes(cli: Cli, tiny_llama: Path, chat_rows: Path, tmp_path: Path) -> None:
    settings = ("data.eval=20%", "finetune.steps=6", "finetune.log_every=1", "finetune.precision=fp32")
    settings += ("finetune.adapter={name: lora, rank: 4}", "finetune.lr=1e-3", "finetune.save_every=2")
    words = [word for setting in settings for word in ("--set", setting)]
    one, two = tmp_path / "one", tmp_path / "two"
    done = cli("finetune", "-m", tiny_llama, "-d", chat_rows, "-o", one, *words, "--json")
    both = in_two_processes("finetune", "-m", tiny_llama, "-d", chat_rows, "-o", two, *words, "--set", "parallel=fsdp")
    assert done.code == 0, done.err
    facts = json.loads((two / "run.json").read_text())["stages"]["finetune"]["facts"]
    assert (facts["processes"], facts["parallel"]) == (2, "fsdp")

    def losses(run: Path) -> list[float]:
        return [line["loss"] for line in read_metrics(run / "metrics.jsonl") if "loss" in line]

    assert losses(two) == pytest.approx(losses(one), abs=1e-5)
    metrics, expected = json.loads(both.out)["metrics"], done.json["metrics"]
    assert metrics["loss"] == pytest.approx(expected["loss"], abs=1e-5), "scored from what was written"
    for name in ("model/model.safetensors", "adapter/adapter_model.safetensors"):
        mine, theirs = load_file(two / "finetune" / name), load_file(one / "finetune" / name)
        assert mine.keys() == theirs.keys()
        assert all(mine[key].shape == tensor.shape for key, tensor in theirs.items())
    rows = json.loads((one / "run.json").read_text())["stages"]["finetune"]["facts"]["parameter_groups"]
    assert facts["parameter_groups"] == rows, "sizes are those of whole parameters"
    again = cli("evaluate", two, "--json")
    assert again.code == 0, again.err


@pytest.mark.slow
def test_two_processes_score_together(
    cli: Cli, tiny_llama: Path, chat_rows: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    other = tmp_path / "other.jsonl"
    other.write_text("".join(chat_rows.read_text().splitlines(keepends=True)[:9]))
    settings = ("evaluate.generate=5", "evaluate.precision=fp32")
    words = [word for setting in settings for word in ("--set", setting)]
    words += ["--set", f"evaluate.data_sets={{other: {other}}}"]

    def scores(name: str) -> dict[str, Any]:
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / f"cache-{name}"))
        told = ("evaluate", tiny_llama, "-d", chat_rows, "-o", tmp_path / name, *words)
        if name == "both":
            in_two_processes(*told)
        else:
            done = cli(*told)
            assert done.code == 0, done.err
        found: dict[str, Any] = json.loads((tmp_path / name / "evaluate" / "results.json").read_text())
        return found

    one, both = scores("one"), scores("both")
    assert both["model"] == pytest.approx(one["model"], rel=1e-6)
    assert both["data_sets"]["other"]["model"] == pytest.approx(one["data_sets"]["other"]["model"], rel=1e-6)
    assert {file.read_text().count('"answers"') for file in (tmp_path / "cache-both").rglob("*.jsonl")} - {0}, "kept"
    writers = [len(list(folder.glob("*.jsonl"))) for folder in (tmp_path / "cache-both").glob("*/predictions/*")]
    assert writers
    assert set(writers) == {2}, "each process has scored of each data set, and left nothing to the first alone"
