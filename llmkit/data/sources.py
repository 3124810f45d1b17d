"""From a URI to rows: local paths and globs, `pkg://`, `builtin:`, fsspec URLs, saved data sets and the hub.

Formats, told by the suffix, each also under .gz, .xz, .bz2 or .zst: .jsonl and .ndjson (an object a line), .json (an
array of objects), .csv and .tsv (with a header), .parquet, .arrow, and .txt and .md (ONE document a file, not a line).
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path, PurePosixPath
from typing import BinaryIO, Protocol, cast

from llmkit.catalog import resolve
from llmkit.data.columnar import HubDataSet, SavedDataSet, read_arrow, read_parquet
from llmkit.data.readers import Rejected, Row, Where, read_csv, read_json, read_json_lines, read_text
from llmkit.data.storage import COMPRESSION_SUFFIXES, DataFile, data_suffix, failures_named, no_permission
from llmkit.errors import ArtifactError, DataError, did_you_mean
from llmkit.files import digest_json, package_path

__all__ = ["Rejected", "Row", "Where", "read_rows", "source_digest"]

_READERS: dict[str, Callable[[BinaryIO, str], Iterator[Row | Rejected]]] = {
    ".jsonl": read_json_lines,
    ".ndjson": read_json_lines,
    ".json": read_json,
    ".csv": read_csv,
    ".tsv": partial(read_csv, delimiter="\t"),
    ".parquet": read_parquet,
    ".arrow": read_arrow,
    ".txt": read_text,
    ".md": read_text,
}
_KNOWN_SUFFIXES = ", ".join(_READERS) + "; each also with " + ", ".join(COMPRESSION_SUFFIXES)
_HUB_ID = re.compile(r"(?P<name>[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*)(:(?P<split>[\w.-]+(\[[\d:%]*\])?))?")
_MAGIC = re.compile(r"[*?\[]")
_NOT_DATA = re.compile(r"(?i)[._]|(readme|license|notice|changelog)\b")  # beside the data of a folder, not part of it


class _Source(Protocol):
    def rows(self) -> Iterator[Row | Rejected]: ...

    def digest(self) -> str: ...


def read_rows(uri: str) -> Iterator[Row | Rejected]:
    """The rows behind a URI in a fixed order (files by path), each with its place, and the rows that could not be read.

    Memory stays bounded except for .json, .txt and .md, which are held a file at a time.
    Raises DataError: at the call for data that is missing, and while reading for files that are damaged or empty.
    """
    return _open(uri).rows()


def source_digest(uri: str) -> str:
    """SHA-256 in hex over the stored bytes behind a URI; names and times do not count. Raises as `read_rows` does."""
    return _open(uri).digest()


class _Files:
    """Data files, read one after the other."""

    def __init__(self, files: Sequence[DataFile]) -> None:
        for file in files:
            if file.suffix not in _READERS:
                raise DataError(
                    "a data file has an unknown suffix",
                    got=file.name,
                    expected=_KNOWN_SUFFIXES,
                    hint=did_you_mean(file.suffix, _READERS) if file.suffix else None,
                    where=file.name,
                )
        self._files = files

    def rows(self) -> Iterator[Row | Rejected]:
        any_row = False
        for file in self._files:
            empty = True
            with failures_named(file), file.open_unpacked() as stream:
                for row in _READERS[file.suffix](stream, file.name):
                    empty = False
                    yield row
            any_row = any_row or not empty
            if empty and len(self._files) > 1:
                yield Rejected("the file has no rows", Where(file.name, 1))
        if not any_row:
            name = self._files[0].name
            got = name if len(self._files) == 1 else f"{len(self._files)} empty files"
            raise DataError("the data has no rows", got=got, expected="at least one row", where=name)

    def digest(self) -> str:
        """Over the bytes, and the formats that they are read as."""
        return digest_json([[file.suffix, file.digest()] for file in self._files])


def _open(uri: str) -> _Source:
    if uri.startswith("builtin:"):
        return cast(_Source, resolve("builtin data set", uri.removeprefix("builtin:"), where=uri)())
    if uri.startswith("pkg://"):
        return _in_package(uri)
    if "://" in uri:
        return _remote(uri)
    hub = _HUB_ID.fullmatch(uri)
    try:
        path = Path(uri).expanduser()
        if path.exists() or not hub or data_suffix(uri) in _READERS:
            return _local(path, str(path))
        if not hub["split"] and Path(path.parts[0]).exists():
            raise _missing(path, str(path))
    except PermissionError as error:
        raise no_permission(str(error.filename or uri)) from None
    except (OSError, RuntimeError) as error:
        raise DataError("the data cannot be reached", got=str(error), expected="a path or URI", where=uri) from None
    return HubDataSet(hub["name"], hub["split"] or "train")


def _local(path: Path, name: str) -> _Source:
    """A file, folder or glob on this machine; `name` is what the user calls it."""
    if path.is_dir():
        if SavedDataSet.is_at(path):
            return SavedDataSet(path, name)
        inner = sorted(each.name for each in path.iterdir() if each.is_file())
        return _Files([DataFile(str(path / each), f"{name}/{each}") for each in _one_format(inner, name)])
    if path.exists():
        return _Files([DataFile(str(path), name)])
    fixed = next((at for at, part in enumerate(path.parts) if _MAGIC.search(part)), None)
    if fixed is None:
        raise _missing(path, name)
    base = Path(*path.parts[:fixed])
    matches = sorted(each for each in base.glob("/".join(path.parts[fixed:])) if each.is_file())
    visible = [each for each in matches if not any(part.startswith(".") for part in each.relative_to(base).parts)]
    if not visible:
        raise _no_match(name)
    shown = name.removesuffix("/".join(path.parts[fixed:]))
    return _Files([DataFile(str(each), shown + each.relative_to(base).as_posix()) for each in visible])


def _one_format(names: Sequence[str], folder: str) -> list[str]:
    """The data files of a folder, which must be of one format: what else lies beside the data is not guessed at."""
    data = [name for name in names if data_suffix(name) in _READERS and not _NOT_DATA.match(name)]
    suffixes = sorted({data_suffix(name) for name in data})
    if not data:
        raise DataError(
            "a folder has no data files",
            got=", ".join(names[:5]) or "no files",
            expected=_KNOWN_SUFFIXES,
            hint=f"for files in folders below it: {folder}/**/*.jsonl",
            where=folder,
        )
    if len({_READERS[suffix] for suffix in suffixes}) > 1:
        raise DataError(
            "a folder mixes formats",
            got=", ".join(suffixes),
            expected="data files of one format",
            hint=f"name the ones you mean: {folder}/*{suffixes[0]}",
            where=folder,
        )
    return data


def _missing(path: Path, name: str) -> DataError:
    if path.parent.is_dir():
        hint = did_you_mean(path.name, (each.name for each in path.parent.iterdir()))
    else:
        hint = f"the folder `{path.parent}` does not exist"
    if hint is None and _HUB_ID.fullmatch(name):
        hint = f"for a data set of the hub name its split: {name}:train"
    expected = "a file, folder, glob or URI of data"
    return DataError("the data is missing", got=name, expected=expected, hint=hint, where=name)


def _no_match(name: str) -> DataError:
    hint = "quote it, so that llmkit and not the shell expands it; ** reaches into folders"
    return DataError("a glob matches nothing", got=name, expected="at least one file", hint=hint, where=name)


def _in_package(uri: str) -> _Source:
    parts = uri.removeprefix("pkg://").split("/")
    fixed = next((at for at, part in enumerate(parts) if at and _MAGIC.search(part)), len(parts))
    if ".." in parts[fixed:]:
        raise DataError("a pkg:// path leads out of its package", got=uri, expected="a path inside the package")
    try:
        base = package_path("pkg://" + "/".join(parts[:fixed]))
    except ArtifactError as error:
        raise DataError(error.what, got=error.got, expected=error.expected, hint=error.hint, where=uri) from None
    return _local(base.joinpath(*parts[fixed:]), uri.rstrip("/"))


def _remote(uri: str) -> _Source:
    """Files behind an fsspec URL. Names shown to people carry no password and no query, which may be a signature."""
    import fsspec.core

    web = uri.startswith(("http://", "https://"))
    name = re.sub(r"//[^/@]*@", "//", uri.partition("?")[0] if web else uri)
    try:
        filesystem, path = fsspec.core.url_to_fs(uri)
        if "*" in path or (not web and _MAGIC.search(path)):
            found = sorted(each for each in filesystem.glob(path) if filesystem.isfile(each))
            if not found:
                raise _no_match(name)
            return _Files([DataFile(each, filesystem.unstrip_protocol(each), filesystem) for each in found])
        if not filesystem.exists(path):
            raise DataError("the data is missing", got=name, expected="a file, folder or glob that exists", where=name)
        if data_suffix(name) not in _READERS and filesystem.isdir(path):
            inner = {PurePosixPath(each).name: each for each in filesystem.ls(path, detail=False)}
            chosen = _one_format(sorted(inner), name.rstrip("/"))
            return _Files([DataFile(inner[each], f"{name.rstrip('/')}/{each}", filesystem) for each in chosen])
        return _Files([DataFile(path, name, filesystem)])
    except DataError:
        raise
    except PermissionError:
        raise no_permission(name) from None
    except Exception as error:  # every file system has errors of its own
        hint = "install the package that the message names" if isinstance(error, ImportError) else None
        got = f"{type(error).__name__}: {error}".replace(uri, name)
        raise DataError(
            "the data cannot be reached", got=got, expected="an fsspec URL", hint=hint, where=name
        ) from error
