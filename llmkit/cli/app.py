"""The commands. Nothing heavy is imported before a command runs, so that `--help` answers at once."""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path
from types import FrameType
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
    "evaluate": "Score any model on held-out data, against its parent or others.",
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
        resume_anyway: options.ResumeAnyway = False,
        max_time: options.MaxTime = None,
        gpus: options.Gpus = None,
        processes: options.Processes = None,
        dry_run: options.DryRun = False,
        as_json: options.Json = False,
        quiet: options.Quiet = False,
        verbose: options.Verbose = False,
    ) -> None:
        from llmkit.cli.recipes import Flags
        from llmkit.cli.stages import StageCommand

        flags = Flags(recipe, model, data, eval_data, task, out, tuple(set_ or ()), seed, max_time, gpus, processes)
        StageCommand(
            name, flags, resume=resume, anyway=resume_anyway, as_json=as_json, quiet=quiet, verbose=verbose
        ).execute(dry_run=dry_run)


for _name in _STAGE_HELP:
    if _name not in ("preprocess", "freeze", "evaluate"):
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
    resume_anyway: options.ResumeAnyway = False,
    max_time: options.MaxTime = None,
    dry_run: options.DryRun = False,
    as_json: options.Json = False,
    quiet: options.Quiet = False,
    verbose: options.Verbose = False,
) -> None:
    from llmkit.cli.recipes import Flags
    from llmkit.cli.stages import StageCommand

    flags = Flags(recipe, model, data, eval_data, task, out, tuple(set_ or ()), seed, max_time)
    command = StageCommand(
        "preprocess", flags, resume=resume, anyway=resume_anyway, as_json=as_json, quiet=quiet, verbose=verbose
    )
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
    resume_anyway: options.ResumeAnyway = False,
    max_time: options.MaxTime = None,
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
    flags = Flags(path, model or found, data, eval_data, task, out, settings, seed, max_time)
    StageCommand(
        "freeze", flags, resume=resume, anyway=resume_anyway, as_json=as_json, quiet=quiet, verbose=verbose
    ).execute(dry_run=dry_run)


@app.command(help=_STAGE_HELP["evaluate"])
def evaluate(
    recipe: Annotated[
        str | None,
        typer.Argument(
            metavar="RECIPE|MODEL",
            help="A recipe (YAML), a run directory, or a model's URI: then all rows of --data are scored",
        ),
    ] = None,
    model: options.Model = None,
    data: options.Data = None,
    eval_data: options.EvalData = None,
    against: Annotated[
        list[str] | None,
        typer.Option("--against", metavar="URI", help="evaluate.against: `parent` or another model; repeatable"),
    ] = None,
    learning_curve: Annotated[
        str | None,
        typer.Option(
            "--learning-curve", metavar="10%,50%,100%", help="Also train on shares of the data, and score each of them"
        ),
    ] = None,
    task: options.Task = None,
    out: options.Out = None,
    set_: options.Set = None,
    seed: options.Seed = None,
    resume: options.Resume = True,
    resume_anyway: options.ResumeAnyway = False,
    max_time: options.MaxTime = None,
    gpus: options.Gpus = None,
    processes: options.Processes = None,
    dry_run: options.DryRun = False,
    as_json: options.Json = False,
    quiet: options.Quiet = False,
    verbose: options.Verbose = False,
) -> None:
    from llmkit.cli.evaluate import model_to_score
    from llmkit.cli.recipes import Flags
    from llmkit.cli.stages import StageCommand

    if recipe and model and not recipe.endswith((".yaml", ".yml")):
        raise typer.BadParameter(f"a model is given twice: {recipe} and --model {model}")
    path, found, settings = model_to_score(
        recipe, bool(data or eval_data), tuple(against or ()), tuple(set_ or ()), out
    )
    flags = Flags(path, model or found, data, eval_data, task, out, settings, seed, max_time, gpus, processes)
    if learning_curve is not None:
        from llmkit.cli.crossval import SeveralRuns

        several = SeveralRuns(flags, resume, resume_anyway, as_json, quiet, verbose)
        several.learning_curve(learning_curve, dry_run=dry_run)
        return
    StageCommand(
        "evaluate", flags, resume=resume, anyway=resume_anyway, as_json=as_json, quiet=quiet, verbose=verbose
    ).execute(dry_run=dry_run)


