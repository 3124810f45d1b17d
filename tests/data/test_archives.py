"""Archives as sources: every kind, in the archive's own order, with nothing unpacked to a path."""

from __future__ import annotations

import bz2
import gzip
import io
import json
import lzma
import tarfile
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import fsspec
import pytest
import zstandard

from llmkit.data.sources import Row, read_rows, source_digest
from llmkit.errors import DataError
from tests.data.zoo import arrow, parquet, tar, zipped

FILES = [(name, json.dumps({"from": name}).encode() + b"\n") for name in ("b.jsonl", "x/a.jsonl", "x/y/c.ndjson")]
PACK: dict[str, Callable[[bytes], bytes]] = {
    "a.tar": lambda archive: archive,
    "a.tar.gz": gzip.compress,
    "a.tgz": gzip.compress,
    "a.tar.xz": lzma.compress,
    "a.TAR.ZST": zstandard.compress,
    "a.tar.bz2": bz2.compress,
}


def put(path: Path, content: bytes) -> str:
    path.write_bytes(content)
    return str(path)


def found(uri: str, format: str | None = None) -> list[tuple[str, Any]]:
    rows = list(read_rows(uri, format))
    assert all(isinstance(row, Row) for row in rows), rows
    return [(str(row.where).removeprefix(uri), row.values) for row in rows if isinstance(row, Row)]


EXPECTED = [(f"!/{name}:1", {"from": name}) for name, _ in FILES]


@pytest.mark.parametrize("name", PACK)
def test_tar(tmp_path: Path, name: str) -> None:
    assert found(put(tmp_path / name, PACK[name](tar(*FILES)))) == EXPECTED


@pytest.mark.parametrize("packed", ["a.zip", "a.zip.gz"])
def test_zip(tmp_path: Path, packed: str) -> None:
    content = zipped(*FILES)
    assert found(put(tmp_path / packed, gzip.compress(content) if packed.endswith("gz") else content)) == EXPECTED


@pytest.mark.parametrize("pack", [tar, zipped])
def test_members_that_are_packed_or_columnar(tmp_path: Path, pack: Callable[..., bytes]) -> None:
    import pyarrow as pa

    rows = [{"n": 1}, {"n": 2}]
    suffix = ".tar" if pack is tar else ".zip"
    lines = b"".join(json.dumps(row).encode() + b"\n" for row in rows)
    for name, content in (
        ("a.jsonl.zst", zstandard.compress(lines)),
        ("a.parquet", parquet(pa.Table.from_pylist(rows))),
        ("a.arrow.gz", gzip.compress(arrow(rows))),
        ("a.csv", b"n\n1\n2\n"),
    ):
        uri = put(tmp_path / f"{name}{suffix}", pack((name, content), (f"2/{name}", content)))
        assert [str(value["n"]) for _, value in found(uri)] == ["1", "2"] * 2
        assert [where for where, _ in found(uri)][2].startswith(f"!/2/{name}:")


def test_what_lies_beside_the_data_is_passed_over(tmp_path: Path) -> None:
    beside = [
        ("README.md", b"x"),
        ("./.cache/a.jsonl", b"x"),
        ("._b.jsonl", b"x"),
        ("make.py", b"x"),
        ("x/_SUCCESS", b""),
    ]
    assert found(put(tmp_path / "a.tar", tar(*beside, *FILES))) == EXPECTED


def test_a_folder_and_a_glob_of_archives(tmp_path: Path) -> None:
    put(tmp_path / "1.tar", tar(("a.jsonl", b'{"n": 1}')))
    put(tmp_path / "2.zip", zipped(("a.csv", b"n\n2\n")))
    for uri in (str(tmp_path), f"{tmp_path}/*"):
        assert [row.where.source for row in read_rows(uri)] == [
            f"{tmp_path}/1.tar!/a.jsonl",
            f"{tmp_path}/2.zip!/a.csv",
        ]


def test_an_archive_behind_a_url() -> None:
    filesystem = fsspec.filesystem("memory")
    filesystem.pipe({"/t/a.tar.gz": gzip.compress(tar(*FILES)), "/t/b.zip": zipped(*FILES)})
    try:
        assert [len(found(f"memory://t/{name}")) for name in ("a.tar.gz", "b.zip")] == [3, 3]
        assert next(read_rows("memory://t/b.zip")).where.source == "memory://t/b.zip!/b.jsonl"
    finally:
        filesystem.rm("/t", recursive=True)


