"""What the loop tells, evaluates and keeps."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from fitting import (
    COLUMNS,
    Recorder,
    by_hand,
    log_of,
    logged,
    make_fit,
    one_thread,
    random_corpus,
    same_bits,
    tiny_model,
    weights_of,
)

from llmkit.data.corpus import Corpus, CorpusWriter
from llmkit.errors import DataError, DivergedError

_one_thread = pytest.fixture(autouse=True)(one_thread)


@pytest.fixture
def corpora(tmp_path: Path) -> tuple[Corpus, Corpus]:
    return random_corpus(tmp_path / "train", 45), random_corpus(tmp_path / "eval", 21, seed=9)


def test_the_same_seed_gives_the_same_bits_and_another_does_not(tmp_path: Path, corpora: tuple[Corpus, Corpus]) -> None:
    found = []
    for name, seed in (("a", 3), ("b", 3), ("c", 4)):
        fit = make_fit(tmp_path / name, *corpora, model=tiny_model("gpt2", dropout=0.2), seed=seed, steps=4)
        fit.run([])
        found.append(weights_of(fit))
    assert same_bits(found[0], found[1])
    assert not same_bits(found[0], found[2])


def test_training_learns(tmp_path: Path, corpora: tuple[Corpus, Corpus]) -> None:
    fit = make_fit(tmp_path / "fit", *corpora, steps=40, lr=1e-2)
    before = fit.held_out_loss()
    state = fit.run([])
    assert state.eval_loss is not None
    assert state.eval_loss < before - 0.5
    assert state.eval_loss == fit.held_out_loss()


def test_the_held_out_loss_is_the_mean_over_all_supervised_tokens(
    tmp_path: Path, corpora: tuple[Corpus, Corpus]
) -> None:
    fit = make_fit(tmp_path / "fit", *corpora, model=tiny_model("gpt2", dropout=0.5))
    model = fit.model.eval()
    with torch.no_grad():
        expected = by_hand(model, corpora[1], range(len(corpora[1]))).item()
    model.train()
    for size in (1, 4, 100):
        fit.eval_batch_size = size
        assert fit.held_out_loss() == pytest.approx(expected, abs=1e-5)
    assert model.training, "dropout works again afterwards"


def test_hooks_and_counts(tmp_path: Path, corpora: tuple[Corpus, Corpus]) -> None:
    recorder = Recorder()
    fit = make_fit(tmp_path / "fit", *corpora, steps=7, eval_every=3)
    state = fit.run([recorder])
    assert recorder.of("step") == [1, 2, 3, 4, 5, 6, 7]
    assert [step for step, _ in recorder.evaluations] == [3, 6, 7]
    assert recorder.closed == 1
    steps = [fit.order.batch(step) for step in range(7)]
    tokens = sum(len(corpora[0][int(i)]["input_ids"]) for batch in steps for i in batch)
    supervised = sum(int(np.sum(corpora[0][int(i)]["supervised"][1:])) for batch in steps for i in batch)
    assert (state.tokens, state.supervised) == (tokens, supervised)
    assert recorder.of("tokens")[-1] == tokens
    weights = [sum(int(np.sum(corpora[0][int(i)]["supervised"][1:])) for i in batch) for batch in steps]
    assert state.train_loss == pytest.approx(np.average(recorder.of("loss"), weights=weights))
    assert state.best_loss == min(loss for _, loss in recorder.evaluations)


def test_the_log_has_every_nth_step_and_every_evaluation(tmp_path: Path, corpora: tuple[Corpus, Corpus]) -> None:
    fit = make_fit(tmp_path / "fit", *corpora, steps=7, eval_every=3, log_every=2)
    fit.run([logged(fit)])
    lines = log_of(fit)
    assert [line["step"] for line in lines if "loss" in line] == [1, 2, 4, 6, 7]
    assert [line["step"] for line in lines if "eval_loss" in line] == [3, 6, 7]
    assert set(lines[0]) == {"stage", "step", "tokens", "loss", "lr", "grad_norm"}


@pytest.mark.parametrize("keep", ["best", "last"])
def test_the_model_holds_the_best_or_the_last_weights(
    tmp_path: Path, corpora: tuple[Corpus, Corpus], keep: Any
) -> None:
    seen: dict[int, dict[str, torch.Tensor]] = {}
    fit = make_fit(tmp_path / "fit", *corpora, steps=8, eval_every=1, lr=0.3, schedule="constant", keep=keep)
    recorder = Recorder({step: lambda step=step: seen.update({step: weights_of(fit)}) for step in range(1, 9)})
    state = fit.run([recorder])
    best = min(recorder.evaluations, key=lambda evaluation: evaluation[1])[0]
    assert best == state.best_step
    assert best < 8, "the rate is so high that the first steps are the best"
    assert same_bits(weights_of(fit), seen[best if keep == "best" else 8])


def test_steps_by_epochs(tmp_path: Path, corpora: tuple[Corpus, Corpus]) -> None:
    for epochs, steps in ((None, 6), (1.0, 6), (2.0, 12), (0.5, 3), (0.01, 1), (2.5, 15)):
        assert make_fit(tmp_path / "fit", *corpora, steps=None, epochs=epochs).total_steps == steps
    fit = make_fit(tmp_path / "fit", *corpora, steps=200, warmup="3%")
    assert (fit.total_steps, fit.warmup_steps) == (200, 6)


def test_without_held_out_data_the_last_weights_are_the_model(tmp_path: Path, corpora: tuple[Corpus, Corpus]) -> None:
    empty = CorpusWriter(tmp_path / "empty", COLUMNS).finish({})
    for held_out in (None, empty):
        recorder = Recorder()
        fit = make_fit(tmp_path / "fit", corpora[0], held_out, steps=3, eval_every=1)
        state = fit.run([recorder])
        assert recorder.evaluations == []
        assert (state.eval_loss, state.best_step, state.step) == (None, None, 3)
        assert fit.keeper.disposable(state) == (fit.folder / "checkpoints", fit.keeper.best_file)
    with pytest.raises(DataError, match="no example to train on"):
        make_fit(tmp_path / "fit", empty)


def test_a_held_out_loss_that_is_not_finite_is_divergence(tmp_path: Path, corpora: tuple[Corpus, Corpus]) -> None:
    fit = make_fit(tmp_path / "fit", *corpora, steps=3, eval_every=1)

    def break_it() -> None:
        with torch.no_grad():
            fit.model.lm_head.weight.fill_(float("nan"))

    recorder = Recorder({2: break_it})
    with pytest.raises(DivergedError, match="held-out loss"):
        fit.run([recorder])
    assert recorder.closed == 1
    assert fit.state.best_step == 1


def test_frozen_parameters_stay_and_the_others_move(tmp_path: Path, corpora: tuple[Corpus, Corpus]) -> None:
    model = tiny_model()
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("layers.1" in name)
    fit = make_fit(tmp_path / "fit", *corpora, model=model, steps=5, eval_every=2, weight_decay=0.5)
    before = weights_of(fit)
    fit.run([])
    for name, value in weights_of(fit).items():
        assert torch.equal(value, before[name]) == ("layers.1" not in name), name


def test_saving_by_time(tmp_path: Path, corpora: tuple[Corpus, Corpus]) -> None:
    fit = make_fit(tmp_path / "fit", *corpora, steps=4, save_every="1h", keep="last")
    fit.run([])
    assert not list((fit.folder / "checkpoints").iterdir()), "rehearsed, and nothing left of that"
    fit = make_fit(tmp_path / "fit", *corpora, steps=4, save_every="0.000001s", keep="last", keep_checkpoints=9)
    fit.run([])
    assert len(list((fit.folder / "checkpoints").iterdir())) == 3, "after each step but the last"
