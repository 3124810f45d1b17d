"""Low-rank adapters, through PEFT: the model stands still, and small matrices beside its products learn.

They are put into the model in place, so that everything else of llmkit works on it as on any other. LoRA: Hu et al., 2021
(https://arxiv.org/abs/2106.09685); rsLoRA: Kalajdzievski, 2023; DoRA: Liu et al., 2024.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from llmkit.errors import ArtifactError, RecipeError
from llmkit.files import read_json
from llmkit.model.anatomy import blocks_of, read_anatomy
from llmkit.model.parts import blocks_named, some_of

WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"
_NAME = "default"  # of the one adapter; PEFT can hold several
_PREFIX = "base_model.model."  # of the names in PEFT's files
_ATTENTION = re.compile(r"Attention|Attn")


@dataclass(frozen=True)
class AdapterRules:
    """What a recipe says of adapters. `targets` are attention, mlp or all; `blocks` those that get adapters, None for
    all that do not stand still; `start` is a folder with an adapter to go on from.
    """

    name: str = "lora"
    rank: int = 16
    alpha: int = 32
    dropout: float = 0.0
    targets: str = "all"
    blocks: str | None = None
    start: Path | None = None


def add_adapters(model: Any, rules: AdapterRules, frozen: Collection[str] = ()) -> tuple[str, ...]:
    """Puts adapters beside the linear layers of blocks, which then stand still; gives those layers' paths.

    Heads outside the base model (a classifier) stay trainable; all else stands still. Parameters named in `frozen` get no
    adapters above or beside them. Raises RecipeError for targets that are not there or stand still, ArtifactError for an
    adapter to start from that does not fit.
    """
    try:
        from peft import inject_adapter_in_model
    except ImportError:
        raise RecipeError(
            "adapters need a package that is not installed",
            got="no peft",
            hint="pip install 'llmkit[adapters]'",
            where="adapter",
        ) from None
    config = _read_config(rules.start) if rules.start else None
    targets = _targets(model, rules, frozen) if config is None else ()
    stays = {*frozen, *_outputs(model)}
    head = [name for name in read_anatomy(model).head if name not in stays]
    try:
        inject_adapter_in_model(config or _config(rules, targets), model)
    except ValueError as error:
        raise ArtifactError(
            "the adapter does not fit the model", got=str(error).partition("\n")[0], where=rules.start
        ) from None
    adapted = tuple(path for path, module in model.named_modules() if isinstance(module, _layer_class()))
    if still := [path for path in adapted if f"{path}.weight" in frozen]:
        raise RecipeError(
            "the adapter has layers in blocks that stand still",
            got=some_of(still),
            hint="freeze fewer blocks, or begin a new adapter",
            where="adapter.start",
        )
    for name in head:
        model.get_parameter(name).requires_grad_(True)
    if rules.start is not None and model.device.type != "meta":
        _load(model, rules.start)
    return adapted


@contextmanager
def merged(model: Any) -> Iterator[dict[str, torch.Tensor]]:
    """A model's weights by their names without adapters, the adapters merged into them; afterwards they are apart again."""
    layers = _layers(model)
    before = [layer.get_base_layer().weight.data for layer in layers]
    try:
        for layer in layers:
            layer.merge(safe_merge=True)  # which makes new weights and leaves the old ones as they are
        yield {_plain(name): tensor for name, tensor in model.state_dict().items() if not _of_an_adapter(name)}
    finally:
        for layer, weight in zip(layers, before, strict=True):
            layer.get_base_layer().weight.data = weight
            layer.merged_adapters.clear()


def save_adapter(model: Any, folder: Path, base: str) -> None:
    """Writes the adapter alone, as PEFT reads it, with the heads that were trained beside it."""
    from safetensors.torch import save_file

    folder.mkdir(parents=True, exist_ok=True)
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    tensors = {_in_a_file(name): p.detach().cpu().contiguous() for name, p in trained.items()}
    save_file(tensors, folder / WEIGHTS)
    config = model.peft_config[_NAME]
    heads = sorted({name.partition(".")[0] for name in trained if not _of_an_adapter(name)})
    config.modules_to_save, config.base_model_name_or_path = heads or None, base
    config.save_pretrained(folder)


