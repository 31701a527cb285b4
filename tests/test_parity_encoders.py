"""Text encoders: every head against transformers, with segments and without padding; files of all kinds; sizes."""

from __future__ import annotations

import copy
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import encoders
from cases import CASES
from encoders import configuration, encoder, network
from fieldguide.checkpoints import load, weights
from fieldguide.checkpoints.weights import get_tables, translate
from fieldguide.core.errors import DataError, SettingsError, WeightsError, WeightsWarning
from fieldguide.models.registry import cards, create, names
from fieldguide.models.transformer._shared.disentangled_attention import relative_shift
from fieldguide.models.transformer._shared.text_encoder import OUTPUT_TYPES
from fieldguide.models.transformer.deberta_v2 import log_buckets
from test_models import batch, tiny
from tv import transformers

EXACT = {"rtol": 1e-9, "atol": 1e-11}
NAMES = tuple(encoders.STEM)
EVERY = pytest.mark.parametrize("name", NAMES)
FEWER = ("distilbert", "albert")  # without one of the dropouts of BERT
SEGMENTED = ("bert", "electra", "albert")  # with a segment of each token
HEAD = pytest.mark.parametrize("output_type", OUTPUT_TYPES)


def close(model: nn.Module, peer: nn.Module, inputs: tuple, rename) -> None:
    """Compare outputs at real positions and the gradients of every parameter."""
    mask = inputs[1]
    results = []
    for net in (model, peer):
        net.zero_grad()
        torch.manual_seed(2)
        output = net(*inputs)
        if output.ndim == 3 and mask is not None:
            output = output * mask[..., None]
        (output * torch.randn(output.shape, dtype=output.dtype)).sum().backward()
        results.append((output.detach(), {k: p.grad for k, p in net.named_parameters()}))
    (ours, our_grads), (theirs, their_grads) = results
    torch.testing.assert_close(ours, theirs, **EXACT)
    renamed = rename(our_grads)
    assert renamed.keys() <= their_grads.keys()
    for key, grad in renamed.items():
        torch.testing.assert_close(grad, their_grads[key], **EXACT, msg=lambda text, key=key: f"{key}: {text}")


def copied(model: nn.Module) -> tuple[nn.Module, object]:
    peer, rename = encoder(model)
    peer = peer.double()
    peer.load_state_dict(rename(model.state_dict()), strict=True)
    return peer.eval(), rename


@EVERY
@HEAD
def test_every_head_equals_that_of_transformers(name, output_type):
    model = tiny(name, output_type=output_type)
    peer, rename = copied(model)
    close(model, peer, batch(name, 4), rename)
    tokens, _ = batch(name, 3)
    full = torch.where(tokens == getattr(model.config, "pad", -1), 2, tokens)
    torch.testing.assert_close(model(full), peer(full, torch.ones_like(full, dtype=torch.bool)), **EXACT)


@pytest.mark.parametrize("name", SEGMENTED)
def test_segments_equal_those_of_transformers(name):
    for output_type in ("words", "label"):
        model = tiny(name, output_type=output_type)
        peer, rename = copied(model)
        tokens, mask = batch(name, 4)
        segments = (torch.arange(9) >= torch.tensor([[2], [5], [1], [8]])).long()
        close(model, peer, (tokens, mask, segments), rename)
        assert not torch.allclose(model(tokens, mask, segments), model(tokens, mask))
    torch.testing.assert_close(model(tokens, mask, 0 * segments), model(tokens, mask), **EXACT)


@EVERY
def test_encoder_cards(name):
    card = cards()[name]
    assert card.output_types == card.model.output_types == (*OUTPUT_TYPES, *(("replaced",) if name == "electra" else ()))
    assert card.has_class_token and card.optional_inputs == (("segments",) if name in SEGMENTED else ())
    assert create(card.tiny).config.output_type == "words"
    with pytest.raises(SettingsError, match=r"does not support output_type='sequence'\. Choose one of words, label"):
        create(card.tiny, output_type="sequence")
    with pytest.raises(SettingsError, match="output_type='tokens' is not supported"):
        card.model(card.config(output_type="tokens"))
    assert set(names("*bert*", output_type="span")) >= {"bert-base"} and "bert-base" not in names(output_type="tokens")
    with pytest.raises(DataError, match="length=12"):
        create(card.tiny)(torch.zeros(1, 13, dtype=torch.int64))
    with pytest.raises(SettingsError, match="heads=3"):
        create(card.tiny, heads=3)


