"""What happens to a run from outside: each ends with its exit code and no traceback, and the same command goes on from
there to the same bits."""

from __future__ import annotations

import json
import os
import resource
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from conftest import Cli, Outcome, write_chat_rows
from faults import flip, last_json, limited, on_small_disk
from forked import llmkit

from llmkit.run.checkpoint import checked_manifest, published, step_of
from llmkit.run.directory import Run
from llmkit.run.log import read_metrics
from llmkit.train.loop import Fit

SETTINGS = (
    *("name=one", "data.eval=20%", "finetune.steps=12", "finetune.lr=1e-3", "finetune.log_every=1"),
    *("finetune.trackers=[]", "finetune.dropout=0.1", "finetune.save_every=2", "finetune.eval_every=5"),
    "finetune.precision=fp32",
)
Command = Callable[..., Outcome]


@pytest.fixture
def command(cli: Cli, tiny_llama: Path, chat_rows: Path) -> Command:
    def call(run: Path, *more: str) -> Outcome:
        words = [word for setting in (*SETTINGS, *more) for word in ("--set", setting)]
        return cli("finetune", "-m", tiny_llama, "-d", chat_rows, "-o", run, *words, "--json")

    return call


@pytest.fixture
def at_step(monkeypatch: pytest.MonkeyPatch) -> Callable[[int, Callable[[], Any]], None]:
    """Something that happens once, before a step is taken."""

    def arrange(step: int, happens: Callable[[], Any]) -> None:
        real, done = Fit._step, []

        def first(fit: Fit, *given: Any) -> Any:
            if fit.state.step == step and not done:
                done.append(step)
                happens()
            return real(fit, *given)

        monkeypatch.setattr(Fit, "_step", first)

    return arrange


