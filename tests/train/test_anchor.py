"""The pull towards the parent's weights: as weight decay, but towards what was learnt before."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from fitting import make_fit, one_thread, random_corpus

from llmkit.train.loop import Fit

_one_thread = pytest.fixture(autouse=True)(one_thread)
PLAIN = {"schedule": "constant", "warmup": 0, "weight_decay": 0.0, "max_grad_norm": None}


def now(fit: Fit) -> dict[str, torch.Tensor]:
    return {name: weight.detach().clone() for name, weight in fit.masters.weights.items()}


def distance(fit: Fit, start: dict[str, torch.Tensor]) -> float:
    return sum(float((weight - start[name]).square().sum()) for name, weight in now(fit).items())


def trained(folder: Path, strength: float, **settings: Any) -> tuple[Fit, dict[str, torch.Tensor]]:
    folder.mkdir()
    fit = make_fit(folder / "fit", random_corpus(folder / "corpus", 24), **(PLAIN | {"steps": 6} | settings))
    start = now(fit)
    if strength:
        fit.masters.anchor(fit.masters.weights, strength)
    fit.run([])
    return fit, start


def test_one_step_of_sgd_is_taken_back_by_rate_times_strength(tmp_path: Path) -> None:
    optimizer = {"name": "sgd", "momentum": 0.0}
    free, start = trained(tmp_path / "free", 0.0, steps=1, lr=0.1, optimizer=optimizer)
    pulled, _ = trained(tmp_path / "pulled", 3.0, steps=1, lr=0.1, optimizer=optimizer)
    for name, weight in now(pulled).items():
        expected = now(free)[name] + 0.1 * 3.0 * (start[name] - now(free)[name])
        torch.testing.assert_close(weight, expected)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_the_stronger_the_pull_the_nearer_the_parent(precision: str, tmp_path: Path) -> None:
    found = []
    for strength in (0.0, 1.0, 10.0):
        fit, start = trained(tmp_path / str(strength), strength, lr=1e-2, precision=precision)
        found.append(distance(fit, start))
    assert found[0] > found[1] > found[2] > 0


def test_what_is_not_anchored_moves_as_without(tmp_path: Path) -> None:
    corpus = random_corpus(tmp_path / "corpus", 24)
    fit = make_fit(tmp_path / "fit", corpus, steps=1, lr=1e-2, **PLAIN)
    plain = make_fit(tmp_path / "plain", corpus, steps=1, lr=1e-2, **PLAIN)
    some = [name for name in fit.masters.weights if "mlp" in name]
    fit.masters.anchor(some, 10.0)
    fit.run([])
    plain.run([])
    for name, weight in now(fit).items():
        assert torch.equal(weight, now(plain)[name]) == (name not in some), name
