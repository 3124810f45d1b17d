"""Two hosts: network namespaces with names and addresses of their own, joined by a cable that can be pulled."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest

from llmkit.files import digest_file
from llmkit.run.log import read_metrics

pytestmark = pytest.mark.slow

RECIPE = """
name: hosts
task: text
stages: [preprocess, pretrain]
data: {train: DATA, eval: 8, max_length: 32, leaks: "off"}
pretrain:
  architecture: {model_type: gpt2, n_layer: 1, n_embd: 16, n_head: 2, n_positions: 32}
  tokenizer: {train: bpe, vocab_size: 300}
  steps: STEPS
  batch_size: 4
  precision: fp32
  dropout: 0.1
  lr: 1.0e-3
  save_every: 20
  log_every: 1
  trackers: []
launch: {hang_after: 5s, connect_within: 30s}
"""
AS_HOST = """
import runpy, socket, sys
socket.sethostname(sys.argv.pop(1))
runpy.run_module("llmkit", run_name="__main__", alter_sys=True)
"""
ALONE = {key: value for key, value in os.environ.items() if not key.startswith(("GLOO_", "MASTER_"))}
ALONE |= {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "NO_COLOR": "1", "CUDA_VISIBLE_DEVICES": ""}
MODEL = "pretrain/model/model.safetensors"
PORT = "29500"  # in a network of its own every port is free


def ip(*words: str) -> None:
    subprocess.run(["ip", *words], check=True, capture_output=True, text=True)


@dataclass(frozen=True)
class Hosts:
    """Two hosts with the addresses 10.77.0.1 and 10.77.0.2; to itself, the first one's name means 127.0.1.1."""

    names: tuple[str, str]

    def plug(self, *, into: bool) -> None:
        """Pulls the cable out of the second host, or puts it in again."""
        ip("-n", self.names[1], "link", "set", "cable", "up" if into else "down")

    def start(self, rank: int, words: Sequence[object], address: str = "10.77.0.1") -> subprocess.Popen[str]:
        place = {"RANK": str(rank), "WORLD_SIZE": "2", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1"}
        place |= {"MASTER_ADDR": address, "MASTER_PORT": PORT}
        inside = ["ip", "netns", "exec", self.names[rank], "unshare", "--uts", sys.executable, "-c", AS_HOST]
        return subprocess.Popen(
            [*inside, f"host-{rank}", *map(str, words)],
            env=ALONE | place,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    def train(self, *words: object) -> list[subprocess.Popen[str]]:
        return [self.start(rank, ["run", *words]) for rank in range(2)]


def ends(processes: Sequence[subprocess.Popen[str]], within: float = 240.0) -> list[tuple[int, str]]:
    """Each one's exit code and what it said on standard error."""
    try:
        until = time.monotonic() + within
        said = [process.communicate(timeout=max(0.1, until - time.monotonic()))[1] for process in processes]
    finally:
        for process in processes:
            process.kill()
    return [(process.returncode, text) for process, text in zip(processes, said, strict=True)]


def _hosts_file(name: str) -> Path:
    return Path("/etc/netns") / name / "hosts"


@pytest.fixture(scope="module")
def hosts() -> Iterator[Hosts]:
    if shutil.which("ip") is None or shutil.which("unshare") is None:
        pytest.skip("there is no `ip` (iproute2) or no `unshare` (util-linux)")
    names = (f"llmkit-{os.getpid()}-0", f"llmkit-{os.getpid()}-1")
    try:
        try:
            for name in names:
                ip("netns", "add", name)
            ip("link", "add", "cable", "netns", names[0], "type", "veth", "peer", "name", "cable", "netns", names[1])
        except subprocess.CalledProcessError as error:
            pytest.skip(f"network namespaces cannot be made here: {error.stderr.strip()}")
        for number, name in enumerate(names):
            ip("-n", name, "address", "add", f"10.77.0.{number + 1}/24", "dev", "cable")
            ip("-n", name, "link", "set", "cable", "up")
            ip("-n", name, "link", "set", "lo", "up")
            known = _hosts_file(name)  # which `ip netns exec` puts in the place of /etc/hosts
            known.parent.mkdir(parents=True)
            known.write_text(f"127.0.0.1 localhost\n{'10.77.0.1' if number else '127.0.1.1'} first-host\n")
        yield Hosts(names)
    finally:
        for name in names:  # the cable goes with them
            subprocess.run(["ip", "netns", "delete", name], check=False, capture_output=True)
            shutil.rmtree(_hosts_file(name).parent, ignore_errors=True)


@pytest.fixture
def recipe(tmp_path: Path) -> Callable[[int], Path]:
    """A recipe of so many steps."""
    rows = [{"text": f"number {n} and then {n * 7 % 13}, which is as it should be. " * 3} for n in range(60)]
    data = tmp_path / "rows.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))

    def write(steps: int) -> Path:
        path = tmp_path / f"recipe-{steps}.yaml"
        path.write_text(RECIPE.replace("DATA", str(data)).replace("STEPS", str(steps)))
        return path

    return write


def losses(out: Path) -> list[float]:
    return [line["loss"] for line in read_metrics(out / "metrics.jsonl") if "loss" in line]


def test_two_hosts_learn_what_one_process_learns(hosts: Hosts, tmp_path: Path, recipe: Callable[[int], Path]) -> None:
    path = recipe(6)
    path.write_text(path.read_text().replace("dropout: 0.1", "dropout: 0.0"))
    alone = subprocess.run(
        [sys.executable, "-m", "llmkit", "run", path, "-o", tmp_path / "one"],
        capture_output=True,
        text=True,
        env=ALONE,
        timeout=240,
        check=False,
    )
    assert alone.returncode == 0, alone.stderr
    for code, said in ends(hosts.train(path, "-o", tmp_path / "two")):
        assert code == 0, said
        assert ("2 processes on 2 hosts, all-reduce" in said) is ("preprocess" in said), "the first tells it"
    assert len(losses(tmp_path / "one")) == 6
    assert losses(tmp_path / "two") == pytest.approx(losses(tmp_path / "one"), rel=1e-5)


def test_a_first_host_whose_name_means_itself(hosts: Hosts) -> None:
    for code, said in ends([hosts.start(rank, ["probe"], address="first-host") for rank in range(2)]):
        assert code == 0, said


def test_a_cable_that_is_pulled_and_put_in_again(hosts: Hosts, tmp_path: Path, recipe: Callable[[int], Path]) -> None:
    path = recipe(300)
    for code, said in ends(hosts.train(path, "-o", tmp_path / "undisturbed")):
        assert code == 0, said
    disturbed = hosts.train(path, "-o", tmp_path / "disturbed")
    try:
        until = time.monotonic() + 200
        while len(losses(tmp_path / "disturbed") if (tmp_path / "disturbed/metrics.jsonl").exists() else []) < 30:
            assert time.monotonic() < until
            assert all(process.poll() is None for process in disturbed), ends(disturbed)
            time.sleep(0.02)
        hosts.plug(into=False)
        pulled = time.monotonic()
        found = ends(disturbed)
    finally:
        hosts.plug(into=True)
    assert time.monotonic() - pulled < 60
    for code, said in found:
        assert code == 5, said
        assert "another process of this training is gone, or does not answer" in said
        assert "the same command goes on from the last checkpoint" in said
    assert not (tmp_path / "disturbed" / "error.log").exists(), "nobody is told of a bug"
    assert json.loads((tmp_path / "disturbed/run.json").read_text())["stages"]["pretrain"]["state"] == "resource"
    before = len(losses(tmp_path / "disturbed"))
    assert before < 300
    again = ends(hosts.train(path, "-o", tmp_path / "disturbed"))
    for code, said in again:
        assert code == 0, said
    assert "pretrain resumed: going on after step" in again[0][1]
    assert digest_file(tmp_path / "disturbed" / MODEL) == digest_file(tmp_path / "undisturbed" / MODEL)
    assert losses(tmp_path / "disturbed") == losses(tmp_path / "undisturbed")


def test_an_address_that_does_not_answer(hosts: Hosts, tmp_path: Path, recipe: Callable[[int], Path]) -> None:
    words = ["run", recipe(6), "-o", tmp_path / "run", "--set", "launch.connect_within=4s"]
    first, second = hosts.start(0, words), hosts.start(1, words, address="10.77.0.9")
    started = time.monotonic()
    [(first_code, first_said), (second_code, second_said)] = ends([first, second])
    assert time.monotonic() - started < 90
    assert (first_code, second_code) == (5, 5)
    assert "not all processes have come" in first_said
    assert "the first process does not answer" in second_said
    assert "10.77.0.9:29500" in second_said
    unknown = hosts.start(1, words, address="no-such-host.invalid")
    [(code, said)] = ends([unknown])
    assert code == 5
    assert "the host of the first process is not known" in said
