"""Names of weights and configuration keys that both versions of TabICL have in the authors' files."""

from __future__ import annotations

from collections.abc import Mapping

from fieldguide.models.mapping.config_rules import ConfigRow, Derived, Expect


def name_block(theirs: str, ours: str, is_scaled: bool = False) -> dict[str, str]:
    """Return the names of a block: attention, norms and MLP."""
    names = {
        "attn.in_proj_weight": "attn.qkv.weight",
        "attn.in_proj_bias": "attn.qkv.bias",
        "attn.out_proj.*": "attn.proj.*",
        "norm1.*": "norm1.*",
        "norm2.*": "norm2.*",
        "linear1.*": "up.*",
        "linear2.*": "down.*",
    }
    if is_scaled:
        names |= {
            f"attn.ssmax_layer.{part}_mlp.{i}.*": f"attn.scale.{part}.{i}.*" for part in ("base", "query") for i in (0, 2)
        }
    return {f"{theirs}.{there}": f"{ours}.{here}" for there, here in names.items()}


def name_stages(is_scaled: bool) -> dict[str, str]:
    """Return the names of the three stages. `is_scaled` is True if queries are scaled by the number of keys."""
    block = "col_embedder.tf_col.blocks.{i}"
    return {
        "col_embedder.in_linear.*": "columns.project.*",
        block + ".ind_vectors": "columns.blocks.{i}.points",
        **name_block(block + ".multihead_attn1", "columns.blocks.{i}.gather", is_scaled),
        **name_block(block + ".multihead_attn2", "columns.blocks.{i}.spread"),
        "row_interactor.cls_tokens": "rows.cls",
        "row_interactor.tf_row.rope.freqs": "rows.rotation.freqs",
        **name_block("row_interactor.tf_row.blocks.{i}", "rows.blocks.{i}"),
        "row_interactor.out_ln.*": "rows.norm.*",
        "icl_predictor.y_encoder.*": "learner.target.*",
        **name_block("icl_predictor.tf_icl.blocks.{i}", "learner.blocks.{i}", is_scaled),
        "icl_predictor.ln.*": "learner.norm.*",
        "icl_predictor.decoder.0.*": "learner.decoder.0.*",
        "context.*": "context.*",  # of a trained network; published files have none
        "icl_predictor.decoder.2.*": "learner.decoder.2.*",
    }


SHARED_KEYS: Mapping[str, ConfigRow] = {
    "embed_dim": "dim",
    "col_num_blocks": "column_depth",
    "col_nhead": "column_heads",
    "col_num_inds": "points",
    "row_num_blocks": "row_depth",
    "row_nhead": "row_heads",
    "row_num_cls": "row_tokens",
    "row_rope_base": Derived(
        lambda keys: {"rope_theta": float(keys.get("row_rope_base", 100_000))}, lambda config: config.rope_theta
    ),
    "icl_num_blocks": "depth",
    "icl_nhead": "heads",
    "ff_factor": "expansion",
    "bias_free_ln": Derived(
        lambda keys: {"norm_bias": not keys.get("bias_free_ln", False)}, lambda config: not config.norm_bias
    ),
    "max_classes": Derived(
        lambda keys: {"max_classes": keys.get("max_classes", 10), "num_classes": keys.get("max_classes", 10) or 1},
        lambda config: config.max_classes,
    ),
    "dropout": Expect(0.0, absent=0.0),
    "activation": Expect("gelu", absent="gelu"),
    "norm_first": Expect(True, absent=True),
}
