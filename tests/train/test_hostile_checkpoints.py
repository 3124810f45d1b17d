"""A checkpoint that somebody made up: whatever is in it, it is refused by name, and the one before it is used.

Its checksums are right: who can write files can write a manifest.
"""

from __future__ import annotations

import copy
import json
import os
import pickle
import signal
import struct
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from fitting import logged, make_fit, one_thread, same_bits, weights_of
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from killing import KilledError, build, corpora, kill  # noqa: F401  (fixtures are among them)
from safetensors.torch import load_file, save_file

from llmkit.data.corpus import Corpus
from llmkit.files import digest_file
from llmkit.train.loop import Fit

_one_thread = pytest.fixture(autouse=True)(one_thread)
WAY: dict[str, Any] = {"eval_every": 1, "save_every": 1, "steps": 6}
WEIGHTS, OPTIMIZER, BEST = "weights.safetensors", "optimizer.safetensors", "best.safetensors"


def killed(folder: Path, corpora: tuple[Corpus, Corpus]) -> Path:
    """A training with checkpoints of step 3 and 4; gives the newest."""
    from fitting import Recorder

    fit = make_fit(folder, *corpora, **WAY)
    with pytest.raises(KilledError):
        fit.run([Recorder({5: kill})])
    return folder / "checkpoints" / "step-00000004"


def reseal(path: Path, **changes: Any) -> None:
    """Writes a manifest whose checksums hold."""
    manifest = json.loads((path / "manifest.json").read_text())
    manifest["files"] = {
        file.name: {"bytes": file.stat().st_size, "sha256": digest_file(file)}
        for file in path.iterdir()
        if file.name != "manifest.json"
    }
    (path / "manifest.json").write_text(json.dumps(manifest | changes))


def edit(name: str, change: Callable[[dict[str, torch.Tensor]], Any]) -> Callable[[Path], None]:
    """Changes the tensors of a file."""

    def make(path: Path) -> None:
        tensors = dict(load_file(path / name))
        change(tensors)
        (path / name).unlink()
        save_file(tensors, path / name)
        reseal(path)

    return make


def state(*keys: str | int, value: Any) -> Callable[[Path], None]:
    """Puts a value into state.json; `...` deletes what is there."""

    def make(path: Path) -> None:
        document = json.loads((path / "state.json").read_text())
        _put(document, list(keys), value)
        (path / "state.json").write_text(json.dumps(document))
        reseal(path)

    return make


def manifest(*keys: str | int, value: Any) -> Callable[[Path], None]:
    """Puts a value into manifest.json."""

    def make(path: Path) -> None:
        document = json.loads((path / "manifest.json").read_text())
        _put(document, list(keys), value)
        (path / "manifest.json").write_text(json.dumps(document))

    return make


def _put(document: Any, keys: list[str | int], value: Any) -> None:
    for key in keys[:-1]:
        document = document[key]
    if value is ...:
        del document[keys[-1]]
    else:
        document[keys[-1]] = value


class Exploit:
    """What a pickle runs when it is loaded."""

    def __reduce__(self) -> Any:
        return (os.mkdir, ("unpickled",))


def pickled(name: str) -> Callable[[Path], None]:
    def make(path: Path) -> None:
        (path / name).unlink()
        torch.save({"w": Exploit()}, path / name)
        reseal(path)

    return make


def raw(name: str, data: bytes) -> Callable[[Path], None]:
    def make(path: Path) -> None:
        (path / name).unlink()
        (path / name).write_bytes(data)
        reseal(path)

    return make


def linked(path: Path) -> None:
    outside = path.parent.parent / "outside"
    (path / WEIGHTS).rename(outside)
    (path / WEIGHTS).symlink_to(outside)
    reseal(path)


def folder_in_place_of_a_file(path: Path) -> None:
    (path / WEIGHTS).unlink()
    (path / WEIGHTS).mkdir()


