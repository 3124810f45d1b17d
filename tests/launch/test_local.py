"""Several processes of one machine, started by the command itself: as under torchrun, without knowing of it."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any

import forked
import forked_workers
import psutil
import pytest
from torch.distributed import HashStore, Store

from llmkit.errors import ResourceError
from llmkit.files import digest_file
from llmkit.launch.local import Launcher, _Rank, processes_for
from llmkit.recipe.load import load_recipe
from llmkit.recipe.schema import Recipe
from llmkit.run.log import read_metrics
from llmkit.stages.rendezvous import _own_part

RECIPE = """
name: several
task: text
stages: [preprocess, pretrain]
data: {train: DATA, eval: 8, max_length: 32, leaks: "off"}
pretrain:
  architecture: {model_type: gpt2, n_layer: 1, n_embd: 16, n_head: 2, n_positions: 32}
  tokenizer: {train: bpe, vocab_size: 300}
  steps: STEPS
  batch_size: 4
  precision: fp32
  dropout: 0.0
  lr: 1.0e-3
  save_every: 5
  log_every: 1
  trackers: []
"""


def write_recipe(folder: Path, steps: int) -> Path:
    rows = [{"text": f"number {n} and then {n * 7 % 13}, which is as it should be. " * 3} for n in range(60)]
    data = folder / "rows.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    path = folder / f"recipe-{steps}.yaml"
    path.write_text(RECIPE.replace("DATA", str(data)).replace("STEPS", str(steps)))
    return path


@pytest.fixture
def recipe(tmp_path: Path) -> Callable[[int], Path]:
    """A recipe of so many steps."""
    return lambda steps: write_recipe(tmp_path, steps)


ENVIRONMENT = os.environ | {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "NO_COLOR": "1"}


def command(recipe: Path, out: Path, *more: str) -> list[str]:
    return ["run", str(recipe), "-o", str(out), *more]


def start(arguments: Sequence[str]) -> forked.Forked:
    """The command, with workers that are there at once."""
    return forked.start(forked_workers.command, *arguments)


def finish(arguments: Sequence[str]) -> forked.Forked:
    process = start(arguments)
    process.wait()
    return process


def losses(out: Path) -> list[float]:
    return [line["loss"] for line in read_metrics(out / "metrics.jsonl") if "loss" in line]


class Running:
    """A command whose two processes have taken steps."""

    def __init__(self, arguments: Sequence[str], out: Path) -> None:
        self.process = start(arguments)
        forked.wait_until(lambda: has_taken_steps(out / "pretrain"), self.process)
        self.workers = sorted(psutil.Process(self.process.pid).children(), key=lambda child: child.pid)

    def end(self) -> tuple[int, str]:
        """Its exit code and what it said on standard error."""
        code = self.process.wait()
        assert not any(worker.is_running() for worker in self.workers), "none is left behind"
        return code, self.process.err


def has_taken_steps(folder: Path) -> bool:
    with suppress(FileNotFoundError):
        beats = [beat.read_text() for beat in folder.glob(".beat-*")]
        return len(beats) == 2 and all(int(beat or 0) > 2 for beat in beats)
    return False


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """60 steps by two processes that nobody disturbs, each started as it is for users."""
    folder = tmp_path_factory.mktemp("undisturbed")
    path = write_recipe(folder, 60)
    words = command(path, folder / "run", "--processes", "2", "--json")
    done = subprocess.run([sys.executable, "-m", "llmkit", *words], capture_output=True, text=True, env=ENVIRONMENT)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["metrics"]["pretrain"]["steps"] == 60, "one object, and nothing else"
    return folder / "run"


def test_the_number_of_processes(monkeypatch: pytest.MonkeyPatch, recipe: Callable[[int], Path]) -> None:
    import torch

    def wanted(gpus: int | None = None, processes: int | None = None) -> int:
        loaded: Recipe = load_recipe(recipe(3), [])
        keys = loaded.launch.model_copy(update={"gpus": gpus, "processes": processes})
        return processes_for(loaded.model_copy(update={"launch": keys}))

    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    assert (wanted(), wanted(processes=3)) == (1, 3)
    with pytest.raises(ResourceError, match="not so many GPUs"):
        wanted(gpus=1)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    assert (wanted(), wanted(gpus=2)) == (4, 2)
    monkeypatch.setenv("WORLD_SIZE", "8")
    assert wanted(gpus=2) == 1, "the launcher says how many"


@pytest.mark.slow
def test_two_processes_learn_what_one_learns(tmp_path: Path, recipe: Callable[[int], Path], undisturbed: Path) -> None:
    one = finish(command(recipe(60), tmp_path / "one"))
    assert one.returncode == 0, one.err
    assert losses(undisturbed) == pytest.approx(losses(tmp_path / "one"), rel=1e-4)
    assert losses(undisturbed)[:6] == pytest.approx(losses(tmp_path / "one")[:6], rel=1e-5)
    assert json.loads((undisturbed / "run.json").read_text())["stages"]["pretrain"]["facts"]["processes"] == 2
    again = finish(command(undisturbed.parent / "recipe-60.yaml", undisturbed, "--processes", "2"))
    assert "pretrain unchanged" in again.err


@pytest.mark.slow
def test_a_signal_to_the_parent_saves_and_the_same_command_goes_on(
    tmp_path: Path, recipe: Callable[[int], Path], undisturbed: Path
) -> None:
    path = recipe(60)
    code, said = 75, ""
    for number in (signal.SIGUSR1, signal.SIGINT):
        running = Running(command(path, tmp_path / "stopped", "--processes", "2"), tmp_path / "stopped")
        running.process.send_signal(number)
        code, said = running.end()
        assert code == {signal.SIGUSR1: 75, signal.SIGINT: 130}[number], said
        assert said.count("error:") == 1, "one process's words, not each one's"
        [step] = re.findall(r"after step (\d+), which is saved", said)
        assert (tmp_path / "stopped" / "pretrain" / "checkpoints" / f"step-{int(step):08d}").is_dir()
    last = finish(command(path, tmp_path / "stopped", "--processes", "2"))
    assert last.returncode == 0, last.err
    model = "pretrain/model/model.safetensors"
    assert digest_file(tmp_path / "stopped" / model) == digest_file(undisturbed / model)
    steps = [line["step"] for line in read_metrics(tmp_path / "stopped" / "metrics.jsonl") if "loss" in line]
    assert steps == sorted(set(steps))


@pytest.mark.slow
@pytest.mark.parametrize("rank", [0, 1])
def test_a_process_that_is_killed_is_named_and_all_end(
    tmp_path: Path, recipe: Callable[[int], Path], rank: int
) -> None:
    running = Running(command(recipe(5000), tmp_path / "run", "--processes", "2"), tmp_path / "run")
    running.workers[rank].kill()
    code, said = running.end()
    assert code == 5
    assert f"process {rank} of 2 died" in said
    assert "SIGKILL" in said


def test_a_process_that_dies_ends_those_that_wait_for_it_in_vain(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    programs = ["import time; time.sleep(600)", "import sys; sys.exit(9)"]

    def start(self: Launcher, number: int, port: int, arguments: Sequence[str], folder: Path) -> Any:
        process = subprocess.Popen([sys.executable, "-c", programs[number]])
        return _Rank(number, process, folder / f"error-{number}.json", None)

    monkeypatch.setattr(Launcher, "_start", start)
    monkeypatch.setattr("llmkit.launch.local._GRACE", 0.2)
    with pytest.raises(ResourceError, match="process 1 of 2 died") as error:
        Launcher(2, "30min", tmp_path).run([])
    assert error.value.got == "exit code 9"


@pytest.mark.slow
def test_when_the_command_is_killed_its_processes_save_and_stop(
    tmp_path: Path, recipe: Callable[[int], Path], undisturbed: Path
) -> None:
    path = recipe(60)
    never = ("--set", "pretrain.save_every=1000")  # but when it is asked to stop
    running = Running(command(path, tmp_path / "run", "--processes", "2", *never), tmp_path / "run")
    running.process.kill()
    running.process.wait()
    _, alive = psutil.wait_procs(running.workers, timeout=forked.LONG)
    assert not alive
    assert list((tmp_path / "run" / "pretrain" / "checkpoints").glob("step-*"))
    last = finish(command(path, tmp_path / "run", "--processes", "2", *never))
    assert last.returncode == 0, last.err
    assert "going on after step" in last.err
    model = "pretrain/model/model.safetensors"
    assert digest_file(tmp_path / "run" / model) == digest_file(undisturbed / model)


@pytest.mark.slow
def test_torchrun_starts_the_processes_again_and_they_go_on(
    tmp_path: Path, recipe: Callable[[int], Path], undisturbed: Path
) -> None:
    words = command(recipe(60), tmp_path / "run")
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", "--max-restarts=1"]
    with (tmp_path / "said").open("w+") as said:
        elastic = subprocess.Popen([*torchrun, "-m", "llmkit", *words], stdout=said, stderr=said, env=ENVIRONMENT)
        while not list((tmp_path / "run" / "pretrain" / "checkpoints").glob("step-*")):
            assert elastic.poll() is None
            time.sleep(0.02)
        psutil.Process(elastic.pid).children()[1].kill()
        assert elastic.wait(forked.LONG) == 0, (tmp_path / "said").read_text()
    assert "going on after step" in (tmp_path / "said").read_text()
    model = "pretrain/model/model.safetensors"
    assert digest_file(tmp_path / "run" / model) == digest_file(undisturbed / model)


def test_a_second_start_knows_nothing_of_the_first_that_its_launcher_s_store_keeps() -> None:
    store = HashStore()

    def start() -> list[Store]:
        with ThreadPoolExecutor(3) as pool:
            parts = [pool.submit(_own_part, store, rank, 3, 60.0) for rank in (2, 1, 0)]
            return [part.result() for part in parts]

    for _ in range(5):
        parts = start()
        assert not any(part.check(["said"]) for part in parts)
        parts[0].set("said", "once")
        assert [part.get("said") for part in parts] == [b"once"] * 3


@pytest.mark.slow
def test_a_process_that_hangs_is_noticed(tmp_path: Path, recipe: Callable[[int], Path]) -> None:
    more = ("--processes", "2", "--set", "launch.hang_after=8s")
    running = Running(command(recipe(5000), tmp_path / "run", *more), tmp_path / "run")
    running.workers[1].suspend()
    code, said = running.end()
    assert code == 5
    assert "training hangs" in said
    assert "1: step" in said
    assert "stopped" in said


@pytest.mark.slow
def test_the_error_of_the_process_that_failed_is_shown(tmp_path: Path, recipe: Callable[[int], Path]) -> None:
    path = recipe(4)
    path.write_text(path.read_text().replace("lr: 1.0e-3", "lr: 1.0e-3\n  optimizer: {name: sgd, momentum: 7000}"))
    found = finish(command(path, tmp_path / "run", "--processes", "2", "--set", "pretrain.steps=400", "--json"))
    assert found.returncode in (2, 6), found.err
    assert json.loads(found.out)["exit_code"] == found.returncode
