"""The user's own code, as `path.py:name`: loaded from its file, called, and its failures told with file and line."""

from __future__ import annotations

import importlib.util
import inspect
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from types import ModuleType, TracebackType
from typing import Any

from llmkit.data.rows import from_messages, from_text, from_text_label, from_text_number
from llmkit.errors import DataError, LlmkitError, RecipeError, did_you_mean


class OwnCode:
    """A function or class of the user's, `found` in a file that is loaded afresh each time.

    Raises RecipeError when the file or the name in it is missing, and DataError when the file's own code fails.
    """

    def __init__(self, group: str, name: str, where: str) -> None:
        self.called = f"the {group} `{name}`"
        self.path = self.path_of(name)
        attribute = name.rpartition(":")[2]
        if not self.path.is_file():
            raise RecipeError(f"{self.called} is not there", got="no such file", where=where)
        module = self._load()
        public = [key for key, value in vars(module).items() if callable(value) and not key.startswith("_")]
        if attribute not in vars(module) or not callable(vars(module)[attribute]):
            expected = "one of " + ", ".join(public) if public else "a function or class"
            hint = did_you_mean(attribute, public)
            raise RecipeError(f"{self.called} is not there", got=attribute, expected=expected, hint=hint, where=where)
        self.found: Callable[..., Any] = vars(module)[attribute]

    def require_inputs(self, count: int, where: str) -> None:
        """Raises RecipeError when the function cannot be called with so many inputs."""
        try:
            inspect.signature(self.found).bind(*[None] * count)
        except ValueError:  # some that are built in do not tell
            return
        except TypeError as error:
            raise RecipeError(f"{self.called} cannot take {count} inputs", got=str(error), where=where) from None

    @staticmethod
    def path_of(name: str) -> Path:
        """The file of `path.py:name`, from the working directory."""
        return Path(name.rpartition(":")[0])

    def made_with(self, options: Mapping[str, Any]) -> OwnCode:
        """With an instance in place of the class; raises ValueError for options that the class finds wrong."""
        if isinstance(self.found, type):
            try:
                self.found = self.found(**options)
            except ValueError:
                raise
            except Exception as error:
                raise self._failure(error) from None
            if not callable(self.found):
                raise ValueError("the class has no `__call__`")
        return self

    def __call__(self, *inputs: Any) -> Any:
        """What the user's code gives. Raises DataError, with the line that failed, when it raises."""
        try:
            return self.found(*inputs)
        except LlmkitError:
            raise
        except Exception as error:
            raise self._failure(error) from None

    def checked_row(self, result: Any, like: Mapping[str, Any], expected: str) -> dict[str, Any]:
        """A row that the user's code gave back for another one. Raises DataError when it is not such a row."""
        if not isinstance(result, dict):
            raise self.wrong(_kind(result), expected)
        checks = {"messages": from_messages, "label": from_text_label, "number": from_text_number}
        check = next((check for column, check in checks.items() if column in like), from_text)
        try:
            return check(result)
        except ValueError as error:
            raise self.wrong(f"a row that cannot be used: {error}", expected) from None

    def wrong(self, got: str, expected: str) -> DataError:
        """The error for an answer that cannot be used."""
        function = self.found if inspect.isroutine(self.found) else vars(type(self.found)).get("__call__")
        line = getattr(getattr(inspect.unwrap(function) if function else None, "__code__", None), "co_firstlineno", 1)
        return DataError(f"{self.called} gave a wrong answer", got=got, expected=expected, where=f"{self.path}:{line}")

    def _load(self) -> ModuleType:
        name = f"llmkit_own_code_{self.path.stem}"
        spec = importlib.util.spec_from_file_location(name, self.path)
        assert spec is not None
        assert spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        sys.modules[name] = module  # where dataclasses look up their types
        try:
            exec(compile(self.path.read_bytes(), self.path, "exec"), vars(module))
        except Exception as error:
            raise self._failure(error) from None
        return module

    def _failure(self, error: Exception) -> DataError:
        line = error.lineno if isinstance(error, SyntaxError) else _line(error.__traceback__, str(self.path))
        said = error.msg if isinstance(error, SyntaxError) else str(error)
        got = f"{type(error).__name__}: {said}".removesuffix(": ")
        return DataError(f"{self.called} failed", got=got, where=f"{self.path}:{line or 1}")


def _line(trace: TracebackType | None, path: str) -> int | None:
    """The innermost line of a file that a traceback names."""
    line = None
    while trace is not None:
        if trace.tb_frame.f_code.co_filename == path:
            line = trace.tb_lineno
        trace = trace.tb_next
    return line


def _kind(value: Any) -> str:
    return "None" if value is None else f"a value of type {type(value).__name__}"