@EVERY
@HEAD
def test_batch_equals_single_rows(name, output_type):
    """For every head, other rows and padding change nothing; the content of the padding is not read."""
    model, (tokens, mask) = tiny(name, output_type=output_type), batch(name, 5)
    together = model(tokens, mask)
    other = model(torch.where(mask, tokens, (tokens + 1) % 30), mask)
    for row, (one, real) in enumerate(zip(tokens, mask)):
        alone = model(one[real][None])[0]
        want = together[row, : len(alone)] if together.ndim == 3 else together[row]
        torch.testing.assert_close(alone, want, **EXACT)
        torch.testing.assert_close(alone, other[row, : len(alone)] if together.ndim == 3 else other[row], **EXACT)
    empty = mask.clone()
    empty[0] = False
    assert model(tokens, empty).isfinite().all()


@EVERY
@HEAD
def test_gradient_reaches_every_parameter_of_every_head(name, output_type):
    model = tiny(name, output_type=output_type).train()
    tokens, mask = batch(name, 8)
    output = model(tokens, mask)
    (output * torch.randn_like(output)).sum().backward()
    dead = [key for key, p in model.named_parameters() if p.grad is None or not p.grad.any()]
    assert not dead


@EVERY
def test_dropout_only_in_training(name):
    model = tiny(name, output_type="label", dropout=0.3)
    tokens, mask = batch(name, 4)
    assert torch.equal(model(tokens, mask), model(tokens, mask))
    model.train()
    assert not torch.allclose(model(tokens, mask), model(tokens, mask))
    still = model.eval()(tokens, mask)
    torch.testing.assert_close(still, tiny(name, output_type="label")(tokens, mask), **EXACT)


@EVERY
def test_dropout_positions_equal_transformers(name, monkeypatch):
    """Counted where random numbers are drawn, in training and evaluation."""
    more = {"head_dropout": 0.5} if cards()[name].accepts("head_dropout") else {}
    model = tiny(name, torch.float32, output_type="label", dropout=0.5, **more)
    peer, drawn = network(name, model.config), []
    plain, fused = nn.Dropout.forward, F.scaled_dot_product_attention

    def attention(q, k, v, attn_mask=None, dropout_p=0.0, *args, **more):
        drawn.append(dropout_p)
        return fused(q, k, v, attn_mask, dropout_p, *args, **more)

    def dropout(self, x):
        drawn.append(self.p * self.training)
        return plain(self, x)

    monkeypatch.setattr(F, "scaled_dot_product_attention", attention)
    monkeypatch.setattr(nn.Dropout, "forward", dropout)
    counts = []
    for net in (model, peer):
        for training in (True, False):
            drawn.clear()
            net.train(training)(batch(name, 2)[0])
            assert set(drawn) <= {0.0, 0.5}
            counts.append(sum(p > 0 for p in drawn))
    assert counts[0] == counts[2] >= (2 if name in FEWER else 3) * model.config.depth + 2 and counts[1] == counts[3] == 0


@pytest.mark.parametrize("size", [size for name in NAMES for size in cards()[name].sizes])
def test_parameter_counts_equal_transformers(size):
    """With every head for the first size of an architecture; with its own head for the others."""
    card = next(card for card in cards().values() if size in card.sizes)
    for output_type in OUTPUT_TYPES if size == card.default else (create_on_meta(size).config.output_type,):
        ours = create_on_meta(size, output_type=output_type)
        with torch.device("meta"):
            theirs = network(card.name, ours.config)
        assert sum(p.numel() for p in ours.parameters()) == sum(p.numel() for p in theirs.parameters()), output_type


