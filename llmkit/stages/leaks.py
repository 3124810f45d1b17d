"""What the training examples have in common with held-out ones and with benchmarks, and what is done about it."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from llmkit.data.corpus import Column, Corpus, CorpusWriter
from llmkit.data.leaks import PASSAGE, Leaks, find_leaks
from llmkit.data.sources import Row, read_rows
from llmkit.errors import DataError
from llmkit.files import digest_json
from llmkit.recipe.schema import Recipe
from llmkit.run.directory import Run
from llmkit.stages.encoding import Examples
from llmkit.stages.rows import RecipeRows

_PAIRS = (("train", "eval"), ("pretrain", "pretrain-eval"))
_CHARS = 300
_ROWS_AT_ONCE = 1000
_WORDS = 8  # of a text that is told by itself


def leave_out_leaks(
    recipe: Recipe, run: Run, rows: RecipeRows, examples: dict[str, Examples], tokenizer: Any
) -> dict[str, Any]:
    """Compares training with held-out examples, and by `data.leaks` leaves out of the first what is in the second.

    Gives what was found, as JSON values. Raises DataError with `leaks: error` when there is any.
    """
    wanted = recipe.data.leaks
    if wanted == "off":
        return {}
    found: dict[str, Any] = {}
    for train, held_out in _PAIRS:
        if train not in examples or not all(any(map(len, examples[name].parts)) for name in (train, held_out)):
            continue
        mine = examples[train]
        leaks = find_leaks(mine.parts, examples[held_out].parts)
        found[train] = _described(leaks, mine.parts, examples[held_out].parts, tokenizer)
        found[train]["exact"] += rows.repeated_held_out if train == "train" else 0
        _tell(run, wanted, train, found[train])
        if wanted == "drop":
            _leave_out(mine, leaks.same | leaks.near)
    for uri in recipe.data.benchmarks:
        tests = _benchmark(uri, tokenizer, run.folder("preprocess") / "work" / "benchmarks" / digest_json(uri)[:16])
        for name in ("train", "pretrain"):
            if name in examples:
                mine = examples[name]
                leaks = find_leaks(mine.parts, [tests], within=True)
                found[f"{name}, {uri}"] = _described(leaks, mine.parts, [tests], tokenizer)
                _tell(run, wanted, name, found[f"{name}, {uri}"], f"in {uri}")
                if wanted == "drop":
                    _leave_out(mine, leaks.same | leaks.near)
    return found


def _leave_out(examples: Examples, marked: np.ndarray) -> None:
    if not marked.any():
        return
    ends = np.cumsum([len(part) for part in examples.parts])[:-1]
    before = examples.kept or [np.ones(len(part), bool) for part in examples.parts]
    examples.kept = [kept & ~mine for kept, mine in zip(before, np.split(marked, ends), strict=True)]


def _benchmark(uri: str, tokenizer: Any, folder: Path) -> Corpus:
    """The texts of a benchmark's rows, whatever its columns are called: each that is long enough, or else all of a row.

    Raises DataError when there is none.
    """
    writer, count = CorpusWriter(folder, {"input_ids": Column("uint32")}), 0
    rows = read_rows(uri)
    while some := list(islice(rows, _ROWS_AT_ONCE)):
        texts = [text for row in some if isinstance(row, Row) for text in _to_look_for(list(_texts(row.values)))]
        if texts:
            for ids in tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"]:
                writer.add({"input_ids": ids})
        count += len(texts)
    if not count:
        raise DataError("a benchmark has no text", got=uri, expected="rows with text", where="data.benchmarks")
    return writer.finish({})


def _to_look_for(texts: list[str]) -> list[str]:
    long = [text for text in texts if len(text.split()) >= _WORDS]
    return long or (["\n".join(texts)] if any(map(str.strip, texts)) else [])


def _texts(value: Any) -> Iterator[str]:
    """All text in a value, at any depth."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict | list | tuple):
        for item in value.values() if isinstance(value, dict) else value:
            yield from _texts(item)


def _described(leaks: Leaks, train: list[Corpus], held_out: list[Corpus], tokenizer: Any) -> dict[str, Any]:
    shown = [
        {
            "train": _text(train, one, tokenizer),
            "held_out": _text(held_out, other, tokenizer),
            "jaccard": round(index, 3),
        }
        for one, other, index in leaks.shown
    ]
    return {
        "exact": int(leaks.same.sum()),
        "near": int((leaks.near & ~leaks.same).sum()),
        "passages": int(leaks.passages.sum()),
        "held_out_covered": leaks.held_out_covered,
        "held_out": sum(map(len, held_out)),
        "shown": shown,
    }


def _text(parts: list[Corpus], number: int, tokenizer: Any) -> str:
    for part in parts:
        if number < len(part):
            return str(tokenizer.decode(part[number]["input_ids"], skip_special_tokens=True))[:_CHARS]
        number -= len(part)
    raise AssertionError("an example beyond the last")


def _tell(run: Run, wanted: str, name: str, found: dict[str, Any], where: str = "held out") -> None:
    same = found["exact"] + found["near"]
    if same and wanted == "error":
        raise DataError(
            f"{same} examples of `{name}` are {where} too",
            got=f"{found['exact']} exactly, {found['near']} nearly",
            expected="none (data.leaks: error)",
            hint="data.leaks: drop leaves them out; near_duplicates among the filters finds copies within the data",
            where="data.leaks",
        )
    if same:
        done = "left out of it" if wanted == "drop" else "still in it (data.leaks: report)"
        run.reporter.warn(
            f"{where} and in `{name}` too: {found['exact']} examples exactly, {found['near']} nearly; {done}"
        )
    if found["passages"]:
        run.reporter.note(
            f"{found['passages']} examples of `{name}` share {PASSAGE} tokens in a row or more with one that is {where}; "
            f"nearly all of {found['held_out_covered']} of {found['held_out']} of these stands somewhere in `{name}`"
        )
