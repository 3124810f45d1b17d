"""Models by URI: found, checked and loaded from a local Transformers folder, without remote code and without pickles."""

from __future__ import annotations

import contextlib
import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llmkit.errors import ArtifactError, did_you_mean
from llmkit.files import digest_file, digest_files, digest_json, package_path, read_json
from llmkit.model.gguf import cached_folder, quiet_transformers

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

HUB_ID = re.compile(r"[\w.-]+/[\w.-]+(@[\w./-]+)?")
HUB_FILES = ("*.safetensors", "*.json", "*.jinja", "*.model", "*.txt")
HUB_IGNORED = ("*/*", "consolidated*.safetensors")  # copies of the weights in other layouts
RUN_MODELS = ("export/transformers", "finetune/model", "pretrain/model")  # newest first
WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
PICKLES = ("pytorch_model*.bin", "*.pt", "*.pth", "*.ckpt")
TOKENIZER_FILES = (
    *("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "vocab.json"),
    *("vocab.txt", "merges.txt", "*.model", "*.tiktoken", "chat_template.jinja", "chat_template.json"),
)
VOCABULARIES = ("tokenizer.json", "vocab.json", "vocab.txt", "*.model", "*.tiktoken")
VOLATILE_KEYS = {"_name_or_path", "name_or_path", "transformers_version", "is_local", "local_files_only"}
LARGEST_HEADER_BYTES = 100_000_000  # the safetensors format's own limit

_NO_LIMIT = 10**12  # tokenizers without a limit say 10^30


@dataclass(frozen=True)
class LoadedModel:
    """A model, the parameters that its files did not hold (a new head) and those that it had no use for."""

    model: Any
    new_parameters: tuple[str, ...]
    unused_parameters: tuple[str, ...]


def locate(uri: str) -> Path:
    """The local Transformers folder that a model URI names, checked to be whole.

    A URI is a folder, a run directory (its newest model), a `.gguf` file (de-quantised once into the user's cache), a
    `pkg://PACKAGE/path` of these, or a hub id `owner/name[@revision]`. Weights are not read, only their headers.
    Raises ArtifactError for what is missing, damaged, or holds only pickled weights.
    """
    path = package_path(uri) if uri.startswith("pkg://") else Path(uri).expanduser()
    if not path.exists():
        if not _is_hub_id(uri):
            raise _missing(uri, path)
        path = _snapshot(uri)
    if path.is_file():
        if path.suffix.lower() != ".gguf":
            raise ArtifactError(
                "a model is a folder or a .gguf file", got=uri, hint=f"the folder may be `{path.parent}`", where=path
            )
        path = cached_folder(path)
    elif (path / "run.json").is_file():
        path = _newest_model(path)
    check_folder(path)
    return path


def check_folder(folder: Path) -> None:
    """Raises ArtifactError, naming the file, when a folder does not hold a whole model in safetensors.

    A configuration with a tokenizer and no weights passes: that is enough to preprocess with.
    """
    if not (folder / "config.json").is_file():
        raise ArtifactError(
            "this folder does not hold a model", got=folder, expected="a folder with config.json", where=folder
        )
    read_json(folder / "config.json")
    shards = _shards(folder)
    for shard in shards:
        _check_safetensors(shard)
    pickles = [file.name for pattern in PICKLES for file in sorted(folder.glob(pattern))]
    if not shards and pickles:
        raise ArtifactError(
            "this folder holds its weights only as a pickle, which can run any code when it is opened",
            got=pickles[0],
            expected=f"{WEIGHTS}, or shards with {INDEX}",
            hint="convert it to safetensors where you trust it (model.save_pretrained writes them), and use that folder",
            where=folder,
        )
    if not shards and not _files(folder, VOCABULARIES):
        raise ArtifactError("this folder has neither weights nor a tokenizer", expected=WEIGHTS, where=folder)


def weights_digest(folder: Path) -> str:
    """SHA-256 over the configuration, less what changes on every save, and the bytes of the weights."""
    shards = _shards(folder)
    if not shards:
        raise ArtifactError("this folder has no weights", expected=f"{WEIGHTS}, or shards with {INDEX}", where=folder)
    return digest_json([_lasting(read_json(folder / "config.json")), digest_files(shards)])


def tokenizer_digest(folder: Path) -> str | None:
    """SHA-256 over the files that decide how text becomes ids, the chat template included; None without a tokenizer."""
    if not _files(folder, VOCABULARIES):
        return None
    digests = {}
    for file in _files(folder, TOKENIZER_FILES):
        settings = file.name == "tokenizer_config.json"
        digests[file.name] = digest_json(_lasting(read_json(file))) if settings else digest_file(file)
    return digest_json(digests)


def load_config(folder: Path) -> PretrainedConfig:
    """A folder's model configuration. Raises ArtifactError for a damaged one or an unknown architecture."""
    from transformers import AutoConfig

    read_json(folder / "config.json")
    with _as_artifact_errors("the configuration cannot be loaded", folder):
        return AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)


