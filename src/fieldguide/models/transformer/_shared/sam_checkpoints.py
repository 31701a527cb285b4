"""Names of public SAM checkpoints: the authors' files, and those of transformers."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from fieldguide.models.mapping.config_rules import ConfigRow, Derived, Expect
from fieldguide.models.mapping.key_rules import Dropped, Fused, Row

KINDS = 4  # of points: background, object, and two corners of boxes
LAYERS = 3  # linear layers of the heads

ENCODER = {  # of both, below their own prefixes: theirs -> ours
    "attn.qkv.*": "attn.qkv.*",
    "attn.proj.*": "attn.proj.*",
    "attn.rel_pos_h": "attn.rows",
    "attn.rel_pos_w": "attn.columns",
    "mlp.lin1.*": "mlp.up.*",
    "mlp.lin2.*": "mlp.down.*",
}
ATTENTIONS = {"self_attn": "own", "cross_attn_token_to_image": "cross", "cross_attn_image_to_token": "back"}
PROJECTIONS = {"q_proj": "query", "k_proj": "key", "v_proj": "value", "out_proj": "proj"}


def name_decoder(norm: str) -> dict[str, Row]:
    """Return the rows of the decoder's layers, in which norms are named by `norm`."""
    layers, final = "mask_decoder.transformer.layers.{i}", "mask_decoder.transformer.final_attn_token_to_image"
    return {
        **{
            f"{layers}.{theirs}.{part}.*": f"layers.{{i}}.{ours}.{here}.*"
            for theirs, ours in ATTENTIONS.items()
            for part, here in PROJECTIONS.items()
        },
        **{f"{layers}.{norm}{k}.*": f"layers.{{i}}.norm{k}.*" for k in (1, 2, 3, 4)},
        f"{layers}.mlp.lin1.*": "layers.{i}.mlp.0.*",
        f"{layers}.mlp.lin2.*": "layers.{i}.mlp.2.*",
        **{f"{final}.{part}.*": f"final.{here}.*" for part, here in PROJECTIONS.items()},
        "mask_decoder.iou_token.weight": "quality_token",
        "mask_decoder.mask_tokens.weight": "mask_tokens",
        "prompt_encoder.not_a_point_embed.weight": "no_point",
        "prompt_encoder.no_mask_embed.weight": "no_mask",
    }


def name_heads(names: tuple[str, str, str]) -> dict[str, Row]:
    """Return the rows of the heads, whose linear layers have these names."""
    rows: dict[str, Row] = {}
    for place, name in enumerate(names):
        rows[f"mask_decoder.output_hypernetworks_mlps.{{k}}.{name}.*"] = f"masks.{{k}}.{2 * place}.*"
        rows[f"mask_decoder.iou_prediction_head.{name}.*"] = f"quality.{2 * place}.*"
    return rows


AUTHORS: dict[str, Row] = {  # of github.com/facebookresearch/segment-anything
    "image_encoder.patch_embed.proj.*": "encoder.patch.*",
    "image_encoder.pos_embed": "encoder.positions",
    **{f"image_encoder.blocks.{{i}}.{theirs}": f"encoder.blocks.{{i}}.{ours}" for theirs, ours in ENCODER.items()},
    **{f"image_encoder.blocks.{{i}}.norm{k}.*": f"encoder.blocks.{{i}}.norm{k}.*" for k in (1, 2)},
    **{f"image_encoder.neck.{k}.*": f"encoder.neck.{k}.*" for k in range(4)},
    "prompt_encoder.pe_layer.positional_encoding_gaussian_matrix": "frequencies",
    **{f"prompt_encoder.point_embeddings.{k}.weight": Fused("kinds", k, KINDS) for k in range(KINDS)},
    **{f"prompt_encoder.mask_downscaling.{k}.*": f"mask_prompt.{k}.*" for k in (0, 1, 3, 4, 6)},
    **name_decoder("norm"),
    "mask_decoder.transformer.norm_final_attn.*": "norm.*",
    **{f"mask_decoder.output_upscaling.{k}.*": f"enlarge.{k}.*" for k in (0, 1, 3)},
    **name_heads(("layers.0", "layers.1", "layers.2")),
}

