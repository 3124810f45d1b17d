"""What people and scripts get from the commands: recipes made of flags, JSON, inspect and generate."""

from __future__ import annotations

import io
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from conftest import CHATML, Cli, write_rows

QUICK = ("--set", "finetune.steps=2", "--set", "data.eval=20%")


@pytest.fixture
def tuned(cli: Cli, tiny_llama: Path, chat_rows: Path, tmp_path: Path) -> Path:
    """A run that `llmkit finetune` made of flags."""
    done = cli("finetune", "--model", tiny_llama, "--data", chat_rows, "-o", tmp_path / "tuned", *QUICK)
    assert done.code == 0, done.err
    return tmp_path / "tuned"


def test_flags_make_a_recipe_that_runs_again(tuned: Path, tiny_llama: Path, chat_rows: Path, cli: Cli) -> None:
    recipe = yaml.safe_load((tuned / "recipe.yaml").read_text())
    assert recipe["name"] == "tuned"
    assert recipe["task"] == "chat"
    assert recipe["model"] == str(tiny_llama)
    assert recipe["data"]["train"][0]["uri"] == str(chat_rows)
    assert recipe["stages"] == ["preprocess", "finetune"]
    before = (tuned / "finetune" / "model" / "model.safetensors").stat().st_mtime_ns
    for again in (
        ("run", tuned / "recipe.yaml"),
        ("run", tuned),
        ("finetune", tuned),
        ("finetune", "--model", tiny_llama, "--data", chat_rows, "-o", tuned, *QUICK),
    ):
        done = cli(*again)
        assert done.code == 0, done.err
        assert done.err.count("unchanged") == 2
        assert "running" not in done.err
    assert (tuned / "finetune" / "model" / "model.safetensors").stat().st_mtime_ns == before


def test_the_trained_run_can_be_scored_and_exported(tuned: Path, cli: Cli) -> None:
    scored = cli("evaluate", tuned, "--set", "evaluate.generate=1", "--set", "evaluate.max_new_tokens=2", "--json")
    assert scored.code == 0, scored.out
    assert {"model.loss", "parent.loss"} <= set(scored.json["metrics"])
    exported = cli("export", tuned, "--json").json
    assert (Path(exported["artifacts"]["export"]) / "transformers" / "model.safetensors").is_file()


@pytest.mark.parametrize("command", ["evaluate", "export"])
def test_flags_do_not_score_or_export_over_a_trained_run(
    command: str, tuned: Path, tiny_llama: Path, chat_rows: Path, cli: Cli
) -> None:
    refused = cli(command, "-m", tiny_llama, "-d", chat_rows, "-o", tuned)
    assert refused.code == 2
    assert f"llmkit {command} {tuned}" in refused.err


def test_json_of_finetune_has_what_scripts_rely_on(tuned: Path, cli: Cli) -> None:
    done = cli("finetune", tuned, "--json")
    found = done.json
    assert list(found) == ["status", "command", "run_dir", "seconds", "metrics", "artifacts"]
    assert (found["status"], found["command"], found["run_dir"]) == ("done", "finetune", str(tuned))
    expected = {
        *("train_loss", "eval_loss", "token_accuracy", "perplexity", "loss", "train_seconds", "train_tokens"),
        *("tokens_per_second", "peak_memory_bytes"),
    }
    assert expected <= set(found["metrics"])
    assert all(isinstance(found["metrics"][name], int | float) for name in expected)
    assert found["metrics"]["train_tokens"] > 0
    assert (Path(found["artifacts"]["model"]) / "model.safetensors").is_file()


