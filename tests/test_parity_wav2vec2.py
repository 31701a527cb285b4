"""Wav2Vec 2.0 and HuBERT: both forms and all heads against transformers, and files of every kind."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

import fieldguide
from fieldguide.checkpoints import weights
from fieldguide.core.errors import SettingsError, WeightsError
from fieldguide.models.registry import card_of, create
from fieldguide.models.transformer._shared.waveform_encoder import TimeNorm, sample_spans
from fieldguide.objectives.contrastive_frames import ContrastiveFrames, sample_distractors
from fieldguide.objectives.hidden_frames import sample_hidden_frames
from recognizers import waveform_encoder
from tv import transformers

STABLE = {"pre_norm": True, "stem_norm": "layer", "stem_bias": True}
FORMS = pytest.mark.parametrize("form", [{}, STABLE], ids=["group", "layer"])
OUTPUTS = {
    "wav2vec2": ("ctc", "label", "vector", "contexts"),
    "hubert": ("ctc", "label", "vector"),
}
HEADS = [(name, output) for name, outputs in OUTPUTS.items() for output in outputs]
WEIGHED = {"output_type": "label", "weigh_layers": True}


def build(name="wav2vec2", dtype=torch.float64, **fields):
    """Return a tiny network with random parameters."""
    torch.manual_seed(0)
    base = {"pre_norm": False, "stem_norm": "group", "stem_bias": False}
    model = create(f"{name}-test", **{**base, **fields}).to(dtype)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.2)
    return model.eval()


def record(dtype=torch.float64):
    torch.manual_seed(1)
    return torch.randn(3, 41, dtype=dtype), torch.tensor([41, 30, 23])


def peer_of(model):
    peer, rename = waveform_encoder(model)
    peer.to(next(model.parameters()).dtype).load_state_dict(rename(model.state_dict()), strict=True)
    return peer.inner.eval()


@FORMS
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["float32", "float64"])
@pytest.mark.parametrize(("name", "output"), HEADS, ids=["-".join(pair) for pair in HEADS])
def test_equals_transformers(name, output, dtype, form):
    """Outputs and gradients of every form and head; without padding, which transformers' group norm does not ignore."""
    model = build(name, dtype, output_type=output, mask_time=0.2, **form)
    peer, (waveform, _) = peer_of(model), record(dtype)
    found = peer(waveform)
    if output == "contexts":
        theirs = torch.stack([found.projected_states, found.projected_quantized_states], 2)
    else:
        theirs = found.last_hidden_state if output == "vector" else found.logits
    if output == "vector":
        torch.testing.assert_close(model.features(waveform), theirs)
        theirs = theirs.mean(1)
    ours = model(waveform)
    close = {"rtol": 1e-9, "atol": 1e-11} if dtype == torch.float64 else {"rtol": 1e-3, "atol": 1e-4}
    torch.testing.assert_close(ours, theirs, **close)
    torch.manual_seed(2)
    weighting = torch.randn_like(ours)
    (ours * weighting).sum().backward()
    (theirs * weighting).sum().backward()
    grads = {name: torch.zeros_like(p) if p.grad is None else p.grad for name, p in model.named_parameters()}
    renamed = weights.translate(grads, card_of(model).tables(model.config)["huggingface"], reverse=True)
    for key, p in peer.named_parameters():
        torch.testing.assert_close(renamed[key], torch.zeros_like(p) if p.grad is None else p.grad, **close)


@pytest.mark.parametrize("output", OUTPUTS["wav2vec2"])
def test_conformer_blocks_equal_transformers(output, tmp_path):
    """Without padding; the contract tests compare padded batches."""
    model = build("wav2vec2-conformer", output_type=output, mask_time=0.2, stem_norm="layer", stem_bias=True, pre_norm=True)
    peer, (waveform, _) = peer_of(model), record()
    for block in peer.base_model.encoder.layers:
        block.conv_module.batch_norm.mask = torch.ones(3, 9, dtype=torch.bool)
        block.conv_module.depthwise_conv._forward_pre_hooks.clear()
    found = peer(waveform)
    if output == "contexts":
        theirs = torch.stack([found.projected_states, found.projected_quantized_states], 2)
    else:
        theirs = found.last_hidden_state.mean(1) if output == "vector" else found.logits
    torch.testing.assert_close(model(waveform), theirs)
    model = model.float()
    fieldguide.save(model, tmp_path / "ours", "hf")
    kind = json.loads((tmp_path / "ours" / "config.json").read_text())["architectures"][0]
    getattr(transformers, kind).from_pretrained(tmp_path / "ours").save_pretrained(tmp_path / "theirs")
    again = fieldguide.load(tmp_path / "theirs")  # with the unused convolution
    assert again.config == model.config
    for key, tensor in model.state_dict().items():
        torch.testing.assert_close(again.state_dict()[key], tensor, msg=key)


