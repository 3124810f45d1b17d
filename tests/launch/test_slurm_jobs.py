"""Jobs on a real Slurm: handed in, followed, ended by their time limit and by hand, put back into the queue, in arrays."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import pytest
from conftest import Cli, Outcome, write_chat_rows
from forked import LONG, llmkit
from slurm import NoSlurm, install, slurm

from llmkit.files import digest_file
from llmkit.run.log import read_metrics

pytestmark = pytest.mark.slow
SETTINGS = ("data.eval=20%", "finetune.steps=6", "finetune.lr=1e-3", "finetune.log_every=1", "name=tiny")
_ENDED = ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "OUT_OF_MEMORY", "BOOT_FAIL", "DEADLINE")


@pytest.fixture(scope="module")
def cluster() -> Iterator[dict[str, str]]:
    """A Slurm of two nodes, for the tests of this file."""
    try:
        install()
        with slurm() as env:
            yield env
    except NoSlurm as why:
        pytest.skip(f"no Slurm here: {why}")


@pytest.fixture
def submit(
    cluster: dict[str, str], cli: Cli, monkeypatch: pytest.MonkeyPatch, tiny_llama: Path, chat_rows: Path
) -> Cli:
    """`llmkit submit` of a training of seconds, on that Slurm."""
    monkeypatch.setenv("SLURM_CONF", cluster["SLURM_CONF"])
    settings = [word for setting in SETTINGS for word in ("--set", setting)]

    def run(*arguments: object) -> Outcome:
        return cli("submit", "--to", "slurm", "-m", tiny_llama, "-d", chat_rows, *settings, *arguments)

    return run


def job(number: str) -> dict[str, str]:
    """What Slurm says of a job."""
    said = subprocess.run(["scontrol", "--oneliner", "show", "job", number], capture_output=True, text=True, check=True)
    return dict(word.split("=", 1) for word in said.stdout.split() if "=" in word)


def ended(number: str, until: Callable[[dict[str, str]], bool] | None = None) -> dict[str, str]:
    """Waits until a job has ended, or until something else is true of it."""
    deadline = time.monotonic() + LONG
    while True:
        found = job(number)
        if until(found) if until else found["JobState"] in _ENDED:
            return found
        assert time.monotonic() < deadline, found
        time.sleep(0.2)


def number(outcome: Outcome, stage: str) -> str:
    assert outcome.code == 0, outcome.err
    found: str = next(one["id"] for one in outcome.json["jobs"] if one["stage"] == stage)
    return found


def log(outcome: Outcome, stage: str = "finetune") -> str:
    return Path(next(one["log"] for one in outcome.json["jobs"] if one["stage"] == stage)).read_text()


def weights(run: Path) -> str:
    return digest_file(run / "finetune" / "model" / "model.safetensors")


def record(run: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((run / "run.json").read_text())
    return found


@pytest.mark.usefixtures("limited")
def test_preprocess_takes_no_gpus_and_training_waits_for_it(submit: Cli, cli: Cli, tmp_path: Path) -> None:
    out = tmp_path / "a run's #1 $(place) & é;"  # Slurm and bash see such a path too
    wanted = ("--gpus", 2, "--nodes", 1, "--cpus", 1, "--time", "10:00", "--cpu-partition", "cpu")
    done = submit(*wanted, "--stage", "finetune", "-o", out, "--json")
    first, second = number(done, "preprocess"), number(done, "finetune")
    waiting = job(second)
    assert f"afterok:{first}" in waiting["Dependency"]
    listed = cli("runs", out, "--json")
    assert listed.code == 0
    assert ended(second)["JobState"] == "COMPLETED", log(done)
    before, after = job(first), job(second)
    assert before["JobState"] == "COMPLETED"
    assert before["Partition"] == "cpu"
    assert "TresPerNode" not in before
    assert after["TresPerNode"] == "gres:gpu:2"
    assert before["EndTime"] <= after["StartTime"]
    assert "finetune done" in log(done)
    assert record(out)["stages"]["finetune"]["state"] == "done"
    assert weights(out)


def test_two_tasks_on_each_of_two_nodes_are_one_training(submit: Cli, cli: Cli, tmp_path: Path) -> None:
    apart, alone = tmp_path / "apart", tmp_path / "alone"
    wanted = ("--stage", "finetune", "--time", "10:00", "--set", "finetune.precision=fp32")
    several = submit(*wanted, "--nodes", 2, "--processes", 1, "--cpus", 1, "-o", apart, "--json")
    two = submit(*wanted, "--processes", 2, "--cpus", 1, "-o", tmp_path / "two", "--json")
    one = submit(*wanted, "-o", alone, "--json")
    for done in (several, two, one):
        assert ended(number(done, "finetune"))["JobState"] == "COMPLETED", log(done)

    def losses(run: Path) -> list[float]:
        return [line["loss"] for line in read_metrics(run / "metrics.jsonl") if "loss" in line]

    assert len(losses(alone)) == 6
    assert losses(apart) == pytest.approx(losses(alone), abs=1e-5)
    assert losses(tmp_path / "two") == pytest.approx(losses(alone), abs=1e-5)


@dataclass(frozen=True)
class Limited:
    """A job whose time is nearly over, and the same training with all the time it needs."""

    number: str
    run: Path
    log: Path
    whole: str
    whole_run: Path
    told: threading.Thread


@pytest.fixture(scope="module")
def limited(cluster: dict[str, str], tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Limited:
    """Slurm looks at the time only twice a minute, so that this goes on while other jobs are tried."""
    folder = tmp_path_factory.mktemp("limited")
    rows, steps = write_chat_rows(folder / "chat.jsonl"), ("finetune.steps=1500", "finetune.save_every=100")
    settings = [word for setting in (*SETTINGS, *steps) for word in ("--set", setting)]

    def submitted(name: str, *words: object) -> dict[str, Any]:
        wanted = ("submit", "--to", "slurm", "-m", tiny_llama, "-d", rows, *settings, "--stage", "finetune", *words)
        done = llmkit(*wanted, "-o", folder / name, "--json", env=cluster)
        assert done.wait() == 0, done.out
        found: dict[str, Any] = json.loads(done.out)["jobs"][-1]
        return found

    parts, whole = submitted("parts", "--time", "50:00", "--warning", "2:00"), submitted("whole", "--time", "50:00")
    told = threading.Thread(
        target=let_time_run_out, args=(parts["id"], folder / "parts", Path(parts["log"]), cluster), daemon=True
    )
    told.start()
    return Limited(parts["id"], folder / "parts", Path(parts["log"]), whole["id"], folder / "whole", told)


def let_time_run_out(number: str, run: Path, log: Path, env: dict[str, str]) -> None:
    """Gives a job that trains less than two minutes more, and stands it still until Slurm has told it that time is up."""

    def time_limit(minutes: int) -> None:
        subprocess.run(["scontrol", "update", f"JobId={number}", f"TimeLimit={minutes}"], env=env, check=True)

    while len(read_metrics(run / "metrics.jsonl")) < 10:
        time.sleep(0.05)
    process = psutil.Process(record(run)["process"]["pid"])
    process.suspend()
    took = time.time() - process.create_time()
    time_limit(int(took / 60) + 2)
    while "SIGUSR1: training stops" not in log.read_text():
        with suppress(FileNotFoundError, psutil.NoSuchProcess):
            if has_pending(process.pid, signal.SIGUSR1):
                process.resume()
        time.sleep(0.05)
    time_limit(55)


def has_pending(pid: int, number: int) -> bool:
    """True when a signal has been sent to a process that stands still, and not taken yet."""
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    pending = next(line.split()[1] for line in lines if line.startswith("ShdPnd:"))
    return bool(int(pending, 16) >> (number - 1) & 1)


def test_a_signal_by_hand_saves_and_requeues_and_scancel_ends(submit: Cli, tmp_path: Path) -> None:
    run = tmp_path / "run"
    long = ("--stage", "finetune", "--set", "finetune.steps=100000", "--nodes", 2, "--cpus", 1)
    done = submit("--time", "20:00", *long, "-o", run, "--json")
    this = number(done, "finetune")
    again = submit("--time", "20:00", "--stage", "finetune", "-o", run, "--json")
    assert again.code == 5
    assert (again.json["kind"], again.json["got"]) == ("resource", this)

    def steps() -> int:
        return len(read_metrics(run / "metrics.jsonl"))

    ended(this, until=lambda _: steps() > 20)
    subprocess.run(["scancel", "--signal=USR1", this], check=True)
    ended(this, until=lambda found: found["Restarts"] == "1" and found["JobState"] == "RUNNING")
    reached = steps()
    ended(this, until=lambda _: steps() > reached)
    subprocess.run(["scancel", this], check=True)
    assert ended(this)["JobState"] == "CANCELLED"
    ended(this, until=lambda _: record(run)["stages"]["finetune"]["state"] == "stopped")
    assert job(this)["Restarts"] == "1"
    assert "stopped by SIGTERM after step" in log(done)


def test_a_job_that_fails_says_why_and_what_waits_for_it_goes(submit: Cli, tmp_path: Path, chat_rows: Path) -> None:
    run = tmp_path / "run"
    wanted = ("--stage", "finetune", "--time", "10:00", "-o", run, "--json")
    done = submit("--cpu-first", "--sbatch", "begin=now+2", *wanted)
    chat_rows.unlink()
    first, second = number(done, "preprocess"), number(done, "finetune")
    found = ended(first)
    assert (found["JobState"], found["ExitCode"]) == ("FAILED", "3:0")
    assert ended(second)["JobState"] == "CANCELLED"
    assert "error:" in log(done, "preprocess")
    assert found["Restarts"] == "0"


def test_an_array_has_a_run_for_each_of_its_values(submit: Cli, cli: Cli, tmp_path: Path) -> None:
    out = tmp_path / "sweep"
    arrays = ("--array", "finetune.lr=1e-3", "--array", "fold=2")
    done = submit(
        *arrays, "--set", "data.eval=5%", "--stage", "finetune", "--cpu-first", "--time", "10:00", "-o", out, "--json"
    )
    this = number(done, "finetune")
    assert f"aftercorr:{number(done, 'preprocess')}" in job(f"{this}_0")["Dependency"]
    for index in range(2):
        assert ended(f"{this}_{index}")["JobState"] == "COMPLETED"
    names = {"lr-0.001_fold-1", "lr-0.001_fold-2"}
    assert {path.name for path in out.iterdir()} == {"launch", *names}
    assert len({weights(out / name) for name in names}) == 2
    said = cli("runs", out, "--json").json
    assert {Path(run["path"]).name for run in said["runs"]} == names


def test_a_time_limit_saves_and_the_job_goes_on_until_it_is_done(limited: Limited, submit: Cli) -> None:
    limited.told.join(LONG)
    assert not limited.told.is_alive()
    found = ended(limited.number)
    said = limited.log.read_text()
    assert found["JobState"] == "COMPLETED", said
    assert found["Restarts"] == "1"
    assert said.count("stopped by SIGUSR1 after step") == 1
    assert "of 1500" in said.split("going on after step")[1]
    assert ended(limited.whole)["JobState"] == "COMPLETED"
    assert weights(limited.run) == weights(limited.whole_run)


@pytest.mark.parametrize(
    ("words", "what", "got"),
    [
        (("--partition", "gqu"), "Slurm does not take the job", "Invalid partition name specified"),
        (("--sbatch", "gres=tpu:1"), "Slurm does not take the job", "Invalid generic resource (gres) specification"),
        (("--mem", "64G"), "Slurm does not take the job", "Memory specification can not be satisfied"),
        (("--after", "99999"), "Slurm does not know job 99999", "Invalid job id specified"),
    ],
)
def test_what_slurm_refuses_is_told_in_its_own_words(
    words: tuple[str, ...], what: str, got: str, submit: Cli, tmp_path: Path
) -> None:
    done = submit("--time", "10:00", *words, "-o", tmp_path / "run", "--json")
    assert done.code == 2, done.out
    assert done.json["what"] == what
    assert got in done.json["got"]


def test_when_the_second_job_is_refused_the_first_one_is_taken_back(submit: Cli, tmp_path: Path) -> None:
    words = ("--cpu-first", "--cpu-partition", "cpu", "--partition", "gqu", "--sbatch", "begin=now+60")
    assert submit("--time", "10:00", *words, "-o", tmp_path / "run", "--json").code == 2
    waits = subprocess.run(
        ["squeue", "--noheader", "--name=tiny-preprocess"], capture_output=True, text=True, check=True
    )
    assert not waits.stdout
    assert not (tmp_path / "run" / "launch" / "jobs.json").exists()


@pytest.mark.parametrize("words", [("--nodes", 3), ("--time", "9:00:00")], ids=["too many nodes", "too much time"])
def test_a_job_that_slurm_takes_and_will_not_start_is_warned_of(
    words: tuple[object, ...], submit: Cli, tmp_path: Path
) -> None:
    done = submit("--time", "10:00", *words, "-o", tmp_path / "run", "--json")
    assert done.json["jobs"][0]["waits_for"].startswith("Partition")
    assert "will not start as things are" in done.err
    subprocess.run(["scancel", number(done, "run")], check=True)


def test_a_slurm_that_is_not_there_is_told(submit: Cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    conf = tmp_path / "slurm.conf"
    text = Path(os.environ["SLURM_CONF"]).read_text()
    conf.write_text(text.replace("SlurmctldPort=", "MessageTimeout=2\nSlurmctldPort=1#"))
    monkeypatch.setenv("SLURM_CONF", str(conf))
    done = submit("--time", "10:00", "-o", tmp_path / "run", "--json")
    assert (done.code, done.json["kind"]) == (5, "resource")