def test_the_digest_is_of_the_archive(tmp_path: Path) -> None:
    uri = put(tmp_path / "a.tar", tar(*FILES))
    digest = source_digest(uri)
    assert source_digest(put(tmp_path / "b.tar", tar(*FILES))) == digest
    assert source_digest(put(tmp_path / "a.tar", tar(*FILES[::-1]))) != digest


def test_an_archive_is_read_as_a_stream(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tempfile, "TemporaryFile", lambda *_, **__: pytest.fail("wrote to disk"))
    whole = gzip.compress(tar(("a.jsonl", b'{"n": 1}\n' * 500_000), ("b.csv", b"n\n1\n")))
    rows = read_rows(put(tmp_path / "a.tar.gz", whole[:-4000]))
    assert isinstance(next(rows), Row)
    with pytest.raises(DataError):
        list(rows)


def test_long_names_and_times_of_every_tar_dialect(tmp_path: Path) -> None:
    name = "/".join(["folder" * 10] * 5) + "/ä.jsonl"
    for dialect in (tarfile.GNU_FORMAT, tarfile.PAX_FORMAT):
        sink = io.BytesIO()
        with tarfile.open(fileobj=sink, mode="w", format=dialect) as archive:
            info = tarfile.TarInfo(name)
            info.size, info.mtime = len(FILES[0][1]), 1.5
            archive.addfile(info, io.BytesIO(FILES[0][1]))
        assert found(put(tmp_path / "a.tar", sink.getvalue())) == [(f"!/{name}:1", {"from": "b.jsonl"})]


def test_a_sparse_file_in_a_tar_is_refused(tmp_path: Path) -> None:
    info = tarfile.TarInfo("a.jsonl")
    info.type = tarfile.GNUTYPE_SPARSE
    block = bytearray(info.tobuf(tarfile.GNU_FORMAT))
    block[483:495] = b"%011o\0" % (1 << 40)  # its size with its holes
    block[148:156] = b"        "
    block[148:156] = b"%06o\0 " % sum(block)
    assert [row.reason for row in read_rows(put(tmp_path / "a.tar", bytes(block) + bytes(1024)))] == [
        "the file is sparse"
    ]  # type: ignore[union-attr]


MANUALS = {"ls.1.gz": gzip.compress(b".TH LS 1\n"), "Foo::Bar.3pm": b".TH FOO 3\n", "NEWS": b"news\n"}


def test_files_of_any_suffix_are_documents_when_the_format_says_text(tmp_path: Path) -> None:
    for name, content in MANUALS.items():
        put(tmp_path / name, content)
    expected = [("Foo::Bar.3pm:1", ".TH FOO 3\n"), ("NEWS:1", "news\n"), ("ls.1.gz:1", ".TH LS 1\n")]
    for uri in (str(tmp_path), f"{tmp_path}/*", f"file://{tmp_path}"):
        rows = [(Path(where).name, row["text"]) for where, row in found(uri, "text")]
        assert rows == expected
        assert source_digest(uri, "text") == source_digest(str(tmp_path), "text")
        with pytest.raises(DataError) as caught:
            read_rows(uri)
        assert "`format: text`" in str(caught.value.hint) or caught.value.what == "a folder has no data files"
    assert [row["text"] for _, row in found(put(tmp_path / "a.tar", tar(*MANUALS.items())), "text")] == [
        ".TH LS 1\n",
        ".TH FOO 3\n",
        "news\n",
    ]


def test_known_suffixes_keep_their_reader_when_the_format_says_text(tmp_path: Path) -> None:
    assert found(put(tmp_path / "a.jsonl", b'{"text": "a"}\n'), "text") == [(":1", {"text": "a"})]
    put(tmp_path / "b.1", b"b")
    with pytest.raises(DataError, match="mixes formats"):
        read_rows(str(tmp_path), "text")


@pytest.mark.parametrize("suffix", [".html", ".htm", ".rst", ".tex", ".xml"])
def test_markup_is_one_document_a_file(tmp_path: Path, suffix: str) -> None:
    assert found(put(tmp_path / f"a{suffix}", b"<p>\n\na</p>\n")) == [(":1", {"text": "<p>\n\na</p>\n"})]
