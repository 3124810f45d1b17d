"""Trainings on top of a frozen prefix whose states are kept: models of two blocks, corpora for them, and a Fit that knows."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from fitting import COLUMNS, WORDS
from transformers import AutoConfig, AutoModelForSequenceClassification, PreTrainedModel

from llmkit.data.corpus import Column, Corpus, CorpusWriter
from llmkit.data.states import CorpusWithStates, States, StatesWriter, join_parts
from llmkit.model.anatomy import read_anatomy
from llmkit.model.causal import read_causal_model
from llmkit.model.prefix import Prefix, frozen_prefix
from llmkit.tasks.base import Regularisation, TaskSettings
from llmkit.tasks.causal_objective import CausalObjective
from llmkit.tasks.classify import ClassifyTask
from llmkit.train.loop import Fit
from llmkit.train.prefix import PrefixObjective, compute_states, try_prefix

CLASSIFIERS: dict[str, dict[str, Any]] = {
    "bert": {},
    "distilbert": {"hidden_dim": 48},
    "roberta": {},
    "albert": {"embedding_size": 16, "num_hidden_groups": 2},
    "mpnet": {},
    "deberta-v2": {
        "relative_attention": True,
        "pos_att_type": ["c2p", "p2c"],
        "type_vocab_size": 0,
        "pooler_hidden_size": 32,
    },
    "bart": {"encoder_layers": 2, "decoder_layers": 1, "encoder_ffn_dim": 48, "decoder_ffn_dim": 48, "d_model": 32}
    | {"encoder_attention_heads": 4, "decoder_attention_heads": 4, "decoder_start_token_id": 0},
    "convbert": {"embedding_size": 16},
    "fnet": {},
    "squeezebert": {"embedding_size": 32},
    "t5": {"d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": 4, "decoder_start_token_id": 0},
}


def classifier(family: str, **changes: Any) -> PreTrainedModel:
    size = {"vocab_size": WORDS, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_labels": 3}
    size |= {"num_attention_heads": 4, "max_position_embeddings": 64}
    size |= {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    config = AutoConfig.for_model(family, **(size | CLASSIFIERS[family] | changes))
    for name, value in config.to_dict().items():
        if "dropout" in name and isinstance(value, float):
            setattr(config, name, 0.0)
    torch.manual_seed(1)
    model: PreTrainedModel = AutoModelForSequenceClassification.from_config(config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.normal_(std=0.15)
    return model


def classify_task() -> ClassifyTask:
    tokenizer = SimpleNamespace(pad_token_id=0, eos_token_id=2, get_vocab=lambda: {str(i): i for i in range(WORDS)})
    return ClassifyTask(tokenizer, TaskSettings(64, labels=("a", "b", "c")))


def labelled_corpus(folder: Path, count: int) -> Corpus:
    """Texts of 4 to 24 tokens that end with an end of sequence."""
    rng = np.random.default_rng(0)
    writer = CorpusWriter(folder, {"input_ids": Column("uint8"), "label": Column("uint8", ragged=False)})
    for _ in range(count):
        ids = rng.integers(3, WORDS, int(rng.integers(3, 24)))
        writer.add({"input_ids": [*ids, 2], "label": int(rng.integers(3))})
    return writer.finish({})


def alike_corpus(folder: Path, count: int) -> Corpus:
    """Examples of which all begin with the same 12 tokens."""
    rng = np.random.default_rng(0)
    first, writer = rng.integers(3, WORDS, 12), CorpusWriter(folder, COLUMNS)
    for _ in range(count):
        ids = np.concatenate([first, rng.integers(3, WORDS, int(rng.integers(2, 12)))])
        chosen = rng.random(len(ids)) < 0.5
        chosen[-1] = True
        writer.add({"input_ids": ids, "supervised": chosen})
    return writer.finish({})


def frozen(model: PreTrainedModel, depth: int) -> PreTrainedModel:
    """The same model, of which everything up to a depth stands still."""
    anatomy = read_anatomy(model)
    names = {*anatomy.embeddings, *(name for block in anatomy.blocks[:depth] for name in block)}
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name not in names)
    assert frozen_prefix(model) == depth
    return model


def prefix_of(fit: Fit, depth: int) -> Prefix | str:
    return try_prefix(fit.objective, fit.model, depth, [fit.train[number] for number in range(4)], fit.precision)


def compute(
    fit: Fit, corpus: Any, depth: int, folder: Path, numbers: Iterable[int] | None = None, dtype: Any = None
) -> CorpusWithStates:
    """A corpus with the states of some examples or all; those that are in the folder already."""
    if not (folder / "states.json").exists():
        wanted, writer = list(range(len(corpus)) if numbers is None else numbers), StatesWriter(folder, 0, len(corpus))
        done: list[int] = []
        compute_states(
            *(fit.objective, fit.model, corpus, "input_ids", wanted, {depth: writer}, fit.precision, dtype),
            done.append,
        )
        assert sum(done) == len(wanted)
        writer.close()
        join_parts(folder, 1, {})
    return CorpusWithStates(corpus, {depth: States(folder)})


def with_known(fit: Fit, depth: int, folder: Path, numbers: Iterable[int] | None = None, dtype: Any = None) -> Fit:
    """The same Fit on top of kept states; those of `numbers` where that is given, and of all held-out examples."""
    prefix = prefix_of(fit, depth)
    assert isinstance(prefix, Prefix), prefix
    fit.train = fit.feeder.corpus = compute(fit, fit.train, depth, folder / "train", numbers, dtype)
    if fit.held_out is not None:
        fit.held_out = compute(fit, fit.held_out, depth, folder / "eval", None, dtype)
    fit.objective = fit.feeder.objective = fit.stepper.objective = PrefixObjective(fit.objective, prefix)
    return fit


def padding(fit: Fit) -> Fit:
    """The same Fit, which pads although its model could pack."""
    causal = replace(read_causal_model(fit.model), packs=False)
    fit.objective = fit.stepper.objective = fit.feeder.objective = CausalObjective(causal, 0, Regularisation())
    return fit
