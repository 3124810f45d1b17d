"""A module imports only from lower floors, and siblings on floors 2 and 3 do not import each other."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

import llmkit
from llmkit import catalog

PACKAGE = Path(llmkit.__file__).parent
FLOORS = {
    **dict.fromkeys(("errors", "catalog", "files"), 0),
    "recipe": 1,
    **dict.fromkeys(("run", "data", "model", "optim", "metrics"), 2),
    **dict.fromkeys(("tasks", "formats", "train"), 3),
    "stages": 4,
    **dict.fromkeys(("report", "launch", "cli"), 5),
    "__main__": 6,
}


def modules() -> list[Path]:
    return sorted(PACKAGE.rglob("*.py"))


def part_of(path: Path) -> str:
    """The floor's name for a file: its first folder, or its own name at the top."""
    return path.relative_to(PACKAGE).with_suffix("").parts[0]


def imported_parts(path: Path) -> set[str]:
    """The parts of llmkit that a file imports, wherever in it the import stands."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}:{node.lineno}: relative import"
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        elif isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        else:
            continue
        found |= {name.split(".")[1] for name in names if name.startswith("llmkit.")}
    return found - {"__version__"}


def breaches(path: Path) -> list[str]:
    own = part_of(path)
    return [
        f"{path.relative_to(PACKAGE)} imports {other}"
        for other in sorted(imported_parts(path) - {own})
        if FLOORS[other] > FLOORS[own] or (FLOORS[other] == FLOORS[own] and FLOORS[own] in (1, 2, 3, 4))
    ]


def test_every_part_of_the_package_has_a_floor() -> None:
    assert {part_of(path) for path in modules()} - {"__init__"} <= set(FLOORS)


def test_no_module_imports_from_above_or_from_a_sibling() -> None:
    found = [breach for path in modules() if part_of(path) != "__init__" for breach in breaches(path)]
    assert not found, "\n".join(found)


@pytest.mark.parametrize(
    ("place", "line", "breach"),
    [
        ("data/x.py", "from llmkit.model.loading import load_model", True),
        ("data/x.py", "def f():\n    import llmkit.run.log", True),
        ("model/x.py", "from llmkit import data", True),
        ("tasks/x.py", "from llmkit.train import step", True),
        ("recipe/x.py", "from llmkit.run.log import MetricsLog", True),
        ("errors.py", "from llmkit.recipe.schema import Recipe", True),
        ("train/x.py", "from llmkit.data.corpus import Corpus", False),
        ("cli/x.py", "from llmkit.stages.base import Stage", False),
        ("data/x.py", "from llmkit.data.rows import convert", False),
    ],
)
def test_the_check_sees_a_breach(
    place: str, line: str, breach: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(globals(), "PACKAGE", tmp_path)
    path = tmp_path / place
    path.parent.mkdir(exist_ok=True)
    path.write_text(line)
    assert bool(breaches(path)) is breach


@pytest.mark.parametrize(
    ("group", "name"), [(group, name) for group, entries in catalog.CATALOG.items() for name in entries]
)
def test_every_name_of_the_catalogue_resolves(group: str, name: str) -> None:
    assert callable(catalog.resolve(group, name)) or group == "stage"
