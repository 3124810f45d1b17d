"""k steps + resume for n - k equals n steps, bit for bit, whatever killed the first try."""

from __future__ import annotations

import json
import os
import shutil
import signal
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from fitting import (
    Recorder,
    facts_of,
    log_of,
    logged,
    make_fit,
    moments_of,
    one_thread,
    random_corpus,
    same_bits,
    tiny_model,
    weights_of,
)

from llmkit.data.corpus import Corpus
from llmkit.errors import InterruptedByUserError, StoppedError
from llmkit.train.loop import Fit

_one_thread = pytest.fixture(autouse=True)(one_thread)
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
    "early stopping": {"eval_every": 1, "early_stopping": {"patience": 4, "min_delta": 0.02}, "lr": 5e-2},
}


class KilledError(Exception):
    """Stands for SIGKILL: nothing is saved."""


def kill() -> None:
    raise KilledError


@pytest.fixture(scope="module")
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
        fit.stepper.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10, growth_interval=3)
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


@pytest.fixture(scope="module")
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
        for parameter in again.unwrapped.parameters():
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


def test_killed_after_the_last_step_the_best_weights_are_found_again(build: Callable[..., Fit]) -> None:
    way = {"eval_every": 1, "lr": 0.5, "schedule": "constant"}  # a rate at which the first steps are the best
    reference = build("reference", "plain", **way)
    state = reference.run([])
    assert state.best_step is not None
    assert state.best_step < state.step
    again = build("reference", "plain", **way)
    assert again.resume(), "the last weights are kept, to go on from"
    assert not same_bits(weights_of(again), weights_of(reference))
    again.run([])
    assert same_bits(weights_of(again), weights_of(reference))
    assert again.held_out_loss() == state.best_loss
    last = build("last", "plain", keep="last", **way)
    last.run([])
    assert not same_bits(weights_of(last), weights_of(reference))
    assert last.held_out_loss() == last.state.eval_loss


def test_the_best_weights_belong_to_the_checkpoint_and_not_to_a_later_evaluation(build: Callable[..., Fit]) -> None:
    """An evaluation that was better but whose checkpoint was never written is as if it had not been."""
    fit = build("fit", "plain", eval_every=1)
    seen: dict[int, dict[str, torch.Tensor]] = {}
    at = {step: lambda step=step: seen.update({step: weights_of(fit)}) for step in range(1, 6)}
    with pytest.raises(KilledError):
        fit.run([Recorder(at | {6: kill})])
    path = fit.folder / "checkpoints" / "step-00000005"
    saved = json.loads((path / "state.json").read_text())["train"]["state"]
    best = saved["best_step"]
    later = fit.folder / "later"
    later.write_bytes(b"of a later evaluation, and cut short")
    later.replace(fit.folder / "best.safetensors")
    again = build("fit", "plain", eval_every=1, steps=12)
    assert again.resume()
    assert again.state.best_step == best
    from safetensors.torch import load_file

    assert same_bits(load_file(again.best_file), seen[best])


def test_another_fingerprint_is_not_used(build: Callable[..., Fit]) -> None:
    fit = build("fit", "plain")
    with pytest.raises(KilledError):
        fit.run([Recorder({4: kill})])
    warnings: list[str] = []
    other = build("fit", "plain", fingerprint="other", warn=warnings.append)
    before = weights_of(other)
    assert not other.resume()
    assert other.state.step == 0
    assert same_bits(before, weights_of(other))
    assert len(warnings) == 2, "two checkpoints were kept"
    assert "it belongs to other inputs" in warnings[0]


def test_from_a_damaged_checkpoint_it_goes_back_to_the_one_before(
    build: Callable[..., Fit], never_killed: Callable[[str], Outcome]
) -> None:
    fit = build("fit", "dropout")
    with pytest.raises(KilledError):
        fit.run([logged(fit), Recorder({9: kill})])
    path = fit.folder / "checkpoints" / "step-00000008" / "optimizer.safetensors"
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    warnings: list[str] = []
    again = build("fit", "dropout", warn=warnings.append)
    assert again.resume()
    assert again.state.step == 7
    assert "step-00000008" in warnings[0]
    again.run([logged(again)])
    check_same(again, never_killed("dropout"))


