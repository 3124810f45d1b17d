"""Checks every file of a run that something vouches for; it only reads, and follows nothing that leads out of the run.

A finished stage's files are vouched for by run.json, a corpus by its corpus.json, a checkpoint by its manifest.json.
"""

from __future__ import annotations

import json
import os
import re
import shlex
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from llmkit.errors import ArtifactError, ResourceError, UsageError
from llmkit.files import digest_json, read_json
from llmkit.run.checksums import Advance, Expected, compare
from llmkit.run.findings import Check, Verification
from llmkit.run.held import is_held
from llmkit.run.overview import read_recipe, read_record

_CHECKPOINT = re.compile(r"step-[0-9]+")
_ASIDE = re.compile(r"\.step-.+|unused-step-.+")
_MOST_JSON = 2**24  # bytes; more is no manifest of ours
_OUT_OF_RUN = "use this run only if you know who put it there"


def verify_run(run: Path, progress: Callable[[int], Advance] = lambda nbytes: lambda done: None) -> Verification:
    """Checks a run; `progress` is as for `compare`. Raises UsageError and ResourceError when there is no run to read."""
    if run.is_dir() and not os.access(run, os.R_OK | os.X_OK):
        raise ResourceError("the run directory cannot be read", got=run, hint="look at the permissions")
    if not (run / "run.json").exists() and not (run / "recipe.yaml").exists():
        got = f"{run} has no run.json" if run.is_dir() else f"{run} is no folder"
        raise UsageError("there is no run", got=got, expected="a run directory", hint="`llmkit runs` lists them")
    verifier = _Verifier(run)
    verifier.collect()
    verifier.compare(progress)
    return verifier.found


