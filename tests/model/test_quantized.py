"""Linear layers of 4 bits: they compute with what they unpack to, the same at any time, and say what cannot be."""

from __future__ import annotations

import importlib.metadata
from typing import Any

import pytest
import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSeq2SeqLM
from transformers.pytorch_utils import Conv1D

from llmkit.errors import RecipeError
from llmkit.model import quantized
from llmkit.model.quantized import (
    check_four_bits,
    is_quantized,
    numbers_in,
    quantize_layers,
    quantized_layers,
    what_is_quantized,
)

functional = pytest.importorskip("bitsandbytes.functional")
CPU = torch.device("cpu")


def linear(inputs: int, outputs: int, *, bias: bool = True, kind: str = "Linear") -> nn.Module:
    torch.manual_seed(3)
    layer: nn.Module = Conv1D(outputs, inputs) if kind == "Conv1D" else nn.Linear(inputs, outputs, bias=bias)
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.normal_(std=0.1).requires_grad_(False)
    return layer


def held(layer: nn.Module) -> Any:
    """The same layer in 4 bits."""
    model = nn.Sequential(layer)
    assert quantize_layers(model, ["0"]) == ()
    return model[0]


def by_hand(layer: Any) -> torch.Tensor:
    """The weights from their codes and scales, one product a number."""
    codes = torch.stack([layer.weight.flatten() >> 4, layer.weight.flatten() & 15], 1).flatten().long()
    scales = layer.scales_code[layer.scales.long()] * layer.scales_scales.repeat_interleave(256)[: len(layer.scales)]
    table = functional.get_4bit_type("nf4", device="cpu")
    numbers = table[codes] * (scales + layer.scales_offset).repeat_interleave(64)
    return numbers[: layer.out_features * layer.in_features].view(layer.out_features, layer.in_features)


@pytest.mark.parametrize("inputs", [1, 2, 7, 16, 24, 32, 48, 64, 80, 96, 208, 576])
def test_weights_unpack_to_what_codes_and_scales_say(inputs: int) -> None:
    """Also for widths at which bitsandbytes 0.50.2 reads wrong scales on a CPU with AVX-512: 16, 32, 48, 80, ..."""
    layer = linear(inputs, 37)
    packed = held(layer)
    full = packed.in_full(torch.float32)
    torch.testing.assert_close(full, by_hand(packed), atol=1e-7, rtol=1e-6)
    assert torch.equal(packed.in_full(torch.bfloat16), full.to(torch.bfloat16))
    lost = (full - layer.weight).norm() / layer.weight.norm()
    assert lost < 0.12
    assert what_is_quantized(nn.Sequential(packed)).error == pytest.approx(float(lost), rel=1e-4)


def test_codes_are_those_that_bitsandbytes_gives_a_matrix() -> None:
    layer = linear(128, 24)
    codes, state = functional.quantize_4bit(layer.weight, compress_statistics=True, quant_type="nf4")
    packed = held(layer)
    assert torch.equal(packed.weight, codes)
    assert torch.equal(packed.scales, state.absmax)
    assert torch.equal(packed.in_full(torch.float32), functional.dequantize_4bit(codes, state))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", ["Linear", "Conv1D", "no bias"])
def test_products_and_gradients_are_those_of_the_unpacked_weights(kind: str, dtype: torch.dtype) -> None:
    packed = held(linear(48, 20, bias=kind != "no bias", kind=kind))
    plain = linear(48, 20, bias=kind != "no bias", kind=kind)
    plain.weight.data = packed.original()
    assert plain.weight.shape == linear(48, 20, kind=kind).weight.shape
    plain = plain.to(dtype)
    found, expected = (torch.randn(2, 5, 48, generator=torch.Generator().manual_seed(1)).to(dtype) for _ in range(2))
    results = []
    for layer, x in ((packed, found.requires_grad_()), (plain, expected.requires_grad_())):
        product = layer(x)
        product.sin().sum().backward()
        results.append((product.detach(), x.grad))
    (product, gradient), (plain_product, plain_gradient) = results
    assert product.dtype == gradient.dtype == dtype  # type: ignore[union-attr]
    tolerance = 1e-6 if dtype == torch.float32 else 0.02
    torch.testing.assert_close(product, plain_product, atol=tolerance, rtol=tolerance)
    torch.testing.assert_close(gradient, plain_gradient, atol=tolerance, rtol=tolerance)


def test_autocast_casts_inputs_and_leaves_the_bias_as_it_is() -> None:
    packed = held(linear(64, 32))
    before = packed.bias.clone()
    with torch.autocast("cpu", torch.bfloat16):
        assert packed(torch.ones(3, 64)).dtype == torch.bfloat16
    assert torch.equal(packed.bias, before)
    assert packed(torch.ones(3, 64)).dtype == torch.float32


def test_evaluation_leaves_the_layer_as_it_was() -> None:
    """bitsandbytes' own packs its weights anew for evaluation, where a CPU has AVX-512 with bf16."""
    packed = held(linear(64, 64))
    x = torch.randn(7, 64)
    tensors = {name: t.clone() for name, t in packed.state_dict(keep_vars=True).items()} | dict(packed.named_buffers())
    before = {name: tensor.clone() for name, tensor in tensors.items()}
    expected = packed.train()(x)
    with torch.no_grad():
        assert torch.equal(packed.eval()(x), expected)
        packed(x.bfloat16())
    now = dict(packed.named_parameters()) | dict(packed.named_buffers())
    assert all(torch.equal(now[name], tensor) for name, tensor in before.items())
    y = x.clone().requires_grad_()
    assert torch.equal(packed.train()(y), expected)
    packed(y).sum().backward()
    assert y.grad is not None


