"""pretrain: learning from plain text, from scratch or on from pretrained weights."""

from __future__ import annotations

from typing import Any

from llmkit.errors import RecipeError, did_you_mean
from llmkit.model.folder import weights_digest
from llmkit.model.loading import (
    build_from_config,
    build_on_meta,
    dropout_changes,
    load_config,
    load_tokenizer,
    longest_input,
)
from llmkit.model.location import locate
from llmkit.recipe.schema import Recipe, result_keys
from llmkit.recipe.training import Pretrain as PretrainKeys
from llmkit.run.directory import Artifact, Run
from llmkit.stages.base import (
    corpus_in,
    is_first_process,
    pretraining_corpora,
    require_corpus,
    task_for,
    weights_or_outline,
)
from llmkit.stages.job import TrainingJob
from llmkit.stages.training import train_and_save

# Peak rates when the recipe names none: GPT-3 (Brown et al., 2020) trained its smallest model at 6e-4; going on from
# pretrained weights wants less, or it forgets.
_DEFAULT_LR = {"from scratch": 6e-4, "from pretrained weights": 1e-4}


class Pretrain:
    """Trains a causal language model on the corpus `pretrain`."""

    name = "pretrain"
    version = 1
    trains = True
    resumes = True
    distributed = True
    shares = False

    def needs(self, recipe: Recipe) -> tuple[str, ...]:
        """The corpus."""
        return ("preprocess",)

    def inputs(self, recipe: Recipe, run: Run) -> dict[str, Any]:
        """The corpora, the parent's weights and the keys of `pretrain` that change what is learnt."""
        corpora = run.stage("preprocess")["facts"]["corpora"]
        found: dict[str, Any] = {f"recipe.pretrain.{key}": value for key, value in result_keys(recipe.pretrain).items()}
        for read_by_preprocess in ("data", "tokenizer", "max_length"):
            found.pop(f"recipe.pretrain.{read_by_preprocess}", None)
        train, held_out = pretraining_corpora(recipe)
        found |= {"recipe.seed": recipe.seed, "corpus": corpora[train], "held out": corpora[held_out]}
        if recipe.model is not None:
            found["model"] = weights_digest(locate(recipe.model))
        return found

    def run(self, recipe: Recipe, run: Run) -> Artifact:
        """Leaves `model/`."""
        return train_and_save(self.job(recipe, run))[0]

    def job(self, recipe: Recipe, run: Run) -> TrainingJob:
        """The training of new or pretrained weights on this run's text."""
        keys = recipe.pretrain
        assert keys is not None, "the schema asks for a section `pretrain` when there is such a stage"
        train, held_out = pretraining_corpora(recipe)
        corpus = require_corpus(run, train, "pretrain.data")
        task = task_for(recipe, run, corpus, "text")
        model = self._model(recipe, keys, run)
        lr = keys.lr if keys.lr != "auto" else self._default_lr(recipe, run)
        return TrainingJob(self.name, recipe, run, keys, lr, model, task, corpus, corpus_in(run, held_out))

    def config(self, recipe: Recipe, run: Run) -> Any:
        """The configuration of the model that this stage trains."""
        keys = recipe.pretrain
        assert keys is not None, "the schema asks for a section `pretrain` when there is such a stage"
        if keys.architecture is None:
            config = load_config(locate(str(recipe.model)))
        else:
            tokenizer = load_tokenizer(run.folder("preprocess") / "tokenizer")
            config = _config(keys.architecture, tokenizer, max(keys.max_length or 0, recipe.data.max_length))
        config.update(dropout_changes(config, keys.dropout))
        return config

    def _model(self, recipe: Recipe, keys: PretrainKeys, run: Run) -> Any:
        if keys.architecture is None:
            folder = locate(str(recipe.model))
            changes: dict[str, Any] = dropout_changes(load_config(folder), keys.dropout)
            return weights_or_outline(folder, "AutoModelForCausalLM", changes).model
        if not is_first_process():
            return build_on_meta(self.config(recipe, run), "AutoModelForCausalLM")
        return build_from_config(self.config(recipe, run), "AutoModelForCausalLM", recipe.seed)

    def _default_lr(self, recipe: Recipe, run: Run) -> float:
        way = "from scratch" if recipe.model is None else "from pretrained weights"
        run.guess("pretrain.lr", _DEFAULT_LR[way], f"the default {way}")
        return _DEFAULT_LR[way]


STAGE = Pretrain()


def _config(architecture: dict[str, Any], tokenizer: Any, max_length: int) -> Any:
    """A Transformers config of the sizes that the recipe names; vocabulary and special tokens are the tokenizer's.

    Raises RecipeError for an architecture that Transformers has not, and for a size that this one does not know.
    """
    from transformers import CONFIG_MAPPING

    sizes = dict(architecture)
    kind = sizes.pop("model_type")
    where = "pretrain.architecture"
    if kind not in CONFIG_MAPPING:
        raise RecipeError(
            f"Transformers has no architecture `{kind}`",
            got=kind,
            hint=did_you_mean(kind, CONFIG_MAPPING.keys()),
            where=where,
        )
    defaults = CONFIG_MAPPING[kind]()
    known = set(defaults.to_dict()) | set(defaults.attribute_map)
    for name in sizes:
        if name not in known:
            raise RecipeError(
                f"the architecture {kind} has no `{name}`",
                got=name,
                hint=did_you_mean(name, known),
                where=f"{where}.{name}",
            )
    tokens = {key: getattr(tokenizer, key) for key in ("bos_token_id", "eos_token_id", "pad_token_id")}
    try:
        config = CONFIG_MAPPING[kind](**({"vocab_size": len(tokenizer)} | tokens | sizes))
    except (TypeError, ValueError) as error:
        raise RecipeError(f"the architecture {kind} refuses these sizes", got=str(error), where=where) from None
    reach = longest_input(config, tokenizer)
    if reach is not None and reach < max_length:
        raise RecipeError(
            "examples may be longer than the model can take",
            got=f"{max_length} tokens",
            expected=f"at most {reach}",
            hint="lower data.max_length and pretrain.max_length, or raise the size in pretrain.architecture",
            where=where,
        )
    if config.vocab_size < len(tokenizer):
        raise RecipeError(
            "the vocabulary is smaller than the tokenizer's",
            got=config.vocab_size,
            expected=f"{len(tokenizer)}",
            where=where,
        )
    return config
