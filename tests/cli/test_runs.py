"""`llmkit runs`: the table, the command lines that go on, and JSON."""

from __future__ import annotations

import json
import os
import shlex
import signal
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from conftest import Cli

from llmkit.run.directory import Artifact, Run

QUICK = ("--set", "finetune.steps=8", "--set", "finetune.log_every=1", "--set", "data.eval=20%")


def make(path: Path, state: str, task: str = "chat", model: str = "base", **metrics: float) -> Path:
    """A run of one training stage that ended in some state."""
    run = Run.open(path, path.name, yaml.safe_dump({"name": path.name, "task": task, "stages": ["finetune"]}))
    run.record["parent"] = model
    run.start("finetune", {}, keep=True)
    if state == "done":
        run.finish(Artifact("finetune", run.folder("finetune"), "x", (), metrics), 1.0)
    else:
        run.note_state("finetune", state)
    run.close()
    return path


@pytest.fixture
def some(tmp_path: Path) -> Path:
    """Four runs that were last written to one after the other."""
    folder = tmp_path / "some"
    make(folder / "a", "done", train_loss=2.0, eval_loss=3.0)
    make(folder / "b", "stopped", task="text", model="pkg://other/Model.gguf")
    make(folder / "c", "done", train_loss=1.0, eval_loss=4.0)
    make(folder / "d", "data")
    for number, name in enumerate("abcd"):
        for path in (folder / name, *(folder / name).rglob("*")):
            os.utime(path, (1e9 + number, 1e9 + number))
    return folder


def names(cli: Cli, *arguments: object) -> str:
    found = cli("runs", *arguments, "--json")
    assert found.code == 0, found.out
    return "".join(run["name"] for run in found.json["runs"])


def test_runs_without_a_folder_looks_where_recipes_put_them(cli: Cli) -> None:
    empty = cli("runs")
    assert empty.code == 0
    assert "there is no run below runs" in empty.out
    assert names(cli) == ""
    make(Path("runs") / "x", "done")
    assert names(cli) == "x"
    assert "runs/x" in cli("runs").out


def test_the_newest_is_first_and_orders_and_filters_are_kept(cli: Cli, some: Path) -> None:
    assert names(cli, some) == "dcba"
    assert names(cli, some, "--reverse") == "abcd"
    assert names(cli, some, "--sort", "name") == "abcd"
    assert names(cli, some, "--sort", "loss") == "cabd"
    assert names(cli, some, "--sort", "eval_loss") == "acbd"
    assert names(cli, some, "--sort", "eval_loss", "-r")[:2] == "ca"
    assert names(cli, some, "--sort", "state") == "dbac"
    assert names(cli, some, "--state", "done", "--sort", "name") == "ac"
    assert names(cli, some, "--state", "done", "--state", "stopped", "--sort", "name") == "abc"
    assert names(cli, some, "--task", "text") == "b"
    assert names(cli, some, "--model", "model.GGUF") == "b"
    assert "none of 4 runs passes" in cli("runs", some, "--task", "classify").out


def test_run_directories_may_be_given_themselves(cli: Cli, some: Path) -> None:
    assert names(cli, some / "a", some / "b", "--sort", "name") == "ab"


def test_what_is_not_known_is_a_usage_error(cli: Cli, some: Path) -> None:
    for arguments, hint in (
        (("--state", "aliv"), "did you mean `alive`?"),
        (("--sort", "los"), "did you mean `loss`?"),
        (("--task", "clasify"), "did you mean `classify`?"),
        (("--task", "nonsense"), ""),
        ((some / "nowhere",), ""),
        ((some / "a" / "run.json",), ""),
    ):
        wrong = cli("runs", *arguments, "--json")
        assert (wrong.code, wrong.json["kind"]) == (2, "usage")
        assert hint in (wrong.json["hint"] or "")


def test_json_has_the_keys_that_all_commands_have(cli: Cli, some: Path) -> None:
    found = cli("runs", some, "--json").json
    assert (found["status"], found["command"], found["run_dir"]) == ("done", "runs", None)
    assert (found["metrics"], found["artifacts"]) == ({}, {})
    assert found["seconds"] >= 0


def test_a_damaged_run_is_shown_beside_the_others(cli: Cli, some: Path) -> None:
    (some / "b" / "run.json").write_text("{")
    out = cli("runs", some).out
    assert "4 of 4 runs" in out
    assert "damaged: run.json" in out
    assert f"llmkit verify {some / 'b'}" in out
    assert names(cli, some, "--state", "damaged") == "b"


def test_names_on_disk_do_not_steer_the_terminal(cli: Cli, some: Path) -> None:
    make(some / "e\x1b[31m\n", "stopped")
    found = cli("runs", some)
    assert "\x1b" not in found.out
    assert "e\ufffd[31m\ufffd" in found.out


def test_an_open_run_shows_who_has_it(cli: Cli, tmp_path: Path) -> None:
    run = Run.open(tmp_path / "a", "a", "name: a\nstages: [finetune]\n")
    run.start("finetune", {}, keep=True)
    found = cli("runs", tmp_path / "a")
    assert f"{os.getpid()} on " in found.out
    assert "to go on" not in found.out
    run.close()


def test_the_command_that_is_shown_goes_on_with_a_stopped_run(
    cli: Cli, tiny_llama: Path, chat_rows: Path, tmp_path: Path
) -> None:
    from llmkit.train.hooks.progress import ProgressHook

    done = ProgressHook.after_step

    def after_step(self: Any, state: Any, values: dict[str, Any]) -> None:
        done(self, state, values)
        if state.step == 3:
            os.kill(os.getpid(), signal.SIGTERM)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ProgressHook, "after_step", after_step)
        stopped = cli("finetune", "-m", tiny_llama, "-d", chat_rows, "-o", tmp_path / "my run", *QUICK)
    assert stopped.code == 75, stopped.err
    (found,) = cli("runs", tmp_path, "--json").json["runs"]
    assert (found["state"], found["stage"], found["total_steps"]) == ("stopped", "finetune", 8)
    assert 3 <= found["step"] == found["checkpoint"] < 8
    assert f"from step {found['checkpoint']}" in cli("runs", tmp_path).out
    program, *arguments = shlex.split(found["next"])
    assert program == "llmkit"
    again = cli(*arguments)
    assert again.code == 0, again.err
    assert f"finetune resumed: going on after step {found['checkpoint']} of 8" in again.err
    assert cli("runs", tmp_path, "--json").json["runs"][0]["state"] == "done"


def test_runs_and_verify_do_without_the_heavy_libraries(some: Path) -> None:
    import subprocess

    script = (
        "import json, sys; sys.argv = ['llmkit', *sys.argv[1:]]\n"
        "from llmkit.cli.app import main\n"
        "try:\n    main()\nexcept SystemExit:\n    print('\\n' + json.dumps(sorted(sys.modules)))"
    )
    for arguments in (("runs", str(some)), ("verify", str(some / "a"))):
        done = subprocess.run([sys.executable, "-c", script, *arguments], capture_output=True, text=True, check=True)
        loaded = set(json.loads(done.stdout.splitlines()[-1]))
        assert not loaded & {"torch", "transformers", "datasets", "accelerate", "pandas", "pyarrow", "sklearn"}
