"""Decoders against transformers: folders both ways, generation with a cache, and the traps of each architecture."""

from __future__ import annotations

import json
from dataclasses import asdict
from typing import Any

import pytest
import torch
from torch import nn

import fieldguide
from fieldguide.core.errors import SettingsError, WeightsError
from fieldguide.models.generation import Sampling, generate
from fieldguide.models.recurrent.mamba2 import scan, sum_segments
from fieldguide.models.registry import cards, create
from fieldguide.models.transformer._shared import rope_kinds
from test_models import tiny
from test_pretrained import settled
from tv import transformers

SHAPE = {
    "vocab_size": 30,
    "max_position_embeddings": 48,
    "hidden_size": 16,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "intermediate_size": 20,
    "pad_token_id": None,
    "bos_token_id": None,
    "eos_token_id": None,
}
LONGROPE = {
    "rope_parameters": {
        "rope_type": "longrope",
        "rope_theta": 50.0,
        "partial_rotary_factor": 0.5,
        "short_factor": [1.0],
        "long_factor": [3.0],
        "original_max_position_embeddings": 12,
    },
    "original_max_position_embeddings": 12,
}
YARN = {
    "rope_type": "yarn",
    "rope_theta": 100.0,
    "factor": 4.0,
    "beta_fast": 2.0,
    "beta_slow": 0.3,
    "original_max_position_embeddings": 12,
}
OLD_YARN = {"type" if key == "rope_type" else key: value for key, value in YARN.items()}
# Card -> changes of its configurations; the first is compared most.
CONFIGS: dict[str, tuple[dict[str, Any], ...]] = {
    "qwen2": ({"num_key_value_heads": 2}, {"num_key_value_heads": 4, "tie_word_embeddings": True}),
    "mistral": (
        {"num_key_value_heads": 2, "sliding_window": 5},
        {"num_key_value_heads": 1, "head_dim": 6, "sliding_window": None},
    ),
    "qwen3-moe": (
        {
            "num_key_value_heads": 2,
            "head_dim": 6,
            "num_experts": 5,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 7,
            "norm_topk_prob": True,
            "experts_implementation": "eager",
        },
        {
            "num_key_value_heads": 1,
            "head_dim": 4,
            "num_experts": 4,
            "num_experts_per_tok": 3,
            "moe_intermediate_size": 7,
            "norm_topk_prob": True,
            "experts_implementation": "eager",
        },
    ),
    "gpt-oss": (
        {
            "num_key_value_heads": 2,
            "head_dim": 6,
            "num_local_experts": 5,
            "num_experts_per_tok": 2,
            "sliding_window": 5,
            "swiglu_limit": 0.7,
            "rope_parameters": {**YARN, "truncate": False},
            "experts_implementation": "eager",
        },
        {
            "num_key_value_heads": 1,
            "head_dim": 4,
            "num_local_experts": 4,
            "num_experts_per_tok": 3,
            "rope_parameters": {"rope_type": "default", "rope_theta": 150000.0},
            "experts_implementation": "eager",
        },
    ),
    "deepseek-v3": (
        {
            "num_key_value_heads": 4,
            "q_lora_rank": 6,
            "kv_lora_rank": 8,
            "qk_nope_head_dim": 4,
            "qk_rope_head_dim": 6,
            "v_head_dim": 5,
            "moe_intermediate_size": 7,
            "n_routed_experts": 12,
            "n_group": 4,
            "topk_group": 2,
            "num_experts_per_tok": 3,
            "n_shared_experts": 2,
            "first_k_dense_replace": 1,
            "rope_parameters": {**YARN, "mscale": 0.8, "mscale_all_dim": 1.3},
            "experts_implementation": "eager",
        },
        {
            "num_key_value_heads": 4,
            "q_lora_rank": None,
            "kv_lora_rank": 8,
            "qk_nope_head_dim": 4,
            "qk_rope_head_dim": 2,
            "v_head_dim": 4,
            "moe_intermediate_size": 7,
            "n_routed_experts": 4,
            "n_group": 1,
            "topk_group": 1,
            "num_experts_per_tok": 2,
            "first_k_dense_replace": 0,
            "rope_parameters": YARN,
            "experts_implementation": "eager",
        },
    ),
    "mamba2": (
        {
            **dict.fromkeys(("num_attention_heads", "intermediate_size", "max_position_embeddings"), ...),
            "num_heads": 4,
            "head_dim": 8,
            "state_size": 6,
            "n_groups": 2,
            "chunk_size": 4,
        },
        {
            **dict.fromkeys(("num_attention_heads", "intermediate_size", "max_position_embeddings"), ...),
            "num_heads": 6,
            "head_dim": 8,
            "expand": 3,
            "state_size": 3,
            "n_groups": 1,
            "conv_kernel": 2,
            "tie_word_embeddings": True,
        },
    ),
    "gpt-neo": (
        {
            "intermediate_size": None,
            "num_hidden_layers": ...,
            "num_attention_heads": ...,
            "num_layers": 3,
            "num_heads": 4,
            "window_size": 5,
            "attention_types": [[["global", "local"], 1], [["global"], 1]],
        },
        {
            "intermediate_size": None,
            "num_hidden_layers": ...,
            "num_attention_heads": ...,
            "num_layers": 2,
            "num_heads": 2,
            "attention_types": [[["global", "local"], 1]],
        },
    ),
    "olmo2": ({"num_key_value_heads": 2}, {}),
    "gpt-neox": (
        {"rope_parameters": {"rope_type": "default", "rope_theta": 100.0, "partial_rotary_factor": 0.5}},
        {"use_parallel_residual": False, "hidden_act": "gelu_fast"},
    ),
    "opt": (
        {"ffn_dim": 20, "word_embed_proj_dim": 16},
        {"ffn_dim": 20, "word_embed_proj_dim": 8, "do_layer_norm_before": False},
    ),
    "phi3": ({"num_key_value_heads": 2, **LONGROPE}, {"num_key_value_heads": 4, "sliding_window": 5}),
}
CASES = [pytest.param(name, changes, id=f"{name}-{i}") for name, all_ in CONFIGS.items() for i, changes in enumerate(all_)]


