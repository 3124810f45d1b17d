"""Parameter groups: trainable parameters only, each once, decay where it belongs."""

from __future__ import annotations

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    BertConfig,
    LlamaConfig,
    PreTrainedModel,
)

from llmkit.errors import RecipeError
from llmkit.model.groups import Rates, parameter_groups

SIZE = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32, "vocab_size": 40}


def bert() -> PreTrainedModel:
    with torch.device("meta"):
        return AutoModelForSequenceClassification.from_config(BertConfig(**SIZE))


def test_vectors_and_norms_do_not_decay() -> None:
    model = bert()
    decay, no_decay = parameter_groups(model, Rates(0.5), weight_decay=0.1)
    assert (decay["group"], decay["weight_decay"], decay["lr"]) == ("decay", 0.1, 0.5)
    assert (no_decay["group"], no_decay["weight_decay"], no_decay["lr"]) == ("no_decay", 0.0, 0.5)
    assert all(name.endswith("bias") or "LayerNorm" in name for name in no_decay["names"])
    assert not any(name.endswith("bias") or "LayerNorm" in name for name in decay["names"])
    assert sorted(decay["names"] + no_decay["names"]) == sorted(name for name, _ in model.named_parameters())


def test_hidden_are_the_matrices_that_are_not_at_either_end() -> None:
    decay, no_decay = parameter_groups(bert(), Rates(0.5), weight_decay=0.1)
    hidden = {name for name, mark in zip(decay["names"], decay["hidden"], strict=True) if mark}
    others = set(decay["names"]) - hidden
    assert others == {"classifier.weight", *(name for name in decay["names"] if "embeddings" in name)}
    assert {name.split(".")[2] for name in hidden} == {"layer", "dense"}, "blocks and the pooler"
    assert no_decay["hidden"] == [False] * len(no_decay["names"])


@pytest.mark.parametrize("tied", [True, False])
def test_the_head_of_a_language_model_is_not_hidden(tied: bool) -> None:
    model = AutoModelForCausalLM.from_config(LlamaConfig(**SIZE, tie_word_embeddings=tied))
    decay, _ = parameter_groups(model, Rates(0.5), weight_decay=0.1)
    ends = {name for name, mark in zip(decay["names"], decay["hidden"], strict=True) if not mark}
    assert ends == {"model.embed_tokens.weight"} | (set() if tied else {"lm_head.weight"})


def test_a_norm_with_a_matrix_does_not_decay() -> None:
    class GridNorm(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.gain = torch.nn.Parameter(torch.ones(2, 2))

    model = torch.nn.Sequential(torch.nn.Linear(2, 2, bias=False), GridNorm())
    assert [group["names"] for group in parameter_groups(model, Rates(1.0), weight_decay=0.1)] == [
        ["0.weight"],
        ["1.gain"],
    ]


def test_names_go_with_their_parameters_and_frozen_ones_are_left_out() -> None:
    model = bert()
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("classifier" in name)
    groups = parameter_groups(model, Rates(0.5), weight_decay=0.1)
    parameters = dict(model.named_parameters())
    assert [group["names"] for group in groups] == [["classifier.weight"], ["classifier.bias"]]
    for group in groups:
        assert all(parameters[name] is tensor for name, tensor in zip(group["names"], group["params"], strict=True))


def test_an_empty_group_is_left_out() -> None:
    model = bert()
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name == "classifier.bias")
    assert [group["group"] for group in parameter_groups(model, Rates(0.5), weight_decay=0.1)] == ["no_decay"]


def test_a_tied_tensor_is_updated_once() -> None:
    model = AutoModelForCausalLM.from_config(LlamaConfig(**SIZE, tie_word_embeddings=True))
    parameters = [
        tensor for group in parameter_groups(model, Rates(0.5), weight_decay=0.1) for tensor in group["params"]
    ]
    assert len({id(tensor) for tensor in parameters}) == len(parameters)
    assert sum(tensor is model.get_output_embeddings().weight for tensor in parameters) == 1


def test_nothing_trainable_is_an_error() -> None:
    with pytest.raises(RecipeError, match="no parameter is trainable"):
        parameter_groups(bert().requires_grad_(False), Rates(0.5), weight_decay=0.1)
