"""The commands. Nothing heavy is imported before a command runs, so that `--help` answers at once."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from llmkit import __version__
from llmkit.cli import options

app = typer.Typer(
    name="llmkit",
    help="Train, freeze, fine-tune, evaluate and export transformer models from one recipe.",
    invoke_without_command=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"]},
)

_STAGE_HELP = {
    "run": "Run all stages whose inputs changed.",
    "preprocess": "Turn rows into tokens, to train on and to hold out.",
    "pretrain": "Learn from plain text, from scratch or further.",
    "freeze": "Decide which parameters stand still.",
    "finetune": "Learn a task with a lowered learning rate.",
    "evaluate": "Score a model and its parent on held-out data.",
    "export": "Write the model for use elsewhere, and compare.",
}


def _version(wanted: bool) -> None:
    if wanted:
        sys.stdout.write(f"llmkit {__version__}\n")
        raise typer.Exit


@app.callback()
def _root(
    context: typer.Context,
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    if context.invoked_subcommand is None:
        sys.stdout.write(context.get_help() + "\n")


def _add_stage_command(name: str) -> None:
    @app.command(name, help=_STAGE_HELP[name])
    def command(
        recipe: options.RecipeFile = None,
        model: options.Model = None,
        data: options.Data = None,
        eval_data: options.EvalData = None,
        task: options.Task = None,
        out: options.Out = None,
        set_: options.Set = None,
        seed: options.Seed = None,
        resume: options.Resume = True,
        dry_run: options.DryRun = False,
        as_json: options.Json = False,
        quiet: options.Quiet = False,
        verbose: options.Verbose = False,
    ) -> None:
        from llmkit.cli.recipes import Flags
        from llmkit.cli.stages import StageCommand

        flags = Flags(recipe, model, data, eval_data, task, out, tuple(set_ or ()), seed)
        StageCommand(name, flags, resume=resume, as_json=as_json, quiet=quiet, verbose=verbose).execute(dry_run=dry_run)


for _name in _STAGE_HELP:
    if _name not in ("preprocess", "freeze"):
        _add_stage_command(_name)


@app.command(help=_STAGE_HELP["preprocess"])
def preprocess(
    recipe: options.RecipeFile = None,
    model: options.Model = None,
    data: options.Data = None,
    eval_data: options.EvalData = None,
    task: options.Task = None,
    out: options.Out = None,
    set_: options.Set = None,
    seed: options.Seed = None,
    check_leaks: Annotated[
        bool,
        typer.Option("--check-leaks", help="Show what training and held-out data, and data.benchmarks, have in common"),
    ] = False,
    resume: options.Resume = True,
    dry_run: options.DryRun = False,
    as_json: options.Json = False,
    quiet: options.Quiet = False,
    verbose: options.Verbose = False,
) -> None:
    from llmkit.cli.recipes import Flags
    from llmkit.cli.stages import StageCommand

    flags = Flags(recipe, model, data, eval_data, task, out, tuple(set_ or ()), seed)
    command = StageCommand("preprocess", flags, resume=resume, as_json=as_json, quiet=quiet, verbose=verbose)
    command.execute(dry_run=dry_run, leaks=check_leaks)


@app.command(help=_STAGE_HELP["freeze"])
def freeze(
    recipe: Annotated[
        str | None, typer.Argument(metavar="RECIPE|MODEL", help="A recipe (YAML), a run directory, or a model's URI")
    ] = None,
    model: options.Model = None,
    data: options.Data = None,
    eval_data: options.EvalData = None,
    task: options.Task = None,
    out: options.Out = None,
    set_: options.Set = None,
    seed: options.Seed = None,
    sweep: Annotated[
        bool,
        typer.Option("--sweep", help="freeze.blocks: auto: try several depths on the data, and recommend one"),
    ] = False,
    resume: options.Resume = True,
    dry_run: options.DryRun = False,
    as_json: options.Json = False,
    quiet: options.Quiet = False,
    verbose: options.Verbose = False,
) -> None:
    from llmkit.cli.recipes import Flags, recipe_or_model
    from llmkit.cli.stages import StageCommand

    path, found = recipe_or_model(recipe)
    if model and found:
        raise typer.BadParameter(f"a model is given twice: {found} and --model {model}")
    if sweep and any(text.startswith("freeze.blocks=") for text in set_ or ()):
        raise typer.BadParameter(
            "`freeze.blocks` is given twice, by --set and --sweep, which finds it out: leave one out"
        )
    settings = (*(set_ or ()), *(("freeze.blocks=auto",) if sweep else ()))
    flags = Flags(path, model or found, data, eval_data, task, out, settings, seed)
    StageCommand("freeze", flags, resume=resume, as_json=as_json, quiet=quiet, verbose=verbose).execute(dry_run=dry_run)


@app.command(help="Show rows as the model will see them, token by token.")
def inspect(
    recipe: options.RecipeFile = None,
    model: options.Model = None,
    data: options.Data = None,
    task: options.Task = None,
    set_: options.Set = None,
    examples: Annotated[int, typer.Option("--examples", "-n", min=0, help="Examples to show token by token")] = 1,
    dropped: Annotated[
        int, typer.Option("--dropped", min=0, max=20, help="Rows to show of those that each filter took out")
    ] = 3,
    diff: Annotated[
        Path | None, typer.Option("--diff", metavar="RUN", help="Compare a run's corpora with those of another")
    ] = None,
    as_json: options.Json = False,
    quiet: options.Quiet = False,
    verbose: options.Verbose = False,
) -> None:
    from llmkit.cli.inspect import inspect_command
    from llmkit.cli.recipes import Flags

    flags = Flags(recipe, model, data, None, task, None, tuple(set_ or ()), None)
    inspect_command(flags, examples=examples, dropped=dropped, diff=diff, as_json=as_json, quiet=quiet, verbose=verbose)


@app.command(help="Foretell steps, memory and time before anything is trained.")
def plan(
    recipe: options.RecipeFile = None,
    model: options.Model = None,
    data: options.Data = None,
    eval_data: options.EvalData = None,
    task: options.Task = None,
    out: options.Out = None,
    set_: options.Set = None,
    seed: options.Seed = None,
    measure: Annotated[
        bool, typer.Option("--measure", help="Take a few real steps to tell the time; keep nothing")
    ] = False,
    as_json: options.Json = False,
    quiet: options.Quiet = False,
    verbose: options.Verbose = False,
) -> None:
    from llmkit.cli.plan import plan_command
    from llmkit.cli.recipes import Flags

    flags = Flags(recipe, model, data, eval_data, task, out, tuple(set_ or ()), seed)
    plan_command(flags, measure=measure, as_json=as_json, quiet=quiet, verbose=verbose)


@app.command(help="Answer a prompt through the model's chat template.")
def generate(
    model: Annotated[str, typer.Argument(help="A model's URI or a run directory")],
    prompt: Annotated[str | None, typer.Argument(help="The prompt; standard input when absent")] = None,
    system: Annotated[str | None, typer.Option("--system", help="A system message before the prompt")] = None,
    max_new_tokens: Annotated[int, typer.Option("--max-new-tokens", min=1, help="Tokens to write at most")] = 256,
    temperature: Annotated[float, typer.Option("--temperature", min=0.0, help="0 is greedy")] = 0.0,
    top_p: Annotated[
        float, typer.Option("--top-p", min=0.0, max=1.0, help="With a temperature: nucleus sampling")
    ] = 1.0,
    raw: Annotated[bool, typer.Option("--raw", help="Continue the text as it is, without the chat template")] = False,
    seed: options.Seed = None,
    as_json: options.Json = False,
    verbose: options.Verbose = False,
) -> None:
    from llmkit.cli.generate import Sampling, generate_command

    sampling = Sampling(max_new_tokens, temperature, top_p, seed)
    generate_command(model, prompt, system, sampling, raw=raw, as_json=as_json, verbose=verbose)


@app.command(help="Print the JSON schema of a recipe: all its keys.")
def schema() -> None:
    from llmkit.cli.output import print_json
    from llmkit.recipe.schema import Recipe

    print_json(Recipe.model_json_schema())


def main() -> None:
    """The console script: runs a command and exits with its code."""
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")  # PyTorch's own switch: huge pages for large tensors on a CPU
    try:
        code: Any = app(standalone_mode=False)
    except typer.Abort:
        code = 130
    except Exception as error:
        shown = getattr(error, "format_message", None)
        if shown is None:
            raise
        code = _show_usage_error(shown())
    code = code if isinstance(code, int) else 0
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        # Taking the interpreter down can wait for ever: gloo's destructor holds the GIL while it joins a thread that
        # wants it to free a finished all-reduce (seen with PyTorch 2.13). All that matters is written by now.
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    sys.exit(code)


def _show_usage_error(message: str) -> int:
    """A mistake on the command line that Typer found."""
    from llmkit.cli.output import show_error
    from llmkit.errors import UsageError

    error = UsageError(message, hint="`llmkit --help` and `llmkit COMMAND --help` list what there is")
    show_error(error, as_json="--json" in sys.argv)
    return error.exit_code
