"""The user's own code as a filter: what its answers mean, and how its mistakes are told."""

from __future__ import annotations

import pickle
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from llmkit.data.filters import build_filters, filter_files
from llmkit.errors import DataError, RecipeError
from llmkit.recipe.schema import Data

OWN = """
from __future__ import annotations

from collections import Counter
from dataclasses import dataclass


@dataclass
class Note:
    text: str


def keep(row):
    return len(row["text"]) > 3 or "too short"


def judge(row):
    return "cat" in row["text"]


def shout(row):
    return {"text": row["text"].upper()}


def forgets(row):
    row["text"]


def number(row):
    return 1


def blank(row):
    return {"text": " "}


def silent(row):
    return " "


def fails(row):
    return deeper(row)


def deeper(row):
    return row["nothing"]


class Keep:
    secret = True

    def __init__(self, min: int = 1, words: list[str] | None = None, free=None) -> None:
        if min < 0:
            raise ValueError("min is below 0")
        self.min = min
        self.counts = Counter()

    def __call__(self, row):
        self.counts["seen"] += 1
        return row if len(row["text"]) >= self.min else "shorter"


class NoCall:
    pass


class Breaks:
    def __init__(self):
        raise KeyError("x")


NUMBER = 3
"""


@pytest.fixture
def own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "clean.py").write_text(OWN, encoding="utf-8")
    return tmp_path / "clean.py"


def one(spec: Any) -> Any:
    ((_, take_out),) = build_filters([spec])
    return take_out


@pytest.mark.usefixtures("own")
def test_the_answers_of_a_function() -> None:
    row = {"text": "a cat"}
    assert one("./clean.py:judge")(row) is row
    assert one("clean.py:judge")({"text": "a dog"}) == "rejected"
    assert one("./clean.py:keep")(row) is row
    assert one("./clean.py:keep")({"text": "cat"}) == "too short"
    assert one("./clean.py:shout")(row) == {"text": "A CAT"}


def test_a_class_takes_options(own: Path) -> None:
    keep = one({f"{own}:Keep": {"min": 3, "words": ["a"], "free": [1]}})
    row = {"text": "cat"}
    assert keep(row) == row
    assert keep({"text": "a"}) == "shorter"
    assert keep.counts == {"seen": 2}
    assert keep.secret
    assert one({f"{own}:Keep": None})(row) == row


@pytest.mark.parametrize(
    ("name", "got"),
    [
        ("forgets", "None"),
        ("number", "a value of type int"),
        ("blank", "a row that cannot be used: text is empty"),
        ("silent", "a reason without words"),
    ],
)
def test_a_wrong_answer_names_the_filter_and_its_line(own: Path, name: str, got: str) -> None:
    with pytest.raises(DataError) as caught:
        one(f"clean.py:{name}")({"text": "x"})
    line = OWN.splitlines().index(f"def {name}(row):") + 1
    assert caught.value.what == f"the filter `clean.py:{name}` gave a wrong answer"
    assert (caught.value.got, caught.value.where) == (got, f"clean.py:{line}")
    assert caught.value.expected == "the row, True to keep it, False to take it out, or the reason as text"


def test_an_error_in_the_users_code_is_told_with_its_line(own: Path) -> None:
    with pytest.raises(DataError) as caught:
        one("clean.py:fails")({"text": "x"})
    line = OWN.splitlines().index('    return row["nothing"]') + 1
    assert caught.value.what == "the filter `clean.py:fails` failed"
    assert (caught.value.got, caught.value.where) == ("KeyError: 'nothing'", f"clean.py:{line}")
    assert caught.value.__suppress_context__


@pytest.mark.parametrize(
    ("code", "got", "line"),
    [
        ("x = 1\ny = (\n", "SyntaxError: '(' was never closed", 2),
        ("x = 1\n\nx / 0\n", "ZeroDivisionError: division by zero", 3),
    ],
)
def test_a_file_that_cannot_be_loaded_is_told_with_its_line(own: Path, code: str, got: str, line: int) -> None:
    own.write_text(code, encoding="utf-8")
    with pytest.raises(DataError) as caught:
        one("clean.py:keep")
    assert (caught.value.got, caught.value.where) == (got, f"clean.py:{line}")


