"""Where the examples of a corpus come from: beside its columns, and no part of its content, a file and a line for each."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from llmkit.data.corpus import Corpus

_ORIGINS = "origins.npy"
FILES = "files"  # in a corpus's meta: the names that are numbers here
_PLACE = np.dtype([("file", "<i4"), ("line", "<i8")])


@dataclass(frozen=True)
class Origins:
    """Of N examples the file, as a number of `files`, and the line from 1 (or row, where there are no lines), each (N,)."""

    files: tuple[str, ...]
    file: np.ndarray
    line: np.ndarray

    def groups(self) -> np.ndarray:
        """Numbers that are the same for examples of one row, (N,)."""
        pairs = np.stack([self.file.astype(np.int64), self.line], axis=1)
        return np.unique(pairs, axis=0, return_inverse=True)[1].reshape(-1)

    def of(self, number: int) -> dict[str, Any]:
        """The place of an example, as JSON values."""
        return {"file": self.files[self.file[number]], "line": int(self.line[number])}


def save_origins(folder: Path, file: Any, line: Any) -> None:
    """Writes the origins of a corpus's examples beside its columns: `file` and `line` as `Origins` has them."""
    found = np.empty(len(file), _PLACE)
    found["file"], found["line"] = file, line
    np.save(folder / _ORIGINS, found)


def origins_of(corpus: Corpus) -> Origins | None:
    """The origins of a corpus; None where an earlier llmkit made it."""
    path, files = corpus.folder / _ORIGINS, corpus.meta.get(FILES)
    if files is None or not path.is_file():
        return None
    found = np.load(path)
    return Origins(tuple(files), found["file"], found["line"])


def join_origins(folder: Path, parts: Sequence[Corpus], kept: Sequence[np.ndarray | None]) -> list[str]:
    """Writes the origins of what masks of shape (N,) leave of some corpora; gives the names of their files."""
    files: dict[str, int] = {}
    file, line = [np.zeros(0, np.int64)], [np.zeros(0, np.int64)]
    for part, mask in zip(parts, kept, strict=True):
        own = origins_of(part)
        assert own is not None, "parts are made by this llmkit"
        number_of = np.array([files.setdefault(name, len(files)) for name in own.files], np.int64)
        chosen = slice(None) if mask is None else mask
        file.append(number_of[own.file[chosen]] if len(number_of) else number_of)
        line.append(own.line[chosen])
    save_origins(folder, np.concatenate(file), np.concatenate(line))
    return list(files)
