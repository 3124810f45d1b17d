"""Configurations, tokenizers and models from a local Transformers folder, without remote code and without pickles."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llmkit.errors import ArtifactError, RecipeError
from llmkit.files import read_json
from llmkit.model.folder import INDEX, TOKENIZER_FILES, VOCABULARIES, WEIGHTS, check_folder, files_in, weight_files

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

_DROPOUT = re.compile(r"dropout|pdrop")
_NO_LIMIT = 10**12  # tokenizers without a limit say 10^30


@dataclass(frozen=True)
class LoadedModel:
    """A model, the parameters that its files did not hold (a new head) and those that it had no use for."""

    model: Any
    new_parameters: tuple[str, ...]
    unused_parameters: tuple[str, ...]


def load_config(folder: Path, **changes: Any) -> PretrainedConfig:
    """A folder's model configuration, with changes. Raises ArtifactError for a damaged one or an unknown architecture."""
    from transformers import AutoConfig

    read_json(folder / "config.json")
    with _as_artifact_errors("the configuration cannot be loaded", folder):
        return AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False, **changes)


def dropout_rates(config: PretrainedConfig) -> dict[str, float]:
    """The config's dropout rates by name."""
    values = config.to_dict().items()
    return {name: value for name, value in values if type(value) in (int, float) and _DROPOUT.search(name)}


def dropout_changes(config: PretrainedConfig, rate: float | None) -> dict[str, float]:
    """The config's dropout rates, all set to one rate; none when it is None. Raises RecipeError when there are none."""
    if rate is None:
        return {}
    names = list(dropout_rates(config))
    if not names:
        raise RecipeError(
            "the model has no dropout to set", got=f"a {config.model_type}", hint="leave `dropout` out", where="dropout"
        )
    return dict.fromkeys(names, rate)


def load_tokenizer(folder: Path) -> PreTrainedTokenizerBase:
    """A folder's tokenizer. Raises ArtifactError when it has none, or a damaged one."""
    from transformers import AutoTokenizer

    if not files_in(folder, VOCABULARIES):
        raise ArtifactError("this folder has no tokenizer", expected="tokenizer.json or a vocabulary", where=folder)
    for file in files_in(folder, TOKENIZER_FILES):
        if file.suffix == ".json":
            read_json(file)
    with _as_artifact_errors("the tokenizer cannot be loaded", folder), quiet_transformers():
        return AutoTokenizer.from_pretrained(folder, use_fast=True, local_files_only=True, trust_remote_code=False)


def load_model(folder: Path, auto_class: str, *, dtype: str = "float32", **config_changes: Any) -> LoadedModel:
    """A model of a Transformers auto class, such as "AutoModelForCausalLM", on the CPU.

    `config_changes` (`num_labels`, `id2label`, ...) override the configuration and may change the head's shape. New are
    the head's parameters that the files lack, and a pooler's; any other gap, and any shape that differs, is an
    ArtifactError, as are damaged files and an architecture that Transformers does not know.
    """
    import torch
    import transformers

    if not weight_files(folder):
        check_folder(folder)
        raise ArtifactError("this folder has no weights", expected=f"{WEIGHTS}, or shards with {INDEX}", where=folder)
    auto = getattr(transformers, auto_class)
    with _as_artifact_errors("the model cannot be loaded", folder), quiet_transformers():
        model, report = auto.from_pretrained(
            folder,
            dtype=getattr(torch, dtype),
            local_files_only=True,
            trust_remote_code=False,
            use_safetensors=True,
            ignore_mismatched_sizes=True,  # reported below, all of them at once
            output_loading_info=True,
            **config_changes,
        )
    new = _new_parameters(model, report, folder, shapes_may_change="num_labels" in config_changes)
    return LoadedModel(model, new, tuple(sorted(report["unexpected_keys"])))


def longest_input(config: PretrainedConfig, tokenizer: Any) -> int | None:
    """How many tokens a model can take, by its positions and what its tokenizer says; None when neither tells."""
    said = [getattr(config, "max_position_embeddings", None), getattr(tokenizer, "model_max_length", None)]
    known = [limit for limit in said if isinstance(limit, int) and 0 < limit < _NO_LIMIT]
    return min(known, default=None)


def build_on_meta(config: PretrainedConfig, auto_class: str) -> PreTrainedModel:
    """A model without storage: names, shapes and ties only, at once for any size. Raises ArtifactError."""
    import torch

    with torch.device("meta"):
        return _from_config(config, auto_class)


def build_from_config(config: PretrainedConfig, auto_class: str, seed: int) -> PreTrainedModel:
    """A new fp32 model whose initial weights depend on the seed alone. Raises ArtifactError."""
    import torch

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return _from_config(config, auto_class)


def _from_config(config: PretrainedConfig, auto_class: str) -> PreTrainedModel:
    import torch
    import transformers

    where = getattr(config, "_name_or_path", None) or config.model_type
    auto = getattr(transformers, auto_class)
    with _as_artifact_errors("the model cannot be built", where), quiet_transformers():
        return auto.from_config(config, dtype=torch.float32, trust_remote_code=False)


@contextlib.contextmanager
def quiet_transformers() -> Iterator[None]:
    """Transformers without progress bars and warnings: what they say is checked and reported by the caller."""
    from transformers.utils import logging

    bars, verbosity = logging.is_progress_bar_enabled(), logging.get_verbosity()
    logging.disable_progress_bar()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if bars:
            logging.enable_progress_bar()


@contextlib.contextmanager
def _as_artifact_errors(what: str, where: object) -> Iterator[None]:
    """Turns what Transformers raises for a bad folder into an ArtifactError; running out of memory stays what it is."""
    import torch
    from huggingface_hub.errors import StrictDataclassError
    from safetensors import SafetensorError

    bad_files = (OSError, ValueError, KeyError, TypeError, AttributeError, RuntimeError, ImportError)
    try:
        yield
    except torch.OutOfMemoryError:
        raise
    except (*bad_files, SafetensorError, StrictDataclassError) as error:
        raise ArtifactError(
            what, got=f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}", where=where
        ) from error


def _new_parameters(
    model: PreTrainedModel, report: dict[str, Any], folder: Path, *, shapes_may_change: bool
) -> tuple[str, ...]:
    from llmkit.model.anatomy import read_anatomy

    anatomy = read_anatomy(model)
    may_be_new = set(anatomy.head)
    if model.get_output_embeddings() is None:  # then what follows the blocks, norms aside, is a pooler
        may_be_new |= set(anatomy.final) - set(anatomy.norms)
    shapes = {name: f"{name} is {tuple(saved)}, not {tuple(built)}" for name, saved, built in report["mismatched_keys"]}
    missing = set(report["missing_keys"])
    wrong_shapes = sorted(shapes[name] for name in shapes if not (shapes_may_change and name in anatomy.head))
    if gaps := sorted(missing - set(shapes) - may_be_new):
        raise ArtifactError(
            "weights are missing that this model cannot do without",
            got=f"{len(gaps)} missing: " + ", ".join(gaps[:5]) + (", ..." if len(gaps) > 5 else ""),
            expected="every parameter outside the head",
            where=folder,
        )
    if wrong_shapes:
        raise ArtifactError(
            "weights do not have the shapes that config.json asks for", got="; ".join(wrong_shapes[:5]), where=folder
        )
    return tuple(sorted(missing | set(shapes)))
