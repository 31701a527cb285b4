"""The public checkpoints of docs/checkpoints.toml: a tiny copy of each configuration is written by transformers and loaded here.

The copy has the configuration file as published, with fewer and narrower layers.
"""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

import fieldguide
from cases import pack_patches as pack
from fieldguide.checkpoints.config_mapping import identify_config, to_config_fields
from fieldguide.models.initialization import make_on_meta
from fieldguide.models.registry import card_of
from test_pretrained import settled
from tv import transformers

DOCS = Path(__file__).parents[1] / "docs"
SPEC = importlib.util.spec_from_file_location("checkpoints_page", DOCS / "checkpoints.py")
PAGE = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(PAGE)
LIST = PAGE.read()
LOADED = [row for row in LIST["checkpoint"] if "config" in row]
MIN_LOADED = 90

HEADS = ("num_attention_heads", "encoder_attention_heads", "decoder_attention_heads", "n_heads", "n_head", "num_heads")
WIDTHS = ("hidden_size", "dim", "n_embd", "d_model")
DEPTHS = ("num_hidden_layers", "n_layers", "n_layer", "encoder_layers", "decoder_layers", "num_layers", "num_decoder_layers")
MLPS = ("intermediate_size", "moe_intermediate_size", "hidden_dim", "encoder_ffn_dim", "decoder_ffn_dim", "ffn_dim", "d_ff")
HEAD_WIDTH = 8


