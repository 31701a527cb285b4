"""The encoder-decoders against transformers: round trips of files, T5 1.1, caches, beam search."""

from __future__ import annotations

import json

import pytest
import torch
from torch import nn

import fieldguide
from fieldguide.checkpoints import weights
from fieldguide.core.errors import DataError, SettingsError, WeightsError
from fieldguide.models.generation import Sampling, beam_search, generate
from fieldguide.models.generation.encoder_decoder import EncoderDecoderState
from fieldguide.models.registry import create
from fieldguide.models.transformer.nllb import SinusoidalPositions
from fieldguide.models.transformer.nllb_moe import Experts
from fieldguide.models.transformer.t5 import relative_position_bucket
from test_models import batch, gradients, tiny
from tv import transformers
from writers import network, writer

NAMES = ["t5", "t5gemma", "bart", "mbart", "marian", "pegasus", "nllb", "nllb-moe"]
EVERY = pytest.mark.parametrize("name", NAMES)
CACHED = pytest.mark.parametrize("name", [*NAMES, "transformer"])  # whose peer and files stand elsewhere
CLOSE = {"rtol": 1e-9, "atol": 1e-11}
NEW = {"gated": True, "tie_embeddings": False, "scaled": False}


def random(model: nn.Module) -> nn.Module:
    """Set every parameter and the bias of the logits to random values."""
    torch.manual_seed(1)
    with torch.no_grad():
        for p in (*model.parameters(), *(b for key, b in model.named_buffers() if key.endswith("bias"))):
            p.add_(0.2 * torch.randn_like(p))
    return model.eval()


def asked(peer: nn.Module, source, mask, tokens, real):
    """Return the logits of real tokens, of our network or of theirs."""
    if hasattr(peer, "embed"):
        return peer(source, mask, tokens, real) * real[..., None]
    return (
        peer(
            input_ids=source,
            attention_mask=mask.long(),
            decoder_input_ids=tokens,
            decoder_attention_mask=real.long(),
            use_cache=False,
        ).logits
        * real[..., None]
    )


# ---------------------------------------------------------------------------------------------- files


@torch.no_grad()
@EVERY
def test_transformers_folders_round_trip(name, tmp_path):
    theirs = random(network(create(f"{name}-test")))
    theirs.save_pretrained(tmp_path / "theirs")
    ours = fieldguide.load(tmp_path / "theirs")
    assert ours.config == create(f"{name}-test").config
    inputs = batch(name)
    torch.testing.assert_close(asked(ours, *inputs), asked(theirs, *inputs), rtol=2e-4, atol=2e-5)
    fieldguide.save(ours, tmp_path / "ours", "hf")
    back = type(theirs).from_pretrained(tmp_path / "ours", attn_implementation="eager").eval()
    assert torch.equal(asked(back, *inputs), asked(theirs, *inputs))
    there, here = (weights.read(tmp_path / folder) for folder in ("theirs", "ours"))
    assert there.keys() == here.keys() and all(torch.equal(there[key], here[key]) for key in there)


@torch.no_grad()
@pytest.mark.parametrize("name", ["bart", "mbart"])
def test_files_of_the_bare_stacks(name, tmp_path):
    """As facebook/bart-large: no head, no bias, no prefix; tied tensors under all of their names."""
    theirs = random(network(create(f"{name}-test")))
    theirs.final_logits_bias.zero_()
    state = {key: x.clone() for key, x in theirs.model.state_dict().items()}
    assert "encoder.embed_tokens.weight" in state and "shared.weight" in state
    torch.save(state | {"encoder.version": torch.ones(1)}, tmp_path / "pytorch_model.bin")
    (tmp_path / "config.json").write_text(json.dumps(theirs.config.to_dict() | {"architectures": ["BartModel"]}))
    inputs = batch(name)
    torch.testing.assert_close(asked(fieldguide.load(tmp_path), *inputs), asked(theirs, *inputs), rtol=2e-4, atol=2e-5)


def test_other_activations_are_rejected(tmp_path):
    theirs = network(create("bart-test"), activation_function="relu", scale_embedding=True)
    theirs.save_pretrained(tmp_path)
    with pytest.raises(WeightsError, match=r"(?s)activation_function='relu'.*scale_embedding=True"):
        fieldguide.load(tmp_path)


