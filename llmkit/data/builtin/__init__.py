"""Data sets made from what every machine with Python has: the source and documentation of the standard library."""

from __future__ import annotations

import ast
import hashlib
import io
import os
import sysconfig
import tokenize
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

_LEFT_OUT = {"test", "tests", "idle_test", "site-packages", "dist-packages", "_bundled", "__pycache__", "lib-dynload"}


@dataclass(frozen=True, slots=True)
class Module:
    """One parsed file of the standard library."""

    path: str  # relative to its root, with slashes
    text: str
    tree: ast.Module

    @property
    def name(self) -> str:
        """The name it is imported by."""
        return self.path.removesuffix(".py").removesuffix("/__init__").replace("/", ".")

    @property
    def source(self) -> str:
        """The path as people write it: `Lib/asyncio/tasks.py`."""
        return f"Lib/{self.path}"


def _stdlib_paths() -> Iterator[tuple[str, Path]]:
    """The standard library's source files in order, without tests, installed packages and build leftovers."""
    root = Path(sysconfig.get_path("stdlib"))
    found = []
    for folder, folders, names in os.walk(root):
        folders[:] = [name for name in folders if name not in _LEFT_OUT and name.isidentifier()]
        found += [Path(folder, name) for name in names if name.endswith(".py")]
    yield from sorted((path.relative_to(root).as_posix(), path) for path in found)


def stdlib_digest(taken: str, version: int) -> str:
    """SHA-256 over the standard library's source, what is taken out of it, and the version of how, in hex."""
    sha = hashlib.sha256(f"{taken} version {version}".encode())
    for name, path in _stdlib_paths():
        data = path.read_bytes()
        sha.update(f"\0{name}\0{len(data)}\0".encode())
        sha.update(data)
    return sha.hexdigest()


def stdlib_modules() -> Iterator[Module]:
    """The standard library's modules in order of path; files that do not decode or parse are left out."""
    for name, path in _stdlib_paths():
        data = path.read_bytes()
        try:
            encoding = tokenize.detect_encoding(io.BytesIO(data).readline)[0]
            text = io.TextIOWrapper(io.BytesIO(data), encoding).read()
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                tree = ast.parse(text)
        except (SyntaxError, ValueError, RecursionError):
            continue
        yield Module(name, text, tree)
