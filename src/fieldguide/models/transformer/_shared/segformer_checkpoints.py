"""Names of public SegFormer checkpoints: files of transformers, of the authors (NVIDIA) and of OpenMMLab's mmsegmentation."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from fieldguide.core.errors import WeightsError
from fieldguide.models.mapping.config_rules import ConfigRow, Constant, Derived, Expect, LabelCount
from fieldguide.models.mapping.key_rules import Dropped, Fused, Reshaped, Row

LEVELS = 4
GROWTH = 4  # of the width inside of the MLP
BLOCK = "levels_.{s}.blocks.{b}."
ARCHITECTURES = ("SegformerForSemanticSegmentation", "SegformerForImageClassification")  # the second one has only the encoder
NEVER_USED = Dropped("a classifier that the decoder replaces")


def huggingface_keys() -> dict[str, Row]:
    """Return the key table of files of transformers, whose names (`linear_c`, `attention.self`) the live network lacks."""
    block = "segformer.encoder.block.{s}.{b}."
    rows: dict[str, Row] = {
        "segformer.encoder.patch_embeddings.{s}.proj.*": "levels_.{s}.patch.*",
        "segformer.encoder.patch_embeddings.{s}.layer_norm.*": "levels_.{s}.norm_patch.*",
        "segformer.encoder.layer_norm.{s}.*": "levels_.{s}.norm.*",
    }
    for theirs, ours in {
        "layer_norm_1": "norm1",
        "attention.output.dense": "attn.proj",
        "attention.self.sr": "attn.reduce",
        "attention.self.layer_norm": "attn.norm",
        "layer_norm_2": "norm2",
        "mlp.dense1": "mlp.up",
        "mlp.dwconv.dwconv": "mlp.conv",
        "mlp.dense2": "mlp.down",
    }.items():
        rows[f"{block}{theirs}.*"] = f"{BLOCK}{ours}.*"
    for i, part in enumerate(("query", "key", "value")):
        rows[f"{block}attention.self.{part}.*"] = Fused(f"{BLOCK}attn.qkv.*", i, 3)
    return rows | {
        "decode_head.linear_c.{s}.proj.*": "project.{s}.linear.*",
        "decode_head.linear_fuse.weight": "fuse.conv.weight",
        "decode_head.batch_norm.*": "fuse.norm.*",
        "decode_head.classifier.*": "label.*",
        "classifier.*": NEVER_USED,
    }


def nvidia_keys() -> dict[str, Row]:
    """Return the key table of the authors' files, which number levels from 1."""
    block = "backbone.block{s+1}.{b}."
    rows: dict[str, Row] = {
        "backbone.patch_embed{s+1}.proj.*": "levels_.{s}.patch.*",
        "backbone.patch_embed{s+1}.norm.*": "levels_.{s}.norm_patch.*",
        "backbone.norm{s+1}.*": "levels_.{s}.norm.*",
        f"{block}attn.q.*": Fused(f"{BLOCK}attn.qkv.*", 0, 3),
        f"{block}attn.kv.*": Fused(f"{BLOCK}attn.qkv.*", 1, 3, span=2),
    }
    for theirs, ours in {
        "norm1": "norm1",
        "attn.proj": "attn.proj",
        "attn.sr": "attn.reduce",
        "attn.norm": "attn.norm",
        "norm2": "norm2",
        "mlp.fc1": "mlp.up",
        "mlp.dwconv.dwconv": "mlp.conv",
        "mlp.fc2": "mlp.down",
    }.items():
        rows[f"{block}{theirs}.*"] = f"{BLOCK}{ours}.*"
    return rows | {
        "decode_head.linear_c{s+1}.proj.*": "project.{s}.linear.*",
        "decode_head.linear_fuse.conv.weight": "fuse.conv.weight",
        "decode_head.linear_fuse.bn.*": "fuse.norm.*",
        "decode_head.linear_pred.*": "label.*",
        "decode_head.conv_seg.*": NEVER_USED,
    }


