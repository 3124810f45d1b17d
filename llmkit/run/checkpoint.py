"""Checkpoints: written aside, synced, given a manifest with checksums, and renamed into place.

A checkpoint holds the trainable weights (the frozen ones are the parent's, which the fingerprint pins), the optimizer's
state, the training state, the random state of each process, and the best weights so far. Nothing is pickled.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from llmkit.errors import ArtifactError
from llmkit.files import digest_file, read_json, sync_folder, write_json

FORMAT = 1


@dataclass(frozen=True)
class Checkpoint:
    """What is needed to go on as if nothing had happened; `best_weights` is a safetensors file, None when there is none."""

    weights: dict[str, torch.Tensor]
    optimizer_tensors: dict[str, torch.Tensor]
    optimizer_values: dict[str, Any]
    state: dict[str, Any]
    best_weights: Path | None = None


def write_checkpoint(folder: Path, step: int, fingerprint: str, checkpoint: Checkpoint, *, keep: int) -> Path:
    """Publishes `folder/step-XXXXXXXX` and then deletes all but the newest `keep`. One process calls it."""
    target = folder / f"step-{step:08d}"
    aside = folder / f".{target.name}.{os.getpid()}.tmp"
    for unfinished in folder.glob(".step-*"):  # of a process that was killed
        shutil.rmtree(unfinished)
    aside.mkdir(parents=True)
    save_file(checkpoint.weights, aside / "weights.safetensors")
    save_file(checkpoint.optimizer_tensors, aside / "optimizer.safetensors")
    if checkpoint.best_weights is not None:
        link_file(checkpoint.best_weights, aside / "best.safetensors")
    write_json(aside / "state.json", {"optimizer": checkpoint.optimizer_values, "train": checkpoint.state})
    for path in aside.iterdir():
        _sync_file(path)
    files = {p.name: {"bytes": p.stat().st_size, "sha256": digest_file(p)} for p in sorted(aside.iterdir())}
    write_json(aside / "manifest.json", {"format": FORMAT, "step": step, "fingerprint": fingerprint, "files": files})
    if target.exists():
        shutil.rmtree(target)
    aside.rename(target)
    sync_folder(folder)
    for old in _published(folder)[keep:]:
        doomed = old.with_name(f".{old.name}.{os.getpid()}.old")
        old.rename(doomed)
        shutil.rmtree(doomed)
    return target


def link_file(source: Path, target: Path) -> None:
    """Puts a file in the place of another, in one step; as a second name for the same bytes where the disk can do that."""
    aside = target.with_name(f".{target.name}.{os.getpid()}.tmp")
    aside.unlink(missing_ok=True)
    try:
        os.link(source, aside)
    except OSError:
        shutil.copyfile(source, aside)
    aside.replace(target)


def read_newest(folder: Path, fingerprint: str, warn: Callable[[str], None]) -> Checkpoint | None:
    """The newest checkpoint whose checksums hold, or None.

    One that is damaged or of other inputs is set aside and named to `warn`, and the one before it is taken.
    """
    for path in _published(folder):
        try:
            return _read(path, fingerprint)
        except ArtifactError as error:
            aside = path.with_name(f"unused-{path.name}")
            warn(f"checkpoint {path} is not used ({error.what}: {error.got}); it was moved to {aside.name}")
            if aside.exists():
                shutil.rmtree(aside)
            path.rename(aside)
    return None


def optimizer_to_parts(optimizer: torch.optim.Optimizer) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """An optimizer's state as named tensors and JSON values: `3.exp_avg` is of parameter number 3."""
    state = optimizer.state_dict()
    tensors, values = {}, {}
    for number, entries in state["state"].items():
        for key, value in entries.items():
            if isinstance(value, torch.Tensor):
                tensors[f"{number}.{key}"] = value.detach().cpu().contiguous()
            else:
                values[f"{number}.{key}"] = value
    groups = [{k: v for k, v in group.items() if not isinstance(v, torch.Tensor)} for group in state["param_groups"]]
    return tensors, {"state": values, "groups": groups}


def optimizer_from_parts(
    optimizer: torch.optim.Optimizer, tensors: dict[str, torch.Tensor], values: dict[str, Any]
) -> None:
    """Puts back what `optimizer_to_parts` took."""
    state: dict[int, dict[str, Any]] = {}
    for name, value in [*tensors.items(), *values["state"].items()]:
        number, _, key = name.partition(".")
        state.setdefault(int(number), {})[key] = value
    now = optimizer.state_dict()["param_groups"]
    groups = [current | saved for current, saved in zip(now, values["groups"], strict=True)]
    optimizer.load_state_dict({"state": state, "param_groups": groups})


def _read(path: Path, fingerprint: str) -> Checkpoint:
    """Checks a checkpoint against its manifest and reads it. Raises ArtifactError."""
    manifest = read_json(path / "manifest.json")
    if manifest.get("format") != FORMAT:
        raise ArtifactError("another checkpoint format", got=manifest.get("format"), expected=str(FORMAT), where=path)
    if manifest.get("fingerprint") != fingerprint:
        raise ArtifactError("it belongs to other inputs", got=manifest.get("fingerprint"), expected=fingerprint)
    expected = {"weights.safetensors", "optimizer.safetensors", "state.json"}
    if set(manifest.get("files", {})) - {"best.safetensors"} != expected:
        raise ArtifactError("its manifest names other files", got=sorted(manifest.get("files", {})), where=path)
    for name, entry in manifest["files"].items():
        file = path / name
        if not file.is_file() or file.stat().st_size != entry.get("bytes"):
            raise ArtifactError("a file is cut short or missing", got=name, where=path)
        if digest_file(file) != entry.get("sha256"):
            raise ArtifactError("a checksum does not hold", got=name, where=path)
    state = read_json(path / "state.json")
    try:
        weights = load_file(path / "weights.safetensors")
        optimizer = load_file(path / "optimizer.safetensors")
    except SafetensorError as error:
        raise ArtifactError("a file is damaged", got=str(error), where=path) from None
    best = path / "best.safetensors" if "best.safetensors" in manifest["files"] else None
    return Checkpoint(weights, optimizer, state["optimizer"], state["train"], best)


def _published(folder: Path) -> list[Path]:
    """The published checkpoints of a folder, newest first."""
    return sorted(folder.glob("step-*"), reverse=True)


def _sync_file(path: Path) -> None:
    with path.open("rb") as file:
        os.fsync(file.fileno())
