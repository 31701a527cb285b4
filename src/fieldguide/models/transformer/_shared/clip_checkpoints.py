"""Weight names and configuration keys of CLIP in files of transformers, OpenAI and open_clip."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from fieldguide.core.errors import WeightsError
from fieldguide.models.mapping.config_rules import ConfigRow, Constant, Derived, Expect, ValueMap, WithDefault
from fieldguide.models.mapping.key_rules import Dropped, Fused, Row, Transposed

TOWERS = (("vision_model.", "visual.", "vision."), ("text_model.", "", "text."))  # prefixes: transformers, OpenAI, ours


def huggingface() -> dict[str, Row]:
    """Return the weight names of transformers."""
    names: dict[str, Row] = {
        "vision_model.embeddings.class_embedding": "vision.cls",
        "vision_model.embeddings.patch_embedding.weight": "vision.patch.weight",
        "vision_model.pre_layrnorm.*": "vision.norm_pre.*",  # spelled like this
        "vision_model.post_layernorm.*": "vision.norm.*",
        "visual_projection.weight": "vision.proj.weight",
        "text_model.embeddings.token_embedding.weight": "text.embed.weight",
        "text_model.final_layer_norm.*": "text.norm.*",
        "text_projection.weight": "text.proj.weight",
        "logit_scale": "logit_scale",
    }
    for theirs, _, ours in TOWERS:
        layer, block = theirs + "encoder.layers.{i}.", ours + "blocks.{i}."
        names |= {f"{layer}self_attn.{part}_proj.*": Fused(f"{block}attn.qkv.*", i, 3) for i, part in enumerate("qkv")}
        names |= {
            theirs + "embeddings.position_embedding.weight": ours + "pos.weight",
            theirs + "embeddings.position_ids": Dropped("0, 1, 2, ..."),
            layer + "self_attn.out_proj.*": block + "attn.proj.*",
            layer + "layer_norm1.*": block + "norm1.*",
            layer + "layer_norm2.*": block + "norm2.*",
            layer + "mlp.fc1.*": block + "mlp.up.*",
            layer + "mlp.fc2.*": block + "mlp.down.*",
        }
    return names


def openai(text: str, towers: tuple[tuple[str, str, str], ...] = TOWERS) -> dict[str, Row]:
    """Return the names of OpenAI's files and of most of open_clip's; its files with a custom text encoder have the
    prefix `text.`.
    """
    names: dict[str, Row] = (
        {
            "visual.class_embedding": "vision.cls",
            "visual.conv1.weight": "vision.patch.weight",
            "visual.ln_pre.*": "vision.norm_pre.*",
            "visual.ln_post.*": "vision.norm.*",
            "visual.proj": Transposed("vision.proj.weight"),  # stored for x @ W
        }
        if towers is TOWERS
        else {}
    )
    names |= {
        text + "token_embedding.weight": "text.embed.weight",
        text + "ln_final.*": "text.norm.*",
        text + "text_projection": Transposed("text.proj.weight"),
        text + "attn_mask": Dropped("the causal mask"),
        "logit_scale": "logit_scale",
    }
    names |= {
        name: Dropped("a configuration value, only in OpenAI's archives", means={"quick": True})
        for name in ("input_resolution", "context_length", "vocab_size")
    }
    for _, theirs, ours in towers:
        theirs = theirs or text
        layer, block = theirs + "transformer.resblocks.{i}.", ours + "blocks.{i}."
        names |= {
            theirs + "positional_embedding": ours + "pos.weight",
            layer + "attn.in_proj_weight": block + "attn.qkv.weight",
            layer + "attn.in_proj_bias": block + "attn.qkv.bias",
            layer + "attn.out_proj.*": block + "attn.proj.*",
            layer + "ln_1.*": block + "norm1.*",
            layer + "ln_2.*": block + "norm2.*",
            layer + "mlp.c_fc.*": block + "mlp.up.*",
            layer + "mlp.c_proj.*": block + "mlp.down.*",
        }
    return names


def read_end_token(theirs: Mapping[str, Any]) -> dict[str, Any]:
    """Return the end token. Configurations from before 2024 contain 2 by mistake and mean the largest token ID."""
    text = theirs.get("text_config") or {}
    token, vocab = text.get("eos_token_id", 49_407), text.get("vocab_size", 49_408)
    return {"end": vocab - 1 if token == 2 else token}


def map_tower_config(name: str, dim: str, depth: str, heads: str) -> dict[str, ConfigRow]:
    """Return the configuration keys of one encoder in transformers."""
    return {
        f"{name}_config.model_type": Expect(f"clip_{name}_model"),
        f"{name}_config.hidden_size": dim,
        f"{name}_config.num_hidden_layers": depth,
        f"{name}_config.num_attention_heads": heads,
        f"{name}_config.intermediate_size": Expect(lambda c: 4 * getattr(c, dim)),
        f"{name}_config.layer_norm_eps": Expect(1e-5),
        f"{name}_config.attention_dropout": Expect(0.0),
    }


ACTS = {"quick_gelu": True, "gelu": False}
CONFIG: dict[str, ConfigRow] = {  # keys of transformers
    "model_type": Expect("clip"),
    "architectures": Expect(["CLIPModel"]),
    "projection_dim": "embed",
    **map_tower_config("vision", "dim", "depth", "heads"),
    "vision_config.num_channels": "channels",
    "vision_config.image_size": "image",
    "vision_config.patch_size": "patch",
    "vision_config.hidden_act": ValueMap("quick", ACTS),
    **map_tower_config("text", "text_dim", "text_depth", "text_heads"),
    "text_config.vocab_size": "vocab_size",
    "text_config.max_position_embeddings": "length",
    "text_config.eos_token_id": Derived(read_end_token, lambda c: c.end),
    "text_config.hidden_act": Expect(lambda c: next(act for act, quick in ACTS.items() if quick == c.quick)),
}


# Keys of open_clip that have no effect with these values; any other value means another architecture.
PLAIN = {
    "mlp_ratio": 4.0,
    "pool_type": ("tok", "argmax"),
    "pos_embed_type": "learnable",
    "patch_dropout": 0.0,
    "pad_id": 0,
    "proj_type": "linear",
    "block_type": (None, "default"),
}
OWN = {
    "image_size",
    "layers",
    "width",
    "head_width",
    "patch_size",
    "context_length",
    "vocab_size",
    "heads",
    "hf_tokenizer_name",
    "tokenizer_kwargs",
    "tokenizer_mode",
    "eos_id",
    "output_tokens",
    "timm_model_pretrained",
}


def read_tower_heads(theirs: Mapping[str, Any], unit: int) -> dict[str, int]:
    """Return the end token and the heads of the image encoder, whose number is `unit` times its width by the width of a
    head.

    Raises `WeightsError` for keys that define another architecture.
    """
    model, odd = theirs["model_cfg"], []
    for part in ("vision_cfg", "text_cfg"):
        for key, value in model[part].items():
            plain = PLAIN.get(key, (None, False))
            if key not in OWN and not (value in plain if isinstance(plain, tuple) else value == plain):
                odd.append(f"{part}.{key}={value!r}")
    odd += [f"{key}={model[key]!r}" for key in ("multimodal_cfg", "init_logit_bias") if model.get(key) is not None]
    if odd:
        raise WeightsError(f"The open_clip configuration has {', '.join(odd)}, which clip does not support.")
    vision = model["vision_cfg"]
    return {"heads": unit * vision["width"] // vision.get("head_width", 64), "end": model["text_cfg"]["vocab_size"] - 1}


def openclip(unit: int, read: Mapping[str, ConfigRow]) -> dict[str, ConfigRow]:
    """Return the keys of open_clip_config.json; `read` has those of the image encoder."""
    text = "model_cfg.text_cfg."
    return {
        **{f"model_cfg.vision_cfg.{key}": row for key, row in read.items()},
        "model_cfg.vision_cfg.image_size": "image",
        "model_cfg.vision_cfg.head_width": Derived(
            lambda theirs: read_tower_heads(theirs, unit), lambda c: unit * c.dim // c.heads
        ),
        "<images have three channels>": Constant("channels", 3),
        "model_cfg.embed_dim": "embed",
        "model_cfg.quick_gelu": WithDefault("quick", False),
        text + "vocab_size": "vocab_size",
        text + "context_length": "length",
        text + "width": "text_dim",
        text + "heads": "text_heads",
        text + "layers": "text_depth",
    }


OPENCLIP_CONFIG = openclip(1, {"width": "dim", "layers": "depth", "patch_size": "patch"})
HUGGINGFACE, OPENAI, OPENCLIP = huggingface(), openai(""), openai("text.")
