"""Speech sample: synthetic recordings of digits."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from fieldguide.data.samples.writers import write_csv

if TYPE_CHECKING:
    import numpy as np


def write_words(folder: Path) -> None:
    """Write 800 synthetic recordings of single digits in a noisy room, in one folder for each digit."""
    import numpy as np

    from fieldguide.data.samples import voice

    rng, words = np.random.default_rng(0), list(voice.WORDS)
    for word in words:
        (folder / word).mkdir()
    for number in range(800):
        word = words[number % len(words)]
        sound = voice.speak([word], voice.Voice.sample(rng), rng)
        noise = rng.standard_normal(len(sound)) * np.sqrt(np.square(sound).mean()) * 10 ** rng.uniform(-1.0, 0.5)
        write_wave(folder / word / f"{number:04d}.wav", (sound + noise).clip(-1, 1), voice.RATE)


def write_wave(path: Path, sound: np.ndarray, rate: int) -> None:
    """Write a recording of one channel with 16 bits."""
    import wave

    with wave.open(str(path), "wb") as file:
        file.setnchannels(1)
        file.setsampwidth(2)
        file.setframerate(rate)
        file.writeframes((sound * 32767).astype("<i2").tobytes())


def write_recordings(folder: Path) -> None:
    """Write 600 synthetic recordings of one to three digits, each with a different voice, and a table of transcripts."""
    (folder / "recordings").mkdir()
    said = speak_digits(folder / "recordings", 600, seed=0)
    write_csv(folder / "transcripts.csv", ["file", "transcript"], ([f"recordings/{name}", text] for name, text in said))


def write_utterances(folder: Path) -> None:
    """Write 1,000 synthetic recordings of one to three digits, each with a different voice."""
    for _ in speak_digits(folder, 1000, seed=1):
        pass


def speak_digits(folder: Path, count: int, seed: int) -> Iterator[tuple[str, str]]:
    """Write recordings of one to three digits, and yield the file name and the words of each."""
    import numpy as np

    from fieldguide.data.samples import voice

    rng = np.random.default_rng(seed)
    for number in range(count):
        words = [str(w) for w in rng.choice(list(voice.WORDS), rng.integers(1, 4))]
        sound = voice.speak(words, voice.Voice.sample(rng), rng)
        write_wave(folder / f"{number:04d}.wav", sound, voice.RATE)
        yield f"{number:04d}.wav", " ".join(words)