def test_checkpoints_are_kept_as_asked_and_forgotten_at_the_end(build: Callable[..., Fit]) -> None:
    fit = build("fit", "plain", keep_checkpoints=3, eval_every=1, lr=0.5, schedule="constant")
    fit.run([])
    names = sorted(path.name for path in (fit.folder / "checkpoints").iterdir())
    assert names == ["step-00000010", "step-00000011", "step-00000012"]
    assert fit.state.best_step != 12
    assert fit.disposable == (), "the last weights are in no model, so they stay"
    fit = build("other", "plain", keep_checkpoints=1, steps=4)
    with pytest.raises(KilledError):
        fit.run([Recorder({4: kill})])
    assert [path.name for path in (fit.folder / "checkpoints").iterdir()] == ["step-00000003"]
    again = build("other", "plain", keep_checkpoints=1, steps=4)
    again.resume()
    again.run([])
    assert again.state.best_step == 4
    assert set(again.folder.iterdir()) == set(again.disposable)


def test_nothing_is_pickled_and_only_what_is_trained_is_written(tmp_path: Path, corpora: tuple[Corpus, Corpus]) -> None:
    model = tiny_model()
    model.model.embed_tokens.weight.requires_grad_(False)
    frozen = model.model.embed_tokens.weight.detach().clone()
    fit = make_fit(tmp_path / "fit", *corpora, model=model, save_every=2, steps=5, eval_every=2)
    fit.run([])
    files = {path.name for path in fit.folder.rglob("*") if path.is_file()}
    assert files == {
        "manifest.json",
        "state.json",
        "weights.safetensors",
        "optimizer.safetensors",
        "best.safetensors",
    }
    from safetensors.torch import load_file

    names = set(load_file(fit.folder / "checkpoints" / "step-00000004" / "weights.safetensors"))
    assert "model.embed_tokens.weight" not in names
    assert names == {name for name, p in model.named_parameters() if p.requires_grad}
    assert torch.equal(model.model.embed_tokens.weight, frozen)
    for path in fit.folder.rglob("*.json"):
        json.loads(path.read_text())


def test_buffers_that_training_changes_are_resumed(tmp_path: Path, corpora: tuple[Corpus, Corpus]) -> None:
    def build(name: str) -> Fit:
        model = tiny_model()
        model.model.norm = Counting(model.model.norm)
        return make_fit(tmp_path / name, *corpora, model=model, save_every=1)

    reference = build("reference")
    reference.run([])
    fit = build("fit")
    with pytest.raises(KilledError):
        fit.run([Recorder({5: kill})])
    again = build("fit")
    assert again.resume()
    again.run([])
    assert same_bits(weights_of(again), weights_of(reference))
    assert torch.equal(again.unwrapped.model.norm.mean, reference.unwrapped.model.norm.mean)


class Counting(torch.nn.Module):
    """A norm that subtracts a running mean, as batch normalisation does."""

    def __init__(self, inner: torch.nn.Module) -> None:
        super().__init__()
        self.inner = inner
        self.register_buffer("mean", torch.zeros(32))

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        out = self.inner(hidden - self.mean)
        if self.training:
            self.mean.mul_(0.9).add_(0.1 * hidden.detach().mean(dim=(0, 1)))
        return out


def test_random_numbers_of_python_and_numpy_are_resumed(build: Callable[..., Fit]) -> None:
    import random

    def draws(fit: Fit) -> list[tuple[float, float, float]]:
        drawn: list[tuple[float, float, float]] = []
        draw = lambda: drawn.append((random.random(), float(np.random.rand()), float(torch.rand(()))))  # noqa: E731
        recorder = Recorder(dict.fromkeys(range(1, 13), draw))
        recorder.at |= {13: kill}
        fit.run([recorder])
        return drawn

    whole = draws(build("reference", "plain"))
    fit = build("fit", "plain")
    draw = lambda: (random.random(), np.random.rand(), torch.rand(()))  # noqa: E731
    recorder = Recorder(dict.fromkeys(range(1, 6), draw) | {6: kill})
    with pytest.raises(KilledError):
        fit.run([recorder])
    again = build("fit", "plain")
    assert again.resume()
    assert draws(again) == whole[5:]


def test_a_copy_of_the_folder_resumes_the_same(
    build: Callable[..., Fit], never_killed: Callable[[str], Outcome], tmp_path: Path
) -> None:
    fit = build("fit", "evaluations")
    with pytest.raises(KilledError):
        fit.run([logged(fit), Recorder({9: kill})])
    shutil.copytree(fit.folder, tmp_path / "moved")
    shutil.copy(tmp_path / "fit.jsonl", tmp_path / "moved.jsonl")
    again = build("moved", "evaluations")
    assert again.resume()
    again.run([logged(again)])
    check_same(again, never_killed("evaluations"))
