"""The corpus: encoded examples on disk, memory-mapped, with a fingerprint.

A corpus is a folder with `corpus.json` and, for each column, one file of raw values; a ragged column (token ids) also has
a file of offsets, of shape (N + 1,), so that example i is `values[offsets[i]:offsets[i + 1]]`. Nothing here knows what a
column means.
"""

from __future__ import annotations

import mmap
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from llmkit.errors import ArtifactError
from llmkit.files import digest_file, digest_json, read_json, write_json

FORMAT = 1
_EXAMPLES_AT_ONCE = 1000  # that are held before they are written
_BYTES_AT_ONCE = 2**24  # of a column that is read from end to end
Example = dict[str, Any]  # column -> 1-D array (ragged) or number


@dataclass(frozen=True)
class Column:
    """The type of one column: `dtype` as NumPy names it; `ragged` when each example has its own length."""

    dtype: str
    ragged: bool = True


class CorpusWriter:
    """Collects examples and writes them as a corpus. Use `add` or `add_all`, then `finish`."""

    def __init__(self, folder: Path, columns: Mapping[str, Column]) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "corpus.json").unlink(missing_ok=True)  # until `finish`, there is no corpus here
        self.folder = folder
        self.columns = dict(columns)
        self._files = {name: (folder / f"{name}.bin").open("wb") for name in columns}
        self._lengths: dict[str, list[np.ndarray]] = {name: [] for name, column in columns.items() if column.ragged}
        self._count = 0
        self._waiting: dict[str, list[np.ndarray]] = {name: [] for name in columns}

    def add(self, example: Example) -> None:
        """Appends one example, which must have every column."""
        for name, column in self.columns.items():
            self._waiting[name].append(_as_column(example[name], column.dtype))
        self._count += 1
        if self._count % _EXAMPLES_AT_ONCE == 0:
            self._write()

    def add_all(self, corpus: Corpus, keep: np.ndarray | None = None) -> None:
        """Appends the examples of a corpus with the same columns, or those that a mask of shape (N,) chooses."""
        self._write()
        for name, column in self.columns.items():
            values = corpus.values(name)
            lengths = corpus.lengths(name) if column.ragged else None
            if keep is not None:
                values = values[keep if lengths is None else np.repeat(keep, lengths)]
                lengths = lengths if lengths is None else lengths[keep]
            values.tofile(self._files[name])
            if lengths is not None:
                self._lengths[name].append(lengths)
        self._count += len(corpus) if keep is None else int(keep.sum())
        corpus.let_go_of_pages()

    def _write(self) -> None:
        for name, values in self._waiting.items():
            if values:
                np.concatenate(values).tofile(self._files[name])
            if name in self._lengths:
                self._lengths[name].append(np.array([len(each) for each in values], np.int64))
            values.clear()

    def finish(self, meta: Mapping[str, Any]) -> Corpus:
        """Writes offsets and the manifest, in which `meta` (task, template, counts) is kept, and opens the corpus."""
        self._write()
        for file in self._files.values():
            file.close()
        for name, lengths in self._lengths.items():
            np.cumsum(np.concatenate([[0], *lengths]), dtype=np.int64).tofile(self.folder / f"{name}.offsets.bin")
        columns = {name: {"dtype": c.dtype, "ragged": c.ragged} for name, c in self.columns.items()}
        names = [*self._files, *(f"{name}.offsets" for name in self._lengths)]
        files = sorted(self.folder / f"{name}.bin" for name in names)
        sums = {path.name: digest_file(path) for path in files}
        manifest = {
            "format": FORMAT,
            "examples": self._count,
            "columns": columns,
            "files": {path.name: path.stat().st_size for path in files},
            "sha256": sums,
            "content": digest_json([columns, sums, meta.get("identity")]),
            "meta": dict(meta),
        }
        write_json(self.folder / "corpus.json", manifest)
        return Corpus(self.folder)


