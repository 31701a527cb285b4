"""Public weight names and configurations of text-conditional U-Nets: those of diffusers and of CompVis."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from fieldguide.core.errors import WeightsError
from fieldguide.models.mapping.config_rules import ConfigRow, Derived, Expect, WithDefault
from fieldguide.models.mapping.key_rules import Reshaped, Row

ATTENTION = {"to_q": "q", "to_k": "k", "to_v": "v", "to_out.0": "proj"}  # part of an attention there -> here


def transformer_keys(theirs: str, ours: str, dim: int, linear: bool) -> dict[str, Row]:
    """Return the rows of a Transformer of width `dim`, equal in both formats. Without `linear`, its first and last matrix are 1 x 1
    convolutions.
    """
    layer, here = f"{theirs}transformer_blocks.{{l}}.", f"{ours}layers.{{l}}."
    names: dict[str, Row] = {f"{theirs}norm.*": f"{ours}norm.*"}
    for part in ("proj_in", "proj_out"):
        weight = f"{ours}{part}.weight"
        names[f"{theirs}{part}.weight"] = weight if linear else Reshaped(weight, (dim, dim), (dim, dim, 1, 1))
        names[f"{theirs}{part}.bias"] = f"{ours}{part}.bias"
    names |= {
        f"{layer}norm{{k}}.*": f"{here}norm{{k}}.*",
        f"{layer}ff.net.0.proj.*": f"{here}up.*",
        f"{layer}ff.net.2.*": f"{here}down.*",
    }
    return names | {f"{layer}attn{{k}}.{part}.*": f"{here}attn{{k}}.{own}.*" for part, own in ATTENTION.items()}


def block_keys(theirs: str, ours: str) -> dict[str, Row]:
    """Return the rows of a residual block in diffusers."""
    return {
        f"{theirs}norm{{k}}.*": f"{ours}norm{{k}}.*",
        f"{theirs}conv{{k}}.*": f"{ours}conv{{k}}.*",
        f"{theirs}time_emb_proj.*": f"{ours}time.*",
        f"{theirs}conv_shortcut.*": f"{ours}shortcut.*",
    }


def diffusers_keys(c: Any) -> dict[str, Row]:
    """Return the key table of diffusers for a config."""
    names: dict[str, Row] = {
        "time_embedding.linear_{k}.*": "time{k}.*",
        "time_embedding.cond_proj.weight": "guidance.weight",
        "add_embedding.linear_{k}.*": "add{k}.*",
        "conv_in.*": "conv_in.*",
        "down_blocks.{i}.downsamplers.0.conv.*": "down.{i}.resize.*",
        "up_blocks.{i}.upsamplers.0.conv.*": "up.{i}.resize.*",
        "conv_norm_out.*": "norm.*",
        "conv_out.*": "conv_out.*",
    }
    for theirs, ours in (("down_blocks.{i}", "down.{i}"), ("mid_block", "mid"), ("up_blocks.{i}", "up.{i}")):
        names |= block_keys(f"{theirs}.resnets.{{j}}.", f"{ours}.blocks.{{j}}.")
    widths = [c.dim * growth for growth in c.growth]
    for i, width in enumerate(widths):
        names |= transformer_keys(f"down_blocks.{i}.attentions.{{j}}.", f"down.{i}.attns.{{j}}.", width, c.linear)
        up = len(widths) - 1 - i
        names |= transformer_keys(f"up_blocks.{up}.attentions.{{j}}.", f"up.{up}.attns.{{j}}.", width, c.linear)
    return names | transformer_keys("mid_block.attentions.0.", "mid.attns.0.", widths[-1], c.linear)


def compvis_keys(c: Any) -> dict[str, Row]:
    """Return the key table of CompVis and Stability AI, without the prefix `model.diffusion_model.`: blocks, Transformers and
    convolutions that change the resolution are numbered in one sequence.
    """
    widths, last = [c.dim * growth for growth in c.growth], len(c.growth) - 1
    names: dict[str, Row] = {
        "time_embed.0.*": "time1.*",
        "time_embed.2.*": "time2.*",
        "time_embed.cond_proj.weight": "guidance.weight",
        "label_emb.0.0.*": "add1.*",
        "label_emb.0.2.*": "add2.*",
        "input_blocks.0.0.*": "conv_in.*",
        "out.0.*": "norm.*",
        "out.2.*": "conv_out.*",
    }
    blocks = [("middle_block.0.", "mid.blocks.0."), ("middle_block.2.", "mid.blocks.1.")]
    transformers = [("middle_block.1.", "mid.attns.0.", widths[-1])]
    down = up = 0
    for i, width in enumerate(widths):
        for j in range(c.depth):
            down += 1
            blocks.append((f"input_blocks.{down}.0.", f"down.{i}.blocks.{j}."))
            transformers.append((f"input_blocks.{down}.1.", f"down.{i}.attns.{j}.", width))
        if i < last:
            down += 1
            names[f"input_blocks.{down}.0.op.*"] = f"down.{i}.resize.*"
    for i, width in enumerate(reversed(widths)):
        for j in range(c.depth + 1):
            blocks.append((f"output_blocks.{up}.0.", f"up.{i}.blocks.{j}."))
            if c.attend[last - i]:
                transformers.append((f"output_blocks.{up}.1.", f"up.{i}.attns.{j}.", width))
            up += 1
        if i < last:
            names[f"output_blocks.{up - 1}.{1 + c.attend[last - i]}.conv.*"] = f"up.{i}.resize.*"
    for theirs, ours in blocks:
        names |= {
            f"{theirs}in_layers.0.*": f"{ours}norm1.*",
            f"{theirs}in_layers.2.*": f"{ours}conv1.*",
            f"{theirs}emb_layers.1.*": f"{ours}time.*",
            f"{theirs}out_layers.0.*": f"{ours}norm2.*",
            f"{theirs}out_layers.3.*": f"{ours}conv2.*",
            f"{theirs}skip_connection.*": f"{ours}shortcut.*",
        }
    for theirs, ours, width in transformers:
        names |= transformer_keys(theirs, ours, width, c.linear)
    return names


def parse_levels(raw: Mapping[str, Any]) -> dict[str, Any]:
    """Return the fields of the levels for a configuration of diffusers, in which `attention_head_dim` is the number of heads.

    Raises `WeightsError` for values that the network does not support.
    """
    first, *_ = widths = raw["block_out_channels"]
    count, kinds = len(widths), raw["down_block_types"]
    spread = lambda value: tuple(value) if isinstance(value, list | tuple) else (value,) * count
    if odd := [width for width in widths if width % first]:
        raise WeightsError(f"block_out_channels={widths} is not supported: {odd[0]} is not a multiple of {first}")
    if len(kinds) != count or any(kind not in ("DownBlock2D", "CrossAttnDownBlock2D") for kind in kinds):
        raise WeightsError(f"down_block_types={kinds} is not supported: each must be DownBlock2D or CrossAttnDownBlock2D")
    return {
        "dim": first,
        "growth": tuple(width // first for width in widths),
        "attend": tuple(kind == "CrossAttnDownBlock2D" for kind in kinds),
        "layers": spread(raw.get("transformer_layers_per_block") or 1),
        "heads": spread(raw.get("attention_head_dim") or 8),
        "extra": raw["in_channels"] - raw["out_channels"],
    }


def block_types(direction: str, c: Any) -> list[str]:
    """Return the block types of diffusers; `direction` is "Down" or "Up"."""
    return [f"{'CrossAttn' if attend else ''}{direction}Block2D" for attend in c.attend]


CONFIG: dict[str, ConfigRow] = {  # of diffusers
    "_class_name": Expect("UNet2DConditionModel"),
    "sample_size": "image",
    "out_channels": "channels",
    "in_channels": Expect(lambda c: c.channels + c.extra),
    "cross_attention_dim": "text_dim",
    "layers_per_block": "depth",
    "norm_num_groups": "groups",
    "block_out_channels": Derived(parse_levels, lambda c: [c.dim * growth for growth in c.growth]),
    "down_block_types": Expect(lambda c: block_types("Down", c)),
    "up_block_types": Expect(lambda c: block_types("Up", c)[::-1]),
    "transformer_layers_per_block": Derived(lambda raw: {}, lambda c: list(c.layers)),
    "attention_head_dim": Derived(lambda raw: {}, lambda c: list(c.heads)),
    "use_linear_projection": WithDefault("linear", False),
    "time_cond_proj_dim": Derived(
        lambda raw: {"guidance_dim": raw.get("time_cond_proj_dim") or 0}, lambda c: c.guidance_dim or None
    ),
    "mid_block_type": Expect("UNetMidBlock2DCrossAttn"),
    "norm_eps": Expect(1e-5),
    "act_fn": Expect("silu"),
    "dropout": Expect(0.0),
    "downsample_padding": Expect(1),
    "flip_sin_to_cos": Expect(True),
    "freq_shift": Expect(0),
    "mid_block_scale_factor": Expect(1),
    "center_input_sample": Expect(False),
    "resnet_time_scale_shift": Expect("default"),
    "resnet_skip_time_act": Expect(False),
    "resnet_out_scale_factor": Expect(1.0),
    "time_embedding_type": Expect("positional"),
    "time_embedding_dim": Expect(None),
    "time_embedding_act_fn": Expect(None),
    "timestep_post_act": Expect(None),
    "class_embed_type": Expect(None),
    "num_class_embeds": Expect(None),
    "encoder_hid_dim": Expect(None),
    "encoder_hid_dim_type": Expect(None),
    "num_attention_heads": Expect(None),
    "reverse_transformer_layers_per_block": Expect(None),
    "dual_cross_attention": Expect(False),
    "only_cross_attention": Expect(False),
    "cross_attention_norm": Expect(None),
    "attention_type": Expect("default"),
    "conv_in_kernel": Expect(3),
    "conv_out_kernel": Expect(3),
}
