"""Public benchmarks: the numbers of lm-eval itself, from the user's own task files, without a network."""

from __future__ import annotations

import json
import random
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import WORDS, Cli, Smollm2, sentence, write_rows

from llmkit.errors import DataError, LlmkitError, RecipeError
from llmkit.model.loading import load_model, load_tokenizer
from llmkit.recipe.load import Override, load_recipe
from llmkit.recipe.schema import Recipe
from llmkit.run.directory import Run
from llmkit.run.reporter import SilentReporter
from llmkit.stages import benchmark_files, benchmark_tasks, benchmarks
from llmkit.stages.benchmark_model import BenchmarkModel, batches_by_beginning
from llmkit.stages.benchmark_tasks import check_benchmarks
from llmkit.stages.benchmarks import benchmark_inputs, benchmark_scores

DATA = "dataset_path: json\ndataset_kwargs: {data_files: rows.jsonl}\ntest_split: train\n"
TASKS = {
    "choice": (
        'output_type: multiple_choice\ndoc_to_text: "Question: {{question}}\\nAnswer:"\ndoc_to_choice: choices\n'
        "doc_to_target: answer\nnum_fewshot: 2\nmetric_list: [{metric: acc}, {metric: acc_norm}]\n"
    ),
    "writing": (
        'output_type: generate_until\ndoc_to_text: "{{question}}"\ndoc_to_target: word\n'
        'generation_kwargs: {until: ["."], max_gen_toks: 8, do_sample: false}\nmetric_list: [{metric: exact_match}]\n'
        "filter_list: [{name: none, filter: [{function: take_first}]}, "
        "{name: lower, filter: [{function: lowercase}, {function: take_first}]}]\n"
    ),
    "words": (
        'output_type: loglikelihood\ndoc_to_text: "{{question}}"\ndoc_to_target: " {{word}}"\n'
        "metric_list: [{metric: acc}]\n"
    ),
    "text": (
        'output_type: loglikelihood_rolling\ndoc_to_text: ""\ndoc_to_target: text\n'
        "metric_list: [{metric: word_perplexity}, {metric: bits_per_byte}]\n"
    ),
}


@pytest.fixture
def tasks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working folder with rows and a task file of each kind."""
    folder = tmp_path / "tasks"
    folder.mkdir()
    rows = (
        {
            "question": sentence(i) + " Name it.",
            "choices": [WORDS[i % 12], *(WORDS[(i + k) % 12] + " and more" * k for k in (1, 2, 3))],
            "answer": i % 4,
            "word": WORDS[i % 12],
            "text": sentence(i) + " " + sentence(i + 50),
        }
        for i in range(20)
    )
    write_rows(folder / "rows.jsonl", rows)
    for name, text in TASKS.items():
        (folder / f"{name}.yaml").write_text(f"task: own_{name}\n{DATA}{text}", encoding="utf-8")
    monkeypatch.chdir(folder)
    return folder


def recipe_with(model: object, *names: str, **keys: Any) -> Recipe:
    values = {"name": "b", "task": "chat", "model": str(model), "data.eval": "rows.jsonl", "stages": ["evaluate"]}
    values |= {"evaluate.benchmarks": list(names), "evaluate.precision": "fp32", "evaluate.batch_size": 4}
    values |= {f"evaluate.{key}": value for key, value in keys.items()}
    return load_recipe(None, [Override(key, value, key) for key, value in values.items()])


def scored(recipe: Recipe, folder: Path, **models: Path) -> benchmarks.BenchmarkScores:
    run = Run(folder, {"stages": {}, "guesses": {}}, SilentReporter(), None)
    return benchmark_scores(recipe, run, models, recipe.evaluate.precision)


def keep_rows(path: Path, count: int) -> None:
    lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
    path.write_text("".join(lines[:count]), encoding="utf-8")


def by_lm_eval(model: Path, names: list[str], dtype: str = "float32", **options: Any) -> dict[str, dict[str, float]]:
    """What lm-eval finds when it loads the model itself, as its command does."""
    from lm_eval import simple_evaluate
    from lm_eval.tasks import TaskManager

    manager = TaskManager(include_defaults=False)  # which takes no time
    common: Any = {"device": "cpu", "batch_size": 4, "log_samples": False, "task_manager": manager}
    found = simple_evaluate("hf", f"pretrained={model},dtype={dtype}", tasks=names, **common, **options)
    assert found is not None
    return {
        task: {key.removesuffix(",none"): value for key, value in metrics.items() if "," in key and value != "N/A"}
        for task, metrics in found["results"].items()
    }


def test_scores_are_those_of_lm_eval(tiny_llama: Path, tasks: Path, tmp_path: Path) -> None:
    names = [f"{name}.yaml" for name in TASKS]
    mine = scored(recipe_with(tiny_llama, *names), tmp_path, model=tiny_llama)
    theirs = by_lm_eval(tiny_llama, names)
    assert not mine.reasons
    assert set(mine.values["model"]) == {f"own_{name}" for name in TASKS}
    assert all(metrics.pop("examples") == 20 for metrics in mine.values["model"].values())
    assert mine.values["model"].keys() == theirs.keys()
    for task, metrics in theirs.items():
        assert mine.values["model"][task] == pytest.approx(metrics, rel=1e-5), task
    assert {"exact_match", "exact_match,lower"} <= set(theirs["own_writing"])


SHUFFLED = """
import random

