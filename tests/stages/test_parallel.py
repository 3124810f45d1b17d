"""How processes share a training: chosen from the memory there is, with the reason, and refused where it cannot be."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import forked
import forked_workers
import pytest
import torch
from conftest import Cli
from safetensors.torch import load_file
from transformers import LlamaConfig

from llmkit.errors import RecipeError
from llmkit.model.loading import build_on_meta
from llmkit.recipe.schema import Parallel
from llmkit.recipe.training import LocalSteps
from llmkit.run.log import read_metrics
from llmkit.stages.parallel import choose_parallel, named
from llmkit.train.mesh import Mesh

GIB = 2**30


class _Bare(torch.nn.Module):
    """A model of one weight, with a config."""

    def __init__(self, layerdrop: float) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(2))
        self.config = SimpleNamespace(to_dict=lambda: {"layerdrop": layerdrop})


def choose(
    wanted: str,
    *,
    processes: int = 4,
    precision: str = "bf16",
    optimizer: str = "adamw",
    thaws: Any = (),
    local: Any = None,
    model: Any = None,
    layerdrop: float = 0.0,
) -> tuple[tuple[int, str | None], dict[str, tuple[Any, str]]]:
    """Over how many the sizing spreads, and how training does; and what was guessed. 40 GiB in all, 16 a process."""
    guesses: dict[str, tuple[Any, str]] = {}
    job: Any = SimpleNamespace(
        stage="finetune",
        recipe=SimpleNamespace(parallel=wanted),
        run=SimpleNamespace(guess=lambda key, value, why: guesses.update({key: (value, why)})),
        training=SimpleNamespace(optimizer=SimpleNamespace(name=optimizer), local=local),
        thaws=thaws,
        adapter=None,
        model=model or _Bare(layerdrop),
    )

    def size(mesh: Mesh | None) -> Any:
        shards = 1 if mesh is None else mesh.count
        return SimpleNamespace(memory=SimpleNamespace(total=40 * GIB // shards), shards=shards)

    accelerator = SimpleNamespace(num_processes=processes, process_index=0)
    sizing, mesh = choose_parallel(job, accelerator, precision, 16 * GIB, size)
    return (sizing.shards, named(mesh, processes)), guesses  # type: ignore[attr-defined]


def test_auto_spreads_what_does_not_fit_and_says_why() -> None:
    found, guesses = choose("auto")
    assert found == (4, "fsdp")
    kind, why = guesses["finetune.parallel"]
    assert kind == "fsdp"
    assert why == "the whole model takes 40.0 GiB a process, and there are 16.0; spread, it takes 10.0"


def test_what_is_asked_for_is_done() -> None:
    assert choose("ddp") == ((1, "ddp"), {})
    assert choose("fsdp") == ((4, "fsdp"), {})
    alone, guesses = choose("fsdp", processes=1)
    assert alone == (1, None)
    assert "one process" in guesses["finetune.parallel"][1]
    assert "one process" in choose("auto", processes=1, local=LocalSteps())[1]["finetune.local"][1]


@pytest.mark.parametrize(
    ("given", "what"),
    [
        ({"optimizer": "muon"}, "optimizer: muon"),
        ({"precision": "fp16"}, "precision: fp16"),
        ({"thaws": ({"at": 3},)}, "freeze.unfreeze"),
        ({"layerdrop": 0.1}, "layerdrop in the model's config"),
        ({"local": LocalSteps()}, "finetune.local"),
    ],
)
def test_what_needs_whole_parameters(given: dict[str, Any], what: str) -> None:
    with pytest.raises(RecipeError, match=f"parallel: fsdp does not go with {what}"):
        choose("fsdp", **given)
    found, guesses = choose("auto", **given)
    assert found == (1, "ddp")
    assert what in guesses["finetune.parallel"][1]


@pytest.fixture(scope="module")
def llama() -> Any:
    """A model of 8 heads, and 4 of keys and values."""
    config = {"vocab_size": 61, "hidden_size": 64, "intermediate_size": 48, "num_hidden_layers": 1}
    heads = {"num_attention_heads": 8, "num_key_value_heads": 4}
    return build_on_meta(LlamaConfig(**config, **heads), "AutoModelForCausalLM")


def test_products_are_shared_by_as_many_as_is_said(llama: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    assert choose("tensor", model=llama)[0] == (4, "tensor 4")
    assert choose("tensor", processes=8, model=llama)[0] == (8, "tensor 4 x data 2"), "those of one machine"
    assert choose(Parallel(tensor=2), model=llama)[0] == (4, "tensor 2 x data 2")
    assert choose("context", processes=8)[0] == (8, "context 4 x data 2")
    assert choose(Parallel(tensor=2, context=2), processes=8, model=llama)[0] == (8, "tensor 2 x context 2 x data 2")
    assert choose(Parallel(), model=llama)[0] == (4, "fsdp")
    assert "one process" in choose("tensor", processes=1)[1]["finetune.parallel"][1]


def test_what_deepspeed_shares(llama: Any) -> None:
    assert choose("deepspeed", model=llama)[0] == (4, "DeepSpeed ZeRO-2")
    assert choose(Parallel(deepspeed=1, offload=True), model=llama)[0] == (4, "DeepSpeed ZeRO-1, offloaded")
    assert "one process" in choose("deepspeed", processes=1)[1]["finetune.parallel"][1]
    with pytest.raises(RecipeError, match="parallel: deepspeed does not go with optimizer: muon"):
        choose("deepspeed", optimizer="muon", model=llama)


@pytest.mark.parametrize("way", ["deepspeed", "fsdp", "tensor"])
def test_parameters_that_cannot_be_spread(llama: Any, monkeypatch: pytest.MonkeyPatch, way: str) -> None:
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    with monkeypatch.context() as within:
        within.setattr(llama, "_keep_in_fp32_modules_strict", ["norm"], raising=False)
        with pytest.raises(
            RecipeError, match=r"parameters that stay in fp32 \(model.layers.0.input_layernorm.weight\)"
        ):
            choose(way, model=llama)
        assert choose(way, precision="fp32", model=llama)[0][0] == 4
        assert choose("auto", model=llama)[0] == (1, "ddp")
    monkeypatch.setattr(llama, "scale", torch.nn.Parameter(torch.ones(())), raising=False)
    with pytest.raises(RecipeError, match=r"parameters of a single number \(scale\)"):
        choose(way, model=llama)


def test_deepspeed_has_to_be_installed(llama: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "deepspeed", None)
    with pytest.raises(RecipeError, match="parallel: deepspeed needs DeepSpeed") as error:
        choose("deepspeed", model=llama)
    assert error.value.hint == "pip install 'llmkit[deepspeed]'"


def test_what_cannot_be_shared_so(llama: Any) -> None:
    with pytest.raises(RecipeError, match="cannot be shared out so") as error:
        choose(Parallel(tensor=3), model=llama)
    assert error.value.expected == "sizes whose product divides 4"
    with pytest.raises(RecipeError, match="cannot be shared out so"):
        choose(Parallel(tensor=2, context=4), model=llama)
    with pytest.raises(RecipeError, match="cannot be cut in 8 parts") as error:
        choose(Parallel(tensor=8), processes=8, model=llama)
    assert error.value.got == "num_key_value_heads is 4, which 8 does not divide"
    assert error.value.hint == "set parallel: {tensor: 4} or parallel: fsdp"
    with pytest.raises(RecipeError, match="parallel: tensor does not go with optimizer: muon"):
        choose(Parallel(tensor=2), optimizer="muon", model=llama)


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
@pytest.mark.parametrize("way", ["ddp", "tensor", "context", "deepspeed"])
def test_a_run_whose_work_is_shared(cli: Cli, tiny_llama: Path, chat_rows: Path, tmp_path: Path, way: str) -> None:
    settings = ("data.eval=20%", "finetune.steps=4", "finetune.log_every=1", "finetune.precision=fp32")
    words = ["-m", tiny_llama, "-d", chat_rows, *(word for setting in settings for word in ("--set", setting))]
    done = cli("finetune", *words, "-o", tmp_path / "one", "--json")
    both = in_two_processes("finetune", *words, "-o", tmp_path / "two", "--set", f"parallel={way}")
    assert done.code == 0, done.err
    facts = json.loads((tmp_path / "two" / "run.json").read_text())["stages"]["finetune"]["facts"]
    assert (facts["processes"], facts["parallel"]) == (
        2,
        {"ddp": "ddp", "deepspeed": "DeepSpeed ZeRO-2"}.get(way, f"{way} 2"),
    )
    metrics, expected = json.loads(both.out)["metrics"], done.json["metrics"]
    for name in ("loss", "eval_loss", "train_loss"):
        assert metrics[name] == pytest.approx(expected[name], abs=1e-5), name
    for name in ("steps", "train_tokens", "supervised_tokens"):
        assert metrics[name] == expected[name], "what is shared counts once"


@pytest.mark.slow
def test_a_mistake_that_two_processes_find_leaves_what_was_made(
    cli: Cli, tiny_llama: Path, chat_rows: Path, tmp_path: Path
) -> None:
    run, own = tmp_path / "run", tmp_path / "own.py"
    own.write_text("def fails(references, predictions):\n    raise ValueError('no')\n")
    quick = ("--set", "evaluate.precision=fp32", "--set", "evaluate.generate=0")
    assert cli("evaluate", tiny_llama, "-d", chat_rows, "-o", run, *quick).code == 0
    recipe, results = ((run / name).read_text() for name in ("recipe.yaml", "evaluate/results.json"))
    words = map(str, ("evaluate", run, "--set", f"evaluate.metrics=['{own}:fails']", "--set", "evaluate.generate=2"))
    process = forked.start(forked_workers.command, *words, "--processes", "2", "--json")
    assert process.wait() == 3, process.out + process.err
    assert (run / "recipe.yaml").read_text() == recipe
    assert (run / "evaluate" / "results.json").read_text() == results
    assert "unchanged" in cli("evaluate", run).err


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
