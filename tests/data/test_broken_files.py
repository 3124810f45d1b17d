"""A zoo of broken files, archives and paths: each ends in a named refusal or a clear error, and the good rows are kept."""

from __future__ import annotations

import bz2
import gzip
import lzma
import os
import tarfile
import zipfile
from pathlib import Path

import pyarrow as pa
import pytest
import zstandard

from llmkit.data.sources import read_rows, source_digest
from llmkit.errors import DataError
from tests.data.zoo import (
    BAD_ARCHIVE,
    CORRUPT,
    MANY,
    NO_ROWS,
    ONE,
    ROWS,
    TWO,
    Case,
    arrow,
    changed,
    check,
    header,
    parquet,
    special,
    tar,
    zip_link,
    zipped,
)

TABLE = parquet(pa.Table.from_pylist(ROWS))
BAD_UTF8 = pa.table({"text": pa.array([b"a", b"\xff", b"c"]).view(pa.string())})
ODD_TIMES = pa.table({"text": ["a", "b"], "at": pa.array([0, 1 << 50], pa.int64()).cast(pa.timestamp("s"))})
COLUMNAR = [
    Case("parquet cut short", TABLE[:-100], "a.parquet", error="a damaged Parquet file"),
    Case("parquet cut to its head", TABLE[:6], "a.parquet", error="a damaged Parquet file"),
    Case("parquet with wrong magic", b"PAR2" + TABLE[4:-4] + b"PAR2", "a.parquet", error="a damaged Parquet file"),
    Case("parquet with a hole", TABLE[:50] + bytes(2000) + TABLE[2050:], "a.parquet", error="a damaged Parquet file"),
    Case("parquet that is empty", b"", "a.parquet", error=NO_ROWS),
    Case("parquet without rows", parquet(pa.table({"text": pa.array([], pa.string())})), "a.parquet", error=NO_ROWS),
    Case(
        "parquet with bytes for text",
        parquet(pa.table({"text": [b"a"]})),
        "a.parquet",
        refused={"1": "column `text` is bytes, not text"},
    ),
    Case("parquet that is latin-1", parquet(BAD_UTF8), "a.parquet", good=2, refused={"2": "byte 0xff at offset 0"}),
    Case(
        "parquet with times past the calendar",
        parquet(ODD_TIMES),
        "a.parquet",
        good=1,
        refused={"2": "a value cannot be read"},
    ),
    Case(
        "parquet with one name twice",
        parquet(pa.Table.from_arrays([["a"], ["b"]], ["text", "text"])),
        "a.parquet",
        error="two columns of a Parquet file have one name",
    ),
    Case("arrow cut short", arrow(ROWS)[:-200], "a.arrow", error="a damaged Arrow file"),
    Case("arrow that is nonsense", b"nonsense" * 100, "a.arrow", error="a damaged Arrow file"),
]
PACKED = [
    Case("gzip cut short", gzip.compress(MANY)[:-500], "a.jsonl.gz", good=1, error=CORRUPT),
    Case("gzip without its check", gzip.compress(MANY)[:-4], "a.jsonl.gz", good=1999, error=CORRUPT),
    Case("gzip with garbage behind", gzip.compress(MANY) + b"garbage", "a.jsonl.gz", good=2000, error=CORRUPT),
    Case("gzip with zeros behind", gzip.compress(ONE) + bytes(512), "a.jsonl.gz", good=1),
    Case("no gzip at all", MANY, "a.jsonl.gz", error=CORRUPT),
    Case("zstd cut short", zstandard.compress(MANY)[:-50], "a.jsonl.zst", error=CORRUPT),
    Case("zstd with garbage behind", zstandard.compress(MANY) + b"garbage", "a.jsonl.zst", good=2000, error=CORRUPT),
    Case(
        "xz corrupt",
        changed(lzma.compress(MANY), lzma.compress(MANY)[900:910], b"0123456789"),
        "a.jsonl.xz",
        error=CORRUPT,
    ),
    Case("xz with garbage behind", lzma.compress(MANY) + b"garbage", "a.jsonl.xz", good=2000, error=CORRUPT),
    Case("xz with zeros behind", lzma.compress(ONE) + bytes(4), "a.jsonl.xz", good=1),
    Case("bzip2 cut short", bz2.compress(MANY)[:-10], "a.jsonl.bz2", error=CORRUPT),
    Case("bzip2 with garbage behind", bz2.compress(MANY) + b"garbage", "a.jsonl.bz2", good=2000, error=CORRUPT),
    Case("packed parquet cut short", gzip.compress(TABLE)[:-100], "a.parquet.gz", error=CORRUPT),
    Case("text packed and cut short", gzip.compress(MANY)[:-500], "a.txt.gz", error=CORRUPT),
]
TWO_FILES = tar(("a.jsonl", MANY), ("b.jsonl", MANY))
TWO_LINES = tar(("a.jsonl", ONE), ("b.jsonl", TWO))
CRC = zipped(("a.jsonl", MANY * 2), compression=zipfile.ZIP_STORED)
ARCHIVES = [
    Case("tar cut in a file", TWO_FILES[:80_000], "a.tar", good=2000, error=BAD_ARCHIVE, at="a.tar!/b.jsonl"),
    Case("tar cut in a header", TWO_LINES[:1200], "a.tar", good=1, error=BAD_ARCHIVE),
    Case("tar cut between files", tar(("a.jsonl", ONE), end=False), "a.tar", good=1, error=BAD_ARCHIVE),
    Case("tar with a broken header", changed(TWO_LINES, b"b.jsonl", b"c.jsonl"), "a.tar", good=1, error=BAD_ARCHIVE),
    Case("tar with something behind", tar(("a.jsonl", ONE)) + b"x", "a.tar", good=1, error=BAD_ARCHIVE),
    Case(
        "tar whose header asks for gigabytes",
        header("x", tarfile.GNUTYPE_LONGNAME, 1 << 33) + TWO_LINES,
        "a.tar",
        error=BAD_ARCHIVE,
    ),
    Case(
        "tar with a file of exabytes",
        header("a.jsonl", tarfile.REGTYPE, 1 << 62) + ONE * 4096,
        "a.tar",
        good=1,
        error=BAD_ARCHIVE,
        at="a.tar!/a.jsonl",
    ),
    Case("tar that skips exabytes", header("a.py", tarfile.REGTYPE, 1 << 80) + TWO_LINES, "a.tar", error=BAD_ARCHIVE),
    Case(
        "tar that goes backwards",
        header("a.jsonl", tarfile.REGTYPE, -1024) + TWO_LINES,
        "a.tar",
        refused={"a.tar!/a.jsonl:1": "no rows"},
        error=BAD_ARCHIVE,
    ),
    Case(
        "tar with headers upon headers",
        header("x", tarfile.GNUTYPE_LONGNAME, 0) * 1800 + TWO_LINES,
        "a.tar",
        error=BAD_ARCHIVE,
    ),
    Case("tar that is nonsense", b"nonsense" * 100, "a.tar", error=BAD_ARCHIVE),
    Case("tar.gz cut short", gzip.compress(TWO_FILES)[:-500], "a.tar.gz", good=2000, error=CORRUPT),
    Case(
        "tar with a corrupt file",
        tar(("a.jsonl.gz", gzip.compress(MANY)[:-500]), ("b.jsonl", ONE)),
        "a.tar",
        good=1,
        error=CORRUPT,
        at="a.tar!/a.jsonl.gz",
    ),
    Case(
        "tar with paths that lead out",
        tar(("../a.jsonl", ONE), ("x/../../b.jsonl", ONE), ("/c.jsonl", TWO)),
        "a.tar",
        good=1,
        refused={"a.tar!/../a.jsonl:1": "leads out", "a.tar!/x/../../b.jsonl:1": "leads out"},
    ),
    Case(
        "tar with links and devices",
        tar(
            ("a.jsonl", ONE),
            special("b.jsonl", tarfile.SYMTYPE, "/etc/passwd"),
            special("c.jsonl", tarfile.LNKTYPE, "a.jsonl"),
            special("d.jsonl", tarfile.CHRTYPE),
            special("e", tarfile.FIFOTYPE),
        ),
        "a.tar",
        good=1,
        refused={"a.tar!/b.jsonl:1": "is a link", "a.tar!/c.jsonl:1": "is a link", "a.tar!/d.jsonl:1": "a device"},
    ),
    Case(
        "tar with formats mixed",
        tar(("a.jsonl", ONE), ("b.csv", b"text\na\n")),
        "a.tar",
        good=1,
        error="an archive mixes formats",
        at="a.tar!/b.csv",
    ),
    Case(
        "tar in a tar",
        tar(("a.jsonl", ONE), ("b.tar.xz", b"")),
        "a.tar",
        good=1,
        error="an archive lies inside an archive",
        at="a.tar!/b.tar.xz",
    ),
    Case(
        "tar without data",
        tar(("a.py", b""), ("README.md", b"a"), (".x/a.jsonl", ONE)),
        "a.tar",
        error="an archive has no data files",
    ),
    Case(
        "tar with an empty file",
        tar(("a.jsonl", b""), ("b.jsonl", ONE)),
        "a.tar",
        good=1,
        refused={"a.tar!/a.jsonl:1": "no rows"},
    ),
    Case("tar with nothing in its files", tar(("a.jsonl", b"")), "a.tar", refused={"a.tar!/a.jsonl:1": "no rows"}),
    Case("zip cut short", zipped(("a.jsonl", MANY))[:-500], "a.zip", error=BAD_ARCHIVE),
    Case(
        "zip with a wrong check",
        changed(CRC, b'row 1999"', b'row 2999"'),
        "a.zip",
        good=1,
        error=BAD_ARCHIVE,
        at="a.zip!/a.jsonl",
    ),
    Case(
        "zip with a path that leads out",
        zipped(("../a.jsonl", ONE), ("b.jsonl", ONE)),
        "a.zip",
        good=1,
        refused={"a.zip!/../a.jsonl:1": "leads out"},
    ),
    Case(
        "zip with a link",
        zip_link("b.jsonl", "/etc/passwd"),
        "a.zip",
        good=1,
        refused={"a.zip!/b.jsonl:1": "is a link"},
    ),
    Case(
        "zip that is encrypted",
        changed(zipped(("a.jsonl", ONE)), b"\x14\0\0\0", b"\x14\0\1\0"),
        "a.zip",
        refused={"a.zip!/a.jsonl:1": "is encrypted"},
    ),
    Case("zip in a zip", zipped(("a.zip", b"")), "a.zip", error="an archive lies inside an archive", at="a.zip!/a.zip"),
    Case("zip of nothing", zipped(), "a.zip", error="an archive has no data files"),
    Case("zip that is nonsense", b"nonsense" * 100, "a.zip", error=BAD_ARCHIVE),
]


