"""Rows out of Parquet and Arrow files, batch by batch, and out of data sets that the `datasets` library holds."""

from __future__ import annotations

import io
import tempfile
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, cast

from llmkit.data.readers import Rejected, Row, Where, shown
from llmkit.errors import DataError, ResourceError
from llmkit.files import digest_files, digest_json

_BATCH_ROWS = 1024
_BATCH_BYTES = 32 << 20
_COPY_BYTES = 1 << 20
_ARROW_FILE_MAGIC = b"ARROW1"


def read_parquet(file: BinaryIO, source: str) -> Iterator[Row | Rejected]:
    """The rows of a Parquet file; a row's line is its number. Raises DataError when the file is damaged."""
    import pyarrow.parquet

    with _damage_named("Parquet", source), seekable(file) as stored:
        if stored.seek(0, io.SEEK_END) == 0:
            return
        stored.seek(0)
        parquet = pyarrow.parquet.ParquetFile(stored)
        _check_names(parquet.schema_arrow, "Parquet", source)
        yield from _batch_rows(parquet.iter_batches(batch_size=_rows_at_once(parquet.metadata)), source)


def _rows_at_once(metadata: Any) -> int:
    """So many rows that a batch of the largest row group stays small, even where each row is a book."""
    groups = [metadata.row_group(number) for number in range(metadata.num_row_groups)]
    row_bytes = max((group.total_byte_size // max(group.num_rows, 1) for group in groups), default=0)
    return min(max(_BATCH_BYTES // max(row_bytes, 1), 1), _BATCH_ROWS)


def read_arrow(file: BinaryIO, source: str) -> Iterator[Row | Rejected]:
    """The rows of an Arrow IPC file or stream; a row's line is its number. Raises DataError when it is damaged."""
    import pyarrow.ipc

    with _damage_named("Arrow", source), seekable(file) as stored:
        magic = stored.read(len(_ARROW_FILE_MAGIC))
        stored.seek(0)
        if magic == _ARROW_FILE_MAGIC:
            reader = pyarrow.ipc.open_file(stored)
            _check_names(reader.schema, "Arrow", source)
            yield from _batch_rows((reader.get_batch(index) for index in range(reader.num_record_batches)), source)
        elif magic:
            stream = pyarrow.ipc.open_stream(stored)
            _check_names(stream.schema, "Arrow", source)
            yield from _batch_rows(stream, source)


def _check_names(schema: Any, format_name: str, source: str) -> None:
    repeated = next((name for name, count in Counter(schema.names).items() if count > 1), None)
    if repeated is not None:
        raise DataError(
            f"two columns of {'an' if format_name == 'Arrow' else 'a'} {format_name} file have one name",
            got=shown(repeated),
            expected="a name for each column",
            where=source,
        )


@contextmanager
def seekable(file: BinaryIO) -> Iterator[BinaryIO]:
    """The file itself, or a nameless copy on disk of one that can only be read forwards.

    Raises ResourceError when there is no room for it.
    """
    if file.seekable():
        yield file
        return
    with tempfile.TemporaryFile() as copy:
        while chunk := file.read(_COPY_BYTES):
            try:
                copy.write(chunk)
            except OSError as error:
                raise ResourceError(
                    "there is no room to unpack a data file",
                    got=str(error),
                    expected=f"room in {tempfile.gettempdir()}",
                    hint="make room there, or set TMPDIR to a folder that has some",
                ) from error
        copy.seek(0)
        yield cast(BinaryIO, copy)


@contextmanager
def _damage_named(format_name: str, source: str) -> Iterator[None]:
    import pyarrow

    try:
        yield
    except (pyarrow.ArrowException, OSError) as error:
        if isinstance(error, FileNotFoundError | PermissionError):
            raise
        raise DataError(
            f"a damaged {format_name} file",
            got=str(error).splitlines()[0] if str(error) else type(error).__name__,
            expected=f"a whole {format_name} file",
            hint="copy or download it again",
            where=source,
        ) from error


def _batch_rows(batches: Any, source: str) -> Iterator[Row | Rejected]:
    number = 0
    for batch in batches:
        try:
            values = batch.to_pylist()
        except (ValueError, OverflowError):
            yield from _rows_one_by_one(batch, source, number)
        else:
            yield from (Row(value, Where(source, number + index)) for index, value in enumerate(values, 1))
        number += batch.num_rows


def _rows_one_by_one(batch: Any, source: str, before: int) -> Iterator[Row | Rejected]:
    """The rows of a batch in which one has a value that Python cannot hold: bad UTF-8, or a date of the year 200,000."""
    for index in range(batch.num_rows):
        where = Where(source, before + index + 1)
        try:
            yield Row(batch.slice(index, 1).to_pylist()[0], where)
        except UnicodeDecodeError as error:
            yield Rejected(f"not valid UTF-8: byte 0x{error.object[error.start]:02x} at offset {error.start}", where)
        except (ValueError, OverflowError) as error:
            yield Rejected(f"a value cannot be read: {shown(error)}", where)


def _dataset_rows(dataset: Any, source: str) -> Iterator[Row]:
    """Rows of a loaded data set. Class labels become their names, and the label -1, which means none, becomes null."""
    classes = {name: each.names for name, each in dataset.features.items() if hasattr(each, "int2str")}
    number = 0
    for batch in dataset.iter(batch_size=_BATCH_ROWS):
        for values in zip(*batch.values(), strict=True):
            number += 1
            row = dict(zip(batch, values, strict=True))
            for name, known in classes.items():
                if isinstance(row[name], int):
                    row[name] = known[row[name]] if row[name] >= 0 else None
            yield Row(row, Where(source, number))


def _rows_or_error(dataset: Any, source: str) -> Iterator[Row]:
    rows = _dataset_rows(dataset, source)
    first = next(rows, None)
    if first is None:
        raise DataError("the data has no rows", got=source, expected="at least one row", where=source)
    yield first
    yield from rows


@dataclass(frozen=True)
class SavedDataSet:
    """A folder that `datasets.save_to_disk` wrote: one data set, or several splits, of which `train` is read."""

    folder: Path
    name: str

    @staticmethod
    def is_at(folder: Path) -> bool:
        """Whether a folder holds a saved data set."""
        return (folder / "dataset_dict.json").is_file() or (folder / "state.json").is_file()

    def _split(self) -> tuple[Path, str]:
        if not (self.folder / "dataset_dict.json").is_file():
            return self.folder, self.name
        splits = sorted(path.name for path in self.folder.iterdir() if (path / "state.json").is_file())
        if "train" not in splits:
            raise DataError(
                "a saved data set has no split `train`",
                got=", ".join(splits) or "no split",
                hint=f"name one: {self.name}/{splits[0]}" if splits else "save it again",
                where=self.name,
            )
        return self.folder / "train", f"{self.name}/train"

    def rows(self) -> Iterator[Row | Rejected]:
        """The rows in order. Raises DataError when the folder is damaged or has no rows."""
        import datasets

        folder, name = self._split()
        try:
            dataset = datasets.load_from_disk(str(folder))
        except Exception as error:  # whatever the library meets in the folder
            got = f"{type(error).__name__}: {error}"
            expected = "a folder from save_to_disk with at least one row"
            raise DataError(
                "a saved data set cannot be read", got=got, expected=expected, hint="save it again", where=name
            ) from error
        return _rows_or_error(dataset, name)

    def digest(self) -> str:
        """SHA-256 over the Arrow files."""
        return digest_files(sorted(self._split()[0].glob("*.arrow")))


@dataclass(frozen=True)
class HubDataSet:
    """A data set of the Hugging Face hub; code that it may carry is never run."""

    name: str
    split: str

    def _load(self) -> Any:
        import datasets

        try:
            return datasets.load_dataset(self.name, split=self.split)
        except Exception as error:  # whatever the library and the network raise
            raise DataError(
                f"the hub data set `{self.name}` cannot be loaded",
                got=f"{type(error).__name__}: {error}",
                expected="a local path, or the id owner/name or owner/name:split of a data set on the hub",
                hint="check the spelling, the split and the network (and HF_TOKEN if it is private)",
                where=f"{self.name}:{self.split}",
            ) from error

    def rows(self) -> Iterator[Row | Rejected]:
        """The rows in order. Raises DataError when the data set cannot be loaded or has no rows."""
        return _rows_or_error(self._load(), f"{self.name}:{self.split}")

    def digest(self) -> str:
        """SHA-256 of the library's fingerprint, which counts the commit, the configuration and the split."""
        return digest_json(["hub", self.split, self._load()._fingerprint])