def load_tokenizer(folder: Path) -> PreTrainedTokenizerBase:
    """A folder's tokenizer. Raises ArtifactError when it has none, or a damaged one."""
    from transformers import AutoTokenizer

    if not _files(folder, VOCABULARIES):
        raise ArtifactError("this folder has no tokenizer", expected="tokenizer.json or a vocabulary", where=folder)
    for file in _files(folder, TOKENIZER_FILES):
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

    if not _shards(folder):
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
    new = _new_parameters(model, report, folder, shapes_may_change=bool(config_changes))
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
        raise ArtifactError(what, got=f"{type(error).__name__}: {error}", where=where) from error


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


def _is_hub_id(uri: str) -> bool:
    return HUB_ID.fullmatch(uri) is not None and uri[0] not in ".~" and Path(uri).suffix.lower() != ".gguf"


def _snapshot(uri: str) -> Path:
    """A hub model's files, from the local cache or downloaded into it."""
    from huggingface_hub import snapshot_download

    name, _, revision = uri.partition("@")
    try:
        with quiet_transformers():
            return Path(
                snapshot_download(
                    name, revision=revision or None, allow_patterns=list(HUB_FILES), ignore_patterns=list(HUB_IGNORED)
                )
            )
    except Exception as error:  # whatever the network, its libraries and the hub can raise
        raise ArtifactError(
            f"`{uri}` is neither a local path nor a model that can be had from the hub",
            got=f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}",
            expected="a folder, a .gguf file, pkg://PACKAGE/path, or a hub id that is cached or can be downloaded",
            hint=_nearest_sibling(Path(uri))
            or "HF_HOME names the folder that holds the cache; with HF_HUB_OFFLINE=1 only cached models are found",
        ) from None


def _missing(uri: str, path: Path) -> ArtifactError:
    return ArtifactError(
        f"there is no model at `{uri}`",
        got=uri,
        expected="a folder, a .gguf file, pkg://PACKAGE/path, or a hub id `owner/name`",
        hint=_nearest_sibling(path),
    )


def _nearest_sibling(path: Path) -> str | None:
    siblings = [item.name for item in path.parent.iterdir()] if path.parent.is_dir() else []
    return did_you_mean(path.name, siblings)


def _newest_model(run: Path) -> Path:
    for inner in RUN_MODELS:
        if (run / inner / "config.json").is_file():
            return run / inner
    raise ArtifactError(
        "this run has no model yet", got=run, expected="one of " + ", ".join(RUN_MODELS), hint="finish the run first"
    )


def _files(folder: Path, patterns: tuple[str, ...]) -> list[Path]:
    return sorted({file for pattern in patterns for file in folder.glob(pattern) if file.is_file()})


def _shards(folder: Path) -> list[Path]:
    """The files that hold the weights, in order; none where there are no safetensors."""
    if (folder / WEIGHTS).is_file() or not (folder / INDEX).is_file():
        return _files(folder, (WEIGHTS,))
    index = read_json(folder / INDEX)
    weight_map = index.get("weight_map") if isinstance(index, dict) else None
    if not isinstance(weight_map, dict) or not weight_map:
        raise ArtifactError("an index of weights is damaged", expected="an object `weight_map`", where=folder / INDEX)
    shards = [folder / name for name in sorted(set(map(str, weight_map.values())))]
    missing = [shard.name for shard in shards if not shard.is_file()]
    if missing:
        raise ArtifactError("shards of the weights are missing", got=", ".join(missing), where=folder / INDEX)
    return shards


def _check_safetensors(path: Path) -> None:
    """Compares a file's size with what its header promises (https://huggingface.co/docs/safetensors)."""
    size = path.stat().st_size
    hint = "fetch or export it again; where it lies in a cache, remove its folder first"
    with path.open("rb") as file:
        header_bytes = int.from_bytes(file.read(8), "little")
        header = file.read(header_bytes) if header_bytes <= LARGEST_HEADER_BYTES else b""
    try:
        tensors = {name: entry for name, entry in json.loads(header).items() if name != "__metadata__"}
        end = 8 + header_bytes + max((entry["data_offsets"][1] for entry in tensors.values()), default=0)
    except (ValueError, KeyError, TypeError, AttributeError, IndexError):
        raise ArtifactError("a safetensors file is damaged: its header cannot be read", hint=hint, where=path) from None
    if size != end:
        what = "cut short" if size < end else "longer than its header says"
        raise ArtifactError(
            f"a safetensors file is {what}", got=f"{size:,} bytes", expected=f"{end:,} bytes", hint=hint, where=path
        )


def _lasting(value: Any) -> Any:
    """A JSON value without the keys that change whenever Transformers saves it."""
    if isinstance(value, dict):
        return {key: _lasting(item) for key, item in value.items() if key not in VOLATILE_KEYS}
    return [_lasting(item) for item in value] if isinstance(value, list) else value