@pytest.mark.parametrize(
    ("arguments", "code", "kind"),
    [
        (("run", "nowhere.yaml"), 2, "usage"),
        (("run", "--modle", "x"), 2, "usage"),
        (("finetune", "-m", "MODEL", "-d", "nowhere.jsonl"), 3, "data"),
        (("finetune", "-m", "nowhere", "-d", "DATA"), 4, "artifact"),
        (("generate", "nowhere", "hello"), 4, "artifact"),
        (("inspect", "-m", "MODEL", "-d", "nowhere.jsonl"), 3, "data"),
        (("finetune", "-m", "MODEL", "-d", "DATA", "-o", "DATA/run"), 5, "resource"),
        (("finetune", "-m", "MODEL", "-d", "DATA", "--set", "finetune.stpes=1"), 2, "recipe"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, tuple) else None,
)
def test_json_of_a_failure_is_one_object(
    arguments: tuple[str, ...], code: int, kind: str, cli: Cli, tiny_llama: Path, chat_rows: Path
) -> None:
    words = [word.replace("MODEL", str(tiny_llama)).replace("DATA", str(chat_rows)) for word in arguments]
    done = cli(*words, "--json")
    assert done.code == code
    found = done.json
    keys = ["status", "kind", "what", "got", "expected", "hint", "where", "exit_code"]
    assert [key for key in found if key != "problems"] == keys
    assert (found["status"], found["kind"], found["exit_code"]) == ("error", kind, code)
    assert found["what"]


def test_json_names_every_mistake(cli: Cli, tiny_llama: Path, chat_rows: Path) -> None:
    wrong = ("--set", "finetune.stpes=1", "--set", "seed=x")
    found = cli("run", "-m", tiny_llama, "-d", chat_rows, *wrong, "--json").json
    assert {problem["where"] for problem in found["problems"]} == {"--set finetune.stpes=1", "--set seed=x"}


def test_what_other_code_prints_is_no_part_of_the_result(
    tiny_llama: Path, chat_rows: Path, cli: Cli, tmp_path: Path
) -> None:
    own = tmp_path / "own.py"
    own.write_text("def loud(references, predictions):\n    print('heard')\n    return 1.0\n")
    flags = ("--set", f"evaluate.metrics=['{own}:loud']", "--set", "evaluate.generate=2", "--json")
    done = cli("evaluate", tiny_llama, "-d", chat_rows, "-o", tmp_path / "scored", *flags)
    assert done.code == 0, done.err
    assert json.loads(done.out)["status"] == "done"
    assert "heard" in done.err


def test_quiet_prints_the_result_only(tuned: Path, cli: Cli) -> None:
    done = cli("finetune", tuned, "-q")
    assert done.err == ""
    assert "train_loss" in done.out


def test_output_to_a_pipe_has_no_colour(tuned: Path, cli: Cli) -> None:
    done = cli("run", tuned, "--no-resume")
    assert "\x1b" not in done.out + done.err


def test_the_result_of_a_run_says_where_it_is_and_what_to_type_next(
    cli: Cli, tiny_llama: Path, chat_rows: Path, tmp_path: Path
) -> None:
    settings = ("--set", "evaluate.generate=1", "--set", "evaluate.max_new_tokens=2")
    done = cli("run", "-m", tiny_llama, "-d", chat_rows, "-o", tmp_path / "run", *QUICK, *settings)
    assert "held-out scores" in done.out
    assert "parent" in done.out
    assert f"llmkit generate {tmp_path / 'run'}" in done.out


def test_what_a_command_made_without_out_lies_under_runs(cli: Cli, tiny_llama: Path, chat_rows: Path) -> None:
    done = cli("preprocess", "-m", tiny_llama, "-d", chat_rows, "--json", "-q")
    assert done.json["run_dir"] == "runs/chat"
    assert (Path("runs") / "chat" / "run.json").is_file()


@pytest.mark.parametrize(
    ("rows", "task"),
    [
        ([{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}], "chat"),
        ([{"question": "a", "answer": "b"}], "chat"),
        ([{"text": "a", "label": "x"}, {"text": "b", "label": "y"}], "classify"),
        ([{"text": "some plain text"}], "text"),
    ],
)
def test_the_task_is_told_from_the_rows_and_said(
    rows: list[dict[str, Any]], task: str, cli: Cli, tiny_llama: Path, tmp_path: Path
) -> None:
    data = write_rows(tmp_path / "rows.jsonl", rows * 3)
    done = cli("finetune", "-m", tiny_llama, "-d", data, "--dry-run")
    assert done.code == 0, done.err
    assert f"task = {task} (the rows are" in done.err


@pytest.mark.parametrize("where", ["--set", "--data"])
def test_data_may_be_given_either_way(where: str, cli: Cli, tiny_llama: Path, label_rows: Path) -> None:
    data = ("--data", label_rows) if where == "--data" else ("--set", f"data.train={label_rows}")
    assert "task = classify" in cli("finetune", "-m", tiny_llama, *data, "--dry-run").err


def test_without_data_the_model_tells_the_task(cli: Cli, tiny_llama: Path, tmp_path: Path) -> None:
    done = cli("export", "-m", tiny_llama, "-o", tmp_path / "run")
    assert done.code == 0, done.err
    assert "task = chat (the model has a chat template)" in done.err


def test_pretrain_of_flags_needs_no_section(cli: Cli, tiny_llama: Path, text_rows: Path, tmp_path: Path) -> None:
    done = cli("pretrain", "-m", tiny_llama, "-d", text_rows, "-o", tmp_path / "run", "--json", "-q")
    assert done.code == 0, done.out
    assert done.json["metrics"]["steps"] > 1


def test_freeze_of_flags_shows_the_plan_without_data(cli: Cli, tiny_llama: Path, tmp_path: Path) -> None:
    done = cli("freeze", "-m", tiny_llama, "-o", tmp_path / "run", "--set", "freeze.blocks=0", "--json")
    plan = json.loads(Path(done.json["artifacts"]["freeze_plan"]).read_text())
    assert all(name.startswith("model.layers.0.") for name in plan["frozen"])
    assert "stands still" in done.err


def test_evaluate_of_flags_scores_all_rows(cli: Cli, tiny_llama: Path, chat_rows: Path, tmp_path: Path) -> None:
    settings = ("--set", "evaluate.generate=0", "--set", "evaluate.samples=0")
    done = cli("evaluate", "-m", tiny_llama, "-d", chat_rows, "-o", tmp_path / "run", *settings)
    assert done.code == 0, done.err
    assert "held-out scores over 60 examples" in done.out


def test_inspect_shows_which_tokens_are_supervised(cli: Cli, tiny_llama: Path, chat_rows: Path) -> None:
    done = cli("inspect", "-m", tiny_llama, "-d", chat_rows)
    assert done.code == 0, done.err
    assert CHATML.split("\n")[0] in done.out
    marked = done.out[done.out.index("example") :]
    assert "«<|im_end|>»" in marked
    assert marked.count("«<|im_end|>»") == 1
    assert "«The»" not in marked
    assert not Path("runs").exists()


def test_inspect_as_json_counts_and_marks(cli: Cli, tiny_llama: Path, chat_rows: Path) -> None:
    found = cli("inspect", "-m", tiny_llama, "-d", chat_rows, "--json", "-q", "-n", "2").json
    assert found["counts"]["rows read"] == 60
    assert found["counts"]["examples"] == 60
    assert found["percentiles"]["tokens"]["0"] <= found["percentiles"]["tokens"]["100"]
    assert len(found["examples"]) == 2
    for example in found["examples"]:
        assert len(example["tokens"]) == len(example["ids"]) == len(example["supervised"])
        answer = "".join(t for t, s in zip(example["tokens"], example["supervised"], strict=True) if s)
        assert answer.endswith("<|im_end|>")
        assert answer.count("<|") == 1
        assert "".join(example["tokens"]).startswith("<|im_start|>user\n")


def test_inspect_counts_what_would_be_cut_and_what_cannot_be_used(cli: Cli, tiny_llama: Path, chat_rows: Path) -> None:
    with chat_rows.open("a") as file:
        file.write('{"messages": [{"role": "user", "content": "hi"}]}\n')
    short = ("--set", "data.max_length=23")
    found = cli("inspect", "-m", tiny_llama, "-d", chat_rows, *short, "--json", "-q").json
    assert found["counts"]["rows that would be cut"] == 60
    assert found["unusable"] == [{"where": f"{chat_rows}:61", "reason": "no assistant turn"}]


def test_inspect_shows_labels(cli: Cli, tiny_bert: Path, label_rows: Path) -> None:
    done = cli("inspect", "-m", tiny_bert, "-d", label_rows)
    assert "labels     a, b, c" in done.out
    assert "label a" in done.out


def test_generate_goes_through_the_chat_template(cli: Cli, tiny_llama: Path) -> None:
    found = cli("generate", tiny_llama, "The apple", "--system", "Be brief.", "--max-new-tokens", 3, "--json").json
    assert found["prompt"] == (
        "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nThe apple<|im_end|>\n<|im_start|>assistant\n"
    )
    assert found["status"] == "done"
    plain = cli("generate", tiny_llama, "The apple", "--system", "Be brief.", "--max-new-tokens", 3)
    assert plain.out.strip() == found["answer"].strip()
    assert plain.err == ""


def test_generate_reads_standard_input(cli: Cli, tiny_llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdin", io.StringIO("The apple"))
    piped = cli("generate", tiny_llama, "--max-new-tokens", 3, "--json").json
    assert piped == cli("generate", tiny_llama, "The apple", "--max-new-tokens", 3, "--json").json


def test_generate_raw_leaves_the_text_as_it_is(cli: Cli, tiny_llama: Path) -> None:
    assert (
        cli("generate", tiny_llama, "The apple", "--raw", "--max-new-tokens", 3, "--json").json["prompt"] == "The apple"
    )


def test_generate_with_a_temperature_follows_the_seed(cli: Cli, tiny_llama: Path) -> None:
    options = ("--temperature", 1.5, "--max-new-tokens", 20, "--json")
    answers = [cli("generate", tiny_llama, "hi", *options, "--seed", seed).json["answer"] for seed in (1, 1, 2)]
    assert answers[0] == answers[1] != answers[2]


def test_generate_answers_with_the_model_of_a_run(tuned: Path, cli: Cli) -> None:
    by_run = cli("generate", tuned, "The apple", "--max-new-tokens", 3, "--json").json
    by_model = cli("generate", tuned / "finetune" / "model", "The apple", "--max-new-tokens", 3, "--json").json
    assert by_run == by_model


def test_schema_is_one_json_object_with_every_key(cli: Cli) -> None:
    found = cli("schema").json
    assert {"name", "seed", "task", "model", "stages", "data", "finetune"} <= set(found["properties"])


def test_a_closed_pipe_is_no_error(tiny_llama: Path) -> None:
    command = f"{sys.executable} -m llmkit schema | head -c 10"
    done = subprocess.run(["bash", "-c", f"set -o pipefail; {command}"], capture_output=True, text=True, check=False)
    assert "Traceback" not in done.stderr
