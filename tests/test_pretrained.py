"""Pretrained networks: folders and files of other libraries are identified by name or shape, and saved bit-exact."""

from __future__ import annotations

import argparse
import dataclasses
import json
import warnings

import pytest
import torch
from torch import Tensor, nn

import fieldguide
from fieldguide.checkpoints import config_mapping, identify, weights
from fieldguide.core.errors import WeightsError, WeightsWarning
from fieldguide.models import initialization
from fieldguide.models.mapping.config_rules import Constant, ValueMap
from fieldguide.models.registry import cards, create
from tv import timm, torchvision, transformers


def settled(theirs: nn.Module) -> nn.Module:
    """Return weights that affect every output: norms other than 1, biases other than 0."""
    torch.manual_seed(1)
    for p in theirs.parameters():
        p.data.add_(0.1 * torch.randn_like(p))
    return theirs.eval()


def gpt2(**changes) -> nn.Module:
    shape = {"vocab_size": 40, "n_positions": 16, "n_embd": 12, "n_layer": 3, "n_head": 2, **changes}
    torch.manual_seed(0)
    return settled(transformers.GPT2LMHeadModel(transformers.GPT2Config(**shape, bos_token_id=0, eos_token_id=0)))


@torch.no_grad()
def test_transformers_folder_round_trip(tmp_path):
    theirs = gpt2()
    theirs.save_pretrained(tmp_path / "theirs")
    ours = fieldguide.load(tmp_path / "theirs")
    tokens = torch.randint(40, (2, 9))
    torch.testing.assert_close(ours(tokens), theirs(tokens).logits)
    assert not ours.training and (ours.config.depth, ours.config.vocab_size, ours.config.length) == (3, 40, 16)
    fieldguide.save(ours, tmp_path / "ours", "hf")
    back = transformers.GPT2LMHeadModel.from_pretrained(tmp_path / "ours").eval()
    assert torch.equal(back(tokens).logits, theirs(tokens).logits)


@torch.no_grad()
def test_gpt_round_trip(tmp_path):
    """Including its first files, which had no prefix and stored the causal mask."""
    torch.manual_seed(0)
    theirs = settled(
        transformers.OpenAIGPTLMHeadModel(
            transformers.OpenAIGPTConfig(vocab_size=40, n_positions=16, n_embd=12, n_layer=3, n_head=2)
        )
    )
    theirs.save_pretrained(tmp_path / "theirs")
    ours, tokens = fieldguide.load(tmp_path / "theirs"), torch.randint(40, (2, 9))
    torch.testing.assert_close(ours(tokens), theirs(tokens).logits)
    fieldguide.save(ours, tmp_path / "ours", "hf")
    back = transformers.OpenAIGPTLMHeadModel.from_pretrained(tmp_path / "ours").eval()
    assert torch.equal(back(tokens).logits, theirs(tokens).logits)
    (tmp_path / "old").mkdir()
    state = {k.removeprefix("transformer."): x for k, x in theirs.state_dict().items() if k != "lm_head.weight"}
    torch.save(state | {"h.0.attn.bias": torch.ones(1, 1, 16, 16)}, tmp_path / "old" / "pytorch_model.bin")
    (tmp_path / "theirs" / "config.json").rename(tmp_path / "old" / "config.json")
    assert torch.equal(fieldguide.load(tmp_path / "old")(tokens), ours(tokens))


def test_unsupported_configuration_is_named(tmp_path):
    gpt2(activation_function="relu", scale_attn_by_inverse_layer_idx=True).save_pretrained(tmp_path)
    with pytest.raises(WeightsError, match=r"(?s)activation_function='relu'.*scale_attn_by_inverse_layer_idx=True"):
        fieldguide.load(tmp_path)