def manifest_is_a_pipe(path: Path) -> None:
    (path / "manifest.json").unlink()
    os.mkfifo(path / "manifest.json")


def escapes(name: str) -> Callable[[Path], None]:
    """A manifest that names a file elsewhere in place of the weights, with its true size and checksum."""

    def make(path: Path) -> None:
        document = json.loads((path / "manifest.json").read_text())
        document["files"][name.format(folder=path)] = document["files"].pop(WEIGHTS)
        (path / "manifest.json").write_text(json.dumps(document))

    return make


def first(tensors: dict[str, torch.Tensor], kind: str = "") -> str:
    return next(name for name in sorted(tensors) if name.endswith(kind) and tensors[name].ndim > 1)


def spoil(value: float, kind: str = "") -> Callable[[dict[str, torch.Tensor]], None]:
    def change(tensors: dict[str, torch.Tensor]) -> None:
        tensors[first(tensors, kind)].view(-1)[3] = value

    return change


def replaced(make: Callable[[torch.Tensor], torch.Tensor], kind: str = "") -> Callable[[dict[str, torch.Tensor]], None]:
    def change(tensors: dict[str, torch.Tensor]) -> None:
        name = first(tensors, kind)
        tensors[name] = make(tensors[name]).contiguous()

    return change


def header(length: int, text: bytes = b"{") -> bytes:
    return struct.pack("<Q", length) + text


def overlapping() -> bytes:
    text = json.dumps({"a": {"dtype": "F32", "shape": [2**40], "data_offsets": [0, 2**42]}}).encode()
    return struct.pack("<Q", len(text)) + text


