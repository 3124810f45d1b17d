"""GGUF files, de-quantised once into a Transformers folder that the user's cache keeps."""

from __future__ import annotations

import contextlib
import io
import shutil
import tempfile
from pathlib import Path
from typing import Any

from llmkit.errors import ArtifactError, ResourceError
from llmkit.files import cache_folder, digest_file, digest_json, sync_folder
from llmkit.model.loading import load_model, load_tokenizer, quiet_transformers

CONVERSION_VERSION = 1  # raise it when `convert` writes something else for the same file
MAGIC = b"GGUF"
PROBE = 'def add(a: int, b: int) -> int:\n    """Café: 1234 naïve tokens."""\n    return a + b  # done\n'


def cached_folder(gguf: Path) -> Path:
    """The Transformers folder of a GGUF file, converted on first use and found by content afterwards.

    It lies in `$XDG_CACHE_HOME` (or ~/.cache) under llmkit/gguf, is written aside and renamed, and processes that ask
    at the same time wait for one conversion. Raises ArtifactError for a damaged file, ResourceError where the cache
    cannot be written.
    """
    import transformers
    from filelock import FileLock
    from safetensors import SafetensorError

    check_magic(gguf)
    key = digest_json([digest_file(gguf), transformers.__version__, CONVERSION_VERSION])[:16]
    cache = cache_folder("gguf")
    folder = cache / key
    try:
        cache.mkdir(parents=True, exist_ok=True)
        with FileLock(cache / f".{key}.lock"):
            if not folder.exists():
                _convert_aside(gguf, folder)
    except (OSError, SafetensorError) as error:  # safetensors reports a full disk as its own
        raise ResourceError(
            "the cache for converted models cannot be written",
            got=str(error),
            hint="free some space, or set XDG_CACHE_HOME to a folder with room",
            where=cache,
        ) from None
    return folder


def _convert_aside(gguf: Path, folder: Path) -> None:
    for left_over in folder.parent.glob(f".{folder.name}-*"):  # by a conversion that was killed; the lock is ours
        shutil.rmtree(left_over, ignore_errors=True)
    aside = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
    try:
        convert(gguf, aside)
        aside.chmod(0o755)
        aside.rename(folder)
        sync_folder(folder.parent)
    finally:
        shutil.rmtree(aside, ignore_errors=True)


def check_magic(gguf: Path) -> None:
    """Raises ArtifactError for a file that does not begin as GGUF files do."""
    with gguf.open("rb") as file:
        begin = file.read(len(MAGIC))
    if begin != MAGIC:
        raise ArtifactError(
            "this is not a GGUF file", got=f"it begins with {begin!r}", expected=repr(MAGIC), where=gguf
        )


def convert(gguf: Path, folder: Path) -> None:
    """Writes a GGUF file's model, de-quantised to fp32, and its tokenizer as a Transformers folder.

    The folder is loaded back: its weights must equal the converted ones and its tokenizer must give the same ids.
    Raises ArtifactError for a file that is not GGUF, is cut short, or holds a model that Transformers cannot read.
    """
    _check_complete(gguf)
    with quiet_transformers(), contextlib.redirect_stderr(io.StringIO()):  # de-quantising draws a bar of its own
        model, tokenizer = _read(gguf)
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
    _check_weights(model, folder, gguf)
    _check_tokenizer(tokenizer, folder, gguf)


def _check_complete(gguf: Path) -> None:
    """Reads the header and maps every tensor, which fails for a file that is cut short."""
    from gguf import GGUFReader

    check_magic(gguf)
    try:
        tensors = GGUFReader(gguf).tensors
    except (ValueError, IndexError, KeyError, TypeError, OverflowError, UnicodeDecodeError) as error:
        raise ArtifactError(
            "a GGUF file is damaged or cut short", got=str(error), hint="download it again", where=gguf
        ) from None
    if not tensors:
        raise ArtifactError("a GGUF file holds no weights", expected="a model, not only a vocabulary", where=gguf)


def _read(gguf: Path) -> tuple[Any, Any]:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    source: dict[str, Any] = {"gguf_file": gguf.name, "local_files_only": True}
    try:
        model = AutoModelForCausalLM.from_pretrained(gguf.parent, dtype=torch.float32, **source)
        tokenizer = AutoTokenizer.from_pretrained(gguf.parent, **source)
    except torch.OutOfMemoryError:
        raise
    except (OSError, ValueError, KeyError, RuntimeError, NotImplementedError, ImportError) as error:
        raise ArtifactError("Transformers cannot read this GGUF file", got=str(error), where=gguf) from None
    for holder, attribute in ((model, "hf_quantizer"), (model, "quantization_method")):
        if hasattr(holder, attribute):
            setattr(holder, attribute, None)
    if hasattr(model, "is_quantized"):
        model.is_quantized = False
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    model.config._name_or_path = gguf.name
    return model, tokenizer


def _check_weights(model: Any, folder: Path, gguf: Path) -> None:
    import torch

    expected = model.state_dict()
    loaded = load_model(folder, "AutoModelForCausalLM")
    state = loaded.model.state_dict()
    odd = [*(expected.keys() ^ state.keys()), *loaded.new_parameters, *loaded.unused_parameters]
    odd += [name for name in expected.keys() & state.keys() if not torch.equal(expected[name], state[name])]
    if odd:
        raise ArtifactError("converted weights differ after saving", got=", ".join(sorted(odd)[:3]), where=gguf)


def _check_tokenizer(tokenizer: Any, folder: Path, gguf: Path) -> None:

    loaded = load_tokenizer(folder)
    expected, got = tokenizer(PROBE)["input_ids"], loaded(PROBE)["input_ids"]
    if expected != got:
        raise ArtifactError("the converted tokenizer differs after saving", got=got, expected=str(expected), where=gguf)
    text = loaded.decode(got, skip_special_tokens=True, clean_up_tokenization_spaces=False)
    if text.strip() != PROBE.strip():
        raise ArtifactError("the converted tokenizer loses text", got=repr(text), expected=repr(PROBE), where=gguf)