def create_on_meta(size: str, **overrides) -> nn.Module:
    with torch.device("meta"):
        return create(size, **overrides)


@pytest.mark.parametrize(
    ("size", "published"),
    [
        ("bert-base", 109_482_240),
        ("bert-large", 335_141_888),
        ("roberta-base", 124_645_632),
        ("roberta-large", 355_359_744),
        ("deberta-base", 138_601_728),
        ("deberta-v3-small", 141_304_320),
        ("deberta-v3-base", 183_831_552),
        ("deberta-v3-large", 434_012_160),
        ("deberta-v2-xlarge", 884_593_152),
        ("deberta-v2-xxlarge", 1_564_549_632),
        ("minilm-l6", 22_713_216),
        ("distilbert-base", 66_362_880),
        ("all-mpnet-base", 109_486_464),
        ("albert-base", 11_683_584),
        ("albert-xxlarge", 222_595_584),
    ],
)
def test_published_counts_of_the_bare_encoder(size, published):
    """Some have an additional pooling layer."""
    model = create_on_meta(size, output_type="vector")
    pooled = size.startswith(("bert", "roberta", "minilm", "all-mpnet", "albert"))
    pooler = model.config.dim * (model.config.dim + 1) if pooled else 0
    assert sum(p.numel() for p in model.parameters()) + pooler == published


def test_published_counts_with_both_heads_of_pre_training():
    for size, published in (("bert-base", 110_106_428), ("bert-large", 336_226_108)):
        model = create_on_meta(size)
        dim = model.config.dim
        assert sum(p.numel() for p in model.parameters()) + dim * (dim + 1) + 2 * (dim + 1) == published


# ---------------------------------------------------------------------------------------------- files


def saved(name: str, kind: str, tmp_path, **other) -> tuple[nn.Module, object]:
    """Write a tiny network of transformers with random parameters to a folder."""
    torch.manual_seed(0)
    config = cards()[name].resolve_config(cards()[name].tiny, output_type="span" if kind == "ForQuestionAnswering" else "words")
    theirs = getattr(transformers, encoders.STEM[name] + kind)(configuration(name, config, **other))
    with torch.no_grad():
        for p in theirs.parameters():
            p.add_(torch.randn_like(p) * 0.2)
    theirs.save_pretrained(tmp_path)
    return theirs.eval(), tmp_path


KINDS = {
    "bert": (
        "Model",
        "ForMaskedLM",
        "ForPreTraining",
        "ForSequenceClassification",
        "ForTokenClassification",
        "ForQuestionAnswering",
    )
}
REST = ("Model", "ForMaskedLM", "ForSequenceClassification", "ForTokenClassification", "ForQuestionAnswering")


@pytest.mark.filterwarnings("ignore::fieldguide.core.errors.WeightsWarning")
@pytest.mark.parametrize(("name", "kind"), [(name, kind) for name in NAMES for kind in KINDS.get(name, REST)])
def test_every_file_loads_into_every_head(name, kind, tmp_path):
    """The encoder is always loaded; a head only if the file has it, else its parameters are returned as new."""
    theirs, path = saved(name, kind, tmp_path)
    base = getattr(theirs, theirs.base_model_prefix) if kind != "Model" else theirs
    tokens, mask = batch(name, 3)
    want = base(input_ids=tokens, attention_mask=mask.long()).last_hidden_state
    heads = {
        "words": ("ForMaskedLM", "ForPreTraining"),
        "label": ("ForSequenceClassification",),
        "labels": ("ForTokenClassification",),
        "span": ("ForQuestionAnswering",),
        "vector": (),
    }
    for output_type in OUTPUT_TYPES:
        model = create(f"{name}-test", output_type=output_type).eval()
        fresh = weights.load(model, path, head="skip")
        torch.testing.assert_close(model.features(tokens, mask) * mask[..., None], want * mask[..., None], rtol=2e-4, atol=2e-5)
        assert {part.partition(".")[0] for part in fresh} <= set(model.heads)
        if kind in heads[output_type]:
            assert fresh == []
            peer = encoders.Answers(theirs, output_type)
            if kind == "ForPreTraining":
                ours, other = model(tokens, mask), theirs(input_ids=tokens, attention_mask=mask.long()).prediction_logits
            else:
                ours, other = model(tokens, mask), peer(tokens, mask)
            ours, other = (x * mask[..., None] if x.ndim == 3 else x for x in (ours, other))
            torch.testing.assert_close(ours, other, rtol=2e-4, atol=2e-5)
        elif output_type == "vector":
            assert fresh == []
        elif kind == "Model":
            head = {key for key in model.state_dict() if key.partition(".")[0] in model.heads}
            assert set(fresh) == head - ({"pool.weight", "pool.bias"} if name in ("bert", "albert") else set())
            with pytest.raises(WeightsError, match=r'load\(\.\.\., head="skip"\)'):
                weights.load(model, path)


