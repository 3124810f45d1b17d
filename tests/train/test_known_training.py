"""Training on top of a frozen prefix whose states are kept: the same losses, and nothing that stands still moves."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from fitting import Recorder, log_of, logged, make_fit, moments_of, one_thread, same_bits, tiny_model, weights_of
from killing import KilledError, corpora, kill  # noqa: F401  (a fixture is among them)
from knowing import frozen, with_known

from llmkit.data.corpus import Corpus
from llmkit.data.states import STATES
from llmkit.train.loop import Fit

_one_thread = pytest.fixture(autouse=True)(one_thread)
WAYS: dict[str, dict[str, Any]] = {
    "plain": {},
    "head only": {"depth": 2},
    "dropout": {"model": ("gpt2", 0.2)},
    "micro-batches": {"micro_batch_size": 3, "model": ("gpt2", 0.2)},
    "checkpointing": {"activation_checkpointing": True, "model": ("gpt2", 0.2)},
    "average": {"ema": 0.8, "keep": "last"},
}


@pytest.fixture
def build(corpora: tuple[Corpus, Corpus], tmp_path: Path) -> Callable[..., Fit]:
    """A Fit whose frozen part computes without dropout; `known` are the examples whose states are kept, or True."""

    def make(name: str, way: str, known: Any = False, **changes: Any) -> Fit:
        given = WAYS[way] | changes
        (family, dropout), depth = given.pop("model", ("llama", 0.0)), given.pop("depth", 1)
        model = frozen(tiny_model(family, dropout=dropout), depth)
        fit = make_fit(tmp_path / name, *corpora, model=model, **({"eval_every": 4} | given))
        fit.frozen_dropout = False
        if known is False:
            return fit
        folder = tmp_path / f"{way}-{'all' if known is True else len(known)}"
        return with_known(fit, depth, folder, None if known is True else known)

    return make


def losses(fit: Fit) -> tuple[list[float], list[float]]:
    recorder = Recorder()
    fit.run([recorder])
    return recorder.of("loss"), [loss for _, loss in recorder.evaluations]


@pytest.mark.parametrize("way", WAYS)
def test_losses_are_those_without(way: str, build: Callable[..., Fit]) -> None:
    plain = build("plain", way)
    expected = losses(plain)
    known = build("known", way, known=True)
    before = weights_of(known)
    found = losses(known)
    assert len(found[0]) == 12
    assert len(found[1]) == 3
    assert found[0] == pytest.approx(expected[0], abs=1e-5)
    assert found[1] == pytest.approx(expected[1], abs=1e-5)
    after = weights_of(known)
    still = {name for name, parameter in known.model.named_parameters() if not parameter.requires_grad}
    assert {name for name in before if torch.equal(before[name], after[name])} == still
    assert after.keys() == weights_of(plain).keys()


@pytest.mark.parametrize("count", [1, 20])
def test_losses_are_those_without_where_not_all_is_known(count: int, build: Callable[..., Fit]) -> None:
    expected = losses(build("plain", "plain"))
    found = losses(build("known", "plain", known=range(count)))
    assert found[0] == pytest.approx(expected[0], abs=1e-5)
    assert found[1] == pytest.approx(expected[1], abs=1e-5)


def test_in_bf16_losses_are_close_to_those_without(build: Callable[..., Fit]) -> None:
    known = build("known", "plain", known=True, precision="bf16")
    assert known.train[0][STATES][1] == "bfloat16", "as they are"
    expected = losses(build("plain", "plain", precision="bf16"))
    assert losses(known)[0] == pytest.approx(expected[0], rel=0.02)


def test_what_moves_keeps_its_dropout(build: Callable[..., Fit]) -> None:
    with_dropout = losses(build("known", "dropout", known=True))
    without = losses(build("none", "dropout", known=True, model=("gpt2", 0.0)))
    assert with_dropout[0] != pytest.approx(without[0], abs=1e-3)


@pytest.mark.parametrize("killed_after", [3, 9])
@pytest.mark.parametrize(("way", "known"), [("micro-batches", True), ("dropout", range(20))])
def test_killed_and_resumed_ends_with_the_same_bits(
    way: str, known: Any, killed_after: int, build: Callable[..., Fit]
) -> None:
    never_killed = build("never-killed", way, known)
    never_killed.run([logged(never_killed)])
    fit = build("fit", way, known, save_every=1)
    with pytest.raises(KilledError):
        fit.run([logged(fit), Recorder({killed_after: kill})])
    torch.manual_seed(99)
    again = build("fit", way, known, save_every=1)
    with torch.no_grad():
        for parameter in again.model.parameters():
            if parameter.requires_grad:
                parameter.fill_(7.0)
    assert again.resume()
    assert again.state.step == killed_after - 1
    again.run([logged(again)])
    assert same_bits(weights_of(again), weights_of(never_killed))
    assert same_bits(moments_of(again), moments_of(never_killed))
    assert log_of(again) == log_of(never_killed)