@FORMS
def test_weighted_layers_equal_transformers(form, tmp_path):
    model = build(**WEIGHED, **form)
    waveform, _ = record()
    torch.testing.assert_close(model(waveform), peer_of(model)(waveform).logits)
    fieldguide.save(model, tmp_path, "hf")
    assert fieldguide.load(tmp_path).config == model.config


@FORMS
@pytest.mark.parametrize("output", ["ctc", "label"])
def test_padding_equals_transformers(output, form):
    """With lengths, rows of the layer norm form equal transformers with its attention mask, those of the other form each row alone."""
    model = build(output_type=output, **form)
    peer, (waveform, lengths) = peer_of(model), record()
    mask = torch.arange(waveform.shape[1]) < lengths[:, None]
    theirs = peer(waveform * mask, attention_mask=mask.long()).logits
    alone = [peer(x[None, :n]).logits[0] for x, n in zip(waveform, lengths)]
    for i, n in enumerate(model.frames(lengths).tolist()):
        ours = model(waveform, lengths)[i]
        ours, masked = (ours[:n], theirs[i, :n]) if output == "ctc" else (ours, theirs[i])
        torch.testing.assert_close(ours, alone[i])
        if form:
            torch.testing.assert_close(ours, masked)
    if not form:  # a trap: padding changes the outputs of transformers' base form
        assert not torch.allclose(theirs[2][: len(alone[2])], alone[2])


def test_time_norm_ignores_padding():
    norm = TimeNorm(3).double()
    torch.nn.init.uniform_(norm.weight)
    x = torch.randn(2, 3, 9, dtype=torch.float64)
    y = norm(x, torch.tensor([9, 5]))
    torch.testing.assert_close(y[0], norm(x)[0])
    torch.testing.assert_close(y[1, :, :5], norm(x[1:, :, :5])[0])