@torch.no_grad()
def test_file_is_identified_by_names_and_shapes(tmp_path):
    x = torch.randn(2, 3, 64, 64)
    for theirs, size in (
        (torchvision.models.resnet18(num_classes=11), "resnet18"),
        (timm.create_model("resnet34", num_classes=4), "resnet34"),
    ):
        torch.save(settled(theirs).state_dict(), tmp_path / "weights.pth")
        _, found, *_ = identify.recognize(theirs.state_dict(), "a file")
        assert found == size
        torch.testing.assert_close(fieldguide.load(tmp_path / "weights.pth")(x), theirs(x), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("kind", "output_type"),
    [
        ("Model", "vector"),
        ("ForPreTraining", "words"),
        ("ForMaskedLM", "words"),
        ("ForSequenceClassification", "label"),
        ("ForTokenClassification", "labels"),
        ("ForQuestionAnswering", "span"),
    ],
)
@torch.no_grad()
def test_bert_files_are_identified_by_their_heads(kind, output_type, tmp_path):
    torch.manual_seed(0)
    more = {} if kind in ("Model", "ForPreTraining", "ForMaskedLM", "ForQuestionAnswering") else {"num_labels": 5}
    theirs = settled(
        getattr(transformers, "Bert" + kind)(
            transformers.BertConfig(
                vocab_size=70, hidden_size=128, num_hidden_layers=2, num_attention_heads=2, intermediate_size=512, **more
            )
        )
    )
    torch.save(theirs.state_dict(), tmp_path / "pytorch_model.bin")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", WeightsWarning)  # which names the tensors of other heads
        ours = fieldguide.load(tmp_path / "pytorch_model.bin")
    assert (ours.config.output_type, ours.config.vocab_size) == (output_type, 70)
    assert ours.config.num_classes == (5 if more else 2)
    tokens = torch.randint(70, (2, 9))
    out = theirs(tokens)
    if output_type == "vector":
        torch.testing.assert_close(ours.features(tokens), out.last_hidden_state, rtol=1e-4, atol=1e-5)
    elif output_type == "span":
        wanted = torch.stack([out.start_logits, out.end_logits], -1)
        torch.testing.assert_close(
            ours(tokens).reshape_as(wanted) if ours(tokens).shape == wanted.shape else ours(tokens).mT,
            wanted,
            rtol=1e-4,
            atol=1e-5,
        )
    else:
        torch.testing.assert_close(ours(tokens), out[0], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("name", "card", "more"),
    [
        ("deit_tiny_distilled_patch16_224", "deit", {"num_classes": 5}),
        ("vit_small_patch14_dinov2", "dinov2", {}),
        ("vit_small_patch14_reg4_dinov2", "dinov2", {}),
    ],
)
@torch.no_grad()
def test_timm_folders_by_name(name, card, more, tmp_path):
    side = 224 if card == "deit" else 56
    asked = {} if card == "deit" else {"img_size": side}
    torch.manual_seed(0)
    theirs = settled(timm.create_model(name, **asked, **({} if more else {"num_classes": 0}), **more))
    torch.save(theirs.state_dict(), tmp_path / "pytorch_model.bin")
    (tmp_path / "config.json").write_text(
        json.dumps({"architecture": name, "model_args": asked, **more, "pretrained_cfg": {"mean": [0.5] * 3, "std": [0.5] * 3}})
    )
    ours, x = fieldguide.load(tmp_path), torch.randn(1, 3, side, side)
    assert (type(ours).__name__.lower(), ours.config.image) == (card, side)
    torch.testing.assert_close(ours(x), theirs(x), rtol=1e-3, atol=1e-4)
    fieldguide.save(ours, tmp_path / "back.safetensors", "timm")
    back = weights.read(tmp_path / "back.safetensors")
    assert {k: tuple(v.shape) for k, v in back.items() if "pos_embed" not in k} == {
        k: tuple(v.shape) for k, v in theirs.state_dict().items() if "pos_embed" not in k
    }


