"""The data sets that come with llmkit: what is in them, that it is clean, and that it stays the same."""

from __future__ import annotations

import ast
import re
import sysconfig
import textwrap
from collections import Counter
from itertools import islice
from pathlib import Path

import pytest

from llmkit.catalog import CATALOG
from llmkit.data import builtin
from llmkit.data.builtin.docstrings import Docstrings, first_sentence, source_without_docstring, summary
from llmkit.data.builtin.python_docs import module_document
from llmkit.data.sources import Row, read_rows, source_digest

STDLIB = Path(sysconfig.get_path("stdlib"))
NAMES = tuple(CATALOG["builtin data set"])


@pytest.fixture(scope="module")
def data_sets() -> dict[str, list[Row]]:
    return {name: [row for row in read_rows(f"builtin:{name}") if isinstance(row, Row)] for name in NAMES}


def function(source: str) -> tuple[ast.FunctionDef, list[str]]:
    source = textwrap.dedent(source)
    found = next(node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.FunctionDef))
    return found, source.split("\n")


@pytest.mark.parametrize("name", NAMES)
def test_places_are_real_and_in_order(data_sets: dict[str, list[Row]], name: str) -> None:
    for row in data_sets[name][::50]:
        lines = (
            (STDLIB / row.where.source.removeprefix("Lib/")).read_text(encoding="utf-8", errors="replace").split("\n")
        )
        assert 1 <= row.where.line <= len(lines)
        if name != "python-docs":
            assert re.match(r"\s*(async def|def|class) ", lines[row.where.line - 1])
    sources = [row.where.source for row in data_sets[name]]
    assert not [
        source for source in sources if {"test", "tests", "idle_test", "site-packages"} & set(source.split("/"))
    ]
    if name != "docstring-packages":
        paths = [source.removeprefix("Lib/") for source in sources]
        assert paths == sorted(paths)


