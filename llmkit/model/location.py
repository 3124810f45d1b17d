"""From a model's URI to a local Transformers folder."""

from __future__ import annotations

import re
from pathlib import Path

from llmkit.errors import ArtifactError, did_you_mean
from llmkit.files import package_path
from llmkit.model.folder import check_folder
from llmkit.model.gguf import cached_folder
from llmkit.model.loading import quiet_transformers

HUB_ID = re.compile(r"[\w.-]+/[\w.-]+(@[\w./-]+)?")
HUB_FILES = ("*.safetensors", "*.json", "*.jinja", "*.model", "*.txt")
CONFIG_FILES = ("*.json", "*.jinja", "*.model", "*.txt")  # all but the weights
HUB_IGNORED = ("*/*", "consolidated*.safetensors")  # copies of the weights in other layouts
RUN_MODELS = ("export/transformers", "finetune/model", "pretrain/model")  # newest first


def locate_config(uri: str) -> Path:
    """The folder with a model's config.json, which need not hold anything else; of a hub model nothing else is fetched.

    Raises ArtifactError as `locate` does.
    """
    folder = Path(uri).expanduser()
    if (folder / "config.json").is_file():
        return folder
    if not folder.exists() and _is_hub_id(uri):
        return _snapshot(uri, CONFIG_FILES)
    return locate(uri)


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


def _is_hub_id(uri: str) -> bool:
    return HUB_ID.fullmatch(uri) is not None and uri[0] not in ".~" and Path(uri).suffix.lower() != ".gguf"


def _snapshot(uri: str, files: tuple[str, ...] = HUB_FILES) -> Path:
    """A hub model's files, from the local cache or downloaded into it."""
    from huggingface_hub import snapshot_download

    name, _, revision = uri.partition("@")
    try:
        with quiet_transformers():
            return Path(
                snapshot_download(
                    name, revision=revision or None, allow_patterns=list(files), ignore_patterns=list(HUB_IGNORED)
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
