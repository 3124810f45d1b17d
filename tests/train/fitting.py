"""Small trainings for the tests: tiny models from a config, random corpora, and a Fit over them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from datetime import timedelta
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from accelerate import Accelerator
from transformers import AutoConfig, AutoModelForCausalLM, GPT2Config, PretrainedConfig, PreTrainedModel

from llmkit.data.corpus import Column, Corpus, CorpusWriter
from llmkit.model.groups import Rates, parameter_groups
from llmkit.optim import build_optimizer, build_schedule
from llmkit.recipe.training import Training
from llmkit.run.log import MetricsLog, read_metrics
from llmkit.stages.sizing import shape_computation
from llmkit.tasks.base import Regularisation, TaskSettings
from llmkit.tasks.causal import CausalTask
from llmkit.train.hooks.metrics_log import MetricsLogHook
from llmkit.train.loop import Fit
from llmkit.train.masters import Masters
from llmkit.train.mesh import Mesh
from llmkit.train.sharding import ShardedMasters
from llmkit.train.state import TrainState, seed_everything
from llmkit.train.step import StepResult
from llmkit.train.when import logged_steps
from llmkit.train.zero import Zero, ZeroMasters

FAMILIES = ("llama", "gpt2", "mistral", "qwen2", "qwen3", "gemma2", "granite", "cohere")
WORDS = 61
COLUMNS = {"input_ids": Column("uint8"), "supervised": Column("bool")}


def tiny_config(family: str, dropout: float = 0.0, **changes: Any) -> PretrainedConfig:
    """A config of two blocks. Windows are shorter than most examples of `random_corpus`."""
    shape = {
        "vocab_size": WORDS,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 64,
        "attention_dropout": dropout,
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": 2,
    }
    own: dict[str, dict[str, Any]] = {
        "mistral": {"sliding_window": 6},
        "qwen2": {"use_sliding_window": True, "sliding_window": 6, "max_window_layers": 1},
        "qwen3": {"head_dim": 8},
        "gemma2": {
            "sliding_window": 6,
            "head_dim": 8,
            "attn_logit_softcapping": 2.0,
            "final_logit_softcapping": 3.0,
            "query_pre_attn_scalar": 8,
        },
        "granite": {"logits_scaling": 3.0, "attention_multiplier": 0.3, "residual_multiplier": 0.7},
        "cohere": {"logit_scale": 0.4},
    }
    if family == "gpt2":
        rates = dict.fromkeys(("attn_pdrop", "embd_pdrop", "resid_pdrop", "summary_first_dropout"), dropout)
        size = {"vocab_size": WORDS, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64}
        return GPT2Config(**(size | {"bos_token_id": 1, "eos_token_id": 2} | rates | changes))
    return AutoConfig.for_model(family, **(shape | own.get(family, {}) | changes))


def tiny_model(family: str = "llama", *, dropout: float = 0.0, seed: int = 1, **changes: Any) -> PreTrainedModel:
    """A causal language model of some thousand parameters."""
    config = tiny_config(family, dropout, **changes)
    config.use_cache = False
    torch.manual_seed(seed)
    model: PreTrainedModel = AutoModelForCausalLM.from_config(config)
    with torch.no_grad():  # large enough weights that position and padding would show
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.normal_(std=0.15)
    return model


def tiny_task() -> CausalTask:
    """Next-token prediction over corpora that hold token ids already."""
    tokenizer = SimpleNamespace(pad_token_id=0, eos_token_id=1, get_vocab=lambda: {str(i): i for i in range(WORDS)})
    return CausalTask(tokenizer, TaskSettings(64))


def random_corpus(folder: Path, count: int, seed: int = 0) -> Corpus:
    """Examples of 4 to 24 tokens that follow a rule with some noise, half of them supervised."""
    rng = np.random.default_rng(seed)
    writer = CorpusWriter(folder, COLUMNS)
    for _ in range(count):
        length = int(rng.integers(4, 25))
        ids = (np.arange(length) * rng.integers(1, 4) + rng.integers(0, WORDS) + rng.integers(0, 2, length)) % WORDS
        supervised = rng.random(length) < 0.5
        supervised[-1] = True
        writer.add({"input_ids": ids, "supervised": supervised})
    return writer.finish({})


def make_fit(folder: Path, train: Corpus, held_out: Corpus | None = None, **given: Any) -> Fit:
    """A Fit; keywords are those of a Training, and lr, model, precision, fingerprint, warn, accelerator, task, seed."""
    own = {
        "lr": 3e-3,
        "precision": "fp32",
        "fingerprint": "f",
        "warn": lambda text: None,
        "task": None,
        "accelerator": None,
        "model": None,
        "seed": 3,
        "sharded": False,  # or "deepspeed"
        "stage": 2,
        "offload": False,
        "tensor": 1,
        "context": 1,
    }
    own |= {key: given.pop(key) for key in tuple(given) if key in own}
    training = Training(**({"batch_size": 8, "steps": 12, "log_every": 1, "warmup": 2, "trackers": ()} | given))
    folder.mkdir(exist_ok=True)
    model = own["model"] if own["model"] is not None else tiny_model()
    accelerator = own["accelerator"] or Accelerator(cpu=True)
    mesh = Mesh(accelerator.process_index, accelerator.num_processes, own["tensor"], own["context"])
    seed_everything(own["seed"] + mesh.place)
    groups = parameter_groups(model, Rates(own["lr"]), weight_decay=training.weight_decay)
    options = training.optimizer.options
    objective = (own["task"] or tiny_task()).objective(
        model, Regularisation(training.label_smoothing, training.neftune_alpha)
    )
    if own["sharded"] == "deepspeed":
        zero = Zero(mesh.number, mesh.count, stage=own["stage"], offload=own["offload"])
        masters: Masters = ZeroMasters(model, own["precision"], zero, accelerator.device)
    elif own["sharded"]:
        masters = ShardedMasters(model, own["precision"], mesh)
    else:
        masters = Masters(model, own["precision"])
    if isinstance(masters, ShardedMasters) and mesh.context > 1:
        objective = objective.shared_with(masters.context())
    shape_computation(model, training)
    limit = training.micro_batch_tokens
    return Fit(
        accelerator=accelerator,
        masters=masters,
        objective=objective,
        optimizer=build_optimizer(training.optimizer.name, masters.adopt(groups), lr=own["lr"], options=options),
        schedule=build_schedule(training.schedule.name, training.schedule.options),
        training=training,
        train=train,
        held_out=held_out,
        size_column="input_ids",
        seed=own["seed"],
        precision=own["precision"],
        folder=folder,
        fingerprint=own["fingerprint"],
        warn=own["warn"],
        writers=masters.writers(timedelta(minutes=5)),
        state=TrainState(micro_batch_tokens=None if limit == "auto" else limit),
    )


class GivenOrder:
    """An order that was written down: `batches[step]`, and again from the first."""

    def __init__(self, lengths: np.ndarray, batches: Sequence[Sequence[int]]) -> None:
        self.lengths = lengths
        self.batches = [np.asarray(batch) for batch in batches]

    def batch(self, step: int) -> np.ndarray:
        return self.batches[step % len(self.batches)]


def give(fit: Fit, *batches: Sequence[int], micro_batch_size: int | None = None) -> Fit:
    """The same Fit, fed with these batches instead of its own."""
    fit.order = GivenOrder(fit.order.lengths, batches)  # type: ignore[assignment]
    fit.feeder.order = fit.order
    fit.feeder.micro_batch_size = micro_batch_size
    return fit


def take_step(fit: Fit, numbers: Sequence[int], rate: float = 1e-3, *, stop: bool = False) -> StepResult:
    """One step on these examples."""
    give(fit, numbers)
    fit.model.train()
    with fit.objective.computing():
        return fit.stepper.step(0, [rate] * len(fit.optimizer.param_groups), None, stop=stop)


def gradients(
    fit: Fit, numbers: Sequence[int], *, micro_batch_size: int | None = None, tokens: int | None = None
) -> tuple[float, dict[str, torch.Tensor], int]:
    """The mean loss of these examples, its gradients in fp32, and in how many micro-batches; without the update."""
    give(fit, numbers, micro_batch_size=micro_batch_size)
    fit.model.train()
    batches = fit.feeder.take(0, tokens)
    supervised = sum(fit.objective.count(batch) for batch in batches)
    with fit.objective.computing():
        loss, _ = fit.stepper._backward(batches, supervised, weigh=True)
    assert loss is not None, "memory ran out"
    fit.masters.gradients.div_(supervised)
    found = {name: weight.grad.clone() for name, weight in fit.masters.weights.items()}  # type: ignore[union-attr]
    return loss.item() / supervised, found, len(batches)


def by_hand(model: Any, corpus: Corpus, numbers: Sequence[int]) -> torch.Tensor:
    """The mean loss, one example at a time, without padding, from all logits, by the model's own attention."""
    total, count = torch.zeros(()), 0
    for number in numbers:
        ids = torch.from_numpy(np.asarray(corpus[number]["input_ids"], np.int64))
        chosen = torch.tensor(np.asarray(corpus[number]["supervised"]))[1:]
        logits = model(input_ids=ids[None], use_cache=False).logits[0, :-1]
        total = total + F.cross_entropy(logits[chosen].float(), ids[1:][chosen], reduction="sum")
        count += int(chosen.sum())
    return total / count