def test_tensors_of_other_heads_are_reported(tmp_path):
    _, path = saved("bert", "ForPreTraining", tmp_path)
    with pytest.warns(
        WeightsWarning,
        match=r"4 tensors of heads that this network does not have(.|\n)*not used: "
        r"bert\.pooler\.dense\.weight(.|\n)*cls\.seq_relationship\.weight",
    ):
        assert weights.load(create("bert-test"), path) == []
    model = create("bert-test", output_type="label")
    with pytest.warns(WeightsWarning, match=r"cls\.predictions\.transform\.dense\.weight"):
        assert weights.load(model, path, head="skip") == ["head.weight", "head.bias"]
    state = weights.read(path) | {"cls.strange.weight": torch.zeros(2)}
    with pytest.raises(WeightsError, match=r"unknown: cls\.strange\.weight"):
        weights.load(model, state, head="skip")
    del state["cls.strange.weight"], state["bert.encoder.layer.1.output.dense.bias"]
    with pytest.raises(WeightsError, match=r"missing: blocks\.1\.mlp\.down\.bias"):
        weights.load(model, state, head="skip")


def test_old_names_and_repeated_tensors(tmp_path):
    """Files converted from TensorFlow use gamma and beta; old .bin files also hold the tied decoder."""
    theirs, path = saved("bert", "ForMaskedLM", tmp_path)
    state = {key: tensor.clone() for key, tensor in weights.read(path).items()}
    old = {
        key.replace("LayerNorm.weight", "LayerNorm.gamma").replace("LayerNorm.bias", "LayerNorm.beta"): tensor
        for key, tensor in state.items()
    }
    assert old.keys() != state.keys()
    old["cls.predictions.decoder.weight"] = old["bert.embeddings.word_embeddings.weight"]
    old["cls.predictions.decoder.bias"] = old["cls.predictions.bias"]
    old["bert.embeddings.position_ids"] = torch.arange(12)[None]
    torch.save(old, tmp_path / "pytorch_model.bin")
    model = create("bert-test").eval()
    assert weights.load(model, tmp_path / "pytorch_model.bin") == []
    tokens, mask = batch("bert", 3)
    torch.testing.assert_close(
        model(tokens, mask) * mask[..., None],
        theirs(input_ids=tokens, attention_mask=mask.long()).logits * mask[..., None],
        rtol=2e-4,
        atol=2e-5,
    )
    old["cls.predictions.decoder.weight"] = old["cls.predictions.decoder.weight"] + 1
    with pytest.raises(WeightsError, match=r"both mean word\.weight, with different values"):
        weights.load(model, old)


