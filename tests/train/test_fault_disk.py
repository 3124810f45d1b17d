"""Disks that fail, fill up and tear what is written, while a training runs: it goes on as long as that makes sense, and
the last checkpoint stands."""

from __future__ import annotations

import errno
import os
import resource
import shutil
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from faults import FailingDisk, flip, limited, tearing
from fitting import Recorder, logged, one_thread
from killing import KilledError, Outcome, build, check_same, corpora, kill, never_killed  # noqa: F401  (fixtures are among them)

from llmkit.errors import ResourceError
from llmkit.run import checkpoint as module
from llmkit.train.loop import Fit

_one_thread = pytest.fixture(autouse=True)(one_thread)
ERRORS = [errno.ENOSPC, errno.EIO, errno.EROFS, errno.EDQUOT]
behind = pytest.mark.parametrize("behind", [False, True], ids=["at once", "behind"])


def names(fit: Fit) -> list[str]:
    return sorted(path.name for path in (fit.folder / "checkpoints").iterdir())


def fail_between(disk: FailingDisk, first: int, last: int) -> dict[int, Callable[[], None]]:
    """A disk that fails while steps `first` to `last` are saved."""

    def switch(on: bool) -> None:
        for _ in range(0 if on else 1000):  # what is written behind may take its time
            if disk.failures:
                break
            time.sleep(0.01)
        disk.on = on

    return {first: lambda: switch(True), last + 1: lambda: switch(False)}


@behind
@pytest.mark.parametrize("operation", ["save_file", "fsync", "rename", "mkdir"])
@pytest.mark.parametrize("error", ERRORS)
def test_a_checkpoint_that_cannot_be_written_is_warned_of_and_training_goes_on(
    build: Callable[..., Fit],
    never_killed: Callable[[str], Outcome],
    monkeypatch: pytest.MonkeyPatch,
    operation: str,
    error: int,
    behind: bool,
) -> None:
    warnings: list[str] = []
    fit = build("fit", "dropout", warn=warnings.append)
    fit.keeper.behind = behind
    with monkeypatch.context() as patch:
        disk = FailingDisk(patch, operation, error, below="" if operation == "fsync" else "step-", on=False)
        fit.run([logged(fit), Recorder(fail_between(disk, 6, 6))])
    assert disk.failures >= 1
    assert len(warnings) in (1, 1 + behind), "behind, the checkpoint of the step before may still be written"
    assert all("could not be written" in text and os.strerror(error) in text for text in warnings)
    assert any(f"the one of step {step} stands" in warnings[0] for step in (5, 5 - behind))
    assert "failure 1 of 3" in warnings[0]
    check_same(fit, never_killed("dropout"))


@behind
def test_after_three_failures_in_a_row_it_ends_and_the_same_command_goes_on(
    build: Callable[..., Fit],
    never_killed: Callable[[str], Outcome],
    monkeypatch: pytest.MonkeyPatch,
    behind: bool,
) -> None:
    warnings: list[str] = []
    fit = build("fit", "dropout", warn=warnings.append)
    fit.keeper.behind = behind
    with monkeypatch.context() as patch:
        disk = FailingDisk(patch, "save_file", below="step-", on=False)
        with pytest.raises(ResourceError, match=r"the one of step [45] stands") as caught:
            fit.run([logged(fit), Recorder(fail_between(disk, 6, 99))])
    assert caught.value.exit_code == 5
    assert len(warnings) in (3, 3 + behind), "behind, one more may have been begun when the third is seen to fail"
    assert len(names(fit)) == 2
    assert names(fit)[-1] in ("step-00000005", "step-00000004" if behind else "")
    assert fit.state.step <= 10, "it does not go on for long without being able to save"
    again = build("fit", "dropout")
    assert again.resume()
    again.run([logged(again)])
    check_same(again, never_killed("dropout"))


def test_failures_that_are_not_in_a_row_do_not_end_it(
    build: Callable[..., Fit], monkeypatch: pytest.MonkeyPatch
) -> None:
    warnings: list[str] = []
    fit = build("fit", "plain", warn=warnings.append)
    with monkeypatch.context() as patch:
        disk = FailingDisk(patch, "save_file", below="step-", on=False)
        disk.chosen = lambda number: number % 3 == 1  # every second checkpoint: a whole one has two files
        fit.run([logged(fit), Recorder(fail_between(disk, 1, 99))])
    assert len(warnings) >= 4
    assert {text.rsplit("; ", 1)[1] for text in warnings} == {"failure 1 of 3 in a row"}


def test_one_that_failed_is_tried_again_soon_and_not_at_the_next_interval(
    build: Callable[..., Fit], monkeypatch: pytest.MonkeyPatch
) -> None:
    from llmkit.train import when

    monkeypatch.setattr(when, "_RETRY_SECONDS", 0.0)
    fit = build("fit", "plain", save_every=5, warn=lambda text: None)
    with monkeypatch.context() as patch:
        disk = FailingDisk(patch, "save_file", below="step-", on=False)
        with pytest.raises(KilledError):
            fit.run([logged(fit), Recorder(fail_between(disk, 4, 5) | {9: kill})])
    assert disk.failures == 1
    assert names(fit)[-1] in ("step-00000006", "step-00000007", "step-00000008"), "long before step 10"