def gradients_by_hand(model: Any, corpus: Corpus, numbers: Sequence[int]) -> tuple[float, dict[str, torch.Tensor]]:
    """`by_hand`, with its gradients."""
    model.zero_grad()
    loss = by_hand(model, corpus, numbers)
    loss.backward()
    found = {name: p.grad.clone() for name, p in model.named_parameters() if p.requires_grad}
    model.zero_grad(set_to_none=True)
    return loss.item(), found


def check(found: tuple[float, dict[str, torch.Tensor]], expected: tuple[float, dict[str, torch.Tensor]]) -> None:
    assert found[0] == pytest.approx(expected[0], abs=1e-5)
    assert found[1].keys() == expected[1].keys()
    for name, gradient in expected[1].items():
        torch.testing.assert_close(found[1][name], gradient, atol=1e-5, rtol=1e-4, msg=lambda text, n=name: n + text)


def one_thread() -> Iterator[None]:
    """A fixture: the models are too small for more threads, and sums keep one order."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


class Recorder:
    """A hook that keeps what it is told, and calls `at[step]` after that step."""

    def __init__(self, at: dict[int, Any] | None = None) -> None:
        self.steps: list[dict[str, Any]] = []
        self.evaluations: list[tuple[int, float]] = []
        self.events: list[tuple[int, str, str]] = []
        self.saves: list[int] = []  # steps that had been told of before each
        self.closed = 0
        self.at = at or {}

    def after_step(self, state: TrainState, values: dict[str, Any]) -> None:
        self.steps.append({"step": state.step, "tokens": state.tokens, **values})
        if state.step in self.at:
            self.at[state.step]()

    def after_evaluation(self, state: TrainState, values: dict[str, Any]) -> None:
        self.evaluations.append((state.step, values["eval_loss"]))

    def after_event(self, state: TrainState, event: str, why: str) -> None:
        self.events.append((state.step, event, why))

    def before_save(self) -> None:
        self.saves.append(len(self.steps))

    def close(self) -> None:
        self.closed += 1

    def of(self, key: str) -> list[Any]:
        return [values[key] for values in self.steps]


def logged(fit: Fit) -> MetricsLogHook:
    """The metrics log that a stage would open for this Fit, next to its folder."""
    path = fit.folder.parent / f"{fit.folder.name}.jsonl"
    return MetricsLogHook(
        MetricsLog(path, "finetune", step=fit.state.step, refused=fit.state.refused_steps),
        logged_steps(fit.training.log_every, fit.total_steps),
    )


def log_of(fit: Fit) -> list[dict[str, Any]]:
    """What was logged, without time and memory, which are never the same."""
    lines = read_metrics(fit.folder.parent / f"{fit.folder.name}.jsonl")
    measured = ("tokens_per_second", "seconds", "peak_memory_bytes")
    return [{key: value for key, value in line.items() if key not in measured} for line in lines]


def weights_of(fit: Fit) -> dict[str, torch.Tensor]:
    """A copy of all parameters."""
    with fit.masters.in_full() as model:
        return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}


def moments_of(fit: Fit) -> dict[str, torch.Tensor]:
    """A copy of the optimizer's tensors."""
    state = fit.optimizer.state_dict()["state"]
    return {f"{n}.{key}": torch.as_tensor(value).clone() for n, e in state.items() for key, value in e.items()}


def same_bits(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    """True when both hold the same names with the same bits."""
    return one.keys() == other.keys() and all(torch.equal(value, other[name]) for name, value in one.items())


def facts_of(state: TrainState) -> dict[str, Any]:
    """The state without the time that it took."""
    return {key: value for key, value in state.to_json().items() if key not in ("seconds", "save_seconds")}