def test_a_layer_on_the_meta_device_has_the_shapes_of_a_real_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(functional, "name2qmap", {})  # as in a process that has not quantised anything yet
    quantized._layer_class.cache_clear()
    with torch.device("meta"):
        empty = held(nn.Linear(80, 21))
    real = held(linear(80, 21))  # what was on the meta device first does not keep others from being real
    for one, other in zip([*empty.parameters(), *empty.buffers()], [*real.parameters(), *real.buffers()], strict=True):
        assert (one.shape, one.dtype, one.is_meta, other.is_meta) == (other.shape, other.dtype, True, False)
    x = torch.empty(3, 80, device="meta", requires_grad=True)
    empty(x).sum().backward()
    assert x.grad is not None
    assert real(torch.ones(3, 80)).isfinite().all()


def test_four_bits_are_what_it_takes() -> None:
    model = nn.Sequential(linear(512, 512), linear(512, 256))
    parameters = sum(p.numel() for p in model.parameters())
    quantize_layers(model, ["0", "1"])
    found = what_is_quantized(model)
    assert (found.layers, found.numbers) == (2, 512 * 512 + 512 * 256)
    assert found.bytes / found.numbers == pytest.approx((4 + 8 / 64 + 32 / 64 / 256) / 8, rel=0.02)
    assert numbers_in(model) == parameters
    assert found.bytes + 4 * (512 + 256) == sum(
        t.numel() * t.element_size() for t in [*model.parameters(), *{id(b): b for b in model.buffers()}.values()]
    )


def test_quantising_draws_no_random_numbers() -> None:
    layer = linear(64, 64)
    before = torch.get_rng_state()
    first, again = held(layer), held(layer)
    check_four_bits(CPU)
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(first.weight, again.weight)
    assert all(torch.equal(*pair) for pair in zip(first.buffers(), again.buffers(), strict=True))


def test_a_layer_can_be_moved_and_cast_as_a_part_of_a_model() -> None:
    model = nn.Sequential(linear(64, 64))
    quantize_layers(model, ["0"])
    before = model(torch.ones(1, 64))
    assert torch.equal(model.to("cpu").train()(torch.ones(1, 64)), before)
    assert model.to("meta")(torch.ones(1, 64, device="meta")).is_meta
    assert model[0].weight.is_meta
    assert model[0].scales.is_meta


class _OfItsOwn(nn.Linear):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x @ self.weight.T


def test_what_has_to_stay_stays() -> None:
    model = nn.ModuleDict({name: linear(64, 64) for name in ("plain", "tied", "other", "fp32")})
    model["tied"].weight = model["other"].weight
    model["own"] = _OfItsOwn(64, 64)
    model._keep_in_fp32_modules = ["fp32"]  # type: ignore[assignment]
    paths = list(model)
    assert set(quantize_layers(model, paths)) == {"tied", "other", "own", "fp32"}
    assert set(quantized_layers(model)) == {"plain"}
    assert is_quantized(model["plain"])
    assert not is_quantized(model["own"])


def test_what_t5_asks_for_the_type_of_stays() -> None:
    size = {"d_model": 16, "d_kv": 8, "d_ff": 24, "num_layers": 2, "num_heads": 2, "vocab_size": 40}
    model = AutoModelForSeq2SeqLM.from_config(AutoConfig.for_model("t5", **size, decoder_start_token_id=0))
    paths = [path for path, module in model.named_modules() if type(module) is nn.Linear and "block" in path]
    left = quantize_layers(model, paths)
    assert left
    assert all(path.endswith(".wo") for path in left)


def test_a_whole_model_computes_with_its_unpacked_weights() -> None:
    size = {"vocab_size": 40, "hidden_size": 32, "num_hidden_layers": 2}
    size |= {"num_attention_heads": 2, "num_key_value_heads": 2}
    torch.manual_seed(1)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model("qwen2", **size, intermediate_size=48)).eval()
    plain = AutoModelForCausalLM.from_config(model.config).eval()
    paths = [path for path, module in model.named_modules() if type(module) is nn.Linear and "layers" in path]
    plain.load_state_dict(model.state_dict())
    assert quantize_layers(model, paths) == ()
    for path, layer in quantized_layers(model).items():
        plain.get_submodule(path).weight.data = layer.original()
    ids = torch.tensor([[5, 9, 3, 17]])
    with torch.no_grad():
        torch.testing.assert_close(model(ids).logits, plain(ids).logits, atol=1e-6, rtol=1e-5)


def not_installed(_: str) -> str:
    raise importlib.metadata.PackageNotFoundError


@pytest.mark.parametrize(("version", "got"), [(not_installed, "not installed"), (lambda _: "0.49.2", "0.49.2")])
def test_without_the_package_it_is_said_what_to_install(
    version: Any, got: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(importlib.metadata, "version", version)
    with pytest.raises(RecipeError) as caught:
        held(linear(64, 64))
    assert caught.value.got == got
    assert "pip install 'bitsandbytes>=0.50'" in str(caught.value.hint)
    assert caught.value.where == "adapter.name"


def test_a_device_that_cannot_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*given: Any, **named: Any) -> Any:
        raise RuntimeError("no kernel for this")

    check_four_bits(CPU)
    monkeypatch.setattr(functional, "dequantize_4bit", fail)
    with pytest.raises(RecipeError, match="4 bits") as caught:
        check_four_bits(CPU)
    assert "no kernel for this, on cpu" in str(caught.value.got)
    assert "lora" in str(caught.value.hint)


def test_a_device_that_computes_something_else_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    unpack = functional.dequantize_4bit
    monkeypatch.setattr(functional, "dequantize_4bit", lambda *given: -unpack(*given))
    with pytest.raises(RecipeError) as caught:
        check_four_bits(CPU)
    assert "a wrong gradient" in str(caught.value.got)
