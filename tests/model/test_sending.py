"""A model that one process has comes to the others whole: parameters, buffers, what is tied and what stands still."""

from __future__ import annotations

from pathlib import Path

import pytest
import sending_processes
import torch
from forked import ranks, start, wait_for_all
from safetensors.torch import load_file

from llmkit.model.loading import build_from_config


@pytest.mark.slow
def test_the_others_get_what_the_first_has(tmp_path: Path) -> None:
    wait_for_all([start(sending_processes.main, tmp_path, env=rank) for rank in ranks(2)])
    first, other = (load_file(tmp_path / f"{number}.safetensors") for number in (0, 1))
    expected = build_from_config(sending_processes.CONFIG, "AutoModelForCausalLM", seed=5)
    assert {name for name, _ in expected.named_parameters()} <= first.keys()
    assert first.keys() == other.keys()
    for name, tensor in first.items():
        assert torch.equal(tensor, other[name]), name
    for name, parameter in expected.named_parameters():
        assert torch.equal(parameter, other[name]), name