@torch.no_grad()
def test_marian_translates_as_in_transformers(tmp_path):
    """From its files alone: a pair of tokenizers, beams and a forbidden padding token."""
    from fieldguide.inference.text_generation import TextGenerator
    from test_text_pieces import marian

    golden = marian(tmp_path)
    pad, end = golden["vocab"]["<pad>"], golden["vocab"]["</s>"]
    theirs = random(network(create("marian-test", vocab_size=pad + 1, length=40, begin=pad, end=end, pad=pad)))
    theirs.final_logits_bias[0, pad] = 9.0
    theirs.generation_config = transformers.GenerationConfig(
        bad_words_ids=[[pad]], num_beams=3, max_length=12, forced_eos_token_id=end, eos_token_id=end, pad_token_id=pad,
        decoder_start_token_id=pad,
    )  # fmt: skip
    theirs.save_pretrained(tmp_path)
    ready = TextGenerator.load(tmp_path)
    for text, source, *_ in golden["encoded"][1:5]:
        want = theirs.generate(torch.tensor([[*source, end]]))[0]
        (found,) = ready.predict([text])
        assert found["text"] == ready.text.decode([i for i in want.tolist() if i not in (pad, end)]) != ""
    assert not ready.published.notes


# ---------------------------------------------------------------------------------------------- T5Gemma


@torch.no_grad()
def test_t5gemma_generates_as_transformers(tmp_path):
    """Greedy, from a folder, for sources of different lengths; longer than the windows, with encoder and decoder of other sizes."""
    theirs = random(network(create("t5gemma-test", length=40)))
    for p in theirs.parameters():
        p.mul_(1.5)
    theirs.save_pretrained(tmp_path)
    ours, said = fieldguide.load(tmp_path), set()
    for length in (3, 9, 14):
        source = torch.randint(3, 30, (1, length), generator=torch.Generator().manual_seed(length))
        want = theirs.generate(
            source, max_new_tokens=16, do_sample=False, bos_token_id=2, decoder_start_token_id=2, eos_token_id=29
        )
        want = want[0, 1:].tolist()
        state = EncoderDecoderState(ours, source, None)
        steps = generate(state, [[2]], 16, sampling=Sampling(temperature=0.0), eos_token_ids=(29,), seed=0)
        assert [int(step) for step in steps] == want
        said |= set(want)
    assert len(said) > 3


@torch.no_grad()
def test_t5gemma_windows():
    """A local encoder layer sees `window` tokens to each side, a local decoder layer `window` with its own; other layers see all."""
    local = tiny("t5gemma", depth=1, decoder_depth=1, window=2)
    source = torch.randint(30, (1, 9))
    changed = source.clone()
    changed[0, 4] = (changed[0, 4] + 1) % 30
    same = (local.encode(source) == local.encode(changed)).all(-1)[0]
    assert same.tolist() == [True] * 2 + [False] * 5 + [True] * 2
    target = torch.randint(30, (1, 9))
    other = torch.cat([target[:, :4], (target[:, 4:5] + 1) % 30, target[:, 5:]], 1)
    same = (local(source, None, target) == local(source, None, other)).all(-1)[0]
    assert same.tolist() == [True] * 4 + [False] * 2 + [True] * 3
    assert (
        not (tiny("t5gemma", depth=2, window=2).encode(source) == tiny("t5gemma", depth=2, window=2).encode(changed))
        .all(-1)
        .any()
    )


@torch.no_grad()
def test_t5gemma_end_tokens_as_published(tmp_path):
    """Instruction-tuned files list several end tokens, and hold the rotary base under its former key."""
    theirs = random(network(create("t5gemma-test")))
    theirs.save_pretrained(tmp_path)
    said = json.loads((tmp_path / "config.json").read_text())
    for side in ("encoder", "decoder"):
        said[side] |= {"eos_token_id": [1, 7], "rope_theta": said[side].pop("rope_parameters")["rope_theta"]}
    (tmp_path / "config.json").write_text(json.dumps(said))
    ours, inputs = fieldguide.load(tmp_path), batch("t5gemma")
    assert (ours.config.begin, ours.config.end, ours.config.pad) == (2, 1, 0)
    torch.testing.assert_close(asked(ours, *inputs), asked(theirs, *inputs), rtol=2e-4, atol=2e-5)
    said["decoder"]["layer_types"] = ["full_attention"] * 3
    (tmp_path / "config.json").write_text(json.dumps(said))
    with pytest.raises(WeightsError, match="must alternate"):
        fieldguide.load(tmp_path)


