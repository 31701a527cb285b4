"""Audio files: checking and loading with libsndfile in threads (decoding releases the GIL).

Recordings are loaded as one channel (the mean of all), resampled to one rate, as 16-bit integers; `check` records what
had to be converted. Supported formats: WAV, FLAC, Ogg (Vorbis, Opus), MP3, AIFF and AU.
"""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from fieldguide.core.errors import DataError
from fieldguide.core.threads import map_threads

if TYPE_CHECKING:
    import soundfile

FORMAT_SUFFIXES = {
    "WAV": (".wav", ".wave"),
    "WAVEX": (".wav", ".wave"),
    "RF64": (".wav", ".rf64"),
    "FLAC": (".flac",),
    "OGG": (".ogg", ".oga", ".opus"),
    "MP3": (".mp3", ".mp2", ".mpga"),
    "MPEG": (".mp3", ".mp2", ".mpga"),
    "AIFF": (".aif", ".aiff", ".aifc"),
    "AU": (".au", ".snd"),
}
SUPPORTED_SUFFIXES = frozenset(s for suffixes in FORMAT_SUFFIXES.values() for s in suffixes)
UNSUPPORTED_SUFFIXES = (".m4a", ".aac", ".wma", ".amr")  # audio formats that libsndfile does not support
BLOCK_FRAMES = 1 << 20  # frames decoded at once, which bounds the memory for long recordings
MAX_SAMPLES = 1 << 28  # of all channels of one recording; protects against decompression bombs (93 minutes at 48 kHz)
MIN_RATE, MAX_RATE = 1_000, 768_000  # samples per second of a plausible recording
MAX_CANCELLED_ENERGY = 0.01  # of the loudest channel: below, the mean of the channels has lost the sound
MAX_SILENT_PEAK = 1e-3  # peak amplitude (-60 dB) below which a recording is silent
FULL_SCALE, MAX_CLIPPED_FRACTION = 0.999, 1e-3  # amplitude of a clipped sample; fraction of such samples in a clipped recording
TRUNCATED_WAV_PATTERN = re.compile(r"\bdata : (\d+) \(should be (\d+)\)", re.IGNORECASE)  # libsndfile's log for a truncated WAV
PLACEHOLDER_LENGTHS = (0, 0xFFFFFFFF, 0x7FFFFFFF, 0x80000000, 0x7FFFF000)  # placeholder lengths written by streaming encoders


@dataclass(frozen=True, slots=True)
class AudioCheck:
    """The result of checking one file. `problem` is "" if the recording can be used."""

    problem: str = ""  # name of a data check: empty-file, zero-length, not-a-sound, truncated-sound, ...
    detail: str = ""
    bytes: int = 0
    sha256: str = ""
    samples: str = ""  # digest of the decoded samples
    seconds: float = 0.0
    rate: int = 0  # samples per second
    channels: int = 1
    form: str = ""  # libsndfile's name of the format
    traits: tuple[str, ...] = ()  # any of: stereo cancelling silent clipped wrong-extension unmarked-end


def check(paths: Sequence[str | Path]) -> list[AudioCheck]:
    """Decode every file completely, which is the only way to detect truncation. Never raises for unusable files."""
    return map_threads(check_one, paths)


def check_one(path: str | Path) -> AudioCheck:
    """Decode one file completely and return the result of the check."""
    import soundfile

    try:
        with open(path, "rb") as file:
            sha, size = hashlib.file_digest(file, "sha256").hexdigest(), os.path.getsize(path)
            file.seek(max(0, size - (1 << 16)))
            tail = file.read()
    except OSError as error:
        return AudioCheck("unreadable-file" if os.path.exists(path) else "missing-file", error.strerror or str(error))
    if not size:
        return AudioCheck("empty-file", "0 bytes", 0, sha)
    suffix = os.path.splitext(str(path))[1].lower()
    if suffix in UNSUPPORTED_SUFFIXES:
        return AudioCheck("not-a-sound", f"{suffix} is not supported: convert it to .flac or .wav", size, sha)
    try:
        with soundfile.SoundFile(path) as sound:
            return check_decoded(sound, suffix, tail, size, sha)
    except soundfile.LibsndfileError as error:
        unknown_format = "not recognised" in error.error_string and suffix not in SUPPORTED_SUFFIXES
        return AudioCheck("not-a-sound" if unknown_format else "corrupt-sound", error_text(error), size, sha)


def error_text(error: soundfile.LibsndfileError) -> str:
    """Return libsndfile's error message, replacing its misleading message about undecodable MP3 files."""
    message = error.error_string.removeprefix("Error :").strip().rstrip(".")
    return "no audio can be decoded" if "not a regular file" in message else (message[:1].lower() + message[1:])[:100]


