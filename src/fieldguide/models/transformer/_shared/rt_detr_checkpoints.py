"""Names of public RT-DETR checkpoints: files of transformers."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from fieldguide.models.convolutional import resnet
from fieldguide.models.mapping.config_rules import ConfigRow, Derived, Expect, LabelCount
from fieldguide.models.mapping.key_rules import Row
from fieldguide.models.transformer._shared.detr_checkpoints import fuse_attention, name_layers

LEVELS = 3  # maps


def huggingface_keys() -> dict[str, Row]:
    """Return the key table of files of transformers, whose names (`out_proj`, `fc1`, `encoder.encoder`) the live network lacks."""
    body = "model.backbone.model"
    rows: dict[str, Row] = {
        f"{body}.embedder.embedder.{i}.{theirs}": f"backbone.stem.{ours}{i}.{part}"
        for i in range(3)
        for theirs, ours, part in (("convolution.weight", "conv", "weight"), ("normalization.*", "norm", "*"))
    }
    for stage in range(4):
        stages, ours = f"{body}.encoder.stages.{stage}.layers.{{b}}", f"backbone.stages.{stage}.{{b}}"
        shortcut = f"{stages}.shortcut.1" if stage else f"{stages}.shortcut"  # after its pooling
        rows |= {
            f"{stages}.layer.{{k}}.convolution.weight": f"{ours}.conv{{k+1}}.weight",
            f"{stages}.layer.{{k}}.normalization.*": f"{ours}.norm{{k+1}}.*",
            f"{shortcut}.convolution.weight": f"{ours}.shortcut.conv.weight",
            f"{shortcut}.normalization.*": f"{ours}.shortcut.norm.*",
        }
    for theirs, ours in (("encoder_input_proj", "reduce"), ("decoder_input_proj", "memory")):
        rows |= {f"model.{theirs}.{{l}}.{i}.*": f"{ours}.{{l}}.{part}.*" for i, part in enumerate(("conv", "norm"))}
    for theirs, ours in (("lateral_convs", "lateral"), ("downsample_convs", "shrink")):
        rows[f"model.encoder.{theirs}.{{l}}.conv.weight"] = f"{ours}.{{l}}.conv.weight"
        rows[f"model.encoder.{theirs}.{{l}}.norm.*"] = f"{ours}.{{l}}.norm.*"
    for theirs, ours in (("fpn_blocks", "up"), ("pan_blocks", "down")):
        for block, mine in (("", ""), ("bottlenecks.{b}.", "blocks.{b}.")):
            rows[f"model.encoder.{theirs}.{{l}}.{block}conv{{k}}.conv.weight"] = f"{ours}.{{l}}.{mine}conv{{k}}.conv.weight"
            rows[f"model.encoder.{theirs}.{{l}}.{block}conv{{k}}.norm.*"] = f"{ours}.{{l}}.{mine}conv{{k}}.norm.*"
    parts = ("q_proj", "k_proj", "v_proj")
    mlp = {"fc1": "mlp.0", "fc2": "mlp.3", "self_attn.out_proj": "attention.proj", "self_attn_layer_norm": "norm1"}
    cross = {"sampling_offsets": "places", "attention_weights": "weights", "value_proj": "value", "output_proj": "proj"}
    attended = {f"encoder_attn.{theirs}": f"cross.{ours}" for theirs, ours in cross.items()}
    for stack, theirs, last in (
        ("encoder", "model.encoder.encoder.0.layers", "norm2"),
        ("decoder", "model.decoder.layers", "norm3"),
    ):
        rows |= fuse_attention(stack, theirs, {"self_attn": "attention"}, parts)
        rows |= name_layers(stack, theirs, {**mlp, "final_layer_norm": last})
    return {
        **rows,
        **name_layers("decoder", "model.decoder.layers", {**attended, "encoder_attn_layer_norm": "norm2"}),
        "model.decoder.query_pos_head.layers.0.*": "place.0.*",
        "model.decoder.query_pos_head.layers.1.*": "place.2.*",
        "model.enc_output.0.*": "proposal.0.*",
        "model.enc_output.1.*": "proposal.1.*",
        "model.enc_score_head.*": "proposal_label.*",
        "model.denoising_class_embed.weight": "known.weight",
        **{f"model.enc_bbox_head.layers.{k}.*": f"proposal_box.{2 * k}.*" for k in range(3)},
        **{f"model.decoder.bbox_embed.{{i}}.layers.{k}.*": f"box.{{i}}.{2 * k}.*" for k in range(3)},
        "model.decoder.class_embed.{i}.*": "label.{i}.*",
        # Files of transformers 4 hold the shared heads twice.
        **{f"bbox_embed.{{i}}.layers.{k}.*": f"box.{{i}}.{2 * k}.*" for k in range(3)},
        "class_embed.{i}.*": "label.{i}.*",
    }


def read_backbone(raw: Mapping[str, Any]) -> dict[str, Any]:
    """Return the fields of the ResNet in a configuration."""
    inner = raw.get("backbone_config") or {}
    block = inner.get("layer_type", "bottleneck")
    growth = resnet.get_growth(block)
    widths = tuple(width // growth for width in inner.get("hidden_sizes", (256, 512, 1024, 2048)))
    return {"block": block, "depths": tuple(inner.get("depths", (3, 4, 6, 3))), "widths": widths}


def write_backbone(config: Any) -> dict[str, Any]:
    growth = resnet.get_growth(config.block)
    return {
        "model_type": "rt_detr_resnet",
        "num_channels": config.channels,
        "layer_type": config.block,
        "depths": list(config.depths),
        "hidden_sizes": [growth * width for width in config.widths],
        "embedding_size": config.widths[0],
        "out_features": ["stage2", "stage3", "stage4"],
    }


CONFIG: dict[str, ConfigRow] = {  # of transformers
    "model_type": Expect("rt_detr"),
    "architectures": Expect(["RTDetrForObjectDetection"]),
    "id2label": LabelCount("num_classes"),
    "backbone_config.num_channels": Derived(
        lambda raw: {"channels": (raw.get("backbone_config") or {}).get("num_channels", 3)}, lambda config: config.channels
    ),
    "backbone_config": Derived(read_backbone, write_backbone),
    "freeze_backbone_batch_norms": "frozen_norm",
    "d_model": "dim",
    "encoder_hidden_dim": Expect(lambda config: config.dim, absent=256),
    "encoder_in_channels": Expect(
        lambda config: [resnet.get_growth(config.block) * width for width in config.widths[1:]], absent=[512, 1024, 2048]
    ),
    "decoder_in_channels": Expect(lambda config: [config.dim] * LEVELS, absent=[256] * LEVELS),
    "encoder_attention_heads": "heads",
    "decoder_attention_heads": Expect(lambda config: config.heads),
    "encoder_layers": Expect(1),
    "decoder_layers": "decoder_depth",
    "encoder_ffn_dim": "hidden",
    "decoder_ffn_dim": Expect(lambda config: config.hidden),
    "hidden_expansion": Derived(
        lambda raw: {"fusion": int(raw.get("encoder_hidden_dim", 256) * raw.get("hidden_expansion", 1.0))},
        lambda config: config.fusion / config.dim,
    ),
    "decoder_n_points": "points",
    "num_queries": "queries",
    "dropout": "dropout",
    "num_feature_levels": Expect(LEVELS),
    "encode_proj_layers": Expect([2]),
    "encoder_activation_function": Expect("gelu"),
    "decoder_activation_function": Expect("relu"),
    "activation_function": Expect("silu"),
    "learn_initial_query": Expect(False),
    "normalize_before": Expect(False),
    "eval_size": Expect(None),
}

HUGGINGFACE = huggingface_keys()
