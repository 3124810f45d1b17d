"""What a training keeps while it runs, what is used of it, and what is left at the end."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from fitting import Recorder, logged, make_fit, one_thread, same_bits, tiny_model, weights_of
from killing import KilledError, Outcome, build, check_same, corpora, kill, never_killed  # noqa: F401  (fixtures are among them)
from safetensors.torch import load_file

from llmkit.data.corpus import Corpus
from llmkit.train.loop import Fit

_one_thread = pytest.fixture(autouse=True)(one_thread)


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
    assert same_bits(load_file(again.keeper.best_file), seen[best])


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
    assert fit.keeper.disposable(fit.state) == (), "the last weights are in no model, so they stay"
    fit = build("other", "plain", keep_checkpoints=1, steps=4)
    with pytest.raises(KilledError):
        fit.run([Recorder({4: kill})])
    assert [path.name for path in (fit.folder / "checkpoints").iterdir()] == ["step-00000003"]
    again = build("other", "plain", keep_checkpoints=1, steps=4)
    again.resume()
    again.run([])
    assert again.state.best_step == 4
    assert set(again.folder.iterdir()) == set(again.keeper.disposable(again.state))


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
    assert torch.equal(again.model.model.norm.mean, reference.model.model.norm.mean)


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