# ---------------------------------------------------------------------------------------------- T5


@pytest.mark.parametrize("changes", [NEW, {"gated": True}, {"scaled": False}], ids=["v1.1", "gated", "unscaled"])
def test_t5_versions(changes):
    """Outputs and gradients; transformers ties the head of version 1.1, which is untied here."""
    model = tiny("t5", **changes)
    peer, rename = writer(model)
    peer = peer.double().eval()
    peer.load_state_dict(rename({k: v.clone() for k, v in model.state_dict().items()}))
    ours, our_grads = gradients("t5", model, batch("t5"))
    theirs, their_grads = gradients("t5", peer, batch("t5"))
    torch.testing.assert_close(ours, theirs, **CLOSE)
    renamed = rename(our_grads)
    assert renamed.keys() == their_grads.keys() and ("peer.lm_head.weight" in renamed) == (not model.config.tie_embeddings)
    for key, grad in renamed.items():
        torch.testing.assert_close(grad, their_grads[key], rtol=1e-8, atol=1e-9)


@torch.no_grad()
def test_t5_version_1_1_files(tmp_path):
    """As published (separate head, tie_word_embeddings false), and as written by transformers 5: tied, but unscaled."""
    ours = random(create("t5-test", **NEW))
    fieldguide.save(ours, tmp_path / "published", "hf")
    said = json.loads((tmp_path / "published" / "config.json").read_text())
    assert said["tie_word_embeddings"] is False and said["feed_forward_proj"] == "gated-gelu"
    del said["scale_decoder_outputs"]  # older than this key
    (tmp_path / "published" / "config.json").write_text(json.dumps(said))
    inputs = batch("t5")
    again = fieldguide.load(tmp_path / "published")
    assert again.config == ours.config and torch.equal(again(*inputs), ours(*inputs))
    tied = network(random(create("t5-test", gated=True, scaled=False)))
    tied.save_pretrained(tmp_path / "tie_embeddings")
    assert json.loads((tmp_path / "tie_embeddings" / "config.json").read_text())["tie_word_embeddings"] is True
    again = fieldguide.load(tmp_path / "tie_embeddings")
    assert again.config.tie_embeddings and not again.config.scaled
    torch.testing.assert_close(asked(again, *inputs), asked(tied, *inputs), rtol=2e-4, atol=2e-5)


@torch.no_grad()
def test_old_t5_files_with_additional_tensors(tmp_path):
    theirs = random(network(create("t5-test")))
    state = {key: x.clone() for key, x in theirs.state_dict().items()}  # the embedding under four names
    state["decoder.block.0.layer.1.EncDecAttention.relative_attention_bias.weight"] = torch.ones(6, 2)
    torch.save(state, tmp_path / "pytorch_model.bin")
    said = theirs.config.to_dict()
    del said["num_decoder_layers"], said["relative_attention_max_distance"], said["scale_decoder_outputs"]
    (tmp_path / "config.json").write_text(json.dumps(said | {"num_layers": 2}))
    with pytest.raises(WeightsError, match=r"decoder\.block\.2"):
        fieldguide.load(tmp_path)  # without num_decoder_layers there are as many as in the encoder
    (tmp_path / "config.json").write_text(json.dumps(said | {"num_decoder_layers": 3, "relative_attention_max_distance": 5}))
    inputs = batch("t5")
    torch.testing.assert_close(asked(fieldguide.load(tmp_path), *inputs), asked(theirs, *inputs), rtol=2e-4, atol=2e-5)


@pytest.mark.parametrize("both", [True, False])
@pytest.mark.parametrize(("buckets", "far"), [(32, 128), (6, 5), (64, 1000)])
def test_buckets_equal_transformers(both, buckets, far):
    distance = torch.arange(-3000, 3000)
    bucket = transformers.models.t5.modeling_t5.T5Attention._relative_position_bucket
    assert torch.equal(relative_position_bucket(distance, both, buckets, far), bucket(distance, both, buckets, far))


@torch.no_grad()
@pytest.mark.parametrize(("steps", "keys", "both"), [(1, 1, True), (7, 7, True), (5, 9, False), (1, 9, False), (40, 40, True)])
def test_position_bias_by_distance(steps, keys, both):
    model = tiny("t5")
    c, table = model.config, model.encoder_bias
    found = model.bias(table, steps, keys, both)
    assert found.shape == (1, c.heads, steps, keys)
    for i in range(steps):
        for j in range(keys):
            place = torch.tensor(j - (i + keys - steps))
            assert torch.equal(found[0, :, i, j], table.weight[relative_position_bucket(place, both, c.buckets, c.far)])


