"""What DeepSpeed spreads over processes learns what whole ones learn, and any other way goes on from what is saved."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import outcomes
import pytest
import torch
from fitting import random_corpus
from outcomes import require_same_course
from safetensors.torch import load_file
from test_sharding import CASES, STOPPED, launch

from llmkit.train.memory import Memory
from llmkit.train.zero import Zero

WAYS = {
    "": {},
    ", stage 1": {"stage": 1},
    ", offloaded": {"offload": True},
    ", 1, offloaded": {"stage": 1, "offload": True},
}
NAMES = ("uneven", "micro-batches", "averaged", "bf16", "checkpointed", "frozen", "tied", "sgd")
HALF = STOPPED | {"sharded": False, "precision": "bf16", "family": "gpt2", "dropout": 0.2}
ZERO = {"sharded": "deepspeed"}
Found = Callable[[str], list[dict[str, Any]]]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """All trainings, in two processes, and some in one and in three."""
    folder = tmp_path_factory.mktemp("zero")
    random_corpus(folder / "train", 25)
    random_corpus(folder / "eval", 19, seed=9)
    jobs: list[tuple[str, str, dict[str, Any]]] = []
    for name in NAMES:
        jobs += [(f"{name}, whole", f"{name}-w", CASES[name])]
        jobs += [(f"{name}, spread{way}", f"{name}-s{way}", CASES[name] | ZERO | more) for way, more in WAYS.items()]
    for way, more in WAYS.items():
        case = HALF | ZERO | more
        jobs += [(f"undisturbed{way}", f"u{way}", case)]
        jobs += [(f"stopped{way}", f"r{way}", case | {"stop_after": 5}), (f"resumed{way}", f"r{way}", case)]
    whole, fsdp, zero = STOPPED | {"sharded": False}, STOPPED, STOPPED | ZERO
    jobs += [("expected", "expected", whole)]
    for place, before in (("to-whole", zero), ("to-fsdp", zero), ("to-one", zero), ("to-three", zero)):
        jobs += [(f"{place}, stopped", place, before | {"stop_after": 5})]
    jobs += [("to-whole, resumed", "to-whole", whole), ("to-fsdp, resumed", "to-fsdp", fsdp)]
    for place, before in (("from-whole", whole), ("from-fsdp", fsdp)):
        jobs += [(f"{place}, stopped", place, before | {"stop_after": 5}), (f"{place}, resumed", place, zero)]
    wild = {"steps": 9, "lr": 1e30, "max_grad_norm": None, "warmup": 0} | ZERO
    jobs += [("diverged", "diverged", wild), ("diverged in bf16", "diverged-half", wild | {"precision": "bf16"})]
    spoilt = {"steps": 6, "spoil": 3, "divergence": {"nan": "skip"}, "micro_batch_size": 1}
    for precision in ("fp32", "bf16"):
        jobs += [(f"spoilt, {precision}", f"spoilt-{precision}", spoilt | {"precision": precision})]
        for way, more in WAYS.items():
            name = f"spoilt, {precision}{way}, zero"
            jobs += [(name, name, spoilt | ZERO | more | {"precision": precision})]
    kept = STOPPED | ZERO | {"kept_in_fp32": ["norm"]}
    jobs += [("kept, undisturbed", "kept-u", kept), ("kept, stopped", "kept-r", kept | {"stop_after": 5})]
    jobs += [("kept, resumed", "kept-r", kept)]
    launch(folder, 2, jobs)
    launch(folder, 1, [("to-one, resumed", "to-one", whole)])
    launch(folder, 3, [("to-three, resumed", "to-three", zero)])
    return folder


@pytest.fixture
def found(folder: Path) -> Found:
    """What each process found in a training."""
    return partial(outcomes.found, folder)


@pytest.mark.slow
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("name", NAMES)
def test_they_learn_what_whole_ones_learn(name: str, way: str, folder: Path, found: Found) -> None:
    rough = name == "bf16"
    require_same_course(found(f"{name}, spread{way}"), found(f"{name}, whole")[0], rough=rough)
    one, other = (
        load_file(folder / f"{name}, spread{way}.safetensors"),
        load_file(folder / f"{name}, whole.safetensors"),
    )
    assert one.keys() == other.keys()
    for key, value in one.items():
        if key.endswith("c_attn.bias"):  # a key's bias has no gradient but noise, which Adam makes large
            continue
        torch.testing.assert_close(value, other[key], atol=2e-2 if rough else 1e-4, rtol=1e-3, msg=key)


@pytest.mark.slow
def test_each_process_holds_a_slice(found: Found) -> None:
    spread, whole = found("uneven, spread"), found("uneven, whole")[0]
    numbers = [sum(own["shapes"][key][0] for key in own["shapes"]) for own in spread]
    expected = sum(torch.Size(shape).numel() for shape in whole["shapes"].values())
    assert sum(numbers) == expected
    assert max(numbers) < 0.51 * expected


@pytest.mark.slow
@pytest.mark.parametrize("way", WAYS)
def test_stopped_and_resumed_it_ends_with_the_same_bits(way: str, folder: Path, found: Found) -> None:
    assert [own["status"] for own in found(f"stopped{way}")] == ["StoppedError"] * 2
    resumed = found(f"resumed{way}")
    assert all(own["resumed"] and own["status"] == "done" and not own["said"] for own in resumed)
    whole = load_file(folder / f"undisturbed{way}.safetensors")
    for key, value in load_file(folder / f"resumed{way}.safetensors").items():
        assert torch.equal(value, whole[key]), key
    assert resumed[0]["steps"] == found(f"undisturbed{way}")[0]["steps"][6:]


@pytest.mark.slow
@pytest.mark.parametrize("place", ["to-whole", "to-fsdp", "to-one", "to-three", "from-whole", "from-fsdp"])
def test_it_goes_on_in_another_way(place: str, folder: Path, found: Found) -> None:
    resumed, expected = found(f"{place}, resumed")[0], found("expected")[0]
    assert resumed["resumed"]
    assert not resumed["said"], "nothing is set aside"
    assert [step["step"] for step in resumed["steps"]] == [7, 8, 9]
    for step, other in zip(resumed["steps"], expected["steps"][6:], strict=True):
        assert step["loss"] == pytest.approx(other["loss"], abs=1e-5)
    whole = load_file(folder / "expected.safetensors")
    for key, value in load_file(folder / f"{place}, resumed.safetensors").items():
        torch.testing.assert_close(value, whole[key], atol=1e-4, rtol=1e-3, msg=key)


@pytest.mark.slow
def test_what_is_not_finite_is_judged_before_the_step(folder: Path, found: Found) -> None:
    for name, place in (("diverged", "diverged"), ("diverged in bf16", "diverged-half")):
        assert [own["status"] for own in found(name)] == ["DivergedError"] * 2
        assert all("gradient norm nan" in own["said"][0] for own in found(name))
        assert list((folder / place / "diverged").glob("step-*.json"))


@pytest.mark.slow
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_step_that_is_not_finite_spoils_no_other(precision: str, way: str, found: Found) -> None:
    expected = found(f"spoilt, {precision}")[0]
    for own in found(f"spoilt, {precision}{way}, zero"):
        assert (
            (own["status"], own["facts"]["refused_steps"])
            == ("done", expected["facts"]["refused_steps"])
            == ("done", 1)
        )
        losses = [step["loss"] for step in own["steps"]]
        close = 1e-2 if precision == "bf16" else 1e-5
        assert losses == pytest.approx([step["loss"] for step in expected["steps"]], abs=close)


@pytest.mark.slow
def test_what_a_family_keeps_in_fp32_is_resumed(folder: Path, found: Found) -> None:
    assert found("kept, resumed")[0]["steps"] == found("kept, undisturbed")[0]["steps"][6:]
    whole = load_file(folder / "kept, undisturbed.safetensors")
    for key, value in load_file(folder / "kept, resumed.safetensors").items():
        assert torch.equal(value, whole[key]), key


def test_a_share_of_what_is_shared_is_foretold() -> None:
    whole = Memory(weights=200, masters=400, gradients=400, optimizer=800, activations=7, flops=1, products=1)
    two, one = (whole.zero(Zero(0, 4, stage=stage), copied=True, offloaded=False) for stage in (2, 1))
    bucket = 100 * (2 + 2 + 4)
    assert (two.weights, two.masters, two.gradients, two.optimizer) == (200, 100, bucket + 300, 200)
    assert (one.weights, one.masters, one.gradients, one.optimizer) == (200, 100, bucket + 700, 200)
    away = whole.zero(Zero(0, 4, offload=True), copied=True, offloaded=True)
    assert (away.masters, away.gradients, away.optimizer, away.offloaded) == (0, bucket + 100, 0, 500)
    assert away.total == 200 + bucket + 100 + 7
