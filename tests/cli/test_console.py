"""What is printed is what was given: no codes of a terminal's own in names and data."""

from __future__ import annotations

from pathlib import Path

from conftest import Cli


def test_colons_and_brackets_in_names_are_no_codes(cli: Cli, tmp_path: Path) -> None:
    name = f"{tmp_path}/rows:heart:[bold].jsonl"
    done = cli("finetune", "-m", "m", "-d", name, "-o", tmp_path / "run")
    assert done.code == 3
    assert name in "".join(done.err.split()), done.err