@app.command(help="Train and score every fold of the data: mean, spread and interval of each score.")
def crossval(
    recipe: options.RecipeFile = None,
    folds: Annotated[int, typer.Option("--folds", "-k", min=2, help="Parts of data.train, each held out once")] = 5,
    model: options.Model = None,
    data: options.Data = None,
    task: options.Task = None,
    out: Annotated[
        Path | None, typer.Option("--out", "-o", help="The folder of the folds [default: runs/NAME-crossval]")
    ] = None,
    set_: options.Set = None,
    seed: options.Seed = None,
    resume: options.Resume = True,
    resume_anyway: options.ResumeAnyway = False,
    max_time: options.MaxTime = None,
    gpus: options.Gpus = None,
    processes: options.Processes = None,
    dry_run: options.DryRun = False,
    as_json: options.Json = False,
    quiet: options.Quiet = False,
    verbose: options.Verbose = False,
) -> None:
    from llmkit.cli.crossval import SeveralRuns
    from llmkit.cli.recipes import Flags

    flags = Flags(recipe, model, data, None, task, out, tuple(set_ or ()), seed, max_time, gpus, processes)
    SeveralRuns(flags, resume, resume_anyway, as_json, quiet, verbose).crossval(folds, dry_run=dry_run)


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
    nodes: Annotated[int | None, typer.Option("--nodes", min=1, help="Plan for a cluster of so many machines")] = None,
    gpus: Annotated[int | None, typer.Option("--gpus", min=1, help="GPUs in each machine of the cluster")] = None,
    gpu: Annotated[
        str | None, typer.Option("--gpu", metavar="NAME", help="The cluster's GPU: h100, a100, mi300x, ...")
    ] = None,
    network: Annotated[
        float | None, typer.Option("--network", min=0.001, metavar="GBIT", help="Gbit/s between machines, for each GPU")
    ] = None,
    tokens: Annotated[
        str | None, typer.Option("--tokens", metavar="15B", help="Tokens to train on, to tell the days they take")
    ] = None,
    as_json: options.Json = False,
    quiet: options.Quiet = False,
    verbose: options.Verbose = False,
) -> None:
    from llmkit.cli.plan import plan_command
    from llmkit.cli.recipes import Flags
    from llmkit.cli.scale import Machines

    flags = Flags(recipe, model, data, eval_data, task, out, tuple(set_ or ()), seed)
    machines = Machines(nodes, gpus, gpu, network, tokens)
    plan_command(flags, machines, measure=measure, as_json=as_json, quiet=quiet, verbose=verbose)


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


@app.command(help="Write the page of a run: what was done, whether it got better, curves, data, examples.")
def report(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="A run directory")],
    out: Annotated[
        Path | None, typer.Option("--out", "-o", metavar="FILE", help="The page [default: RUN/report.html]")
    ] = None,
    as_json: options.Json = False,
) -> None:
    from llmkit.cli.report import report_command

    report_command(run, out, as_json=as_json)


@app.command(help="Hold runs against each other: scores, losses, cost, and the recipe keys that differ.")
def compare(
    runs: Annotated[list[Path], typer.Argument(metavar="RUN RUN...", help="Run directories")],
    html: Annotated[
        Path | None, typer.Option("--html", metavar="FILE", help="Also write a page, with the curves over each other")
    ] = None,
    as_json: options.Json = False,
) -> None:
    from llmkit.cli.compare import compare_command

    compare_command(runs, html, as_json=as_json)