class Corpus(Sequence[Example]):
    """A corpus on disk; opening it reads the manifest only. Raises ArtifactError when it is missing or damaged."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        manifest = read_json(folder / "corpus.json")
        if manifest.get("format") != FORMAT:
            raise ArtifactError(
                "a corpus of another llmkit",
                got=manifest.get("format"),
                expected=str(FORMAT),
                hint="run preprocess again",
            )
        self.meta: dict[str, Any] = manifest["meta"]
        self.content: str = manifest["content"]
        self.columns = {name: Column(**column) for name, column in manifest["columns"].items()}
        self._count = int(manifest["examples"])
        self.checksums: dict[str, str] = manifest.get("sha256", {})  # SHA-256 by file
        sizes: dict[str, int] = manifest["files"]
        self._opened: dict[str, tuple[int, int] | None] = {}
        self._values = {n: self._map(f"{n}.bin", column.dtype, sizes) for n, column in self.columns.items()}
        self._offsets = {
            n: self._map(f"{n}.offsets.bin", "int64", sizes) for n, column in self.columns.items() if column.ragged
        }

    def __len__(self) -> int:
        return self._count

    def __getitem__(self, index: Any) -> Any:
        """One example; ragged columns are views of the memory map."""
        if not 0 <= index < self._count:
            raise IndexError(f"example {index} of a corpus of {self._count}")
        return {
            name: values[self._offsets[name][index] : self._offsets[name][index + 1]]
            if name in self._offsets
            else values[index].item()
            for name, values in self._values.items()
        }

    def __iter__(self) -> Iterator[Example]:
        return (self[index] for index in range(self._count))

    def lengths(self, column: str) -> np.ndarray:
        """How many values each example has in a ragged column, shape (N,)."""
        return np.diff(self._offsets[column])

    def values(self, column: str) -> np.ndarray:
        """All values of a column, one example after the other."""
        return self._values[column]

    def chunks(self, column: str) -> Iterator[np.ndarray]:
        """The same in parts that are read and not mapped: a pass over everything takes the memory of one part."""
        dtype = np.dtype(self.columns[column].dtype)
        with (self.folder / f"{column}.bin").open("rb") as file:
            while len(part := np.fromfile(file, dtype, _BYTES_AT_ONCE // dtype.itemsize)):
                yield part

    def let_go_of_pages(self) -> None:
        """Gives back the memory in which its files are mapped; what is read again is mapped again."""
        for values in [*self._values.values(), *self._offsets.values()]:
            if isinstance(values, np.memmap) and hasattr(mmap, "MADV_DONTNEED"):
                values._mmap.madvise(mmap.MADV_DONTNEED)  # type: ignore[attr-defined]

    def require_unchanged(self) -> None:
        """Raises ArtifactError when a file is gone or was written to since the corpus was opened."""
        for name, expected in self._opened.items():
            path = self.folder / name
            if _signature(path) != expected:
                raise ArtifactError(
                    "a corpus file changed while it was in use",
                    got="no file" if not path.is_file() else "another size or time of change",
                    expected="the file as it was when this began",
                    hint="run the same command again: it makes the corpus anew where that is needed, and goes on",
                    where=path,
                )

    def _map(self, name: str, dtype: str, sizes: dict[str, int]) -> np.ndarray:
        path, size = self.folder / name, sizes.get(name)
        found = path.stat().st_size if path.is_file() else None
        if size is None or found != size:
            raise ArtifactError(
                "a corpus file is missing or damaged",
                got="no file" if found is None else f"{found} bytes",
                expected=f"{size} bytes",
                hint="run preprocess again",
                where=path,
            )
        self._opened[name] = _signature(path)
        return np.memmap(path, dtype=dtype, mode="r") if size else np.zeros(0, dtype=dtype)


def _signature(path: Path) -> tuple[int, int] | None:
    """Size and time of change; None without a file."""
    try:
        found = path.stat()
    except OSError:
        return None
    return found.st_size, found.st_mtime_ns


def smallest_unsigned(largest: int) -> str:
    """The smallest unsigned integer type that holds a value, as NumPy names it."""
    return next(dtype for dtype in ("uint8", "uint16", "uint32", "uint64") if largest <= np.iinfo(dtype).max)


def _as_column(value: Any, dtype: str) -> np.ndarray:
    """Raises OverflowError for numbers that the type does not hold."""
    if isinstance(value, np.ndarray) and value.dtype != dtype and value.dtype.kind in "iu" and value.size:
        limits = np.iinfo(dtype)
        if value.min() < limits.min or value.max() > limits.max:
            raise OverflowError(f"{value.min()} to {value.max()} do not fit into {dtype}")
    return np.atleast_1d(np.asarray(value, dtype=dtype))
