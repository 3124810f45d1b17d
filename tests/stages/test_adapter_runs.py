"""Runs with adapters: a plain model with them merged, the adapter alone, and everything else as without them."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import sys
from collections.abc import Callable
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass
from io import StringIO
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import WORDS, Cli, Outcome, sentence, write_rows
from safetensors.torch import load_file, save_file

from llmkit.cli.app import main
from llmkit.run.log import read_metrics

SETTINGS = (
    "data.eval=20%",
    "finetune.adapter=lora",
    "finetune.steps=4",
    "finetune.lr=1e-2",
    "finetune.warmup=0",
    "finetune.precision=fp32",
    "finetune.log_every=1",
    "finetune.trackers=[]",
)
Train = Callable[..., Outcome]


@pytest.fixture(scope="module")
def tied_llama(tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny Llama, whose output embeddings are its input embeddings."""
    from transformers import AutoConfig, AutoModelForCausalLM

    folder = tmp_path_factory.mktemp("tied-llama") / "model"
    shutil.copytree(tiny_llama, folder)
    torch.manual_seed(1)
    config = AutoConfig.from_pretrained(folder, tie_word_embeddings=True)
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """60 conversations."""
    turns = ([("user", sentence(i)), ("assistant", WORDS[i % 12])] for i in range(60))
    lines = ({"messages": [{"role": role, "content": content} for role, content in pair]} for pair in turns)
    return write_rows(tmp_path_factory.mktemp("rows") / "chat.jsonl", lines)


def options(*settings: str) -> list[str]:
    """The settings of all runs, but for those that are given."""
    keys = {setting.partition("=")[0] for setting in settings}
    given = [setting for setting in SETTINGS if setting.partition("=")[0] not in keys]
    return [word for setting in (*given, *settings) for word in ("--set", setting)]


@pytest.fixture
def train(cli: Cli, tied_llama: Path, rows: Path, tmp_path: Path) -> Train:
    """Fine-tunes the tied Llama with the settings given."""

    def run(
        *settings: str,
        out: str = "run",
        command: str = "finetune",
        flags: Any = (),
        model: Any = None,
        data: Any = None,
    ) -> Outcome:
        where = ("-m", model or tied_llama, "-d", data or rows, "-o", tmp_path / out)
        return cli(command, *where, *flags, *options(*settings))

    return run


@pytest.fixture
def rate(monkeypatch: pytest.MonkeyPatch) -> None:
    """Plans do not find out how fast this machine is."""
    monkeypatch.setattr("llmkit.stages.plan.matrix_rate", lambda *given: 1e12)


@dataclass(frozen=True)
class Trained:
    """A run with adapters of rank 4, and what it said."""

    run: Path
    err: str


@pytest.fixture(scope="module")
def trained(tied_llama: Path, rows: Path, tmp_path_factory: pytest.TempPathFactory) -> Trained:
    run, errors = tmp_path_factory.mktemp("trained") / "run", StringIO()
    settings = options("finetune.adapter={rank: 4, alpha: 6, targets: mlp}")
    given = ("-m", tied_llama, "-d", rows, "-o", run, *settings)
    with pytest.MonkeyPatch.context() as patch, redirect_stdout(StringIO()), redirect_stderr(errors):
        patch.setattr("sys.argv", ["llmkit", "finetune", *map(str, given)])
        with pytest.raises(SystemExit) as ended:
            main()
    assert ended.value.code == 0, errors.getvalue()
    return Trained(run, errors.getvalue())


def done(outcome: Outcome) -> Outcome:
    assert outcome.code == 0, outcome.err
    return outcome


def said(outcome: Outcome) -> str:
    return " ".join(outcome.err.split())


def refused(outcome: Outcome, code: int, *needles: object) -> None:
    assert outcome.code == code, outcome.out + outcome.err
    text = "".join(outcome.err.split())
    missing = [str(needle) for needle in needles if "".join(str(needle).split()) not in text]
    assert not missing, f"{missing} not in:\n{outcome.err}"
    assert "Traceback" not in outcome.err


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model.safetensors")