@app.command(help="List runs: what each is doing, whether it is alive, and how to go on.")
def runs(
    folders: Annotated[
        list[Path] | None, typer.Argument(metavar="DIR", help="Folders of runs, or runs [default: runs]")
    ] = None,
    state: Annotated[
        list[str] | None,
        typer.Option(
            "--state", help="alive, crashed, diverged, failed, stopped, partial, done, new or damaged; repeatable"
        ),
    ] = None,
    task: Annotated[str | None, typer.Option("--task", "-t", help="Only those of a task")] = None,
    model: Annotated[str | None, typer.Option("--model", "-m", help="Only those whose model's URI has this")] = None,
    sort: Annotated[
        str, typer.Option("--sort", help="active, created, name, state, step, loss or eval_loss")
    ] = "active",
    reverse: Annotated[bool, typer.Option("--reverse", "-r", help="The other way round")] = False,
    as_json: options.Json = False,
) -> None:
    from llmkit.cli.runs import Wanted, runs_command

    runs_command(tuple(folders or ()), lambda: Wanted(tuple(state or ()), task, model, sort, reverse), as_json=as_json)


@app.command(help="Check every checksum of a run: what its stages left, corpora, checkpoints.")
def verify(
    run: Annotated[Path, typer.Argument(help="A run directory")],
    as_json: options.Json = False,
    quiet: options.Quiet = False,
) -> None:
    from llmkit.cli.verify import verify_command

    verify_command(run, as_json=as_json, quiet=quiet)


@app.command(help="Hand a recipe to a cluster, as jobs that save and go on when their time is up.")
def submit(
    recipe: options.RecipeFile = None,
    to: Annotated[str, typer.Option("--to", help="The system that runs jobs: slurm")] = "",
    time: Annotated[str, typer.Option("--time", metavar="4:00:00", help="How long a job may take")] = "",
    stage: Annotated[str, typer.Option("--stage", help="A stage, or run for all of them")] = "run",
    nodes: Annotated[int, typer.Option("--nodes", min=1, help="Machines")] = 1,
    gpus: Annotated[int | None, typer.Option("--gpus", min=1, help="GPUs on each node, a process for each")] = None,
    processes: Annotated[
        int | None, typer.Option("--processes", min=1, help="Processes on each node, where there are no GPUs")
    ] = None,
    cpus: Annotated[int | None, typer.Option("--cpus", min=1, help="Cores for each process")] = None,
    mem: Annotated[str | None, typer.Option("--mem", metavar="64G", help="Memory of each node")] = None,
    partition: Annotated[str | None, typer.Option("--partition", "-p", help="Where to run")] = None,
    account: Annotated[str | None, typer.Option("--account", "-A", help="Who pays")] = None,
    qos: Annotated[str | None, typer.Option("--qos", help="Quality of service")] = None,
    constraint: Annotated[str | None, typer.Option("--constraint", "-C", help="Features that nodes must have")] = None,
    sbatch: Annotated[
        list[str] | None,
        typer.Option("--sbatch", metavar="KEY=VALUE", help="Any other option of sbatch by its long name; repeatable"),
    ] = None,
    array: Annotated[
        list[str] | None,
        typer.Option(
            "--array",
            metavar="KEY=V,V",
            help="A run for each of seed=1-5, fold=5, or values of a recipe key; repeatable, for all combinations",
        ),
    ] = None,
    at_once: Annotated[
        int | None, typer.Option("--at-once", min=1, help="Of an array, at most so many together")
    ] = None,
    after: Annotated[
        list[str] | None, typer.Option("--after", metavar="JOB", help="Start when this job is done well; repeatable")
    ] = None,
    cpu_first: Annotated[
        bool | None,
        typer.Option(
            "--cpu-first/--no-cpu-first",
            help="Preprocess in a job of its own that takes no GPUs, before the other starts [default: with --gpus]",
        ),
    ] = None,
    cpu_partition: Annotated[str | None, typer.Option("--cpu-partition", help="Where that job runs")] = None,
    warning: Annotated[
        str | None,
        typer.Option("--warning", metavar="5min", help="So long before its end a job saves [default: by the model]"),
    ] = None,
    requeues: Annotated[
        int, typer.Option("--requeues", min=0, help="How often a job that has saved goes back into the queue")
    ] = 100,
    only_print: Annotated[
        bool, typer.Option("--print", help="Write the scripts and print them; hand nothing in")
    ] = False,
    model: options.Model = None,
    data: options.Data = None,
    eval_data: options.EvalData = None,
    task: options.Task = None,
    out: options.Out = None,
    set_: options.Set = None,
    seed: options.Seed = None,
    as_json: options.Json = False,
    quiet: options.Quiet = False,
    verbose: options.Verbose = False,
) -> None:
    from functools import partial

    from llmkit.cli.recipes import Flags
    from llmkit.cli.submit import submit_command
    from llmkit.launch.jobs import Asked

    flags = Flags(recipe, model, data, eval_data, task, out, tuple(set_ or ()), seed)
    ask = partial(
        Asked,
        to=to,
        stage=stage,
        nodes=nodes,
        gpus=gpus,
        processes=processes,
        time=time,
        warning=warning,
        cpus=cpus,
        memory=mem,
        partition=partition,
        account=account,
        qos=qos,
        constraint=constraint,
        others=tuple(sbatch or ()),
        arrays=tuple(array or ()),
        at_once=at_once,
        after=tuple(after or ()),
        cpu_first=cpu_first,
        cpu_partition=cpu_partition,
        requeues=requeues,
    )
    submit_command(flags, ask, only_print=only_print, as_json=as_json, quiet=quiet, verbose=verbose)


