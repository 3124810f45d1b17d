"""Kills small trainings with SIGKILL at random moments, runs the same command again until it ends, and compares what is
left with a run that nobody disturbed: `python -m tests.soak [--kills N | --minutes M] [--seed S] [--json FILE]`.

A life is the real command line in a process forked from this one, which has imported everything and computed nothing. A
third of the kills come at a random time, half right before a random file operation (opening to write, renaming, linking,
deleting, making a folder, syncing), mostly one on a checkpoint, and the rest up to 5 ms after one. After each kill all
published checkpoints are read.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib
import json
import mmap
import os
import random
import re
import select
import shutil
import signal
import socket
import sys
import tempfile
import time
import traceback
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tests.forked import PRELOADED

os.environ |= {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false", "HF_HUB_OFFLINE": "1", "NO_COLOR": "1"}
os.environ["CUDA_VISIBLE_DEVICES"] = ""

_WRITES = os.O_WRONLY | os.O_RDWR | os.O_CREAT
_CHANGES = ("os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.link", "os.truncate", "os.symlink")
_OF_THE_TIME = re.compile("second|memory|time|created|started")  # what is never the same
_PART = re.compile(r"(weights|optimizer|best)(-\d+-of-\d+)?\.safetensors|state\.json|manifest\.json")  # of a checkpoint
_LEFT_OVER = re.compile(r"(^|/)(\.[^/]*\.\d+\.tmp|\.tmp\w{6})$")  # llmkit's own, and those of safetensors
_LONGEST_LIFE = 900.0  # seconds

ROWS, SPIKED, LABELS, TEXTS = "rows.jsonl", "spiked.jsonl", "labels.jsonl", "texts.jsonl"
OFTEN = {"save_every": 1, "log_every": 1, "trackers": [], "lr": 1e-3, "batch_size": 8, "warmup": 2}


@dataclass(frozen=True)
class Variation:
    """A way to train: a recipe, and over how many processes."""

    name: str
    recipe: dict[str, Any]
    processes: int = 1


VARIATIONS = (
    Variation(
        "plain",
        {
            "task": "chat",
            "data": {"train": ROWS, "eval": "20%"},
            "stages": ["preprocess", "finetune", "evaluate"],
            "finetune": OFTEN | {"steps": 14, "eval_every": 2, "ema": 0.8, "keep_every": 4, "precision": "fp32"},
            "evaluate": {"generate": 2},
        },
    ),
    Variation(
        "bf16, an adapter",
        {
            "task": "classify",
            "data": {"train": LABELS, "eval": "20%"},
            "stages": ["preprocess", "finetune"],
            "finetune": OFTEN | {"steps": 14, "eval_every": 3, "precision": "bf16", "adapter": "lora"},
        },
    ),
    Variation(
        "streamed",
        {
            "task": "text",
            "data": {"train": TEXTS, "stream": True, "eval": None},
            "stages": ["preprocess", "finetune"],
            "finetune": OFTEN | {"steps": 14, "save_every": 2, "precision": "fp32"},
        },
    ),
    Variation(
        "rolled back",
        {
            "task": "text",
            "data": {"train": SPIKED, "eval": None},
            "stages": ["preprocess", "finetune"],
            "finetune": OFTEN
            | {"steps": 40, "save_every": 3, "precision": "fp32", "lr": 3e-2, "batch_size": 2}
            | {"divergence": {"spike": "rollback", "spike_z": 2, "window": 16, "limit": 9}},
        },
    ),
    Variation(
        "unfreezing",
        {
            "task": "chat",
            "data": {"train": ROWS, "eval": "20%"},
            "stages": ["preprocess", "freeze", "finetune"],
            "freeze": {
                "blocks": "all",
                "embeddings": True,
                "unfreeze": [{"at": 4, "blocks": 1}, {"at": 8, "blocks": 0}],
            },
            "finetune": OFTEN | {"steps": 14, "save_every": 2, "eval_every": 3, "precision": "fp32"},
        },
    ),
    Variation(
        "from scratch to export",
        {
            "task": "text",
            "data": {"train": TEXTS, "eval": "10%", "max_length": 64},
            "stages": ["preprocess", "pretrain", "freeze", "finetune", "evaluate", "export"],
            "pretrain": OFTEN | {"steps": 8, "keep": "last", "precision": "fp32"},
            "freeze": {"blocks": 0},
            "finetune": OFTEN | {"steps": 8, "eval_every": 2, "keep_checkpoints": 1, "precision": "bf16"},
        },
    ),
    Variation(
        "two processes",
        {
            "task": "chat",
            "data": {"train": ROWS, "eval": "20%"},
            "stages": ["preprocess", "finetune"],
            "finetune": OFTEN | {"steps": 10, "eval_every": 3, "precision": "fp32"},
        },
        processes=2,
    ),
    Variation(
        "two processes, spread",
        {
            "task": "chat",
            "parallel": "fsdp",
            "data": {"train": ROWS, "eval": "20%"},
            "stages": ["preprocess", "finetune"],
            "finetune": OFTEN | {"steps": 10, "eval_every": 3, "ema": 0.8, "precision": "fp32"},
        },
        processes=2,
    ),
)


OPERATIONS, ON_CHECKPOINTS, STEPS = 0, 1, 2


@dataclass
class Shared:
    """Counters that a parent and its forked children share: file operations, those on checkpoints, and steps."""

    _memory: mmap.mmap = field(default_factory=lambda: mmap.mmap(-1, 24))

    def __getitem__(self, index: int) -> int:
        return int.from_bytes(self._memory[8 * index : 8 * index + 8], "little")

    def add(self, index: int) -> int:
        """One more; gives how many that is."""
        value = self[index] + 1
        self._memory[8 * index : 8 * index + 8] = value.to_bytes(8, "little")
        return value

    def reset(self) -> None:
        """All at nought."""
        self._memory[:] = bytes(24)


@dataclass(frozen=True)
class Death:
    """When to kill: after so many seconds, or at the n-th file operation of a kind, or so many seconds after it."""

    seconds: float | None = None
    operation: int | None = None
    kind: int = OPERATIONS
    later: float = 0.0


@dataclass
class Life:
    """How a process ended: its exit code, None when it was killed, and before or after which file operation."""

    code: int | None
    seconds: float
    steps: int
    operations: tuple[int, int]  # all, and those on checkpoints
    said: str
    at: str = ""


def live(arguments: list[str], run: Path, counters: Shared, death: Death | None, processes: int = 1) -> Life:
    """Runs a command in forked processes and kills them when that is due."""
    counters.reset()
    told, tell = os.pipe()
    output = run.with_suffix(".out")
    port = _free_port() if processes > 1 else 0
    started, children = time.monotonic(), []
    for rank in range(processes):
        child = os.fork()
        if child == 0:
            os.close(told)
            ranks = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": processes, "LOCAL_WORLD_SIZE": processes}
            ranks |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
            _become(arguments, run, output, counters, death, tell, ranks if processes > 1 else {})
        children.append(child)
    os.close(tell)
    at, codes = _await_death(children, told, started, death)
    os.close(told)
    killed = any(code < 0 for code in codes)
    said = output.read_text(errors="replace") if output.exists() else ""
    return Life(
        None if killed else max(codes),
        time.monotonic() - started,
        counters[STEPS],
        (counters[OPERATIONS], counters[ON_CHECKPOINTS]),
        said,
        at,
    )


def _await_death(children: list[int], told: int, started: float, death: Death | None) -> tuple[str, list[int]]:
    """Waits for the children, killing all once it is time or one of them is dead; gives where, and their exit codes."""
    deadline = started + (death.seconds if death and death.seconds is not None else _LONGEST_LIFE)
    at, codes = "", dict.fromkeys(children, 1000)
    while 1000 in codes.values():
        ready, _, _ = select.select([told], [], [], min(0.01, max(0.0, deadline - time.monotonic())))
        if ready and (message := os.read(told, 4096)):
            at = message.decode(errors="replace")
            time.sleep(death.later if death else 0.0)
            deadline = 0.0
        if time.monotonic() >= deadline or any(code < 0 for code in codes.values()):
            for child in (child for child, code in codes.items() if code == 1000):
                os.kill(child, signal.SIGKILL)
            deadline = float("inf")
        for child in (child for child, code in codes.items() if code == 1000):
            done, status = os.waitpid(child, os.WNOHANG)
            if done:
                codes[child] = os.waitstatus_to_exitcode(status)
        if ready and not at:  # the pipe is closed: they are ending
            time.sleep(0.002)
    return at, list(codes.values())


def _become(
    arguments: list[str],
    run: Path,
    output: Path,
    counters: Shared,
    death: Death | None,
    tell: int,
    ranks: dict[str, Any],
) -> None:
    """Turns a forked process into `llmkit`; never returns."""
    code = 99
    try:
        os.setsid()
        target = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(target, 1)
        os.dup2(target, 2)
        os.environ |= {name: str(value) for name, value in ranks.items()}
        os.environ["XDG_CACHE_HOME"] = str(run.with_suffix(".cache"))
        import torch

        from llmkit.cli.app import main
        from llmkit.data.stream import Stream
        from llmkit.train.loop import Fit

        torch.set_num_threads(1)
        Stream.__init__.__defaults__ = (1500,)  # type: ignore[attr-defined]  # bytes: a block is a few steps
        if ranks.get("RANK", 0) == 0:
            counted = Fit._count

            def count(fit: Fit, *given: Any) -> None:
                counters.add(STEPS)
                counted(fit, *given)

            Fit._count = count  # type: ignore[method-assign]
        _count_operations(run, counters, death, tell)
        sys.argv = ["llmkit", *arguments]
        main()
    except SystemExit as ended:
        code = ended.code if isinstance(ended.code, int) else 98
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def _count_operations(run: Path, counters: Shared, death: Death | None, tell: int) -> None:
    """Counts what changes files of the run, and dies at the operation that was chosen."""
    inside = str(run)

    def note(event: str, path: object, relative: bool = False) -> None:
        text = os.fsdecode(path) if isinstance(path, str | bytes | os.PathLike) else str(path)
        if not (relative or text.startswith(inside)):
            return
        counts = [counters.add(OPERATIONS), counters.add(ON_CHECKPOINTS) if _on_checkpoint(text) else 0]
        if death is not None and counts[death.kind] == death.operation:
            os.write(tell, f"{event} {text.removeprefix(inside)}".encode())
            if not death.later:
                os.kill(os.getpid(), signal.SIGKILL)

    def audit(event: str, given: tuple[Any, ...]) -> None:
        if event == "open" and isinstance(given[0], str | os.PathLike) and (given[2] or 0) & _WRITES:
            note("open", given[0])
        elif event in _CHANGES:
            note(event, given[0], relative=not Path(given[0]).is_absolute())  # rmtree names files relative to a folder

    synced = os.fsync

    def sync(file: int) -> None:
        note("fsync", Path(f"/proc/self/fd/{file}").readlink())
        synced(file)

    os.fsync = sync  # type: ignore[assignment]
    sys.addaudithook(audit)


def _on_checkpoint(name: str) -> bool:
    return "checkpoints" in name or ".step-" in name or _PART.fullmatch(name) is not None


def _free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])


def left_by(run: Path) -> dict[str, Any]:
    """What must not depend on kills: weights, log, results and which files there are."""
    record = json.loads((run / "run.json").read_text())
    found: dict[str, Any] = {
        str(path.relative_to(run)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(run.glob("*/model/*.safetensors"))
    }
    found["states"] = {name: entry["state"] for name, entry in record["stages"].items()}
    found["metrics"] = _timeless({name: entry["metrics"] for name, entry in record["stages"].items()})
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    found["log"] = _timeless(lines)
    once = [(line["stage"], line["step"]) for line in lines if "loss" in line]
    found["each step once"] = len(once) == len(set(once)) and once
    for path in run.glob("evaluate/*.json"):
        found[f"evaluate/{path.name}"] = _timeless(json.loads(path.read_text()))
    names = (str(path.relative_to(run)) for path in run.rglob("*"))
    found["files"] = sorted(name for name in names if not (name.startswith("preprocess/") or _LEFT_OVER.search(name)))
    return found


def _timeless(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _timeless(entry) for key, entry in value.items() if not _OF_THE_TIME.search(key)}
    return [_timeless(entry) for entry in value] if isinstance(value, list) else value


def checkpoints_of(run: Path) -> Iterator[tuple[str, int, str | None]]:
    """Stage and step of each published checkpoint, and why it cannot be read, None when it can."""
    from safetensors import safe_open

    from llmkit.run.checkpoint import checked_manifest, published

    for folder in run.glob("*/checkpoints"):
        half_replaced = [path for path in folder.glob(".step-*.old") if (path / "manifest.json").exists()]
        for path in [*published(folder), *half_replaced]:
            why = None
            try:
                checked_manifest(path)
                for file in path.glob("*.safetensors"):
                    with safe_open(file, "pt") as tensors:
                        for name in tensors.keys():  # noqa: SIM118  (it is no mapping)
                            tensors.get_tensor(name)
            except Exception as error:
                why = f"{path}: {error}"
            yield folder.parent.name, int(re.findall(r"step-(\d+)", path.name)[0]), why


@dataclass
class Count:
    """What became of a variation's runs."""

    runs: int = 0
    lives: int = 0
    kills: int = 0
    while_publishing: int = 0  # kills at or right after an operation on a checkpoint
    differences: int = 0
    unreadable: int = 0
    lost_checkpoints: int = 0  # times that the newest one was gone after a kill
    left_over: int = 0  # temporary files that nobody deleted
    steps: int = 0
    steps_again: int = 0
    seconds: float = 0.0
    problems: list[str] = field(default_factory=list)


