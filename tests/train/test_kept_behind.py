"""Checkpoints that are written while training goes on hold what was true when they were begun; and how often they are."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from faults import flip
from fitting import Recorder, log_of, logged, one_thread, same_bits, weights_of
from killing import WAYS, KilledError, Outcome, build, check_same, corpora, kill, never_killed  # noqa: F401  (fixtures are among them)
from safetensors.torch import load_file

from llmkit.errors import StoppedError
from llmkit.files import digest_file
from llmkit.recipe.training import Training
from llmkit.run import checkpoint as module
from llmkit.train import when
from llmkit.train.loop import Fit
from llmkit.train.when import Times

_one_thread = pytest.fixture(autouse=True)(one_thread)
TENSORS = ("weights.safetensors", "optimizer.safetensors", "best.safetensors")


def slow(patch: pytest.MonkeyPatch, seconds: float = 0.15) -> None:
    """A disk so slow that training is steps ahead before anything is written."""
    save = module.save_file

    def late(*given: Any) -> None:
        time.sleep(seconds)
        save(*given)

    patch.setattr(module, "save_file", late)


def digests(path: Path) -> dict[str, Any]:
    found: dict[str, Any] = {name: digest_file(path / name) for name in TENSORS if (path / name).exists()}
    state = json.loads((path / "state.json").read_text())
    state["train"]["state"] |= {"seconds": 0, "save_seconds": 0}
    return found | {"state": state}


@pytest.mark.parametrize("way", ["dropout", "bf16", "fp16", "evaluations", "everything", "sgd"])
def test_written_behind_they_are_the_bits_of_those_written_at_once(
    build: Callable[..., Fit], monkeypatch: pytest.MonkeyPatch, way: str
) -> None:
    """All of them are kept, and training does not wait for the slow disk but where the next one is due."""
    folders = {}
    for behind in (False, True):
        fit = build(f"behind-{behind}", way, save_every=4, keep_checkpoints=9)
        fit.keeper.behind = behind
        with monkeypatch.context() as patch:
            if behind:
                slow(patch)
            seen: list[bool] = []

            def look(fit: Fit = fit, seen: list[bool] = seen) -> None:
                seen.append(fit.keeper.checkpoints.is_writing)

            fit.run([logged(fit), Recorder(dict.fromkeys(range(1, 13), look))])
        assert any(seen) == behind, "training goes on while it is written"
        folders[behind] = fit.folder / "checkpoints"
        if not list(folders[behind].glob("step-*")):
            pytest.fail("nothing was kept to compare")
    names = [sorted(path.name for path in folder.glob("step-*")) for folder in folders.values()]
    assert names[0] == names[1]
    for name in names[0]:
        assert digests(folders[False] / name) == digests(folders[True] / name)


def test_killed_while_it_is_written_behind_the_one_before_is_used(
    build: Callable[..., Fit], never_killed: Callable[[str], Outcome], monkeypatch: pytest.MonkeyPatch
) -> None:
    fit = build("fit", "dropout", save_every=3)
    fit.keeper.behind = True
    with monkeypatch.context() as patch:
        save = module.save_file

        def never(tensors: Any, path: Path) -> None:
            if "step-00000006" in str(path):
                raise MemoryError("the process dies here")
            save(tensors, path)

        patch.setattr(module, "save_file", never)
        with pytest.raises((KilledError, MemoryError)):
            fit.run([logged(fit), Recorder({8: kill})])
    again = build("fit", "dropout", save_every=3)
    assert again.resume()
    assert again.state.step == 3
    again.run([logged(again)])
    check_same(again, never_killed("dropout"))


@pytest.mark.parametrize("behind", [False, True])
def test_the_best_weights_are_those_of_the_moment(
    build: Callable[..., Fit], monkeypatch: pytest.MonkeyPatch, behind: bool
) -> None:
    """While a checkpoint is written, a later evaluation may be better: its weights are not those of this checkpoint."""
    fit = build("fit", "plain", eval_every=1, save_every=4, keep_checkpoints=9)
    fit.keeper.behind = behind
    seen: dict[int, dict[str, Any]] = {}
    at = {step: lambda step=step: seen.update({step: weights_of(fit)}) for step in range(1, 13)}
    with monkeypatch.context() as patch:
        slow(patch)
        fit.run([Recorder(at)])
    for path in (fit.folder / "checkpoints").glob("step-*"):
        best = json.loads((path / "state.json").read_text())["train"]["state"]["best_step"]
        assert best == int(path.name[5:]), "each evaluation is better than the one before"
        assert same_bits(load_file(path / "best.safetensors"), seen[best])


def test_a_stop_waits_for_what_is_written_behind(build: Callable[..., Fit], monkeypatch: pytest.MonkeyPatch) -> None:
    import os
    import signal

    fit = build("fit", "plain", save_every=4)
    fit.keeper.behind = True
    with monkeypatch.context() as patch:
        slow(patch)
        with pytest.raises(StoppedError, match="after step 6"):
            fit.run([Recorder({5: lambda: os.kill(os.getpid(), signal.SIGTERM)})])
    assert sorted(path.name for path in (fit.folder / "checkpoints").iterdir()) == ["step-00000004", "step-00000006"]
    assert not fit.keeper.checkpoints.is_writing


def test_an_error_waits_for_what_is_written_behind(build: Callable[..., Fit], monkeypatch: pytest.MonkeyPatch) -> None:
    """The process ends with it, and a thread that still writes would end in the middle."""
    fit = build("fit", "plain", save_every=4)
    fit.keeper.behind = True
    with monkeypatch.context() as patch:
        slow(patch)
        with pytest.raises(KilledError):
            fit.run([Recorder({5: kill})])
    assert not fit.keeper.checkpoints.is_writing
    assert [path.name for path in (fit.folder / "checkpoints").iterdir()] == ["step-00000004"]


def test_the_last_one_stands_when_training_ends(build: Callable[..., Fit], monkeypatch: pytest.MonkeyPatch) -> None:
    fit = build("fit", "plain", steps=5, save_every=4, eval_every=1, lr=0.5, schedule="constant")
    fit.keeper.behind = True
    with monkeypatch.context() as patch:
        slow(patch)
        fit.run([])
    assert fit.state.best_step != 5
    assert not fit.keeper.checkpoints.is_writing
    assert [path.name for path in sorted((fit.folder / "checkpoints").iterdir())] == ["step-00000004", "step-00000005"]


class Clock:
    """A clock that is set by hand."""

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self.now = time.monotonic()
        patch.setattr(when.time, "monotonic", lambda: self.now)


@pytest.mark.parametrize("save_seconds", [0.0, 2.0, 7.0, 20.0])
@pytest.mark.parametrize("minutes", [1, 3])
def test_a_crash_loses_at_most_what_was_asked_for(
    monkeypatch: pytest.MonkeyPatch, save_seconds: float, minutes: int
) -> None:
    """Time from the state of the newest checkpoint that stands, at every moment; steps take 1 to 4 seconds."""
    clock = Clock(monkeypatch)
    times = Times(Training(lose_at_most=f"{minutes}min"), 0)
    start = stands = clock.now
    begun, begun_at, lost, saves = None, 0.0, [], 0
    for step in range(1, 500):
        due = times.due_by_time()
        seconds = 1.0 + step % 4
        clock.now += seconds
        times.slowest_step = max(times.slowest_step, seconds)
        if begun is not None and clock.now >= begun_at + save_seconds:
            stands, begun = begun, None
            times.slowest_save = save_seconds
        if times.slowest_save or not save_seconds:  # before the first one, nobody knows how long it takes
            lost.append(clock.now - stands)
        if due and begun is None:
            begun, begun_at, saves = clock.now, clock.now, saves + 1
            times.saved(step)
    assert max(lost) <= 60 * minutes + 1
    assert saves <= (clock.now - start) / (60 * minutes) * 2 + 2, "and it is not saved much more often than that takes"


def test_times_do_not_look_at_the_time_of_day(
    build: Callable[..., Fit], never_killed: Callable[[str], Outcome], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A clock that is set back, again and again, changes nothing."""
    hours = iter(range(10**9, 0, -3600))
    with monkeypatch.context() as patch:
        patch.setattr(time, "time", lambda: float(next(hours)))
        patch.setattr(time, "time_ns", lambda: next(hours) * 10**9)
        fit = build("fit", "evaluations", save_every="0.01s")
        with pytest.raises(KilledError):
            fit.run([logged(fit), Recorder({9: kill, **{step: lambda: time.sleep(0.02) for step in range(1, 9)}})])
        assert len(list((fit.folder / "checkpoints").glob("step-*"))) == 2
        again = build("fit", "evaluations", save_every="0.01s")
        assert again.resume()
        assert again.state.step >= 7
        again.run([logged(again)])
    check_same(again, never_killed("evaluations"))


