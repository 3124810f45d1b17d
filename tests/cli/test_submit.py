"""`llmkit submit` where there is no Slurm: what it writes and prints, and how it refuses."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest
import yaml
from conftest import Cli, Outcome

from llmkit.recipe.load import load_recipe


@pytest.fixture
def submit(cli: Cli, tiny_llama: Path, chat_rows: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Cli:
    """On a machine that has no Slurm."""
    (tmp_path / "bin").mkdir()
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))

    def run(*arguments: object) -> Outcome:
        named = ("--set", "name=docs", "--set", "finetune.steps=3")
        return cli("submit", "--to", "slurm", "-m", tiny_llama, "-d", chat_rows, *named, *arguments)

    return run


def test_print_writes_the_scripts_and_hands_nothing_in(submit: Cli, tmp_path: Path) -> None:
    out = tmp_path / "run"
    done = submit("--time", "4:00:00", "--nodes", 2, "--gpus", 8, "-o", out, "--print")
    assert done.code == 0, done.err
    scripts = [(out / "launch" / f"{stage}.sbatch").read_text() for stage in ("preprocess", "run")]
    assert done.out == "\n".join(scripts)
    assert "gpus" not in scripts[0]
    assert "#SBATCH --nodes=1\n" in scripts[0]
    assert "#SBATCH --gpus-per-node=8\n" in scripts[1]
    assert f"sbatch {out}/launch/preprocess.sbatch\n" in done.err
    assert f"sbatch --dependency=afterok:PREPROCESS --kill-on-invalid-dep=yes {out}/launch/run.sbatch\n" in done.err
    for script in scripts:
        assert subprocess.run(["/bin/bash", "-n"], input=script, text=True).returncode == 0
    assert not (out / "launch" / "jobs.json").exists()
    said = submit("--time", "4:00:00", "-o", out, "--print", "--json").json
    assert (said["status"], said["jobs"], list(said["artifacts"])) == ("written", [], ["run"])


def test_the_job_gets_the_recipe_that_was_meant(submit: Cli, tmp_path: Path) -> None:
    settings = ("--set", "finetune.lr=1e-3", "--seed", 5, "--set", "launch.gpus=8")
    assert submit("--time", "1h", *settings, "-o", tmp_path / "run", "--print").code == 0
    recipe = load_recipe(tmp_path / "run" / "launch" / "recipe.yaml")
    assert (recipe.finetune.lr, recipe.seed, recipe.name) == (1e-3, 5, "docs")
    assert recipe.launch.gpus is None  # srun has them


def test_what_was_written_runs(submit: Cli, cli: Cli, tmp_path: Path) -> None:
    out = tmp_path / "run"
    assert submit("--time", "1h", "--stage", "finetune", "-o", out, "--print").code == 0
    done = cli("finetune", out / "launch" / "recipe.yaml", "-o", out)
    assert done.code == 0, done.err
    assert cli("finetune", out).code == 0


def test_an_array_writes_a_recipe_for_each(submit: Cli, tmp_path: Path) -> None:
    out = tmp_path / "sweep"
    arrays = ("--array", "seed=1-2", "--array", "fold=2")
    assert submit("--time", "1h", *arrays, "-o", out, "--print").code == 0
    recipes = {path.stem: yaml.safe_load(path.read_text()) for path in (out / "launch").glob("*.yaml")}
    assert {name: (one["seed"], one["data"]["fold"]) for name, one in recipes.items()} == {
        "seed-1_fold-1": (1, "1/2"),
        "seed-1_fold-2": (1, "2/2"),
        "seed-2_fold-1": (2, "1/2"),
        "seed-2_fold-2": (2, "2/2"),
    }
    assert submit("--time", "1h", *arrays, "-o", out, "--print").code == 0


@pytest.mark.parametrize(
    ("words", "what"),
    [
        (("--time", "1h"), "there is no `sbatch` on this machine"),
        ((), "--time is missing"),
        (("--time", "soon"), "--time has no time that Slurm knows"),
        (("--time", "1:00"), "the time limit leaves no time to train"),
        (("--time", "1h", "--warning", "1h"), "the time limit leaves no time to train"),
        (("--time", "1h", "--to", "slrm"), "unknown launch target `slrm`"),
        (("--time", "1h", "--stage", "finetun"), "there is no stage `finetun`"),
        (("--time", "1h", "--gpus", 1, "--processes", 1), "--gpus and --processes are both given"),
        (("--time", "1h", "--partition", "a;ls"), "Slurm knows no such partition"),
        (("--time", "1h", "--sbatch", "nodes=5"), "llmkit sets nodes itself"),
        (("--time", "1h", "--after", "mine"), "--after takes the number of a job"),
        (("--time", "1h", "--at-once", 2), "--at-once is for --array"),
        (("--time", "1h", "--cpu-partition", "cpu"), "there is no job that preprocesses before the other"),
        (("--time", "1h", "--array", "seed"), "--array takes KEY=VALUE,VALUE,..."),
        (("--time", "1h", "--array", "finetune.lrr=1,2"), "unknown key `finetune.lrr`"),
        (("--time", "1h", "--array", "finetune.optimizer=adamw,admw"), "finetune.optimizer"),
        (("--time", "1h", "--nodes", 0), "--nodes"),
    ],
)
def test_what_is_wrong_is_told_before_anything_is_handed_in(
    words: tuple[object, ...], what: str, submit: Cli, tmp_path: Path
) -> None:
    done = submit(*words, "-o", tmp_path / "run", "--json")
    assert done.code == 2, done.out
    said = done.json
    assert what in said["what"]
    assert "Traceback" not in done.err
    assert (tmp_path / "run").exists() is ("sbatch" in what)


def test_a_directory_that_is_something_else_is_left_alone(submit: Cli, tmp_path: Path) -> None:
    taken = tmp_path / "taken"
    taken.mkdir()
    (taken / "thesis.tex").write_text("x")
    for words in ((), ("--array", "seed=1-2")):
        done = submit("--time", "1h", *words, "-o", taken, "--json", "--print")
        assert done.code == 2
        assert [path.name for path in taken.iterdir()] == ["thesis.tex"]


def test_a_directory_that_cannot_be_written(submit: Cli, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    done = submit("--time", "1h", "-o", tmp_path / "file" / "run", "--json", "--print")
    assert (done.code, done.json["kind"]) == (5, "resource")
