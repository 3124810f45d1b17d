"""What goes into a batch script, how it is written, and what a user's words cannot do there."""

from __future__ import annotations

import json
import os
import shlex
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from llmkit.errors import UsageError
from llmkit.launch.limits import checkpoint_bytes, seconds_in, shown, warning_for
from llmkit.launch.points import points
from llmkit.launch.slurm import Slurm
from llmkit.launch.target import Job, Resources, Work
from llmkit.recipe.schema import Recipe

FAKE_SRUN = """#!{python}
import json, os, sys
print(json.dumps({{"words": sys.argv[1:], "threads": os.environ.get("OMP_NUM_THREADS")}}))
sys.exit(int(os.environ["FAKE_CODE"]))
"""


def make_job(folder: Path, **changes: Any) -> Job:
    work = Work(folder / "launch" / "recipe.yaml", folder)
    resources = Resources(seconds=4 * 3600, warning=300)
    return replace(Job("docs", "run", (work,), folder / "launch", resources), **changes)


def run_script(job: Job, tmp_path: Path, *, code: int = 0, **env: str) -> tuple[int, list[dict[str, Any]], str]:
    """Runs a script with programs in place of srun and scontrol: its exit code, how srun was called, what scontrol got."""
    bin_, asked = tmp_path / "bin", tmp_path / "scontrol.txt"
    bin_.mkdir(exist_ok=True)
    for name, text in (
        ("srun", FAKE_SRUN.format(python=sys.executable)),
        ("scontrol", f'#!/bin/bash\necho "$@" >> {shlex.quote(str(asked))}\n'),
    ):
        (bin_ / name).write_text(text)
        (bin_ / name).chmod(0o755)
    env = {"PATH": f"{bin_}:/usr/bin:/bin", "SLURM_JOB_ID": "12", "FAKE_CODE": str(code)} | env
    script = tmp_path / "script"
    script.write_text(Slurm().script(job))
    done = subprocess.run(["bash", script], env=env, capture_output=True, text=True)
    assert not done.stderr
    said = [json.loads(line) for line in done.stdout.splitlines()]
    return done.returncode, said, asked.read_text() if asked.exists() else ""


@pytest.mark.parametrize(
    ("text", "seconds"),
    [
        ("30", 1800),
        ("1:30", 90),
        ("4:00:00", 14_400),
        ("1-12", 129_600),
        ("1-12:30", 131_400),
        ("2-00:00:10", 172_810),
        ("90s", 90),
        ("10min", 600),
        ("4h", 14_400),
        ("1.5h", 5400),
    ],
)
def test_times(text: str, seconds: int) -> None:
    assert seconds_in(text) == seconds
    assert seconds_in(shown(seconds)) == seconds


@pytest.mark.parametrize(
    "text", ["", "0", "-5", "4:60", "1:2:3:4", "soon", "4 h 30", "1-", "0:00", "99999-0", "4;ls", "٣"]
)
def test_what_is_no_time(text: str) -> None:
    with pytest.raises(UsageError, match="no time that Slurm knows") as caught:
        seconds_in(text)
    assert caught.value.got == text


def test_the_script_says_what_was_asked_for(tmp_path: Path) -> None:
    has = Resources(
        seconds=100_000, warning=300, nodes=2, processes=8, gpus=8, cpus=12, memory="500G", partition="gpu,long",
        account="lab", qos="high", constraint="a100&nvlink", others=(("reservation", "mine"), ("exclusive", None)),
    )  # fmt: skip
    job = make_job(tmp_path, resources=has, requeues=7)
    Slurm().check(job)
    lines = Slurm().script(job).splitlines()
    options = [line.removeprefix("#SBATCH --") for line in lines if line.startswith("#SBATCH ")]
    assert options == [
        "job-name=docs-run", "nodes=2", "ntasks-per-node=8", "gpus-per-node=8", "cpus-per-task=12", "partition=gpu,long",
        "account=lab", "qos=high", "constraint=a100&nvlink", "mem=500G", "time=1-03:46:40", "signal=USR1@300", "requeue",
        "open-mode=append", f"output={tmp_path}/launch/run-%j.log", f"chdir={Path.cwd()}", "reservation=mine", "exclusive",
    ]  # fmt: skip
    assert lines[0] == "#!/bin/bash"
    assert not [line for line in lines[lines.index("") :] if line.startswith("#SBATCH")]  # Slurm would not see it


