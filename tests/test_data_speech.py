"""Speech: spectrograms against transformers, resampling against sines, limits of masks, transcripts and back."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
import torch
from scipy import signal

from fieldguide.core.errors import DataError, SettingsError
from fieldguide.data.preprocessing.speech import (
    LogMel,
    SpecAugment,
    mel_filters,
    pad_waves,
    perturb_speed,
    resample,
    sample_stripes,
    suggest_hop,
    suggest_rate,
    to_mono,
)
from fieldguide.data.preprocessing.transcripts import Transcripts, normalize_text


def waves(*lengths: int, seed: int = 0) -> list[np.ndarray]:
    rng = np.random.default_rng(seed)
    return [(rng.normal(0, 0.1, n) + 0.3 * np.sin(np.arange(n) * 0.2)).astype(np.float32) for n in lengths]


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


# ---------------------------------------------------------------------------------------------- spectrograms


@pytest.mark.parametrize(
    ("rate", "bands", "window", "hop", "low", "high"),
    [(16_000, 80, 0.025, 0.010, 20.0, None), (8_000, 40, 0.032, 0.005, 0.0, 3_700.0)],
)
def test_spectrogram_equals_transformers(rate, bands, window, hop, low, high):
    from tv import transformers

    audio = transformers.audio_utils
    mel = LogMel(rate=rate, bands=bands, window=window, hop=hop, low=low, high=high)
    fft = {400: 512, 256: 256}[mel.width]
    filters = audio.mel_filter_bank(fft // 2 + 1, bands, low, high or rate / 2, rate, norm=None, mel_scale="htk")
    np.testing.assert_allclose(mel_filters(rate, fft, bands, low, high or rate / 2), filters, atol=1e-6)
    (wave,) = waves(rate)
    theirs = audio.spectrogram(
        wave.astype(np.float64),
        audio.window_function(mel.width, "hann", periodic=True),
        mel.width,
        mel.step,
        fft_length=fft,
        power=2.0,
        center=False,
        mel_filters=filters,
        mel_floor=1e-8,
        log_mel="log",
    )
    ours = mel.spectrogram(torch.from_numpy(wave)[None])[0]
    assert ours.shape == (mel.frames(rate), bands) and mel.frames(rate) == 1 + (rate - mel.width) // mel.step
    np.testing.assert_allclose(ours, theirs.T, atol=2e-4)


def test_tone_is_in_its_mel_band():
    mel = LogMel()
    t = torch.arange(16_000) / 16_000
    bands = [int(mel.spectrogram(torch.sin(2 * math.pi * f * t)[None])[0, 20].argmax()) for f in (300, 1_000, 3_000)]
    scale = np.linspace(2595 * math.log10(1 + 20 / 700), 2595 * math.log10(1 + 8_000 / 700), 82)[1:-1]
    want = [int(np.abs(scale - 2595 * math.log10(1 + f / 700)).argmin()) for f in (300, 1_000, 3_000)]
    assert bands == want


@pytest.mark.parametrize("scale", ["recording", "corpus"])
def test_batch_equals_single_recordings(scale):
    many = waves(16_000, 300, 400, 401, 559, 560, 7_777)
    mel = LogMel() if scale == "recording" else LogMel.fit([pad_waves(many)])
    together, frames = mel.apply(*pad_waves(many))
    assert frames.tolist() == [98, 1, 1, 1, 1, 2, 47]
    for row, wave in enumerate(many):
        alone, count = mel.apply(*pad_waves([wave]))
        assert count.item() == frames[row] == mel.frames(len(wave)) == alone.shape[1]
        torch.testing.assert_close(together[row, :count], alone[0], rtol=1e-4, atol=1e-4)
        assert not together[row, count:].any()


def test_padding_does_not_affect_features():
    mel = LogMel()
    batch, lengths = pad_waves(waves(16_000, 5_000, 300))
    before = mel.apply(batch, lengths)
    batch[1, 5_000:], batch[2, 300:] = 1.0, -1.0
    assert all(torch.equal(a, b) for a, b in zip(mel.apply(batch, lengths), before))


def test_recordings_are_standardized():
    x, frames = LogMel().apply(*pad_waves(waves(16_000, 8_000)))
    for row, count in zip(x, frames):
        torch.testing.assert_close(row[:count].mean(0), torch.zeros(80), atol=1e-4, rtol=0)
        torch.testing.assert_close(row[:count].std(0, correction=0), torch.ones(80), atol=1e-3, rtol=0)
    assert LogMel().apply(torch.zeros(1, 900), torch.tensor([900]))[0].isfinite().all()  # digital silence


def test_corpus_scale_is_fitted_on_real_frames():
    many = waves(16_000, 3_000, 9_000, 400)
    mel = LogMel.fit([pad_waves(many)], bands=40)
    parts = LogMel.fit([pad_waves(many[:1]), pad_waves(many[1:])], bands=40)
    np.testing.assert_allclose(mel.mean, parts.mean, rtol=1e-6)
    np.testing.assert_allclose(mel.std, parts.std, rtol=1e-5)
    x, frames = mel.apply(*pad_waves(many))
    real = torch.cat([row[:count] for row, count in zip(x, frames)])
    torch.testing.assert_close(real.mean(0), torch.zeros(40), atol=1e-4, rtol=0)
    torch.testing.assert_close(real.std(0, correction=0), torch.ones(40), atol=1e-3, rtol=0)
    again = LogMel.from_json(json.loads(json.dumps(mel.to_json())))
    assert again == mel
    with pytest.raises(DataError, match="no recording"):
        LogMel.fit([])
    with pytest.raises(SettingsError, match="use LogMel"):
        LogMel(scale="corpus").apply(*pad_waves(many))


def test_invalid_mel_bands_are_rejected():
    with pytest.raises(SettingsError, match="contain no frequency"):
        LogMel(rate=8_000, bands=128).spectrogram(torch.zeros(1, 400))
    with pytest.raises(SettingsError, match="half the sample rate"):
        LogMel(rate=8_000, high=5_000.0).spectrogram(torch.zeros(1, 400))


# ---------------------------------------------------------------------------------------------- waves


@pytest.mark.parametrize(("rate", "wanted"), [(44_100, 16_000), (8_000, 16_000), (48_000, 8_000), (11_025, 16_000)])
def test_resampling_keeps_representable_frequencies_only(rate, wanted):
    t, new = np.arange(rate) / rate, np.arange(wanted) / wanted
    tone = 0.35 * min(rate, wanted)
    out = resample(np.sin(2 * np.pi * tone * t).astype(np.float32), rate, wanted)
    assert out.dtype == np.float32 and len(out) == wanted
    middle = slice(wanted // 4, -wanted // 4)
    assert np.abs(out - np.sin(2 * np.pi * tone * new))[middle].max() < 5e-3
    # A second opinion: the exact resampling of a periodic wave, by its Fourier series.
    rng = np.random.default_rng(0)
    spectrum = np.zeros(rate // 2 + 1, complex)
    spectrum[: int(0.35 * min(rate, wanted))] = rng.normal(size=int(0.35 * min(rate, wanted)))
    wave = np.fft.irfft(spectrum, rate)
    exact = signal.resample(wave, wanted)
    assert np.abs(resample(wave, rate, wanted) - exact)[middle].max() < 0.01 * np.abs(exact).max()
    if wanted < rate:
        above = resample(np.sin(2 * np.pi * 0.6 * wanted * t), rate, wanted)  # would fold back to 0.4
        assert np.abs(above[middle]).max() < 0.01


def test_resampling_a_padded_batch():
    many = waves(500, 333)
    batch, _ = pad_waves(many)
    out = resample(batch.numpy(), 44_100, 16_000)
    for row, wave in zip(out, many):
        alone = resample(wave, 44_100, 16_000)
        np.testing.assert_allclose(row[: len(alone)], alone, atol=1e-6)


def test_rates_and_channels():
    assert [suggest_rate(r) for r in ([8_000], [11_025, 8_000], [16_000, 44_100], [4_000])] == [8_000, 8_000, 16_000, 8_000]
    assert to_mono(np.array([[32767, -32768], [16384, 0]], np.int16)) == pytest.approx([-0.5 / 32768, 0.25])
    assert to_mono(np.array([128, 0, 255], np.uint8)) == pytest.approx([0, -1, 127 / 128])
    assert to_mono(np.array([0.5, -1.0])).dtype == np.float32
    with pytest.raises(DataError, match="3 axes"):
        to_mono(np.zeros((2, 2, 2)))


@pytest.mark.parametrize(("seconds", "hop"), [(0.186, 0.010), (0.184, 0.008), (0.154, 0.008), (0.152, 0.005), (0.01, 0.005)])
def test_hop_leaves_frames_for_every_symbol(seconds, hop):
    """5 symbols need 17 frames before the network halves them twice: a window and 16 hops."""
    assert suggest_hop(np.array([seconds]), np.array([5])) == hop
    assert suggest_hop(np.array([seconds] + [9.0] * 999), np.full(1_000, 5)) == 0.010  # one in a thousand
    if seconds > 0.1:
        fits = -(-LogMel(hop=hop).frames(round(seconds * 16_000)) // 4)
        assert fits >= 5


def test_speed_perturbation_changes_length_and_pitch():
    t = np.arange(8_000) / 8_000
    many = [np.sin(2 * np.pi * 400 * t).astype(np.float32), np.sin(2 * np.pi * 400 * t[:4_000]).astype(np.float32)] * 8
    batch, lengths = pad_waves(many)
    out, new = perturb_speed(batch, lengths, generator())
    seen = set()
    for row, old, count in zip(out, lengths.tolist(), new.tolist()):
        speed = round(old / count, 1)
        seen.add(speed)
        spectrum = np.abs(np.fft.rfft(row[:count].numpy() * np.hanning(count)))
        assert spectrum.argmax() * 8_000 / count == pytest.approx(400 * speed, rel=0.01)
        assert not row[count:].any() and count == math.ceil(old / speed - 1e-9)
    assert seen == {0.9, 1.0, 1.1}
    again = perturb_speed(batch, lengths, generator())
    assert torch.equal(again[0], out) and torch.equal(again[1], new)
    assert not torch.equal(perturb_speed(batch, lengths, generator(1))[1], new)


# ---------------------------------------------------------------------------------------------- masks


def test_spec_augment_masks_stay_within_their_limits():
    features, frames = torch.ones(400, 100, 80), torch.tensor([100, 40] * 200)
    out = SpecAugment(band_masks=1, time_masks=0).apply(features, frames, generator())
    bands = out[:, 0] == 0
    assert torch.equal(out, out[:, :1].expand_as(out)) and set(bands.sum(1).tolist()) == set(range(28))
    assert bands.any(0).all()  # the outermost, too
    assert (bands.int().diff(dim=1).abs().sum(1) <= 2).all()  # one stripe
    out = SpecAugment(band_masks=0, time_masks=1, time_share=0.2).apply(features, frames, generator())
    steps = out[:, :, 0] == 0
    assert set(steps[::2].sum(1).tolist()) == set(range(21)) and set(steps[1::2].sum(1).tolist()) == set(range(9))
    assert steps[::2].any(0).all() and steps[1::2, :40].any(0).all() and not steps[1::2, 40:].any()
    assert torch.equal(features, torch.ones(400, 100, 80))  # the input is left alone


def test_spec_augment_depends_on_the_generator_only():
    features, frames = torch.randn(4, 50, 80), torch.tensor([50, 40, 3, 0])
    augment = SpecAugment()
    first = augment.apply(features, frames, generator(3))
    assert torch.equal(first, augment.apply(features, frames, generator(3)))
    assert not torch.equal(first, augment.apply(features, frames, generator(4)))


def test_spec_augment_widths_are_uniform():
    hidden = sample_stripes(torch.full((20_000,), 50), 50, 1, 0.1, generator()).sum(1)
    shares = torch.bincount(hidden, minlength=6) / len(hidden)
    torch.testing.assert_close(shares, torch.full((6,), 1 / 6), atol=0.01, rtol=0)


# ---------------------------------------------------------------------------------------------- transcripts

TEXTS = ["Hello  world", "the quick brown fox", "la fe\u0301e, d'accord ", "hello there the fox"]


@pytest.mark.parametrize("pieces", [None, 40])
def test_transcripts_round_trip(pieces):
    t = Transcripts.fit(TEXTS, pieces=pieces)
    rows, unknown = t.encode(TEXTS)
    assert not unknown and all(row.min() >= 1 and row.max() < t.size for row in rows)
    assert [t.decode(row) for row in rows] == [normalize_text(text, True) for text in TEXTS]
    assert t.decode(rows[2]) == "la fée, d'accord"
    again = Transcripts.from_json(json.loads(json.dumps(t.to_json())))
    assert [a.tolist() for a in again.encode(TEXTS)[0]] == [a.tolist() for a in rows] and again.size == t.size
    assert again.decode([0, -1, *rows[0], 0]) == "hello world"
    batch, lengths = t.batch(rows)
    assert (
        batch.shape == (4, lengths.max())
        and [row[:n].tolist() for row, n in zip(batch, lengths)] == [row.tolist() for row in rows]
        and not batch[0, lengths[0] :].any()
    )
    if pieces:
        assert t.size == 41 and len(rows[3]) < len(TEXTS[3]) - 4
    else:
        assert t.symbols == tuple(sorted(set("".join(normalize_text(text, True) for text in TEXTS))))
        assert t.encode([" a"])[0][0].tolist() == [1 + t.symbols.index("a")]


@pytest.mark.parametrize("pieces", [None, 40])
def test_unseen_characters_are_counted(pieces):
    t = Transcripts.fit(TEXTS, pieces=pieces)
    rows, unknown = t.encode(["the zoo Zz ", "7", ""])
    assert unknown == {"z": 3, "7": 1}
    assert [t.decode(row) for row in rows] == ["the oo", "", ""]


def test_invalid_transcripts_are_rejected():
    with pytest.raises(DataError, match="all transcripts are empty"):
        Transcripts.fit(["", "  ", None])
    with pytest.raises(DataError, match="reserved for spaces"):
        Transcripts.fit(["a ▁"], pieces=10)
    assert Transcripts.fit(["Ab"], lower=False).symbols == ("A", "b")
