"""Checkpoints: written aside, synced, read back, given a manifest with checksums, and renamed into place.

A checkpoint holds the trainable weights (the frozen ones are the parent's, which the fingerprint pins), the optimizer's
state, the training state, the random state of each process, and the best weights so far. Nothing is pickled. Where weights
are spread over processes, each writes its rows, `weights-00001-of-00008.safetensors`; any number of processes reads them.

    checkpoints/step-00000120/           published: whole, or damaged after it was written
    checkpoints/.step-00000120.PID.tmp   being written, or left by a process that was killed
    checkpoints/.step-00000120.PID.old   one that another takes the place of; put back if that did not happen
    checkpoints/unused-step-00000120/    set aside, because it was damaged or of other inputs
"""

from __future__ import annotations

import os
import re
import shutil
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, TypeVar

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from llmkit import __version__
from llmkit.errors import ArtifactError, ResourceError
from llmkit.files import digest_file, json_text, link_file, read_json, sync_file, sync_folder, write_json

FORMAT = 1
BEST, MANIFEST, STATE = "best.safetensors", "manifest.json", "state.json"
_TENSORS = ("weights", "optimizer")
_NAME = re.compile(r"step-\d{8,18}", re.ASCII)
_MANIFEST_BYTES = 2**20  # more is no manifest of ours
_Given = TypeVar("_Given")


@dataclass(frozen=True)
class Checkpoint:
    """What is needed to go on as if nothing had happened; `best_weights` is a safetensors file, None when there is none."""

    weights: Mapping[str, torch.Tensor]
    optimizer_tensors: Mapping[str, torch.Tensor]
    optimizer_values: dict[str, Any]
    state: dict[str, Any]
    best_weights: Path | None = None
    fingerprint: str = ""
    step: int = 0

    def copied(self, before: Checkpoint | None = None) -> Checkpoint:
        """The same with tensors of its own, which training does not change: those of a copy from `before`, where they fit.

        Memory that was never touched is several times slower to write to.
        """
        old = ({}, {}) if before is None else (before.weights, before.optimizer_tensors)
        weights, moments = (
            {name: _copy(tensor, into.get(name)) for name, tensor in tensors.items()}
            for tensors, into in zip((self.weights, self.optimizer_tensors), old, strict=True)
        )
        return replace(self, weights=weights, optimizer_tensors=moments)

    def outlined(self) -> Checkpoint:
        """The same with meta tensors."""
        weights, moments = (
            tensors.outlined() if isinstance(tensors, _Rows) else {n: t.to("meta") for n, t in tensors.items()}
            for tensors in (self.weights, self.optimizer_tensors)
        )
        return replace(self, weights=weights, optimizer_tensors=moments)


class _Rows(Mapping[str, torch.Tensor]):
    """Tensors by name whose rows lie in several files, in this order; one is put together when it is asked for."""

    def __init__(self, files: Sequence[Mapping[str, torch.Tensor]]) -> None:
        self.files = files
        self._names = dict.fromkeys(name for file in files for name in file)

    def __getitem__(self, name: str) -> torch.Tensor:
        parts = [file[name] for file in self.files if name in file]
        if not parts:
            raise KeyError(name)
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)

    def unfit(self) -> Iterator[str]:
        """The names of those whose parts are no rows of one tensor."""
        for name in self._names:
            shapes = {
                (tensor.dtype, *tensor.shape[1:]) for file in self.files if (tensor := file.get(name)) is not None
            }
            scalars = [file for file in self.files if name in file and not file[name].ndim]
            if len(shapes) > 1 or (scalars and sum(name in file for file in self.files) > 1):
                yield name

    def outlined(self) -> _Rows:
        """The same as meta tensors."""
        return _Rows([{name: tensor.to("meta") for name, tensor in file.items()} for file in self.files])


@dataclass(frozen=True)
class Writers:
    """The processes that write a checkpoint together, each its rows; `exchange` gives all of them what each has."""

    number: int = 0
    count: int = 1
    exchange: Callable[[Any], list[Any]] = lambda own: [own]

    @property
    def leads(self) -> bool:
        """True in the process that writes what is not rows, and publishes."""
        return self.number == 0

    def agree(self, work: Callable[[], _Given]) -> list[_Given]:
        """What each process's work gives; where it fails in one, that raises its error and the others OSError."""
        given: _Given | None = None
        failure: Exception | None = None
        try:
            given = work()
        except Exception as error:
            failure = error
        found = self.exchange((given, None if failure is None else str(failure) or type(failure).__name__))
        if failure is not None:
            raise failure
        for number, (_, why) in enumerate(found):
            if why is not None:
                raise OSError(f"process {number}: {why}")
        return [result for result, _ in found]