def theirs(name: str, changes: dict[str, Any]) -> nn.Module:
    """Return the network of transformers with random weights."""
    kind = next(row.value for key, row in cards()[name].configs["huggingface"].items() if key == "model_type")
    torch.manual_seed(0)
    config = transformers.AutoConfig.for_model(kind, **{key: x for key, x in {**SHAPE, **changes}.items() if x is not ...})
    made = settled(transformers.AutoModelForCausalLM.from_config(config))
    for key, buffer in made.named_buffers():
        if key.endswith("e_score_correction_bias"):
            buffer.normal_(0, 0.2)
    return made


@torch.no_grad()
@pytest.mark.parametrize(("name", "changes"), CASES)
def test_folders_round_trip(name, changes, tmp_path):
    """Recognized by config.json; saved so that transformers reads the same network."""
    peer = theirs(name, changes)
    peer.save_pretrained(tmp_path / "theirs")
    ours, tokens = fieldguide.load(tmp_path / "theirs"), torch.randint(30, (2, 11))
    assert type(ours) is cards()[name].model
    torch.testing.assert_close(ours(tokens), peer(tokens).logits, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(ours.last(tokens), ours(tokens)[:, -1])
    fieldguide.save(ours, tmp_path / "ours", "hf")
    more = {"pad_token_id": 0} if name == "phi3" else {}  # its own is beyond so small a vocabulary
    more |= {key: value for key, value in changes.items() if key == "experts_implementation"}
    back, said = type(peer).from_pretrained(tmp_path / "ours", output_loading_info=True, **more)
    assert not said["missing_keys"] and not said["unexpected_keys"] and not said["mismatched_keys"]
    assert torch.equal(back.eval()(tokens).logits, peer(tokens).logits)


@torch.no_grad()
@pytest.mark.parametrize(("name", "changes"), CASES)
def test_generation_with_a_cache_equals_transformers(name, changes, tmp_path):
    peer = theirs(name, changes)
    for p in peer.parameters():
        p.mul_(1.5)
    peer.save_pretrained(tmp_path)
    ours, said = fieldguide.load(tmp_path), set()
    for prompt in torch.randint(30, (4, 1, 7), generator=torch.Generator().manual_seed(3)):
        want = peer.generate(prompt, max_new_tokens=14, do_sample=False, use_cache=name != "phi3")[0, 7:].tolist()
        steps = generate(ours, [prompt[0].tolist()], 14, sampling=Sampling(temperature=0.0), eos_token_ids=(), seed=0)
        assert [int(step) for step in steps] == want
        said |= set(want)
    assert len(said) > 3


@torch.no_grad()
@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("pieces", [(16,), (5, 1, 1, 9), (1,) * 16, (9, 4, 3)], ids=str)
def test_cache_equals_the_whole_row(name, pieces):
    """Token by token and in pieces, with padding on the left."""
    model = tiny(name, length=16)
    tokens = torch.randint(30, (3, 16), generator=torch.Generator().manual_seed(0))
    mask = torch.arange(16) >= torch.tensor([[0], [4], [9]])
    cache = model.new_cache(3)
    parts = [model(a, b, cache) for a, b in zip(tokens.split(pieces, 1), mask.split(pieces, 1))]
    got = torch.cat(parts, 1)
    for row in range(3):
        if name == "phi3" and pieces != (16,):  # the logits of earlier pieces belong to the row as it was then
            last = pieces[-1]
            alone = model(tokens[row : row + 1, mask[row]])[0]
            keep = min(last, len(alone))
            torch.testing.assert_close(got[row, -keep:], alone[-keep:], rtol=1e-9, atol=1e-10)
            continue
        torch.testing.assert_close(got[row, mask[row]], model(tokens[row : row + 1, mask[row]])[0], rtol=1e-9, atol=1e-10)


@torch.no_grad()
@pytest.mark.parametrize("name", CONFIGS)
def test_beams_carry_their_cache(name):
    """Rows that are repeated and reordered, as in beam search, go on as if each had been read alone."""
    model = tiny(name, length=16)
    prompt, first, second = (
        torch.randint(30, shape, generator=torch.Generator().manual_seed(2)) for shape in ((2, 5), (6, 1), (6, 1))
    )
    order, cache = torch.tensor([2, 0, 0, 5, 3, 4]), model.new_cache(2)
    model.last(prompt, None, cache)
    cache.widen(3)
    model.last(first, None, cache)
    cache.select(order)
    rows = torch.cat([prompt.repeat_interleave(3, 0)[order], first[order], second], 1)
    torch.testing.assert_close(model.last(second, None, cache), model(rows)[:, -1], rtol=1e-9, atol=1e-10)


# ---------------------------------------------------------------------------------------------- traps


@torch.no_grad()
def test_mistral_reads_only_its_window():
    model = tiny("mistral", depth=1, window=4)
    tokens = torch.randint(30, (1, 12))
    changed = tokens.clone()
    changed[0, 5] = (changed[0, 5] + 1) % 30
    same = (model(tokens) == model(changed)).all(-1)[0]
    assert same.tolist() == [True] * 5 + [False] * 4 + [True] * 3
    assert not torch.equal(tiny("mistral", window=0)(tokens)[0, -1], tiny("mistral", window=4)(tokens)[0, -1])


@torch.no_grad()
def test_phi3_factors_follow_the_length_of_each_row(tmp_path):
    """Rows of a batch that are shorter than the first training keep their factors; transformers takes those of the longest."""
    peer = theirs("phi3", CONFIGS["phi3"][0])
    peer.save_pretrained(tmp_path)
    ours = fieldguide.load(tmp_path)
    tokens = torch.randint(30, (2, 20))
    for steps in (11, 12, 13, 20):
        torch.testing.assert_close(ours(tokens[:, :steps]), peer(tokens[:, :steps]).logits, rtol=1e-4, atol=1e-4)
    mask = torch.arange(20) < torch.tensor([[20], [12]])
    got = ours(tokens, mask)
    torch.testing.assert_close(got[0], peer(tokens[:1]).logits[0], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(got[1, :12], peer(tokens[1:, :12]).logits[0], rtol=1e-4, atol=1e-4)
    with pytest.raises(SettingsError, match="must hold 2 factors each"):
        create("phi3-test", rope_short=(1.0,))


def edit(folder, **changes) -> None:
    config = json.loads((folder / "config.json").read_text())
    for key, value in changes.items():
        config.pop(key, None)
        if value is not ...:
            config[key] = value
    (folder / "config.json").write_text(json.dumps(config))


@torch.no_grad()
@pytest.mark.parametrize(
    ("name", "changes", "old"),
    [
        (
            "qwen2",
            {"rope_parameters": {"rope_type": "default", "rope_theta": 1e6}, "num_key_value_heads": 2},
            {"rope_theta": 1e6, "sliding_window": 40, "max_window_layers": 2},
        ),
        ("gpt-neox", CONFIGS["gpt-neox"][0], {"rotary_emb_base": 100, "rotary_pct": 0.5, "use_parallel_residual": ...}),
        (
            "phi3",
            CONFIGS["phi3"][0],
            {
                "rope_theta": 50.0,
                "partial_rotary_factor": 0.5,
                "rope_scaling": {"type": "su", "short_factor": [1.0], "long_factor": [3.0]},
            },
        ),
        ("opt", CONFIGS["opt"][0], {"layer_norm_elementwise_affine": ..., "enable_bias": ...}),
        ("mistral", CONFIGS["mistral"][0], {"rope_theta": 10000.0, "head_dim": ...}),
        (
            "deepseek-v3",
            CONFIGS["deepseek-v3"][0],
            {"rope_theta": 100.0, "rope_scaling": {**OLD_YARN, "mscale": 0.8, "mscale_all_dim": 1.3}},
        ),
        (
            "gpt-oss",
            CONFIGS["gpt-oss"][0],
            {"rope_theta": 100.0, "rope_scaling": {**YARN, "truncate": False}, "swiglu_alpha": ..., "experts_per_token": 2},
        ),
    ],
    ids=str,
)
def test_configurations_as_published(name, changes, old, tmp_path):
    """Files of before 2025 hold the rotary settings under other keys."""
    peer = theirs(name, changes)
    peer.save_pretrained(tmp_path)
    edit(tmp_path, rope_parameters=..., **old)
    tokens = torch.randint(30, (2, 17))
    torch.testing.assert_close(fieldguide.load(tmp_path)(tokens), peer(tokens).logits, rtol=1e-4, atol=1e-4)


LONG = {"factor": 2.0, "short_factor": [1.0, 1.0], "long_factor": [2.0, 2.0], "original_max_position_embeddings": 8}
SCALINGS = {
    "yarn": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 5},
    "yarn of a table": {
        **{"rope_type": "yarn", "factor": 3.0, "original_max_position_embeddings": 5, "beta_fast": 2.0, "beta_slow": 0.5},
        **{"attention_factor": 1.3, "truncate": False},
    },
    "yarn with mscale": {
        **{"rope_type": "yarn", "factor": 3.0, "original_max_position_embeddings": 5},
        **{"mscale": 0.7, "mscale_all_dim": 1.4},
    },
    "linear": {"rope_type": "linear", "factor": 3.0},
    "dynamic": {"rope_type": "dynamic", "factor": 3.0},
}


@torch.no_grad()
@pytest.mark.parametrize("kind", SCALINGS)
@pytest.mark.parametrize("name", ["llama", "qwen2", "qwen3", "mistral", "mixtral", "olmo2", "qwen3-moe"])
def test_scaled_rotary_positions(name, kind, tmp_path):
    """Frequencies, attention factor and outputs; also from the keys of files of before 2025, and after a round trip."""
    scaling = {"rope_theta": 50.0, **SCALINGS[kind]}
    usual = CONFIGS.get(name, ({"num_key_value_heads": 2, "head_dim": 4},))[0]
    usual = {"head_dim": 4, **usual} if name == "mixtral" else usual  # transformers cannot infer it with a scaling
    peer = theirs(name, {**usual, "rope_parameters": scaling, "max_position_embeddings": 20})
    peer.save_pretrained(tmp_path / "new")
    ours, tokens = fieldguide.load(tmp_path / "new"), torch.randint(30, (2, 17))
    speed = ours.inverse_frequencies(torch.device("cpu"))
    rotary = peer.model.rotary_emb
    torch.testing.assert_close(speed, rotary.inv_freq, rtol=1e-6, atol=0)
    assert rope_kinds.get_attention_factor(ours.config.rope_scaling) == pytest.approx(rotary.attention_scaling)
    torch.testing.assert_close(ours(tokens), peer(tokens).logits, rtol=1e-4, atol=1e-4)
    plain = fieldguide.create(f"{name}-test", **{**asdict(ours.config), "rope_scaling": ()})
    plain.load_state_dict(ours.state_dict())
    assert torch.allclose(plain.eval()(tokens), ours(tokens), rtol=1e-4, atol=1e-4) == (kind == "dynamic")
    old = {key.replace("rope_type", "type"): value for key, value in SCALINGS[kind].items()}
    peer.save_pretrained(tmp_path / "old")
    edit(tmp_path / "old", rope_parameters=..., rope_theta=50.0, rope_scaling=old)
    torch.testing.assert_close(fieldguide.load(tmp_path / "old")(tokens), ours(tokens), rtol=0, atol=0)
    fieldguide.save(ours, tmp_path / "again", format="huggingface")
    config = transformers.AutoConfig.from_pretrained(tmp_path / "again")
    config.head_dim = getattr(config, "head_dim", None) or 2 * len(speed)
    again = type(rotary)(config)
    torch.testing.assert_close(again.inv_freq, rotary.inv_freq, rtol=1e-6, atol=0)
    assert again.attention_scaling == pytest.approx(rotary.attention_scaling)
    if kind == "dynamic":
        with pytest.raises(SettingsError, match="Longer sequences are not supported with dynamic scaling"):
            fieldguide.load(tmp_path / "new", length=40)


@pytest.mark.parametrize(
    ("name", "changes", "said"),
    [
        ("qwen2", {"use_sliding_window": True}, "use_sliding_window=True"),
        ("qwen2", {"rope_parameters": {"rope_type": "longrope", **LONG}}, "rope_type='longrope'"),
        ("gpt-neox", {"attention_bias": False}, "attention_bias=False"),
        ("gpt-neox", {"rope_parameters": {"rope_type": "linear", "factor": 2.0}}, "rope_type='linear'"),
        ("opt", {"activation_function": "gelu"}, "activation_function='gelu'"),
        ("opt", {"_remove_final_layer_norm": True}, "_remove_final_layer_norm=True"),
        ("phi3", {"rope_parameters": {"rope_type": "yarn", "factor": 2.0}}, "rope_type='yarn'"),
        ("qwen3-moe", {"norm_topk_prob": False}, "norm_topk_prob=False"),
        ("qwen3-moe", {"norm_topk_prob": ...}, "norm_topk_prob=False"),
        ("qwen3-moe", {"mlp_only_layers": [1]}, r"mlp_only_layers=\[1\]"),
        ("olmo2", {"attention_bias": True}, "attention_bias=True"),
        ("mistral", {"hidden_act": "gelu"}, "hidden_act='gelu'"),
        ("gpt-oss", {"layer_types": ["full_attention"] * 3}, "must alternate"),
        ("gpt-oss", {"rope_parameters": {"rope_type": "llama3", "factor": 2.0}}, "rope_type='llama3'"),
        ("gpt-neo", {"attention_types": [[["global"], 3]]}, "must alternate"),
        ("gpt-neo", {"intermediate_size": 20}, "intermediate_size=20"),
        ("mamba2", {"time_step_limit": [0.0, 0.1]}, "time steps must be unlimited"),
        ("mamba2", {"use_bias": True}, "use_bias=True"),
        ("deepseek-v3", {"scoring_func": "softmax"}, "scoring_func='softmax'"),
        ("deepseek-v3", {"rope_interleave": False}, "rope_interleave=False"),
    ],
)
def test_unsupported_configurations_are_rejected(name, changes, said, tmp_path):
    theirs(name, CONFIGS[name][0]).save_pretrained(tmp_path)
    edit(tmp_path, **changes)
    with pytest.raises(WeightsError, match=said):
        fieldguide.load(tmp_path)


def recur(x, decay, write, read, state):
    """Return what `scan` does, token by token."""
    found = []
    for t in range(x.shape[3]):
        state = decay[..., t, None, None].exp() * state + write[..., t, :, None] * x[..., t, None, :]
        found.append((read[..., t, :, None] * state).sum(-2))
    return torch.stack(found, 3), state


@pytest.mark.parametrize("chunk", [1, 3, 4, 11, 50])
def test_scan_equals_the_recurrence(chunk):
    """Outputs, last states and gradients, from a state and for chunks that do not divide the length."""
    torch.manual_seed(0)
    shapes = (2, 2, 3, 11, 5), (2, 2, 3, 11), (2, 2, 1, 11, 4), (2, 2, 1, 11, 4), (2, 2, 3, 4, 5)
    inputs = [torch.randn(shape, dtype=torch.float64, requires_grad=True) for shape in shapes]
    inputs[1] = inputs[1].detach().abs().mul(-1).requires_grad_()
    x, decay, write, read, state = inputs
    found, want = scan(x, decay, write, read, chunk, state), recur(*inputs)
    torch.testing.assert_close(found, want, rtol=1e-10, atol=1e-12)
    weights = [torch.randn_like(part) for part in want]
    ours, theirs_ = (
        torch.autograd.grad(sum((part * w).sum() for part, w in zip(parts, weights)), inputs) for parts in (found, want)
    )
    torch.testing.assert_close(ours, theirs_, rtol=1e-9, atol=1e-11)


def test_decays_over_long_chunks_stay_precise():
    """In float32, two neighbors late in a chunk of strong decays: one cumulative sum would lose digits."""
    decay = torch.full((1, 1, 1, 256), -12.3)
    sums = sum_segments(decay)[0, 0, 0]
    assert sums[255, 254].item() == pytest.approx(-12.3, rel=1e-6) and sums[7, 7] == 0 and sums[3, 5] == -torch.inf


@torch.no_grad()
@pytest.mark.parametrize("is_tied", [True, False])
def test_files_of_the_authors_of_mamba2(is_tied, tmp_path):
    """As state-spaces/mamba2-130m: other keys and names, a pickle with the tied head, a vocabulary that is padded."""
    changes = {**CONFIGS["mamba2"][0], "num_heads": 1, "head_dim": 64, "hidden_size": 32, "n_groups": 1, "state_size": 128}
    peer = theirs("mamba2", {**changes, "vocab_size": 32, "tie_word_embeddings": is_tied})
    state = {key.replace("embeddings", "embedding"): x for key, x in peer.state_dict().items()}
    torch.save(state, tmp_path / "pytorch_model.bin")
    said = {
        "d_model": 32,
        "d_intermediate": 0,
        "n_layer": 3,
        "vocab_size": 27,
        "ssm_cfg": {"layer": "Mamba2"},
        "attn_layer_idx": [],
        "attn_cfg": {},
        "rms_norm": True,
        "residual_in_fp32": True,
        "fused_add_norm": True,
        "pad_vocab_size_multiple": 16,
        "tie_embeddings": is_tied,
    }
    (tmp_path / "config.json").write_text(json.dumps(said))
    ours, tokens = fieldguide.load(tmp_path), torch.randint(27, (2, 11))
    assert (ours.head.weight is ours.embed.weight) == is_tied
    torch.testing.assert_close(ours(tokens), peer(tokens).logits, rtol=1e-4, atol=1e-4)
    edit(tmp_path, attn_layer_idx=[1])
    with pytest.raises(WeightsError, match=r"attn_layer_idx=\[1\]"):
        fieldguide.load(tmp_path)


@torch.no_grad()
def test_opt_files_without_a_head(tmp_path):
    """As facebook/opt-350m: no prefix `model.`, no output head."""
    peer = theirs("opt", CONFIGS["opt"][1])
    peer.save_pretrained(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    state = {key.removeprefix("model."): x.clone() for key, x in peer.state_dict().items() if key != "lm_head.weight"}
    torch.save(state, tmp_path / "pytorch_model.bin")
    tokens = torch.randint(30, (2, 11))
    torch.testing.assert_close(fieldguide.load(tmp_path)(tokens), peer(tokens).logits, rtol=1e-4, atol=1e-4)


def test_norms_of_opt_350m_and_olmo2():
    """Post-norm without a last normalization; and normalization inside the residual connection."""
    assert not any(key.startswith("norm.") for key in tiny("opt", post_norm=True).state_dict())
    model = tiny("olmo2")
    with torch.no_grad():
        for block in model.blocks:
            block.norm1.weight.zero_()
            block.norm2.weight.zero_()
        tokens = torch.randint(30, (1, 5))
        torch.testing.assert_close(model(tokens), model.head(model.norm(model.embed(tokens))))
