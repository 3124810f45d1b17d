"""A task of `srun` knows its place among others; all else is left alone."""

from __future__ import annotations

import subprocess
import sys

import pytest

from llmkit.errors import UsageError
from llmkit.launch.surroundings import first_host, recognise, tasks_per_node

STEP = {  # of the fourth of five tasks, as Slurm 22.05 sets it
    "SLURM_JOB_ID": "4711",
    "SLURM_STEP_ID": "0",
    "SLURM_STEP_NUM_TASKS": "5",
    "SLURM_STEP_TASKS_PER_NODE": "2(x2),1",
    "SLURM_STEP_NODELIST": "gpu[007-008,011]",
    "SLURM_JOB_NODELIST": "gpu[001-011]",
    "SLURM_PROCID": "3",
    "SLURM_LOCALID": "1",
    "SLURM_NODEID": "1",
}


def test_a_task_gets_what_torchrun_would_set() -> None:
    env = dict(STEP)
    recognise(env)
    assert {name: env[name] for name in env.keys() - STEP.keys()} == {
        "RANK": "3",
        "LOCAL_RANK": "1",
        "WORLD_SIZE": "5",
        "LOCAL_WORLD_SIZE": "2",
        "MASTER_ADDR": "gpu007",
        "MASTER_PORT": env["MASTER_PORT"],
    }
    assert 15_000 <= int(env["MASTER_PORT"]) < 30_000
    once = dict(env)
    recognise(env)
    assert env == once


def test_jobs_and_steps_have_ports_of_their_own() -> None:
    ports = set()
    for job in ("4711", "4712"):
        for step in ("0", "1"):
            env = STEP | {"SLURM_JOB_ID": job, "SLURM_STEP_ID": step}
            recognise(env)
            ports.add(env["MASTER_PORT"])
    assert len(ports) == 4


@pytest.mark.parametrize(
    "env",
    [
        {},
        {name: value for name, value in STEP.items() if "STEP" not in name},  # the batch script's own shell
        STEP | {"SLURM_STEP_NUM_TASKS": "1"},
        STEP | {"RANK": "0"},  # torchrun inside of srun
    ],
    ids=["no Slurm", "batch script", "one task", "another launcher"],
)
def test_what_is_no_task_of_several_is_left_alone(env: dict[str, str]) -> None:
    before = dict(env)
    recognise(env)
    assert env == before


def test_an_address_and_a_port_that_are_set_stay() -> None:
    env = STEP | {"MASTER_ADDR": "10.0.0.7", "MASTER_PORT": "4242"}
    recognise(env)
    assert (env["MASTER_ADDR"], env["MASTER_PORT"]) == ("10.0.0.7", "4242")


@pytest.mark.parametrize(
    "change",
    [
        {"SLURM_PROCID": "x"},
        {"SLURM_PROCID": "5"},
        {"SLURM_STEP_TASKS_PER_NODE": "2(x2)"},
        {"SLURM_NODEID": "3"},
        {"SLURM_STEP_NODELIST": "gpu[7"},
    ],
)
def test_what_contradicts_itself_is_refused(change: dict[str, str]) -> None:
    with pytest.raises(UsageError, match="which process this is"):
        recognise(STEP | change)


@pytest.mark.parametrize(
    ("nodes", "first"),
    [
        ("node1", "node1"),
        ("node1,node2", "node1"),
        ("gpu[003-008,12],cpu1", "gpu003"),
        ("gpu[3]-ib", "gpu3-ib"),
        ("a[1-2]b[3-4]x", "a1b3x"),
        ("127.0.0.[1-2]", "127.0.0.1"),
    ],
)
def test_the_first_of_a_list_of_nodes(nodes: str, first: str) -> None:
    assert first_host(nodes) == first


@pytest.mark.parametrize("nodes", ["", ",", "a[1", "]x"])
def test_what_is_no_list_of_nodes(nodes: str) -> None:
    with pytest.raises(ValueError, match="no list of nodes"):
        first_host(nodes)


def test_numbers_of_tasks() -> None:
    assert tasks_per_node("2(x3),1") == [2, 2, 2, 1]
    with pytest.raises(ValueError, match="no number of tasks"):
        tasks_per_node("2(3)")


def test_the_command_line_says_what_is_wrong_with_a_step() -> None:
    env = STEP | {"SLURM_PROCID": "9", "PATH": "/usr/bin"}
    done = subprocess.run(
        [sys.executable, "-m", "llmkit", "finetune", "x.yaml", "--json"], env=env, capture_output=True, text=True
    )
    assert done.returncode == 2
    assert '"what": "Slurm\'s variables do not tell which process this is"' in done.stdout
    assert "Traceback" not in done.stderr