def openmmlab(config: Any) -> Mapping[str, Row]:
    """Return the key table of OpenMMLab's files, in which linear layers are convolutions, and whose decoder is `normalized`."""
    rows: dict[str, Row] = {
        "backbone.layers.{s}.0.projection.*": "levels_.{s}.patch.*",
        "backbone.layers.{s}.0.norm.*": "levels_.{s}.norm_patch.*",
        "backbone.layers.{s}.2.*": "levels_.{s}.norm.*",
    }
    block = "backbone.layers.{s}.1.{b}."
    for theirs, ours in {
        "norm1": "norm1",
        "attn.attn.out_proj": "attn.proj",
        "attn.sr": "attn.reduce",
        "attn.norm": "attn.norm",
        "norm2": "norm2",
        "ffn.layers.1": "mlp.conv",
    }.items():
        rows[f"{block}{theirs}.*"] = f"{BLOCK}{ours}.*"
    for kind in ("weight", "bias"):
        rows[f"{block}attn.attn.in_proj_{kind}"] = f"{BLOCK}attn.qkv.{kind}"
    for s, dim in enumerate(config.widths):
        theirs, ours = f"backbone.layers.{s}.1.{{b}}.ffn.layers", f"levels_.{s}.blocks.{{b}}.mlp"
        for number, part, shape in ((0, "up", (GROWTH * dim, dim)), (4, "down", (dim, GROWTH * dim))):
            rows[f"{theirs}.{number}.weight"] = Reshaped(f"{ours}.{part}.weight", shape, (*shape, 1, 1))
            rows[f"{theirs}.{number}.bias"] = f"{ours}.{part}.bias"
        rows[f"decode_head.convs.{s}.conv.weight"] = Reshaped(
            f"project.{s}.linear.weight", (config.dim, dim), (config.dim, dim, 1, 1)
        )
    return rows | {
        "decode_head.convs.{s}.conv.bias": "project.{s}.linear.bias",  # only of convolutions without norm
        "decode_head.convs.{s}.bn.*": "project.{s}.norm.*",
        "decode_head.fusion_conv.conv.weight": "fuse.conv.weight",
        "decode_head.fusion_conv.bn.*": "fuse.norm.*",
        "decode_head.conv_seg.*": "label.*",
    }


def check_architecture(raw: Mapping[str, Any]) -> dict[str, Any]:
    """Raise `WeightsError` for another network than a segmenter or classifier."""
    for name in raw.get("architectures") or ():
        if name not in ARCHITECTURES:
            raise WeightsError(f"architectures={name!r} is not supported. Choose one of {', '.join(ARCHITECTURES)}.")
    return {}


CONFIG: dict[str, ConfigRow] = {  # of transformers
    "model_type": Expect("segformer"),
    "architectures": Derived(check_architecture, lambda config: [ARCHITECTURES[0]]),
    "<the decoder of OpenMMLab>": Constant("normalized", False),
    "id2label": LabelCount("num_classes"),
    "num_channels": "channels",
    "num_encoder_blocks": Expect(LEVELS),
    "hidden_sizes": "widths",
    "depths": "depths",
    "num_attention_heads": "heads",
    "sr_ratios": "reductions",
    "decoder_hidden_size": "dim",
    "patch_sizes": Expect([7, 3, 3, 3]),
    "strides": Expect([4, 2, 2, 2]),
    "mlp_ratios": Expect([GROWTH] * LEVELS),
    "hidden_act": Expect("gelu"),
    "hidden_dropout_prob": "dropout",
    "attention_probs_dropout_prob": Expect(0.0),
    "drop_path_rate": "drop_path",
    "classifier_dropout_prob": "head_dropout",
    "reshape_last_stage": Expect(True),
}

HUGGINGFACE, NVIDIA = huggingface_keys(), nvidia_keys()
