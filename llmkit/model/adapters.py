"""Low-rank adapters, through PEFT: the model stands still, and small matrices beside its products learn.

They are put into the model in place, so that everything else of llmkit works on it as on any other. LoRA: Hu et al., 2021
(https://arxiv.org/abs/2106.09685); rsLoRA: Kalajdzievski, 2023; DoRA: Liu et al., 2024; QLoRA, whose model takes 4 bits a
weight: Dettmers et al., 2023.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from contextlib import contextmanager
from copy import deepcopy
from pathlib import Path
from typing import Any

import torch

from llmkit.errors import ArtifactError, RecipeError
from llmkit.files import read_json, write_json
from llmkit.model.adapter_targets import AdapterRules, is_linear, targets_in
from llmkit.model.anatomy import blocks_of, read_anatomy
from llmkit.model.parts import some_of
from llmkit.model.precision import default_device
from llmkit.model.quantized import check_four_bits, is_quantized, quantize_layers, quantized_layers

WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"
BASE = "adapter_base.json"  # what an adapter was trained on top of, where that was not the model as it is
_NAME = "default"  # of the one adapter; PEFT can hold several
_PREFIX = "base_model.model."  # of the names in PEFT's files


def add_adapters(model: Any, rules: AdapterRules, frozen: Collection[str] = ()) -> tuple[str, ...]:
    """Puts adapters beside the linear layers of blocks, which then stand still; gives those layers' paths.

    Heads outside the base model (a classifier) stay trainable; all else stands still. Parameters named in `frozen` get no
    adapters above or beside them. With `qlora` the linear layers of all blocks are held in 4 bits, whether adapters stand
    beside them or not, but for what is named in `frozen`, which keeps its bits. Raises RecipeError for targets that are not
    there or stand still, and where 4 bits cannot be had; ArtifactError for an adapter to start from that does not fit.
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
    targets = targets_in(model, rules, frozen) if config is None else ()
    stays = {*frozen, *_outputs(model)}
    head = [name for name in read_anatomy(model).head if name not in stays]
    if in_four_bits(rules):
        _quantize(model, config, frozen)
    config = config or _config(rules, targets)
    seen = _WithoutConfig(model) if _would_mean_experts(config, model) else model
    seen.is_loaded_in_4bit = in_four_bits(rules)  # which lets PEFT look for such layers
    try:
        model.peft_config = inject_adapter_in_model(config, seen).peft_config
    except ValueError as error:
        raise ArtifactError(
            "the adapter does not fit the model", got=str(error).partition("\n")[0], where=rules.start
        ) from None
    finally:
        del seen.is_loaded_in_4bit
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


def in_four_bits(rules: AdapterRules) -> bool:
    """True when what stands still is held in 4 bits: as asked, or as it was for the adapter to start from."""
    return rules.name == "qlora" or (rules.start is not None and (rules.start / BASE).is_file())


def misread_by_peft(model: Any) -> bool:
    """True when PEFT would put the adapter, loaded alone, beside experts: its names mean these in an older Transformers."""
    return _would_mean_experts(model.peft_config[_NAME], model)


@contextmanager
def merged(model: Any) -> Iterator[dict[str, torch.Tensor]]:
    """A model's weights by their names without adapters, the adapters merged into them; afterwards they are apart again.

    Weights of 4 bits are unpacked, on the CPU: these are what the model computed with.
    """
    quantized = quantized_layers(model)
    layers = [layer for layer in _layers(model) if not is_quantized(layer.get_base_layer())]
    before = [layer.get_base_layer().weight.data for layer in layers]
    try:
        for layer in layers:
            layer.merge(safe_merge=True)  # which makes new weights and leaves the old ones as they are
        yield {
            _plain(name): tensor
            for name, tensor in model.state_dict().items()
            if not _of_an_adapter(name) and name.removesuffix(".weight") not in quantized
        } | {_plain(f"{path}.weight"): _unpacked(model, path) for path in quantized}
    finally:
        for layer, weight in zip(layers, before, strict=True):
            layer.get_base_layer().weight.data = weight
            layer.merged_adapters.clear()


