"""The average of the weights is the one that can be written down, and is what is evaluated and kept."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from fitting import Recorder, by_hand, make_fit, one_thread, random_corpus, same_bits, tiny_model, weights_of
from safetensors.torch import load_file

from llmkit.data.corpus import Corpus
from llmkit.train.loop import Fit

_one_thread = pytest.fixture(autouse=True)(one_thread)
DECAY = 0.6
Weights = dict[str, torch.Tensor]


@pytest.fixture
def corpora(tmp_path: Path) -> tuple[Corpus, Corpus]:
    return random_corpus(tmp_path / "train", 45), random_corpus(tmp_path / "eval", 12, seed=9)


def masters_of(fit: Fit) -> Weights:
    return {name: weight.detach().clone() for name, weight in fit.masters.weights.items()}


def averaged_by_hand(start: Weights, after: list[Weights]) -> list[Weights]:
    """The average after each step."""
    found, average = [], start
    for step, weights in enumerate(after, 1):
        keep = min(DECAY, (1 + step) / (10 + step))
        average = {name: keep * average[name] + (1 - keep) * value for name, value in weights.items()}
        found.append(average)
    return found


def train(folder: Path, corpora: tuple[Corpus, Corpus], **given: Any) -> tuple[Fit, Recorder, list[Weights]]:
    """The Fit, what was told, and the averages by hand."""
    fit = make_fit(folder, *corpora, ema=DECAY, lr=2e-2, **given)
    start, after = masters_of(fit), []
    recorder = Recorder({step: lambda: after.append(masters_of(fit)) for step in range(1, 20)})
    fit.run([recorder])
    return fit, recorder, averaged_by_hand(start, after)


def close(one: Weights, other: Weights) -> None:
    assert one.keys() == other.keys()
    for name, value in one.items():
        torch.testing.assert_close(value, other[name], atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_the_last_model_is_the_average_by_hand(tmp_path: Path, corpora: tuple[Corpus, Corpus], precision: str) -> None:
    fit, _, expected = train(tmp_path / "fit", corpora, precision=precision, keep="last", steps=12)
    close(weights_of(fit), expected[-1])
    for name, parameter in fit.model.named_parameters():
        assert torch.equal(parameter, fit.masters.weights[name].to(parameter.dtype)), "the model computes with it"


def test_evaluation_and_the_best_model_use_the_average(tmp_path: Path, corpora: tuple[Corpus, Corpus]) -> None:
    fit, recorder, expected = train(tmp_path / "fit", corpora, eval_every=1, steps=8)
    model = tiny_model().eval()
    for (step, loss), average in zip(recorder.evaluations, expected, strict=True):
        model.load_state_dict(average)
        with torch.no_grad():
            assert loss == pytest.approx(by_hand(model, corpora[1], range(12)).item(), abs=1e-5), step
    assert fit.state.best_step is not None
    close(weights_of(fit), expected[fit.state.best_step - 1])
    close(load_file(fit.keeper.best_file), expected[fit.state.best_step - 1])


def test_averaging_does_not_change_the_training(tmp_path: Path, corpora: tuple[Corpus, Corpus]) -> None:
    with_average, without = Recorder(), Recorder()
    make_fit(tmp_path / "a", *corpora, eval_every=2, ema=DECAY).run([with_average])
    make_fit(tmp_path / "b", *corpora, eval_every=2).run([without])
    assert with_average.of("loss") == without.of("loss")
    assert with_average.evaluations != without.evaluations


def test_the_best_average_of_an_earlier_step(tmp_path: Path, corpora: tuple[Corpus, Corpus]) -> None:
    options: dict[str, Any] = {"eval_every": 1, "lr": 1.0, "schedule": "constant", "ema": DECAY, "steps": 10}
    fit = make_fit(tmp_path / "fit", *corpora, **options)
    state = fit.run([])
    assert state.best_step is not None
    assert state.best_step < 10
    assert fit.held_out_loss() == pytest.approx(state.best_loss, abs=1e-6)
    again = make_fit(tmp_path / "fit", *corpora, **options)
    assert again.resume()
    again.run([])
    assert same_bits(weights_of(again), weights_of(fit))


def test_without_held_out_data_the_average_is_the_model(tmp_path: Path, corpora: tuple[Corpus, Corpus]) -> None:
    fit = make_fit(tmp_path / "fit", corpora[0], ema=DECAY, steps=5)
    start, after = masters_of(fit), []
    fit.run([Recorder({step: lambda: after.append(masters_of(fit)) for step in range(1, 6)})])
    close(weights_of(fit), averaged_by_hand(start, after)[-1])
