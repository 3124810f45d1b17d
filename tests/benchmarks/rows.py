"""The rows: a pure function of the standard library of the Python that runs, and of the tokenizer.

Conversations are llmkit's built-in docstrings. Texts to classify are pieces of source that fill the model's window, and
the label is the package that they stand in: without imports, with the packages' names taken out, and held out by whole
modules, so that a text tells its package by what it does.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections import defaultdict
from collections.abc import Callable, Iterator
from typing import Any

from llmkit.data.builtin import stdlib_modules
from llmkit.data.sources import Row, read_rows
from tests.benchmarks.encode import encode_chat

Rows = list[dict[str, Any]]

_CLASSES = 5
_SPECIAL_TOKENS = 2  # at the ends of a text
_NO_CLASS = {"encodings", "pydoc_data"}  # tables, and a single text
_IMPORT = re.compile(r"\s*(?:import|from)\s")


def chat_rows(tokenizer: Any, train: int, held_out: int, max_length: int) -> tuple[Rows, Rows]:
    """Conversations of at most `max_length` tokens, to train on and to hold out, in the order of their digests."""
    rows = [row.values for row in read_rows("builtin:docstrings") if isinstance(row, Row)]
    chosen: Rows = []
    for row in sorted(rows, key=lambda row: _digest(json.dumps(row, sort_keys=True))):
        if len(chosen) == train + held_out:
            break
        if len(encode_chat(tokenizer, row["messages"])["input_ids"]) <= max_length:
            chosen.append(row)
    return chosen[:train], chosen[train:]


def package_rows(tokenizer: Any, train: int, held_out: int, max_length: int) -> tuple[Rows, Rows]:
    """Texts of `max_length` tokens or more with the label of their package, to train on and to hold out.

    They are an equal number from each of the five largest packages, or fewer where one has no more.
    """
    modules = _largest_packages()
    names = {name for package in modules for name in (package, package.removesuffix("lib"))}
    names_taken_out = re.compile("|".join(sorted(map(re.escape, names), key=len, reverse=True)), re.IGNORECASE)
    both: tuple[Rows, Rows] = ([], [])
    for package, lines_of in modules.items():
        wanted = [max(1, train // _CLASSES), max(1, held_out // _CLASSES)]
        for path in sorted(lines_of, key=_digest):
            side = 1 if wanted[1] > 0 else 0  # the first modules are held out
            lines = [names_taken_out.sub("package", line) for line in lines_of[path]]
            texts = _texts(lines, _token_counter(tokenizer), max_length - _SPECIAL_TOKENS)
            rows = [{"text": text, "label": package} for text in texts][: max(0, wanted[side])]
            wanted[side] -= len(rows)
            both[side].extend(rows)
    return _shuffled(both[0]), _shuffled(both[1])


def _largest_packages() -> dict[str, dict[str, list[str]]]:
    """The five packages with the most source, in order of name: path of a module -> its lines that are no imports."""
    found: dict[str, dict[str, list[str]]] = defaultdict(dict)
    for module in stdlib_modules():
        package, _, inner = module.path.partition("/")
        if inner and package not in _NO_CLASS:
            lines = module.text.split("\n")
            found[package][module.path] = [line for line in lines if line.strip() and not _IMPORT.match(line)]
    sizes = {package: sum(len(line) for lines in found[package].values() for line in lines) for package in found}
    largest = sorted(found, key=lambda package: (-sizes[package], package))[:_CLASSES]
    return {package: found[package] for package in sorted(largest)}


def _token_counter(tokenizer: Any) -> Callable[[list[str]], list[int]]:
    def count(lines: list[str]) -> list[int]:
        if not lines:
            return []
        return [len(ids) for ids in tokenizer(lines, add_special_tokens=False, verbose=False)["input_ids"]]

    return count


def _texts(lines: list[str], count: Callable[[list[str]], list[int]], tokens: int) -> Iterator[str]:
    """Consecutive lines, cut where each text first has `tokens` tokens; the rest of a module is left out."""
    part: list[str] = []
    size = 0
    for line, line_tokens in zip(lines, count(lines), strict=True):
        part.append(line)
        size += line_tokens
        if size >= tokens:
            yield "\n".join(part)
            part, size = [], 0


def _shuffled(rows: Rows) -> Rows:
    return sorted(rows, key=lambda row: _digest(row["text"]))


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()
