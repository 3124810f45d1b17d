"""A recipe's dropout rate takes the place of every rate in a model's config, and of nothing else."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from test_loading import rewrite_weights, write_bert
from transformers import AutoConfig, AutoModelForSequenceClassification

from llmkit.errors import ArtifactError, RecipeError
from llmkit.model.loading import dropout_changes, load_config, load_model


@pytest.mark.parametrize(
    ("family", "names"),
    [
        ("llama", {"attention_dropout"}),
        ("gpt2", {"attn_pdrop", "embd_pdrop", "resid_pdrop", "summary_first_dropout"}),
        ("bert", {"hidden_dropout_prob", "attention_probs_dropout_prob"}),
        ("distilbert", {"dropout", "attention_dropout", "qa_dropout", "seq_classif_dropout"}),
        ("opt", {"dropout", "attention_dropout"}),
    ],
)
def test_dropout_rates_are_found_by_their_names(family: str, names: set[str]) -> None:
    config = AutoConfig.for_model(family)
    assert dropout_changes(config, None) == {}
    assert dropout_changes(config, 0.25) == dict.fromkeys(names, 0.25)


def test_every_dropout_of_a_loaded_model_has_the_rate_and_the_head_keeps_its_shape(tmp_path: Path) -> None:
    folder = write_bert(tmp_path / "bert", AutoModelForSequenceClassification, num_labels=2, classifier_dropout=0.4)
    auto, changes = "AutoModelForSequenceClassification", dropout_changes(load_config(folder), 0.125)
    model = load_model(folder, auto, **changes).model
    rates = {module.p for module in model.modules() if isinstance(module, torch.nn.Dropout)}
    assert rates == {0.125}
    rewrite_weights(folder, lambda tensors: tensors.update({"classifier.bias": torch.ones(7)}))
    with pytest.raises(ArtifactError, match="shapes"):
        load_model(folder, auto, **changes)


def test_a_family_without_dropout_cannot_have_another_rate() -> None:
    with pytest.raises(RecipeError, match="no dropout") as caught:
        dropout_changes(AutoConfig.for_model("mamba"), 0.1)
    assert caught.value.where == "dropout"
    assert dropout_changes(AutoConfig.for_model("mamba"), None) == {}