@pytest.fixture(scope="module")
def whole(tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What the command leaves when nothing happens."""
    folder = tmp_path_factory.mktemp("undisturbed")
    settings = [word for setting in SETTINGS for word in ("--set", setting)]
    rows = write_chat_rows(folder / "chat.jsonl")
    process = llmkit("finetune", "-m", tiny_llama, "-d", rows, "-o", folder / "run", *settings)
    assert process.wait() == 0, process.err
    return folder / "run"


def goes_on(command: Command, run: Path, whole: Path) -> None:
    """The same command, and what an undisturbed run leaves."""
    again = command(run)
    assert again.code == 0, again.out
    assert "going on after step" in again.err
    weights = [(folder / "finetune" / "model" / "model.safetensors").read_bytes() for folder in (run, whole)]
    assert weights[0] == weights[1]
    logs = [
        [(line["step"], line.get("loss"), line.get("eval_loss")) for line in read_metrics(folder / "metrics.jsonl")]
        for folder in (run, whole)
    ]
    assert logs[0] == logs[1]


def check_ended(outcome: Outcome, code: int, kind: str, run: Path, *needles: str) -> None:
    assert outcome.code == code, outcome.out
    assert outcome.json["kind"] == kind
    for needle in needles:
        assert needle in outcome.out
    assert "Traceback" not in outcome.err
    assert not (run / "error.log").exists()
    for path in published(run / "finetune" / "checkpoints"):
        checked_manifest(path)


CHANGES: dict[str, Callable[[Path], Any]] = {
    "another bit": flip,
    "cut short": lambda file: os.truncate(file, file.stat().st_size // 2),
    "longer": lambda file: file.open("ab").write(b"more"),
    "gone": lambda file: file.unlink(),
    "replaced": lambda file: (file.with_name("new").write_bytes(b"x" * 50), file.with_name("new").replace(file)),
    "written again with the same bytes": lambda file: file.write_bytes(file.read_bytes()),
}


@pytest.mark.parametrize("name", CHANGES)
@pytest.mark.parametrize("file", ["train/input_ids.bin", "train/input_ids.offsets.bin", "eval/input_ids.bin"])
def test_a_corpus_file_that_changes_while_it_is_learnt_from(
    command: Command, at_step: Callable[..., None], tmp_path: Path, name: str, file: str, whole: Path
) -> None:
    run = tmp_path / "run"
    at_step(7, lambda: CHANGES[name](run / "preprocess" / file))
    ended = command(run)
    check_ended(ended, 4, "artifact", run, "a corpus file changed while it was in use", file)
    goes_on(command, run, whole)


def test_a_corpus_that_changed_between_two_lives_is_made_again(
    command: Command, at_step: Callable[..., None], tmp_path: Path, whole: Path
) -> None:
    run = tmp_path / "run"

    def die() -> None:
        raise MemoryError("out of memory")

    at_step(7, die)
    check_ended(command(run), 5, "resource", run, "there is not enough memory")
    flip(run / "preprocess" / "train" / "input_ids.bin")
    (run / "preprocess" / "eval" / "input_ids.bin").unlink()
    goes_on(command, run, whole)


def test_the_data_file_changes_between_two_lives(
    command: Command, at_step: Callable[..., None], tmp_path: Path, chat_rows: Path, whole: Path
) -> None:
    """Its rows are other inputs: that is said, and nothing is taken silently."""
    run, before = tmp_path / "run", chat_rows.read_text()

    def die() -> None:
        raise MemoryError

    at_step(7, die)
    assert command(run).code == 5
    chat_rows.write_text(before.replace("apple", "grape"))
    refused = command(run)
    assert refused.code == 2, refused.out
    assert "the corpus" in refused.json["got"]
    chat_rows.write_text(before)
    goes_on(command, run, whole)


@pytest.mark.parametrize(
    "error", [MemoryError("out of memory"), RuntimeError("can't allocate memory: you tried 1 EiB")]
)
def test_out_of_memory(
    command: Command, at_step: Callable[..., None], tmp_path: Path, error: Exception, whole: Path
) -> None:
    def die() -> None:
        raise error

    at_step(7, die)
    check_ended(command(tmp_path / "run"), 5, "resource", tmp_path / "run", "there is not enough memory")
    goes_on(command, tmp_path / "run", whole)


def test_out_of_file_handles(command: Command, at_step: Callable[..., None], tmp_path: Path, whole: Path) -> None:
    """A limit of the system, reached in the middle of training: it ends, or waits it out, and loses nothing."""
    run = tmp_path / "run"
    used = max(int(name) for name in os.listdir("/proc/self/fd")) + 1  # noqa: PTH208
    limit = limited(resource.RLIMIT_NOFILE, used)
    taken: list[int] = []

    def run_out() -> None:
        limit.__enter__()
        try:
            while True:
                taken.append(os.dup(0))
        except OSError:
            pass

    at_step(7, run_out)
    try:
        ended = command(run)
    finally:
        for number in taken:
            os.close(number)
        limit.__exit__(None, None, None)
    check_ended(ended, 5, "resource", run)
    assert step_of(published(run / "finetune" / "checkpoints")[0]) >= 4
    goes_on(command, run, whole)


def test_the_log_is_cut_in_the_middle_of_a_line(
    command: Command, at_step: Callable[..., None], tmp_path: Path, whole: Path
) -> None:
    run = tmp_path / "run"

    def die() -> None:
        raise MemoryError

    at_step(7, die)
    assert command(run).code == 5
    log = run / "metrics.jsonl"
    log.write_bytes(log.read_bytes()[:-17])
    goes_on(command, run, whole)


def test_a_lock_of_a_process_that_is_gone_is_no_lock(tmp_path: Path) -> None:
    """The kernel lets go of it with the process, and what run.json says of it keeps nobody out."""
    import signal

    child = os.fork()
    if child == 0:
        Run.open(tmp_path / "run", "r", "name: r\n")
        os.kill(os.getpid(), signal.SIGKILL)
    os.waitpid(child, 0)
    assert json.loads((tmp_path / "run" / "run.json").read_text())["process"]["pid"] == child
    run = Run.open(tmp_path / "run", "r", "name: r\n")
    assert run.record["process"]["pid"] == os.getpid()
    run.close()


def test_a_lock_that_is_held_names_who_holds_it(tmp_path: Path) -> None:
    from llmkit.errors import ResourceError

    run = Run.open(tmp_path / "run", "r", "name: r\n")
    with pytest.raises(ResourceError, match="in use") as caught:
        Run.open(tmp_path / "run", "r", "name: r\n")
    assert f"process {os.getpid()} on " in str(caught.value.got)
    assert caught.value.exit_code == 5
    run.close()


# What follows mounts a small disk of its own, and starts real processes.

LLMKIT = f'"{sys.executable}" -m llmkit'


def words(model: Path, rows: Path, run: Path, *more: str) -> list[object]:
    settings = (word for setting in (*SETTINGS, *more) for word in ("--set", setting))
    return ["finetune", "-m", model, "-d", rows, "-o", run, "--json", *settings]


@pytest.mark.slow
def test_a_disk_that_fills_up_in_mid_save(tiny_llama: Path, chat_rows: Path, tmp_path: Path, cli: Cli) -> None:
    """Another program fills it after some steps; training goes on, then ends with 5; with space again it goes on exactly."""
    disk, log, saved = tmp_path / "disk", tmp_path / "log", tmp_path / "saved"
    fill = (
        f'({LLMKIT} "$@" > "{log}.out" 2> "{log}.err"; echo $? > "{log}.code") & '
        f'while [ ! -s "{log}.code" ] && [ "$(wc -l < {disk}/run/metrics.jsonl 2>/dev/null || echo 0)" -lt 40 ]; '
        "do sleep 0.02; done; "
        f'while [ ! -s "{log}.code" ]; do cat /dev/zero > {disk}/filler 2>/dev/null; dd if=/dev/zero of={disk}/filler.2 '
        f"bs=100 count=100 2>/dev/null; sleep 0.02; done; wait; "
        f'rm {disk}/filler {disk}/filler.2; cp -r {disk}/run "{saved}"'
    )
    long = (
        *("finetune.steps=100000", "finetune.schedule=constant", "finetune.warmup=0", "finetune.eval_every=null"),
        "finetune.save_every=20",
    )
    done = on_small_disk(disk, 12, fill, *words(tiny_llama, chat_rows, disk / "run", *long))
    assert done.returncode == 0, done.stderr
    err = Path(f"{log}.err").read_text()
    assert Path(f"{log}.code").read_text().strip() == "5", err
    error = last_json(Path(f"{log}.out").read_text())
    assert error["kind"] == "resource"
    assert "Traceback" not in err
    assert "failure 1 of 3 in a row" in err, "it is warned of first, and tried again"
    newest = published(saved / "finetune" / "checkpoints")[0]
    checked_manifest(newest)
    assert not list((saved / "finetune" / "checkpoints").glob(".step-*")), "the space is given back"
    steps = str(step_of(newest) + 20)
    same = [setting for setting in long if "steps=" not in setting]
    again = cli(*words(tiny_llama, chat_rows, saved, *same, f"finetune.steps={steps}"), "--resume-anyway")
    assert again.code == 0, again.out
    whole = tmp_path / "whole"
    assert cli(*words(tiny_llama, chat_rows, whole, *same, f"finetune.steps={steps}")).code == 0
    weights = [(run / "finetune" / "model" / "model.safetensors").read_bytes() for run in (saved, whole)]
    assert weights[0] == weights[1]


@pytest.mark.slow
def test_a_disk_too_small_for_checkpoints_is_known_before_the_first_step(
    tiny_llama: Path, chat_rows: Path, tmp_path: Path
) -> None:
    disk = tmp_path / "disk"
    done = on_small_disk(disk, 1.5, f'{LLMKIT} "$@"', *words(tiny_llama, chat_rows, disk / "run"))
    assert done.returncode == 5, done.stderr
    error = last_json(done.stdout)
    assert "not enough disk space for checkpoints" in error["what"]
    assert "GB" in error["got"]
    assert "loss" not in done.stderr


@pytest.mark.slow
def test_a_run_that_cannot_be_written_is_known_before_anything_is_done(
    tiny_llama: Path, chat_rows: Path, tmp_path: Path
) -> None:
    disk = tmp_path / "disk"
    script = f'mkdir {disk}/run && mount --bind {disk}/run {disk}/run && mount -o remount,bind,ro {disk}/run && {LLMKIT} "$@"'
    done = on_small_disk(disk, 30, script, *words(tiny_llama, chat_rows, disk / "run"))
    assert done.returncode == 5, done.stdout + done.stderr
    assert "Read-only file system" in last_json(done.stdout)["got"]
    assert "preprocess running" not in done.stderr


@pytest.mark.slow
def test_the_checkpoints_become_read_only_while_training(tiny_llama: Path, chat_rows: Path, tmp_path: Path) -> None:
    disk, log, saved = tmp_path / "disk", tmp_path / "log", tmp_path / "saved"
    place = disk / "run" / "finetune" / "checkpoints"
    script = (
        f'({LLMKIT} "$@" > "{log}.out" 2> "{log}.err"; echo $? > "{log}.code") & '
        f'while [ ! -s "{log}.code" ] && [ "$(wc -l < {disk}/run/metrics.jsonl 2>/dev/null || echo 0)" -lt 40 ]; '
        "do sleep 0.02; done; "
        f'mount --bind {place} {place} && mount -o remount,bind,ro {place}; wait; cp -r {disk}/run "{saved}"'
    )
    long = ("finetune.steps=100000", "finetune.eval_every=null", "finetune.save_every=20")
    done = on_small_disk(disk, 30, script, *words(tiny_llama, chat_rows, disk / "run", *long))
    assert done.returncode == 0, done.stderr
    err = Path(f"{log}.err").read_text()
    assert Path(f"{log}.code").read_text().strip() == "5", err
    assert last_json(Path(f"{log}.out").read_text())["kind"] == "resource"
    assert "failure 1 of 3 in a row" in err
    assert "Read-only file system" in err
    assert "Traceback" not in err
    checked_manifest(published(saved / "finetune" / "checkpoints")[0])
    assert json.loads((saved / "run.json").read_text())["stages"]["finetune"]["state"] == "resource"
