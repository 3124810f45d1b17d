"""`llmkit generate`: answers one prompt."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llmkit.cli.output import errors_shown, print_json
from llmkit.cli.stages import quieten_libraries
from llmkit.errors import UsageError

_WRITERS = ("CausalLM", "LMHead", "ConditionalGeneration")


@dataclass(frozen=True)
class Sampling:
    """How the next token is chosen; a temperature of 0 takes the likeliest."""

    max_new_tokens: int
    temperature: float
    top_p: float
    seed: int | None


def generate_command(
    model: str, prompt: str | None, system: str | None, sampling: Sampling, *, raw: bool, as_json: bool, verbose: bool
) -> None:
    """Writes the answer to standard output as it comes."""
    with errors_shown(as_json=as_json):
        text = prompt if prompt is not None else _standard_input()
        if not text.strip():
            raise UsageError("the prompt is empty", expected="a prompt as an argument or on standard input")
        if raw and system:
            raise UsageError(
                "--raw has no place for a system message", got="--raw --system", hint="leave one of them out"
            )
        quieten_libraries(verbose=verbose)
        from llmkit.model.generation import generate_text
        from llmkit.model.loading import load_config, load_model, load_tokenizer
        from llmkit.model.location import locate

        folder = locate(model)
        _refuse_other_kinds(load_config(folder).architectures, folder)
        tokenizer = load_tokenizer(folder)
        loaded = load_model(folder, "AutoModelForCausalLM").model.eval()
        rendered = _rendered(tokenizer, text, system, raw=raw)
        show = (lambda piece: None) if as_json else _write
        options: dict[str, Any] = vars(sampling)
        answer = generate_text(loaded, tokenizer, rendered, on_text=show, add_special_tokens=raw, **options)
        if as_json:
            print_json({"status": "done", "command": "generate", "prompt": rendered, "answer": answer})
        else:
            _write("\n")


def _refuse_other_kinds(architectures: list[str] | None, folder: Path) -> None:
    """Raises UsageError for a model whose head does not write text."""
    if architectures and not any(word in name for name in architectures for word in _WRITERS):
        raise UsageError(
            "the model does not write text",
            got=", ".join(architectures),
            expected="a causal language model",
            hint="`llmkit evaluate` scores a classifier",
            where=folder,
        )


def _rendered(tokenizer: Any, text: str, system: str | None, *, raw: bool) -> str:
    """The prompt as the model is to see it."""
    if raw:
        return text
    from llmkit.data.chat import ChatRenderer
    from llmkit.errors import RecipeError

    try:
        renderer = ChatRenderer(tokenizer)
    except RecipeError:
        raise UsageError(
            "the model has no chat template",
            expected="a model made for conversations",
            hint="--raw continues plain text",
        ) from None
    messages = [{"role": "system", "content": system}] if system else []
    try:
        return renderer.prompt([*messages, {"role": "user", "content": text}])
    except ValueError as error:
        raise UsageError("the model's chat template refuses the prompt", got=str(error)) from None


def _standard_input() -> str:
    if sys.stdin.isatty():
        raise UsageError("there is no prompt", expected="a prompt as an argument or on standard input")
    try:
        return sys.stdin.read()
    except UnicodeDecodeError as error:
        raise UsageError("standard input is not UTF-8 text", got=str(error)) from None


def _write(piece: str) -> None:
    sys.stdout.write(piece)
    sys.stdout.flush()
