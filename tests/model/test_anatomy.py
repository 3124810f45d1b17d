"""The anatomy of tiny models of every family that people bring, read without knowing the family."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers
from transformers import AutoConfig

from llmkit.model.anatomy import read_anatomy

SIZE = {
    "hidden_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "intermediate_size": 64,
    "vocab_size": 99,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
GROUPED = SIZE | {"num_key_value_heads": 2}
IDS = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0, "vocab_size": 99}
STACKS = {
    "d_model": 32,
    "encoder_layers": 2,
    "decoder_layers": 3,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 64,
    "decoder_ffn_dim": 64,
    "decoder_start_token_id": 1,
} | IDS
T5 = {"d_model": 32, "d_kv": 8, "d_ff": 64, "num_layers": 2, "num_decoder_layers": 3, "num_heads": 4} | IDS
LM, MLM, CLASSIFY = "AutoModelForCausalLM", "AutoModelForMaskedLM", "AutoModelForSequenceClassification"
BERT_EMBEDDINGS = ["word_embeddings", "position_embeddings", "token_type_embeddings", "LayerNorm"]
ONE = ("model.layers", 3)

# family, auto class, config, stacks, modules of: embeddings, final, head
FAMILIES: list[tuple[str, str, dict[str, Any], tuple[tuple[str, int], ...], list[str], list[str], list[str]]] = [
    (
        *("gpt2", LM, {"n_embd": 32, "n_layer": 3, "n_head": 4, "n_positions": 64} | IDS, (("transformer.h", 3),)),
        *(["transformer.wte", "transformer.wpe"], ["transformer.ln_f"], []),
    ),
    ("llama", LM, GROUPED | {"tie_word_embeddings": True}, (ONE,), ["model.embed_tokens"], ["model.norm"], []),
    ("qwen2", LM, GROUPED, (ONE,), ["model.embed_tokens"], ["model.norm"], ["lm_head"]),
    ("mistral", CLASSIFY, GROUPED, (ONE,), ["model.embed_tokens"], ["model.norm"], ["score"]),
    ("mixtral", LM, GROUPED | {"num_local_experts": 4}, (ONE,), ["model.embed_tokens"], ["model.norm"], ["lm_head"]),
    ("gemma2", LM, GROUPED | {"head_dim": 8}, (ONE,), ["model.embed_tokens"], ["model.norm"], []),
    ("phi", LM, SIZE, (ONE,), ["model.embed_tokens"], ["model.final_layernorm"], ["lm_head"]),
    *(
        (family, LM, GROUPED | more, (ONE,), ["model.embed_tokens"], ["model.norm"], head)
        for family, more, head in (
            ("qwen3", {"head_dim": 8}, ["lm_head"]),
            ("phi3", {}, ["lm_head"]),
            ("olmo2", {}, ["lm_head"]),
            ("stablelm", {}, ["lm_head"]),
            ("granite", {}, ["lm_head"]),
            ("qwen2_moe", {"num_experts": 4, "moe_intermediate_size": 16}, ["lm_head"]),
            ("starcoder2", {}, []),
            ("cohere", {}, []),
            ("gemma3_text", {"head_dim": 8}, []),
        )
    ),
    ("falcon", LM, SIZE, (("transformer.h", 3),), ["transformer.word_embeddings"], ["transformer.ln_f"], []),
    (
        *("modernbert", MLM, SIZE | {"cls_token_id": 1, "sep_token_id": 2}, (ONE,)),
        *(["model.embeddings.tok_embeddings", "model.embeddings.norm"], ["model.final_norm"]),
        ["head.dense", "head.norm", "decoder"],
    ),
    (
        *("mpnet", CLASSIFY, SIZE, (("mpnet.encoder.layer", 3),)),
        [
            *(f"mpnet.embeddings.{name}" for name in BERT_EMBEDDINGS if "type" not in name),
            "mpnet.encoder.relative_attention_bias",  # every block reads it
        ],
        *([], ["classifier.dense", "classifier.out_proj"]),
    ),
    (
        *("gpt_neox", LM, SIZE, (("gpt_neox.layers", 3),)),
        *(["gpt_neox.embed_in"], ["gpt_neox.final_layer_norm"], ["lm_head"]),
    ),
    (
        *("opt", LM, SIZE | {"ffn_dim": 64, "word_embed_proj_dim": 16}, (("model.decoder.layers", 3),)),
        [f"model.decoder.{name}" for name in ("embed_tokens", "embed_positions", "project_in")],
        [f"model.decoder.{name}" for name in ("project_out", "final_layer_norm")],
        [],
    ),
    (
        *("bloom", LM, {"hidden_size": 32, "n_layer": 3, "n_head": 4} | IDS, (("transformer.h", 3),)),
        *(["transformer.word_embeddings", "transformer.word_embeddings_layernorm"], ["transformer.ln_f"], []),
    ),
    (
        *("bert", CLASSIFY, SIZE, (("bert.encoder.layer", 3),)),
        *([f"bert.embeddings.{name}" for name in BERT_EMBEDDINGS], ["bert.pooler.dense"], ["classifier"]),
    ),
    (
        *("roberta", MLM, SIZE, (("roberta.encoder.layer", 3),)),
        *([f"roberta.embeddings.{name}" for name in BERT_EMBEDDINGS], []),
        ["lm_head", "lm_head.dense", "lm_head.layer_norm"],
    ),
    (
        *("distilbert", CLASSIFY, {"dim": 32, "n_layers": 3, "n_heads": 4, "hidden_dim": 64} | IDS),
        (("distilbert.transformer.layer", 3),),
        [f"distilbert.embeddings.{name}" for name in BERT_EMBEDDINGS if "type" not in name],
        *([], ["pre_classifier", "classifier"]),
    ),
    (
        *("electra", CLASSIFY, SIZE | {"embedding_size": 16}, (("electra.encoder.layer", 3),)),
        [*(f"electra.embeddings.{name}" for name in BERT_EMBEDDINGS), "electra.embeddings_project"],
        *([], ["classifier.dense", "classifier.out_proj"]),
    ),
    (
        "deberta-v2",
        CLASSIFY,
        SIZE | {"relative_attention": True, "pos_att_type": ["c2p", "p2c"], "norm_rel_ebd": "layer_norm"},
        (("deberta.encoder.layer", 3),),
        [
            *(f"deberta.embeddings.{name}" for name in BERT_EMBEDDINGS if "type" not in name),
            *("deberta.encoder.rel_embeddings", "deberta.encoder.LayerNorm"),  # every block reads them
        ],
        *([], ["pooler.dense", "classifier"]),
    ),
    (
        *("albert", MLM, SIZE | {"embedding_size": 16}, (("albert.encoder.albert_layer_groups", 1),)),
        [*(f"albert.embeddings.{name}" for name in BERT_EMBEDDINGS), "albert.encoder.embedding_hidden_mapping_in"],
        *([], ["predictions", "predictions.LayerNorm", "predictions.dense"]),
    ),
    (
        *("t5", "AutoModelForSeq2SeqLM", T5, (("encoder", 2), ("decoder", 3))),
        *(["shared"], ["encoder.final_layer_norm", "decoder.final_layer_norm"], []),
    ),
    (
        *("bart", "AutoModelForSeq2SeqLM", STACKS, (("encoder", 2), ("decoder", 3))),
        ["model.shared"]
        + [
            f"model.{part}.{name}"
            for part in ("encoder", "decoder")
            for name in ("embed_positions", "layernorm_embedding")
        ],
        *([], []),
    ),
    (
        *("whisper", "AutoModelForSpeechSeq2Seq", STACKS | {"num_mel_bins": 8}, (("encoder", 2), ("decoder", 3))),
        [f"model.encoder.{name}" for name in ("conv1", "conv2", "embed_positions")]
        + [f"model.decoder.{name}" for name in ("embed_tokens", "embed_positions")],
        *(["model.encoder.layer_norm", "model.decoder.layer_norm"], []),
    ),
    (
        "vit",
        "AutoModelForImageClassification",
        {key: SIZE[key] for key in ("hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size")}
        | {"image_size": 32, "patch_size": 8},
        (("vit.layers", 3),),
        ["vit.embeddings", "vit.embeddings.patch_embeddings.projection"],
        *(["vit.layernorm"], ["classifier"]),
    ),
]


def build(family: str, auto_class: str, config: dict[str, Any], device: str = "meta") -> torch.nn.Module:
    with torch.device(device):
        return getattr(transformers, auto_class).from_config(AutoConfig.for_model(family, **config))


def owners(names: tuple[str, ...]) -> set[str]:
    return {name.rpartition(".")[0] for name in names}


@pytest.mark.parametrize(
    ("family", "auto_class", "config", "stacks", "embeddings", "final", "head"),
    FAMILIES,
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_every_part_is_found(
    family: str,
    auto_class: str,
    config: dict[str, Any],
    stacks: tuple[tuple[str, int], ...],
    embeddings: list[str],
    final: list[str],
    head: list[str],
) -> None:
    model = build(family, auto_class, config)
    anatomy = read_anatomy(model)

    everything = [*anatomy.embeddings, *anatomy.final, *anatomy.head]
    everything += [name for block in anatomy.blocks for name in block]
    assert sorted(everything) == sorted(name for name, _ in model.named_parameters())
    assert anatomy.stacks == stacks
    assert len(anatomy.blocks) == sum(count for _, count in stacks)
    assert all(anatomy.blocks)
    assert owners(anatomy.embeddings) == set(embeddings)
    assert owners(anatomy.final) == set(final)
    assert owners(anatomy.head) == set(head)


@pytest.mark.parametrize("device", ["meta", "cpu"])
def test_tied_weights_have_all_their_names_on_any_device(device: str) -> None:
    anatomy = read_anatomy(build("t5", "AutoModelForSeq2SeqLM", T5, device))
    aliases = ("encoder.embed_tokens.weight", "decoder.embed_tokens.weight", "lm_head.weight")
    assert anatomy.tied == {"shared.weight": aliases}
    assert anatomy.tied_head == ("lm_head.weight",)
    untied = read_anatomy(build("llama", LM, GROUPED | {"tie_word_embeddings": False}, device))
    assert untied.tied == {}
    assert untied.tied_head == ()


def test_norms_are_found_wherever_they_stand() -> None:
    model = build("bert", CLASSIFY, SIZE)
    norms = read_anatomy(model).norms
    assert set(norms) == {name for name, _ in model.named_parameters() if "LayerNorm" in name}
    assert len(norms) == 2 * (1 + 2 * 3)
    assert len(read_anatomy(build("llama", LM, GROUPED)).norms) == 2 * 3 + 1


def test_a_model_that_is_its_own_base_has_its_output_embeddings_for_a_head() -> None:
    config = AutoConfig.for_model("t5", **T5)
    config.tie_word_embeddings = False
    with torch.device("meta"):
        anatomy = read_anatomy(transformers.AutoModelForSeq2SeqLM.from_config(config))
    assert anatomy.head == ("lm_head.weight",)
    assert owners(anatomy.embeddings) == {"shared", "encoder.embed_tokens", "decoder.embed_tokens"}


def test_a_bare_model_has_no_head() -> None:
    assert read_anatomy(build("gpt2", "AutoModel", {"n_embd": 32, "n_layer": 3, "n_head": 4} | IDS)).head == ()


def test_experts_are_not_blocks() -> None:
    """Experts are lists of composite layers too, inside the blocks."""

    class Expert(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.up, self.down = torch.nn.Linear(4, 8), torch.nn.Linear(8, 4)

    class Block(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm = torch.nn.LayerNorm(4)
            self.experts = torch.nn.ModuleList(Expert() for _ in range(5))

    class Model(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed = torch.nn.Embedding(7, 4)
            self.layers = torch.nn.ModuleList(Block() for _ in range(2))

    anatomy = read_anatomy(Model())
    assert anatomy.stacks == (("layers", 2),)
    assert [len(block) for block in anatomy.blocks] == [2 + 5 * 4] * 2