@dataclass
class Checkpoints:
    """The checkpoints of one training, in `folder`. One process writes, or all `writers` call these methods; all may read.

    The newest `keep` stay, each whose step is a multiple of `keep_every`, and the newest at a step to roll back to. An older
    one goes once a newer one is published, synced and read back.
    """

    folder: Path
    fingerprint: str
    keep: int = 2
    keep_every: int | None = None
    accepted: Sequence[str] = ()  # fingerprints of other inputs whose checkpoints may be read
    is_anchor: Callable[[int], bool] = lambda step: False  # steps to roll back to
    writers: Writers = Writers()
    seconds: float = 0.0  # that the slowest so far took to write
    _writer: threading.Thread | None = field(default=None, init=False)
    _failure: BaseException | None = field(default=None, init=False)

    def rehearse(self, nbytes: int) -> None:
        """Publishes, reads and deletes a checkpoint without tensors. Raises ResourceError when that or so many bytes fail."""
        place = self.folder / ".step-rehearsal"
        try:
            trial = Checkpoints(place, self.fingerprint, writers=self.writers)
            trial.write(0, Checkpoint({}, {}, {}, {}))
            if not self.writers.leads:
                return
            whole = trial.newest(lambda text: None) is not None
            shutil.rmtree(place)
            free = shutil.disk_usage(self.folder).free
        except (OSError, SafetensorError) as error:
            raise ResourceError(
                "checkpoints cannot be written",
                got=str(error),
                expected="a folder to write to",
                hint="free some space, look at the permissions, or choose another -o",
                where=self.folder,
            ) from None
        if not whole:
            raise ResourceError("what is written here cannot be read again", got="other bytes", where=self.folder)
        wanted = (min(self.keep, 2) + 1) * nbytes  # one that is being written beside those that are kept
        if free + self._used() < wanted:
            raise ResourceError(
                "there is not enough disk space for checkpoints",
                got=f"{free / 1e9:,.2f} GB",
                expected=f"{wanted / 1e9:,.2f} GB: {min(self.keep, 2)} checkpoints, and one that is being written",
                hint="free some space, choose another -o, or set keep_checkpoints: 1",
                where=self.folder,
            )

    def write(self, step: int, checkpoint: Checkpoint, before: Callable[[], None] = lambda: None) -> Path:
        """Publishes `step-XXXXXXXX` and then deletes those that need not be kept. Raises OSError and SafetensorError.

        What comes `before` has to work where the process leads.
        """
        self.wait()
        return self._publish(self._begin(step, checkpoint.best_weights, before), step, checkpoint)

    def write_behind(self, step: int, checkpoint: Checkpoint, before: Callable[[], None] = lambda: None) -> None:
        """The same in a thread, from tensors that no one changes; what fails there is raised by `wait`."""
        self.wait()
        aside = self._begin(step, checkpoint.best_weights, before)

        def work() -> None:
            try:
                self._publish(aside, step, checkpoint)
            except BaseException as error:
                self._failure = error

        # Not one of a pool, for whose threads the interpreter waits: a second Ctrl-C ends it in the middle of a file.
        self._writer = threading.Thread(target=work, name="llmkit-checkpoint", daemon=True)
        self._writer.start()

    @property
    def is_writing(self) -> bool:
        """True while a checkpoint is written behind."""
        return self._writer is not None and self._writer.is_alive()

    def wait(self) -> bool:
        """Waits for what is written behind; True when there was anything. Raises what made it fail, once."""
        writer, self._writer = self._writer, None
        if writer is not None:
            writer.join()
        failure, self._failure = self._failure, None
        if failure is not None:
            raise failure
        return writer is not None

    def newest(
        self,
        warn: Callable[[str], None],
        check: Callable[[Checkpoint], None] = lambda found: None,
        *,
        anchors: bool = False,
        sets_aside: bool = True,
    ) -> Checkpoint | None:
        """The newest checkpoint whose checksums hold and that passes `check`, or None; of anchors only, if wanted.

        One that is damaged, of other inputs, or refused with ArtifactError is set aside and named to `warn`, and the one
        before it is taken; without `sets_aside` the error is raised: another process has found it whole.
        """
        if sets_aside:
            self._put_back()
        for path in published(self.folder):
            if anchors and not self.is_anchor(step_of(path)):
                continue
            try:
                found = self._read(path)
                check(found)
            except ArtifactError as error:
                if not sets_aside:
                    raise
                aside = path.with_name(f"unused-{path.name}")
                why = ": ".join(text for text in (error.what, error.got) if text)
                warn(f"checkpoint {path} is not used ({why}); it was moved to {aside.name}")
                _remove(aside)
                path.rename(aside)
            else:
                return found
        return None

    def _begin(self, step: int, best: Path | None, before: Callable[[], None]) -> Path:
        """A folder to write into, with the best weights as they are at this moment."""

        def lead() -> Path:
            before()
            return self._aside(step, best)

        return self.writers.agree(lead if self.writers.leads else Path)[0]

    def _aside(self, step: int, best: Path | None) -> Path:
        self._put_back()
        for unfinished in self.folder.glob(".step-*"):  # of a process that was killed
            _remove(unfinished)
        aside = self.folder / f".step-{step:08d}.{os.getpid()}.tmp"
        aside.mkdir(parents=True)
        try:
            if best is not None:
                link_file(best, aside / BEST)
                if not best.samefile(aside / BEST) and digest_file(best) != digest_file(aside / BEST):
                    raise OSError(f"{BEST} reads as other bytes than were written")
        except OSError:
            _remove(aside)
            raise
        return aside

    def _publish(self, aside: Path, step: int, checkpoint: Checkpoint) -> Path:
        started, target = time.monotonic(), self.folder / f"step-{step:08d}"
        try:
            parts = self.writers.agree(lambda: self._write_tensors(aside, checkpoint))
            self.writers.agree(lambda: self._finish(aside, target, checkpoint, parts) if self.writers.leads else None)
        except BaseException:
            if self.writers.leads:
                shutil.rmtree(aside, ignore_errors=True)  # a full disk gets its space back
            raise
        self.seconds = max(self.seconds, time.monotonic() - started)
        return target

    def _write_tensors(self, aside: Path, checkpoint: Checkpoint) -> dict[str, Any]:
        """Writes this process's rows; gives what the manifest says of their files."""
        entries = {}
        for kind, tensors in zip(_TENSORS, (checkpoint.weights, checkpoint.optimizer_tensors), strict=True):
            name = _names(kind, self.writers.count)[self.writers.number]
            save_file(dict(tensors), aside / name)
            sync_file(aside / name)
            if not _same(_load(aside / name), tensors):
                raise OSError(f"{name} reads as other numbers than were written")
            entries[name] = _entry(aside / name)
        return entries

    def _finish(self, aside: Path, target: Path, checkpoint: Checkpoint, parts: list[dict[str, Any]]) -> None:
        """Writes what is not rows, and puts all of it into its place."""
        state = {"optimizer": checkpoint.optimizer_values, "train": checkpoint.state}
        write_json(aside / STATE, state)
        if (aside / STATE).read_text(encoding="utf-8") != json_text(state):
            raise OSError(f"{STATE} reads as another text than was written")
        if (aside / BEST).exists():
            _load(aside / BEST)  # these may be the only copy
            sync_file(aside / BEST)
        files = {name: entry for part in parts for name, entry in part.items()}
        files |= {name: _entry(aside / name) for name in (BEST, STATE) if (aside / name).exists()}
        about = {"format": FORMAT, "llmkit": __version__, "step": step_of(target), "fingerprint": self.fingerprint}
        write_json(aside / MANIFEST, about | {"files": files})
        if target.exists():
            target.rename(aside.with_suffix(".old"))
        aside.rename(target)
        sync_folder(self.folder)
        _remove(aside.with_suffix(".old"))
        self.prune()

    def prune(self) -> None:
        """Deletes the checkpoints that need not be kept."""
        there = published(self.folder)
        anchor = next((path for path in there if self.is_anchor(step_of(path))), None)
        for old in there[self.keep :]:
            if old != anchor and (self.keep_every is None or step_of(old) % self.keep_every):
                doomed = old.with_name(f".{old.name}.{os.getpid()}.tmp")
                old.rename(doomed)
                shutil.rmtree(doomed)

    def _put_back(self) -> None:
        """Undoes a replacement that a kill cut in two."""
        for old in self.folder.glob(".step-*.old"):
            target = self.folder / old.name.split(".")[1]
            if not target.exists():
                old.rename(target)

    def _used(self) -> int:
        return sum(path.stat().st_size for path in self.folder.rglob("*") if path.is_file())

    def _read(self, path: Path) -> Checkpoint:
        """Checks a checkpoint against its manifest and reads it. Raises ArtifactError."""
        manifest = checked_manifest(path)
        fingerprint = manifest.get("fingerprint")
        if fingerprint not in (self.fingerprint, *self.accepted):
            raise ArtifactError("it belongs to other inputs", got=fingerprint, expected=self.fingerprint)
        state = read_json(path / STATE)
        if not (isinstance(state, dict) and all(isinstance(state.get(key), dict) for key in ("optimizer", "train"))):
            raise ArtifactError("its state is no state of a training", where=path / STATE)
        try:
            weights, optimizer = (
                _Rows([load_file(path / name) for name in _names(kind, _parts(manifest["files"]))]) for kind in _TENSORS
            )
        except (SafetensorError, MemoryError) as error:
            raise ArtifactError("a file is no safetensors file", got=str(error), where=path) from None
        for file in (*weights.files, *optimizer.files):
            for name, tensor in file.items():
                if tensor.is_floating_point() and not torch.isfinite(tensor).all():
                    raise ArtifactError("numbers in it are not finite", got=name, where=path)
        for name in (*weights.unfit(), *optimizer.unfit()):
            raise ArtifactError("its rows in several files do not go together", got=name, where=path)
        best = path / BEST if BEST in manifest["files"] else None
        return Checkpoint(weights, optimizer, state["optimizer"], state["train"], best, fingerprint, step_of(path))