def test_timm_names_match_their_sizes(tmp_path):
    """Shapes of timm's networks, on the meta device."""
    known = {name: meant for kind in ("deit", "dinov2") for name, meant in cards()[kind].aliases["timm"].items()}
    assert len(known) == 12 and set(known) <= set(timm.list_models())
    for name, meant in known.items():
        size = meant if isinstance(meant, str) else meant[0]
        with torch.device("meta"):
            theirs, ours = timm.create_model(name, num_classes=0), create(size, output_type="vector")
        heads = theirs.blocks[0].attn.num_heads
        assert (len(theirs.blocks), theirs.embed_dim, heads) == (ours.config.depth, ours.config.dim, ours.config.heads), name
        assert theirs.patch_embed.img_size == (ours.config.image,) * 2, name


@torch.no_grad()
def test_fairseq_file_with_arguments(tmp_path):
    """Arguments are stored in a Namespace, which is allowed; other classes are rejected."""
    ours = settled(create("roberta-test"))
    ours.segment.weight.zero_()
    weights.save(ours, tmp_path / "fs.safetensors", "fairseq")
    torch.save(
        {
            "args": argparse.Namespace(arch="roberta_base", nested=argparse.Namespace(x=[1, 2])),
            "model": weights.read(tmp_path / "fs.safetensors"),
        },
        tmp_path / "model.pt",
    )
    again = create("roberta-test")
    assert weights.load(again, tmp_path / "model.pt") == []
    assert all(torch.equal(a, b) for a, b in zip(again.state_dict().values(), ours.state_dict().values()))
    torch.save({"cfg": WeightsWarning("x"), "model": ours.state_dict()}, tmp_path / "bad.pt")
    with pytest.raises(WeightsError, match=r"(?s)holds a Python object of type fieldguide\.core\.errors.*safetensors"):
        weights.read(tmp_path / "bad.pt")


def test_unknown_tensors_suggest_the_closest_models(tmp_path):
    state = torchvision.models.resnet18().state_dict()
    state["layer1.0.gate.weight"] = torch.zeros(3)
    torch.save(state, tmp_path / "odd.pth")
    with pytest.raises(
        WeightsError, match=r"odd\.pth: the 123 tensors match no model of this library\. The closest are resnet"
    ):
        fieldguide.load(tmp_path / "odd.pth")
    with pytest.raises(WeightsError, match=r"does not exist.*hf:organization/name"):
        fieldguide.load(tmp_path / "none")
    (tmp_path / "config.json").write_text("[")
    with pytest.raises(WeightsError, match=r"config\.json is not valid JSON"):
        fieldguide.load(tmp_path / "odd.pth")


@pytest.mark.parametrize(
    "name, origin",
    [(c.name, o) for c in cards().values() for o, table in c.configs.items() if table.keys() & set(config_mapping.TYPE_KEYS)],
)
def test_configurations_round_trip(name, origin):
    """Written configurations are identified and read as the same config, including every field that sizes change."""
    card = cards()[name]
    for size in card.sizes:
        config = card.config(**card.sizes[size].overrides)
        if unsaid := [
            row
            for row in card.configs[origin].values()
            if (isinstance(row, Constant) and getattr(config, row.ours) != row.value)
            or (isinstance(row, ValueMap) and getattr(config, row.ours) not in row.values.values())
        ]:
            with pytest.raises(WeightsError, match=rf"{unsaid[0].ours}=.* cannot be exported to this format"):
                config_mapping.to_public_config(card, card.configs[origin], config)
            continue
        written = json.loads(json.dumps(config_mapping.to_public_config(card, card.configs[origin], config)))
        found, at, table = config_mapping.identify_config(written)
        assert (found.name, at) == (name, origin)
        read = card.config(**config_mapping.to_config_fields(found, table, written, "here"))
        # Sizes of data that a network does not depend on are in none of the files of some formats.
        sizes = {
            name: getattr(read, name) for name in ("image", "frames") if getattr(read, name, 0) != getattr(config, name, 0)
        }
        assert read == dataclasses.replace(config, **sizes)
        assert not sizes or config_mapping.to_public_config(card, card.configs[origin], read) == written


