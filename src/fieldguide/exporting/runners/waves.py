from math import gcd

import soundfile
from scipy.signal import resample_poly

SUFFIXES = {".wav", ".flac", ".ogg", ".mp3", ".aiff"}


def load_wave(path, rate):
    """Return a recording with one channel at a sample rate, as float32 with 16 bits of precision."""
    wave, own = soundfile.read(path, dtype="float32")
    if wave.ndim == 2:
        mean, energy = wave.mean(1), np.square(wave, dtype=np.float64).sum(0)
        cancels = np.square(mean, dtype=np.float64).sum() < 0.01 * energy.max(initial=0.0)
        wave = wave[:, energy.argmax()] if cancels else mean
    if own != rate:
        shared = gcd(own, rate)
        wave = resample_poly(wave, rate // shared, own // shared).astype(np.float32)
    return (np.rint(wave * 32768.0).clip(-32768, 32767) / 32768).astype(np.float32)


def shape_key(item):
    return None  # rows are padded


def collate(items):
    """Pad recordings to the longest."""
    lengths = np.array([len(item["waveform"]) for item in items])
    waveform = np.zeros((len(items), lengths.max()), dtype=np.float32)
    for row, item in zip(waveform, items):
        row[: len(item["waveform"])] = item["waveform"]
    return {"waveform": waveform, "lengths": lengths}