class _Verifier:
    """Collects first what should be there, then compares."""

    def __init__(self, run: Path) -> None:
        self.run = run
        self.real = run.resolve()
        self.name = shlex.quote(str(run))
        self.record: dict[str, Any] = {}
        self.found = Verification()
        self.headers = Check("safetensors headers")
        self.expected: list[tuple[Check, Expected, str]] = []  # with what to do about it

    def collect(self) -> None:
        """Checks what vouches for files, and notes the files."""
        self._record()
        self._recipe()
        self._log()
        for stage, entry in self.record.get("stages", {}).items():
            self._stage(stage, entry)
        for folder, names in self._walk():
            if "corpus.json" in names:
                self._corpus(folder)
            if folder.parent.name == "checkpoints" and _CHECKPOINT.fullmatch(folder.name):
                self._checkpoint(folder)
            for name in names:
                if name.endswith(".safetensors"):
                    self._header(folder / name)
        if self.headers.files or self.headers.problems:
            self.found.checks.append(self.headers)

    def compare(self, progress: Callable[[int], Advance]) -> None:
        """Compares the files with what they should be."""
        held = is_held(self.run, self.record.get("process"))
        faults = compare([expected for _, expected, _ in self.expected], progress)
        sizes = {expected.path: expected.nbytes for _, expected, _ in self.expected}
        self.found.files, self.found.nbytes = len(sizes), sum(sizes.values())
        for (check, expected, hint), fault in zip(self.expected, faults, strict=True):
            check.files += 1
            check.nbytes += expected.nbytes
            check.by_size_only += expected.sha256 is None
            if fault is not None:
                check.fault(fault.what, expected.path, fault.got, fault.expected, fault.hint or hint)
        named = {
            problem.where for check in self.found.checks if check is not self.headers for problem in check.problems
        }
        self.headers.problems[:] = [problem for problem in self.headers.problems if problem.where not in named]
        if held:
            self._forgive_deleted()
            self.found.notes.append("an llmkit is at work in the run: what it changed meanwhile may be named as damage")

    def _forgive_deleted(self) -> None:
        """Takes back what was said of checkpoints that a run at work has deleted since, for newer ones."""
        for check in self.found.checks:
            if check.problems and check.folder is not None and not check.folder.exists():
                check.problems.clear()
                check.state = "deleted meanwhile"

    def _check(self, what: str, file: Path | None = None) -> Check:
        """A new row; with a file, it is one of that file."""
        check = Check(what)
        self.found.checks.append(check)
        if file is not None and file.is_file():
            check.files, check.nbytes = 1, file.stat().st_size
        return check

    def _record(self) -> None:
        """run.json: what each stage was made from must be what its fingerprint says."""
        file = self.run / "run.json"
        check = self._check("run.json", file)
        hint = "restore it from a copy, or run the recipe again into another directory with -o"
        try:
            self.record = read_record(self.run)
        except ArtifactError as error:
            check.fault(f"run.json is damaged: {error.what}", file, error.got, "the record of a run", hint)
        for stage, entry in self.record.get("stages", {}).items():
            digest, fingerprint = _digest(entry.get("inputs")), entry.get("fingerprint")
            if digest != fingerprint:
                what = f"run.json is damaged: the inputs of {stage} are not those of its fingerprint"
                check.fault(what, file, digest, f"{fingerprint}", hint)

    def _recipe(self) -> None:
        file = self.run / "recipe.yaml"
        recipe, name = read_recipe(self.run), self.record.get("name")
        check = self._check("recipe.yaml", file)
        hint = f"delete it, and run the recipe that it came from again: `llmkit run RECIPE -o {self.name}`"
        if recipe is None:
            got = "something else" if file.exists() else "no file"
            check.fault("recipe.yaml is missing or damaged", file, got, "a mapping in YAML", hint)
        elif name is not None and recipe.get("name") != name:
            check.fault("recipe.yaml is of another run", file, f"name: {recipe.get('name')}", f"name: {name}", hint)

    def _log(self) -> None:
        """metrics.jsonl, line by line; a last line that a kill cut short is passed over by all who read it."""
        file = self.run / "metrics.jsonl"
        if not os.path.lexists(file):
            return
        check = self._check("metrics.jsonl", file)
        if (unfit := self._unfit(file)) is not None:
            check.fault("metrics.jsonl is not where it should be", file, unfit, "a file of the run", _OUT_OF_RUN)
            return
        try:
            with file.open("rb") as opened:
                found = [(n, _fault_of_line(line), line.endswith(b"\n")) for n, line in enumerate(opened, 1)]
        except OSError as error:
            check.fault("metrics.jsonl cannot be read", file, error.strerror, "permission to read it", None)
            return
        for number, fault, whole in found:
            if fault is not None and not whole:
                self.found.notes.append(f"{file}:{number} was cut short, and does not count")
            elif fault is not None:
                hint = "delete the line: those who read the log stop there. It serves for curves only"
                check.fault("a line of the log is damaged", f"{file}:{number}", fault, "stage and step", hint)

    def _stage(self, stage: str, entry: Mapping[str, Any]) -> None:
        check = self._check(stage)
        if entry.get("state") != "done":
            check.state = f"not finished ({entry.get('state')})"
            return
        hint = f"restore it from a copy, or make it again: `llmkit {stage} {self.name} --no-resume`"
        files = entry.get("files")
        if not isinstance(files, dict):
            check.fault(f"run.json names no files of {stage}", self.run / "run.json", type(files).__name__, None, hint)
            return
        for name, seal in files.items():
            sealed = isinstance(seal, dict)
            size, digest = (seal.get("bytes"), seal.get("sha256")) if sealed else (seal, None)
            self._expect(check, self.run / name, name, size, digest, hint, by_size=not sealed)

    def _corpus(self, folder: Path) -> None:
        check = self._check(f"corpus {folder.relative_to(self.run)}")
        hint = f"restore it from a copy, or make it again: `llmkit preprocess {self.name} --no-resume`"
        manifest = self._manifest(check, folder / "corpus.json", hint)
        sums = manifest.get("sha256") or {}  # which older corpora have not got
        meta = manifest.get("meta")
        identity = meta.get("identity") if isinstance(meta, dict) else None
        content = _digest([manifest.get("columns"), sums, identity])
        if sums and content != manifest.get("content"):
            what, expected = "corpus.json vouches for another corpus", str(manifest.get("content"))
            check.fault(what, folder / "corpus.json", content, expected, hint)
        for name, size in manifest.get("files", {}).items():
            digest = sums.get(name) if isinstance(sums, dict) else None
            self._expect(check, folder / name, name, size, digest, hint, by_size=sums == {})

    def _checkpoint(self, folder: Path) -> None:
        place = folder.relative_to(self.run)
        check = self._check(f"checkpoint {place}")
        check.folder = folder
        entry = self.record.get("stages", {}).get(place.parts[0], {})
        hint = f"`llmkit run {self.name}` sets it aside and goes on from the newest that is whole, or from the start"
        if place.parts[0] == "previous" or entry.get("state") == "done":
            hint = f"nothing needs it any more: delete {folder}"
        manifest = self._manifest(check, folder / "manifest.json", hint)
        if manifest and manifest.get("step") != int(folder.name.removeprefix("step-")):
            got, expected = f"step {manifest.get('step')}", f"step {int(folder.name.removeprefix('step-'))}"
            check.fault("a manifest is of another checkpoint", folder / "manifest.json", got, expected, hint)
        for name, entry in manifest.get("files", {}).items():
            values = entry if isinstance(entry, dict) else {}
            self._expect(check, folder / name, name, values.get("bytes"), values.get("sha256"), hint)

    def _manifest(self, check: Check, file: Path, hint: str) -> dict[str, Any]:
        """A JSON object that names files; empty, and a fault, when it is none."""
        problem = self._unfit(file)
        if problem is None:
            try:
                size = file.stat().st_size
                found = read_json(file) if size <= _MOST_JSON else None
                if isinstance(found, dict) and isinstance(found.get("files"), dict):
                    check.files, check.nbytes = 1, size
                    return found
                problem = f"{size:,} bytes of something else"
            except (ArtifactError, OSError, RecursionError) as error:
                problem = str(error.got if isinstance(error, ArtifactError) else error)
        check.fault(f"{file.name} is missing or damaged", file, problem, "names and checksums of files", hint)
        return {}

    def _header(self, file: Path) -> None:
        """A safetensors file whose tensors all lie within it, and none on another."""
        from safetensors import SafetensorError, safe_open

        problem = self._unfit(file)
        if problem is None:
            try:
                with safe_open(file, framework="numpy") as opened:
                    opened.keys()
            except (SafetensorError, OSError, MemoryError) as error:
                problem = str(error)
        if problem is None or not os.path.lexists(file):  # deleted meanwhile
            self.headers.files += problem is None
            return
        hint = "restore it from a copy, or make it again with the stage whose folder it lies in"
        self.headers.fault("a file is no sound safetensors file", file, problem, "tensors that lie within it", hint)

    def _expect(
        self, check: Check, path: Path, name: str, size: Any, digest: Any, hint: str, *, by_size: bool = False
    ) -> None:
        """Notes what a file should be, unless what is said of it is itself damaged."""
        if not _lies_below(name):
            check.fault("a file is named that lies outside", repr(name), name, "a name below the run", _OUT_OF_RUN)
        elif (unfit := self._unfit(path)) is not None and os.path.lexists(path):
            check.fault("a file is not where it should be", path, unfit, "a file of the run", _OUT_OF_RUN)
        elif type(size) is not int or not (by_size or isinstance(digest, str)) or size < 0:
            got = f"size {size}, SHA-256 {digest}"
            check.fault("what is said of a file is damaged", path, got, "its size and checksum", hint)
        else:
            self.expected.append((check, Expected(path, size, None if by_size else digest), hint))

    def _unfit(self, path: Path) -> str | None:
        """Why a path is not to be opened: it leads out of the run, or to something that is no file."""
        try:
            real = path.resolve()
            if not real.is_relative_to(self.real):
                return f"a link to {real}"
            return None if path.is_file() else "no regular file"
        except (OSError, RuntimeError, ValueError) as error:  # a loop of links, a name that none can have
            return str(error)

    def _walk(self) -> Iterator[tuple[Path, list[str]]]:
        """Each folder of the run with its files; what is unfinished or set aside is named and passed by."""
        links = Check("links")
        for place, folders, names in os.walk(self.run, onerror=self._unreadable):
            folder = Path(place)
            for name in sorted(folders):
                path = folder / name
                if path.is_symlink():
                    if not path.resolve().is_relative_to(self.real):
                        what, got = "a folder is a link that leads out of the run", f"a link to {path.resolve()}"
                        links.fault(what, path, got, "a folder of the run", _OUT_OF_RUN)
                elif _ASIDE.fullmatch(name) or path == self.run / "preprocess" / "work":
                    folders.remove(name)
                    why = "was set aside" if name.startswith("unused-") else "is not finished"
                    self.found.notes.append(f"{path} {why}: not checked, and not used")
            folders.sort()
            yield folder, sorted(names)
        if links.problems:
            self.found.checks.append(links)

    def _unreadable(self, error: OSError) -> None:
        check = self._check(f"folder {error.filename}")
        check.fault("a folder cannot be read", str(error.filename), error.strerror, "permission to read it", None)


def _lies_below(name: str) -> bool:
    """True for a name that stays in the folder that it is relative to, and that a file can have."""
    nameable = bool(name) and "\0" not in name and name.encode(errors="ignore").decode() == name
    return nameable and not name.startswith("/") and ".." not in name.split("/")


def _digest(value: Any) -> str | None:
    """The digest of a JSON value; None for one that cannot be written as JSON."""
    try:
        return digest_json(value)
    except (ValueError, RecursionError):
        return None


def _fault_of_line(line: bytes) -> str | None:
    """What is wrong with a line of metrics.jsonl."""
    try:
        values = json.loads(line)
    except (ValueError, RecursionError) as error:
        return str(error)
    if not isinstance(values, dict):
        return f"a {type(values).__name__}"
    sound = isinstance(values.get("stage"), str) and isinstance(values.get("step"), int)
    return None if sound else f"keys {', '.join(map(str, values))}"[:200]