HUGGINGFACE: dict[str, Row] = {
    "vision_encoder.patch_embed.projection.*": "encoder.patch.*",
    "vision_encoder.pos_embed": "encoder.positions",
    **{f"vision_encoder.layers.{{i}}.{theirs}": f"encoder.blocks.{{i}}.{ours}" for theirs, ours in ENCODER.items()},
    **{f"vision_encoder.layers.{{i}}.layer_norm{k}.*": f"encoder.blocks.{{i}}.norm{k}.*" for k in (1, 2)},
    "vision_encoder.neck.conv1.*": "encoder.neck.0.*",
    "vision_encoder.neck.layer_norm1.*": "encoder.neck.1.*",
    "vision_encoder.neck.conv2.*": "encoder.neck.2.*",
    "vision_encoder.neck.layer_norm2.*": "encoder.neck.3.*",
    "shared_image_embedding.positional_embedding": "frequencies",
    "prompt_encoder.shared_embedding.positional_embedding": Dropped("the same frequencies"),
    **{f"prompt_encoder.point_embed.{k}.weight": Fused("kinds", k, KINDS) for k in range(KINDS)},
    "prompt_encoder.mask_embed.conv1.*": "mask_prompt.0.*",
    "prompt_encoder.mask_embed.layer_norm1.*": "mask_prompt.1.*",
    "prompt_encoder.mask_embed.conv2.*": "mask_prompt.3.*",
    "prompt_encoder.mask_embed.layer_norm2.*": "mask_prompt.4.*",
    "prompt_encoder.mask_embed.conv3.*": "mask_prompt.6.*",
    **name_decoder("layer_norm"),
    "mask_decoder.transformer.layer_norm_final_attn.*": "norm.*",
    "mask_decoder.upscale_conv1.*": "enlarge.0.*",
    "mask_decoder.upscale_layer_norm.*": "enlarge.1.*",
    "mask_decoder.upscale_conv2.*": "enlarge.3.*",
    **name_heads(("proj_in", "layers.0", "proj_out")),
}


def read_vision(raw: Mapping[str, Any]) -> dict[str, Any]:
    """Return the fields of the image encoder in a configuration."""
    inner = raw.get("vision_config") or {}
    dim = inner.get("hidden_size", 768)
    return {
        "image": inner.get("image_size", 1024),
        "patch": inner.get("patch_size", 16),
        "channels": inner.get("num_channels", 3),
        "dim": dim,
        "depth": inner.get("num_hidden_layers", 12),
        "heads": inner.get("num_attention_heads", 12),
        "hidden": inner.get("mlp_dim") or int(dim * inner.get("mlp_ratio", 4.0)),
        "window": inner.get("window_size", 14),
        "global_layers": tuple(inner.get("global_attn_indexes", (2, 5, 8, 11))),
        "width": inner.get("output_channels", 256),
        "mask_width": (raw.get("prompt_encoder_config") or {}).get("mask_input_channels", 16),
        **read_decoder(raw.get("mask_decoder_config") or {}),
    }


def read_decoder(inner: Mapping[str, Any]) -> dict[str, Any]:
    """Return the fields of the mask decoder in a configuration; its norms have another epsilon than those of the authors."""
    return {
        "decoder_depth": inner.get("num_hidden_layers", 2),
        "decoder_heads": inner.get("num_attention_heads", 8),
        "decoder_hidden": inner.get("mlp_dim", 2048),
        "quality_hidden": inner.get("iou_head_hidden_dim", 256),
        "candidates": inner.get("num_multimask_outputs", 3),
        "decoder_eps": inner.get("layer_norm_eps", 1e-6),
    }


def write_vision(config: Any) -> dict[str, Any]:
    """Return the configuration of the image encoder."""
    return {
        "image_size": config.image,
        "patch_size": config.patch,
        "num_channels": config.channels,
        "hidden_size": config.dim,
        "num_hidden_layers": config.depth,
        "num_attention_heads": config.heads,
        "mlp_dim": config.hidden,
        "window_size": config.window,
        "global_attn_indexes": list(config.global_layers),
        "output_channels": config.width,
        "num_pos_feats": config.width // 2,
    }


def write_prompts(config: Any) -> dict[str, Any]:
    """Return the configuration of the prompt encoder."""
    sizes = {"image_size": config.image, "patch_size": config.patch, "hidden_size": config.width}
    return {**sizes, "mask_input_channels": config.mask_width, "image_embedding_size": config.image // config.patch}


def write_decoder(config: Any) -> dict[str, Any]:
    """Return the configuration of the mask decoder."""
    return {
        "hidden_size": config.width,
        "num_hidden_layers": config.decoder_depth,
        "num_attention_heads": config.decoder_heads,
        "mlp_dim": config.decoder_hidden,
        "iou_head_hidden_dim": config.quality_hidden,
        "num_multimask_outputs": config.candidates,
        "layer_norm_eps": config.decoder_eps,
    }


CONFIG: dict[str, ConfigRow] = {  # of transformers
    "model_type": Expect("sam"),
    "architectures": Expect(["SamModel"]),
    "vision_config.use_abs_pos": Expect(True),
    "vision_config.use_rel_pos": Expect(True),
    "vision_config.qkv_bias": Expect(True),
    "vision_config.hidden_act": Expect("gelu"),
    "mask_decoder_config.hidden_act": Expect("relu"),
    "mask_decoder_config.attention_downsample_rate": Expect(2),
    "mask_decoder_config.iou_head_depth": Expect(LAYERS),
    "prompt_encoder_config.num_point_embeddings": Expect(KINDS),
    "vision_config": Derived(read_vision, write_vision),
    "prompt_encoder_config": Derived(lambda raw: {}, write_prompts),
    "mask_decoder_config": Derived(lambda raw: {}, write_decoder),
}