def published(folder: Path) -> list[Path]:
    """The published checkpoints of a folder, newest first."""
    named = (path for path in folder.glob("step-*") if _NAME.fullmatch(path.name))
    return sorted((path for path in named if path.is_dir() and not path.is_symlink()), key=step_of, reverse=True)


def step_of(path: Path) -> int:
    """The step of a published checkpoint."""
    return int(path.name.removeprefix("step-"))


def _names(kind: str, parts: int) -> list[str]:
    """The files of weights or moments, of which each of so many processes wrote a part."""
    if parts == 1:
        return [f"{kind}.safetensors"]
    return [f"{kind}-{part:05d}-of-{parts:05d}.safetensors" for part in range(1, parts + 1)]


def _parts(files: Mapping[str, Any]) -> int:
    """How many processes wrote a checkpoint of such files, if it is one."""
    return max(1, len(files.keys() - {BEST, STATE}) // len(_TENSORS))


def _entry(file: Path) -> dict[str, Any]:
    return {"bytes": file.stat().st_size, "sha256": digest_file(file)}


def checked_manifest(path: Path) -> dict[str, Any]:
    """The manifest of a checkpoint whose files are those that it names, byte for byte. Raises ArtifactError."""
    file = path / MANIFEST
    if file.is_symlink() or not file.is_file() or file.stat().st_size > _MANIFEST_BYTES:
        raise ArtifactError("it has no manifest", got="no file of less than a megabyte", where=file)
    manifest = read_json(file)
    known = manifest if isinstance(manifest, dict) else {}
    if type(known.get("format")) is not int or known["format"] != FORMAT:
        made_by = f"format {known.get('format')} of llmkit {known.get('llmkit')}"
        raise ArtifactError("another checkpoint format", got=made_by[:200], expected=f"format {FORMAT}", where=path)
    if known.get("step") != step_of(path):
        raise ArtifactError("it is of another step than its name says", got=str(known.get("step"))[:100], where=path)
    files = known.get("files")
    if not isinstance(files, dict) or set(files) - {BEST} != {
        STATE,
        *(name for kind in _TENSORS for name in _names(kind, _parts(files))),
    }:
        raise ArtifactError("its manifest names other files", got=str(files)[:200], where=path)
    for name, entry in files.items():
        part = path / name
        if not isinstance(entry, dict):
            raise ArtifactError("its manifest is damaged", got=str(entry)[:100], where=path)
        if part.is_symlink() or not part.is_file() or part.stat().st_size != entry.get("bytes"):
            raise ArtifactError("a file is cut short or missing", got=name, where=path)
        if digest_file(part) != entry.get("sha256"):
            raise ArtifactError("a checksum does not hold", got=name, where=path)
    return known


def _copy(tensor: torch.Tensor, into: torch.Tensor | None) -> torch.Tensor:
    fits = into is not None and (into.shape, into.dtype) == (tensor.shape, tensor.dtype)
    return into.copy_(tensor) if into is not None and fits else tensor.clone()


def _load(path: Path) -> dict[str, torch.Tensor]:
    """Raises OSError for all that a disk can do; PyTorch raises RuntimeError when there are no file handles left."""
    try:
        return load_file(path)
    except (SafetensorError, RuntimeError) as error:
        raise OSError(f"{path.name} cannot be read again: {error}") from None


def _same(found: Mapping[str, torch.Tensor], given: Mapping[str, torch.Tensor]) -> bool:
    """True for the same names and bits."""

    def bits(tensor: torch.Tensor) -> torch.Tensor:
        return tensor.contiguous().reshape(-1).view(torch.uint8)

    def pairs() -> Iterator[bool]:
        for name, tensor in given.items():
            other = found[name]
            yield (other.dtype, other.shape) == (tensor.dtype, tensor.shape) and torch.equal(bits(other), bits(tensor))

    return found.keys() == given.keys() and all(pairs())


def _remove(path: Path) -> None:
    """Deletes a file or folder that may not be there."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