def test_frames_are_whole_windows():
    model = create("wav2vec2-test")
    assert (model.stride, model.field) == (4, 8)
    for n in (1, 7, 8, 11, 12, 40):
        assert model.frames(n) == model.frames(torch.tensor(n)) == max(0, (n - 8) // 4 + 1)
        assert model(torch.randn(1, n)).shape[1] == max(1, model.frames(n))
    with torch.device("meta"):
        base = create("wav2vec2-base")
    assert (base.stride, base.field, base.frames(16_000)) == (320, 400, 49)


def test_masks_hide_frames_in_training():
    model = build(mask_time=0.5, mask_time_length=2, mask_features=0.3, mask_features_length=2, dropout=0.0)
    waveform, lengths = record()
    expected = model(waveform, lengths)
    torch.manual_seed(3)
    first = model.train()(waveform, lengths)
    torch.manual_seed(3)
    assert torch.equal(first, model(waveform, lengths)) and not torch.allclose(first, expected)
    first.sum().backward()
    assert model.mask_embed.grad.any()


def test_spans_cover_the_stated_share():
    torch.manual_seed(0)
    hidden = sample_spans(torch.tensor([200, 50, 4]), 200, 0.3, 10)
    assert not hidden[1, 50:].any() and not hidden[2].any()
    share = torch.stack([sample_spans(torch.tensor([200]), 200, 0.3, 10)[0] for _ in range(300)]).float().mean()
    assert 0.22 < share < 0.3  # spans overlap
    runs = "".join(map(str, hidden[0].int().tolist())).split("0")
    assert min(len(run) for run in runs if run) >= 10


# Files


def public_state(model):
    return {key.removeprefix("inner."): x for key, x in waveform_encoder(model)[1](model.state_dict()).items()}


@FORMS
@pytest.mark.parametrize(("name", "output"), HEADS, ids=["-".join(pair) for pair in HEADS])
def test_folders_of_both_libraries(name, output, form, tmp_path):
    model = build(name, torch.float32, output_type=output, mask_time=0.2, **form)
    fieldguide.save(model, tmp_path / "ours", "hf")
    kind = json.loads((tmp_path / "ours" / "config.json").read_text())["architectures"][0]
    theirs, report = getattr(transformers, kind).from_pretrained(tmp_path / "ours", output_loading_info=True)
    assert not any(report[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    theirs.save_pretrained(tmp_path / "theirs")
    again = fieldguide.load(tmp_path / "theirs")
    assert again.config == model.config
    for key, tensor in model.state_dict().items():
        torch.testing.assert_close(again.state_dict()[key], tensor, msg=key)


def test_older_names_of_the_positional_convolution(tmp_path):
    """Also without the vector of hidden frames, which facebook/wav2vec2-base-960h lacks."""
    model = build(dtype=torch.float32, mask_time=0.05)
    fieldguide.save(model, tmp_path, "hf")
    state = load_file(tmp_path / "model.safetensors")
    before = "wav2vec2.encoder.pos_conv_embed.conv."
    assert state[before + "parametrizations.weight.original0"].shape == (1, 1, 4)
    state[before + "weight_g"] = state.pop(before + "parametrizations.weight.original0")
    state[before + "weight_v"] = state.pop(before + "parametrizations.weight.original1")
    del state["wav2vec2.masked_spec_embed"]
    save_file(state, tmp_path / "model.safetensors")
    again = fieldguide.load(tmp_path)
    waveform, lengths = record(torch.float32)
    assert torch.equal(again(waveform, lengths), model(waveform, lengths)) and not again.mask_embed.any()


@pytest.mark.parametrize("blank", [0, 3, 6])
def test_blank_anywhere(blank, tmp_path):
    """The padding token of transformers' tokenizer is the blank; here it is always the first symbol."""
    model = build(dtype=torch.float32, blank=blank)
    fieldguide.save(model, tmp_path, "hf")
    theirs = transformers.Wav2Vec2ForCTC.from_pretrained(tmp_path).eval()
    assert theirs.config.pad_token_id == blank
    waveform, _ = record(torch.float32)
    order = [blank, *(i for i in range(7) if i != blank)]
    torch.testing.assert_close(model(waveform), theirs(waveform).logits[..., order], rtol=1e-4, atol=1e-5)
    assert torch.equal(fieldguide.load(tmp_path)(waveform), model(waveform))


@pytest.mark.filterwarnings("ignore::fieldguide.core.errors.WeightsWarning")
def test_pretrained_encoders_get_other_heads(tmp_path):
    model = build(output_type="contexts", dtype=torch.float32, mask_time=0.2)
    fieldguide.save(model, tmp_path, "hf")
    encoder = fieldguide.load(tmp_path, output_type="vector")
    torch.testing.assert_close(encoder.features(*record(torch.float32)), model.features(*record(torch.float32)))
    recognizer = fieldguide.load(tmp_path, output_type="ctc", head="skip")
    assert recognizer.head.out_features == 7 and torch.equal(recognizer.proj.weight, model.proj.weight)


def test_other_networks_are_rejected(tmp_path):
    fieldguide.save(build(dtype=torch.float32), tmp_path, "hf")
    config = json.loads((tmp_path / "config.json").read_text())
    for key, value in (("add_adapter", True), ("adapter_attn_dim", 16), ("hidden_act", "relu")):
        (tmp_path / "config.json").write_text(json.dumps({**config, key: value}))
        with pytest.raises(WeightsError, match=key):
            fieldguide.load(tmp_path)
    for fields, message in (
        ({"stem_norm": "batch"}, "group or layer"),
        ({"stem_dims": (4,)}, "same length"),
        ({"pos_groups": 3}, "divisible by pos_groups"),
        ({"output_type": "words"}, "output_type"),
        ({"codebooks": 4, "output_type": "contexts"}, "divisible by codebooks"),
    ):
        with pytest.raises(SettingsError, match=message):
            create("wav2vec2-test", **fields)


# Pre-training


def hide(counts=(9, 6, 4), width=9, distractors=5):
    generator = torch.Generator().manual_seed(0)
    hidden = sample_hidden_frames(torch.tensor(counts), width, generator, share=0.3, length=2)
    return hidden, sample_distractors(hidden, distractors, generator)


@FORMS
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["float32", "float64"])
def test_pretraining_loss_equals_transformers(form, dtype, monkeypatch):
    """Loss, its parts and gradients for the same hidden frames and distractors."""
    if dtype == torch.float64:  # transformers computes similarities in float32
        monkeypatch.setattr(torch.Tensor, "float", lambda self: self)
    model = build(dtype=dtype, output_type="contexts", mask_time=0.2, **form)
    peer, (waveform, _) = peer_of(model), record(dtype)
    lengths = torch.tensor([41, 41, 41])
    hidden, distractors = hide((9, 9, 9))
    objective = ContrastiveFrames(model).eval()
    losses = objective({"waveform": waveform, "lengths": lengths, "hidden": hidden, "distractors": distractors})
    flat = distractors + 9 * torch.arange(3)[:, None, None]
    found = peer(waveform, mask_time_indices=hidden, sampled_negative_indices=flat)
    close = {"rtol": 1e-5, "atol": 1e-6} if dtype == torch.float32 else {"rtol": 1e-10, "atol": 1e-11}
    torch.testing.assert_close(losses["loss"] * hidden.sum(), found.loss, check_dtype=False, **close)
    torch.testing.assert_close(losses["contrast"] * hidden.sum(), found.contrastive_loss, check_dtype=False, **close)
    torch.testing.assert_close(losses["perplexity"], found.codevector_perplexity, check_dtype=False, **close)
    (losses["loss"] * hidden.sum()).backward()
    found.loss.backward()
    grads = {name: torch.zeros_like(p) if p.grad is None else p.grad for name, p in model.named_parameters()}
    renamed = weights.translate(grads, card_of(model).tables(model.config)["huggingface"], reverse=True)
    for key, p in peer.named_parameters():
        torch.testing.assert_close(
            renamed[key],
            torch.zeros_like(p) if p.grad is None else p.grad,
            **({"rtol": 1e-3, "atol": 1e-4} if dtype == torch.float32 else {"rtol": 1e-8, "atol": 1e-10}),
            msg=lambda m, key=key: f"{key}: {m}",
        )


def test_soft_choices_equal_transformers_in_training():
    """The probabilities of the codebooks' entries; the choices themselves are drawn."""
    model = build(output_type="contexts", mask_time=0.2).train()
    peer, (waveform, _) = peer_of(model).train(), record()
    hidden, _ = hide((9, 9, 9))
    probabilities = model.contrast(waveform, torch.tensor([41, 41, 41]), hidden).probabilities
    mean = probabilities[hidden].mean(0)
    perplexity = torch.exp(-torch.xlogy(mean, mean).sum(-1)).sum()
    theirs = peer(waveform, mask_time_indices=hidden).codevector_perplexity
    torch.testing.assert_close(perplexity, theirs, check_dtype=False, rtol=1e-5, atol=1e-6)


def test_hidden_frames_and_distractors():
    generator = torch.Generator().manual_seed(0)
    counts = torch.tensor([500, 300, 20, 2, 1])
    hidden = sample_hidden_frames(counts[:3], 500, generator)
    assert not hidden[1, 300:].any() and not hidden[2, 20:].any()
    many = torch.stack([sample_hidden_frames(torch.tensor([500]), 500, generator)[0] for _ in range(50)])
    assert 0.45 < many.float().mean() < 0.52  # the paper: 49 %
    short = sample_hidden_frames(counts[3:], 4, generator)
    assert short[0, :2].all() and not short[:, 2:].any()
    distractors = sample_distractors(hidden, 100, generator)
    for row in range(3):
        frames = set(hidden[row].nonzero()[:, 0].tolist())
        for place in frames:
            chosen = set(distractors[row, place].tolist())
            assert chosen <= frames - {place}
        counts_of = torch.bincount(distractors[row][hidden[row]].flatten(), minlength=500)[sorted(frames)]
        assert counts_of.float().std() < 0.2 * counts_of.float().mean() + 30
    assert not sample_distractors(torch.tensor([[True, False]]), 3).any()


def test_network_learns_to_find_hidden_frames():
    """On tones that change in a fixed order, so that neighbors tell what is hidden."""
    torch.manual_seed(0)
    fields = {"stem_dims": (16, 16), "dim": 32, "hidden": 64, "codes": 8, "code_dim": 16, "contrast_dim": 16, "mask_time": 0.2}
    model = create("wav2vec2-test", output_type="contexts", **fields)
    objective = ContrastiveFrames(model).train()
    generator = torch.Generator().manual_seed(1)
    optimizer = torch.optim.AdamW(model.parameters(), 5e-3)
    first, last = [], []
    for step in range(60):
        phase = torch.rand(16, 1, generator=generator) * 6.28
        time = torch.arange(208) / 4.0
        waveform = torch.sin(phase + time * (1 + (time / 13 + phase).sin()))
        lengths = torch.full((16,), 208)
        hidden = sample_hidden_frames(model.frames(lengths), model.frames(208), generator, share=0.1, length=3)
        batch = {"waveform": waveform, "lengths": lengths, "hidden": hidden}
        losses = objective(batch | {"distractors": sample_distractors(hidden, 10, generator)})
        optimizer.zero_grad()
        losses["loss"].backward()
        optimizer.step()
        (first if step < 5 else last).append(losses["contrast"].item())
    assert sum(last[-5:]) < 0.8 * sum(first)
    scored = objective.eval().outputs(batch | {"distractors": sample_distractors(hidden, 10, generator)})
    assert scored["count"].tolist() == hidden.sum(1).tolist() and (scored["right"] <= scored["count"]).all()