def rewritten(path: Path, change: Callable[[dict[str, Any], dict[str, Any]], None]) -> None:
    """The checkpoint with another state and manifest, whose checksums hold."""
    state, manifest = (json.loads((path / name).read_text()) for name in ("state.json", "manifest.json"))
    change(state, manifest)
    (path / "state.json").write_text(json.dumps(state))
    file = path / "state.json"
    manifest["files"]["state.json"] = {"bytes": file.stat().st_size, "sha256": digest_file(file)}
    (path / "manifest.json").write_text(json.dumps(manifest))


NEWER = ("save_seconds", "recent_losses", "refused_steps", "passed_over", "stream", "held_out_losses")


def test_one_of_an_older_llmkit_is_read(build: Callable[..., Fit], never_killed: Callable[[str], Outcome]) -> None:
    fit = build("fit", "dropout")
    with pytest.raises(KilledError):
        fit.run([logged(fit), Recorder({6: kill})])

    def older(state: dict[str, Any], manifest: dict[str, Any]) -> None:
        for name in NEWER:
            del state["train"]["state"][name]
        manifest["llmkit"] = "0.1.0"

    rewritten(fit.folder / "checkpoints" / "step-00000005", older)
    warnings: list[str] = []
    again = build("fit", "dropout", warn=warnings.append)
    assert again.resume()
    assert (again.state.step, warnings) == (5, [])
    again.run([logged(again)])
    reference = never_killed("dropout")
    assert same_bits(weights_of(again), reference.weights)
    assert log_of(again) == reference.log


