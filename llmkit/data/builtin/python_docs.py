"""The standard library's documentation as plain text: its topics, and one document a module."""

from __future__ import annotations

import ast
import textwrap
from collections.abc import Iterator

from llmkit.data.builtin import Module, stdlib_digest, stdlib_modules
from llmkit.data.readers import Row, Where

_DOCUMENT_CHARS = 200
_TOPICS = "pydoc_data/topics.py"

Documented = ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef


class PythonDocs:
    """`{"text"}`: the topics of `pydoc_data`, and each module's docstring followed by its public signatures."""

    version = 1

    def digest(self) -> str:
        """SHA-256 over the source that the rows are taken from and the version of the taking."""
        return stdlib_digest(type(self).__name__, self.version)

    def rows(self) -> Iterator[Row]:
        """The documents of at least 200 characters by path and line."""
        for module in stdlib_modules():
            documents = _topics(module) if module.path == _TOPICS else [(module_document(module), 1)]
            for text, line in documents:
                if len(text) >= _DOCUMENT_CHARS:
                    yield Row({"text": text}, Where(module.source, line))


def _topics(module: Module) -> Iterator[tuple[str, int]]:
    for node in ast.walk(module.tree):
        if isinstance(node, ast.Dict):
            for key, value in zip(node.keys, node.values, strict=True):
                if key is not None and isinstance(value, ast.Constant) and isinstance(value.value, str):
                    yield value.value.strip(), key.lineno


def module_document(module: Module) -> str:
    """A module's name and docstring, then signature and docstring of each public class, method and function."""
    parts = list(_described(module.tree.body, ""))
    docstring = ast.get_docstring(module.tree)
    if docstring is None and not parts:
        return ""
    return "\n\n".join([module.name, *([docstring] if docstring else []), *parts])


def _described(body: list[ast.stmt], indent: str) -> Iterator[str]:
    for node in body:
        if not isinstance(node, Documented) or node.name.startswith("_"):
            continue
        docstring = ast.get_docstring(node)
        inner = list(_described(node.body, indent + "    ")) if isinstance(node, ast.ClassDef) else []
        if docstring or inner:
            described = [indent + _signature(node)]
            if docstring:
                described.append(textwrap.indent(docstring, indent + "    "))
            yield "\n\n".join(["\n".join(described), *inner])


def _signature(node: Documented) -> str:
    if isinstance(node, ast.ClassDef):
        bases = ", ".join(ast.unparse(each) for each in [*node.bases, *node.keywords])
        return f"class {node.name}({bases})" if bases else f"class {node.name}"
    keyword = "async def" if isinstance(node, ast.AsyncFunctionDef) else "def"
    returns = f" -> {ast.unparse(node.returns)}" if node.returns else ""
    return f"{keyword} {node.name}({ast.unparse(node.args)}){returns}"