@torch.no_grad()
def test_t5_rows_of_any_length():
    """Longer than `length`, beyond the last bucket; other networks reject such rows."""
    model = tiny("t5")
    peer, rename = writer(model)
    peer.double().load_state_dict(rename(model.state_dict()))
    source, tokens = torch.randint(30, (2, 40)), torch.randint(30, (2, 30))
    real = torch.ones_like
    torch.testing.assert_close(model(source, None, tokens), peer.eval()(source, real(source), tokens, real(tokens)), **CLOSE)
    for name in NAMES[1:]:
        with pytest.raises(DataError, match=r"13 tokens exceeds the model.s length=12"):
            tiny(name)(tokens[:, :13], None, tokens[:, :3])
        with pytest.raises(DataError, match=r"13 tokens exceeds the model.s length=12"):
            tiny(name)(tokens[:, :3], None, tokens[:, :13])


def test_largest_encoder_has_the_published_count():
    with torch.device("meta"):
        model = create("t5-v1.1-xxl")
    assert sum(p.numel() for key, p in model.named_parameters() if key.startswith(("embed", "encoder"))) == 4_762_310_656


# ---------------------------------------------------------------------------------------------- places, experts, chance


def test_position_embeddings_equal_transformers():
    theirs = transformers.models.m2m_100.modeling_m2m_100.M2M100SinusoidalPositionalEmbedding(1024, 64, 1)
    assert torch.equal(SinusoidalPositions(1026, 64).weights[2:], theirs.weights[2:])
    with torch.no_grad():
        model, seen = tiny("nllb"), []
        model.encoder[0].norm1.register_forward_pre_hook(lambda _, x: seen.append(x[0]))
        model.encode(torch.tensor([[5, 6, 7]]))
        torch.testing.assert_close(seen[0], model.embed.weight[5:8][None] * 4 + model.encoder_pos.weights[2:5])


@torch.no_grad()
def test_experts_by_hand():
    """Two experts per token with weights that sum to 1; scaled in evaluation, dropped at random in training."""
    layer = next(m for m in tiny("nllb-moe").modules() if isinstance(m, Experts))
    x = torch.randn(2, 50, 16, dtype=torch.float64)
    want = torch.zeros_like(x)
    for i in range(2):
        for j in range(50):
            logits = layer.router(x[i, j])
            first, second = logits.argsort(descending=True)[:2].tolist()
            share = logits.softmax(0)
            for e in (first, second):
                want[i, j] += share[e] / (share[first] + share[second]) * layer.experts[e](x[i, j])
    torch.testing.assert_close(layer(x), want, **CLOSE)
    layer.masking = 0.2
    torch.testing.assert_close(layer(x), 0.8 * want, **CLOSE)
    found = layer.train()(x)
    gone = (found == 0).all(-1)
    assert 5 < gone.sum() < 40
    torch.testing.assert_close(found[~gone], want[~gone], **CLOSE)


@torch.no_grad()
def test_masked_experts_equal_transformers():
    model = tiny("nllb-moe", masking=0.3)
    peer, rename = writer(model)
    peer.double().eval().load_state_dict(rename(model.state_dict()))
    inputs = batch("nllb-moe")
    torch.testing.assert_close(model(*inputs) * inputs[3][..., None], peer(*inputs) * inputs[3][..., None], **CLOSE)
    assert [isinstance(block.mlp, Experts) for block in model.decoder] == [False, True, False]
    with pytest.raises(SettingsError, match="experts=1"):
        create("nllb-moe-test", experts=1)


def test_balance_is_minimal_for_a_uniform_load():
    model = create("nllb-moe-test").train()
    source, _, tokens, _ = batch("nllb-moe")
    with torch.no_grad():
        for m in model.modules():
            if isinstance(m, Experts):
                m.router.weight.zero_()  # all alike: the first of equals is chosen
    model(source, None, tokens)
    assert model.balance().item() == pytest.approx(1.0)
    with torch.no_grad():
        for m in model.modules():
            if isinstance(m, Experts):
                m.router.weight[2] = 50.0
                m.router.bias = nn.Parameter(torch.tensor([0.0, 0.0, 400.0, 0.0]))
    model(source, None, tokens)
    assert model.balance().item() == pytest.approx(4.0, rel=1e-3)