def test_export_requires_a_configuration_table(tmp_path):
    with pytest.raises(WeightsError, match="cannot be saved in the format 'huggingface'"):
        fieldguide.save(create("fnn-test"), tmp_path, "hf")


def test_size_can_be_given(tmp_path):
    ours = create("resnet18", num_classes=6)
    fieldguide.save(ours, tmp_path / "here.safetensors")
    again = fieldguide.load(tmp_path / "here.safetensors", name="resnet18")
    assert all(torch.equal(a, b) for a, b in zip(ours.state_dict().values(), again.state_dict().values()))


DECODERS = {
    "llama": {
        "num_key_value_heads": 2,
        "rope_parameters": {
            "rope_type": "llama3",
            "rope_theta": 5000.0,
            "factor": 4.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 8,
        },
    },
    "qwen3": {"num_key_value_heads": 2, "head_dim": 6, "tie_word_embeddings": True},
    "mixtral": {"num_key_value_heads": 1, "num_local_experts": 3},
    "gemma": {"num_key_value_heads": 2, "head_dim": 6},
    "gemma2": {
        "num_key_value_heads": 2,
        "head_dim": 6,
        "sliding_window": 4,
        "query_pre_attn_scalar": 7,
        "attn_logit_softcapping": 0.5,
        "final_logit_softcapping": 2.0,
        "attn_implementation": "eager",
    },
    "gemma3_text": {"num_key_value_heads": 1, "head_dim": 4, "sliding_window": 4, "query_pre_attn_scalar": 7},
}


@torch.no_grad()
@pytest.mark.parametrize("kind", DECODERS)
def test_transformers_decoders_round_trip(kind, tmp_path):
    """With padding on the left; saved bit-exact."""
    torch.manual_seed(0)
    theirs = settled(
        transformers.AutoModelForCausalLM.from_config(
            transformers.AutoConfig.for_model(
                kind,
                vocab_size=30,
                max_position_embeddings=32,
                hidden_size=16,
                num_hidden_layers=7,
                num_attention_heads=4,
                intermediate_size=20,
                pad_token_id=None,
                bos_token_id=None,
                eos_token_id=None,
                **DECODERS[kind],
            )
        )
    )
    theirs.save_pretrained(tmp_path / "theirs")
    ours, tokens = fieldguide.load(tmp_path / "theirs"), torch.randint(30, (2, 11))
    torch.testing.assert_close(ours(tokens), theirs(tokens).logits, rtol=1e-4, atol=1e-4)
    fieldguide.save(ours, tmp_path / "ours", "hf")
    how = {"attn_implementation": "eager"} if "attn_implementation" in DECODERS[kind] else {}  # another knows no caps
    back = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "ours", **how).eval()
    assert torch.equal(back(tokens).logits, theirs(tokens).logits)
    cache = ours.new_cache(2)
    mask = torch.arange(11) >= torch.tensor([[0], [4]])
    steps = [ours(tokens[:, i:j], mask[:, i:j], cache) for i, j in ((0, 6), (6, 7), (7, 11))]
    alone = ours(tokens[1:, 4:])
    torch.testing.assert_close(torch.cat(steps, 1)[0], ours(tokens)[0], rtol=1e-4, atol=1e-4)
    if kind not in ("gemma2", "gemma3_text"):  # whose windows count places, padded or not, as those there do
        torch.testing.assert_close(torch.cat(steps, 1)[1, 4:], alone[0], rtol=1e-4, atol=1e-4)