@pytest.mark.parametrize(
    "name", ["a run", "it's", "$(touch pwned)", "`touch pwned`", "a;touch pwned", "a&b|c>d", "-x", "*"]
)
def test_paths_reach_llmkit_as_they_are(name: str, tmp_path: Path) -> None:
    folder = tmp_path / name
    job = make_job(folder, resources=Resources(seconds=600, warning=60, nodes=2, cpus=3))
    Slurm().check(job)
    code, said, _ = run_script(job, tmp_path)
    words = [
        "--cpus-per-task=3",
        "--label",
        "--kill-on-bad-exit=0",
        "--wait=120",
        sys.executable,
        "-m",
        "llmkit",
        "run",
    ]
    assert said == [{"words": [*words, f"{folder}/launch/recipe.yaml", "-o", str(folder)], "threads": "3"}]
    assert code == 0
    assert not list(tmp_path.rglob("pwned"))
    assert not Path("pwned").exists()


@pytest.mark.parametrize(
    ("code", "before", "requeues", "goes_back"),
    [(75, "", 100, True), (75, "99", 100, True), (75, "100", 100, False), (75, "", 0, False), (0, "", 100, False)]
    + [(code, "", 100, False) for code in (1, 2, 5, 6, 130, 137)],
)
def test_only_a_job_that_has_saved_goes_back_into_the_queue(
    code: int, before: str, requeues: int, goes_back: bool, tmp_path: Path
) -> None:
    env = {"SLURM_RESTART_COUNT": before} if before else {}
    ended, _, asked = run_script(make_job(tmp_path / "run", requeues=requeues), tmp_path, code=code, **env)
    assert ended == code
    assert asked == ("requeue 12\n" if goes_back else "")


def test_each_job_of_an_array_has_its_recipe_and_its_run(tmp_path: Path) -> None:
    works = tuple(Work(tmp_path / f"{name}.yaml", tmp_path / name) for name in ("seed-1", "it's 2", "seed-3"))
    job = make_job(tmp_path, works=works, is_array=True, at_once=2)
    assert "#SBATCH --array=0-2%2" in Slurm().script(job)
    for index, work in enumerate(works):
        _, said, _ = run_script(job, tmp_path, SLURM_ARRAY_TASK_ID=str(index))
        assert said[0]["words"][-3:] == [str(work.recipe), "-o", str(work.run)]


@pytest.mark.parametrize(
    "change",
    [
        {"partition": "gpu\n#SBATCH --uid=0"},
        {"partition": "gpu x"},
        {"partition": ""},
        {"partition": "-x"},
        {"account": "a#b"},
        {"qos": '"x"'},
        {"constraint": "a b"},
        {"memory": "lots"},
        {"memory": "64GB"},
        {"others": (("Partition", "x"),)},
        {"others": (("comment", "two words"),)},
        {"others": (("comment", "a\nb"),)},
        {"others": (("comment", '"'),)},
        {"others": (("wrap", "ls"),)},
        {"others": (("time", "5"),)},
        {"others": (("nice", "5"), ("nice", "6"))},
        {"others": (("", "x"),)},
    ],
)
def test_what_has_no_place_in_a_script_is_refused(change: dict[str, Any], tmp_path: Path) -> None:
    job = make_job(tmp_path)
    with pytest.raises(UsageError):
        Slurm().check(replace(job, resources=replace(job.resources, **change)))


def test_all_mistakes_are_told_at_once(tmp_path: Path) -> None:
    job = make_job(tmp_path, resources=Resources(600, 60, partition="a b", qos="c d", others=(("nodes", "3"),)))
    with pytest.raises(UsageError, match="3 options are wrong") as caught:
        Slurm().check(job)
    assert [problem.where for problem in caught.value.problems] == ["--partition", "--qos", "--sbatch"]
    assert caught.value.problems[2].hint == "with --nodes"


@pytest.mark.parametrize("name", ['a"b', "a\\b", "50%", "a\nb"])
def test_a_folder_that_slurm_cannot_write_to_is_refused(name: str, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="cannot write its log"):
        Slurm().check(make_job(tmp_path / name))


