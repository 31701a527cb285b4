"""Formant synthesis of words, with a different voice for each recording.

The source-filter model of speech (Fant 1960; Klatt 1980, doi:10.1121/1.383940): the vocal folds produce a tone with many
harmonics, breath produces noise, and the vocal tract passes some frequencies, the formants. Harmonics are summed with the
gain of the tract; noise is filtered frame by frame. numpy is imported only when sound is generated.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import numpy as np

RATE = 8000  # samples per second
STEP = 40  # samples per frame of control values: 5 ms
WINDOW = 128  # samples per frame of filtered noise

# Sound: formants F1 F2 F3 in Hz (male voice; Peterson and Barney 1952 for vowels), amplitude of voice and of noise,
# center and bandwidth of the noise in Hz, and duration in seconds. Diphthongs glide to the formants of a second sound.
SOUNDS: dict[str, tuple[float, ...]] = {
    "IY": (270, 2290, 3010, 1.0, 0, 0, 0, 0.13),
    "IH": (390, 1990, 2550, 1.0, 0, 0, 0, 0.10),
    "EH": (530, 1840, 2480, 1.0, 0, 0, 0, 0.12),
    "AH": (640, 1190, 2390, 1.0, 0, 0, 0, 0.11),
    "AA": (730, 1090, 2440, 1.0, 0, 0, 0, 0.12),
    "AO": (570, 840, 2410, 1.0, 0, 0, 0, 0.13),
    "UW": (300, 870, 2240, 1.0, 0, 0, 0, 0.14),
    "UH": (440, 1020, 2240, 1.0, 0, 0, 0, 0.07),
    "W": (290, 610, 2150, 0.7, 0, 0, 0, 0.08),
    "R": (310, 1060, 1380, 0.7, 0, 0, 0, 0.08),
    "N": (250, 1450, 2300, 0.5, 0, 0, 0, 0.08),
    "V": (300, 1100, 2200, 0.4, 0.15, 2800, 2500, 0.07),
    "Z": (280, 1700, 2600, 0.3, 0.5, 3600, 900, 0.09),
    "S": (280, 1700, 2600, 0, 0.8, 3600, 900, 0.12),
    "F": (300, 1100, 2200, 0, 0.3, 2500, 2800, 0.10),
    "TH": (300, 1400, 2600, 0, 0.2, 3000, 2500, 0.09),
    "T": (300, 1700, 2600, 0, 0.9, 3300, 1300, 0.03),
    "K": (300, 1900, 2400, 0, 0.8, 1900, 700, 0.04),
    "-": (300, 1500, 2500, 0, 0, 0, 0, 0.06),  # closure before T and K; pause between words
}
WORDS = {
    "zero": "Z IH R AO UH",
    "one": "W AH N",
    "two": "- T UW",
    "three": "TH R IY",
    "four": "F AO R",
    "five": "F AA IH V",
    "six": "S IH - K S",
    "seven": "S EH V AH N",
    "eight": "EH IH - T",
    "nine": "N AA IH N",
}


@dataclass(frozen=True)
class Voice:
    """Parameters of a speaker and a recording."""

    pitch: float = 120.0  # Hz
    size: float = 1.0  # factor of the formants; larger for a shorter vocal tract
    tempo: float = 1.0  # speaking rate; durations are divided by it
    fall: float = 0.15  # fraction by which the pitch falls toward the end
    breath: float = 0.02  # noise in the voice
    hiss: float = 0.003  # noise of the recording
    loudness: float = 0.3  # peak amplitude

    @classmethod
    def sample(cls, rng: np.random.Generator) -> Voice:
        """Return a random voice: men, women and children, slow and fast, near and far from the microphone."""
        size = rng.uniform(0.92, 1.22)
        return cls(
            pitch=math.exp(rng.uniform(4.45, 5.0) + 1.6 * (size - 1)),
            size=size,
            tempo=rng.uniform(0.8, 1.3),
            fall=rng.uniform(0.0, 0.3),
            breath=rng.uniform(0.01, 0.08),
            hiss=math.exp(rng.uniform(-7.5, -4.5)),
            loudness=rng.uniform(0.1, 0.8),
        )


def speak(words: list[str], voice: Voice, rng: np.random.Generator) -> np.ndarray:
    """Synthesize words as float32, -1 to 1, `RATE` samples per second."""
    import numpy as np

    sounds = ["-"]
    for word in words:
        sounds += [*WORDS[word].split(), "-"]
    table = np.array([SOUNDS[s] for s in sounds])
    table[:, :3] *= voice.size * rng.normal(1, 0.025, (len(sounds), 3))
    seconds = table[:, 7] / voice.tempo * rng.uniform(0.8, 1.25, len(sounds))
    seconds[[0, -1]] *= rng.uniform(0.5, 2.0, 2)
    steps = np.maximum(2, (seconds * RATE / STEP).round().astype(int))
    control = smooth(np.repeat(table[:, :7], steps, axis=0), 9)  # articulation takes about 40 ms from sound to sound
    wave = synthesize_voice(control, voice, rng) + synthesize_noise(control, rng)
    wave *= voice.loudness / np.abs(wave).max()
    return (wave + voice.hiss * rng.standard_normal(len(wave))).clip(-1, 1).astype(np.float32)


def smooth(values: np.ndarray, width: int) -> np.ndarray:
    """Smooth the columns of an array with a Hann window."""
    import numpy as np

    kernel = np.hanning(width + 2)[1:-1]
    padded = np.pad(values, ((width // 2, width // 2), (0, 0)), mode="edge")
    return np.stack([np.convolve(padded[:, k], kernel / kernel.sum(), "valid") for k in range(values.shape[1])], 1)


def tract_gain(frequency: np.ndarray, formants: np.ndarray) -> np.ndarray:  # K T, 3 T -> K T
    """Return the gain of the formants in series at each frequency."""
    import numpy as np

    gain = np.ones_like(frequency)
    for f, width in zip(formants, (70.0, 100.0, 150.0)):
        gain *= f**2 / np.sqrt((f**2 - frequency**2) ** 2 + (frequency * width) ** 2)
    return gain


def synthesize_voice(control: np.ndarray, voice: Voice, rng: np.random.Generator) -> np.ndarray:  # T 7 -> T STEP
    """Synthesize the harmonics of the vocal folds, falling by 12 dB per octave, of which lip radiation restores 6."""
    import numpy as np

    frames, count = len(control), len(control) * STEP
    drift = np.interp(np.arange(frames), np.linspace(0, frames, 6), rng.normal(0, 0.03, 6))
    pitch = voice.pitch * (1 - voice.fall * np.linspace(0, 1, frames) + drift)
    harmonics = np.arange(1, int(RATE / 2 / pitch.min()))[:, None]
    audible = np.clip((RATE / 2 - harmonics * pitch) / 200, 0, 1)  # fades out below the Nyquist frequency
    gain = audible / harmonics * tract_gain(harmonics * pitch, control[:, :3].T) * control[:, 3]
    at, known = np.arange(count) / STEP, np.arange(frames)
    turn = np.exp(2j * np.pi * np.cumsum(np.interp(at, known, pitch)) / RATE)
    wave, one = np.zeros(count), np.ones(count, dtype=complex)
    for k in range(len(harmonics)):
        one *= turn  # k + 1 times the phase
        wave += np.interp(at, known, gain[k]) * one.imag
    return wave + voice.breath * np.abs(wave).mean() * np.interp(at, known, control[:, 3]) * rng.standard_normal(count)


def synthesize_noise(control: np.ndarray, rng: np.random.Generator) -> np.ndarray:  # T 7 -> T STEP
    """Synthesize fricatives: band-pass noise, by overlap-add of frames."""
    import numpy as np

    frames, wave = len(control), np.zeros(len(control) * STEP + WINDOW)
    spectrum = np.fft.rfft(rng.standard_normal((frames, WINDOW)) * np.hanning(WINDOW))
    frequency = np.fft.rfftfreq(WINDOW, 1 / RATE)
    middle, width = control[:, 5:6], np.maximum(control[:, 6:7], 200.0)
    shape = np.exp(-0.5 * ((frequency - middle) / (width / 2)) ** 2)
    parts = np.fft.irfft(spectrum * shape, WINDOW) * control[:, 4:5]
    for k in range(frames):
        wave[k * STEP : k * STEP + WINDOW] += parts[k]
    return wave[: frames * STEP]
