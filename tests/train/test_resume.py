"""k steps + resume for n - k equals n steps, bit for bit, whatever killed the first try."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable

import pytest
import torch
from fitting import Recorder, log_of, logged, one_thread
from killing import WAYS, KilledError, Outcome, build, check_same, corpora, kill, never_killed  # noqa: F401  (fixtures are among them)

from llmkit.errors import InterruptedByUserError, StoppedError
from llmkit.train.loop import Fit

_one_thread = pytest.fixture(autouse=True)(one_thread)


@pytest.mark.parametrize("killed_after", [5, 7, 8])
@pytest.mark.parametrize("way", WAYS)
def test_killed_and_resumed_equals_never_killed(
    build: Callable[..., Fit], never_killed: Callable[[str], Outcome], way: str, killed_after: int
) -> None:
    fit = build("fit", way)
    with pytest.raises(KilledError):
        fit.run([logged(fit), Recorder({killed_after: kill})])
    torch.manual_seed(99)
    again = build("fit", way)
    with torch.no_grad():
        for parameter in again.model.parameters():
            parameter.fill_(7.0)
    assert again.resume()
    assert again.state.step == killed_after - 1, "the step that was killed is not saved"
    again.run([logged(again)])
    check_same(again, never_killed(way))
    steps = [line["step"] for line in log_of(again) if "loss" in line]
    assert steps == sorted(set(steps)), "each step once"


def test_the_ways_do_what_they_say(build: Callable[..., Fit]) -> None:
    early = build("early", "early stopping")
    early.run([])
    assert 7 < early.state.step < 12, "stops early, and not before it was killed in the tests above"
    assert early.state.evaluations_without_gain == 4
    first, second = build("a", "dropout"), build("b", "dropout", model=("gpt2", 0.0))
    assert first.run([]).loss_sum != second.run([]).loss_sum, "dropout drops"


@pytest.mark.parametrize("rare", [2, 5])
def test_killed_between_checkpoints_it_takes_some_steps_again(
    build: Callable[..., Fit], never_killed: Callable[[str], Outcome], rare: int
) -> None:
    fit = build("fit", "evaluations", save_every=rare)
    with pytest.raises(KilledError):
        fit.run([logged(fit), Recorder({10: kill})])
    again = build("fit", "evaluations", save_every=rare)
    assert again.resume()
    assert again.state.step == 9 // rare * rare
    again.run([logged(again)])
    check_same(again, never_killed("evaluations"))


def test_killed_again_and_again(build: Callable[..., Fit], never_killed: Callable[[str], Outcome]) -> None:
    for number in range(2, 13):
        fit = build("fit", "evaluations")
        fit.resume()
        assert fit.state.step == number - 2
        with pytest.raises(KilledError):
            fit.run([logged(fit), Recorder({number: kill})])
    fit = build("fit", "evaluations")
    fit.resume()
    fit.run([logged(fit)])
    check_same(fit, never_killed("evaluations"))


@pytest.mark.parametrize(
    ("number", "error", "code"),
    [
        (signal.SIGUSR1, StoppedError, 75),
        (signal.SIGTERM, StoppedError, 75),
        (signal.SIGINT, InterruptedByUserError, 130),
    ],
)
def test_a_signal_stops_after_a_checkpoint(
    build: Callable[..., Fit],
    never_killed: Callable[[str], Outcome],
    number: signal.Signals,
    error: type[Exception],
    code: int,
) -> None:
    fit = build("fit", "evaluations", save_every="10min")
    recorder = Recorder({4: lambda: os.kill(os.getpid(), number)})
    before = signal.getsignal(number)
    with pytest.raises(error, match="after step 5, which is saved") as caught:
        fit.run([logged(fit), recorder])
    assert caught.value.exit_code == code  # type: ignore[attr-defined]
    assert recorder.closed == 1
    assert signal.getsignal(number) == before
    assert [path.name for path in (fit.folder / "checkpoints").iterdir()] == ["step-00000005"]
    again = build("fit", "evaluations", save_every="10min")
    assert again.resume()
    again.run([logged(again)])
    check_same(again, never_killed("evaluations"))


def test_a_signal_in_the_last_step_still_stops(
    build: Callable[..., Fit], never_killed: Callable[[str], Outcome]
) -> None:
    fit = build("fit", "evaluations", save_every="10min")
    with pytest.raises(StoppedError):
        fit.run([logged(fit), Recorder({12: lambda: os.kill(os.getpid(), signal.SIGTERM)})])
    again = build("fit", "evaluations", save_every="10min")
    assert again.resume()
    again.run([logged(again)])
    check_same(again, never_killed("evaluations"))


def test_a_second_ctrl_c_interrupts_at_once(build: Callable[..., Fit]) -> None:
    def twice() -> None:
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)

    fit, recorder = build("fit", "plain"), Recorder({3: twice})
    with pytest.raises(KeyboardInterrupt):
        fit.run([recorder])
    assert recorder.closed == 1
    assert fit.state.step == 3
