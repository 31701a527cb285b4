"""Conformer: padding, the encoder of transformers, published sizes, and invalid settings."""

from __future__ import annotations

import pytest
import torch

from cases import conformer_layers
from fieldguide.checkpoints.weights import translate
from fieldguide.core.errors import DataError, SettingsError
from fieldguide.models.registry import create
from fieldguide.models.transformer._shared.conformer_blocks import MaskedBatchNorm, RelativeAttention
from fieldguide.models.transformer.conformer import HUGGINGFACE_LAYERS
from references import conformer_stem
from test_models import batch, tiny


@torch.no_grad()
@pytest.mark.parametrize("length", [1, 2, 3, 4, 5, 8, 9, 21, 40])
def test_frame_counts_and_single_recordings(length):
    model = tiny("conformer")
    features = torch.randn(3, 41, 6, dtype=torch.float64)
    lengths = torch.tensor([41, length, 17])
    logits, real = model(features, lengths), model.frames(lengths)
    for row in range(3):
        alone = model(features[row : row + 1, : lengths[row]])
        assert alone.shape[1] == real[row] == model.frames(int(lengths[row])) == -(-int(lengths[row]) // 4)
        torch.testing.assert_close(logits[row, : real[row]], alone[0], rtol=1e-9, atol=1e-11)


@torch.no_grad()
def test_padding_is_never_read():
    model, (features, lengths) = tiny("conformer"), batch("conformer")
    before, real = model(features, lengths), model.frames(lengths)
    features = features.clone()
    for row, length in enumerate(lengths):
        features[row, length:] = torch.nan_to_num(features[row, length:] * 1e6)
    after = model(features, lengths)
    assert all(torch.equal(after[row, :n], before[row, :n]) for row, n in enumerate(real))
    assert model(features, torch.tensor([21, 0, 1, 5, 9])).isfinite().all()


def test_padding_does_not_affect_statistics_or_gradients():
    """The same recordings with more padding, in other rows, give the same step."""
    results = []
    for pad, order in ((0, [0, 1, 2, 3, 4]), (13, [3, 0, 4, 2, 1])):
        model, (features, lengths) = tiny("conformer").train(), batch("conformer")
        features = torch.cat([features, 5 + torch.zeros(len(features), pad, 6, dtype=torch.float64)], 1)[order]
        logits, real = model(features, lengths[order]), model.frames(lengths[order])
        sum((row[:n].square().sum() for row, n in zip(logits, real))).backward()
        results.append([p.grad for p in model.parameters()] + [b.double() for b in model.buffers()])
    torch.testing.assert_close(*results, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("training", [False, True])
def test_masked_batch_norm_equals_torch_on_real_frames(training):
    torch.manual_seed(0)
    ours = MaskedBatchNorm(5).double().train(training)
    theirs = torch.nn.BatchNorm1d(5).double().train(training)
    theirs.load_state_dict(ours.state_dict())
    for _ in range(3):
        x, mask = 2 + 3 * torch.randn(4, 5, 7, dtype=torch.float64), torch.rand(4, 7) < 0.6
        torch.testing.assert_close(ours(x, mask).mT[mask], theirs(x.mT[mask]))
        torch.testing.assert_close(ours(x), theirs(x))
    torch.testing.assert_close(ours.state_dict(), theirs.state_dict())


@torch.no_grad()
@pytest.mark.parametrize("steps", [1, 2, 3, 8])
def test_attention_scores_equal_the_equation(steps):
    """The equation of section 3.3 of Transformer-XL, one pair of frames at a time."""
    torch.manual_seed(0)
    attn = RelativeAttention(6, 2, 0.0).double()
    attn.u.normal_(), attn.v.normal_()
    x, places = torch.randn(1, steps, 6).double(), torch.randn(2 * steps, 6).double()
    q, k, v = attn.qkv(attn.norm(x))[0].unflatten(-1, (3, 2, 3)).unbind(1)  # T heads d
    r = attn.pos(places).unflatten(-1, (2, 3))
    want = torch.zeros(steps, 2, 3).double()
    for i in range(steps):
        for h in range(2):
            score = torch.stack(
                [
                    ((q[i, h] + attn.u[h]) @ k[j, h] + (q[i, h] + attn.v[h]) @ r[steps - 1 - (i - j), h]) / 3**0.5
                    for j in range(steps)
                ]
            )
            want[i, h] = score.softmax(0) @ v[:, h]
    torch.testing.assert_close(attn(x, places, None)[0], attn.proj(want.flatten(1)))


@torch.no_grad()
def test_equals_the_encoder_of_transformers():
    """Including positions, the final norm and the head; files with the names of its layers load."""
    from tv import transformers

    ours = tiny("conformer", torch.float32, dim=16, heads=4, growth=3, kernel=5, depth=3)
    config = transformers.Wav2Vec2ConformerConfig(
        vocab_size=7,
        hidden_size=16,
        num_hidden_layers=3,
        num_attention_heads=4,
        intermediate_size=48,
        conv_depthwise_kernel_size=5,
        position_embeddings_type="relative",
        layerdrop=0.0,
        hidden_act="swish",
        num_conv_pos_embeddings=4,
        num_conv_pos_embedding_groups=2,
        max_source_positions=50,
    )
    theirs = transformers.Wav2Vec2ConformerForCTC(config).eval()
    state = translate(
        {name: x for name, x in ours.state_dict().items() if not name.startswith("stem.")}, HUGGINGFACE_LAYERS, reverse=True
    )
    missing, unknown = theirs.load_state_dict(state, strict=False)
    assert not unknown
    assert not [name for name in missing if "encoder.layers." in name or name.startswith("lm_head")]
    x = torch.randn(2, 45, 6)
    middle = ours.stem(x, None)
    encoder = theirs.wav2vec2_conformer.encoder
    encoder.layer_norm = torch.nn.Identity()  # of wav2vec 2.0; the paper's last block ends in one of its own
    torch.testing.assert_close(ours(x), theirs.lm_head(encoder(middle).last_hidden_state), rtol=2e-4, atol=2e-5)
    back = translate(state, HUGGINGFACE_LAYERS)
    assert all(torch.equal(x, ours.state_dict()[name]) for name, x in back.items())


@torch.no_grad()
def test_odd_numbers_of_bands():
    model = tiny("conformer", features=5)
    x = torch.randn(1, 11, 5, dtype=torch.float64)
    torch.testing.assert_close(model.stem(x, None)[0], conformer_stem(model.state_dict(), x[0]))


@pytest.mark.parametrize(
    ("size", "params"), [("conformer-s", 8_850_112), ("conformer-m", 27_574_272), ("conformer-l", 115_601_920)]
)
def test_layers_have_the_shapes_of_transformers(size, params):
    with torch.device("meta"):
        model = create(size)
        peer, rename = conformer_layers(model)
    renamed, theirs = rename(model.state_dict()), peer.state_dict()
    assert {key: x.shape for key, x in renamed.items()} == {key: x.shape for key, x in theirs.items()}
    assert sum(p.numel() for p in model.parameters()) == params
    # torchaudio's blocks (counted from its wheel) have no relative positions, and a bias in each of three convolutions.
    c = model.config
    positions = c.depth * (c.dim**2 + 2 * c.dim)
    known = {"conformer-s": 7_771_392, "conformer-m": 24_367_104, "conformer-l": 103_029_248}[size]
    assert sum(p.numel() for p in model.blocks.parameters()) - positions + c.depth * 4 * c.dim == known


def test_invalid_settings_are_rejected():
    with pytest.raises(SettingsError, match="must be odd, such as 31 or 33"):
        create("conformer-test", kernel=32)
    with pytest.raises(SettingsError, match="multiple of heads=3"):
        create("conformer-test", heads=3)
    with pytest.raises(DataError, match=r"5 features.*features=6"):
        tiny("conformer")(torch.zeros(1, 9, 5, dtype=torch.float64))