@behind
@pytest.mark.parametrize("file", ["weights.safetensors", "optimizer.safetensors"])
def test_a_torn_write_is_noticed_at_once(
    build: Callable[..., Fit],
    never_killed: Callable[[str], Outcome],
    monkeypatch: pytest.MonkeyPatch,
    behind: bool,
    file: str,
) -> None:
    warnings: list[str] = []
    fit = build("fit", "dropout", warn=warnings.append)
    fit.keeper.behind, real, torn = behind, module.save_file, []

    def tear(path: Path) -> None:
        if path.name == file and "step-00000006" in str(path):
            torn.append(path)
            flip(path)

    with monkeypatch.context() as patch:
        patch.setattr(module, "save_file", tearing(real, tear, lambda: True))
        with pytest.raises(KilledError):
            fit.run([logged(fit), Recorder({7: kill})])
        with suppress(OSError):
            fit.keeper.checkpoints.wait()
    assert len(torn) == 1
    assert "step-00000006" not in names(fit)
    again = build("fit", "dropout")
    assert again.resume()
    assert again.state.step == 5
    again.run([logged(again)])
    check_same(again, never_killed("dropout"))


def test_a_file_that_may_not_grow_any_more(build: Callable[..., Fit], never_killed: Callable[[str], Outcome]) -> None:
    """A limit of the system: writing stops in the middle of the file, as on a full disk."""
    warnings: list[str] = []
    fit = build("fit", "dropout", warn=warnings.append)
    limit = limited(resource.RLIMIT_FSIZE, 20_000)
    at = {6: limit.__enter__, 7: lambda: limit.__exit__(None, None, None)}
    fit.run([logged(fit), Recorder(at)])
    assert len(warnings) == 1
    assert "the one of step 5 stands" in warnings[0]
    check_same(fit, never_killed("dropout"))


def test_a_signal_while_the_disk_is_full_ends_with_what_stands(
    build: Callable[..., Fit], never_killed: Callable[[str], Outcome], monkeypatch: pytest.MonkeyPatch
) -> None:
    import signal

    fit = build("fit", "dropout", save_every=4)
    with monkeypatch.context() as patch:
        disk = FailingDisk(patch, "save_file", below="step-", on=False)
        at = fail_between(disk, 6, 99) | {7: lambda: os.kill(os.getpid(), signal.SIGTERM)}
        with pytest.raises(ResourceError, match="the one of step 4 stands"):
            fit.run([logged(fit), Recorder(at)])
    again = build("fit", "dropout", save_every=4)
    assert again.resume()
    again.run([logged(again)])
    check_same(again, never_killed("dropout"))


@pytest.mark.parametrize("operation", ["save_file", "fsync", "rename", "mkdir"])
@pytest.mark.parametrize("error", [errno.ENOSPC, errno.EROFS, errno.EACCES])
def test_before_the_first_step_it_is_known_that_nothing_can_be_written(
    build: Callable[..., Fit], monkeypatch: pytest.MonkeyPatch, operation: str, error: int
) -> None:
    fit, recorder = build("fit", "plain"), Recorder()
    with monkeypatch.context() as patch:
        FailingDisk(patch, operation, error)
        with pytest.raises(ResourceError, match="checkpoints cannot be written") as caught:
            fit.run([recorder])
    assert (recorder.steps, fit.state.step, caught.value.exit_code) == ([], 0, 5)
    assert caught.value.got


def test_before_the_first_step_it_is_known_that_there_is_no_place(
    build: Callable[..., Fit], monkeypatch: pytest.MonkeyPatch
) -> None:
    fit, recorder = build("fit", "plain"), Recorder()
    usage = shutil.disk_usage
    bytes_needed = 3 * 3 * sum(tensor.nbytes for tensor in fit.masters.saved().values())
    for free, enough in ((bytes_needed - 1, False), (bytes_needed, True)):
        with monkeypatch.context() as patch:
            patch.setattr(shutil, "disk_usage", lambda path, free=free: usage(path)._replace(free=free))
            if enough:
                fit.keeper.rehearse()
                continue
            with pytest.raises(ResourceError, match="not enough disk space"):
                fit.run([recorder])
    assert recorder.steps == []


def test_a_disk_that_gives_back_other_bytes_is_known_before_the_first_step(
    build: Callable[..., Fit], monkeypatch: pytest.MonkeyPatch
) -> None:
    fit, recorder = build("fit", "plain"), Recorder()
    with monkeypatch.context() as patch:
        patch.setattr(module, "save_file", tearing(module.save_file, lambda path: path.write_bytes(b""), lambda: True))
        with pytest.raises(ResourceError):
            fit.run([recorder])
    assert recorder.steps == []


def test_the_best_weights_that_cannot_be_written_end_it_without_a_loss(
    build: Callable[..., Fit], never_killed: Callable[[str], Outcome], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without them the run could not end with the best weights: it stops, and goes on from the last checkpoint."""
    from llmkit.train import keeping

    fit = build("fit", "evaluations")
    with monkeypatch.context() as patch:
        real = keeping.save_file

        def full(tensors: Any, path: Path) -> None:
            if fit.state.step == 6:
                raise OSError(errno.ENOSPC, "No space left on device")
            real(tensors, path)

        patch.setattr(keeping, "save_file", full)
        with pytest.raises((ResourceError, OSError)):
            fit.run([logged(fit)])
    again = build("fit", "evaluations")
    assert again.resume()
    assert again.state.step == 5
    again.run([logged(again)])
    check_same(again, never_killed("evaluations"))
