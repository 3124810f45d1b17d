"""Help answers without the heavy libraries; no test asserts a time."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

HEAVY = ("torch", "transformers", "datasets", "accelerate", "pandas", "pyarrow", "sklearn", "numpy")
PROBE = """
import json, sys
sys.argv = ["llmkit", *sys.argv[1:]]
from llmkit.cli.app import main
try:
    main() if sys.argv[1] != "-" else None
except SystemExit:
    pass
print(json.dumps(sorted(sys.modules)))
"""


def modules_after(*arguments: str) -> set[str]:
    done = subprocess.run([sys.executable, "-c", PROBE, *arguments], capture_output=True, text=True, check=True)
    return set(json.loads(done.stdout.splitlines()[-1]))


@pytest.mark.parametrize(
    "arguments",
    [("-",), ("--help",), ("--version",), ("finetune", "--help"), ("generate", "--help"), ("schema",), ("fintune",)],
    ids=" ".join,
)
def test_nothing_heavy_is_imported_before_a_command_runs(arguments: tuple[str, ...]) -> None:
    found = modules_after(*arguments)
    assert "llmkit.cli.app" in found
    assert not found.intersection(HEAVY)


def test_a_wrong_recipe_is_refused_without_the_heavy_libraries() -> None:
    assert not modules_after("run", "no-such-recipe.yaml").intersection(HEAVY)


def test_python_dash_m_works() -> None:
    done = subprocess.run([sys.executable, "-m", "llmkit", "--help"], capture_output=True, text=True, check=False)
    assert done.returncode == 0
    assert "finetune" in done.stdout
    assert not done.stderr
