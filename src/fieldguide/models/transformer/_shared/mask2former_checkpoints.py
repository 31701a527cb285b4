"""Names of public Mask2Former checkpoints: files of transformers with a Swin or a ResNet."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from fieldguide.models.convolutional import resnet
from fieldguide.models.mapping.config_rules import ConfigRow, Derived, Expect, LabelCount
from fieldguide.models.mapping.key_rules import Dropped, Fused, Row
from fieldguide.models.transformer import swin
from fieldguide.models.transformer._shared.detr_checkpoints import fuse_attention, name_layers

ENCODER, PIXELS = "model.pixel_level_module.encoder.", "model.pixel_level_module.decoder."
QUERIES = "model.transformer_module."
LEVELS = 4
STAGES = [f"stage{i}" for i in range(1, LEVELS + 1)]


def place(row: Row) -> Row:
    """Return a row of a backbone's table for the backbone inside of the network."""
    if isinstance(row, Fused):
        return Fused(f"backbone.body.{row.ours}", row.part, row.parts)
    return f"backbone.body.{row}" if isinstance(row, str) else row


def huggingface(config: Any) -> Mapping[str, Row]:
    """Return the key table of files of transformers for the backbone of a config."""
    if config.backbone == "swin":
        table, head, norm = swin.huggingface(), "classifier", "swin.layernorm"
        rows: dict[str, Row] = {
            f"{ENCODER}{theirs.removeprefix('swin.')}": place(row)
            for theirs, row in table.items()
            if not theirs.startswith((head, norm))
        }
        rows |= {f"{ENCODER}hidden_states_norms.{name}.*": f"backbone.norms.{i}.*" for i, name in enumerate(STAGES)}
        rows |= {f"{ENCODER}{prefix}layernorm.*": Dropped("the norm before a classifier") for prefix in ("swin.", "")}
    else:
        rows = {
            f"{ENCODER}{theirs.removeprefix('resnet.')}": place(row)
            for theirs, row in resnet.HUGGINGFACE.items()
            if not theirs.startswith("classifier")
        }
    cross = {"sampling_offsets": "places", "attention_weights": "weights", "value_proj": "value", "output_proj": "proj"}
    pixels = {f"self_attn.{theirs}": f"attention.{ours}" for theirs, ours in cross.items()}
    pixels |= {"self_attn_layer_norm": "norm1", "fc1": "mlp.0", "fc2": "mlp.3", "final_layer_norm": "norm2"}
    decoder = {
        "cross_attn.out_proj": "cross.proj",
        "cross_attn_layer_norm": "norm1",
        "self_attn.out_proj": "attention.proj",
        "self_attn_layer_norm": "norm2",
        "fc1": "mlp.0",
        "fc2": "mlp.3",
        "final_layer_norm": "norm3",
    }
    layers = f"{QUERIES}decoder.layers"
    return {
        **rows,
        f"{PIXELS}level_embed": "pixels.level",
        f"{PIXELS}input_projections.{{l}}.{{k}}.*": "pixels.reduce.{l}.{k}.*",
        f"{PIXELS}adapter_1.{{k}}.*": "pixels.lateral.{k}.*",
        f"{PIXELS}layer_1.{{k}}.*": "pixels.smooth.{k}.*",
        f"{PIXELS}mask_projection.*": "pixels.mask.*",
        **name_layers("pixels.layers", f"{PIXELS}encoder.layers", pixels),
        f"{QUERIES}queries_embedder.weight": "queries",
        f"{QUERIES}queries_features.weight": "states",
        f"{QUERIES}level_embed.weight": "level",
        **{f"{layers}.{{i}}.cross_attn.in_proj_{kind}": f"decoder.{{i}}.cross.qkv.{kind}" for kind in ("weight", "bias")},
        **fuse_attention("decoder", layers, {"self_attn": "attention"}, ("q_proj", "k_proj", "v_proj")),
        **name_layers("decoder", layers, decoder),
        f"{QUERIES}decoder.layernorm.*": "norm.*",
        **{f"{QUERIES}decoder.mask_predictor.mask_embedder.{k}.0.*": f"mask.{2 * k}.*" for k in range(3)},
        "class_predictor.*": "label.*",
        "criterion.empty_weight": Dropped("weights of the loss"),
    }


def read_backbone(raw: Mapping[str, Any]) -> dict[str, Any]:
    """Return the fields of the backbone in a configuration."""
    inner = raw.get("backbone_config") or {}
    if inner.get("model_type") == "resnet":
        block = inner.get("layer_type", "bottleneck")
        growth = resnet.get_growth(block)
        widths = tuple(width // growth for width in inner.get("hidden_sizes", (256, 512, 1024, 2048)))
        return {"backbone": "resnet", "block": block, "depths": tuple(inner.get("depths", (3, 4, 6, 3))), "widths": widths}
    return {
        "backbone": "swin",
        "depths": tuple(inner.get("depths", (2, 2, 6, 2))),
        "width": inner.get("embed_dim", 96),
        "backbone_heads": tuple(inner.get("num_heads", (3, 6, 12, 24))),
        "window": inner.get("window_size", 7),
        "drop_path": inner.get("drop_path_rate", 0.1),
    }


def write_backbone(config: Any) -> dict[str, Any]:
    """Return the configuration of the backbone."""
    common = {"num_channels": config.channels, "depths": list(config.depths), "out_features": STAGES}
    if config.backbone == "resnet":
        growth = resnet.get_growth(config.block)
        sizes = [growth * width for width in config.widths]
        own = {"layer_type": config.block, "hidden_sizes": sizes, "embedding_size": config.widths[0]}
        return {"model_type": "resnet", **common, **own}
    own = {"embed_dim": config.width, "num_heads": list(config.backbone_heads), "window_size": config.window}
    return {"model_type": "swin", **common, **own, "patch_size": 4, "drop_path_rate": config.drop_path}


CONFIG: dict[str, ConfigRow] = {  # of transformers
    "model_type": Expect("mask2former"),
    "architectures": Expect(["Mask2FormerForUniversalSegmentation"]),
    "id2label": LabelCount("num_classes"),
    "backbone_config.num_channels": Derived(
        lambda raw: {"channels": (raw.get("backbone_config") or {}).get("num_channels", 3)}, lambda config: config.channels
    ),
    "backbone_config": Derived(read_backbone, write_backbone),
    "hidden_dim": "dim",
    "feature_size": Expect(lambda config: config.dim, absent=256),
    "mask_feature_size": Expect(lambda config: config.dim, absent=256),
    "num_attention_heads": "heads",
    "encoder_layers": "depth",
    "encoder_feedforward_dim": "hidden",
    "decoder_layers": Derived(
        lambda raw: {"decoder_depth": raw.get("decoder_layers", 10) - 1}, lambda config: config.decoder_depth + 1
    ),
    "dim_feedforward": "decoder_hidden",
    "num_queries": "queries",
    "dropout": "dropout",
    "activation_function": Expect("relu"),
    "pre_norm": Expect(False),
    "enforce_input_projection": Expect(False),
    "common_stride": Expect(4),
    "feature_strides": Expect([4, 8, 16, 32]),
}