@pytest.mark.parametrize("name", NAMES)
def test_a_second_reading_gives_the_same_rows(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    paths = builtin._stdlib_paths
    monkeypatch.setattr(
        builtin, "_stdlib_paths", lambda: islice(paths(), 0, None, 8)
    )  # of all of it, it would take long
    first = list(read_rows(f"builtin:{name}"))
    assert len(first) > 50
    assert list(read_rows(f"builtin:{name}")) == first


def test_docstrings_are_clean_pairs(data_sets: dict[str, list[Row]]) -> None:
    rows = data_sets["docstrings"]
    assert 4000 < len(rows) < 8000
    for row in rows:
        asked, answer = row.values["messages"]
        assert (asked["role"], answer["role"]) == ("user", "assistant")
        assert 15 <= len(answer["content"]) <= 300
        assert "\n" not in answer["content"]
        assert not re.match(r"(?i)see\b|.*deprecated", answer["content"])
        assert len(asked["content"]) < 6200
    assert len({row.values["messages"][0]["content"] for row in rows}) == len(rows)


def test_the_source_parses_and_has_no_docstring(data_sets: dict[str, list[Row]]) -> None:
    for row in data_sets["docstrings"][::10]:
        before, code, after = row.values["messages"][0]["content"].split("```")
        assert (before, after) == ("What does this Python function do? Answer in one sentence.\n\n", "")
        node = ast.parse(code.removeprefix("python\n")).body[0]
        assert isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
        assert ast.get_docstring(node) is None, row.where


def test_decorators_stay_and_the_docstring_goes() -> None:
    node, lines = function('''
        class A:
            @property
            @cached
            def area(self):
                """Return the area of the shape.

                More.
                """

                return 1  # one
    ''')
    source = source_without_docstring(node, lines)
    assert source == "@property\n@cached\ndef area(self):\n    return 1  # one"


@pytest.mark.parametrize("body", ["", "pass", "...", "raise NotImplementedError", "raise NotImplementedError('x')"])
def test_functions_that_do_nothing_are_left_out(body: str) -> None:
    node, lines = function(f'def f():\n    """Return the area of the shape."""\n    {body}\n')
    assert summary(node) == "Return the area of the shape."
    assert source_without_docstring(node, lines) is None


def test_long_sources_are_left_out() -> None:
    node, lines = function('def f():\n    """Return the area of the shape."""\n' + "    x = 'yyyyyyyyyyyyy'\n" * 300)
    assert source_without_docstring(node, lines) is None


@pytest.mark.parametrize(
    ("docstring", "sentence"),
    [
        ("Return the area.", "Return the area."),
        ("Return the\n    area of it.  Then stop.", "Return the area of it."),
        ("Use a name, e.g. the first. Then stop.", "Use a name, e.g. the first."),
        ("Use a name (i.e. the first). Then stop.", "Use a name (i.e. the first)."),
        ("Read sys.path and os.environ now. Then stop.", "Read sys.path and os.environ now."),
        ("Take version 3.11 of it. Then stop.", "Take version 3.11 of it."),
        ("Is it so? Then stop.", "Is it so?"),
        ("Return 'a.' or more. Then stop.", "Return 'a.' or more."),
        ("No full stop here\n\nSecond paragraph.", "No full stop here"),
        ("Read from ... to the end. Then stop.", "Read from ... to the end."),
    ],
)
def test_first_sentence(docstring: str, sentence: str) -> None:
    assert first_sentence(docstring) == sentence


@pytest.mark.parametrize(
    ("name", "docstring"),
    [
        ("f", "Too short."),
        ("f", "x" * 290 + " much too long."),
        ("f", "See the documentation of the class."),
        ("f", "Deprecated, use the other one."),
        ("f", "This function is deprecated since long ago."),
        ("f", "The arguments are as follows:"),
        ("f", "f(x) -> the value of it"),
        ("f", ">>> f(1) returns two"),
        ("setUp", "Prepare the fixture of the case."),
        ("test_it", "Return the area of the shape."),
    ],
)
def test_docstrings_that_say_little_are_left_out(name: str, docstring: str) -> None:
    node, _ = function(f'def {name}():\n    """{docstring}"""\n    return 1\n')
    assert summary(node) is None


def test_docstring_packages_are_ten_classes_without_doubles(data_sets: dict[str, list[Row]]) -> None:
    rows = data_sets["docstring-packages"]
    counts = Counter(row.values["label"] for row in rows)
    assert len(counts) == 10
    assert max(counts.values()) <= 400
    assert all((STDLIB / label / "__init__.py").is_file() for label in counts)
    texts = [row.values["text"] for row in rows]
    assert len(set(texts)) == len(texts)
    assert all(40 <= len(text) <= 1000 and text == " ".join(text.split()) for text in texts)
    assert all(row.where.source.startswith(f"Lib/{row.values['label']}/") for row in rows)


def test_python_docs_has_the_topics_and_the_modules(data_sets: dict[str, list[Row]]) -> None:
    from pydoc_data.topics import topics

    rows = data_sets["python-docs"]
    assert all(len(row.values["text"]) >= 200 for row in rows)
    texts = {row.values["text"] for row in rows if row.where.source == "Lib/pydoc_data/topics.py"}
    assert texts == {text.strip() for text in topics.values() if len(text.strip()) >= 200}
    by_source = {row.where.source: row.values["text"] for row in rows}
    assert "def dedent(text)\n    Remove any common leading whitespace" in by_source["Lib/textwrap.py"]


def test_a_module_document() -> None:
    source = '''
"""What it is."""
class A(B, metaclass=C):
    """A thing."""
    def f(self, x: int = 1, *, y) -> str:
        """Do f.

        More."""
    def _hidden(self):
        """Not shown."""
def undocumented(): pass
async def g():
    """Do g."""
'''
    assert module_document(builtin.Module("a/b.py", source, ast.parse(source))) == (
        "a.b\n\nWhat it is.\n\nclass A(B, metaclass=C)\n    A thing.\n\n"
        "    def f(self, x: int=1, *, y) -> str\n        Do f.\n\n        More.\n\nasync def g()\n    Do g."
    )


@pytest.fixture
def small_stdlib(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A standard library of a few files in place of the real one."""
    good = 'def f():\n    """Return the number of them all."""\n    return {}\n'
    for name, text in {
        "b/__init__.py": good.format(1),
        "a.py": good.format(2),
        "test/t.py": good.format(3),
        "b/tests/t.py": good.format(4),
        "site-packages/p.py": good.format(5),
        "ensurepip/_bundled/p.py": good.format(6),
        "config-3/p.py": good.format(7),
        "broken.py": "def f(:\n",
        "copy_of_a.py": good.format(2),
    }.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    (tmp_path / "latin.py").write_bytes(b"# \xff\n" + good.format(8).encode())
    monkeypatch.setattr(sysconfig, "get_path", lambda _: str(tmp_path))
    return tmp_path


@pytest.mark.usefixtures("small_stdlib")
def test_tests_packages_and_what_does_not_parse_are_left_out() -> None:
    assert [str(row.where) for row in Docstrings().rows()] == ["Lib/a.py:1", "Lib/b/__init__.py:1"]


def test_the_digest_follows_the_source_and_the_version(small_stdlib: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    digest = source_digest("builtin:docstrings")
    (small_stdlib / "test" / "t.py").write_text("changed = 1")
    assert source_digest("builtin:docstrings") == digest
    monkeypatch.setattr(Docstrings, "version", Docstrings.version + 1)
    assert source_digest("builtin:docstrings") != digest
    monkeypatch.undo()
    monkeypatch.setattr(sysconfig, "get_path", lambda _: str(small_stdlib))
    (small_stdlib / "a.py").write_text("changed = 1")
    assert source_digest("builtin:docstrings") != digest


def test_two_data_sets_from_the_same_source_have_different_digests() -> None:
    assert len({source_digest(f"builtin:{name}") for name in NAMES}) == len(NAMES)
