"""What each run is doing, told from its directory alone; nothing in it is touched."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from llmkit.run.directory import Artifact, Run
from llmkit.run.held import is_held
from llmkit.run.overview import Overview, find_runs, read_overview, read_recipe

PLAN = ["preprocess", "finetune", "evaluate"]


def open_run(path: Path, plan: list[str] = PLAN) -> Run:
    return Run.open(path, path.name, yaml.safe_dump({"name": path.name, "task": "chat", "stages": plan, "data": {}}))


def finish(run: Run, stage: str, metrics: dict[str, Any] | None = None) -> None:
    run.start(stage, {}, keep=False)
    run.finish(Artifact(stage, run.folder(stage), "digest", (), metrics or {}), 1.0)


def stopped_in(path: Path, state: str, inputs: dict[str, Any] | None = None) -> Overview:
    """A run whose fine-tuning ended in some state."""
    run = open_run(path)
    finish(run, "preprocess")
    run.start("finetune", inputs or {}, keep=True)
    run.note_state("finetune", state)
    run.close()
    return read_overview(path)


def log(run: Path, *lines: dict[str, Any]) -> None:
    text = "".join(json.dumps({"stage": "finetune", **line}) + "\n" for line in lines)
    with (run / "metrics.jsonl").open("a") as file:
        file.write(text)


def tree(folder: Path) -> dict[str, tuple[int, int]]:
    return {str(p): (p.lstat().st_mtime_ns, p.lstat().st_size) for p in sorted(folder.rglob("*"))}


def test_a_run_that_is_open_is_alive_until_it_is_closed(tmp_path: Path) -> None:
    run = open_run(tmp_path / "a")
    run.start("preprocess", {}, keep=False)
    alive = read_overview(run.path)
    assert (alive.state, alive.stage, alive.pid, alive.next) == ("alive", "preprocess", os.getpid(), None)
    assert is_held(run.path, {"pid": 1, "host": "elsewhere"})
    run.close()
    assert read_overview(run.path).state == "crashed"


def test_a_killed_run_is_crashed_and_says_how_to_go_on(tmp_path: Path) -> None:
    script = (
        "import os, signal, sys; from pathlib import Path; from llmkit.run.directory import Run\n"
        "run = Run.open(Path(sys.argv[1]), 'a', 'name: a\\nstages: [preprocess]\\n')\n"
        "run.start('preprocess', {}, keep=False); os.kill(os.getpid(), signal.SIGKILL)"
    )
    done = subprocess.run([sys.executable, "-c", script, str(tmp_path / "a run")], check=False)
    assert done.returncode == -signal.SIGKILL
    found = read_overview(tmp_path / "a run")
    assert (found.state, found.stage) == ("crashed", "preprocess")
    assert found.next == f"llmkit run '{tmp_path / 'a run'}'"
    assert found.pid not in (None, os.getpid())


def test_asking_whether_a_run_is_held_leaves_no_trace(tmp_path: Path) -> None:
    (tmp_path / "bare").mkdir()
    assert not is_held(tmp_path / "bare")
    assert not (tmp_path / "bare" / ".lock").exists()
    open_run(tmp_path / "a").close()
    before = tree(tmp_path)
    assert not is_held(tmp_path / "a")
    read_overview(tmp_path / "a")
    assert tree(tmp_path) == before
    open_run(tmp_path / "a").close()  # which a lock that was left would refuse


def test_two_that_ask_do_not_take_each_other_for_a_run(tmp_path: Path) -> None:
    import fcntl

    open_run(tmp_path / "a").close()
    with (tmp_path / "a" / ".lock").open() as other:
        fcntl.flock(other, fcntl.LOCK_SH)
        assert not is_held(tmp_path / "a")


def test_where_a_lock_cannot_be_asked_for_the_process_tells(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import fcntl
    import socket

    open_run(tmp_path / "a").close()

    def not_here(descriptor: int, operation: int) -> None:
        raise OSError(38, "Function not implemented")

    monkeypatch.setattr(fcntl, "flock", not_here)
    here = socket.gethostname()
    assert is_held(tmp_path / "a", {"pid": os.getpid(), "host": here})
    assert not is_held(tmp_path / "a", {"pid": os.getpid(), "host": "elsewhere"})
    assert not is_held(tmp_path / "a", {"pid": 2**22 + 1, "host": here})


@pytest.mark.parametrize(
    ("noted", "state", "why"),
    [
        ("stopped", "stopped", None),
        ("diverged", "diverged", None),
        ("data", "failed", "data"),
        ("resource", "failed", "resource"),
        ("failed", "failed", "bug"),
    ],
)
def test_how_a_stage_ended_is_the_state(noted: str, state: str, why: str | None, tmp_path: Path) -> None:
    found = stopped_in(tmp_path / "a", noted)
    assert (found.state, found.why, found.stage) == (state, why, "finetune")
    assert found.next is not None
    assert found.next.startswith(f"llmkit run {tmp_path / 'a'}")


def test_a_diverged_run_is_to_go_on_at_half_the_rate(tmp_path: Path) -> None:
    found = stopped_in(tmp_path / "a", "diverged", {"recipe.finetune.lr": 0.004})
    assert found.next == f"llmkit run {tmp_path / 'a'} --set finetune.lr=0.002 --resume-anyway"
    unknown = stopped_in(tmp_path / "b", "diverged", {"recipe.finetune.lr": "auto"})
    assert unknown.next is not None
    assert "finetune.divergence.nan=rollback --resume-anyway" in unknown.next


def test_new_partial_and_done_follow_the_recipes_plan(tmp_path: Path) -> None:
    run = open_run(tmp_path / "a")
    run.close()
    seen = [(read_overview(run.path).state, read_overview(run.path).stage)]
    for stage in PLAN:
        run = open_run(tmp_path / "a")
        finish(run, stage)
        run.close()
        seen.append((read_overview(run.path).state, read_overview(run.path).stage))
    assert seen == [("new", "preprocess"), ("partial", "finetune"), ("partial", "evaluate"), ("done", "evaluate")]
    assert read_overview(run.path).next is None


def test_a_failure_that_the_recipe_left_behind_does_not_count(tmp_path: Path) -> None:
    run = open_run(tmp_path / "a")
    run.start("export", {}, keep=False)
    run.note_state("export", "data")
    run.record["stages"]["export"]["started"] = "2020-01-01T00:00:00+00:00"
    for stage in PLAN:
        finish(run, stage)
    run.close()
    assert read_overview(run.path).state == "done"
    record = json.loads((run.path / "run.json").read_text())
    record["stages"]["export"]["started"] = "2999-01-01T00:00:00+00:00"
    (run.path / "run.json").write_text(json.dumps(record))
    last = read_overview(run.path)
    assert (last.state, last.stage, last.next) == ("failed", "export", f"llmkit export {run.path}")


def test_step_and_losses_are_the_newest_of_the_stage_in_hand(tmp_path: Path) -> None:
    run = open_run(tmp_path / "a")
    run.start("finetune", {}, keep=False)
    run.note("finetune", total_steps=50)
    log(run.path, {"step": 10, "loss": 3.0}, {"step": 10, "eval_loss": 2.9}, {"step": 20, "loss": 2.0})
    log(
        run.path,
        {"step": 21, "event": "skipped", "why": "the loss spikes"},
        {"stage": "pretrain", "step": 99, "loss": 9},
    )
    with (run.path / "metrics.jsonl").open("a") as file:
        file.write('{"stage": "finetune", "step": 30, "lo')
    found = read_overview(run.path)
    assert (found.step, found.total_steps, found.loss, found.eval_loss) == (21, 50, 2.0, 2.9)
    assert found.event == "step 21 skipped: the loss spikes"
    run.close()


def test_of_a_finished_training_its_own_results_are_shown(tmp_path: Path) -> None:
    run = open_run(tmp_path / "a")
    finish(run, "finetune", {"steps": 40, "train_loss": 2.5, "eval_loss": 1.5})
    log(run.path, {"step": 40, "loss": 2.25}, {"step": 40, "eval_loss": 1.75})
    run.close()
    found = read_overview(run.path)
    assert (found.step, found.total_steps, found.loss, found.eval_loss) == (40, 40, 2.25, 1.5)


def test_what_an_earlier_try_logged_is_not_this_ones(tmp_path: Path) -> None:
    run = open_run(tmp_path / "a")
    log(run.path, {"step": 500, "loss": 1.0})
    os.utime(run.path / "metrics.jsonl", (1e9, 1e9))
    run.start("finetune", {}, keep=False)
    assert read_overview(run.path).step is None
    (run.path / "finetune" / "checkpoints" / "step-00000480").mkdir(parents=True)
    resumed = read_overview(run.path)
    assert (resumed.step, resumed.checkpoint) == (500, 480)
    run.close()


def test_the_checkpoint_to_go_on_from_is_one_that_was_published(tmp_path: Path) -> None:
    stopped_in(tmp_path / "a", "stopped")
    folder = tmp_path / "a" / "finetune" / "checkpoints"
    for name in ("step-00000007", ".step-00000009.1.tmp", "unused-step-00000008", "step-x"):
        (folder / name).mkdir(parents=True)
    (folder / "step-00000010").symlink_to(tmp_path)
    found = read_overview(tmp_path / "a")
    assert (found.checkpoint, found.step) == (7, 7)


def test_a_large_log_is_read_at_its_end(tmp_path: Path) -> None:
    stopped_in(tmp_path / "a", "stopped")
    with (tmp_path / "a" / "metrics.jsonl").open("wb") as file:
        file.truncate(2**36)  # with a hole, so that it takes no room; reading all of it would take minutes
    log(tmp_path / "a", {"step": 0, "loss": 9.0}, {"step": 7, "loss": 1.0})
    found = read_overview(tmp_path / "a")
    assert (found.step, found.loss, found.eval_loss) == (7, 1.0, None)


def test_a_held_out_loss_is_looked_for_further_back(tmp_path: Path) -> None:
    stopped_in(tmp_path / "a", "stopped")
    log(tmp_path / "a", {"step": 1, "eval_loss": 4.0}, *({"step": n, "loss": 1.0} for n in range(2, 5000)))
    found = read_overview(tmp_path / "a")
    assert (found.step, found.eval_loss) == (4999, 4.0)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "{",
        "[]",
        "3",
        '{"stages": []}',
        '{"stages": {"finetune": 3}}',
        '{"stages": {"../..": {}}}',
        "[" * 10**5,
        "\xff",
    ],
    ids=lambda text: text[:20],
)
def test_a_damaged_record_is_shown_and_hides_nothing(text: str, tmp_path: Path) -> None:
    stopped_in(tmp_path / "good", "stopped")
    stopped_in(tmp_path / "bad", "stopped")
    (tmp_path / "bad" / "run.json").write_text(text, encoding="latin-1")
    bad, good = (read_overview(path) for path in find_runs([tmp_path]))
    assert (bad.state, bad.next) == ("damaged", f"llmkit verify {tmp_path / 'bad'}")
    assert good.state == "stopped"


def test_odd_values_in_a_record_are_left_out(tmp_path: Path) -> None:
    odd = {
        "name": "a\ud800",
        "created": 3,
        "process": {"pid": "x", "host": []},
        "parent": {"x": 1},
        "stages": {"finetune": {"state": 5, "started": None, "metrics": {"steps": "x", "eval_loss": 10**400}}},
    }
    open_run(tmp_path / "a").close()
    (tmp_path / "a" / "run.json").write_text(json.dumps(odd))
    found = read_overview(tmp_path / "a")
    assert (found.name, found.state, found.created, found.pid, found.host, found.model) == (
        *("a", "failed", None),
        *(None, None, None),
    )
    assert (found.step, found.eval_loss) == (None, None)


def test_a_record_that_is_no_file_is_damage(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    os.mkfifo(tmp_path / "a" / "run.json")
    assert read_overview(tmp_path / "a").state == "damaged"


@pytest.mark.parametrize("text", [None, "- a list", "{", "a: [\n"])
def test_without_a_recipe_a_run_is_damaged(text: str | None, tmp_path: Path) -> None:
    stopped_in(tmp_path / "a", "stopped")
    (tmp_path / "a" / "recipe.yaml").unlink()
    if text is not None:
        (tmp_path / "a" / "recipe.yaml").write_text(text)
    found = read_overview(tmp_path / "a")
    assert found.state == "damaged"
    assert "recipe.yaml" in (found.why or "")


def test_the_head_of_a_recipe_is_enough_or_else_all_is_read(tmp_path: Path) -> None:
    (tmp_path / "recipe.yaml").write_text("name: a\nstages: [export]\ndata: {\n")
    assert read_recipe(tmp_path, head=True) == {"name": "a", "stages": ["export"]}
    assert read_recipe(tmp_path) is None
    (tmp_path / "recipe.yaml").write_text("name: a\ndata: {}\nstages: [export]\n")
    assert (read_recipe(tmp_path, head=True) or {})["stages"] == ["export"]


def test_runs_are_found_at_any_depth_once_and_not_inside_runs(tmp_path: Path) -> None:
    for place in ("a", "deep/er/b", "a/finetune/inner", ".hidden/c"):
        open_run(tmp_path / place).close()
    (tmp_path / "link-to-run").symlink_to(tmp_path / "a")
    (tmp_path / "link-to-folder").symlink_to(tmp_path / "deep")
    (tmp_path / "deep" / "loop").symlink_to(tmp_path)
    found = [str(path.relative_to(tmp_path)) for path in find_runs([tmp_path, tmp_path / "a"])]
    assert found == ["a", "deep/er/b"]
    assert list(find_runs([tmp_path / "a"])) == [tmp_path / "a"]


def test_a_folder_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    open_run(tmp_path / "a").close()
    unreadable: list[Path] = []
    assert list(find_runs([tmp_path / "gone", tmp_path], unreadable.append)) == [tmp_path / "a"]
    assert unreadable == [tmp_path / "gone"]
