"""Every optimizer and the schedule that looks at held-out losses, in a real fit: learning, and resuming bit for bit."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from fitting import Recorder, facts_of, make_fit, moments_of, one_thread, same_bits, weights_of
from killing import KilledError, corpora, kill  # noqa: F401  (a fixture is among them)

from llmkit.data.corpus import Corpus
from llmkit.optim import build_schedule
from llmkit.optim.schedules import Progress
from llmkit.train.loop import Fit

_one_thread = pytest.fixture(autouse=True)(one_thread)
PACKAGES = {"lion": "lion_pytorch", "adamw8bit": "bitsandbytes"}
PLATEAU = {"name": "plateau", "patience": 1, "factor": 0.5, "min_delta": 0.05}
WAYS: dict[str, dict[str, Any]] = {
    "adagrad": {"optimizer": "adagrad", "lr": 3e-2},
    "adagrad, fp16": {"optimizer": "adagrad", "lr": 3e-2, "precision": "fp16"},
    "rmsprop": {"optimizer": {"name": "rmsprop", "momentum": 0.9}, "lr": 3e-4},
    "adafactor": {"optimizer": "adafactor"},
    "muon": {"optimizer": "muon"},
    "muon, fp16": {"optimizer": "muon", "precision": "fp16"},
    "lion": {"optimizer": "lion", "lr": 1e-3},
    "adamw8bit": {"optimizer": "adamw8bit"},
    "plateau": {"schedule": PLATEAU, "eval_every": 2, "lr": 1e-2},
    "wsd": {"schedule": {"name": "wsd", "decay": "40%"}},
}


def fit_for(folder: Path, corpora: tuple[Corpus, Corpus], way: str) -> Fit:
    if way in PACKAGES:
        pytest.importorskip(PACKAGES[way])
    return make_fit(folder, *corpora, save_every=1, **WAYS[way])


@pytest.mark.parametrize("way", WAYS)
def test_killed_and_resumed_equals_never_killed(way: str, tmp_path: Path, corpora: tuple[Corpus, Corpus]) -> None:
    whole = fit_for(tmp_path / "whole", corpora, way)
    rates = Recorder()
    whole.run([rates])

    with pytest.raises(KilledError):
        fit_for(tmp_path / "fit", corpora, way).run([Recorder({8: kill})])
    torch.manual_seed(99)
    again = fit_for(tmp_path / "fit", corpora, way)
    with torch.no_grad():
        for parameter in again.model.parameters():
            parameter.fill_(7.0)
    assert again.resume()
    rest = Recorder()
    again.run([rest])
    assert same_bits(weights_of(again), weights_of(whole))
    assert same_bits(moments_of(again), moments_of(whole))
    assert facts_of(again.state) == facts_of(whole.state)
    assert rest.of("lr") == rates.of("lr")[7:]


@pytest.mark.parametrize("way", [way for way in WAYS if way != "wsd"])
def test_it_learns(way: str, tmp_path: Path, corpora: tuple[Corpus, Corpus]) -> None:
    fit = fit_for(tmp_path / "fit", corpora, way)
    before = fit.held_out_loss()
    fit.run([])
    assert fit.held_out_loss() < before


def test_plateau_follows_the_losses_of_its_own_evaluations(tmp_path: Path, corpora: tuple[Corpus, Corpus]) -> None:
    fit, recorder = fit_for(tmp_path / "fit", corpora, "plateau"), Recorder()
    fit.run([recorder])
    losses = [loss for _, loss in recorder.evaluations]
    assert fit.state.held_out_losses == losses
    schedule = build_schedule("plateau", {key: value for key, value in PLATEAU.items() if key != "name"})
    expected = [1e-2 * schedule(Progress(step, 12, 2, tuple(losses[: step // 2]))) for step in range(12)]
    assert recorder.of("lr") == pytest.approx(expected)
    assert min(expected[2:]) < 1e-2, "the rate was lowered"
