"""Whatever is trained and however: killed between two steps and started again, a run ends with the same bits and log."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from conftest import Cli, sentence, write_rows

from llmkit.data import stream as streams
from llmkit.files import digest_file
from llmkit.run.log import read_metrics
from llmkit.train.loop import Fit

COMMON = (
    *("finetune.steps=9", "finetune.batch_size=6", "finetune.lr=1e-2", "finetune.save_every=2", "finetune.log_every=1"),
    *("finetune.eval_every=3", "finetune.trackers=[]"),
)
FP32, BF16 = "finetune.precision=fp32", "finetune.precision=bf16"
GPT2 = "{model_type: gpt2, n_embd: 32, n_layer: 2, n_head: 4, n_positions: 64, resid_pdrop: 0.1, attn_pdrop: 0.1}"
PRETRAIN = (
    "stages=[preprocess,pretrain,finetune]",
    f"pretrain={{architecture: {GPT2}, tokenizer: {{train: bpe, vocab_size: 400}}, steps: 9, lr: 1.0e-2, save_every: 2, "
    "log_every: 1, trackers: [], PRECISION}",
    "data.max_length=64",
)
CASES: dict[str, tuple[str, str, tuple[str, ...]]] = {
    "text, fp32": ("text", "llama", (FP32,)),
    "text, bf16": ("text", "llama", (BF16,)),
    "chat, fp32": ("chat", "llama", (FP32, "finetune.dropout=0.1")),
    "chat, bf16": ("chat", "llama", (BF16, "finetune.dropout=0.1")),
    "classify, fp32": ("classify", "bert", (FP32,)),
    "classify, bf16": ("classify", "bert", (BF16,)),
    "classify with a decoder": ("classify", "llama", (FP32,)),
    "pretrained, fp32": ("text", "none", (*PRETRAIN, FP32)),
    "pretrained, bf16": ("text", "none", (*PRETRAIN, BF16)),
    "by tokens": ("chat", "llama", (FP32, "finetune.batch_size=null", "finetune.batch_tokens=150")),
    "in parts": ("chat", "llama", (FP32, "finetune.micro_batch_size=2", "finetune.neftune_alpha=5")),
    "recomputed": ("chat", "llama", (BF16, "finetune.activation_checkpointing=true", "finetune.dropout=0.1")),
    "streamed": ("text", "llama", (FP32, "data.stream=true", "data.eval=null", "finetune.eval_every=null")),
    "streamed, bf16": ("text", "llama", (BF16, "data.stream=true", "data.eval=null", "finetune.eval_every=null")),
    "lora": ("chat", "llama", (FP32, "finetune.adapter={name: lora, rank: 4, dropout: 0.1}")),
    "lora, bf16": ("chat", "llama", (BF16, "finetune.adapter={name: lora, rank: 4, dropout: 0.1}")),
    "dora": ("classify", "bert", (FP32, "finetune.adapter=dora")),
    "frozen": ("chat", "llama", (FP32, "freeze={blocks: 0, embeddings: true}")),
    "unfreezing": (
        "chat",
        "llama",
        (FP32, "freeze={blocks: all, embeddings: true, unfreeze: [{at: 3, blocks: 1}, {at: 6, blocks: 0}]}"),
    ),
    "unfreezing, bf16": ("chat", "llama", (BF16, "freeze={embeddings: true, unfreeze: ulmfit}")),
    "averaged": ("chat", "llama", (BF16, "finetune.ema=0.7", "finetune.keep=last")),
    "towards the parent": ("chat", "llama", (FP32, "finetune.l2_sp=0.1", "finetune.layer_decay=0.7")),
    "with a plateau": (
        "chat",
        "llama",
        (FP32, "finetune.eval_every=1", "finetune.schedule={name: plateau, patience: 1}"),
    ),
    "replayed": ("text", "llama", (FP32, "data.replay=TEXTS", "data.replay_share=20%")),
    "sgd": ("classify", "llama", (FP32, "finetune.optimizer={name: sgd, momentum: 0.9}")),
    "adafactor": ("text", "llama", (FP32, "finetune.optimizer=adafactor")),
    "muon": ("text", "llama", (FP32, "finetune.optimizer=muon")),
}


@dataclass
class Bench:
    """Runs a case with everything that it needs."""

    cli: Cli
    folder: Path
    models: dict[str, Path]

    def run(self, name: str, run: str) -> Any:
        task, model, settings = CASES[name]
        rows = self.folder / f"{task}.jsonl"
        if not rows.exists():
            write_rows(rows, (_row(task, number) for number in range(60)))
            write_rows(self.folder / "more.jsonl", ({"text": sentence(n + 500)} for n in range(30)))
        precision = f"precision: {settings[-1].rpartition('=')[2]}"
        told = [setting.replace("PRECISION", precision) for setting in settings]
        told = [setting.replace("TEXTS", str(self.folder / "more.jsonl")) for setting in told]
        freezes = any(setting.startswith("freeze=") for setting in told)
        stages = ["stages=[preprocess,freeze,finetune]" if freezes else "stages=[preprocess,finetune]"]
        if model == "none":  # a model comes from the recipe alone
            recipe = write_rows(self.folder / "recipe.yaml", [{"name": "one", "task": task, "pretrain": {"steps": 9}}])
            words = [str(recipe)]
        else:
            words = ["--model", str(self.models[model]), "--task", task]
        words += [w for s in ("name=one", "data.eval=20%", *stages, *COMMON, *told) for w in ("--set", s)]
        return self.cli("run", *words, "--data", rows, "-o", self.folder / run, "--json")


def _row(task: str, number: int) -> dict[str, Any]:
    text = sentence(number)
    if task == "chat":
        turns = [{"role": "user", "content": text}, {"role": "assistant", "content": text.split()[1]}]
        return {"messages": turns}
    return {"text": text} | ({"label": "abc"[number % 3]} if task == "classify" else {})


@pytest.fixture
def bench(cli: Cli, tmp_path: Path, tiny_llama: Path, tiny_bert: Path, monkeypatch: pytest.MonkeyPatch) -> Bench:
    monkeypatch.setattr(streams.Stream.__init__, "__defaults__", (1500,))
    return Bench(cli, tmp_path, {"llama": tiny_llama, "bert": tiny_bert})


def left(run: Path) -> dict[str, Any]:
    found: dict[str, Any] = {str(p.relative_to(run)): digest_file(p) for p in sorted(run.glob("*/model/*.safetensors"))}
    kept = ("stage", "step", "loss", "eval_loss", "tokens", "grad_norm", "lr", "event")
    found["log"] = [[line.get(key) for key in kept] for line in read_metrics(run / "metrics.jsonl")]
    stages = json.loads((run / "run.json").read_text())["stages"]
    found["metrics"] = {
        f"{stage}.{name}": value
        for stage, entry in stages.items()
        for name, value in entry["metrics"].items()
        if not any(word in name for word in ("second", "memory"))
    }
    return found


FAST = ("text, fp32", "chat, bf16", "classify, fp32", "pretrained, bf16", "streamed", "lora, bf16", "unfreezing")


@pytest.mark.parametrize("name", [n if n in FAST else pytest.param(n, marks=pytest.mark.slow) for n in CASES])
def test_killed_and_started_again_it_ends_as_if_nothing_had_been(
    bench: Bench, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = bench.run(name, "whole")
    assert whole.code == 0, whole.err
    expected = left(bench.folder / "whole")
    real, stages = Fit._step, 2 if name.startswith("pretrained") else 1
    deaths = (4, 7) if name in FAST else (5,)
    lives, died = 0, []
    while True:
        lives += 1

        def dies(fit: Fit, *rest: Any) -> Any:
            place = (fit.folder.name, fit.state.step)
            if fit.state.step in deaths and place not in died:
                died.append(place)
                raise RuntimeError("the machine went down")
            return real(fit, *rest)

        with monkeypatch.context() as patch:
            patch.setattr(Fit, "_step", dies)
            done = bench.run(name, "parts")
        if done.code == 0:
            break
        assert "the machine went down" in str(done.json["got"]), done.out
        assert lives < 9
    assert len(died) == len(deaths) * stages
    assert left(bench.folder / "parts") == expected
    once = [
        (line["stage"], line["step"])
        for line in read_metrics(bench.folder / "parts" / "metrics.jsonl")
        if "loss" in line
    ]
    assert len(once) == len(set(once)) == 9 * stages