def _targets(model: Any, rules: AdapterRules, frozen: Collection[str]) -> tuple[str, ...]:
    anatomy, blocks = read_anatomy(model), blocks_of(model)
    still = {number for number, names in enumerate(anatomy.blocks) if frozen and set(names) <= set(frozen)}
    wanted = blocks_named(rules.blocks, anatomy, "adapter") if rules.blocks is not None else None
    if wanted is not None and still & set(wanted):
        raise RecipeError(
            "adapters are asked for in blocks that stand still",
            got=f"blocks {', '.join(map(str, sorted(still & set(wanted))))}",
            expected="blocks that `freeze` does not name",
            where="adapter.blocks",
        )
    chosen = [number for number in (range(len(blocks)) if wanted is None else wanted) if number not in still]
    inside = {id(module) for number in chosen for module in blocks[number].modules()}
    of_attention = {
        id(part)
        for module in model.modules()
        if id(module) in inside and _ATTENTION.search(type(module).__name__)
        for part in module.modules()
    }
    found = []
    for path, module in model.named_modules():
        is_linear = isinstance(module, torch.nn.Linear) or type(module).__name__ == "Conv1D"
        if id(module) in inside and is_linear:
            part = "attention" if id(module) in of_attention else "mlp"
            if rules.targets in ("all", part):
                found.append(path)
    if not found:
        raise RecipeError(
            "there is nothing to put adapters beside",
            got=f"no linear layer of `{rules.targets}` in {some_of([f'block {n}' for n in chosen]) or 'any block'}",
            expected="targets: attention, mlp or all, in blocks that do not stand still",
            where="adapter",
        )
    return tuple(found)


def _config(rules: AdapterRules, targets: tuple[str, ...]) -> Any:
    from peft import LoraConfig

    return LoraConfig(
        r=rules.rank,
        lora_alpha=rules.alpha,
        lora_dropout=rules.dropout,
        target_modules=list(targets),
        use_rslora=rules.name == "rslora",
        use_dora=rules.name == "dora",
    )


def _read_config(folder: Path) -> Any:
    from peft import LoraConfig

    values = read_json(folder / CONFIG)
    if values.get("peft_type") != "LORA":
        raise ArtifactError("this is no LoRA adapter", got=values.get("peft_type"), expected="LORA", where=folder)
    config = LoraConfig.from_pretrained(str(folder))
    config.inference_mode, config.modules_to_save = False, None  # heads are trained as they are, not as copies
    return config


def _load(model: Any, folder: Path) -> None:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    path = folder / WEIGHTS
    if not path.is_file():
        raise ArtifactError("an adapter has no weights", expected=WEIGHTS, where=folder)
    try:
        tensors = load_file(path)
    except SafetensorError as error:
        raise ArtifactError("an adapter's weights are damaged", got=str(error), where=path) from None
    known = {_in_a_file(name): p for name, p in model.named_parameters() if p.requires_grad}
    odd = sorted(
        (tensors.keys() ^ known.keys()) | {n for n in tensors.keys() & known if tensors[n].shape != known[n].shape}
    )
    if odd:
        raise ArtifactError(
            "the adapter does not fit the model",
            got=f"missing, unknown or of another shape: {some_of(odd)}",
            where=path,
        )
    with torch.no_grad():
        for name, tensor in tensors.items():
            known[name].copy_(tensor)


def _layers(model: Any) -> list[Any]:
    return [module for module in model.modules() if isinstance(module, _layer_class())]


def _layer_class() -> Any:
    from peft.tuners.lora import LoraLayer

    return LoraLayer


def _outputs(model: Any) -> set[str]:
    """The output embeddings of a language model, which are no new head."""
    outputs = model.get_output_embeddings()
    mine = {id(parameter) for parameter in outputs.parameters()} if outputs is not None else set()
    return {name for name, parameter in model.named_parameters() if id(parameter) in mine}


def _in_a_file(name: str) -> str:
    """A parameter's name as PEFT writes it."""
    plain = _PREFIX + name.replace(f".{_NAME}", "")
    return plain.removesuffix(".weight") if "lora_magnitude_vector" in plain else plain


def _of_an_adapter(name: str) -> bool:
    return ".lora_" in name


def _plain(name: str) -> str:
    return name.replace(".base_layer.", ".")