def adapter(run: Path) -> dict[str, torch.Tensor]:
    return load_file(run / "finetune" / "adapter" / "adapter_model.safetensors")


def same_bits(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(value, other[name]) for name, value in one.items())


def still(before: dict[str, torch.Tensor], after: dict[str, torch.Tensor], prefix: str = "") -> set[str]:
    return {name for name in before if torch.equal(before[name], after[prefix + name])}


def losses(run: Path) -> list[float]:
    return [line[key] for line in read_metrics(run / "metrics.jsonl") for key in ("loss", "eval_loss") if key in line]


def record(run: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((run / "run.json").read_text())
    return found


@torch.no_grad()
def logits(model: Any) -> torch.Tensor:
    found: torch.Tensor = model.eval()(input_ids=torch.tensor([[5, 9, 3, 17, 8, 2]])).logits
    return found


PRODUCTS = re.compile(r"\.(?:[qkvo]|gate|up|down)_proj\.weight$")


@pytest.mark.parametrize(("kind", "precision"), [("rslora", "fp32"), ("dora", "bf16")])
def test_a_run_leaves_a_plain_model_and_the_adapter_alone(
    kind: str, precision: str, train: Train, tied_llama: Path, tmp_path: Path
) -> None:
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    done(train(f"finetune.adapter={kind}", f"finetune.precision={precision}", "finetune.weight_decay=0.1"))
    folder = tmp_path / "run" / "finetune"
    before, after = weights(tied_llama), weights(folder / "model")
    assert before.keys() == after.keys()
    assert still(before, after) == {name for name in before if not PRODUCTS.search(name)}
    assert not list((folder / "model").glob("adapter*"))
    config = json.loads((folder / "adapter" / "adapter_config.json").read_text())
    assert (config["base_model_name_or_path"], config["modules_to_save"]) == (str(tied_llama), None)
    assert all(".lora_" in name for name in adapter(tmp_path / "run"))
    base = AutoModelForCausalLM.from_pretrained(tied_llama)
    expected = logits(AutoModelForCausalLM.from_pretrained(folder / "model"))
    torch.testing.assert_close(logits(PeftModel.from_pretrained(base, folder / "adapter")), expected, atol=1e-5, rtol=0)


@pytest.mark.usefixtures("rate")
def test_a_classifier_has_its_new_head_in_the_adapter(
    train: Train, tiny_bert: Path, label_rows: Path, tmp_path: Path
) -> None:
    from peft import PeftModel
    from transformers import AutoModelForSequenceClassification

    given = {"model": tiny_bert, "data": label_rows}
    learning, _ = planned(done(train("finetune.adapter={rank: 4, targets: attention}", command="plan", **given)))
    done(train("finetune.adapter={rank: 4, targets: attention}", **given))
    assert learning == f"{sum(tensor.numel() for tensor in adapter(tmp_path / 'run').values()):,}"
    folder = tmp_path / "run" / "finetune"
    before, after = weights(tiny_bert), weights(folder / "model")
    moved = before.keys() - still(before, after, "bert.")
    assert moved == {
        name for name in before if ".attention." in name and ".LayerNorm." not in name and "weight" in name
    }
    heads = {name for name in adapter(tmp_path / "run") if ".lora_" not in name}
    assert heads == {"base_model.model.classifier.weight", "base_model.model.classifier.bias"}
    torch.manual_seed(99)
    base = AutoModelForSequenceClassification.from_pretrained(tiny_bert, num_labels=3)
    expected = logits(AutoModelForSequenceClassification.from_pretrained(folder / "model"))
    torch.testing.assert_close(logits(PeftModel.from_pretrained(base, folder / "adapter")), expected, atol=1e-5, rtol=0)


def test_adapters_sit_above_frozen_blocks_whose_states_are_kept(train: Train, tied_llama: Path, tmp_path: Path) -> None:
    freeze = ("freeze.blocks=0", "freeze.embeddings=true", "finetune.steps=null", "finetune.epochs=2", "seed=5")
    assert "the states" not in done(train(*freeze, "freeze.cache=false", out="false")).err
    assert "the states of the training data took" in said(done(train(*freeze, "finetune.adapter=null", out="plain")))
    assert "the states of the training data are there from before" in said(done(train(*freeze, out="true")))
    assert losses(tmp_path / "true") == pytest.approx(losses(tmp_path / "false"), abs=1e-5)
    assert {re.search(r"layers\.(\d)", name)[1] for name in adapter(tmp_path / "true")} == {"1"}  # type: ignore[index]
    before, after = weights(tied_llama), weights(tmp_path / "true" / "finetune" / "model")
    assert before.keys() - still(before, after) == {n for n in before if ".1." in n and PRODUCTS.search(n)}


@pytest.mark.parametrize("start", ["run", "folder"])
def test_training_goes_on_from_an_adapter(start: str, train: Train, trained: Trained, tmp_path: Path) -> None:
    folder = trained.run if start == "run" else trained.run / "finetune" / "adapter"
    setting = f"finetune.adapter={{start: {folder}}}"
    done(train(setting, "finetune.lr=1e-30", "finetune.weight_decay=0", "finetune.steps=1", out="again"))
    assert same_bits(adapter(tmp_path / "again"), adapter(trained.run))
    assert same_bits(*(weights(run / "finetune" / "model") for run in (tmp_path / "again", trained.run)))
    done(train(setting, out="further"))
    assert losses(tmp_path / "further")[0] < losses(trained.run)[0]
    assert not still(adapter(trained.run), adapter(tmp_path / "further"))


def test_another_adapter_to_start_from_trains_again(train: Train, trained: Trained, tmp_path: Path) -> None:
    shutil.copytree(trained.run, tmp_path / "first")
    setting = f"finetune.adapter={{start: {tmp_path / 'first'}}}"
    done(train(setting))
    assert "finetune unchanged" in done(train(setting)).err
    file = tmp_path / "first" / "finetune" / "adapter" / "adapter_model.safetensors"
    save_file({name: tensor + 1 for name, tensor in load_file(file).items()}, file)
    assert "the adapter to start from" in said(done(train(setting)))


def test_an_adapter_that_is_not_there_is_named(train: Train, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    done(train("finetune.adapter=null", "finetune.steps=1", out="full"))
    for start in ("nowhere", "empty", "full"):
        outcome = train(f"finetune.adapter={{start: {tmp_path / start}}}")
        refused(outcome, 4, "there is no adapter", tmp_path / start, "adapter_config.json", "finetune.adapter.start")


def test_an_adapter_of_another_model_is_refused(
    train: Train, trained: Trained, tiny_llama: Path, tmp_path: Path
) -> None:
    from transformers import AutoConfig, AutoModelForCausalLM

    shutil.copytree(tiny_llama, tmp_path / "other")
    config = AutoConfig.from_pretrained(tmp_path / "other", hidden_size=16)
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "other")
    outcome = train(f"finetune.adapter={{start: {trained.run}}}", model=tmp_path / "other")
    refused(outcome, 4, "the adapter does not fit the model", "adapter_model.safetensors")


def test_the_rate_for_adapters_is_told_with_its_source(train: Train, tmp_path: Path) -> None:
    done(train("finetune.lr=auto", "finetune.steps=1"))
    guess = record(tmp_path / "run")["guesses"]["finetune.lr"]
    assert guess["value"] == 2e-4
    assert "adapters" in guess["source"]


def test_it_is_said_how_much_learns(trained: Trained) -> None:
    learning = sum(tensor.numel() for tensor in adapter(trained.run).values())
    assert f"lora beside 6 linear layers: {learning:,} parameters learn" in " ".join(trained.err.split())


def planned(outcome: Outcome) -> tuple[str, str]:
    """How many parameters learn and how many do not, says a plan."""
    found = re.search(r"trainable ([\d,]+) parameters .* frozen ([\d,]+) parameters", " ".join(outcome.out.split()))
    assert found is not None, outcome.out
    return found[1], found[2]


@pytest.mark.usefixtures("rate")
@pytest.mark.parametrize(("kind", "more"), [("lora", ("freeze.blocks=0",)), ("dora", ())])
def test_a_plan_counts_what_learns(
    kind: str, more: tuple[str, ...], train: Train, tied_llama: Path, tmp_path: Path
) -> None:
    settings = (f"finetune.adapter={{name: {kind}, rank: 4}}", *more)
    found = planned(done(train(*settings, command="plan", out="plan", flags=("--measure",) if more else ())))
    done(train(*settings, "finetune.steps=1"))
    learning = sum(tensor.numel() for tensor in adapter(tmp_path / "run").values())
    standing = sum(tensor.numel() for tensor in weights(tied_llama).values())
    assert found == (f"{learning:,}", f"{standing:,}")
    rows = record(tmp_path / "run")["stages"]["finetune"]["facts"]["parameter_groups"]
    assert sum(parameters for _, _, parameters, *_ in rows) == learning


def test_what_is_scored_and_exported_is_the_merged_model(train: Train, tied_llama: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    done(train("finetune.steps=10", "evaluate.generate=1", "evaluate.precision=fp32", command="run"))
    results = json.loads((run / "evaluate" / "results.json").read_text())
    assert results["model"]["loss"] < results["parent"]["loss"]
    assert results["model"]["loss"] == pytest.approx(
        record(run)["stages"]["finetune"]["metrics"]["eval_loss"], rel=1e-4
    )
    exported = weights(run / "export" / "transformers")
    assert same_bits(exported, weights(run / "finetune" / "model"))
    assert exported.keys() == weights(tied_llama).keys()


def test_a_stop_ends_with_the_same_bits(train: Train, tmp_path: Path) -> None:
    from llmkit.train.hooks.progress import ProgressHook

    after = ProgressHook.after_step

    def after_step(self: Any, state: Any, values: dict[str, Any]) -> None:
        after(self, state, values)
        if state.step == 2:
            os.kill(os.getpid(), signal.SIGTERM)

    setting = "finetune.adapter={name: dora, dropout: 0.2}"
    done(train(setting, out="whole"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ProgressHook, "after_step", after_step)
        assert train(setting, out="parts").code == 75
    done(train(setting, out="parts"))
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    assert same_bits(adapter(whole), adapter(parts))
    assert same_bits(weights(whole / "finetune" / "model"), weights(parts / "finetune" / "model"))
    assert losses(whole) == losses(parts)


def test_without_peft_it_is_said_what_to_install(train: Train, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "peft", None)
    refused(train(), 2, "no peft", "pip install 'llmkit[adapters]'")


@pytest.mark.parametrize(
    ("settings", "needles"),
    [
        (("finetune.adapter={blocks: 0}", "freeze.blocks=0"), ("blocks that stand still", "adapter.blocks")),
        (("finetune.adapter={blocks: 7}",), ("no block 7", "0 to 1", "adapter.blocks")),
        (("freeze={blocks: all}",), ("nothing to put adapters beside", "do not stand still")),
        (("freeze={unfreeze: ulmfit}",), ("cannot thaw", "freeze.unfreeze")),
    ],
)
def test_what_cannot_be_is_refused(settings: tuple[str, ...], needles: tuple[str, ...], train: Train) -> None:
    refused(train(*settings), 2, *needles)


RECIPE = """\
name: adapters
task: chat
model: MODEL
data: {train: DATA, eval: 20%}
finetune:
  steps: 1
  adapter:
"""


@pytest.mark.parametrize(
    ("lines", "line", "needles"),
    [
        ("    rnak: 4\n", 8, ("finetune.adapter.rnak", "did you mean `rank`?")),
        ("    name: loar\n", 8, ("finetune.adapter.name", "did you mean `lora`?")),
        ("    name: dora\n    rank: 0\n", 9, ("finetune.adapter.rank", "0")),
        ("    alpha: -1\n", 8, ("finetune.adapter.alpha", "-1")),
        ("    targets: mpl\n", 8, ("finetune.adapter.targets", "did you mean `mlp`?")),
        ("    rank: 4\n    dropout: 1\n", 9, ("finetune.adapter.dropout", "1")),
        ("    blocks: [1, 2]\n", 8, ("finetune.adapter.blocks", "0-19")),
        ("    start: ''\n", 8, ("finetune.adapter.start",)),
    ],
)
def test_a_mistake_has_its_line(
    lines: str, line: int, needles: tuple[str, ...], cli: Cli, tied_llama: Path, chat_rows: Path, tmp_path: Path
) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text(RECIPE.replace("MODEL", str(tied_llama)).replace("DATA", str(chat_rows)) + lines)
    refused(cli("run", path, "-o", tmp_path / "run"), 2, f"{path}:{line}", *needles)
    assert not (tmp_path / "run").exists()


def test_a_misspelt_name_in_short_has_its_line(cli: Cli, tied_llama: Path, chat_rows: Path, tmp_path: Path) -> None:
    path = tmp_path / "recipe.yaml"
    text = RECIPE.replace("MODEL", str(tied_llama)).replace("DATA", str(chat_rows)).rstrip("\n")
    path.write_text(f"{text} drla\n")
    refused(cli("run", path, "-o", tmp_path / "run"), 2, f"{path}:7", "finetune.adapter", "lora")


def test_options_can_be_set_on_an_adapter_in_short(train: Train, tmp_path: Path) -> None:
    done(train("finetune.adapter=dora", "finetune.adapter.rank=4", "finetune.steps=1"))
    config = json.loads((tmp_path / "run" / "finetune" / "adapter" / "adapter_config.json").read_text())
    assert (config["r"], config["use_dora"]) == (4, True)


def test_the_recipe_in_the_run_works_from_any_folder(
    train: Train, trained: Trained, cli: Cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(trained.run.parent)
    done(train("finetune.adapter={start: run}", "finetune.steps=1"))
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    done(cli("finetune", tmp_path / "run"))


def test_the_base_of_an_adapter_is_what_it_was_trained_on(
    cli: Cli, tied_llama: Path, text_rows: Path, tmp_path: Path
) -> None:
    settings = (
        "stages=[preprocess,pretrain,finetune]",
        "pretrain.steps=1",
        "finetune.steps=1",
        "finetune.adapter=lora",
    )
    run = tmp_path / "run"
    given = [word for setting in settings for word in ("--set", setting)]
    done(cli("run", "-m", tied_llama, "-d", text_rows, "-o", run, *given))
    config = json.loads((run / "finetune" / "adapter" / "adapter_config.json").read_text())
    assert Path(config["base_model_name_or_path"]) == run / "pretrain" / "model"


def test_an_adapter_that_was_lost_is_made_again(train: Train, tmp_path: Path) -> None:
    done(train("finetune.steps=1"))
    shutil.rmtree(tmp_path / "run" / "finetune" / "adapter")
    done(train("finetune.steps=1"))
    assert (tmp_path / "run" / "finetune" / "adapter").is_dir()


def test_wrong_blocks_are_refused_before_anything_runs(train: Train, tmp_path: Path) -> None:
    refused(train("finetune.adapter={blocks: 7}"), 2, "finetune.adapter.blocks")
    assert not (tmp_path / "run").exists()