@torch.no_grad()
@EVERY
@pytest.mark.parametrize("field", ["dropout", "attn_dropout", "mlp_dropout"])
def test_dropout_only_in_training(name, field):
    if name in ("t5", "t5gemma") and field != "dropout":
        return
    inputs, model = batch(name, dtype=torch.float32), tiny(name, torch.float32, **{field: 0.5})
    assert torch.equal(model(*inputs), tiny(name, torch.float32)(*inputs))
    model.train()
    assert not torch.allclose(model(*inputs), model(*inputs), equal_nan=True)


# ---------------------------------------------------------------------------------------------- caches and beams


@torch.no_grad()
@CACHED
@pytest.mark.parametrize("pieces", [(9,), (5, 1, 1, 1, 1), (1,) * 9, (4, 3, 2)], ids=str)
def test_cache_equals_the_whole_row(name, pieces):
    """The source is encoded once; padding on the left changes nothing."""
    model, (source, mask, tokens, _) = tiny(name), batch(name)
    cache = model.new_cache(len(tokens), 9)
    parts = [
        model(None if i else source, None if i else mask, piece, cache=cache) for i, piece in enumerate(tokens.split(pieces, 1))
    ]
    torch.testing.assert_close(torch.cat(parts, 1), model(source, mask, tokens), **CLOSE)
    real = torch.arange(9) >= torch.tensor([[0], [3], [1], [0], [4]])
    cache = model.new_cache(len(tokens), 9)
    parts = [model(source, mask, piece, one, cache) for piece, one in zip(tokens.split(pieces, 1), real.split(pieces, 1))]
    for row in range(5):
        alone = model(source[row : row + 1], mask[row : row + 1], tokens[row : row + 1, real[row]])
        torch.testing.assert_close(torch.cat(parts, 1)[row, real[row]], alone[0], **CLOSE)


@torch.no_grad()
@CACHED
def test_beams_share_their_source_and_are_reordered(name):
    model, (source, mask, _, _) = tiny(name), batch(name, 2)
    tokens = torch.randint(30, (6, 9), generator=torch.Generator().manual_seed(0))
    order = torch.tensor([2, 0, 0, 3, 5, 4])
    cache = model.new_cache(6, 9)
    first = model(source, mask, tokens[:, :5], cache=cache)
    assert {len(x) for pair in cache.cross[0] for x in pair} == {2}
    cache.select(order)
    rest = torch.cat([model(None, None, tokens[:, step : step + 1], cache=cache) for step in range(5, 9)], 1)
    wide, real = source.repeat_interleave(3, 0), mask.repeat_interleave(3, 0)
    torch.testing.assert_close(first, model(wide, real, tokens[:, :5]), **CLOSE)
    whole = model(wide, real, torch.cat([tokens[order, :5], tokens[:, 5:]], 1))
    torch.testing.assert_close(rest, whole[:, 5:], **CLOSE)


@torch.no_grad()
@CACHED
def test_full_width_beam_search_is_exhaustive(name):
    """As wide as all outputs of two tokens, with or without an end token."""
    model, (source, mask, _, _) = tiny(name), batch(name, 2)
    beams = 30
    cache = model.new_cache(2 * beams, 3)
    _, scores = beam_search(
        lambda t: model(source, mask, t, cache=cache),
        cache,
        begin=3,
        eos_token_ids=(1,),
        num_beams=beams,
        max_new_tokens=2,
        length_penalty=0.0,
    )
    for row in range(2):
        start = model(source[row : row + 1], mask[row : row + 1], torch.tensor([[3]]))[0, -1].log_softmax(-1)
        others = torch.tensor([[3, t] for t in range(30) if t != 1])
        wide, real = (x[row : row + 1].expand(29, -1) for x in (source, mask))
        after = model(wide, real, others)[:, -1].log_softmax(-1)
        every = torch.cat([start[1:2], (start[others[:, 1], None] + after).flatten()])
        torch.testing.assert_close(scores[row].double(), every.topk(beams).values, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("buckets", "far"), [(32, 16), (2, 100), (0, 5)])
def test_buckets_that_hold_no_distances_are_rejected(buckets, far):
    with pytest.raises(SettingsError, match=f"buckets={buckets} and far={far}"):
        create("t5-test", buckets=buckets, far=far)