def shrink(config: dict[str, Any]) -> dict[str, Any]:
    """Return a configuration with fewer and narrower layers, and everything else as it is."""
    small = dict(config)
    if "text_config" in config:
        parts = {part: {**shrink(config[part]), "projection_dim": 16} for part in ("text_config", "vision_config")}
        if "projection_size" in config["text_config"]:
            parts["text_config"]["projection_size"] = parts["vision_config"]["hidden_size"]
        if "encoder_hidden_size" in config["text_config"]:
            parts["text_config"]["encoder_hidden_size"] = parts["vision_config"]["hidden_size"]
        return {**small, **parts, "projection_dim": 16}
    if "decoder" in config:
        return {**small, **{part: shrink(config[part]) for part in ("encoder", "decoder")}}
    if "encoder_config" in config:
        return {**small, "encoder_config": {**shrink(config["encoder_config"]), "subsampling_conv_channels": 8}}
    if "depths" in config:
        small["depths"] = [1] * len(config["depths"])
        if "hidden_sizes" in config:
            growth = config["hidden_sizes"][0] // config.get("embedding_size", config["hidden_sizes"][0])
            small["hidden_sizes"] = [8 * growth * 2**i for i in range(len(config["depths"]))]
        if "embedding_size" in config:
            small["embedding_size"] = 8
        if "embed_dim" in config:
            small |= {"embed_dim": 24, "hidden_size": 24 * 2 ** (len(config["depths"]) - 1)}
        return small
    heads, *_ = {config[key] for key in HEADS if key in config}
    few = min(heads, 4)
    small |= dict.fromkeys([key for key in HEADS if key in config], few)
    if "num_key_value_heads" in config:
        small["num_key_value_heads"] = (
            few if config["num_key_value_heads"] == heads else 1 if config["num_key_value_heads"] == 1 else 2
        )
    small |= dict.fromkeys([key for key in ("head_dim", "d_kv") if key in config], HEAD_WIDTH)
    width = few * HEAD_WIDTH
    for key in ("embedding_size", "word_embed_proj_dim"):  # equal to the width, or not
        if key in config:
            small[key] = width if config[key] == config["hidden_size"] else width + 8
    small |= dict.fromkeys([key for key in WIDTHS if key in config], width)
    small |= dict.fromkeys([key for key in ("projection_dim", "pooler_hidden_size") if key in config], width)
    wide = next(config[key] for key in WIDTHS if key in config)
    small |= {key: 4 * width if config[key] == 4 * wide else 24 for key in MLPS if config.get(key)}
    if "conv_dim" in config:
        small |= {"conv_dim": [8] * len(config["conv_dim"]), "num_conv_pos_embedding_groups": 4, "num_codevectors_per_group": 5}
    if "mrope_section" in (config.get("rope_scaling") or {}):
        small["rope_scaling"] = {**config["rope_scaling"], "mrope_section": [1, 1, 2]}
        tower = {"depth": 2, "hidden_size": 32, "num_heads": 4, "intermediate_size": 24, "fullatt_block_indexes": [1]}
        small["vision_config"] = {**config["vision_config"], **tower, "out_hidden_size": width}
    first = config.get("first_k_dense_replace", 1)  # layers of another kind than those after them
    layers = config.get("sliding_window_pattern", config.get("global_attn_every_n_layers", first)) + 1
    if "layer_types" in config:
        small["layer_types"] = config["layer_types"][:layers]
    if "attention_types" in config:
        small["attention_types"] = [[config["attention_types"][0][0], layers // 2]]
    if "state_size" in config:  # heads of groups
        small |= {"num_heads": 8, "hidden_size": 8 * HEAD_WIDTH // config["expand"]}
    return small | dict.fromkeys([key for key in DEPTHS if key in config], layers)


def build(kind: str, config: dict[str, Any]) -> nn.Module:
    """Return the network of transformers for a configuration, with random weights."""
    kept = {key: value for key, value in config.items() if key not in ("model_type", "architectures")}
    torch.manual_seed(0)
    made = settled(
        getattr(transformers, kind)(
            transformers.AutoConfig.for_model(
                config["model_type"], **kept, attn_implementation="eager", experts_implementation="eager"
            )
        )
    )
    for module in made.modules():
        if hasattr(module, "create_weight"):  # computed positions, which are part of old files
            module.weight.data = module.create_weight()
    if config["model_type"] == "t5" and config.get("tie_word_embeddings") is False:  # transformers 5 ties every T5's head
        made.lm_head.weight = nn.Parameter(2 * made.lm_head.weight.detach())
    return made


def write(theirs: nn.Module, config: dict[str, Any], folder: Path) -> None:
    """Write the files of a checkpoint with this configuration."""
    theirs.save_pretrained(folder)
    (folder / "config.json").write_text(json.dumps(config))
    state = {
        key: x for key, x in theirs.state_dict().items() if key == "lm_head.weight" or key.endswith("embed_positions.weight")
    }
    if config["model_type"] in ("t5", "marian", "pegasus"):  # tensors that files have, but transformers 5 does not write
        if config.get("tie_word_embeddings") is not False:
            state.pop("lm_head.weight")
        save_file({**load_file(folder / "model.safetensors"), **state}, folder / "model.safetensors", {"format": "pt"})


def compare(ours: nn.Module, theirs: nn.Module, config: dict[str, Any]) -> None:
    """Compare the outputs of both on the same inputs."""
    torch.manual_seed(1)
    vocab = config.get("vocab_size", config.get("text_config", {}).get("vocab_size", 0))
    tokens = torch.randint(5, min(vocab, 20_000), (2, 9)) if vocab else None
    side = config.get("image_size", config.get("vision_config", {}).get("image_size", 64))
    image = torch.randn(1, 3, side, side)
    output = getattr(ours.config, "output_type", card_of(ours).output_types[0])
    if card_of(ours).input_type == "image-text":
        found = theirs(pixel_values=image, input_ids=tokens[:1], attention_mask=torch.ones_like(tokens[:1]))
        torch.testing.assert_close(ours(image, tokens[:1]), found.logits, rtol=1e-3, atol=1e-4)
        return
    if card_of(ours).input_type == "captioned" and output == "tokens":
        image = torch.randn(1, 3, 56, 140)
        tokens = torch.cat([tokens[:1], torch.full((1, 10), config["image_token_id"]), tokens[1:]], 1)
        pixels, grid = pack(list(image), 14, 2)
        shown = {
            "pixel_values": pixels,
            "image_grid_thw": grid,
            "mm_token_type_ids": (tokens == config["image_token_id"]).int(),
        }
        torch.testing.assert_close(ours(image, tokens), theirs(input_ids=tokens, **shown).logits, rtol=1e-3, atol=1e-3)
        return
    if card_of(ours).input_type == "captioned":
        tokens = tokens.repeat(1, 8)[:, : ours.config.length]  # SigLIP reads its texts at the maximum length only
        tokens[:, -1] = ours.config.end
        found = theirs(pixel_values=image.expand(2, -1, -1, -1), input_ids=tokens, attention_mask=torch.ones_like(tokens))
        torch.testing.assert_close(ours.encode_image(image).expand(2, -1), found.image_embeds, rtol=1e-3, atol=1e-4)
        got = ours.encode_text(tokens, torch.ones_like(tokens, dtype=torch.bool))
        torch.testing.assert_close(got, found.text_embeds, rtol=1e-3, atol=1e-4)
        return
    if card_of(ours).input_type == "image":
        found = theirs(pixel_values=image)
        if output == "vector":
            torch.testing.assert_close(ours(image), found.last_hidden_state[:, 0], rtol=1e-3, atol=1e-4)
        else:
            torch.testing.assert_close(ours(image), found.logits, rtol=1e-3, atol=1e-4)
        return
    if card_of(ours).input_type == "speech":
        features, blank = torch.randn(2, 40, ours.config.features), ours.config.blank
        want = theirs(features, attention_mask=torch.ones(2, 40)).logits
        want = torch.cat([want[..., blank : blank + 1], want[..., :blank], want[..., blank + 1 :]], -1)
        torch.testing.assert_close(ours(features), want, rtol=1e-3, atol=1e-3)
        return
    if card_of(ours).input_type == "waveform":
        waveform = torch.randn(2, 4000)
        found = theirs(waveform)
        if output == "contexts":
            want = torch.stack([found.projected_states, found.projected_quantized_states], 2)
        else:
            want = found.last_hidden_state.mean(1) if output == "vector" else found.logits
        torch.testing.assert_close(ours(waveform), want, rtol=1e-3, atol=1e-3)
        return
    if card_of(ours).input_type == "speech-text":
        features = torch.randn(2, 2 * config["max_source_positions"], config["num_mel_bins"])
        found = theirs(input_features=features.transpose(1, 2), decoder_input_ids=tokens, use_cache=False)
        torch.testing.assert_close(ours(features, tokens), found.logits, rtol=1e-3, atol=1e-3)
        return
    if card_of(ours).input_type == "pair":
        found = theirs(input_ids=tokens, decoder_input_ids=tokens[:, :5], use_cache=False)
        if hasattr(found, "logits"):
            torch.testing.assert_close(ours(tokens, None, tokens[:, :5]), found.logits, rtol=1e-3, atol=1e-3)
        else:
            got = ours.decode(tokens[:, :5], None, *ours.encode_source(tokens, None), None)
            torch.testing.assert_close(got, found.last_hidden_state, rtol=1e-3, atol=1e-3)
        return
    found = theirs(input_ids=tokens, attention_mask=torch.ones_like(tokens))
    if output == "vector":
        torch.testing.assert_close(ours.features(tokens), found.last_hidden_state, rtol=1e-3, atol=1e-4)
    elif output == "span":
        want = torch.stack([found.start_logits, found.end_logits], -1)
        torch.testing.assert_close(ours(tokens), want, rtol=1e-3, atol=1e-4)
    else:
        want = found.logits[..., None] if output == "replaced" else found.logits
        torch.testing.assert_close(ours(tokens), want, rtol=1e-3, atol=1e-3)


def mark(rows: list[dict[str, Any]]) -> list[Any]:
    """Return the rows as parameters of a test; the first of each architecture is quick."""
    first = {row["architecture"]: row["name"] for row in reversed(rows)}
    quick = set(first.values())
    return [pytest.param(row, id=row["name"], marks=() if row["name"] in quick else pytest.mark.slow) for row in rows]


DISTINCT = {json.dumps([row["class"], shrink(PAGE.get_config(LIST, row))], sort_keys=True): row for row in reversed(LOADED)}


@torch.no_grad()
@pytest.mark.filterwarnings("ignore::fieldguide.core.errors.WeightsWarning")
@pytest.mark.parametrize("row", mark(list(reversed(DISTINCT.values()))))
def test_tiny_copy_loads(row, tmp_path):
    config = shrink(PAGE.get_config(LIST, row))
    theirs = build(row["class"], config)
    write(theirs, config, tmp_path)
    ours = fieldguide.load(tmp_path)
    assert card_of(ours).name == row["architecture"]
    compare(ours, theirs, config)


@pytest.mark.parametrize("row", mark(LOADED))
def test_published_configuration_has_the_stated_size(row):
    """As published, the configuration is recognized and gives a network of the number of parameters on the page."""
    config = PAGE.get_config(LIST, row)
    card, _, table = identify_config(config)
    made = card.config(**to_config_fields(card, table, config, row["name"]))
    model = make_on_meta(card, made)
    assert (card.name, sum(p.numel() for p in model.parameters())) == (row["architecture"], row["params"])


def test_most_checkpoints_load():
    rows = LIST["checkpoint"]
    assert len({row["name"] for row in rows}) == len(rows) >= 100 and len(LOADED) >= MIN_LOADED
    assert all(("config" in row) != ("why" in row) for row in rows)


def test_the_page_is_up_to_date():
    assert (DOCS / "checkpoints.md").read_text("utf-8") == PAGE.page(LIST), "make catalogue"
