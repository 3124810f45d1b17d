"""The standard library's docstrings: as answers about source code, and as texts to tell its packages apart by."""

from __future__ import annotations

import ast
import hashlib
import inspect
import re
import textwrap
from collections import defaultdict
from collections.abc import Iterator

from llmkit.data.builtin import Module, stdlib_digest, stdlib_modules
from llmkit.data.readers import Row, Where

_QUESTION = "What does this Python function do? Answer in one sentence."
_SOURCE_CHARS = 6000
_SENTENCE_CHARS = range(15, 301)
_LABEL_TEXT_CHARS = range(40, 1001)
_CLASSES = 10
_CLASS_ROWS = 400
_ABBREVIATIONS = ("e.g", "i.e", "cf", "vs", "resp", "approx", "incl", "fig", "sec", "no", "mr", "dr", "st", "viz")
_SENTENCE_END = re.compile(r"""[.!?]['")\]`]*(?=\s|$)""")
_NOT_A_SUMMARY = re.compile(
    r"(?i)see\b|deprecated|undocumented|not implemented|todo\b|xxx\b|fixme|internal\b|overrid|implement[s]? \w+\.$"
    r"|same as\b|like\b|alias\b|returns? self\b|helper\b|test\b|doctest|docstring"
)
_SKIPPED_NAMES = re.compile(r"(?i)(test|_?doctest|setup|teardown|asyncsetup|asyncteardown|load_tests|do_)")

Function = ast.FunctionDef | ast.AsyncFunctionDef


class Docstrings:
    """`{"messages"}`: the source of a function without its docstring, and the first sentence of that docstring."""

    version = 1

    def digest(self) -> str:
        """SHA-256 over the source that the rows are taken from and the version of the taking."""
        return stdlib_digest(type(self).__name__, self.version)

    def rows(self) -> Iterator[Row]:
        """The rows by path and line, each function's source once."""
        seen: set[str] = set()
        for module in stdlib_modules():
            lines = module.text.split("\n")
            functions = (node for node in ast.walk(module.tree) if isinstance(node, Function))
            for node in sorted(functions, key=lambda node: node.lineno):
                answer, source = summary(node), source_without_docstring(node, lines)
                if answer is None or source is None or source in seen:
                    continue
                seen.add(source)
                asked = f"{_QUESTION}\n\n```python\n{source}\n```"
                turns = [{"role": "user", "content": asked}, {"role": "assistant", "content": answer}]
                yield Row({"messages": turns}, Where(module.source, node.lineno))


def first_sentence(docstring: str) -> str:
    """The first sentence of a docstring's first paragraph, on one line; full stops in names and "e.g." do not end it."""
    paragraph = " ".join(inspect.cleandoc(docstring).strip().partition("\n\n")[0].split())
    for end in _SENTENCE_END.finditer(paragraph):
        before = paragraph[: end.start()].rpartition(" ")[2].lstrip("([\"'").lower()
        if before not in _ABBREVIATIONS and not (len(before) == 1 and before.isalpha()) and before.strip("."):
            return paragraph[: end.end()]
    return paragraph


def summary(node: Function) -> str | None:
    """The sentence that says what a function does, or None where its docstring does not say it in one."""
    docstring = ast.get_docstring(node, clean=False)
    if docstring is None or _SKIPPED_NAMES.match(node.name):
        return None
    sentence = first_sentence(docstring)
    says_little = len(sentence) not in _SENTENCE_CHARS or len(sentence.split()) < 3 or not sentence[0].isalpha()
    unfinished = sentence.endswith((":", ",", ";", "-", "..."))
    signature = "->" in sentence or ">>>" in sentence or sentence.startswith(f"{node.name}(")
    if says_little or unfinished or signature or _NOT_A_SUMMARY.match(sentence) or "deprecated" in sentence.lower():
        return None
    return sentence


def source_without_docstring(node: Function, lines: list[str]) -> str | None:
    """A function's source from its decorators on, dedented; None where nothing but the docstring would tell what it does."""
    docstring, body = node.body[0], node.body[1:]
    if all(isinstance(each, ast.Pass) or _is_ellipsis(each) or _is_not_implemented(each) for each in body):
        return None
    start = min([node.lineno, *(each.lineno for each in node.decorator_list)])
    end, docstring_end = node.end_lineno or node.lineno, docstring.end_lineno or docstring.lineno
    before, after = lines[start - 1 : docstring.lineno - 1], lines[docstring_end:end]
    if docstring.lineno == node.lineno or body[0].lineno <= docstring_end:
        return None
    while after and not after[0].strip():
        del after[0]
    source = textwrap.dedent("\n".join(before + after)).rstrip()
    if len(source) > _SOURCE_CHARS or source[:1].isspace() or "```" in source:
        return None
    return source


def _is_ellipsis(node: ast.stmt) -> bool:
    return isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and node.value.value is ...


def _is_not_implemented(node: ast.stmt) -> bool:
    if not isinstance(node, ast.Raise) or node.exc is None:
        return False
    raised = node.exc.func if isinstance(node.exc, ast.Call) else node.exc
    return isinstance(raised, ast.Name) and raised.id == "NotImplementedError"


class DocstringPackages:
    """`{"text", "label"}`: a docstring of a function, class or method, and the package of the library it stands in."""

    version = 1

    def digest(self) -> str:
        """SHA-256 over the source that the rows are taken from and the version of the taking."""
        return stdlib_digest(type(self).__name__, self.version)

    def rows(self) -> Iterator[Row]:
        """The rows of the ten packages with the most docstrings, up to 400 each, by path and line."""
        found: dict[str, dict[str, Where]] = defaultdict(dict)  # text -> package -> where first
        for module in stdlib_modules():
            package, _, inner = module.path.partition("/")
            if inner:
                for text, line in _docstrings(module):
                    found[text].setdefault(package, Where(module.source, line))
        by_package: dict[str, list[tuple[str, Where]]] = defaultdict(list)
        for text, places in found.items():
            if len(places) == 1:
                package, where = next(iter(places.items()))
                by_package[package].append((text, where))
        largest = sorted(by_package, key=lambda package: (-len(by_package[package]), package))[:_CLASSES]
        for package in sorted(largest):
            chosen = sorted(by_package[package], key=lambda pair: hashlib.sha256(pair[0].encode()).digest())
            for text, where in sorted(chosen[:_CLASS_ROWS], key=lambda pair: (pair[1].source, pair[1].line)):
                yield Row({"text": text, "label": package}, where)


def _docstrings(module: Module) -> Iterator[tuple[str, int]]:
    """The docstrings of a module's functions, classes and methods on one line, with the line of their `def`."""
    for node in ast.walk(module.tree):
        if isinstance(node, Function | ast.ClassDef):
            docstring = ast.get_docstring(node)
            text = " ".join(docstring.split())[: _LABEL_TEXT_CHARS.stop - 1].rstrip() if docstring else ""
            if len(text) in _LABEL_TEXT_CHARS:
                yield text, node.lineno
