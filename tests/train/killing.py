"""Trainings that are killed: in what ways they train, and when two of them ended alike."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import pytest
import torch
from fitting import (
    facts_of,
    log_of,
    logged,
    make_fit,
    moments_of,
    random_corpus,
    same_bits,
    tiny_model,
    weights_of,
)

from llmkit.data.corpus import Corpus
from llmkit.train.loop import Fit

# Of 45 examples in batches of 8, an epoch has 6 steps, the last of them smaller: 12 steps are two epochs.
WAYS: dict[str, dict[str, Any]] = {
    "plain": {},
    "dropout": {"model": ("gpt2", 0.2)},
    "micro-batches": {"micro_batch_size": 3, "model": ("gpt2", 0.1)},
    "bf16": {"precision": "bf16", "model": ("llama", 0.1)},
    "fp16": {"precision": "fp16"},
    "sgd": {"optimizer": "sgd"},
    "evaluations": {"eval_every": 2, "model": ("gpt2", 0.1)},
    "keep last": {"eval_every": 2, "keep": "last"},
    "early stopping": {"eval_every": 1, "early_stopping": {"patience": 4, "min_delta": 0.02}, "lr": 0.1},
    "average": {"ema": 0.8, "eval_every": 2, "model": ("gpt2", 0.1)},
    "everything": {
        "precision": "bf16",
        "ema": 0.8,
        "eval_every": 3,
        "micro_batch_tokens": 50,
        "batch_size": None,
        "batch_tokens": 110,
        "neftune_alpha": 5.0,
        "label_smoothing": 0.1,
        "model": ("gpt2", 0.1),
    },
}


class KilledError(Exception):
    """Stands for SIGKILL: nothing is saved."""


def kill() -> None:
    raise KilledError


@pytest.fixture(scope="session")
def corpora(tmp_path_factory: pytest.TempPathFactory) -> tuple[Corpus, Corpus]:
    folder = tmp_path_factory.mktemp("corpora")
    return random_corpus(folder / "train", 45), random_corpus(folder / "eval", 12, seed=9)


@pytest.fixture
def build(tmp_path: Path, corpora: tuple[Corpus, Corpus]) -> Callable[..., Fit]:
    def make(name: str, way: str, **changes: Any) -> Fit:
        return build_fit(tmp_path / name, corpora, WAYS[way] | changes)

    return make


def build_fit(folder: Path, corpora: tuple[Corpus, Corpus], given: dict[str, Any]) -> Fit:
    given = {"save_every": 1} | given
    family, dropout = given.pop("model", ("llama", 0.0))
    fit = make_fit(folder, *corpora, model=tiny_model(family, dropout=dropout), **given)
    if fit.stepper.scaler is not None:  # one that changes within the few steps of these tests
        fit.keeper.scaler = fit.stepper.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10, growth_interval=3)
    return fit


@dataclass(frozen=True)
class Outcome:
    """All that a training leaves, but for how long it took."""

    weights: dict[str, torch.Tensor]
    moments: dict[str, torch.Tensor]
    facts: dict[str, Any]
    log: list[dict[str, Any]]
    scale: float | None


def outcome(fit: Fit) -> Outcome:
    return Outcome(weights_of(fit), moments_of(fit), facts_of(fit.state), log_of(fit), scale_of(fit))


def scale_of(fit: Fit) -> float | None:
    return None if fit.stepper.scaler is None else fit.stepper.scaler.get_scale()


@pytest.fixture(scope="session")
def never_killed(tmp_path_factory: pytest.TempPathFactory, corpora: tuple[Corpus, Corpus]) -> Callable[[str], Outcome]:
    """What a way leads to without an interruption."""

    @lru_cache
    def reach(way: str) -> Outcome:
        fit = build_fit(tmp_path_factory.mktemp("never-killed") / "fit", corpora, WAYS[way])
        fit.run([logged(fit)])
        return outcome(fit)

    return reach


def check_same(fit: Fit, reference: Outcome) -> None:
    assert same_bits(weights_of(fit), reference.weights)
    assert same_bits(moments_of(fit), reference.moments)
    assert facts_of(fit.state) == reference.facts
    assert log_of(fit) == reference.log
    assert scale_of(fit) == reference.scale