def interleaved(matrix: torch.Tensor, heads: int) -> torch.Tensor:
    """Return the rows of each head with adjacent rotary pairs, as in Meta's files."""
    width = len(matrix) // heads
    return torch.cat([matrix[h * width :][[i // 2 + i % 2 * width // 2 for i in range(width)]] for h in range(heads)])


@torch.no_grad()
@pytest.mark.parametrize("shards", [1, 2])
def test_meta_files(shards, tmp_path):
    """Queries and keys are reordered, shards are joined. params.json of Llama 2 lacks the vocabulary size and the length."""
    ours = create("llama-test", rope_scaling=(), eps=1e-5, length=4096)
    settled(ours)
    c, state = ours.config, ours.state_dict()
    files: list[dict] = [{} for _ in range(shards)]

    def put(name: str, tensor: torch.Tensor, axis: int | None) -> None:
        for file, part in zip(files, [tensor] * shards if axis is None else tensor.chunk(shards, axis)):
            file[name] = part.clone()

    put("tok_embeddings.weight", state["embed.weight"], 1)
    put("norm.weight", state["norm.weight"], None)
    put("output.weight", state["head.weight"], 0)
    put("rope.freqs", torch.zeros(2), None)
    for i in range(c.depth):
        k, v = state[f"blocks.{i}.attn.kv.weight"].chunk(2)
        gate, up = state[f"blocks.{i}.mlp.up.weight"].chunk(2)
        put(f"layers.{i}.attention.wq.weight", interleaved(state[f"blocks.{i}.attn.q.weight"], c.heads), 0)
        put(f"layers.{i}.attention.wk.weight", interleaved(k, c.kv_heads), 0)
        put(f"layers.{i}.attention.wv.weight", v, 0)
        put(f"layers.{i}.attention.wo.weight", state[f"blocks.{i}.attn.proj.weight"], 1)
        put(f"layers.{i}.feed_forward.w1.weight", gate, 0)
        put(f"layers.{i}.feed_forward.w3.weight", up, 0)
        put(f"layers.{i}.feed_forward.w2.weight", state[f"blocks.{i}.mlp.down.weight"], 1)
        put(f"layers.{i}.attention_norm.weight", state[f"blocks.{i}.norm1.weight"], None)
        put(f"layers.{i}.ffn_norm.weight", state[f"blocks.{i}.norm2.weight"], None)
    for number, file in enumerate(files):
        torch.save(file, tmp_path / f"consolidated.{number:02}.pth")
    (tmp_path / "params.json").write_text(
        json.dumps(
            {
                "dim": c.dim,
                "n_layers": c.depth,
                "n_heads": c.heads,
                "n_kv_heads": c.kv_heads,
                "vocab_size": -1,
                "norm_eps": c.eps,
                "multiple_of": 4,
                "ffn_dim_multiplier": 0.25,
            }
        )
    )
    again = fieldguide.load(tmp_path)
    assert again.config == c and all(torch.equal(a, b) for a, b in zip(again.state_dict().values(), state.values()))


# params.json as published: dim, layers, heads, of keys, multiple_of, ffn_dim_multiplier (0: neither is there), eps.
OLD = {
    "llama-7b": (4096, 32, 32, 0, 256, 0, 1e-6),
    "llama-13b": (5120, 40, 40, 0, 256, 0, 1e-6),
    "llama-30b": (6656, 60, 52, 0, 256, 0, 1e-6),
    "llama-65b": (8192, 80, 64, 0, 256, 0, 1e-5),
    "llama2-7b": (4096, 32, 32, 0, 256, 0, 1e-5),
    "llama2-13b": (5120, 40, 40, 0, 256, 0, 1e-5),
    "llama2-70b": (8192, 80, 64, 8, 4096, 1.3, 1e-5),
}
NEW = {"llama3-8b": (4096, 32, 32, 8, 1024, 1.3, 1e-5), "llama3-70b": (8192, 80, 64, 8, 4096, 1.3, 1e-5)}
SCALED = {
    "llama3.1-8b": NEW["llama3-8b"],
    "llama3.1-70b": NEW["llama3-70b"],
    "llama3.1-405b": (16_384, 126, 128, 8, 4096, 1.2, 1e-5),
    "llama3.2-1b": (2048, 16, 32, 8, 256, 1.5, 1e-5),
    "llama3.2-3b": (3072, 28, 24, 8, 256, 1.0, 1e-5),
}


def params(name: str) -> dict:
    dim, layers, heads, keys, multiple, wider, eps = (OLD | NEW | SCALED)[name]
    said = {
        "dim": dim,
        "multiple_of": multiple,
        "n_heads": heads,
        "n_layers": layers,
        "norm_eps": eps,
        "vocab_size": -1 if name in OLD else 128_256,
    }
    said |= ({"n_kv_heads": keys} if keys else {}) | ({"ffn_dim_multiplier": wider} if wider else {})
    return said | ({} if name in OLD else {"rope_theta": 500_000.0}) | ({"use_scaled_rope": True} if name in SCALED else {})


@pytest.mark.parametrize("name", OLD | NEW | SCALED)
def test_published_meta_params(name):
    """Length and rope_scaling are missing and come from the size that they describe."""
    said = params(name)
    card, origin, table = config_mapping.identify_config(said)
    values = config_mapping.to_config_fields(card, table, said, "params.json")
    wanted = dict(card.sizes[name].overrides)
    got, full = card.config(**values), card.config(**wanted)
    assert (card.name, origin) == ("llama", "meta")
    for field in ("dim", "depth", "heads", "kv_heads", "hidden", "rope_theta", "length", "rope_scaling", "vocab_size"):
        assert getattr(got, field) == getattr(full, field), field
    assert got.eps == said["norm_eps"]


@pytest.mark.parametrize(
    ("name", "length", "factor"),
    [("llama-7b", 2048, 0), ("llama2-13b", 4096, 0), ("llama3-8b", 8192, 0), ("llama3.2-1b", 131_072, 32)],
)
@torch.no_grad()
def test_small_meta_files_equal_their_generation(name, length, factor, tmp_path):
    """Fewer layers at the published width, compared with transformers and published values."""
    said = params(name) | {"dim": 32, "n_layers": 2, "n_heads": 4, "multiple_of": 8}
    said |= {"n_kv_heads": 2} if "n_kv_heads" in said else {}
    vocab = 40
    if said["vocab_size"] > 0:
        said["vocab_size"] = vocab
    hidden = 8 * -(-int(said.get("ffn_dim_multiplier", 1.0) * int(8 * 32 / 3)) // 8)
    groups, base = said.get("n_kv_heads", 4), said.get("rope_theta", 10_000.0)
    rope = (
        {
            "rope_type": "llama3",
            "rope_theta": base,
            "factor": factor,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 8192,
        }
        if factor
        else {"rope_type": "default", "rope_theta": base}
    )
    torch.manual_seed(0)
    theirs = settled(
        transformers.LlamaForCausalLM(
            transformers.LlamaConfig(
                vocab_size=vocab,
                hidden_size=32,
                intermediate_size=hidden,
                num_hidden_layers=2,
                num_attention_heads=4,
                num_key_value_heads=groups,
                max_position_embeddings=length,
                rms_norm_eps=said["norm_eps"],
                rope_parameters=rope,
            )
        )
    )
    state, files = theirs.state_dict(), {}
    for key, tensor in state.items():
        for theirs_name, meta in (
            ("model.embed_tokens", "tok_embeddings"),
            ("model.norm", "norm"),
            ("lm_head", "output"),
            ("model.layers", "layers"),
            ("self_attn", "attention"),
            ("input_layernorm", "attention_norm"),
            ("post_attention_layernorm", "ffn_norm"),
            ("mlp.gate_proj", "feed_forward.w1"),
            ("mlp.up_proj", "feed_forward.w3"),
            ("mlp.down_proj", "feed_forward.w2"),
            ("_proj", ""),
            ("attention.", "attention.w"),
        ):
            key = key.replace(theirs_name, meta)
        heads = 4 if key.endswith("wq.weight") else groups
        files[key] = interleaved(tensor, heads) if key.endswith(("wq.weight", "wk.weight")) else tensor.clone()
    torch.save(files, tmp_path / "consolidated.00.pth")
    (tmp_path / "params.json").write_text(json.dumps(said))
    ours, tokens = fieldguide.load(tmp_path), torch.randint(vocab, (1, 300))
    assert (ours.config.vocab_size, ours.config.length) == (vocab, length)
    torch.testing.assert_close(ours(tokens), theirs(tokens).logits, rtol=1e-4, atol=1e-4)


def test_llama_cpp_files(tmp_path):
    """8-bit quantized tensors, reordered rotary pairs, and rope_scaling that only a tensor contains."""
    gguf = pytest.importorskip("gguf")
    import numpy as np

    ours = settled(
        create("llama-test", dim=64, hidden=32, heads=2, kv_heads=1, rope_scaling=(4.0, 1.0, 4.0, 8192.0), tie_embeddings=True)
    )
    c, state = ours.config, ours.state_dict()
    writer = gguf.GGUFWriter(tmp_path / "tiny.gguf", "llama")
    for key, value in {
        "vocab_size": c.vocab_size,
        "context_length": c.length,
        "embedding_length": c.dim,
        "block_count": c.depth,
        "feed_forward_length": c.hidden,
        "head_count": c.heads,
        "head_count_kv": c.kv_heads,
        "layer_norm_rms_eps": c.eps,
        "rope_freq_base": c.rope_theta,
    }.items():
        getattr(writer, f"add_{key}")(value)
    names = weights.get_tables(ours)["gguf"]
    public = weights.translate({k: v for k, v in state.items() if k != "head.weight"}, names, reverse=True)
    q8 = gguf.GGMLQuantizationType.Q8_0
    for name, tensor in public.items():
        if name == "blk.0.attn_q.weight":
            assert torch.equal(tensor, interleaved(state["blocks.0.attn.q.weight"], c.heads))
        if tensor.ndim == 2:
            writer.add_tensor(name, gguf.quantize(tensor.numpy(), q8), raw_dtype=q8)
        else:
            writer.add_tensor(name, tensor.numpy())
    writer.add_tensor("rope_freqs.weight", np.array([1.0, 4.0], dtype=np.float32))
    for step in (writer.write_header_to_file, writer.write_kv_data_to_file, writer.write_tensors_to_file, writer.close):
        step()
    again = fieldguide.load(tmp_path / "tiny.gguf")
    assert again.config == c
    for name, tensor in again.state_dict().items():
        torch.testing.assert_close(tensor, state[name], rtol=0, atol=float(state[name].abs().max()) / 200)
    (tmp_path / "cut.gguf").write_bytes((tmp_path / "tiny.gguf").read_bytes()[:300])
    with pytest.raises(WeightsError, match=r"cut\.gguf is damaged"):
        fieldguide.load(tmp_path / "cut.gguf")


def test_initialization_is_skipped_before_loading():
    """Tensors are zeros, which are within the bounds of a truncated normal, so that no resampling occurs."""
    with initialization.SkipInitialization():
        for draw in (
            nn.init.normal_,
            nn.init.uniform_,
            nn.init.xavier_normal_,
            nn.init.xavier_uniform_,
            Tensor.normal_,
            nn.init.kaiming_normal_,
            nn.init.kaiming_uniform_,
            lambda x: nn.init.trunc_normal_(x, std=0.02),
        ):
            assert not draw(torch.full((3, 4), 7.0)).any()
        layers = nn.Linear(3, 4), nn.Conv2d(1, 2, 3), nn.Embedding(3, 2)
    assert not any(p.any() for layer in layers for p in layer.parameters())