class Soak:
    """Runs that are killed, in a folder, and what is counted of them."""

    def __init__(self, folder: Path, seed: int) -> None:
        self.folder, self.random, self.counters = folder, random.Random(seed), Shared()
        self.counts: dict[str, Count] = defaultdict(Count)
        self._whole: dict[str, tuple[dict[str, Any], Life]] = {}
        self._number = 0

    def one_run(self, variation: Variation, kills: int, deadline: float) -> int:
        """Kills a run at most so many times before it may end; gives how often."""
        expected, whole = self.undisturbed(variation)
        count, killed, steps = self.counts[variation.name], 0, 0
        self._number += 1
        run = self.folder / f"run-{self._number:04}"
        newest: dict[str, int] = {}
        while True:
            may = killed < kills and time.monotonic() < deadline
            life = live(
                self._command(variation, run),
                run,
                self.counters,
                self._death(whole) if may else None,
                variation.processes,
            )
            count.lives += 1
            count.seconds += life.seconds
            steps += life.steps
            if life.code is not None:
                break
            killed += 1
            count.while_publishing += _on_checkpoint(life.at.partition(" ")[2])
            newest = self._look_at_checkpoints(run, newest, count, life)
        count.runs, count.kills = count.runs + 1, count.kills + killed
        count.steps, count.steps_again = count.steps + whole.steps, count.steps_again + steps - whole.steps
        left_over = [str(path.relative_to(run)) for path in run.rglob(".*") if _LEFT_OVER.search(str(path))]
        count.left_over += len(left_over)
        problems = [f"exit code {life.code}: {life.said[-3000:]}"] if life.code else self._differences(run, expected)
        if left_over:
            print(f"left over in {run.name}: {', '.join(left_over)}", file=sys.stderr)
        if problems:
            count.differences += 1
            count.problems += [f"{variation.name}, {run.name}: {text}" for text in problems]
        else:
            shutil.rmtree(run)
        return killed

    def undisturbed(self, variation: Variation) -> tuple[dict[str, Any], Life]:
        """What a variation leaves when nothing happens; run once."""
        if variation.name not in self._whole:
            run = self.folder / re.sub(r"\W+", "-", variation.name)
            life = live(self._command(variation, run), run, self.counters, None, variation.processes)
            if life.code != 0:
                raise SystemExit(f"{variation.name} fails undisturbed, with code {life.code}:\n{life.said}")
            self._whole[variation.name] = left_by(run), life
        return self._whole[variation.name]

    def _command(self, variation: Variation, run: Path) -> list[str]:
        recipe = self.folder / (re.sub(r"\W+", "-", variation.name) + ".yaml")
        if not recipe.exists():
            own = json.loads(json.dumps(variation.recipe))
            own["data"]["train"] = str(self.folder / own["data"]["train"])
            if "pretrain" in own:
                sizes = {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64}
                own["pretrain"] |= {
                    "architecture": {"model_type": "gpt2"} | sizes,
                    "tokenizer": str(self.folder / "model"),
                }
            else:
                own["model"] = str(self.folder / "model")
            recipe.write_text(json.dumps({"name": "soak"} | own))  # JSON is YAML
        return ["run", str(recipe), "-o", str(run)]

    def _death(self, whole: Life) -> Death:
        way = self.random.randrange(6)
        if way < 2:
            return Death(seconds=self.random.uniform(0.0, whole.seconds))
        kind = OPERATIONS if way == 2 else ON_CHECKPOINTS
        later = self.random.uniform(1e-5, 5e-3) if way == 5 else 0.0
        return Death(operation=self.random.randint(1, whole.operations[kind]), kind=kind, later=later)

    def _look_at_checkpoints(self, run: Path, before: dict[str, int], count: Count, life: Life) -> dict[str, int]:
        """The newest step by stage; counts what cannot be read, and what was there and is gone."""
        newest: dict[str, int] = {}
        for stage, step, why in checkpoints_of(run):
            if why is None:
                newest[stage] = max(step, newest.get(stage, 0))
            else:
                count.unreadable += 1
                count.problems.append(f"unreadable after {life.at}: {why}")
        done = json.loads((run / "run.json").read_text())["stages"] if (run / "run.json").exists() else {}
        for stage, step in before.items():
            if newest.get(stage, -1) < step and done.get(stage, {}).get("state") != "done":
                count.lost_checkpoints += 1
                count.problems.append(f"{stage} stood at step {step}, now at {newest.get(stage)}, after {life.at}")
        return newest

    def _differences(self, run: Path, expected: dict[str, Any]) -> list[str]:
        found = left_by(run)
        keys = [key for key in {**expected, **found} if expected.get(key) != found.get(key)]
        return [f"{key} differs: {_first_difference(expected.get(key), found.get(key))}" for key in keys]