def loop(folder: Path) -> str:
    (folder / "a.jsonl").symlink_to(folder / "b.jsonl")
    (folder / "b.jsonl").symlink_to(folder / "a.jsonl")
    return str(folder / "a.jsonl")


def loop_of_folders(folder: Path) -> str:
    (folder / "inner").mkdir()
    (folder / "inner" / "a.jsonl").write_bytes(ONE)
    (folder / "inner" / "again").symlink_to(folder)
    return f"{folder}/**/*.jsonl"


def loop_of_folders_by_url(folder: Path) -> str:
    return "file://" + loop_of_folders(folder)


def link_to_nowhere(folder: Path) -> str:
    (folder / "a.jsonl").write_bytes(ONE)
    (folder / "b.jsonl").symlink_to(folder / "gone.jsonl")
    return str(folder)


def folder_called_like_data(folder: Path) -> str:
    (folder / "x.jsonl").mkdir()
    return str(folder / "x.jsonl")


def glob_of_folders(folder: Path) -> str:
    (folder / "x.jsonl").mkdir()
    return f"{folder}/*.jsonl"


def pipe(folder: Path) -> str:
    os.mkfifo(folder / "a.jsonl")
    return str(folder / "a.jsonl")


def pipe_by_url(folder: Path) -> str:
    return "file://" + pipe(folder)