def save_adapter(model: Any, folder: Path, base: str) -> None:
    """Writes the adapter alone, as PEFT reads it, with the heads that were trained beside it.

    One that was trained on top of 4 bits is given a note of that, which llmkit heeds when it goes on from there.
    """
    from safetensors.torch import save_file

    folder.mkdir(parents=True, exist_ok=True)
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    tensors = {_in_a_file(name): p.detach().cpu().contiguous() for name, p in trained.items()}
    save_file(tensors, folder / WEIGHTS)
    config = model.peft_config[_NAME]
    heads = sorted({name.partition(".")[0] for name in trained if not _of_an_adapter(name)})
    config.modules_to_save, config.base_model_name_or_path = heads or None, base
    config.save_pretrained(folder)
    if quantized_layers(model):
        write_json(folder / BASE, {"bits": 4, "quant_type": "nf4", "double_quantization": True})


def _quantize(model: Any, config: Any, frozen: Collection[str]) -> None:
    """Holds the linear layers of all blocks in 4 bits, but for what keeps its bits."""
    if config is not None and config.use_dora:
        raise RecipeError(
            "DoRA adapters cannot stand beside weights of 4 bits",
            got="an adapter with `use_dora` to start from",
            hint="leave out `name: qlora`, or begin a new adapter",
            where="adapter.start",
        )
    if model.device.type != "meta":
        check_four_bits(default_device())
    inside = {id(module) for block in blocks_of(model) for module in block.modules()}
    layers = [path for path, module in model.named_modules() if id(module) in inside and is_linear(module)]
    layers = [path for path in layers if f"{path}.weight" not in frozen]
    kinds = sorted({type(model.get_submodule(path)).__name__ for path in layers})
    if len(quantize_layers(model, layers)) == len(layers):
        raise RecipeError(
            "there is nothing to hold in 4 bits",
            got=f"linear layers that have to stay as they are ({some_of(kinds)})" if layers else "no linear layer",
            expected="plain linear layers in blocks that `freeze` does not name",
            hint="use `lora`",
            where="adapter.name",
        )


class _WithoutConfig(torch.nn.Module):
    """The modules of a model, of which PEFT is not to know the family.

    In some mixtures of experts it would take the name of a linear layer (`gate_proj`) for that of the experts in an older
    Transformers, and put adapters beside these in its place.
    """

    def __init__(self, model: Any) -> None:
        super().__init__()
        self._modules, self._parameters, self._buffers = model._modules, model._parameters, model._buffers


def _would_mean_experts(config: Any, model: Any) -> bool:
    try:
        from peft.utils.transformers_weight_conversion import convert_peft_config_for_transformers
    except ImportError:  # an older PEFT does not look for them
        return False
    tried = deepcopy(config)
    try:
        convert_peft_config_for_transformers(tried, model, None)
    except ValueError:  # not all that is one tensor today was named
        return True
    return bool(tried.target_parameters)


def _unpacked(model: Any, path: str) -> torch.Tensor:
    """The weights of a layer that is held in 4 bits, with its adapter, in fp32 and on the CPU."""
    layer = model.get_submodule(path)
    weight: torch.Tensor = layer.original()
    above = model.get_submodule(path.rpartition(".")[0])
    if isinstance(above, _layer_class()):
        delta = above.get_delta_weight(_NAME).detach()
        weight = weight + (delta.t() if layer.transposed else delta)
    return weight.cpu().contiguous()


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
    if values.get("target_parameters"):
        raise ArtifactError(
            "the adapter stands beside parameters that no linear layer holds",
            got=some_of(values["target_parameters"]),
            expected="`target_modules` alone",
            where=folder,
        )
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