@pytest.mark.parametrize(
    ("spec", "what", "hint"),
    [
        ("gone.py:keep", "the filter `gone.py:keep` is not there", None),
        ("clean.py:kep", "the filter `clean.py:kep` is not there", "did you mean `keep`?"),
        ("clean.py:NUMBER", "the filter `clean.py:NUMBER` is not there", None),
        ({"clean.py:Keep": {"mim": 3}}, "the filter `clean.py:Keep` has no option `mim`", "did you mean `min`?"),
        ({"clean.py:Keep": {"min": "3"}}, "the option `min` of the filter `clean.py:Keep` has the wrong type", None),
        ({"clean.py:Keep": {"min": -1}}, "the filter `clean.py:Keep` cannot be built", None),
        ("clean.py:NoCall", "the filter `clean.py:NoCall` cannot be built", None),
        (
            {"clean.py:keep": {"min": 3}},
            "the filter `clean.py:keep` is a function, which takes no options",
            "make it a class that takes them, with the function as its `__call__`",
        ),
    ],
)
@pytest.mark.usefixtures("own")
def test_a_wrong_spec_is_a_recipe_error(spec: Any, what: str, hint: str | None) -> None:
    with pytest.raises(RecipeError) as caught:
        one(spec)
    assert (caught.value.what, caught.value.hint) == (what, hint)


@pytest.mark.usefixtures("own")
def test_a_class_that_breaks_is_a_data_error() -> None:
    with pytest.raises(DataError) as caught:
        one("clean.py:Breaks")
    assert caught.value.got == "KeyError: 'x'"


def test_a_changed_conversation_is_checked(own: Path) -> None:
    own.write_text("def f(row):\n    row['messages'].pop()\n    return row\n", encoding="utf-8")
    row = {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}
    with pytest.raises(DataError) as caught:
        one("clean.py:f")(row)
    assert caught.value.got == "a row that cannot be used: no assistant turn"


def test_a_recipe_may_name_it_and_its_file_is_known(own: Path) -> None:
    data = Data(filters=["./clean.py:keep", {"clean.py:Keep": {"min": 3}}, "length"], augment=["clean.py:shout"])
    assert filter_files(data.filters) == [Path("clean.py"), Path("clean.py")]
    assert pickle.loads(pickle.dumps(data.filters)) == data.filters


MISSING = """
import sys
packages = ["ftfy", "selectolax.lexbor", "py3langid.langid", "ahocorasick", "phonenumbers", "stdnum"]
sys.modules.update(dict.fromkeys(packages))
from llmkit.data.filters import build_filters
from llmkit.errors import RecipeError

language, words, iban = {"language": {"keep": ["en"]}}, {"block_list": {"words": ["x"]}}, {"personal_data": {"kinds": ["iban"]}}
for spec in ("fix_encoding", "strip_markup", language, words, "personal_data", iban):
    try:
        build_filters([spec])
    except RecipeError as error:
        print(error.got, error.hint, error.where)
build_filters([{"personal_data": {"kinds": ["e-mail", "secret", "ip", "card"]}}, "white_space", "quality", "repetition"])
"""


def test_a_package_that_is_missing_is_told_with_what_to_install() -> None:
    done = subprocess.run([sys.executable, "-c", MISSING], capture_output=True, text=True, check=True)
    packages = ("ftfy", "selectolax", "py3langid", "pyahocorasick", "phonenumbers", "python-stdnum")
    told = done.stdout.splitlines()
    assert [line.split(" data.")[0] for line in told] == [f"no {name} pip install 'llmkit[data]'" for name in packages]
    assert all(" data.filters[0]." in line for line in told)
