"""Jobs on Slurm: a batch script that can be read, kept and edited, and handed in with `sbatch`.

Before the time is up Slurm sends SIGUSR1 to the step; llmkit saves and exits with 75, and the script puts the job back
into the queue, until it is done. Nothing of a user's goes through a shell: what stands in `#SBATCH` lines is checked
against what Slurm takes, what stands in the script's body is quoted, and programs are started without a shell.
https://slurm.schedmd.com/sbatch.html
"""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

from llmkit.errors import Problem, ResourceError, UsageError
from llmkit.launch.limits import shown
from llmkit.launch.target import Job, Resources, Submitted

_WORD = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.,@:+-]*")
_CHECKS = {  # what a value may be, and how that is said
    "partition": (_WORD, "letters, digits and _ . , @ : + -"),
    "account": (_WORD, "letters, digits and _ . , @ : + -"),
    "qos": (_WORD, "letters, digits and _ . , @ : + -"),
    "constraint": (re.compile(r"[A-Za-z0-9_&|()\[\]*,.:+-]+"), "features, such as `a100&nvlink`, without spaces"),
    "memory": (re.compile(r"[0-9]{1,9}[KMGT]?"), "a size such as 64G, or 0 for all of a node's"),
}
_FLAG_OF = {"memory": "mem"}
_KEY = re.compile(r"[a-z][a-z0-9-]*")
_VALUE = re.compile(r"[A-Za-z0-9_.,:;@%+=/&|()\[\]*!~^-]*")
_OWN = {  # of sbatch, which llmkit says itself, and how
    "nodes": "--nodes", "ntasks": "--processes", "ntasks-per-node": "--processes", "gpus": "--gpus",
    "gpus-per-node": "--gpus", "gpus-per-task": "--gpus", "cpus-per-task": "--cpus", "mem": "--mem", "time": "--time",
    "partition": "--partition", "account": "--account", "qos": "--qos", "constraint": "--constraint",
    "array": "--array", "dependency": "--after", "signal": "--warning", "requeue": "--requeues",
    "no-requeue": "--requeues 0", "job-name": "the recipe's name", "output": "--out", "error": "--out", "chdir": None,
    "open-mode": None, "parsable": None, "wrap": None, "test-only": "--print", "wait": None, "batch": None,
}  # fmt: skip
_OTHERS_WAIT = 120  # seconds that the others have once one process has ended: a last checkpoint may be in hand
_ABSENT = ("unable to contact", "connection", "timed out", "could not establish", "resolve")
_IN_VAIN = (
    "PartitionNodeLimit",
    "PartitionTimeLimit",
    "PartitionConfig",
    "PartitionDown",
    "PartitionInactive",
    "BadConstraints",
    "DependencyNeverSatisfied",
)
_LAUNCHED = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
_ANSWERS_WITHIN = 120  # seconds


