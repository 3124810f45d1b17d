"""Inputs that are small on disk and large in memory: each is bounded, and named."""

from __future__ import annotations

import gzip
import json
import lzma
import struct
import subprocess
import sys
import tarfile
from collections.abc import Callable
from pathlib import Path

import pytest
import zstandard

from tests.data.zoo import BAD_ARCHIVE, ONE, TWO, Case, header, tar, zipped

MIB = 1 << 20


def packed(head: bytes, middle: bytes, times: int, tail: bytes, compress: Callable[[bytes], bytes]) -> bytes:
    """A file that is small on disk: so many frames of the same."""
    return compress(head) + compress(middle) * times + compress(tail)


def many_spaces(mebibytes: int, compress: Callable[[bytes], bytes]) -> bytes:
    return packed(ONE + b'{"text": "', b" " * 16 * MIB, mebibytes // 16, b'"}\n' + TWO, compress)


def big_zip(members: int = 24) -> bytes:
    """One member of 60 MiB, so many times under other names."""
    one = zipped(("00.jsonl", ONE + b" " * 60 * MIB))
    directory, end = one.index(b"PK\1\2"), one.index(b"PK\5\6")
    names = [b"%02d.jsonl" % number for number in range(members)]
    files = b"".join(one[:directory].replace(b"00.jsonl", name) for name in names)
    entries = b"".join(
        one[directory : directory + 42] + struct.pack("<I", number * directory) + name
        for number, name in enumerate(names)
    )
    return (
        files
        + entries
        + struct.pack("<4s4H2IH", one[end : end + 4], 0, 0, members, members, len(entries), len(files), 0)
    )


def long_name_in_tar() -> bytes:
    """A header that says that the name which follows is of a gigabyte, and the gigabyte."""
    name = header("././@LongLink", tarfile.GNUTYPE_LONGNAME, 1 << 30)
    return packed(tar(("a.jsonl", ONE), end=False) + name, b"x" * 16 * MIB, 64, bytes(1024), gzip.compress)


BOMB = "unpacks to more than 1000 times its size"
BIG = [
    Case(
        "a line of 208 MB",
        lambda f: many_spaces(208, gzip.compress),
        "a.jsonl.gz",
        good=2,
        refused={"2": "longer than 64 MiB"},
    ),
    Case(
        "a document of 208 MB",
        lambda f: many_spaces(208, gzip.compress),
        "a.txt.gz",
        refused={"1": "longer than 64 MiB"},
    ),
    Case(
        "a quote over 208 MB",
        lambda f: packed(b'text\none\n"', (b"x" * 127 + b"\n") * (MIB >> 3), 13, b"", gzip.compress),
        "a.csv.gz",
        good=1,
        error="a record of a CSV file is longer than 16 MiB",
        at="a.csv.gz:3",
    ),
    Case(
        "quotes over 40 MB",
        lambda f: packed(b"text\none\n", b'x","\n' * 2 * MIB, 4, b"", gzip.compress),
        "a.csv.gz",
        good=1,
        error="a record of a CSV file is longer than 16 MiB",
        at="a.csv.gz:3",
    ),
    Case(
        "a header of many columns",
        lambda f: gzip.compress(b",".join(b"%d" % n for n in range(300_000)) + b"\n1\n"),
        "a.csv.gz",
        refused={"2": "the row has 1 fields, the header has 300000"},
    ),
    Case("a bomb of gzip", lambda f: many_spaces(1200, gzip.compress), "a.jsonl.gz", good=1, error=BOMB),
    Case(
        "a bomb of gzip in JSON",
        lambda f: many_spaces(1200, gzip.compress),
        "a.json.gz",
        error="a JSON file does not parse",
        at="a.json.gz:1",
    ),
    Case("a bomb of xz", lambda f: many_spaces(1200, lzma.compress), "a.jsonl.xz", good=1, error=BOMB),
    Case("a bomb of Zstandard", lambda f: many_spaces(1200, zstandard.compress), "a.jsonl.zst", good=1, error=BOMB),
    Case("a bomb of zip", lambda f: big_zip(), "a.zip", good=17, error=BOMB),
    Case(
        "a bomb in a tar", lambda f: tar(("a.jsonl.gz", many_spaces(1200, gzip.compress))), "a.tar", good=1, error=BOMB
    ),
    Case("a name of a gigabyte in a tar", lambda f: long_name_in_tar(), "a.tar.gz", good=1, error=BAD_ARCHIVE),
]
PEAK_MIB = 400
READ = """
import json, sys
from llmkit.data.sources import Rejected, read_rows
from llmkit.errors import DataError
good, refused, error = 0, [], None
try:
    for row in read_rows(sys.argv[1]):
        if isinstance(row, Rejected):
            refused.append([str(row.where), row.reason])
        else:
            good += 1
except DataError as caught:
    error = [caught.what, caught.where]
peak = next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("VmHWM"))  # KiB
print(json.dumps([good, refused, error, peak]))
"""


@pytest.mark.parametrize("case", BIG, ids=str)
def test_bombs(case: Case, tmp_path: Path) -> None:
    uri = case.uri(tmp_path)
    assert Path(uri).stat().st_size < 4 * MIB
    result = subprocess.run([sys.executable, "-c", READ, uri], capture_output=True, text=True, timeout=600)
    assert result.returncode == 0, result.stderr
    good, refused, error, peak = json.loads(result.stdout)
    assert peak >> 10 < (PEAK_MIB if ".json." not in case.file else 1500)
    assert good >= case.good if case.error else good == case.good
    assert len(refused) == len(case.refused)
    for (where, reason), (place, expected) in zip(refused, case.refused.items(), strict=True):
        assert where == f"{uri}:{place}"
        assert expected in reason
    if case.error is None:
        assert error is None
    else:
        assert case.error in error[0]
        assert error[1] == str(tmp_path / (case.at or case.file))
