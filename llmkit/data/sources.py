"""From a URI to rows: local paths and globs, `pkg://`, `builtin:`, fsspec URLs, saved data sets and the hub.

Formats, told by the suffix, each also under .gz, .xz, .bz2 or .zst: .jsonl and .ndjson (an object a line), .json (an
array of objects), .csv and .tsv (with a header), .parquet, .arrow, and .txt, .md, .html, .htm, .rst, .tex and .xml (ONE
document a file, not a line, markup and all). The format `text` makes a document of every file whose suffix tells no format.
Archives (.tar, .tgz, .zip) are read as the data files of one format in them, in the archive's own order.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path, PurePosixPath
from typing import BinaryIO, Protocol, cast

from llmkit.catalog import resolve
from llmkit.data.archives import ARCHIVE_SUFFIXES, Reader, read_archive
from llmkit.data.columnar import HubDataSet, SavedDataSet, read_arrow, read_parquet
from llmkit.data.delimited import read_csv
from llmkit.data.json_rows import read_json, read_json_lines
from llmkit.data.readers import Rejected, Row, Where, read_text
from llmkit.data.storage import COMPRESSION_SUFFIXES, DataFile, data_suffix, failures_named, no_permission, printable
from llmkit.errors import ArtifactError, DataError, did_you_mean
from llmkit.files import digest_json, package_path

__all__ = ["Rejected", "Row", "Where", "files_of", "read_file", "read_rows", "source_digest"]

_READERS: dict[str, Reader] = {
    ".jsonl": read_json_lines,
    ".ndjson": read_json_lines,
    ".json": read_json,
    ".csv": read_csv,
    ".tsv": partial(read_csv, delimiter="\t"),
    ".parquet": read_parquet,
    ".arrow": read_arrow,
    **dict.fromkeys((".txt", ".md", ".html", ".htm", ".rst", ".tex", ".xml"), read_text),
}
_SUFFIXES = (*_READERS, *ARCHIVE_SUFFIXES)
_KNOWN_SUFFIXES = ", ".join(_SUFFIXES) + "; each also with " + ", ".join(COMPRESSION_SUFFIXES)
_HUB_ID = re.compile(r"(?P<name>[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*)(:(?P<split>[\w.-]+(\[[\d:%]*\])?))?")
_MAGIC = re.compile(r"[*?\[]")
_NOT_DATA = re.compile(r"(?i)[._]|(readme|license|notice|changelog)\b")  # beside the data of a folder, not part of it


class _Source(Protocol):
    def rows(self) -> Iterator[Row | Rejected]: ...

    def digest(self) -> str: ...


def read_rows(uri: str, format: str | None = None) -> Iterator[Row | Rejected]:
    """The rows behind a URI in a fixed order (files by path), each with its place, and the rows that could not be read.

    With the row format `text`, files whose suffix tells nothing are documents. Memory stays bounded whatever a file holds;
    .json files are held one at a time.
    Raises DataError: at the call for data that is missing, and while reading for files that are damaged or empty.
    """
    return _open(uri, format).rows()


def files_of(uri: str, format: str | None = None) -> list[DataFile] | None:
    """The data files behind a URI, in order; None for a source that is read as a whole. Raises as `read_rows` does."""
    source = _open(uri, format)
    return list(source._files) if type(source) is _Files else None


def read_file(file: DataFile, part: BinaryIO | None = None, lines_before: int = 0) -> Iterator[Row | Rejected]:
    """The rows of one file, or of a part of a JSON Lines file that is already open and has so many lines before it."""
    reader = _reader_of(file.name, file.documents)
    if reader is None:
        with failures_named(file):
            yield from read_archive(file, partial(_member_reader, documents=file.documents), _KNOWN_SUFFIXES)
    elif part is not None:
        yield from read_json_lines(part, file.name, lines_before)
    else:
        with failures_named(file), file.open_unpacked() as stream:
            yield from reader(stream, file.name)


def source_digest(uri: str, format: str | None = None) -> str:
    """SHA-256 in hex over the stored bytes behind a URI; names and times do not count. Raises as `read_rows` does."""
    return _open(uri, format).digest()


def _reader_of(name: str, documents: bool) -> Reader | None:
    """What reads a file of this name; None for archives and, unless they are documents, for unknown suffixes."""
    suffix = data_suffix(name)
    return _READERS.get(suffix, read_text if documents and suffix not in ARCHIVE_SUFFIXES else None)


def _member_reader(name: str, documents: bool) -> Reader | None:
    """What reads a member of an archive; None also for what is hidden or stands beside the data."""
    *folders, last = name.split("/")
    hidden = any(folder.startswith(".") and folder != ".." for folder in folders)
    return None if hidden or _NOT_DATA.match(last) else _reader_of(name, documents)


class _Files:
    """Data files, read one after the other."""

    def __init__(self, files: Sequence[DataFile]) -> None:
        for file in files:
            if _reader_of(file.name, file.documents) is None and file.suffix not in ARCHIVE_SUFFIXES:
                as_text = "with `format: text` each such file is one document"
                raise DataError(
                    "a data file has an unknown suffix",
                    got=file.name,
                    expected=_KNOWN_SUFFIXES,
                    hint=(did_you_mean(file.suffix, _SUFFIXES) if file.suffix else None) or as_text,
                    where=file.name,
                )
        self._files = files

    def rows(self) -> Iterator[Row | Rejected]:
        any_row = False
        for file in self._files:
            empty = True
            for row in read_file(file):
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


def _open(uri: str, format: str | None) -> _Source:
    documents = format == "text"
    if uri.startswith("builtin:"):
        return cast(_Source, resolve("builtin data set", uri.removeprefix("builtin:"), where=uri)())
    if uri.startswith("pkg://"):
        return _in_package(uri, documents)
    if "://" in uri:
        return _remote(uri, documents)
    hub = _HUB_ID.fullmatch(uri)
    try:
        path = Path(uri).expanduser()
        if path.exists() or path.is_symlink() or not hub or data_suffix(uri) in _SUFFIXES:
            return _local(path, str(path), documents)
        if not hub["split"] and Path(path.parts[0]).exists():
            raise _missing(path, str(path))
    except PermissionError as error:
        raise no_permission(str(error.filename or uri)) from None
    except (OSError, ValueError, RuntimeError) as error:
        raise DataError("the data cannot be reached", got=str(error), expected="a path or URI", where=uri) from None
    return HubDataSet(hub["name"], hub["split"] or "train")


def _local(path: Path, name: str, documents: bool) -> _Source:
    """A file, folder or glob on this machine; `name` is what the user calls it."""
    name = printable(name)
    if path.is_dir():
        if SavedDataSet.is_at(path):
            return SavedDataSet(path, name)
        inner = sorted(each.name for each in path.iterdir() if not each.is_dir())
        chosen = _one_format(inner, name, documents)
        return _Files([DataFile(str(path / each), f"{name}/{printable(each)}", None, documents) for each in chosen])
    if path.exists() or path.is_symlink():
        return _Files([DataFile(str(path), name, None, documents)])
    fixed = next((at for at, part in enumerate(path.parts) if _MAGIC.search(part)), None)
    if fixed is None:
        raise _missing(path, name)
    base, pattern = Path(*path.parts[:fixed]), "/".join(path.parts[fixed:])
    matches = sorted(base.glob(pattern))
    inner_parts = len(base.parts)
    visible = [each for each in matches if not any(part.startswith(".") for part in each.parts[inner_parts:])]
    files = [each for each in visible if not each.is_dir()]  # links to nowhere and pipes too, so that they are named
    if not files:
        raise _no_match(name, "it matches only folders: add /* to it" if visible else None)
    shown = name.removesuffix(printable(pattern))
    names = (printable("/".join(each.parts[inner_parts:])) for each in files)
    return _Files(
        [DataFile(str(each), shown + inner, None, documents) for each, inner in zip(files, names, strict=True)]
    )


def _one_format(names: Sequence[str], folder: str, documents: bool) -> list[str]:
    """The data files of a folder, which must be of one format: what else lies beside the data is not guessed at."""
    readers = {
        name: "archive" if data_suffix(name) in ARCHIVE_SUFFIXES else _reader_of(name, documents)
        for name in names
        if not _NOT_DATA.match(name)
    }
    data = [name for name, reader in readers.items() if reader is not None]
    if not data:
        raise DataError(
            "a folder has no data files",
            got=", ".join(map(printable, names[:5])) or "no files",
            expected=_KNOWN_SUFFIXES,
            hint=f"for files in folders below it: {folder}/**/*.jsonl",
            where=folder,
        )
    if len({readers[name] for name in data}) > 1:
        suffixes = sorted({data_suffix(name) for name in data})
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


def _no_match(name: str, hint: str | None = None) -> DataError:
    hint = hint or "quote it, so that llmkit and not the shell expands it; ** reaches into folders"
    return DataError("a glob matches nothing", got=name, expected="at least one file", hint=hint, where=name)


def _in_package(uri: str, documents: bool) -> _Source:
    parts = uri.removeprefix("pkg://").split("/")
    fixed = next((at for at, part in enumerate(parts) if at and _MAGIC.search(part)), len(parts))
    if ".." in parts[fixed:]:
        raise DataError("a pkg:// path leads out of its package", got=uri, expected="a path inside the package")
    try:
        base = package_path("pkg://" + "/".join(parts[:fixed]))
    except ArtifactError as error:
        raise DataError(error.what, got=error.got, expected=error.expected, hint=error.hint, where=uri) from None
    return _local(base.joinpath(*parts[fixed:]), uri.rstrip("/"), documents)


def _remote(uri: str, documents: bool) -> _Source:
    """Files behind an fsspec URL. Names shown to people carry no password and no query, which may be a signature."""
    import fsspec.core
    from fsspec.implementations.local import LocalFileSystem

    web = uri.startswith(("http://", "https://"))
    name = printable(re.sub(r"//[^/@]*@", "//", uri.partition("?")[0] if web else uri))
    try:
        filesystem, path = fsspec.core.url_to_fs(uri)
        if isinstance(filesystem, LocalFileSystem):
            return _local(Path(path), name.rstrip("/"), documents)
        if "*" in path or (not web and _MAGIC.search(path)):
            found = sorted(each for each in filesystem.glob(path) if filesystem.isfile(each))
            if not found:
                raise _no_match(name)
            names = (printable(filesystem.unstrip_protocol(each)) for each in found)
            return _Files([DataFile(*each, filesystem, documents) for each in zip(found, names, strict=True)])
        if not filesystem.exists(path):
            raise DataError("the data is missing", got=name, expected="a file, folder or glob that exists", where=name)
        if data_suffix(name) not in _SUFFIXES and filesystem.isdir(path):
            found = [each["name"] for each in filesystem.ls(path, detail=True) if each["type"] != "directory"]
            inner = {PurePosixPath(each).name: each for each in found}
            chosen = _one_format(sorted(inner), name.rstrip("/"), documents)
            names = (f"{name.rstrip('/')}/{printable(each)}" for each in chosen)
            paths = (inner[each] for each in chosen)
            return _Files([DataFile(*each, filesystem, documents) for each in zip(paths, names, strict=True)])
        return _Files([DataFile(path, name, filesystem, documents)])
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