NAN = float("nan")
HOSTILE: dict[str, Callable[[Path], Any]] = {
    "a pickle for weights": pickled(WEIGHTS),
    "a pickle for moments": pickled(OPTIMIZER),
    "a pickle for the best weights": pickled(BEST),
    "a bare pickle": raw(WEIGHTS, pickle.dumps(Exploit())),
    "a path upwards in the manifest": escapes("../step-00000004/" + WEIGHTS),
    "an absolute path in the manifest": escapes("{folder}/" + WEIGHTS),
    "a file that leads elsewhere": linked,
    "a folder for a file": folder_in_place_of_a_file,
    "a pipe for the manifest": manifest_is_a_pipe,
    "a manifest of many bytes": lambda path: (path / "manifest.json").write_bytes(b" " * 2**21),
    "a manifest of many brackets": lambda path: (path / "manifest.json").write_bytes(b"[" * 900_000),
    "a manifest with a long number": lambda path: (path / "manifest.json").write_bytes(b"1" * 9000),
    "a state of many brackets": raw("state.json", b"[" * 200_000),
    "a state with a long number": raw("state.json", b'{"optimizer": ' + b"1" * 9000 + b"}"),
    "a state that is no text": raw("state.json", b"\xff\xfe\x00"),
    "a header of 2**62 bytes": raw(WEIGHTS, header(2**62)),
    "a header of a gigabyte": raw(WEIGHTS, header(10**9)),
    "a tensor of 4 terabytes": raw(WEIGHTS, overlapping()),
    "other weights": edit(WEIGHTS, lambda tensors: tensors.update(more=torch.zeros(2))),
    "fewer weights": edit(WEIGHTS, lambda tensors: tensors.pop(first(tensors))),
    "a weight of another shape": edit(WEIGHTS, replaced(lambda tensor: tensor[:-1])),
    "a weight as it lies": edit(WEIGHTS, replaced(lambda tensor: tensor.reshape(-1))),
    "a weight of another type": edit(WEIGHTS, replaced(lambda tensor: tensor.double())),
    "a weight that is not a number": edit(WEIGHTS, spoil(NAN)),
    "a weight without end": edit(WEIGHTS, spoil(float("inf"))),
    "a moment that is not a number": edit(OPTIMIZER, spoil(NAN)),
    "a moment of another shape": edit(OPTIMIZER, replaced(lambda tensor: tensor[:1, :1], "exp_avg")),
    "a moment of another type": edit(OPTIMIZER, replaced(lambda tensor: tensor.long(), "exp_avg")),
    "a missing moment": edit(OPTIMIZER, lambda tensors: tensors.pop(first(tensors, "exp_avg_sq"))),
    "moments of nothing": edit(OPTIMIZER, lambda tensors: tensors.update({"99.exp_avg": torch.zeros(2)})),
    "moments without a number": edit(OPTIMIZER, lambda tensors: tensors.update({"²": torch.zeros(2)})),
    "a best weight of another shape": edit(BEST, replaced(lambda tensor: tensor[:-1])),
    "a best weight that is not a number": edit(BEST, spoil(NAN)),
    "a best weight too many": edit(BEST, lambda tensors: tensors.update(more=torch.zeros(2))),
    "no random state": state("train", "random", value=...),
    "an empty random state": state("train", "random", value=[]),
    "a random state of another form": state("train", "random", 0, "torch", value="00"),
    "a random state that is no hex": state("train", "random", 0, "torch", value="xyz"),
    "a random state of Python's that is short": state("train", "random", 0, "python", 1, value=[1, 2]),
    "a random state of NumPy's that is short": state("train", "random", 0, "numpy", 1, value=[1, 2]),
    "a step that is text": state("train", "state", "step", value="four"),
    "a step below nought": state("train", "state", "step", value=-4),
    "a step that is another": state("train", "state", "step", value=3),
    "a step that is half": state("train", "state", "step", value=3.5),
    "no step": state("train", "state", "step", value=...),
    "tokens that are a list": state("train", "state", "tokens", value=[1]),
    "a sum of losses that is not finite": state("train", "state", "loss_sum", value=NAN),
    "losses that are text": state("train", "state", "recent_losses", value=["a"]),
    "a best step that is text": state("train", "state", "best_step", value="last"),
    "parts that nobody knows": state("train", "state", "__class__", value="x"),
    "a training that is a list": state("train", value=[1]),
    "an optimizer that is a list": state("optimizer", value=[]),
    "no groups": state("optimizer", "groups", value=...),
    "groups that are text": state("optimizer", "groups", value="groups"),
    "too few groups": state("optimizer", "groups", value=[]),
    "a group that is a list": state("optimizer", "groups", 0, value=[1]),
    "a group with a rate that is text": state("optimizer", "groups", 0, "lr", value="high"),
    "a group with one beta": state("optimizer", "groups", 0, "betas", value=[0.9]),
    "a group of other parameters": state("optimizer", "groups", 0, "params", value=[0]),
    "an optimizer's state that is a list": state("optimizer", "state", value=[1]),
    "an optimizer's value of nothing": state("optimizer", "state", value={"99.step": 1}),
    "a scaler where there is none": state("train", "scaler", value={"scale": "x"}),
    "another format": manifest("format", value=2),
    "a format that is true": manifest("format", value=True),
    "files that are a list": manifest("files", value=[WEIGHTS]),
    "a file that is a number": manifest("files", WEIGHTS, value=7),
    "a size that is text": manifest("files", WEIGHTS, "bytes", value="7"),
    "a fingerprint that is a list": manifest("fingerprint", value=[1]),
    "a fingerprint that is a mapping": manifest("fingerprint", value={}),
    "a step of another checkpoint": manifest("step", value=400),
}


@contextmanager
def at_most(seconds: int) -> Iterator[None]:
    """Fails what waits for ever."""

    def late(*given: Any) -> None:
        raise AssertionError(f"it took more than {seconds} s")

    before = signal.signal(signal.SIGALRM, late)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


