"""Weight names and configuration keys of CLIP's text encoder alone, in files of transformers, OpenAI and open_clip."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from fieldguide.models.mapping.config_rules import ConfigRow, Derived, Expect, ValueMap
from fieldguide.models.mapping.key_rules import Dropped, Joined, Row
from fieldguide.models.transformer._shared import clip_checkpoints

END = 49_407  # end token of CLIP's tokenizer
BLOCK = ("ln_1.*", "ln_2.*", "attn.in_proj_weight", "attn.in_proj_bias", "attn.out_proj.*", "mlp.c_fc.*", "mlp.c_proj.*")
OURS = "text."  # prefix of the encoder's tensors in a whole CLIP


def place(row: Row) -> Row:
    """Return a row of the table of a whole CLIP for the encoder alone."""
    if isinstance(row, str):
        return row.removeprefix(OURS)
    return row if isinstance(row, Dropped | Joined) else type(row)(**vars(row) | {"ours": row.ours.removeprefix(OURS)})


def select_text(table: Mapping[str, Row], prefix: str) -> dict[str, Row]:
    """Return the rows of a whole CLIP's table whose public names begin with a prefix, or belong to the projection."""
    ours = lambda row: row if isinstance(row, str) else getattr(row, "ours", "")
    return {
        name: place(row)
        for name, row in table.items()
        if ours(row).startswith(OURS) or (isinstance(row, Dropped) and prefix and name.startswith(prefix))
    }


TEXT = select_text(clip_checkpoints.HUGGINGFACE, "text_model.")
# transformers 5 writes the encoder without projection also without the prefix. Rows with the prefix come first and are written.
HUGGINGFACE: dict[str, Row] = TEXT | {name.removeprefix("text_model."): row for name, row in TEXT.items()}


def openai_keys(c: Any) -> dict[str, Row]:
    """Return the names of OpenAI and open_clip, and what single files of image generators hold besides."""
    names = select_text(clip_checkpoints.OPENAI, "")
    names |= {"attn_mask": Dropped("the causal mask"), "logit_scale": Dropped("the temperature of the whole CLIP")}
    if not c.embed:
        names["text_projection"] = Dropped("not used by image generators")
    unused = f"transformer.resblocks.{c.depth}."  # the last block, whose states Stable Diffusion 2 does not use
    return {f"{unused}{part}": Dropped("the last block is not used") for part in BLOCK} | names


def parse_text(raw: Mapping[str, Any]) -> dict[str, Any]:
    """Return end token and projection. Configurations from before 2024 contain 2 by mistake and mean CLIP's end token."""
    vocabulary, token = raw.get("vocab_size", END + 1), raw.get("eos_token_id", END)
    projected = raw.get("architectures") == ["CLIPTextModelWithProjection"]
    return {
        "end": min(vocabulary - 1, END) if token == 2 else token,
        "embed": raw.get("projection_dim", 512) if projected else 0,
    }


CONFIG: dict[str, ConfigRow] = {  # keys of transformers
    "model_type": Expect("clip_text_model"),
    "architectures": Expect(lambda c: ["CLIPTextModelWithProjection" if c.embed else "CLIPTextModel"]),
    "vocab_size": "vocab_size",
    "max_position_embeddings": "length",
    "hidden_size": "dim",
    "num_hidden_layers": "depth",
    "num_attention_heads": "heads",
    "intermediate_size": Expect(lambda c: 4 * c.dim),
    "layer_norm_eps": Expect(1e-5),
    "attention_dropout": Expect(0.0),
    "hidden_act": ValueMap("quick", clip_checkpoints.ACTS),
    "eos_token_id": Derived(parse_text, lambda c: c.end),
    "projection_dim": Derived(lambda raw: {}, lambda c: c.embed or c.dim),
}