def test_one_of_another_format_is_refused_by_name(build: Callable[..., Fit]) -> None:
    fit = build("fit", "dropout")
    with pytest.raises(KilledError):
        fit.run([Recorder({6: kill})])
    path = fit.folder / "checkpoints" / "step-00000005"
    rewritten(path, lambda state, manifest: manifest.update(format=9, llmkit="7.0.0"))
    warnings: list[str] = []
    again = build("fit", "dropout", warn=warnings.append)
    assert again.resume()
    assert again.state.step == 4
    assert "step-00000005" in warnings[0]
    assert "format 9 of llmkit 7.0.0" in warnings[0]


def test_damage_to_the_newest_two_is_survived_when_more_are_kept(
    build: Callable[..., Fit], never_killed: Callable[[str], Outcome]
) -> None:
    fit = build("fit", "dropout", keep_checkpoints=1, keep_every=3)
    with pytest.raises(KilledError):
        fit.run([logged(fit), Recorder({9: kill})])
    folder = fit.folder / "checkpoints"
    assert sorted(path.name for path in folder.iterdir()) == ["step-00000003", "step-00000006", "step-00000008"]
    flip(folder / "step-00000008" / "weights.safetensors")
    (folder / "step-00000006" / "state.json").unlink()
    again = build("fit", "dropout", keep_checkpoints=1, keep_every=3, warn=lambda text: None)
    assert again.resume()
    assert again.state.step == 3
    again.run([logged(again)])
    check_same(again, never_killed("dropout"))


def test_what_stays_for_good_stays_when_training_is_done(build: Callable[..., Fit]) -> None:
    fit = build("fit", "plain", keep_every=4, keep="last")
    fit.run([])
    gone = {path.name for path in fit.keeper.disposable(fit.state)}
    assert gone >= {"step-00000011", "best.safetensors"}
    assert not gone & {"step-00000004", "step-00000008", "checkpoints"}


def test_the_ways_have_something_to_average_and_to_scale(build: Callable[..., Fit]) -> None:
    assert {"everything", "fp16"} <= WAYS.keys()
    assert build("a", "everything").average is not None
    assert build("b", "fp16").stepper.scaler is not None