@pytest.mark.parametrize("name", HOSTILE)
def test_it_is_refused_by_name_and_the_one_before_is_used(
    tmp_path: Path,
    corpora: tuple[Corpus, Corpus],
    name: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    path = killed(tmp_path / "fit", corpora)
    HOSTILE[name](path)
    warnings: list[str] = []
    fit = make_fit(tmp_path / "fit", *corpora, warn=warnings.append, **WAY)
    with at_most(120):
        assert fit.resume()
    assert fit.state.step == 3
    assert len(warnings) == 1
    assert path.name in warnings[0]
    assert "unused-step-00000004" in warnings[0]
    assert not (tmp_path / "unpickled").exists()
    fit.run([])
    whole = make_fit(tmp_path / "whole", *corpora, **WAY)
    whole.run([])
    assert same_bits(weights_of(fit), weights_of(whole))


@pytest.mark.parametrize("name", ["step-²", "step-٣", "step-" + "9" * 240, "step-00000005.tmp", "step-"])
def test_a_folder_with_a_strange_name_is_passed_over_or_set_aside(
    tmp_path: Path,
    corpora: tuple[Corpus, Corpus],
    name: str,
) -> None:
    path = killed(tmp_path / "fit", corpora)
    (path.parent / name).mkdir()
    (path.parent / "step-00000007").write_text("a file")
    fit = make_fit(tmp_path / "fit", *corpora, **WAY)
    assert fit.resume()
    assert fit.state.step == 4
    fit.run([])


def test_all_of_them_refused_training_begins_at_the_first_step_and_says_so(
    tmp_path: Path,
    corpora: tuple[Corpus, Corpus],
) -> None:
    path = killed(tmp_path / "fit", corpora)
    for own in (path, path.with_name("step-00000003")):
        edit(WEIGHTS, spoil(NAN))(own)
    warnings: list[str] = []
    fit = make_fit(tmp_path / "fit", *corpora, warn=warnings.append, **WAY)
    assert not fit.resume()
    assert [name in text for name, text in zip(("step-00000004", "step-00000003"), warnings, strict=True)] == [True] * 2


JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**70), 2**70) | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=4,
)


def places(document: Any, before: tuple[str | int, ...] = ()) -> list[tuple[str | int, ...]]:
    """The paths to all values of a JSON document, of long lists only the first."""
    found: list[tuple[str | int, ...]] = []
    entries = document.items() if isinstance(document, dict) else enumerate(document[:2])
    for key, value in entries:
        found.append((*before, key))
        if isinstance(value, dict | list):
            found += places(value, (*before, key))
    return found


@pytest.fixture(scope="module")
def stopped(tmp_path_factory: pytest.TempPathFactory, corpora: tuple[Corpus, Corpus]) -> tuple[Path, Fit]:
    path = killed(tmp_path_factory.mktemp("stopped") / "fit", corpora)
    return path, make_fit(path.parent.parent, *corpora, warn=lambda text: None, **WAY)


@settings(max_examples=20, deadline=None, suppress_health_check=list(HealthCheck), derandomize=True)
@given(data=st.data())
@pytest.mark.parametrize("name", ["state.json", "manifest.json"])
def test_whatever_stands_in_its_json_there_is_no_traceback(
    stopped: tuple[Path, Fit],
    corpora: tuple[Corpus, Corpus],
    name: str,
    data: st.DataObject,
) -> None:
    import shutil
    import tempfile

    path, _ = stopped
    with tempfile.TemporaryDirectory() as work:
        folder = Path(work) / "fit"
        shutil.copytree(path.parent.parent, folder)
        own = folder / "checkpoints" / path.name
        document = json.loads((own / name).read_text())
        before = copy.deepcopy(document)
        keys = data.draw(st.sampled_from(places(document)))
        _put(document, list(keys), data.draw(JSON | st.just(...)))
        (own / name).write_text(json.dumps(document))
        if name == "state.json":
            reseal(own)
        warnings: list[str] = []
        fit = make_fit(folder, *corpora, warn=warnings.append, **(WAY | {"steps": 5}))
        assert fit.resume()
        assert fit.state.step == (3 if warnings else 4), (keys, before)
        fit.run([logged(fit)])
        assert fit.state.step == 5