def pipe_in_a_folder(folder: Path) -> str:
    pipe(folder)
    return str(folder)


def device(folder: Path) -> str:
    (folder / "a.jsonl").symlink_to("/dev/zero")
    return str(folder / "a.jsonl")


def mixed_folder(folder: Path) -> str:
    (folder / "a.jsonl").write_bytes(ONE)
    (folder / "b.tar").write_bytes(tar(("a.jsonl", ONE)))
    return str(folder)


def no_match(folder: Path) -> str:
    return f"{folder}/*.jsonl"


def nul_in_the_path(folder: Path) -> str:
    return f"{folder}/a\0.jsonl"


def name_that_is_not_utf8(folder: Path) -> str:
    Path(os.fsdecode(os.fsencode(folder) + b"/a\xff.jsonl")).write_bytes(b"x\n" + ONE)
    return str(folder)


FILES = [
    Case("a loop of links", loop, error="a data file cannot be read", at="a.jsonl"),
    Case("a loop of folders", loop_of_folders, good=1),
    Case("a loop of folders behind a URL", loop_of_folders_by_url, good=1),
    Case("a link to nowhere", link_to_nowhere, good=1, error="a data file is missing", at="b.jsonl"),
    Case("a folder called like a file", folder_called_like_data, error="a folder has no data files", at="x.jsonl"),
    Case("a glob that matches a folder", glob_of_folders, error="a glob matches nothing", at="*.jsonl"),
    Case("a pipe", pipe, error="a data file is not a regular file", at="a.jsonl"),
    Case("a pipe behind a URL", pipe_by_url, error="a data file is not a regular file", at="a.jsonl"),
    Case("a pipe in a folder", pipe_in_a_folder, error="a data file is not a regular file", at="a.jsonl"),
    Case("a device", device, error="a data file is not a regular file", at="a.jsonl"),
    Case("a folder with formats mixed", mixed_folder, error="a folder mixes formats", at=""),
    Case("a glob without a match", no_match, error="a glob matches nothing", at="*.jsonl"),
    Case("a NUL in the path", nul_in_the_path, error="the data is missing", at="a\\x00.jsonl"),
    Case("a name that is not UTF-8", name_that_is_not_utf8, good=1, refused={"a\\udcff.jsonl:1": "Expecting value"}),
    Case("an unknown suffix", ONE, "a.jsnl", error="a data file has an unknown suffix"),
]


@pytest.mark.parametrize("case", [*COLUMNAR, *PACKED, *ARCHIVES, *FILES], ids=str)
def test_broken_files(case: Case, tmp_path: Path) -> None:
    check(case, tmp_path)


def test_what_is_appended_while_a_file_is_read_is_not_read(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(MANY * 200)
    read = 0
    with path.open("ab") as file:
        for _ in read_rows(str(path)):
            read += 1
            if read % 100 == 0:
                file.write(MANY)
                file.flush()
    assert read == 200 * len(ROWS)


def test_a_digest_of_what_cannot_be_read_is_an_error(tmp_path: Path) -> None:
    for uri in (loop(tmp_path), pipe_in_a_folder(tmp_path / "x") if (tmp_path / "x").mkdir() is None else ""):
        with pytest.raises(DataError):
            source_digest(uri)
