"""A Transformers folder on disk: whether it is whole, and what it says, as digests."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from llmkit.errors import ArtifactError
from llmkit.files import digest_file, digest_files, digest_json, read_json

WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
PICKLES = ("pytorch_model*.bin", "*.pt", "*.pth", "*.ckpt")
TOKENIZER_FILES = (
    *("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "vocab.json"),
    *("vocab.txt", "merges.txt", "*.model", "*.tiktoken", "chat_template.jinja", "chat_template.json"),
)
VOCABULARIES = ("tokenizer.json", "vocab.json", "vocab.txt", "*.model", "*.tiktoken")
VOLATILE_KEYS = {"_name_or_path", "name_or_path", "transformers_version", "is_local", "local_files_only"}
LARGEST_HEADER_BYTES = 100_000_000  # the safetensors format's own limit


def check_folder(folder: Path) -> None:
    """Raises ArtifactError, naming the file, when a folder does not hold a whole model in safetensors.

    A configuration with a tokenizer and no weights passes: that is enough to preprocess with.
    """
    if not (folder / "config.json").is_file():
        raise ArtifactError(
            "this folder does not hold a model", got=folder, expected="a folder with config.json", where=folder
        )
    read_json(folder / "config.json")
    shards = weight_files(folder)
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
    if not shards and not files_in(folder, VOCABULARIES):
        raise ArtifactError("this folder has neither weights nor a tokenizer", expected=WEIGHTS, where=folder)


def weights_digest(folder: Path) -> str:
    """SHA-256 over the configuration, less what changes on every save, and the bytes of the weights."""
    shards = weight_files(folder)
    if not shards:
        raise ArtifactError("this folder has no weights", expected=f"{WEIGHTS}, or shards with {INDEX}", where=folder)
    return digest_json([_lasting(read_json(folder / "config.json")), digest_files(shards)])


def tokenizer_digest(folder: Path) -> str | None:
    """SHA-256 over the files that decide how text becomes ids, the chat template included; None without a tokenizer."""
    if not files_in(folder, VOCABULARIES):
        return None
    digests = {}
    for file in files_in(folder, TOKENIZER_FILES):
        settings = file.name == "tokenizer_config.json"
        digests[file.name] = digest_json(_lasting(read_json(file))) if settings else digest_file(file)
    return digest_json(digests)


def files_in(folder: Path, patterns: tuple[str, ...]) -> list[Path]:
    """The files of a folder that match any of the patterns, sorted."""
    return sorted({file for pattern in patterns for file in folder.glob(pattern) if file.is_file()})


def weight_files(folder: Path) -> list[Path]:
    """The files that hold the weights, in order; none where there are no safetensors."""
    if (folder / WEIGHTS).is_file() or not (folder / INDEX).is_file():
        return files_in(folder, (WEIGHTS,))
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