def test_points_of_an_array() -> None:
    found = points(["seed=1-3,7", "finetune.lr=1e-5,2e-5"])
    assert [point.name for point in found[:3]] == ["seed-1_lr-1e-05", "seed-1_lr-2e-05", "seed-2_lr-1e-05"]
    changes = [{change.key: change.value for change in point.changes} for point in found]
    assert changes[-1] == {"seed": 7, "finetune.lr": 2e-5}
    assert len(changes) == 8
    folds = points(["fold=3"])
    assert [(point.name, point.changes[0].key, point.changes[0].value) for point in folds] == [
        (f"fold-{number}", "data.fold", f"{number}/3") for number in (1, 2, 3)
    ]
    blocks = points(['freeze.blocks="0-3,8",all but the last 4'])
    assert [point.changes[0].value for point in blocks] == ["0-3,8", "all but the last 4"]
    assert [point.name for point in blocks] == ["blocks-0-3-8", "blocks-all-but-the-last-4"]


def test_points_with_names_alike_are_numbered() -> None:
    assert [point.name for point in points(["model=a/b,a:b"])] == ["000_model-a-b", "001_model-a-b"]


@pytest.mark.parametrize("texts", [["seed"], ["=1"], ["seed="], ["seed=5-1"], ["fold=1"], ["fold=a"], ["seed=1,1"],
                                   ["seed=1", "seed=2"], ["seed=[1"]])  # fmt: skip
def test_what_is_no_array(texts: list[str]) -> None:
    with pytest.raises(UsageError):
        points(texts)


def recipe_of(model: Path, **more: Any) -> Recipe:
    stages = ("preprocess", *(("freeze",) if "freeze" in more else ()), "finetune")
    return Recipe.model_validate(
        {"name": "x", "task": "chat", "model": str(model), "stages": stages, "data": {"train": "rows.jsonl"}} | more
    )


def test_the_bytes_of_a_checkpoint_are_those_of_what_is_trained(tiny_llama: Path) -> None:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(tiny_llama)
    block = sum(p.numel() for p in model.model.layers[0].parameters())
    everything = checkpoint_bytes(recipe_of(tiny_llama))
    assert everything == 12 * sum(p.numel() for p in model.parameters())
    assert checkpoint_bytes(recipe_of(tiny_llama, freeze={"blocks": "0"})) == everything - 12 * block
    adapter = checkpoint_bytes(recipe_of(tiny_llama, finetune={"adapter": "lora"}))
    assert adapter is not None
    assert 0 < adapter < everything / 2


def test_a_time_limit_has_to_leave_time_to_train_and_to_save() -> None:
    assert warning_for(14_400, None, None) == 120
    assert warning_for(14_400, None, 96_000_000_000) == 60 + 2 * 384
    assert warning_for(14_400, 600, 96_000_000_000) == 600
    with pytest.raises(UsageError, match="no time to train") as caught:
        warning_for(1200, None, 96_000_000_000)
    assert "96.0 GB may take 0:06:24" in str(caught.value.expected)
    with pytest.raises(UsageError, match="too late to save"):
        warning_for(14_400, 300, 96_000_000_000)
    with pytest.raises(UsageError, match="no time to train"):
        warning_for(60, None, None)


def test_a_job_that_slurm_took_is_known_whatever_becomes_of_the_next_question(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "sbatch").write_text("#!/bin/bash\necho 12\n")
    (tmp_path / "squeue").write_text("#!/bin/bash\nsleep 60\n")
    for name in ("sbatch", "squeue"):
        (tmp_path / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    monkeypatch.setattr("llmkit.launch.slurm._ANSWERS_WITHIN", 0.5)
    done = Slurm().submit(make_job(tmp_path), [], None)
    assert (done.id, done.waits_for, done.in_vain) == ("12", None, None)


def test_launchers_variables_do_not_get_into_a_job(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    told = tmp_path / "env"
    (tmp_path / "sbatch").write_text(f"#!/bin/bash\nenv > {shlex.quote(str(told))}\necho '12;mine'\n")
    for name in ("squeue", "scontrol"):
        (tmp_path / name).write_text("#!/bin/bash\n")
    for name in ("sbatch", "squeue", "scontrol"):
        (tmp_path / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    monkeypatch.setenv("RANK", "3")
    monkeypatch.setenv("MINE", "4")
    done = Slurm().submit(make_job(tmp_path), [], None)
    assert done.id == "12"
    assert done.waits_for is None
    names = {line.partition("=")[0] for line in told.read_text().splitlines()}
    assert "RANK" not in names
    assert "MINE" in names
