"""`llmkit verify`: 0 when all holds, 4 with every damaged file named."""

from __future__ import annotations

from pathlib import Path

import pytest
from conftest import Cli

from llmkit.run.directory import Artifact, Run

TEXT = "what a stage left"


@pytest.fixture
def run(tmp_path: Path) -> Path:
    made = Run.open(tmp_path / "run", "run", "name: run\nstages: [export]\n")
    made.start("export", {}, keep=False)
    for name in ("a", "b"):
        (made.folder("export") / name).write_text(TEXT)
    made.finish(Artifact("export", made.folder("export"), "x", ("export/a", "export/b")), 1.0)
    made.close()
    return made.path


def test_a_whole_run_is_a_table_and_exit_code_0(cli: Cli, run: Path) -> None:
    done = cli("verify", run)
    assert done.code == 0
    assert [line.split() for line in done.out.splitlines()[-1:]] == [["export", "2", f"{2 * len(TEXT)}", "ok"]]
    found = cli("verify", run, "--json").json
    assert list(found)[:6] == ["status", "command", "run_dir", "seconds", "metrics", "artifacts"]
    assert found["metrics"] == {"files": 2, "bytes": 2 * len(TEXT)}
    assert [check["what"] for check in found["checks"]] == ["run.json", "recipe.yaml", "export"]


def test_damage_is_an_artifact_error_that_names_each_file(cli: Cli, run: Path) -> None:
    (run / "export" / "a").write_text(TEXT[::-1])
    one = cli("verify", run, "--json")
    assert (one.code, one.json["kind"], one.json["where"]) == (4, "artifact", str(run / "export" / "a"))
    assert one.json["got"].startswith("SHA-256 ")
    assert one.json["expected"].startswith("SHA-256 ")
    assert one.json["hint"].endswith(f"`llmkit export {run} --no-resume`")
    (run / "export" / "b").unlink()
    two = cli("verify", run)
    assert two.code == 4
    assert "2 damaged" in two.out
    assert "2 things in the run are damaged" in two.err
    assert str(run / "export" / "a") in two.err
    assert str(run / "export" / "b") in two.err
    assert len(cli("verify", run, "--json").json["problems"]) == 2


def test_what_the_hint_says_mends_it(cli: Cli, tiny_llama: Path, tmp_path: Path) -> None:
    assert cli("export", "-m", tiny_llama, "-o", tmp_path / "e", "-q").code == 0
    weights = tmp_path / "e" / "export" / "transformers" / "model.safetensors"
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1
    weights.write_bytes(data)
    damaged = cli("verify", tmp_path / "e", "--json")
    assert damaged.code == 4
    command = damaged.json["hint"].split("`")[1].split()
    assert command[0] == "llmkit"
    assert cli(*command[1:], "-q").code == 0
    assert cli("verify", tmp_path / "e").code == 0


def test_what_is_odd_is_noted_unless_quiet(cli: Cli, run: Path) -> None:
    (run / "metrics.jsonl").write_text('{"sta')
    assert "was cut short" in cli("verify", run).err
    assert cli("verify", run, "-q").err == ""


def test_hostile_names_do_not_steer_the_terminal(cli: Cli, run: Path) -> None:
    text = (run / "run.json").read_text()
    (run / "run.json").write_text(text.replace("export/a", "export/\\u001b[31m"))
    done = cli("verify", run)
    assert done.code == 4
    assert "\x1b" not in done.out + done.err


def test_a_folder_that_is_no_run_is_a_usage_error(cli: Cli, tmp_path: Path) -> None:
    assert cli("verify", tmp_path / "nowhere", "--json").json["exit_code"] == 2
    assert cli("verify", tmp_path).code == 2