@pytest.mark.parametrize("name", ["deberta", "deberta-v2"])
def test_author_head_names(name, tmp_path):
    """`lm_predictions.lm_head`, and in version 3 the discriminator."""
    theirs, path = saved(name, "ForMaskedLM", tmp_path, legacy=False)
    state = weights.read(path)
    assert "lm_predictions.lm_head.dense.weight" in state
    model = create(f"{name}-test").eval()
    assert weights.load(model, state) == []
    tokens, mask = batch(name, 3)
    torch.testing.assert_close(
        model(tokens, mask) * mask[..., None],
        theirs(input_ids=tokens, attention_mask=mask.long()).logits * mask[..., None],
        rtol=2e-4,
        atol=2e-5,
    )
    state |= {
        "mask_predictions.classifier.weight": torch.zeros(1, 8),
        "mask_predictions.dense.weight": torch.zeros(8, 8),
        "deberta.embeddings.position_embeddings.weight": torch.zeros(12, 8),
    }
    with pytest.warns(WeightsWarning, match="3 tensors"):
        weights.load(model, state)


@EVERY
@HEAD
def test_written_files_equal_transformers(name, output_type, tmp_path):
    """transformers reads them with every tensor in place."""
    model = tiny(name, torch.float32, output_type=output_type)
    weights.save(model, tmp_path / "model.safetensors", format="huggingface")
    configuration(name, model.config).save_pretrained(tmp_path)
    kind = getattr(transformers, encoders.STEM[name] + encoders.KIND[output_type])
    plain = {"add_pooling_layer": False} if output_type == "vector" and name in encoders.POOLED else {}
    theirs, said = kind.from_pretrained(tmp_path, output_loading_info=True, **plain)
    assert not said["missing_keys"] and not said["unexpected_keys"] and not said["mismatched_keys"]
    tokens, mask = batch(name, 3)
    peer = encoders.Answers(theirs.eval(), output_type)
    found, want = model(tokens, mask), peer(tokens, mask)
    if found.ndim == 3:
        found, want = found * mask[..., None], want * mask[..., None]
    torch.testing.assert_close(found, want, rtol=2e-4, atol=2e-5)
    other = create(f"{name}-test", output_type=output_type)
    assert weights.load(other, tmp_path / "model.safetensors") == []
    assert all(torch.equal(a, b) for a, b in zip(other.state_dict().values(), model.state_dict().values()))


@EVERY
@HEAD
def test_transformers_folders_round_trip(name, output_type, tmp_path):
    """Identified by their configuration, including the head; saved so that transformers reads the same network."""
    torch.manual_seed(0)
    config = cards()[name].resolve_config(cards()[name].tiny, output_type=output_type)
    theirs = network(name, config)
    theirs.save_pretrained(tmp_path / "theirs")
    ours = load.load(tmp_path / "theirs")
    assert type(ours) is cards()[name].model
    assert ours.config == (replace(config, num_classes=2) if output_type == "span" else config)
    load.save(ours, tmp_path / "ours", "huggingface")
    plain = {"add_pooling_layer": False} if output_type == "vector" and name in encoders.POOLED else {}
    plain |= {"pad_token_id": 0} if name == "modernbert" else {}  # its own is beyond so small a vocabulary
    back = type(theirs).from_pretrained(tmp_path / "ours", **plain)
    assert all(torch.equal(a, b) for a, b in zip(back.state_dict().values(), theirs.state_dict().values()))
    tokens, mask = batch(name, 3)
    found, want = (net(tokens, mask) for net in (ours, encoders.Answers(back.eval(), output_type)))
    keep = mask[..., None] if found.ndim == 3 else 1
    torch.testing.assert_close(found * keep, want * keep, rtol=2e-4, atol=2e-5)


def test_xlm_roberta_is_roberta(tmp_path):
    ours = create("roberta-test")
    config = transformers.XLMRobertaConfig(
        **{
            k: v
            for k, v in configuration("roberta", ours.config).to_dict().items()
            if k not in ("model_type", "architectures", "transformers_version")
        }
    )
    theirs = transformers.XLMRobertaForMaskedLM(config)
    theirs.save_pretrained(tmp_path)
    assert load.load(tmp_path).config == ours.config


def test_other_attention_terms_are_rejected(tmp_path):
    for name, changes, words in (
        ("deberta-v2", {"share_att_key": False}, "share_att_key=False"),
        ("deberta", {"pos_att_type": ["c2p"]}, "must contain c2p and p2c"),
        ("bert", {"hidden_act": "relu"}, "hidden_act='relu'"),
    ):
        config = cards()[name].resolve_config(cards()[name].tiny, output_type="label")
        network(name, config, **changes).save_pretrained(tmp_path / name)
        with pytest.raises(WeightsError, match=words):
            load.load(tmp_path / name)


