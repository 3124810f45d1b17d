"""Every recipe that ships is accepted, says how it is run, and passes --dry-run."""

from __future__ import annotations

import importlib.util
import json
import re
from itertools import islice
from pathlib import Path

import forked
import pytest
import yaml
from conftest import Cli
from transformers import AutoTokenizer

from llmkit.catalog import resolve
from llmkit.data import builtin
from llmkit.data.corpus import Corpus
from llmkit.recipe.load import load_recipe

FOLDER = Path(__file__).parents[2] / "recipes"
RECIPES = sorted(FOLDER.glob("*.yaml"))
names = pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)


def test_there_are_recipes() -> None:
    assert {"quickstart", "classify-docstrings", "gpt-from-scratch"} <= {path.stem for path in RECIPES}
    others = {item.name for item in FOLDER.iterdir() if item.suffix != ".yaml"}
    assert others - {"__pycache__"} == {
        "roff.py",
        "quickstart-report.png",
    }  # the filter of clean-corpus, the README's picture


@names
def test_a_recipe_opens_with_the_command_that_runs_it(path: Path) -> None:
    comment = []
    for line in path.read_text(encoding="utf-8").splitlines():
        if not line.startswith("#"):
            break
        comment.append(line)
    assert any(f"llmkit run recipes/{path.name}" in line for line in comment)
    assert any("Takes about" in line for line in comment)


@names
def test_a_recipe_is_named_as_its_file_and_accepted(path: Path) -> None:
    recipe = load_recipe(path)
    assert recipe.name == path.stem


@names
def test_no_recipe_is_a_copy_of_another(path: Path) -> None:
    def keys(recipe: Path) -> dict[str, object]:
        return {key: value for key, value in yaml.safe_load(recipe.read_text()).items() if key != "name"}

    assert [other for other in RECIPES if keys(other) == keys(path)] == [path]


@names
@pytest.mark.slow
@pytest.mark.usefixtures("smollm2")
def test_a_recipe_passes_dry_run(path: Path, cli: Cli, tmp_path: Path) -> None:
    _skip_what_cannot_run(path)
    done = cli("run", path, "--dry-run", "--json", "-o", tmp_path / "run")
    assert done.code == 0, done.out
    assert list(done.json["stages"]) == list(load_recipe(path).plan)
    assert not (tmp_path / "run").exists()


def _skip_what_cannot_run(path: Path) -> None:
    """Models come in packages, and manual pages with the system: where they are missing, a recipe cannot be tried."""
    model = load_recipe(path).model
    if model is not None and importlib.util.find_spec(model.removeprefix("pkg://").split("/")[0]) is None:
        pytest.skip(f"{model} is not installed")
    if path.stem == "clean-corpus" and not list(Path("/usr/share/man/man7").glob("[a-l]*.gz")):
        pytest.skip("this machine has no manual pages")


def _check_clean(folder: Path) -> None:
    """The filters left English text without markup and without addresses."""
    statistics = json.loads((folder / "statistics.json").read_text())
    rows = sum(entry["rows"] for entry in statistics["corpora"].values())
    assert statistics["rows_read"] == rows + statistics["rows_rejected"] + sum(statistics["rows_filtered"].values())
    assert statistics["corpora"]["eval"]["bytes_per_token"] > 2.5
    tokenizer = AutoTokenizer.from_pretrained(folder / "tokenizer")
    corpus = Corpus(folder / "train")
    text = "".join(tokenizer.decode(example["input_ids"]) for example in corpus)
    assert "DESCRIPTION" in text
    assert "\n.SH" not in text
    assert not re.search(r"[\w.]+@(?!example)[\w-]+\.(com|org|net)\b", text)


_SHORT_TEXTS = ("data.max_length=128", "data.filters=[{length: {max_chars: 300}}]")
_SHORTENED = {
    "quickstart": [
        *_SHORT_TEXTS,
        *("data.eval=1%", "pretrain.steps=1", "pretrain.batch_size=1", "pretrain.max_length=64", "pretrain.warmup=0"),
        *("finetune.steps=2", "finetune.batch_size=2", "evaluate.generate=1", "evaluate.samples=1"),
    ],
    "classify-docstrings": ["finetune.epochs=null", "finetune.steps=2", "finetune.eval_every=1", "data.eval=20%"],
    "freeze-sweep": ["finetune.epochs=null", "finetune.steps=1", "data.eval=20%", "data.max_length=16"],
    "gradual-unfreezing": ["finetune.epochs=null", "finetune.steps=14", "data.eval=20%", "data.max_length=16"],
    "adapters-chat": [
        *_SHORT_TEXTS,
        *("finetune.epochs=null", "finetune.steps=2", "finetune.batch_size=2", "data.eval=1%", "evaluate.samples=1"),
        *(
            "evaluate.generate=1",
            "data.train=[{uri: 'builtin:docstrings', weight: 0.01}]",
            "data.general=[{uri: 'builtin:python-docs', weight: 0.002}]",
        ),
    ],
    "clean-corpus": ["data.train=[{uri: '/usr/share/man/man7/[a-l]*.gz', format: text}, {uri: 'builtin:python-docs'}]"],
    "gpt-from-scratch": ["pretrain.steps=2", "pretrain.eval_every=1", "data.eval=0.5%"],
}


def llmkit_with_few_modules(*words: str) -> None:
    """Takes every eighth module of the standard library: to parse all of it takes longer than the rest."""
    paths = builtin._stdlib_paths
    builtin._stdlib_paths = lambda: islice(paths(), 0, None, 8)  # type: ignore[assignment]
    forked.command(*words)


@names
@pytest.mark.slow
@pytest.mark.usefixtures("smollm2")
def test_a_recipe_runs_with_its_real_model_and_data(path: Path, tmp_path: Path) -> None:
    recipe = load_recipe(path)
    _skip_what_cannot_run(path)
    shortened = [word for setting in _SHORTENED[path.stem] for word in ("--set", setting)]

    def run(*more: str) -> forked.Forked:
        words = ("run", str(path), "-o", str(tmp_path / "run"), "--json", *shortened, *more)
        process = forked.start(llmkit_with_few_modules, *words, cwd=tmp_path)  # whose memory goes with it
        assert process.wait() == 0, process.out + process.err
        return process

    run()
    if path.stem == "clean-corpus":
        _check_clean(tmp_path / "run" / "preprocess")
        return
    results = json.loads((tmp_path / "run" / "evaluate" / "results.json").read_text())
    task = resolve("task", recipe.task)
    assert [name for name in results["model"] if not name.startswith("general_")] == list(task.metrics)
    assert ("parent" in results) == (recipe.model is not None)
    again = json.loads(run("--dry-run").out)
    assert not any(stage["runs"] for stage in again["stages"].values())