class Slurm:
    """Target `slurm`."""

    def check(self, job: Job) -> None:
        """Raises UsageError with everything that has no place in a batch script."""
        problems = [*_mistakes(job.resources)]
        for path in (job.folder, Path.cwd()):
            strange = sorted({c for c in str(path) if c in '"\\%\x7f' or c < " "})
            if strange:
                got = f"{path}, with {' '.join(map(repr, strange))}"
                problems.append(Problem("Slurm cannot write its log there", got, "a path without such characters"))
        if problems:
            one = problems[0] if len(problems) == 1 else Problem(f"{len(problems)} options are wrong")
            raise UsageError(
                one.what, got=one.got, expected=one.expected, hint=one.hint, where=one.where, problems=problems
            )

    def place(self, job: Job) -> Path:
        """`FOLDER/run.sbatch`."""
        return job.folder / f"{job.stage}.sbatch"

    def script(self, job: Job) -> str:
        """The batch script."""
        has = job.resources
        about = f"{len(job.works)} runs" if job.is_array else str(job.works[0].run)
        lines = [
            "#!/bin/bash",
            f"# `llmkit {job.stage}` of {_comment(about)}: edit this, and hand it in with",
            f"#     {_comment(shlex.join(['sbatch', str(self.place(job))]))}",
            *(f"#SBATCH --{option}" for option in self._options(job)),
            "",
            *self._works(job),
            "",
            *([f"export OMP_NUM_THREADS={has.cpus}"] if has.cpus else []),
            f"{self._srun(has)} \\",
            f'    {shlex.quote(sys.executable)} -m llmkit {job.stage} "$recipe" -o "$run"',
            "code=$?",
            "",
        ]
        if job.requeues:
            lines += [
                "# 75: saved, and not done yet. The same job goes on from there.",
                f'if [ "$code" -eq 75 ] && [ "${{SLURM_RESTART_COUNT:-0}}" -lt {job.requeues} ]; then',
                '    scontrol requeue "$SLURM_JOB_ID"',
                "fi",
            ]
        return "\n".join([*lines, 'exit "$code"', ""])

    def submit(self, job: Job, after: Sequence[str], each_after: str | None) -> Submitted:
        """Hands in the script with sbatch. Raises UsageError, and ResourceError when Slurm does not answer."""
        for number in after:
            _known(number)
        done = _program(["sbatch", "--parsable", *_dependencies(after, each_after), str(self.place(job))])
        if done.returncode:
            raise _refused("Slurm does not take the job", done, f"the script is kept: {self.place(job)}")
        number = done.stdout.strip().split(";")[0]
        log = str(job.folder / f"{job.stage}-{number}{'_*' if job.is_array else ''}.log")
        reasons: list[str] = []
        with suppress(ResourceError, UsageError):  # the job is Slurm's by now, whatever becomes of this question
            reasons = _program(["squeue", "--noheader", "--format=%r", f"--jobs={number}"]).stdout.split("\n")
        reason = next((word for word in reasons if word not in ("", "None")), None)
        why = f"{reason}: `scontrol show partition` tells what there is, and `scancel {number}` takes the job back"
        return Submitted(job, number, log, reason, why if reason in _IN_VAIN else None)

    def cancel(self, ids: Sequence[str]) -> None:
        """`scancel`; what it says is of no use where something else has failed before."""
        _program(["scancel", *ids])

    def by_hand(self, job: Job, after: Sequence[str], each_after: str | None) -> list[str]:
        """`sbatch` with what the script does not say: what the job waits for."""
        return ["sbatch", *_dependencies(after, each_after), str(self.place(job))]

    def waiting(self, ids: Sequence[str]) -> list[str]:
        """Those that squeue knows; none where it does not answer."""
        known = [number for number in ids if number.isdecimal()]
        found = set()
        for number in known:  # one by one: a job that Slurm has forgotten makes the whole question an error
            done = _program(["squeue", "--noheader", "--format=%F", f"--jobs={number}"])
            found |= {number} & set(done.stdout.split()) if done.returncode == 0 else set()
        return sorted(found, key=int)

    def to_follow(self, jobs: Sequence[Submitted]) -> list[tuple[list[str], str]]:
        """squeue, the log, and scancel."""
        ids, last = [job.id for job in jobs], jobs[-1]
        says = "what the first of them says" if last.job.is_array else "what llmkit says"
        return [
            (["squeue", f"--jobs={','.join(ids)}"], "what waits, and what runs"),
            (["tail", "-F", last.log.replace("_*.log", "_0.log")], says),
            (["scancel", *ids], "saves, and ends"),
        ]

    def _options(self, job: Job) -> list[str]:
        """What stands behind `#SBATCH --`."""
        has = job.resources
        numbers = "%A_%a" if job.is_array else "%j"
        options = [f"job-name={job.name}-{job.stage}", f"nodes={has.nodes}", f"ntasks-per-node={has.processes}"]
        options += [f"gpus-per-node={has.gpus}"] if has.gpus else []
        options += [f"cpus-per-task={has.cpus}"] if has.cpus else []
        for name in _CHECKS:
            value = getattr(has, name)
            options += [f"{_FLAG_OF.get(name, name)}={value}"] if value is not None else []
        options += [
            f"time={shown(has.seconds)}",
            f"signal=USR1@{has.warning}",
            "requeue" if job.requeues else "no-requeue",
            "open-mode=append",
            f"output={_in_quotes(job.folder / f'{job.stage}-{numbers}.log')}",
            f"chdir={_in_quotes(Path.cwd())}",
        ]
        if job.is_array:
            options.append(f"array=0-{len(job.works) - 1}" + (f"%{job.at_once}" if job.at_once else ""))
        return options + [key if value is None else f"{key}={value}" for key, value in has.others]

    def _works(self, job: Job) -> list[str]:
        """Which recipe, in which run."""
        if not job.is_array:
            work = job.works[0]
            return [f"recipe={shlex.quote(str(work.recipe))}", f"run={shlex.quote(str(work.run))}"]
        return [
            "recipes=(",
            *(f"    {shlex.quote(str(work.recipe))}" for work in job.works),
            ")",
            "runs=(",
            *(f"    {shlex.quote(str(work.run))}" for work in job.works),
            ")",
            "recipe=${recipes[$SLURM_ARRAY_TASK_ID]}",
            "run=${runs[$SLURM_ARRAY_TASK_ID]}",
        ]

    def _srun(self, has: Resources) -> str:
        """The step. All processes of a training save together: that one has ended is no reason to kill the others at once."""
        words = ["srun"]
        words += [f"--cpus-per-task={has.cpus}"] if has.cpus else []  # not taken over from sbatch since Slurm 22.05
        if has.nodes * has.processes > 1:
            words += ["--label", "--kill-on-bad-exit=0", f"--wait={_OTHERS_WAIT}"]
        return " ".join(words)