class Fairseq(nn.Module):
    """The authors' network by its equations, with the names of their model.pt; `old` is the published form."""

    def __init__(self, c, old: bool):
        super().__init__()
        self.c, self.old = c, old
        self.inner = nn.Module()
        self.inner.embed_tokens = nn.Embedding(c.vocab_size, c.dim)
        self.inner.embed_positions = nn.Embedding(c.length + c.pad + 1, c.dim)
        setattr(self.inner, "emb_layer_norm" if old else "layernorm_embedding", nn.LayerNorm(c.dim))
        self.inner.layers = nn.ModuleList()
        for _ in range(c.depth):
            layer = nn.Module()
            layer.self_attn = nn.MultiheadAttention(c.dim, c.heads, batch_first=True)
            layer.self_attn_layer_norm, layer.final_layer_norm = nn.LayerNorm(c.dim), nn.LayerNorm(c.dim)
            layer.fc1, layer.fc2 = nn.Linear(c.dim, c.hidden), nn.Linear(c.hidden, c.dim)
            self.inner.layers.append(layer)
        self.head = nn.Module()
        self.head.dense, self.head.layer_norm = nn.Linear(c.dim, c.dim), nn.LayerNorm(c.dim)
        self.head.bias = nn.Parameter(torch.zeros(c.vocab_size))

    def forward(self, tokens: Tensor) -> Tensor:  # B T -> B T vocab
        real = tokens != self.c.pad
        places = (real.cumsum(1) * real).long() + self.c.pad
        norm = self.inner.emb_layer_norm if self.old else self.inner.layernorm_embedding
        x = norm(self.inner.embed_tokens(tokens) + self.inner.embed_positions(places))
        for layer in self.inner.layers:
            x = layer.self_attn_layer_norm(x + layer.self_attn(x, x, x, key_padding_mask=~real, need_weights=False)[0])
            x = layer.final_layer_norm(x + layer.fc2(F.gelu(layer.fc1(x))))
        x = self.head.layer_norm(F.gelu(self.head.dense(x)))
        return x @ self.inner.embed_tokens.weight.T + self.head.bias

    def file(self) -> dict[str, Tensor]:
        before = "decoder." if self.old else "encoder."
        state = {}
        for key, tensor in self.state_dict().items():
            key = key.replace("inner.", f"{before}sentence_encoder.").replace("head.", f"{before}lm_head.")
            if "in_proj_" in key and not self.old:
                stem, kind = key.split("in_proj_")
                state |= {f"{stem}{part}_proj.{kind}": x.clone() for part, x in zip("qkv", tensor.chunk(3))}
            else:
                state[key] = tensor
        state[f"{before}lm_head.weight"] = self.inner.embed_tokens.weight.detach()
        return state


@pytest.mark.parametrize("old", [True, False], ids=["published", "new"])
def test_fairseq_files(old, tmp_path):
    torch.manual_seed(0)
    model = create("roberta-test").eval()
    peer = Fairseq(model.config, old).eval()
    with torch.no_grad():
        for p in peer.parameters():
            p.add_(torch.randn_like(p) * 0.2)
    torch.save({"args": None, "model": peer.file()}, tmp_path / "model.pt")
    assert weights.load(model, tmp_path / "model.pt") == []
    tokens, mask = batch("roberta", 4)
    torch.testing.assert_close(model(tokens, mask) * mask[..., None], peer(tokens) * mask[..., None], rtol=2e-4, atol=2e-5)
    assert not model.segment.weight.any()
    label = create("roberta-test", output_type="label")
    more = {
        f"classification_heads.mnli.{part}.{kind}": torch.ones(shape)
        for part, sizes in (("dense", ((8, 8), (8,))), ("out_proj", ((3, 8), (3,))))
        for kind, shape in zip(("weight", "bias"), sizes)
    }
    with pytest.warns(WeightsWarning, match="lm_head"):
        assert weights.load(label, peer.file() | more) == []
    assert label.head.weight.eq(1).all()
    if old:  # and written as published
        back = weights.read(weights.save(model, tmp_path / "x.safetensors", format="fairseq"))
        want = peer.file()
        del want["decoder.lm_head.weight"]
        assert back.keys() == want.keys() and all(torch.equal(back[key], want[key]) for key in want)
        with torch.no_grad():
            model.segment.weight.fill_(1.0)
        with pytest.raises(WeightsError, match=r"segment\.weight is not zero"):
            weights.save(model, tmp_path / "x.safetensors", format="fairseq")