def _first_difference(expected: Any, found: Any) -> str:
    if isinstance(expected, list) and isinstance(found, list):
        missing = [entry for entry in expected if entry not in found]
        more = [entry for entry in found if entry not in expected]
        return f"missing {missing[:3]}, more {more[:3]}, {len(expected)} and {len(found)} entries"
    return f"{str(expected)[:300]} became {str(found)[:300]}"


def prepare(folder: Path) -> None:
    """A tiny model and rows, made in a process of its own; then imports what trainings need, computing nothing."""
    child = os.fork()
    if child == 0:
        try:
            _make_inputs(folder)
        except BaseException:
            traceback.print_exc()
            os._exit(1)
        os._exit(0)
    if os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]):
        raise SystemExit("the inputs of the soak could not be made")
    for name in PRELOADED:
        importlib.import_module(name)


def _make_inputs(folder: Path) -> None:
    from transformers import LlamaConfig, LlamaForCausalLM, set_seed

    from tests.conftest import CHATML, WORDS, make_tokenizer, sentence, write_rows

    tokenizer = make_tokenizer()
    tokenizer.add_special_tokens(
        {"eos_token": "<|im_end|>", "additional_special_tokens": ["<|im_start|>", "<|im_end|>"]}
    )
    tokenizer.chat_template = CHATML
    tokenizer.save_pretrained(folder / "model")
    set_seed(1)
    size = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    ids = {"eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id, "bos_token_id": None}
    config = LlamaConfig(vocab_size=len(tokenizer), attention_dropout=0.1, max_position_embeddings=256, **size, **ids)
    LlamaForCausalLM(config).save_pretrained(folder / "model")
    turns = ({"role": "user", "content": sentence(i)} for i in range(60))
    answers = ({"role": "assistant", "content": WORDS[i % 12]} for i in range(60))
    write_rows(folder / ROWS, ({"messages": list(pair)} for pair in zip(turns, answers, strict=True)))
    write_rows(folder / LABELS, ({"text": sentence(i), "label": ("a", "b", "c")[i % 3]} for i in range(60)))
    write_rows(folder / TEXTS, ({"text": sentence(i) + " " + sentence(i + 100)} for i in range(80)))
    strange = (b"\xf0\x9f\xa6\x86 zzqqx!! kvwj 0x9f ;;;; " * 3).decode()
    write_rows(folder / SPIKED, ({"text": strange if i % 10 == 3 else sentence(5)} for i in range(80)))


def soak(
    folder: Path, *, kills: int | None, minutes: float | None, seed: int, variations: Sequence[Variation], tell: Any
) -> Soak:
    """Kills until there were so many kills or minutes."""
    prepare(folder)
    work, done, number = Soak(folder, seed), 0, 0
    deadline = time.monotonic() + minutes * 60 if minutes is not None else float("inf")
    while (kills is None or done < kills) and time.monotonic() < deadline:
        variation = variations[number % len(variations)]
        left = 12 if kills is None else min(12, kills - done, -(-kills // len(variations)))
        done += work.one_run(variation, left, deadline)
        number += 1
        tell(f"{done} kills; {variation.name}: {work.counts[variation.name]}")
    return work


def table(counts: dict[str, Count]) -> str:
    """Markdown."""
    columns = (
        "runs",
        "kills",
        "while_publishing",
        "differences",
        "unreadable",
        "lost_checkpoints",
        "left_over",
        "steps",
        "steps_again",
    )
    total = {name: sum(getattr(count, name) for count in counts.values()) for name in columns}
    rows = [(name, *(getattr(count, column) for column in columns)) for name, count in counts.items()]
    lines = [("training", *(column.replace("_", " ") for column in columns)), ("---",) * (len(columns) + 1), *rows]
    lines.append(("together", *total.values()))
    return "\n".join("| " + " | ".join(map(str, line)) + " |" for line in lines)


def main() -> None:
    """The command; its exit code is 1 when anything differed, could not be read, or was gone."""
    parser = argparse.ArgumentParser(prog="python -m tests.soak", description=__doc__)
    parser.add_argument("--kills", type=int)
    parser.add_argument("--minutes", type=float)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--only", nargs="+", choices=[v.name for v in VARIATIONS], help="these ways to train")
    parser.add_argument("--folder", type=Path, help="where to work; kept afterwards")
    parser.add_argument("--json", type=Path, help="where to write the counts")
    given = parser.parse_args()
    folder = given.folder or Path(tempfile.mkdtemp(prefix="soak-"))
    folder.mkdir(parents=True, exist_ok=True)
    work = soak(
        folder,
        kills=given.kills if given.kills or given.minutes else 200,
        minutes=given.minutes,
        seed=given.seed,
        variations=[v for v in VARIATIONS if given.only is None or v.name in given.only],
        tell=lambda text: print(text, file=sys.stderr, flush=True),
    )
    print(table(work.counts))
    problems = [text for count in work.counts.values() for text in count.problems]
    print("\n".join(problems))
    if given.json:
        given.json.write_text(json.dumps({name: vars(count) for name, count in work.counts.items()}, indent=2))
    if not problems and given.folder is None:
        shutil.rmtree(folder)
    sys.exit(1 if problems else 0)


if __name__ == "__main__":
    main()