def _mistakes(has: Resources) -> list[Problem]:
    problems = []
    for name, (pattern, expected) in _CHECKS.items():
        value = getattr(has, name)
        if value is not None and not pattern.fullmatch(value):
            flag = f"--{_FLAG_OF.get(name, name)}"
            problems.append(Problem(f"Slurm knows no such {name}", value, expected, where=flag))
    seen: set[str] = set()
    for key, value in has.others:
        text = key if value is None else f"{key}={value}"
        if not _KEY.fullmatch(key) or not _VALUE.fullmatch(value or ""):
            expected = "an option of sbatch by its long name, such as reservation=mine, without spaces and quotes"
            problems.append(Problem("--sbatch takes KEY=VALUE or KEY", text, expected, where="--sbatch"))
        elif key in _OWN:
            own = _OWN[key]
            problems.append(Problem(f"llmkit sets {key} itself", text, hint=own and f"with {own}", where="--sbatch"))
        elif key in seen:
            problems.append(Problem(f"`{key}` is given twice", text, where="--sbatch"))
        seen.add(key)
    return problems


def _known(number: str) -> None:
    """Raises UsageError for a job that Slurm does not know: it would not be waited for."""
    done = _program(["scontrol", "--oneliner", "show", "job", number])
    if done.returncode:
        hint = "leave --after out if that job is done: Slurm forgets such jobs after a while; `squeue` shows the others"
        raise _refused(f"Slurm does not know job {number}", done, hint)


def _refused(what: str, done: subprocess.CompletedProcess[str], hint: str) -> UsageError | ResourceError:
    """What Slurm said, in its words; a Slurm that cannot be reached is no mistake of the user's."""
    said = " ".join((done.stderr or done.stdout).replace("sbatch: error: ", "").split())
    absent = any(word in said.lower() for word in _ABSENT)
    kind = ResourceError if absent else UsageError
    hint = "`scontrol ping` tells whether Slurm is there" if absent else f"`sinfo` shows partitions and nodes; {hint}"
    return kind(what, got=said or f"exit code {done.returncode}", hint=hint)


def _dependencies(after: Sequence[str], each_after: str | None) -> list[str]:
    """Options of sbatch; a job that waits for one that failed is taken out of the queue."""
    kinds = [":".join(["afterok", *after])] if after else []
    kinds += [f"aftercorr:{each_after}"] if each_after else []
    return [f"--dependency={','.join(kinds)}", "--kill-on-invalid-dep=yes"] if kinds else []


def _program(command: list[str]) -> subprocess.CompletedProcess[str]:
    """Runs a program of Slurm's, without a shell. Raises UsageError where there is none, and ResourceError for no answer."""
    env = {name: value for name, value in os.environ.items() if name not in _LAUNCHED}
    try:
        return subprocess.run(
            command, capture_output=True, text=True, timeout=_ANSWERS_WITHIN, check=False, env=env, errors="replace"
        )
    except FileNotFoundError:
        raise UsageError(
            f"there is no `{command[0]}` on this machine",
            expected="Slurm's commands on the PATH",
            hint="run this where jobs are handed in (a login node), or add --print to write the script and hand nothing in",
            where="--to slurm",
        ) from None
    except (subprocess.TimeoutExpired, OSError) as error:
        raise ResourceError(f"`{command[0]}` does not answer", got=error, hint="`sinfo` tells how Slurm is") from None


def _in_quotes(path: Path) -> str:
    """A path as an `#SBATCH` line has it; `check` has seen to the characters that quotes do not hold."""
    return f'"{path}"' if re.search(r"[^A-Za-z0-9_./%+=,:@-]", str(path)) else str(path)


def _comment(text: str) -> str:
    """Text that stays in its line."""
    return "".join(c if c >= " " and c != "\x7f" else "?" for c in text)
