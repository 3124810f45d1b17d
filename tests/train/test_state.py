"""Which evaluation is the best, and when there have been too many without a gain."""

from __future__ import annotations

import json

from llmkit.recipe.training import EarlyStopping
from llmkit.train.state import TrainState


def after(losses: list[float], rule: EarlyStopping | None) -> TrainState:
    state = TrainState()
    for step, loss in enumerate(losses, 1):
        state.step = step
        assert state.note_evaluation(loss, rule) == (state.best_step == step)
    return state


def test_the_best_is_the_lowest_and_the_first_of_equals() -> None:
    state = after([3.0, 2.0, 2.5, 2.0, 2.1], None)
    assert (state.best_loss, state.best_step, state.eval_loss) == (2.0, 2, 2.1)
    assert state.evaluations_without_gain == 3


def test_small_gains_do_not_count_for_patience_but_for_the_best() -> None:
    rule = EarlyStopping(patience=3, min_delta=0.5)
    state = after([3.0, 2.8, 2.7, 2.6], rule)
    assert state.evaluations_without_gain == 3
    assert (state.best_loss, state.best_step) == (2.6, 4)
    state = after([3.0, 2.8, 2.4, 2.3], rule)
    assert state.evaluations_without_gain == 1, "2.4 is half a nat below 3.0, though not below 2.8"


def test_json_and_back() -> None:
    state = after([3.0, 2.0, 0.1 + 0.2], EarlyStopping())
    assert state.held_out_losses == [3.0, 2.0, 0.1 + 0.2]
    assert TrainState(**json.loads(json.dumps(state.to_json()))) == state


def test_means() -> None:
    state = TrainState()
    assert state.train_loss is None
    assert state.tokens_per_second == 0.0
    state = TrainState(loss_sum=6.0, supervised=4, tokens=30, seconds=2.0)
    assert (state.train_loss, state.tokens_per_second) == (1.5, 15.0)
