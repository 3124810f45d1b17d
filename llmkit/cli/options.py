"""The options that the stage commands share. A flag is shorthand for a recipe key."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

RecipeFile = Annotated[
    Path | None,
    typer.Argument(metavar="RECIPE", help="A recipe (YAML) or a run directory; without one, the flags make it."),
]
Model = Annotated[str | None, typer.Option("--model", "-m", help="model: folder, .gguf, hub id or pkg://PACKAGE/path")]
Data = Annotated[
    str | None, typer.Option("--data", "-d", help="data.train: file, glob, hub id, pkg:// or builtin:NAME")
]
EvalData = Annotated[str | None, typer.Option("--eval-data", help="data.eval: a URI, or a share such as 5%")]
Task = Annotated[str | None, typer.Option("--task", "-t", help="task: text, chat, classify or regress")]
Out = Annotated[Path | None, typer.Option("--out", "-o", help="The run directory [default: runs/NAME]")]
Set = Annotated[list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Any recipe key, dotted; repeatable")]
Seed = Annotated[int | None, typer.Option("--seed", help="seed: of the order of data, new weights and dropout")]
Resume = Annotated[bool, typer.Option("--resume/--no-resume", help="Go on from what is there, or start anew")]
ResumeAnyway = Annotated[
    bool,
    typer.Option(
        "--resume-anyway", help="Go on with a training whose inputs changed, with what of its checkpoint fits"
    ),
]
MaxTime = Annotated[
    str | None, typer.Option("--max-time", metavar="4h", help="max_time: save and exit with 75 within this time")
]
Gpus = Annotated[int | None, typer.Option("--gpus", help="launch.gpus: how many to use [default: all]")]
Processes = Annotated[int | None, typer.Option("--processes", help="launch.processes: where there is no GPU")]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Say what would run and why; run nothing")]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON object on standard output")]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="Print only the result and errors")]
Verbose = Annotated[bool, typer.Option("--verbose", "-v", help="Print also what the libraries say")]