# ---------------------------------------------------------------------------------------------- traps


def test_electra_finds_replaced_tokens(tmp_path):
    """The discriminator's own head, against transformers, in a file and on its way back."""
    model = tiny("electra", output_type="replaced")
    peer, rename = copied(model)
    close(model, peer, batch("electra", 4), rename)
    theirs, path = saved("electra", "ForPreTraining", tmp_path)
    ours, (tokens, mask) = load.load(path), batch("electra", 3)
    assert ours.config.output_type == "replaced"
    want = theirs(input_ids=tokens, attention_mask=mask.long()).logits
    torch.testing.assert_close(ours(tokens, mask)[..., 0] * mask, want * mask, rtol=2e-4, atol=2e-5)
    load.save(ours, tmp_path / "ours", "huggingface")
    back = type(theirs).from_pretrained(tmp_path / "ours")
    assert all(torch.equal(a, b) for a, b in zip(back.state_dict().values(), theirs.state_dict().values()))


def test_electra_without_projection_and_albert_versions(tmp_path):
    for name, changes in (("electra", {"embed": 8}), ("albert", {"tanh_gelu": False})):
        model = tiny(name, **changes)
        peer, rename = copied(model)
        close(model, peer, batch(name, 4), rename)
    assert not hasattr(tiny("electra", embed=8).project, "weight")
    albert = tiny("albert", depth=5)
    assert sum(p.numel() for p in albert.parameters()) == sum(p.numel() for p in tiny("albert").parameters())
    network("albert", cards()["albert"].resolve_config("albert-test"), num_hidden_groups=2).save_pretrained(tmp_path)
    with pytest.raises(WeightsError, match="num_hidden_groups=2"):
        load.load(tmp_path)


@torch.no_grad()
@pytest.mark.parametrize("steps", [1, 2, 40])
def test_mpnet_biases_by_distance(steps):
    model = tiny("mpnet", length=300)
    peer, _ = copied(model)
    tokens = torch.randint(2, 30, (2, steps))
    torch.testing.assert_close(model(tokens), peer(tokens, torch.ones_like(tokens, dtype=torch.bool)), **EXACT)
    tokens = torch.randint(2, 30, (1, 300))  # beyond the last bucket
    torch.testing.assert_close(model(tokens), peer(tokens, torch.ones_like(tokens, dtype=torch.bool)), **EXACT)


def test_positions_of_roberta_begin_after_the_padding():
    model = tiny("roberta")
    tokens = torch.tensor([[5, 6, 7]])
    seen = []
    model.norm.register_forward_pre_hook(lambda _, x: seen.append(x[0]))
    model(tokens)
    model(torch.tensor([[1, 1, 5, 6, 7]]), torch.tensor([[False, False, True, True, True]]))
    want = model.word.weight[tokens] + model.pos.weight[2:5] + model.segment.weight
    torch.testing.assert_close(seen[0], want, **EXACT)
    torch.testing.assert_close(seen[1][:, 2:], want, **EXACT)
    assert model.pos.weight.shape[0] == model.config.length + 2
    longest = torch.full((1, 12), 5)
    assert model(longest).shape == (1, 12, 30) and model(longest, torch.ones(1, 12, dtype=torch.bool)).isfinite().all()