def check_decoded(sound: soundfile.SoundFile, suffix: str, tail: bytes, size: int, sha: str) -> AudioCheck:
    """Check an opened file. Raises `LibsndfileError` if nothing of it can be decoded."""
    import soundfile

    digest, count, peak, full, problem = hashlib.blake2b(digest_size=16), 0, 0.0, 0, ""
    energy, mean_energy = np.zeros(sound.channels), 0.0
    digest.update(f"{sound.samplerate} {sound.channels}".encode())
    expected, form = sound.frames, sound.format
    if reason := find_excess(sound):
        return AudioCheck("implausible-sound", reason, size, sha)
    bad = 0  # samples that are not finite
    is_complete, is_marked = find_last_page(tail)
    cut = TRUNCATED_WAV_PATTERN.search(sound.extra_info)
    try:
        while len(block := sound.read(BLOCK_FRAMES, dtype="float32", always_2d=True)):
            digest.update(np.ascontiguousarray(block).data)
            if not np.isfinite(block).all():
                bad += int((~np.isfinite(block)).sum())
                block = np.nan_to_num(block, posinf=0.0, neginf=0.0)
            if (count + len(block)) * sound.channels > MAX_SAMPLES:
                return AudioCheck("implausible-sound", f"more than {MAX_SAMPLES:,} samples", size, sha)
            loud = np.abs(block)
            if sound.channels > 1:
                energy += np.square(block, dtype=np.float64).sum(0)
                mean_energy += float(np.square(block.mean(1), dtype=np.float64).sum())
            count, peak, full = count + len(block), max(peak, float(loud.max())), full + int((loud >= FULL_SCALE).sum())
    except soundfile.LibsndfileError as error:
        if not count and form != "FLAC":
            raise
        problem = f"after {count:,} of {expected:,} samples: {error_text(error)}"
    if cut and int(cut[1]) > int(cut[2]) and int(cut[1]) not in PLACEHOLDER_LENGTHS:
        problem = f"{int(cut[2]):,} of {int(cut[1]):,} bytes of audio data"
    elif form == "OGG" and not is_complete:
        problem = "its last page is missing"
    elif not problem and count < expected:
        problem = f"{count:,} of {expected:,} samples"
    facts = (size, sha, digest.hexdigest(), count / sound.samplerate, sound.samplerate, sound.channels, form)
    if problem:
        return AudioCheck("truncated-sound", problem, *facts)
    if not count:
        return AudioCheck("zero-length", "no samples", *facts)
    if bad:
        return AudioCheck("not-finite", f"{bad:,} of {count * sound.channels:,} samples are NaN or infinite", *facts)
    traits = {
        "stereo": sound.channels > 1,
        "cancelling": mean_energy < MAX_CANCELLED_ENERGY * energy.max(),
        "silent": peak < MAX_SILENT_PEAK,
        "clipped": full > MAX_CLIPPED_FRACTION * count * sound.channels,
        "wrong-extension": suffix not in FORMAT_SUFFIXES.get(form, (suffix,)),
        "unmarked-end": form == "OGG" and not is_marked,
    }
    return AudioCheck("", "", *facts, tuple(name for name, seen in traits.items() if seen))


def find_excess(sound: soundfile.SoundFile) -> str:
    """Return why a recording will not be decoded: an implausible rate or length; "" if it will be."""
    if not MIN_RATE <= sound.samplerate <= MAX_RATE:
        return f"{sound.samplerate:,} samples per second"
    if sound.frames * sound.channels > MAX_SAMPLES:
        length = sound.frames / sound.samplerate / 60
        return f"{sound.frames:,} samples in {sound.channels} channels, {length:,.0f} minutes"
    return ""


def find_last_page(tail: bytes) -> tuple[bool, bool]:
    """Return whether an Ogg file ends with a complete page, and whether that is marked as the last one.

    Some encoders do not mark it, and a copy that is interrupted rarely ends with a page.
    """
    at = tail.rfind(b"OggS")
    if at < 0 or len(tail) < at + 27:
        return False, False
    table = at + 27 + tail[at + 26]
    return len(tail) >= table + sum(tail[at + 27 : table]), bool(tail[at + 5] & 4)


def load(paths: Sequence[str | Path], rate: int) -> list[np.ndarray]:
    """Load recordings as int16 arrays with one channel at `rate` samples per second.

    16 bits take half the memory of floats, and their rounding error is below the floor of a spectrogram.
    Raises DataError naming the files that cannot be read.
    """
    import soundfile

    problems: list[str] = []

    def one(path: str | Path) -> np.ndarray:
        try:
            return load_wave(path, rate)
        except (soundfile.LibsndfileError, OSError, ValueError) as error:
            problems.append(f"{path}: {getattr(error, 'error_string', error)}")
            return np.zeros(0, np.int16)

    waves = map_threads(one, paths)
    if problems:
        more = f"\nand {len(problems) - 5} more" if len(problems) > 5 else ""
        raise DataError("recordings that cannot be read:\n" + "\n".join(sorted(problems)[:5]) + more)
    return waves


def load_wave(path: str | Path, rate: int) -> np.ndarray:
    """Load one recording as int16, N. Raises `soundfile.LibsndfileError`."""
    import soundfile

    from fieldguide.data.preprocessing.speech import resample, to_mono

    with soundfile.SoundFile(path) as sound:
        if reason := find_excess(sound):
            raise ValueError(reason)
        samples, own = sound.read(dtype="float32"), sound.samplerate
    if not np.isfinite(samples).all():
        raise ValueError("samples that are NaN or infinite")
    return np.rint(resample(to_mono(samples), own, rate) * 32768.0).clip(-32768, 32767).astype(np.int16)
