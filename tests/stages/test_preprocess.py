"""preprocess: the same corpus however the work is spread and whatever stopped it, and every row accounted for."""

from __future__ import annotations

import json
import multiprocessing
import os
import random
import signal
import uuid
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import forked
import numpy as np
import psutil
import pytest
from conftest import WORDS, Cli, Outcome, sentence, write_rows

from llmkit.data import gather, workers
from llmkit.data.corpus import Corpus
from llmkit.data.pieces import pieces_of
from llmkit.run.directory import Run
from llmkit.stages import encoding

Rows = list[dict[str, Any]]
Preprocess = Callable[..., Outcome]


def story(number: int, words: int = 30) -> str:
    """A text like no other."""
    return " ".join(random.Random(number).choices(WORDS, k=words))


def stories(*numbers: int) -> Rows:
    return [{"text": story(number)} for number in range(*numbers)]


def command(model: Path, run: Path, *words: object, task: str = "text", **data: Any) -> list[str]:
    """The words of `llmkit preprocess` with keys of `data`."""
    values = {"name": "one"} | {f"data.{key}": value for key, value in ({"max_length": 256} | data).items()}
    written = [word for key, value in values.items() for word in ("--set", f"{key}={json.dumps(value, default=str)}")]
    return [*map(str, ("preprocess", "-m", model, "-t", task, "-o", run, "-q", *written, *words))]


@pytest.fixture
def preprocess(cli: Cli, tiny_llama: Path, tmp_path: Path) -> Preprocess:
    """`preprocess("run", train=file, eval="10%")`; rows in place of a file are written to one."""

    def call(run: str, *words: object, model: Path = tiny_llama, **data: Any) -> Outcome:
        for key in ("train", "eval", "seen"):
            if isinstance(data.get(key), list) and "uri" not in data[key][0]:
                data[key] = write_rows(tmp_path / f"{run}-{key}.jsonl", data[key])
        return cli(*command(model, tmp_path / run, *words, **data))

    return call


def done(outcome: Outcome) -> Outcome:
    assert outcome.code == 0, outcome.err + outcome.out
    return outcome


def refused(outcome: Outcome, code: int | tuple[int, ...], *words: str) -> None:
    """It ended with this code or one of these, and what it says has these words."""
    assert outcome.code in (code if isinstance(code, tuple) else (code,)), outcome.err + outcome.out
    assert "Traceback" not in outcome.err
    for word in words:
        assert word in outcome.err + outcome.out


def statistics(run: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((run / "preprocess" / "statistics.json").read_text())
    return found


def texts(run: Path, name: str) -> list[str]:
    """What the examples of a corpus say, without special tokens."""
    from llmkit.model.loading import load_tokenizer

    tokenizer = load_tokenizer(run / "preprocess" / "tokenizer")
    corpus = Corpus(run / "preprocess" / name)
    return [str(tokenizer.decode(each["input_ids"], skip_special_tokens=True)) for each in corpus]


def made(run: Path) -> dict[str, bytes]:
    """Every file that preprocess left."""
    folder = run / "preprocess"
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and not path.is_relative_to(folder / "work")
    }


def check_same(one: Path, other: Path) -> None:
    found, wanted = made(one), made(other)
    assert found.keys() == wanted.keys()
    assert [name for name in found if found[name] != wanted[name]] == []


def rejected(run: Path) -> list[tuple[str, int, str]]:
    lines = (run / "preprocess" / "rejected.jsonl").read_text().splitlines()
    return [(Path(each["source"]).name, each["line"], each["reason"]) for each in map(json.loads, lines)]


# The same bytes, however the work is spread