def shuffled(dataset):
    order = list(range(len(dataset)))
    random.shuffle(order)
    return dataset.select(order[:6])
"""


def test_a_task_that_shuffles_has_the_documents_that_lm_eval_gives_it(
    tiny_llama: Path, tasks: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from lm_eval.models.huggingface import HFLM

    (tasks / "own.py").write_text(SHUFFLED)
    text = TASKS["words"] + "process_docs: !function own.shuffled\n"
    (tasks / "mixed.yaml").write_text(f"task: own_mixed\n{DATA}{text}", encoding="utf-8")
    recipe = recipe_with(tiny_llama, "mixed.yaml", cache=False)
    asked: list[list[str]] = []
    score = HFLM.loglikelihood  # which ours calls too

    def seen(self: HFLM, requests: Any, disable_tqdm: bool = True) -> Any:
        asked.append([request.args[0] for request in requests])
        return score(self, requests, disable_tqdm)

    monkeypatch.setattr(HFLM, "loglikelihood", seen)
    for seed in (1, 2):
        random.seed(seed)
        mine = scored(recipe, tmp_path, model=tiny_llama).values["model"]["own_mixed"]
        assert mine.pop("examples") == 6
    assert mine == pytest.approx(by_lm_eval(tiny_llama, ["mixed.yaml"])["own_mixed"], rel=1e-5)
    assert asked[0] == asked[1] == asked[2]
    assert len(asked) == 3


def test_options_mean_what_they_mean_to_lm_eval(tiny_llama: Path, tasks: Path, tmp_path: Path) -> None:
    options = {"num_fewshot": 3, "limit": 7, "apply_chat_template": True}
    names = ["choice.yaml", "words.yaml"]
    mine = scored(recipe_with(tiny_llama, *names, benchmark_options=options), tmp_path, model=tiny_llama)
    theirs = by_lm_eval(tiny_llama, names, **options, fewshot_as_multiturn=True)
    plain = by_lm_eval(tiny_llama, ["words.yaml"])
    assert all(metrics.pop("examples") == 7 for metrics in mine.values["model"].values())
    for task, metrics in theirs.items():
        assert mine.values["model"][task] == pytest.approx(metrics, rel=1e-5), task
    assert plain != theirs


def test_log_likelihoods_of_packed_rows_are_those_of_padded_ones(tiny_llama: Path) -> None:
    from contextlib import nullcontext

    from lm_eval.models.huggingface import HFLM

    model = load_model(tiny_llama, "AutoModelForCausalLM").model.eval()
    tokenizer = load_tokenizer(tiny_llama)
    generator = np.random.default_rng(1)
    beginnings = [generator.integers(5, 300, size=n).tolist() for n in (1, 30, 31, 60)]
    requests = [(("", ""), beginnings[i % 4], generator.integers(5, 300, size=1 + i % 5).tolist()) for i in range(30)]
    requests.append((("", ""), generator.integers(5, 300, size=300).tolist(), [7, 8, 9]))  # longer than the model takes
    watch = nullcontext(lambda done: None)
    mine = BenchmarkModel(model, tokenizer, batch_size=4, precision="fp32", watch=lambda title, count: watch)
    assert mine._objective is not None
    found = mine._loglikelihood_tokens(requests)
    expected = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=4)._loglikelihood_tokens(requests)
    assert [greedy for _, greedy in found] == [greedy for _, greedy in expected]
    np.testing.assert_allclose([s for s, _ in found], [s for s, _ in expected], rtol=1e-5, atol=1e-4)
    assert mine.cut == 1


def test_batches_hold_every_row_once_and_keep_beginnings_together() -> None:
    generator = np.random.default_rng(0)
    contexts = [generator.integers(100, size=400).tolist() for _ in range(5)]
    rows = [contexts[i % 5] + generator.integers(100, size=5).tolist() for i in range(40)]
    found = list(batches_by_beginning(rows, 4096))
    assert sorted(number for batch in found for number in batch) == list(range(40))
    assert [len({number % 5 for number in batch}) for batch in found] == [1] * 5
    unlike = [generator.integers(100, size=30).tolist() for _ in range(50)]
    sizes = [sum(len(unlike[number]) for number in batch) for batch in batches_by_beginning(unlike, 300)]
    assert max(sizes) <= 300
    assert len(sizes) == 5
    assert [len(batch) for batch in batches_by_beginning([[1] * 900, [2] * 900], 300)] == [1, 1]


def test_scores_are_kept_until_something_that_decides_them_changes(
    tiny_llama: Path, tasks: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = recipe_with(tiny_llama, "words.yaml")
    first = scored(recipe, tmp_path, model=tiny_llama)
    computed: list[str] = []
    original = benchmarks._ScoredFolder._computed
    monkeypatch.setattr(
        benchmarks._ScoredFolder, "_computed", lambda self, name: (computed.append(name), original(self, name))[1]
    )
    assert scored(recipe, tmp_path, model=tiny_llama).values == first.values
    assert not computed
    before = benchmark_inputs(recipe)
    keep_rows(tasks / "rows.jsonl", 5)
    assert benchmark_inputs(recipe) != before
    assert scored(recipe, tmp_path, model=tiny_llama).values["model"]["own_words"]["examples"] == 5
    assert [Path(name).name for name in computed] == ["words.yaml"]
    scored(recipe_with(tiny_llama, "words.yaml", cache=False), tmp_path, model=tiny_llama)
    assert len(computed) == 2


def test_evaluate_stores_them_beside_its_own_scores(tiny_llama: Path, tasks: Path, cli: Cli, chat_rows: Path) -> None:
    for path in tasks.iterdir():
        shutil.copy(path, Path.cwd())
    command = ["evaluate", "-m", tiny_llama, "-d", chat_rows, "-o", "run", "--set", "evaluate.generate=0"]
    command += ["--set", "evaluate.benchmarks=[choice.yaml]", "--set", f"evaluate.against={tiny_llama}"]
    done = cli(*command, "--json")
    assert done.code == 0, done.out
    results = json.loads(Path("run/evaluate/results.json").read_text())
    assert results["benchmarks"]["model"]["own_choice"]["examples"] == 20
    assert len(results["benchmarks"]) == 2
    assert done.json["metrics"]["benchmarks"] == results["benchmarks"]
    shown = cli(*command)
    assert "unchanged" in shown.err
    assert "own_choice" in shown.out
    assert "±" in shown.out
    keep_rows(Path("rows.jsonl"), 9)
    assert "changed: the file choice.yaml" in cli(*command).err


@pytest.mark.parametrize(
    ("name", "text", "kind", "said"),
    [
        ("gone.yaml", None, RecipeError, "there is no file gone.yaml"),
        ("bad.yaml", "task: [", RecipeError, "is not YAML"),
        ("other.yaml", "name: x\n", RecipeError, "not a task of lm-eval"),
        ("list.yaml", "- 1\n", RecipeError, "not a task of lm-eval"),
        ("less.yaml", "include: base.yaml\ntask: x\n", RecipeError, "there is no file base.yaml"),
        ("away.yaml", f"task: x\n{DATA}{TASKS['words']}".replace("rows.jsonl", "rws.jsonl"), RecipeError, "not there"),
        ("nosuchbenchmark", None, RecipeError, "no benchmark `nosuchbenchmark`"),
    ],
)
def test_what_is_wrong_is_said_before_anything_runs(
    name: str,
    text: str | None,
    kind: type[LlmkitError],
    said: str,
    tiny_llama: Path,
    tasks: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(benchmark_tasks, "_manager", lambda registered: FewTasks())
    if text is not None:
        (tasks / name).write_text(text)
    with pytest.raises(kind, match=said):
        check_benchmarks(recipe_with(tiny_llama, name))


class FewTasks:
    """An index of tasks that is there at once."""

    all_tasks = ("hellaswag", "arc_easy")

    def match_tasks(self, names: list[str]) -> list[str]:
        return [name for name in self.all_tasks if name in names]

    def load(self, names: Any) -> Any:
        raise ConnectionError(f"Couldn't reach '{names}' on the Hub (OfflineModeIsEnabled)")


def test_a_misspelt_benchmark_gets_a_suggestion(tiny_llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(benchmark_tasks, "_manager", lambda registered: FewTasks())
    with pytest.raises(RecipeError) as caught:
        check_benchmarks(recipe_with(tiny_llama, "helaswag"))
    assert caught.value.hint == "did you mean `hellaswag`?"


def test_a_task_that_classifies_has_no_benchmarks(tiny_bert: Path, tasks: Path) -> None:
    recipe = recipe_with(tiny_bert, "words.yaml").model_copy(update={"task": "classify"})
    with pytest.raises(RecipeError, match="models that write text"):
        check_benchmarks(recipe)


def test_without_a_network_the_benchmark_is_named(
    tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(benchmark_tasks, "_manager", lambda registered: FewTasks())
    recipe = recipe_with(tiny_llama, "hellaswag")
    monkeypatch.setattr(benchmark_tasks, "hub_is_off", lambda: True)  # then what was downloaded before counts
    with pytest.raises(DataError, match="benchmark hellaswag needs the network"):
        check_benchmarks(recipe)
    monkeypatch.setattr(benchmark_tasks, "hub_is_off", lambda: False)
    monkeypatch.setattr(benchmark_tasks, "hub_answers", lambda: True)
    check_benchmarks(recipe)
    with pytest.raises(DataError, match="benchmark hellaswag needs the network"):
        scored(recipe, tmp_path, model=tiny_llama)
    monkeypatch.setattr(benchmark_tasks, "hub_answers", lambda: False)
    with pytest.raises(DataError, match="the network") as caught:
        check_benchmarks(recipe)
    assert caught.value.got == "the hub does not answer"


def test_a_hub_that_does_not_answer_is_not_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    import time

    from huggingface_hub import constants, utils

    class Silent:
        def head(self, url: str, timeout: float) -> None:
            time.sleep(120)

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(utils, "get_session", Silent)
    monkeypatch.setattr(benchmark_files, "_SECONDS_FOR_THE_HUB", 0.1)
    started = time.monotonic()
    assert not benchmark_files.hub_answers()
    assert time.monotonic() - started < 60


def test_own_code_runs_and_its_failures_name_its_line(tiny_llama: Path, tasks: Path, tmp_path: Path) -> None:
    code = "def ask(doc):\n    return doc['question']\n\n\ndef fail(doc):\n    return doc['nothing']\n"
    (tasks / "asking.py").write_text(code)
    own = (tasks / "words.yaml").read_text().replace('"{{question}}"', "!function asking.ask")
    (tasks / "own.yaml").write_text(own.replace("own_words", "with_code"))
    recipe = recipe_with(tiny_llama, "own.yaml", "words.yaml")
    check_benchmarks(recipe)
    found = scored(recipe, tmp_path, model=tiny_llama).values["model"]
    assert found["with_code"] == found["own_words"]
    before = benchmark_inputs(recipe)
    (tasks / "asking.py").write_text(code + "# changed\n")
    assert benchmark_inputs(recipe) != before
    (tasks / "own.yaml").write_text(own.replace("asking.ask", "asking.fail"))
    with pytest.raises(DataError, match=r"own.yaml's own code failed") as caught:
        scored(recipe, tmp_path, model=tiny_llama)
    assert str(caught.value.where).endswith("asking.py:6")
    assert "nothing" in str(caught.value.got)


def test_two_files_of_one_task_are_refused(tiny_llama: Path, tasks: Path, tmp_path: Path) -> None:
    shutil.copy(tasks / "words.yaml", tasks / "again.yaml")
    with pytest.raises(RecipeError, match="two benchmarks have the same task"):
        scored(recipe_with(tiny_llama, "words.yaml", "again.yaml"), tmp_path, model=tiny_llama)


def test_a_benchmark_without_rows_is_refused(tiny_llama: Path, tasks: Path, tmp_path: Path) -> None:
    text = (tasks / "words.yaml").read_text() + "process_docs: !function few.none\n"
    (tasks / "few.py").write_text("def none(docs):\n    return docs.select([])\n")
    (tasks / "few.yaml").write_text(text)
    with pytest.raises(RecipeError, match=r"cannot load the benchmark few.yaml") as caught:
        scored(recipe_with(tiny_llama, "few.yaml"), tmp_path, model=tiny_llama)
    assert "size 0" in str(caught.value.got)


def test_a_value_that_is_not_finite_has_a_reason() -> None:
    found = {
        "results": {"a": {"alias": "a", "acc,none": 0.5, "acc_stderr,none": float("nan"), "f1,none": float("nan")}},
        "n-samples": {"a": {"original": 3, "effective": 2}},
    }
    assert benchmarks._without_gaps(found) == ({"a": {"acc": 0.5, "examples": 2}}, {"a.f1": "lm-eval gives nan"})


@pytest.mark.slow
def test_scores_are_those_of_the_lm_eval_command_on_a_real_model(tasks: Path, tmp_path: Path, smollm2: Smollm2) -> None:
    model = smollm2.folder
    keep_rows(tasks / "rows.jsonl", 5)
    names = [f"{name}.yaml" for name in TASKS]
    mine = scored(recipe_with(model, *names), tmp_path, model=model).values["model"]
    command = [sys.executable, "-m", "lm_eval", "run", "--model", "hf", "--model_args"]
    command += [f"pretrained={model},dtype=float32", "--device", "cpu", "--batch_size", "4"]
    command += ["--output_path", str(tmp_path / "out"), "--tasks", *names]
    subprocess.run(command, check=True, capture_output=True, cwd=tasks)
    written = json.loads(next((tmp_path / "out").rglob("results_*.json")).read_text())["results"]
    assert set(written) == set(mine)
    for task, metrics in written.items():
        values = {key.removesuffix(",none"): value for key, value in metrics.items() if "," in key and value != "N/A"}
        assert {k: v for k, v in mine[task].items() if k != "examples"} == pytest.approx(values, rel=1e-5), task


def test_half_precision_is_what_the_backend_computes_in(tiny_llama: Path, tasks: Path, tmp_path: Path) -> None:
    found = scored(recipe_with(tiny_llama, "text.yaml", precision="bf16"), tmp_path, model=tiny_llama)
    theirs = by_lm_eval(tiny_llama, ["text.yaml"], dtype="bfloat16")
    assert found.values["model"]["own_text"]["bits_per_byte"] == pytest.approx(
        theirs["own_text"]["bits_per_byte"], rel=1e-2
    )