@app.command(help="Under srun or torchrun: see that all processes fit together, and how fast they talk.")
def probe(
    within: Annotated[str, typer.Option("--within", metavar="2min", help="So long they wait for each other")] = "2min",
    as_json: options.Json = False,
) -> None:
    from llmkit.cli.probe import probe_command

    probe_command(within, as_json=as_json)


@app.command(help="Print the JSON schema of a recipe: all its keys.")
def schema() -> None:
    from llmkit.cli.output import print_json
    from llmkit.recipe.schema import Recipe

    print_json(Recipe.model_json_schema())


def main() -> None:
    """The console script: runs a command and exits with its code."""
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")  # PyTorch's own switch: huge pages for large tensors on a CPU
    # libgomp's own: threads that wait give their core away after half a millisecond, a tenth of what they do unasked. On a
    # busy machine they else hold up those they wait for; much less, and training on an idle one is a fifth slower.
    os.environ.setdefault("GOMP_SPINCOUNT", "30000")
    launched = not {"SLURM_STEP_ID", "RANK", "WORLD_SIZE"}.isdisjoint(os.environ)
    if launched and sys.argv[1:2] and sys.argv[1] in (*_STAGE_HELP, "crossval", "probe"):
        _take_place()
    if sys.argv[1:2] and sys.argv[1] in (*_STAGE_HELP, "crossval"):
        for number in (signal.SIGTERM, signal.SIGUSR1):
            signal.signal(number, _stop_at_once)
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
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the code is known: one more Ctrl-C changes nothing
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        # Taking the interpreter down can wait for ever: gloo's destructor holds the GIL while it joins a thread that
        # wants it to free a finished all-reduce (seen with PyTorch 2.13). All that matters is written by now.
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    sys.exit(code)


def _stop_at_once(number: int, frame: FrameType | None) -> None:
    """Ends a command that has nothing to save while no stage runs, and may be in the middle of an import."""
    os.write(2, f"llmkit: stopped by {signal.Signals(number).name}; run the same command again to go on\n".encode())
    os._exit(75)


def _take_place() -> None:
    """Takes this process's place among others from Slurm or what another launcher has set; exits when that makes no sense."""
    from llmkit.errors import UsageError
    from llmkit.launch.surroundings import check_place, recognise

    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")  # PyTorch's own: no warning for each try to connect
    try:
        recognise()
        check_place()
    except UsageError as error:
        from llmkit.cli.output import show_error

        show_error(error, as_json="--json" in sys.argv)
        sys.exit(error.exit_code)


def _show_usage_error(message: str) -> int:
    """A mistake on the command line that Typer found."""
    from llmkit.cli.output import show_error
    from llmkit.errors import UsageError

    error = UsageError(message, hint="`llmkit --help` and `llmkit COMMAND --help` list what there is")
    show_error(error, as_json="--json" in sys.argv)
    return error.exit_code