@pytest.mark.parametrize("steps", [1, 2, 3, 7])
def test_relative_shift_equals_indexing(steps):
    x = torch.randn(2, 3, steps, 2 * steps - 1)
    found = relative_shift(x)
    for i in range(steps):
        for j in range(steps):
            assert torch.equal(found[..., i, j], x[..., i, steps - 1 - (i - j)])


@pytest.mark.parametrize(("buckets", "far", "length"), [(256, 512, 2048), (4, 8, 12), (32, 100, 300)])
def test_buckets_equal_transformers(buckets, far, length):
    from transformers.models.deberta_v2.modeling_deberta_v2 import make_log_bucket_position

    distance = torch.arange(length)
    want = make_log_bucket_position(distance, buckets, far).long()
    assert log_buckets(length, buckets, far) == want.tolist()
    mirrored = make_log_bucket_position(-distance, buckets, far).long()
    assert (-mirrored).tolist() == want.tolist()


@torch.no_grad()
@pytest.mark.parametrize("name", ["deberta", "deberta-v2"])
@pytest.mark.parametrize("steps", [1, 2, 5, 12, 40])
def test_relative_distances_of_short_and_long_rows(name, steps):
    """Including rows in which most distances exceed the maximum."""
    model = tiny(name, length=40)
    peer, _ = copied(model)
    tokens = torch.randint(30, (2, steps))
    torch.testing.assert_close(model(tokens), peer(tokens, torch.ones_like(tokens, dtype=torch.bool)), **EXACT)


@torch.no_grad()
@pytest.mark.parametrize("steps", [1, 2, 3, 4, 5, 12, 40])
def test_modernbert_windows(steps):
    model = tiny("modernbert", length=40, window=6)
    peer, _ = copied(model)
    tokens = torch.randint(30, (2, steps))
    mask = torch.ones_like(tokens, dtype=torch.bool)
    torch.testing.assert_close(model(tokens), peer(tokens, mask), **EXACT)
    mask[0, steps // 2 + 1 :] = False
    torch.testing.assert_close(model(tokens, mask) * mask[..., None], peer(tokens, mask) * mask[..., None], **EXACT)


@torch.no_grad()
def test_modernbert_local_layers_have_limited_reach():
    model = tiny("modernbert", depth=1, window=4)
    tokens = torch.randint(30, (1, 12))
    changed = tokens.clone()
    changed[0, 11] = (changed[0, 11] + 1) % 30
    assert not torch.allclose(model(tokens)[0, 0], model(changed)[0, 0])  # the first layer sees all
    model.blocks[0].attn = copy.deepcopy(model.blocks[0].attn)
    near = tiny("modernbert", depth=3, every=3, window=4)
    near.blocks = near.blocks[1:]  # what is left: one that sees all, by its new number, and one not
    assert not torch.allclose(near(tokens)[0, 0], near(changed)[0, 0])
    seen = near.attention_masks(None, 12, tokens.device)[1]
    assert seen.sum().item() == 12 + 2 * (11 + 10) and near.attention_masks(None, 3, tokens.device)[1] is None


@torch.no_grad()
def test_embeddings_are_normalized_means():
    for name in NAMES:
        model = tiny(name, torch.float32, output_type="vector")
        tokens, mask = batch(name, 4)
        found = model(tokens, mask)
        torch.testing.assert_close(found.norm(dim=1), torch.ones(4))
        x = model.features(tokens, mask)
        for row in range(4):
            mean = x[row][mask[row]].mean(0)
            torch.testing.assert_close(found[row], mean / mean.norm())
        with torch.autocast("cpu", torch.bfloat16):
            assert model(tokens, mask).dtype == torch.float32


def test_every_encoder_is_tested():
    assert {name for name in CASES if cards()[name].has_class_token} == set(NAMES)
    for name in NAMES:
        for output_type in OUTPUT_TYPES:
            model = tiny(name, output_type=output_type)
            table, state = get_tables(model)["huggingface"], model.state_dict()
            assert translate(translate(state, table, reverse=True), table).keys() == state.keys()
