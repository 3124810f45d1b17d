"""A loss or gradient that is not finite, and a loss out of its row: seen at that step, and done with as the recipe says."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from fitting import COLUMNS, WORDS, Recorder, facts_of, log_of, one_thread, same_bits, weights_of
from killing import KilledError, build, build_fit, corpora, kill  # noqa: F401  (fixtures are among them)

from llmkit.data.corpus import Corpus, CorpusWriter
from llmkit.errors import DivergedError
from llmkit.recipe.training import Training
from llmkit.run.log import MetricsLog
from llmkit.train import divergence
from llmkit.train.divergence import robust_z
from llmkit.train.hooks.metrics_log import MetricsLogHook
from llmkit.train.loop import Fit

_one_thread = pytest.fixture(autouse=True)(one_thread)
NAN, INF = float("nan"), float("inf")


def planted(fit: Fit, factors: dict[int, float]) -> Fit:
    """The same training, but the loss of these 0-based batches is multiplied: the data do that, whenever they come."""
    batches = {number: {int(n) for n in fit.order.batch(number)} for number in factors}
    taken: list[int] = []
    take = fit.feeder.take
    loss = fit.objective.loss

    def watched(step: int, *rest: Any) -> Any:
        taken[:] = [step]
        return take(step, *rest)

    def spoilt(model: Any, batch: Any) -> torch.Tensor:
        return loss(model, batch) * (factors.get(taken[0], 1.0) if taken else 1.0)

    assert all(batches.values())
    fit.feeder.take = watched  # type: ignore[method-assign]
    object.__setattr__(fit.objective, "loss", spoilt)  # it is frozen
    return fit


def logged(fit: Fit) -> MetricsLogHook:
    """The log that a stage would open."""
    path = fit.folder.parent / f"{fit.folder.name}.jsonl"
    return MetricsLogHook(
        MetricsLog(path, "finetune", step=fit.state.step, refused=fit.state.refused_steps), lambda step: True
    )


def rules(**given: Any) -> dict[str, Any]:
    return {"divergence": {"window": 16} | given}


def with_culprit(folder: Path, corpora: tuple[Corpus, Corpus]) -> tuple[Fit, int]:
    """A training with an example whose loss is not finite, in the last batch of the first epoch."""
    writer = CorpusWriter(folder / "train", COLUMNS)
    order = build_fit(folder / "like", corpora, {}).order
    number = int(order.batch(5)[-1])
    for place, example in enumerate(corpora[0]):
        ids = np.asarray(example["input_ids"])
        writer.add({**example, "input_ids": np.full_like(ids, WORDS - 1) if place == number else ids % (WORDS - 1)})
    fit = build_fit(folder / "fit", (writer.finish({}), corpora[1]), {})
    assert number in fit.order.batch(5)
    loss = fit.objective.loss

    def spoilt(model: Any, batch: Any) -> torch.Tensor:
        return loss(model, batch) * (NAN if (batch["input_ids"] == WORDS - 1).any() else 1.0)

    object.__setattr__(fit.objective, "loss", spoilt)
    return fit, number


@pytest.mark.parametrize("value", [NAN, INF, -INF])
@pytest.mark.parametrize("way", ["plain", "bf16", "fp16", "sgd"])
def test_it_stops_at_the_step_and_keeps_what_was_good(build: Callable[..., Fit], value: float, way: str) -> None:
    reference = build("reference", way, steps=12)
    seen: dict[str, torch.Tensor] = {}
    reference.run([Recorder({5: lambda: seen.update(weights_of(reference))})])
    fit = planted(build("fit", way, save_every=100), {5: value})
    with pytest.raises(DivergedError) as caught:
        fit.run([logged(fit)])
    assert caught.value.exit_code == 6
    assert "in step 6" in str(caught.value.got)
    assert fit.state.step == 5
    assert same_bits(weights_of(fit), seen), "the step that diverged changed nothing"
    assert [line.get("step") for line in log_of(fit) if "loss" in line] == [1, 2, 3, 4, 5]
    assert [line["event"] for line in log_of(fit) if "event" in line] == ["diverged"]
    again = build("fit", way, save_every=100)
    assert again.resume()
    assert again.state.step == 5
    again.run([])
    assert same_bits(weights_of(again), weights_of(reference)), "without the fault it goes on as if nothing had been"


def test_a_gradient_that_is_not_finite_is_seen_though_the_loss_is(build: Callable[..., Fit]) -> None:
    fit = build("fit", "plain")
    weights, loss = list(fit.masters.weights.values()), fit.objective.loss

    def spoilt(model: Any, batch: Any) -> torch.Tensor:
        found = loss(model, batch)
        if fit.state.step == 4 and found.requires_grad:
            found.register_hook(lambda gradient: gradient * NAN)
        return found

    object.__setattr__(fit.objective, "loss", spoilt)
    with pytest.raises(DivergedError, match="diverged") as caught:
        fit.run([])
    assert "gradient norm nan" in str(caught.value.got)
    assert fit.state.step == 4
    assert all(torch.isfinite(weight).all() for weight in weights)


def test_the_examples_are_written_out_with_the_culprit_first(tmp_path: Path, corpora: tuple[Corpus, Corpus]) -> None:
    fit, number = with_culprit(tmp_path, corpora)
    fit.describe = lambda example: {"tokens": np.asarray(example["input_ids"]).tolist()}
    with pytest.raises(DivergedError) as caught:
        fit.run([])
    file = Path(str(caught.value.where))
    assert file == fit.folder / "diverged" / "step-00000006.json"
    written = json.loads(file.read_text())
    assert written["step"] == 6
    assert len(written["losses_before"]) == 5
    assert written["examples"][0]["example"] == number
    assert {line["example"] for line in written["examples"]} == {int(n) for n in fit.order.batch(5)}
    first, *others = written["examples"]
    assert first["loss"] == "nan"
    assert first["tokens"] == np.asarray(fit.train[number]["input_ids"]).tolist()
    losses = [line["loss"] for line in others]
    assert losses == sorted(losses, reverse=True)


def test_a_batch_that_is_skipped_is_as_if_the_step_had_not_been(build: Callable[..., Fit]) -> None:
    fit = planted(build("fit", "dropout", steps=8, **rules(nan="skip")), {5: NAN})
    warnings: list[str] = []
    fit.warn = warnings.append
    seen: dict[int, dict[str, torch.Tensor]] = {}
    at = {step: lambda step=step: seen.update({step: weights_of(fit)}) for step in (5, 7)}
    fit.run([logged(fit), recorder := Recorder(at)])
    assert recorder.of("step") == [1, 2, 3, 4, 5, 7, 8]
    assert recorder.events[0][:2] == (6, "skipped")
    assert "step 6" in warnings[0]
    assert fit.state.refused_steps == 1
    assert all(torch.isfinite(tensor).all() for tensor in weights_of(fit).values())
    assert not same_bits(seen[5], seen[7])
    assert fit.state.batch == 8, "the batches after it are those that they would have been"


def test_rolled_back_it_goes_on_past_the_data(build: Callable[..., Fit]) -> None:
    """As if the batches between the checkpoint and the fault had not been there."""
    fit = planted(build("fit", "dropout", steps=8, save_every=3, **rules(nan="rollback")), {4: NAN})
    fit.run([logged(fit), recorder := Recorder()])
    assert recorder.of("step") == [1, 2, 3, 4, 4, 5, 6, 7, 8], "step 4 is taken again"
    assert [event[:2] for event in recorder.events] == [(3, "rolled back")]
    assert (fit.state.passed_over, fit.state.refused_steps) == (2, 1)
    steps = [line["step"] for line in log_of(fit) if "loss" in line]
    assert steps == list(range(1, 9)), "each step once"
    other = build("other", "dropout", steps=8, save_every=3, **rules(nan="rollback"))
    taken: list[int] = []
    order = other.order
    batch = order.batch

    class Passing:
        lengths = order.lengths

        @staticmethod
        def batch(step: int) -> Any:
            taken.append(step)
            return batch(step if step < 3 else step + 2)

    other.order = other.feeder.order = Passing()  # type: ignore[assignment]
    other.run([])
    assert same_bits(weights_of(fit), weights_of(other))


def test_rolled_back_before_the_first_checkpoint_it_goes_to_the_start(build: Callable[..., Fit]) -> None:
    fit = planted(build("fit", "plain", steps=6, save_every=5, **rules(nan="rollback")), {2: NAN})
    fit.run([recorder := Recorder()])
    assert recorder.of("step") == [1, 2, 1, 2, 3, 4, 5, 6]
    assert fit.state.passed_over == 3


@pytest.mark.parametrize("when", [{}, {"save_every": "5min"}, {"lose_at_most": "5min"}])
def test_going_back_to_what_was_saved_by_the_clock_could_not_be_repeated(when: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"rollback.*needs.*save_every"):
        Training(divergence={"nan": "rollback"}, **when)


@pytest.mark.parametrize("action", ["skip", "rollback"])
def test_past_the_limit_it_stops(build: Callable[..., Fit], action: str) -> None:
    given = rules(nan=action, limit=2)
    fit = planted(build("fit", "plain", save_every=1, **given), {3: NAN, 5: NAN, 7: NAN})
    with pytest.raises(DivergedError) as caught:
        fit.run([recorder := Recorder()])
    assert "2 steps that were refused, the limit" in str(caught.value.got)
    said = "skipped" if action == "skip" else "rolled back"
    assert [event[1] for event in recorder.events] == [said, said, "diverged"]
    calm = planted(build("calm", "plain", save_every=1, **given), {3: NAN, 5: NAN})
    calm.run([])
    assert calm.state.refused_steps == 2


SPIKES = {17: 40.0, 21: 60.0}


@pytest.mark.parametrize("action", ["warn", "skip", "rollback", "stop", "off"])
def test_a_spike(build: Callable[..., Fit], action: str) -> None:
    warnings: list[str] = []
    fit = planted(
        build("fit", "plain", steps=26, save_every=4, warn=warnings.append, **rules(spike=action, limit=5)), SPIKES
    )
    recorder = Recorder()
    if action == "stop":
        with pytest.raises(DivergedError, match="diverged") as caught:
            fit.run([recorder])
        assert "spikes" in str(caught.value.got)
        assert "robust z-score" in str(caught.value.got)
        assert fit.state.step == 17
        return
    fit.run([recorder])
    said = {"warn": "spike", "skip": "skipped", "rollback": "rolled back", "off": None}[action]
    assert [event[1] for event in recorder.events] == ([said, said] if said else [])
    assert len(warnings) == (2 if said else 0)
    assert fit.state.refused_steps == (2 if action in ("skip", "rollback") else 0)
    high = max(recorder.of("loss"))
    assert (high > 50) == (action in ("warn", "off")), "what is refused is in no loss"


@pytest.mark.parametrize("killed_after", [5, 8, 10, 17, 19, 20, 21, 23])
@pytest.mark.parametrize("action", ["skip", "rollback"])
def test_killed_and_resumed_equals_never_killed(build: Callable[..., Fit], action: str, killed_after: int) -> None:
    """Also the log: each step and each event once."""

    def make(name: str) -> Fit:
        given = rules(nan=action, spike=action, limit=9)
        return planted(
            build(name, "dropout", steps=26, save_every=4, warn=lambda text: None, **given), SPIKES | {8: NAN}
        )

    whole = make("whole")
    whole.run([logged(whole)])
    fit = make("fit")
    with pytest.raises(KilledError):
        fit.run([logged(fit), Recorder({killed_after: kill})])
    again = make("fit")
    assert again.resume()
    again.run([logged(again)])
    assert same_bits(weights_of(again), weights_of(whole))
    assert facts_of(again.state) == facts_of(whole.state)
    assert log_of(again) == log_of(whole)
    assert again.state.refused_steps == 3


@pytest.mark.parametrize("action", ["skip", "rollback"])
def test_stopped_by_a_signal_and_resumed_equals_never_stopped(build: Callable[..., Fit], action: str) -> None:
    """The checkpoint of the stop is between two of the interval: a rollback after it must not go to another place."""
    import os
    import signal

    from llmkit.errors import StoppedError

    def make(name: str) -> Fit:
        return planted(
            build(name, "dropout", steps=14, save_every=4, warn=lambda text: None, **rules(nan=action)), {7: NAN}
        )

    whole = make("whole")
    whole.run([logged(whole)])
    fit = make("fit")
    with pytest.raises(StoppedError):
        fit.run([logged(fit), Recorder({5: lambda: os.kill(os.getpid(), signal.SIGTERM)})])
    again = make("fit")
    assert again.resume()
    assert again.state.step == 6
    again.run([logged(again)])
    assert same_bits(weights_of(again), weights_of(whole))
    assert log_of(again) == log_of(whole)


def test_diverged_twice_it_is_logged_once(build: Callable[..., Fit]) -> None:
    for _ in range(3):
        fit = planted(build("fit", "plain"), {5: NAN})
        fit.resume()
        with pytest.raises(DivergedError):
            fit.run([logged(fit)])
    assert [line["event"] for line in log_of(fit) if "event" in line] == ["diverged"]


def test_robust_z() -> None:
    calm = [1.0, 1.2, 0.8, 1.1, 0.9]
    assert robust_z(1.0, calm) == 0.0
    spread = 0.1  # the median absolute deviation
    assert robust_z(3.0, calm) == pytest.approx(2.0 / (1.4826 * spread))
    assert robust_z(3.0, [*calm, 90.0, 80.0]) < 2 * robust_z(3.0, calm), "a few wild ones do not hide the next"
    assert robust_z(3.0, [*calm, 90.0, 80.0]) > 5
    assert robust_z(1.4, [1.0] * 20) == pytest.approx(4.0), "equal losses count as noisy by 0.1 nats"
    assert robust_z(0.0, calm) < 0, "a fall is no spike"


def test_the_first_losses_are_compared_with_nothing(build: Callable[..., Fit]) -> None:
    few = divergence._FEWEST
    fit = planted(build("fit", "plain", steps=few, **rules(spike="stop")), {few - 1: 100.0})
    fit.run([])
    assert fit.state.step == few
