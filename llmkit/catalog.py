"""Every pluggable name, as "module:object", imported when it is first used.

A new task, optimizer, schedule, filter, metric or format is one new file and one new line here.
"""

from __future__ import annotations

import importlib
from typing import Any

from llmkit.errors import RecipeError, did_you_mean

CATALOG: dict[str, dict[str, str]] = {
    "stage": {
        "preprocess": "llmkit.stages.preprocess:STAGE",
        "pretrain": "llmkit.stages.pretrain:STAGE",
        "freeze": "llmkit.stages.freeze:STAGE",
        "finetune": "llmkit.stages.finetune:STAGE",
        "evaluate": "llmkit.stages.evaluate:STAGE",
        "export": "llmkit.stages.export:STAGE",
    },
    "task": {
        "text": "llmkit.tasks.text:TextTask",
        "chat": "llmkit.tasks.chat:ChatTask",
        "classify": "llmkit.tasks.classify:ClassifyTask",
        "regress": "llmkit.tasks.regress:RegressTask",
    },
    "builtin data set": {
        "python-docs": "llmkit.data.builtin.python_docs:PythonDocs",
        "docstrings": "llmkit.data.builtin.docstrings:Docstrings",
        "docstring-packages": "llmkit.data.builtin.docstrings:DocstringPackages",
    },
    "row format": {
        "text": "llmkit.data.rows:from_text",
        "prompt_completion": "llmkit.data.rows:from_prompt_completion",
        "messages": "llmkit.data.rows:from_messages",
        "alpaca": "llmkit.data.rows:from_alpaca",
        "sharegpt": "llmkit.data.rows:from_sharegpt",
        "text_label": "llmkit.data.rows:from_text_label",
        "text_number": "llmkit.data.rows:from_text_number",
    },
    "filter": {
        "fix_encoding": "llmkit.data.filters.fix_encoding:FixEncodingFilter",
        "strip_markup": "llmkit.data.filters.strip_markup:StripMarkupFilter",
        "white_space": "llmkit.data.filters.white_space:WhiteSpaceFilter",
        "length": "llmkit.data.filters.length:LengthFilter",
        "repetition": "llmkit.data.filters.repetition:RepetitionFilter",
        "quality": "llmkit.data.filters.quality:QualityFilter",
        "language": "llmkit.data.filters.language:LanguageFilter",
        "personal_data": "llmkit.data.filters.personal_data:PersonalDataFilter",
        "block_list": "llmkit.data.filters.block_list:BlockListFilter",
        "duplicates": "llmkit.data.filters.duplicates:DuplicatesFilter",
        "near_duplicates": "llmkit.data.filters.near_duplicates:NearDuplicatesFilter",
    },
    "augmentation": {
        "word_deletion": "llmkit.data.augment.words:WordDeletion",
        "word_swap": "llmkit.data.augment.words:WordSwap",
        "case": "llmkit.data.augment.characters:CaseNoise",
        "typos": "llmkit.data.augment.characters:Typos",
        "token_masking": "llmkit.data.augment.token_masking:TokenMasking",
    },
    "optimizer": {
        "adamw": "llmkit.optim.adamw:build",
        "sgd": "llmkit.optim.sgd:build",
        "adagrad": "llmkit.optim.adagrad:build",
        "rmsprop": "llmkit.optim.rmsprop:build",
        "adafactor": "llmkit.optim.adafactor:build",
        "muon": "llmkit.optim.muon:build",
        "lion": "llmkit.optim.lion:build",
        "adamw8bit": "llmkit.optim.adamw8bit:build",
    },
    "schedule": {
        "constant": "llmkit.optim.schedules:constant",
        "linear": "llmkit.optim.schedules:linear",
        "cosine": "llmkit.optim.schedules:cosine",
        "exponential": "llmkit.optim.schedules:exponential",
        "polynomial": "llmkit.optim.schedules:polynomial",
        "step": "llmkit.optim.schedules:step",
        "inverse_sqrt": "llmkit.optim.schedules:inverse_sqrt",
        "wsd": "llmkit.optim.schedules:wsd",
        "plateau": "llmkit.optim.schedules:plateau",
    },
    "metric": {
        "loss": "llmkit.metrics.tokens:LOSS",
        "perplexity": "llmkit.metrics.tokens:PERPLEXITY",
        "bits_per_byte": "llmkit.metrics.tokens:BITS_PER_BYTE",
        "token_accuracy": "llmkit.metrics.tokens:TOKEN_ACCURACY",
        "exact_match": "llmkit.metrics.text:EXACT_MATCH",
        "rouge1": "llmkit.metrics.text:ROUGE_1",
        "rouge2": "llmkit.metrics.text:ROUGE_2",
        "rougeL": "llmkit.metrics.text:ROUGE_L",
        "bleu": "llmkit.metrics.text:BLEU",
        "chrf": "llmkit.metrics.text:CHRF",
        "accuracy": "llmkit.metrics.classification:ACCURACY",
        "balanced_accuracy": "llmkit.metrics.classification:BALANCED_ACCURACY",
        "precision": "llmkit.metrics.classification:PRECISION",
        "recall": "llmkit.metrics.classification:RECALL",
        "f1": "llmkit.metrics.classification:F1",
        "f1_micro": "llmkit.metrics.classification:F1_MICRO",
        "roc_auc": "llmkit.metrics.classification:ROC_AUC",
        "ece": "llmkit.metrics.calibration:ECE",
        "ece_calibrated": "llmkit.metrics.calibration:ECE_CALIBRATED",
        "mae": "llmkit.metrics.regression:MAE",
        "rmse": "llmkit.metrics.regression:RMSE",
        "r2": "llmkit.metrics.regression:R2",
        "pearson": "llmkit.metrics.regression:PEARSON",
        "spearman": "llmkit.metrics.regression:SPEARMAN",
    },
    "export format": {
        "transformers": "llmkit.formats.transformers:write",
    },
    "launch target": {
        "slurm": "llmkit.launch.slurm:Slurm",
    },
}


def names(group: str) -> tuple[str, ...]:
    """The names that a group answers to, in catalogue order."""
    return tuple(CATALOG[group])


def is_own_code(name: str) -> bool:
    """True for `path.py:name`, which names the user's own code and is not in the catalogue."""
    return ".py:" in name


def resolve(group: str, name: str, *, where: str | None = None) -> Any:
    """The object behind a name; imports its module on first use.

    Raises RecipeError, with the nearest name, when the group has no such entry.
    """
    entries = CATALOG[group]
    if name not in entries:
        raise RecipeError(
            f"unknown {group} `{name}`",
            got=name,
            expected="one of " + ", ".join(entries),
            hint=did_you_mean(name, entries),
            where=where,
        )
    module, _, attribute = entries[name].partition(":")
    return getattr(importlib.import_module(module), attribute)
