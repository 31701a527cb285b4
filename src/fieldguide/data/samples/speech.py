"""Speech sample: synthetic recordings of digits."""

from __future__ import annotations

from pathlib import Path

from fieldguide.data.samples.writers import write_csv


def write_recordings(folder: Path) -> None:
    """Write 600 synthetic recordings of one to three digits, each with a different voice, and a table of transcripts."""
    import wave

    import numpy as np

    from fieldguide.data.samples import voice

    rng, rows = np.random.default_rng(0), []
    (folder / "recordings").mkdir()
    for number in range(600):
        words = [str(w) for w in rng.choice(list(voice.WORDS), rng.integers(1, 4))]
        sound = voice.speak(words, voice.Voice.sample(rng), rng)
        with wave.open(str(folder / "recordings" / f"{number:04d}.wav"), "wb") as file:
            file.setnchannels(1)
            file.setsampwidth(2)
            file.setframerate(voice.RATE)
            file.writeframes((sound * 32767).astype("<i2").tobytes())
        rows.append([f"recordings/{number:04d}.wav", " ".join(words)])
    write_csv(folder / "transcripts.csv", ["file", "transcript"], iter(rows))