def many_files(folder: Path, rows: list[Any], count: int) -> Path:
    """Rows in so many files, each of which is a piece with `small_pieces`."""
    folder.mkdir()
    for at in range(count):
        write_rows(folder / f"{at:03}.jsonl", rows[at * len(rows) // count : (at + 1) * len(rows) // count])
    return folder


def small_pieces(patch: pytest.MonkeyPatch) -> None:
    """Small data is cut, and done by processes, as large data is."""
    patch.setattr(gather, "pieces_of", lambda *source: pieces_of(*source, piece_bytes=1))
    patch.setattr(gather, "_BYTES_FOR_PROCESSES", 0)
    patch.setattr(encoding, "_BYTES_FOR_PROCESSES", 0)


def all_there_is(folder: Path) -> dict[str, Any]:
    """Data with two sources and their weights, and rows that are bad, repeated, long, and nearly held out."""
    chance = random.Random(4)
    rows: list[Any] = [*stories(400), *({"text": story(number, 300)} for number in range(400, 460))]
    rows += [{"text": story(number) + " more"} for number in range(0, 400, 9)]
    rows += [{"text": story(number)} for number in range(0, 400, 7)]
    rows += [{"text": story(number).upper() + " and so on"} for number in range(0, 400, 10)]
    rows += [{"text": 5}, {"text": " "}]
    chance.shuffle(rows)
    first, second = many_files(folder / "first", rows[:350], 7), many_files(folder / "second", rows[350:], 5)
    return {
        "train": [{"uri": first, "weight": 2.5}, {"uri": second, "weight": 0.5}],
        "filters": ["duplicates", {"near_duplicates": {"threshold": 0.95}}],
        "eval": "20%",
        "max_length": 128,
    }


def test_the_corpora_are_the_same_bytes_with_any_number_of_workers(
    preprocess: Preprocess, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = all_there_is(tmp_path)
    done(preprocess("whole", **settings, workers=1))
    started = []
    start = workers._Pool._start
    monkeypatch.setattr(workers._Pool, "_start", lambda pool: started.append(pool) or start(pool))
    small_pieces(monkeypatch)
    monkeypatch.setattr(encoding, "_BYTES_FOR_PROCESSES", 100_000)  # `eval` is smaller
    for count in (1, 3):
        done(preprocess(str(count), **settings, workers=count))
        check_same(tmp_path / str(count), tmp_path / "whole")
        assert len(started) == (0 if count == 1 else 6), "three to read, and three to encode `train`"
    assert multiprocessing.active_children() == []
    found = statistics(tmp_path / "3")
    assert min(found["rows_filtered"].values()) > 20
    assert found["corpora"]["train"]["examples"] > 2 * found["corpora"]["train"]["rows"]
    assert found["rows_rejected"] == 2
    assert found["leaks"]["train"]["near"] > 0
    assert len(rejected(tmp_path / "3")) == 2 + sum(found["rows_filtered"].values())


@pytest.mark.slow
def test_a_large_file_is_cut_and_the_corpora_are_the_same_bytes(
    preprocess: Preprocess, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As a user has it: nothing is told of pieces or processes."""
    train = write_rows(
        tmp_path / "large.jsonl", ({"text": f"{number} " + story(number, 40) * 60} for number in range(1200))
    )
    assert len(pieces_of(str(train))) > 1
    for count in (1, 2):
        done(preprocess(str(count), train=train, workers=count))
    check_same(tmp_path / "1", tmp_path / "2")


# Stopped half-way


def stop_after(module: Any, results: int, number: int, patch: pytest.MonkeyPatch) -> None:
    """Sends this process a signal when so many tasks have come back, while two more are being worked at."""
    in_order = module.in_order

    def stopping(make: Any, tasks: Any, count: int) -> Iterator[Any]:
        for done, result in enumerate(in_order(make, tasks[: results + 2], count)):
            if done == results:
                os.kill(os.getpid(), number)
            yield result

    patch.setattr(module, "in_order", stopping)


def shards(run: Path) -> dict[str, tuple[int, int]]:
    """The files of all shards that are finished: when they were written, and which they are."""
    found = {}
    for name in ("shard.json", "corpus.json"):
        for path in (run / "preprocess" / "work").rglob(name):
            if not path.parent.name.startswith("."):
                files = ((file, file.stat()) for file in path.parent.iterdir())
                found |= {str(file.relative_to(run)): (facts.st_mtime_ns, facts.st_ino) for file, facts in files}
    return found


def check_goes_on(run: Path, preprocess: Preprocess, settings: dict[str, Any], patch: pytest.MonkeyPatch) -> None:
    """The same command does the rest, touches nothing that was finished, and ends as if nothing had happened."""
    finish = Run.finish
    before = shards(run)
    with patch.context() as inner:  # `work/` stays when all is done
        inner.setattr(
            Run, "finish", lambda run, artifact, seconds: finish(run, replace(artifact, disposable=()), seconds)
        )
        done(preprocess(run.name, **settings | {"workers": 1}))  # which is the same command, and takes less time
    after = shards(run)
    assert {name: after.get(name) for name in before} == before
    assert len(after) > len(before) > 0
    done(preprocess("never", **settings | {"workers": 1}))
    check_same(run, run.parent / "never")


def state(run: Path) -> str:
    found: str = json.loads((run / "run.json").read_text())["stages"]["preprocess"]["state"]
    return found


def spawned() -> list[psutil.Process]:
    """The workers of this process that are alive."""
    children = psutil.Process().children(recursive=True)
    return [child for child in children if "spawn_main" in " ".join(child.cmdline())]


@pytest.fixture
def _ctrl_c_interrupts() -> Iterator[None]:
    """As on a terminal: a shell starts what it runs in the background with SIGINT ignored."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("_ctrl_c_interrupts")
@pytest.mark.parametrize(
    ("module", "number", "code", "kind"),
    [
        (gather, signal.SIGTERM, 75, "stopped"),
        (gather, signal.SIGINT, 130, "interrupted"),
        (encoding, signal.SIGTERM, 75, "stopped"),
    ],
    ids=["SIGTERM while reading", "Ctrl-C while reading", "SIGTERM while encoding"],
)
def test_stopped_by_a_signal_it_leaves_no_process_and_goes_on(
    module: Any,
    number: int,
    code: int,
    kind: str,
    preprocess: Preprocess,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    small_pieces(monkeypatch)
    settings = {"train": many_files(tmp_path / "data", stories(120), 8), "workers": 2, "eval": None}
    with monkeypatch.context() as patch:
        stop_after(module, 3, number, patch)
        stopped = preprocess("run", "--json", **settings)
    assert (stopped.code, stopped.json["kind"]) == (code, kind)
    assert "run the same command again" in stopped.json["hint"]
    assert state(tmp_path / "run") == "stopped"
    assert spawned() == []
    finished = len({Path(name).parent for name in shards(tmp_path / "run")})
    assert finished - (0 if module is gather else 8) in (3, 4, 5)
    check_goes_on(tmp_path / "run", preprocess, settings, monkeypatch)


def preprocess_until_killed(module: str, *words: str) -> None:
    """In a process of its own: dies when three tasks have come back."""
    patch = pytest.MonkeyPatch()
    small_pieces(patch)
    stop_after({"gather": gather, "encoding": encoding}[module], 3, signal.SIGKILL, patch)
    forked.command(*words)


@pytest.mark.parametrize("module", ["gather", pytest.param("encoding", marks=pytest.mark.slow)])
def test_killed_half_way_it_goes_on_and_its_processes_end(
    module: str, preprocess: Preprocess, tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = {"train": many_files(tmp_path / "data", stories(120), 8), "workers": 2, "eval": None}
    run, mark = tmp_path / "run", uuid.uuid4().hex
    words = command(tiny_llama, run, **settings)
    ended = forked.start(preprocess_until_killed, module, *words, env={"LLMKIT_TEST": mark})
    assert ended.wait() == -signal.SIGKILL, ended.err
    assert state(run) == "running"
    forked.wait_until(lambda: not marked_with(mark))
    finished = len({Path(name).parent for name in shards(run)})
    assert finished - (0 if module == "gather" else 8) in (3, 4, 5)
    small_pieces(monkeypatch)
    check_goes_on(run, preprocess, settings, monkeypatch)


def marked_with(mark: str) -> list[int]:
    """The processes that have a word of their own in their environment."""
    found = []
    for process in psutil.process_iter(["pid", "environ"]):
        if (process.info["environ"] or {}).get("LLMKIT_TEST") == mark and process.status() != psutil.STATUS_ZOMBIE:
            found.append(process.pid)
    return found


def test_what_was_done_for_other_data_is_not_gone_on_from(
    preprocess: Preprocess, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    small_pieces(monkeypatch)
    data = many_files(tmp_path / "data", stories(60), 6)
    with monkeypatch.context() as patch:
        stop_after(gather, 3, signal.SIGTERM, patch)
        assert preprocess("run", train=data, workers=1).code == 75
    write_rows(data / "000.jsonl", stories(100, 110))
    done(preprocess("run", train=data, workers=1))
    done(preprocess("never", train=data, workers=1))
    check_same(tmp_path / "run", tmp_path / "never")


def test_damaged_work_is_refused_with_what_to_do(
    preprocess: Preprocess, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = stories(60)
    with monkeypatch.context() as patch:
        stop_after(encoding, 0, signal.SIGTERM, patch)
        assert preprocess("run", train=rows).code == 75
    (file,) = (tmp_path / "run").rglob("rows.jsonl")
    file.write_bytes(file.read_bytes()[:-10])
    refused(preprocess("run", train=rows), 4, str(file), "--no-resume")
    done(preprocess("run", "--no-resume", train=rows))


def test_workers_and_work_leave_no_trace(preprocess: Preprocess, tmp_path: Path) -> None:
    """What served to make the corpus is gone, and another number of workers makes nothing new."""
    rows = stories(60)
    done(preprocess("run", train=rows, workers=1))
    assert not (tmp_path / "run" / "preprocess" / "work").exists()
    assert {path.name for path in (tmp_path / "run" / "preprocess").iterdir()} == {
        *("train", "eval", "tokenizer", "rejected.jsonl", "statistics.json")
    }
    before = (tmp_path / "run" / "preprocess" / "statistics.json").stat().st_mtime_ns
    done(preprocess("run", train=rows, workers=2))
    assert (tmp_path / "run" / "preprocess" / "statistics.json").stat().st_mtime_ns == before


# What is held out


def sides(run: Path) -> tuple[set[str], set[str]]:
    """The texts that are learnt and those that are held out, none of which is both."""
    train, held_out = set(texts(run, "train")), set(texts(run, "eval"))
    assert not train & held_out
    return train, held_out


def test_a_share_or_a_number_of_rows_is_held_out(preprocess: Preprocess, tmp_path: Path) -> None:
    rows = stories(200)
    for run, wanted in (("share", "20%"), ("number", 37), ("none", None)):
        done(preprocess(run, train=rows, eval=wanted))
    train, held_out = sides(tmp_path / "share")
    assert 25 < len(held_out) < 55
    assert train | held_out == {row["text"] for row in rows}
    train, held_out = sides(tmp_path / "number")
    assert (len(train), len(held_out)) == (163, 37)
    assert len(texts(tmp_path / "none", "train")) == 200
    assert texts(tmp_path / "none", "eval") == []


def test_folds_hold_out_every_row_once(preprocess: Preprocess, tmp_path: Path) -> None:
    rows = stories(100)
    seen: Counter[str] = Counter()
    for number in range(1, 5):
        done(preprocess(f"fold-{number}", train=rows, fold=f"{number}/4"))
        train, held_out = sides(tmp_path / f"fold-{number}")
        assert len(train) == 75
        seen.update(held_out)
    assert seen == Counter(row["text"] for row in rows)


def test_rows_of_a_group_are_held_out_together(preprocess: Preprocess, tmp_path: Path) -> None:
    rows = [row | {"author": f"author {number % 20}"} for number, row in enumerate(stories(200))]
    done(preprocess("run", train=rows, eval="25%", group="author"))
    train, held_out = sides(tmp_path / "run")
    authors = [{row["author"] for row in rows if row["text"] in side} for side in (train, held_out)]
    assert len(train) + len(held_out) == 200
    assert not authors[0] & authors[1]
    assert 0 < len(authors[1]) < 20


def labelled(sizes: dict[str, int]) -> Rows:
    names = [name for name, size in sizes.items() for _ in range(size)]
    return [row | {"label": name} for row, name in zip(stories(len(names)), names, strict=True)]


def test_of_each_label_the_same_share_is_held_out(preprocess: Preprocess, tiny_bert: Path, tmp_path: Path) -> None:
    rows = labelled({"often": 150, "rarely": 20, "once in a while": 30})
    done(preprocess("run", train=rows, eval="20%", stratify="label", task="classify", model=tiny_bert, max_length=128))
    entry = statistics(tmp_path / "run")["corpora"]
    assert entry["eval"]["labels"] == {"often": 30, "rarely": 4, "once in a while": 6}
    assert entry["train"]["labels"] == {"often": 120, "rarely": 16, "once in a while": 24}


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"eval": 0}, ["data.eval"]),
        ({"eval": -3}, ["data.eval", "number of rows"]),
        ({"eval": 0.05}, ["data.eval", "percent sign"]),
        ({"eval": "100%"}, ["data.eval", "below 100%"]),
        ({"fold": "6/5"}, ["fold", "2/5"]),
        ({"fold": "1/1"}, ["fold", "two folds or more"]),
        ({"fold": "0/5"}, ["data.fold"]),
        ({"fold": "first"}, ["data.fold"]),
        ({"fold": "1/5", "eval": None}, ["fold", "eval: null"]),
        ({"fold": "1/5", "eval": "other.jsonl"}, ["fold", "URI"]),
        ({"stratify": "label", "eval": "other.jsonl"}, ["stratify", "URI"]),
        ({"group": "author", "eval": "other.jsonl"}, ["group", "URI"]),
        ({"group": "author", "stratify": "label"}, ["`stratify` and `group`"]),
        ({"seen": "other.jsonl"}, ["seen", "filters"]),
        ({"leaks": "dorp"}, ["data.leaks", "drop"]),
        ({"benchmarks": "one.jsonl"}, ["data.benchmarks"]),
        ({"workers": 0}, ["data.workers"]),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, dict) else "",
)
def test_a_key_that_makes_no_sense_is_refused(
    preprocess: Preprocess, settings: dict[str, Any], words: list[str]
) -> None:
    refused(preprocess("run", train=stories(20), **settings), 2, *words)


@pytest.mark.parametrize("key", ["seen", "benchmarks", "eval"])
def test_data_that_is_missing_is_refused_by_name(preprocess: Preprocess, tmp_path: Path, key: str) -> None:
    missing = str(tmp_path / "missing.jsonl")
    settings = {key: [missing] if key == "benchmarks" else missing, "filters": ["duplicates"]}
    refused(preprocess("run", train=stories(20), **settings), 3, missing)


def test_more_folds_than_rows_are_refused(preprocess: Preprocess) -> None:
    refused(preprocess("run", train=stories(3) * 4, fold="1/5"), 3, "data.fold", "3 different")


@pytest.mark.parametrize("wanted", [20, 21, 500])
def test_as_many_held_out_rows_as_there_are_or_more_are_refused(preprocess: Preprocess, wanted: int) -> None:
    """And not quietly turned into another number of them."""
    refused(preprocess("run", train=stories(20), eval=wanted), (2, 3), "data.eval")


@pytest.mark.parametrize("key", ["group", "stratify"])
def test_a_column_that_no_row_has_is_refused(preprocess: Preprocess, key: str) -> None:
    rows = [row | {"author": str(number % 5)} for number, row in enumerate(stories(40))]
    refused(preprocess("run", train=rows, eval="20%", **{key: "auther"}), (2, 3), f"data.{key}", "auther")


# What training has in common with what is held out, with earlier data and with benchmarks


def test_rows_of_the_held_out_file_are_left_out_of_train_and_that_is_said(
    preprocess: Preprocess, tmp_path: Path, cli: Cli, tiny_llama: Path
) -> None:
    held_out = stories(100, 120)
    rows = [
        *stories(60),
        *held_out[:5],
        {"text": held_out[5]["text"].upper()},
        {"text": held_out[6]["text"] + " stone"},
    ]
    words = command(
        tiny_llama,
        tmp_path / "run",
        train=write_rows(tmp_path / "a.jsonl", rows),
        eval=write_rows(tmp_path / "b.jsonl", held_out),
    )
    outcome = done(cli(*(word for word in words if word != "-q")))
    assert set(texts(tmp_path / "run", "train")) == {row["text"] for row in stories(60)}
    assert set(texts(tmp_path / "run", "eval")) == {row["text"] for row in held_out}
    found = statistics(tmp_path / "run")["leaks"]["train"]
    assert (found["exact"], found["near"], found["held_out"]) == (6, 1, 20)
    (shown,) = found["shown"]
    assert (shown["train"], shown["held_out"]) == (rows[-1]["text"], held_out[6]["text"])
    assert shown["jaccard"] >= 0.8
    assert "6 examples exactly, 1 nearly; left out" in " ".join(outcome.err.split())


def test_near_copies_within_the_data_are_left_out_of_train(preprocess: Preprocess, tmp_path: Path) -> None:
    """The split by content parts them; copies that differ in case or white space only stay together anyway."""
    rows = stories(150) + [{"text": story(number) + " again"} for number in range(150)]
    done(preprocess("drop", train=rows, eval="30%"))
    done(preprocess("off", train=rows, eval="30%", leaks="off"))
    stem = lambda side: {text.removesuffix(" again") for text in side}  # noqa: E731
    train, held_out = sides(tmp_path / "off")
    both = stem(train) & stem(held_out)
    assert len(both) > 30
    train, held_out = sides(tmp_path / "drop")
    assert not stem(train) & stem(held_out)
    assert held_out == sides(tmp_path / "off")[1]
    assert statistics(tmp_path / "drop")["leaks"]["train"]["near"] == len(both)
    assert len(sides(tmp_path / "off")[0]) == len(train) + len(both)


@pytest.mark.parametrize("wanted", [1, 3, 4, 10])
def test_what_all_conversations_begin_with_is_no_leak(preprocess: Preprocess, tmp_path: Path, wanted: int) -> None:
    """A long system prompt around short exchanges, however few of them are held out."""
    prompt = {"role": "system", "content": story(900, 170)}
    rows = [
        {
            "messages": [
                prompt,
                {"role": "user", "content": sentence(i)},
                {"role": "assistant", "content": f"It is {i}."},
            ]
        }
        for i in range(100)
    ]
    done(preprocess("run", train=rows, eval=wanted, task="chat"))
    found = statistics(tmp_path / "run")
    assert found["leaks"]["train"]["near"] == 0
    assert found["corpora"]["train"]["examples"] == 100 - wanted


LEAKY = {"train": [*stories(40), *stories(100, 105), {"text": story(105) + " stone"}], "eval": stories(100, 110)}


def test_leaks_reported_stay(preprocess: Preprocess, tmp_path: Path) -> None:
    done(preprocess("run", **LEAKY, leaks="report"))
    assert len(texts(tmp_path / "run", "train")) == 46
    found = statistics(tmp_path / "run")["leaks"]["train"]
    assert found["exact"] + found["near"] == 6


def test_short_rows_that_are_held_out_too_are_reported(preprocess: Preprocess, tmp_path: Path) -> None:
    """Of fewer tokens than are compared to find near copies."""
    rows = [{"text": word} for word in WORDS]
    done(preprocess("run", train=[*stories(40), *rows], eval=rows[:4], leaks="report"))
    found = statistics(tmp_path / "run")["leaks"]["train"]
    assert (found["exact"] + found["near"], len(texts(tmp_path / "run", "train"))) == (4, 52)


@pytest.mark.parametrize(
    "train", [LEAKY["train"], [*stories(40), *stories(100, 101)], [*stories(40), LEAKY["train"][-1]]]
)
def test_leaks_may_be_an_error(preprocess: Preprocess, train: Rows) -> None:
    refused(preprocess("run", train=train, eval=LEAKY["eval"], leaks="error"), 3, "data.leaks")


def test_without_leaks_there_is_no_error(preprocess: Preprocess, tmp_path: Path) -> None:
    done(preprocess("run", train=stories(40), eval=stories(100, 110), leaks="error"))
    assert len(texts(tmp_path / "run", "train")) == 40


def test_leaks_not_looked_for_stay(preprocess: Preprocess, tmp_path: Path) -> None:
    done(preprocess("run", **LEAKY, leaks="off"))
    assert len(texts(tmp_path / "run", "train")) == 46
    assert statistics(tmp_path / "run")["leaks"] == {}


@pytest.mark.parametrize("leaks", ["drop", "error", "report"])
def test_the_same_file_to_learn_and_to_hold_out(cli: Cli, tiny_llama: Path, tmp_path: Path, leaks: str) -> None:
    """All of train is held out too, which is said whatever is done about it."""
    file = write_rows(tmp_path / "rows.jsonl", stories(30))
    words = command(tiny_llama, tmp_path / "run", train=file, eval=file, leaks=leaks)
    outcome = cli(*(word for word in words if word != "-q"))
    assert "30" in outcome.err
    assert "held out" in outcome.err
    if leaks != "drop":
        assert outcome.code == (3 if leaks == "error" else 0), outcome.err


def test_what_repeats_earlier_data_is_left_out(preprocess: Preprocess, tmp_path: Path) -> None:
    seen = [*stories(10), {"text": story(50) + " more"}, {"bad": 1}]
    filters = ["duplicates", "near_duplicates"]
    done(preprocess("run", train=stories(60), seen=seen, filters=filters, eval=None))
    assert set(texts(tmp_path / "run", "train")) == {row["text"] for row in stories(10, 60) if row["text"] != story(50)}
    found = statistics(tmp_path / "run")
    assert found["rows_filtered"] == {"duplicates": 10, "near_duplicates": 1}
    assert (found["rows_read"], found["rows_rejected"]) == (60, 0)
    done(preprocess("run", train=stories(60), seen=seen[:5], filters=filters, eval=None))
    assert len(texts(tmp_path / "run", "train")) == 55, "other earlier data, another corpus"


def test_rows_that_hold_a_benchmark_are_left_out(preprocess: Preprocess, tmp_path: Path) -> None:
    """Whatever its columns are called, and whatever stands around it."""
    tests = [{"id": number, "question": story(number, 60), "choices": ["A", "B"]} for number in range(500, 540)]
    uri = str(write_rows(tmp_path / "tests.jsonl", tests))
    rows = [*stories(40), {"text": f"{story(41)} {story(507, 60)} {story(42)}"}, {"text": story(511, 60)}]
    rows += [{"text": " ".join(story(520, 60).split()[:12]) + story(43)}]
    done(preprocess("run", train=rows, eval=None, benchmarks=[uri], max_rejected="50%"))
    assert set(texts(tmp_path / "run", "train")) == {row["text"] for row in [*stories(40), rows[-1]]}
    found = statistics(tmp_path / "run")["leaks"][f"train, {uri}"]
    assert (found["near"], found["held_out_covered"], found["held_out"]) == (2, 2, 40)
    assert [entry["train"] for entry in found["shown"]] == [row["text"][:300] for row in rows[40:42]]
    refused(preprocess("error", train=rows, eval=None, benchmarks=[uri], leaks="error"), 3, uri, "data.leaks")


def test_a_benchmarks_question_counts_without_its_choices(preprocess: Preprocess, tmp_path: Path) -> None:
    tests = [{"question": story(n), "choices": [story(n + at, 8) for at in (1000, 2000)]} for n in range(500, 540)]
    uri = str(write_rows(tmp_path / "tests.jsonl", tests))
    rows = [*stories(40), {"text": f"{story(41)} {story(507)} {story(42)}"}]
    done(preprocess("run", train=rows, eval=None, benchmarks=[uri]))
    assert statistics(tmp_path / "run")["leaks"][f"train, {uri}"]["near"] == 1


def test_a_benchmark_without_text_is_told_of(cli: Cli, tiny_llama: Path, tmp_path: Path) -> None:
    train = write_rows(tmp_path / "rows.jsonl", stories(30))
    uri = write_rows(tmp_path / "tests.jsonl", [{"number": 1}, {"number": 2}])
    words = command(tiny_llama, tmp_path / "run", train=train, benchmarks=[uri])
    outcome = cli(*(word for word in words if word != "-q"))
    assert str(uri) in outcome.err


# Counts


def test_the_counts_add_up(preprocess: Preprocess, tmp_path: Path) -> None:
    done(preprocess("run", **all_there_is(tmp_path), workers=1))
    found = statistics(tmp_path / "run")
    corpora = found["corpora"]
    kept = sum(entry["rows"] for entry in corpora.values())
    filtered = sum(found["rows_filtered"].values())
    leaks = found["leaks"]["train"]
    lost = found["rows_read"] - (kept + found["rows_rejected"] + filtered)
    assert 0 < lost <= leaks["exact"] + leaks["near"]  # which count examples: a row of weight 3 is three
    assert found["rows_rejected"] == sum(found["rejected"].values()) == 2
    assert filtered == sum(sum(entry["taken_out"].values()) for entry in found["filters"].values())
    named = Counter(reason for *_, reason in rejected(tmp_path / "run"))
    assert named.total() == found["rows_rejected"] + filtered
    for name, entry in corpora.items():
        corpus = Corpus(tmp_path / "run" / "preprocess" / name)
        lengths = corpus.lengths("input_ids")
        assert (entry["examples"], entry["tokens"]) == (len(corpus), lengths.sum())
        assert sum(entry["sources"].values()) == sum(entry["lengths_up_to"].values()) == len(corpus)
        assert entry["length_percentiles"]["100"] == lengths.max()


def test_a_corpus_does_not_count_rows_that_were_left_out_of_it_as_leaks(preprocess: Preprocess, tmp_path: Path) -> None:
    done(preprocess("run", **LEAKY))
    entry = statistics(tmp_path / "run")["corpora"]["train"]
    assert (entry["examples"], entry["rows"]) == (40, 40)


def test_each_example_knows_its_source(preprocess: Preprocess, tmp_path: Path) -> None:
    uris = [
        str(write_rows(tmp_path / f"{name}.jsonl", rows)) for name, rows in (("a", stories(30)), ("b", stories(50, 90)))
    ]
    done(preprocess("run", train=[{"uri": uri} for uri in uris], eval=None))
    corpus = Corpus(tmp_path / "run" / "preprocess" / "train")
    assert corpus.meta["sources"] == uris
    assert np.asarray(corpus.values("source")).tolist() == [0] * 30 + [1] * 40


def test_too_many_unusable_rows_are_refused_and_named(preprocess: Preprocess, tmp_path: Path) -> None:
    rows = [*stories(50), {"text": 5}, {"text": " "}]
    refused(preprocess("run", train=rows), 3, "2 of 52 rows", "data.max_rejected", "rejected.jsonl")
    assert [line for _, line, _ in rejected(tmp_path / "run")] == [51, 52]
    done(preprocess("run", train=rows, max_rejected=2))


@pytest.mark.parametrize(
    "filters", [[], ["duplicates"], ["near_duplicates"], ["duplicates", {"length": {"min_chars": 10_000}}]]
)
@pytest.mark.parametrize("row", [{"text": 5}, {"text": "fine"}])
def test_when_no_row_is_left_it_is_said_why(preprocess: Preprocess, filters: list[Any], row: dict[str, Any]) -> None:
    if row["text"] == 5 or len(filters) == 2:
        refused(preprocess("run", train=[row] * 3, filters=filters), 3, "no row of `data.train` can be used")
    else:
        done(preprocess("run", train=[row] * 3, filters=filters))
