"""Optimizers that live in a package which llmkit does not install."""

from __future__ import annotations

import importlib
import importlib.metadata
import re
from typing import Any

from llmkit.errors import RecipeError


def need(optimizer: str, module: str, package: str, since: tuple[int, int]) -> Any:
    """The module of an optional package. Raises RecipeError when it is not installed, or older than `since`."""
    minimum = ".".join(map(str, since))
    hint = f"pip install '{package}>={minimum}'"
    try:
        found = importlib.metadata.version(package)
        if tuple(map(int, re.findall(r"\d+", found)[:2])) >= since:
            return importlib.import_module(module)
    except ImportError as error:  # PackageNotFoundError is one
        found = "not installed" if isinstance(error, importlib.metadata.PackageNotFoundError) else str(error)
    raise RecipeError(
        f"`{optimizer}` needs the package {package}",
        got=found,
        expected=f"{package} {minimum} or newer",
        hint=hint,
        where="optimizer",
    )
