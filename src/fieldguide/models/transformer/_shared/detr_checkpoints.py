"""Names of public DETR checkpoints: the authors' files, and those of transformers with the ResNet of timm or of transformers."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from fieldguide.models.convolutional import resnet
from fieldguide.models.mapping.config_rules import ConfigRow, Constant, Derived, Expect, LabelCount
from fieldguide.models.mapping.key_rules import Fused, Row, place_submodel, strip_prefix


def place_backbone(table: Mapping[str, Row], prefix: str) -> dict[str, Row]:
    """Return the rows of a ResNet's table for the ResNet inside of the detector, without its classifier."""
    return place_submodel(table, prefix, "backbone.", without="head", frozen=True)


def name_layers(stack: str, theirs: str, names: Mapping[str, str]) -> dict[str, Row]:
    """Return the rows of one stack of layers: `names` maps the parts of their layers to the parts of ours."""
    return {f"{theirs}.{{i}}.{part}.*": f"{stack}.{{i}}.{ours}.*" for part, ours in names.items()}


def fuse_attention(stack: str, theirs: str, names: Mapping[str, str], parts: tuple[str, ...]) -> dict[str, Row]:
    """Return the rows of attention whose three projections are separate tensors in the file."""
    return {
        f"{theirs}.{{i}}.{attention}.{part}.{kind}": Fused(f"{stack}.{{i}}.{ours}.qkv.{kind}", number, 3)
        for attention, ours in names.items()
        for number, part in enumerate(parts)
        for kind in ("weight", "bias")
    }


AUTHORS = {  # of github.com/facebookresearch/detr
    **place_backbone(resnet.TORCHVISION, "backbone.0.body."),
    "input_proj.*": "reduce.*",
    "query_embed.weight": "queries",
    **{
        f"transformer.{stack}.layers.{{i}}.{theirs}.in_proj_{kind}": f"{stack}.{{i}}.{ours}.qkv.{kind}"
        for stack, theirs, ours in (
            ("encoder", "self_attn", "attention"),
            ("decoder", "self_attn", "attention"),
            ("decoder", "multihead_attn", "cross"),
        )
        for kind in ("weight", "bias")
    },
    **{
        row: ours
        for stack, names in (
            ("encoder", {"self_attn.out_proj": "attention.proj", "norm1": "norm1", "norm2": "norm2"}),
            (
                "decoder",
                {
                    "self_attn.out_proj": "attention.proj",
                    "multihead_attn.out_proj": "cross.proj",
                    "norm1": "norm1",
                    "norm2": "norm2",
                    "norm3": "norm3",
                },
            ),
        )
        for row, ours in name_layers(
            stack, f"transformer.{stack}.layers", {**names, "linear1": "mlp.0", "linear2": "mlp.3"}
        ).items()
    },
    "transformer.decoder.norm.*": "norm.*",
    "bbox_embed.layers.0.*": "box.0.*",
    "bbox_embed.layers.1.*": "box.2.*",
    "bbox_embed.layers.2.*": "box.4.*",
    "class_embed.*": "label.*",
}


def huggingface_keys(backbone: Mapping[str, Row]) -> dict[str, Row]:
    """Return the key table of files of transformers, which begin with the ResNet of transformers or of timm.

    Since version 5 the names in files (`out_proj`, `fc1`) differ from those of the live network (`o_proj`, `mlp.fc1`).
    """
    heads = ("q_proj", "k_proj", "v_proj")
    mlp = {"fc1": "mlp.0", "fc2": "mlp.3", "self_attn.out_proj": "attention.proj", "self_attn_layer_norm": "norm1"}
    cross = {"encoder_attn.out_proj": "cross.proj", "encoder_attn_layer_norm": "norm2"}
    return {
        **place_backbone(backbone, "model.backbone.conv_encoder.model."),
        "model.input_projection.*": "reduce.*",
        "model.query_position_embeddings.weight": "queries",
        **fuse_attention("encoder", "model.encoder.layers", {"self_attn": "attention"}, heads),
        **name_layers("encoder", "model.encoder.layers", {**mlp, "final_layer_norm": "norm2"}),
        **fuse_attention("decoder", "model.decoder.layers", {"self_attn": "attention", "encoder_attn": "cross"}, heads),
        **name_layers("decoder", "model.decoder.layers", {**mlp, **cross, "final_layer_norm": "norm3"}),
        "model.decoder.layernorm.*": "norm.*",
        "bbox_predictor.layers.0.*": "box.0.*",
        "bbox_predictor.layers.1.*": "box.2.*",
        "bbox_predictor.layers.2.*": "box.4.*",
        "class_labels_classifier.*": "label.*",
    }


def read_backbone(raw: Mapping[str, Any]) -> dict[str, Any]:
    """Return the fields of the ResNet in a configuration, which may name it ("resnet50", of timm) or describe it."""
    inner = raw.get("backbone_config") or {}
    if inner.get("model_type") == "resnet":
        block = inner.get("layer_type", "bottleneck")
        growth = resnet.get_growth(block)
        widths = tuple(width // growth for width in inner.get("hidden_sizes", (256, 512, 1024, 2048)))
        return {"block": block, "depths": tuple(inner.get("depths", (3, 4, 6, 3))), "widths": widths}
    name = inner.get("backbone") or raw.get("backbone") or "resnet50"
    made = resnet.CARD.resolve_config(name)
    return {"block": made.block, "depths": made.depths, "widths": made.widths}


def write_backbone(config: Any) -> dict[str, Any]:
    growth = resnet.get_growth(config.block)
    return {
        "model_type": "resnet",
        "num_channels": config.channels,
        "layer_type": config.block,
        "depths": list(config.depths),
        "hidden_sizes": [growth * width for width in config.widths],
        "embedding_size": config.widths[0],
        "out_features": [f"stage{len(config.depths)}"],
    }


CONFIG: dict[str, ConfigRow] = {  # of transformers
    "model_type": Expect("detr"),
    "architectures": Expect(["DetrForObjectDetection"]),
    "id2label": LabelCount("num_classes"),
    "num_channels": "channels",
    "backbone_config": Derived(read_backbone, write_backbone),
    "use_timm_backbone": Derived(lambda raw: {}, lambda config: False),
    "d_model": "dim",
    "encoder_attention_heads": "heads",
    "decoder_attention_heads": Expect(lambda config: config.heads),
    "encoder_layers": "depth",
    "decoder_layers": "decoder_depth",
    "encoder_ffn_dim": "hidden",
    "decoder_ffn_dim": Expect(lambda config: config.hidden),
    "num_queries": "queries",
    "dropout": "dropout",
    "activation_function": Expect("relu"),
    "position_embedding_type": Expect("sine"),
    "<the norms of the ResNet are constants>": Constant("frozen_norm", True),
    "dilation": Expect(False),  # True is the variant DC5, whose last level is not downsampled
}

WEIGHTS: dict[str, Mapping[str, Row]] = {
    "huggingface": huggingface_keys(strip_prefix(resnet.HUGGINGFACE, "resnet.")),
    "huggingface-timm": huggingface_keys(resnet.TORCHVISION),
    "facebookresearch": AUTHORS,
}
