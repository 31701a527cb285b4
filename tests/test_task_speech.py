"""Speech recognition: readers, checks of recordings, and the task from recordings to transcripts."""

from __future__ import annotations

import io
import json
import shutil

import numpy as np
import polars as pl
import pytest
import soundfile
import torch

from damage import checks, finding
from fieldguide import open_run
from fieldguide.automl.fit import NullCallback, build_plan, build_trainer, fit
from fieldguide.automl.request import read_for
from fieldguide.core.errors import DataError, SettingsError
from fieldguide.core.report_elements import Sounds
from fieldguide.core.settings import Settings
from fieldguide.data import read, samples
from fieldguide.data.dataset import HASH, RATE, SECONDS
from fieldguide.data.media import audio
from fieldguide.data.media.media_types import MEDIA
from fieldguide.data.preprocessing.transcripts import normalize_text
from fieldguide.data.samples import voice
from fieldguide.data.validation.checks import BadData
from fieldguide.models.registry import card
from fieldguide.tasks.audio.speech_recognition import SpeechRecognition, stack_waves

WORDS = list(voice.WORDS)
TASK = "automatic-speech-recognition"


def sound(path, words=("two",), seed=0, rate=8000, channels=1, form=None):
    """Write a synthetic recording at any sample rate, in the format of its suffix."""
    wave = voice.speak(list(words), voice.Voice(), np.random.default_rng(seed))
    wave = np.interp(np.arange(len(wave) * rate // 8000) * 8000 / rate, np.arange(len(wave)), wave).astype(np.float32)
    path.parent.mkdir(parents=True, exist_ok=True)
    soundfile.write(path, np.stack([wave] * channels, 1) if channels > 1 else wave, rate, format=form)
    return path


def asked(path, task=TASK, **more):
    return read_for(
        {
            "data": str(path),
            "target": None,
            "kinds": {},
            "roles": {},
            "group": None,
            "time": None,
            "allow_bad": False,
            "task": task,
            **more,
        }
    )


def said(i):
    return f"{WORDS[i % 10]} {WORDS[i * 7 % 10]}"


@pytest.fixture(scope="module")
def twelve(tmp_path_factory):
    """Write twelve recordings, r0.wav to r11.wav."""
    folder = tmp_path_factory.mktemp("twelve")
    for i in range(12):
        sound(folder / f"r{i}.wav", said(i).split(), i)
    return folder


@pytest.fixture
def folder(twelve, tmp_path):
    """Write a folder of twelve recordings and a table of transcripts."""
    shutil.copytree(twelve, tmp_path / "data" / "wav")
    table(tmp_path / "data", [(f"wav/r{i}.wav", said(i)) for i in range(12)])
    return tmp_path / "data"


def table(folder, rows, names=("file", "transcript")):
    pl.DataFrame(rows, schema=list(names), orient="row").write_csv(folder / "transcripts.csv")


# The check of single recordings


@pytest.mark.parametrize("suffix", ["wav", "flac", "ogg", "mp3", "aiff"])
def test_complete_recordings_of_each_format(tmp_path, suffix):
    path = sound(tmp_path / f"a.{suffix}", ["seven", "six"], rate=16000)
    found = audio.check_one(path)
    assert (found.problem, found.traits, found.rate, found.channels) == ("", (), 16000, 1)
    assert found.seconds == pytest.approx(soundfile.info(path).duration) and found.seconds > 0.5
    assert found.sha256 and found.samples and found.bytes == path.stat().st_size
    [wave] = audio.load([path], 8000)
    assert wave.dtype == np.int16 and len(wave) == -(-soundfile.info(path).frames // 2)


@pytest.mark.parametrize("suffix", ["wav", "flac", "ogg", "mp3"])
def test_truncated_recordings(tmp_path, suffix):
    path = sound(tmp_path / f"a.{suffix}", ["seven", "six", "nine"], rate=16000)
    content = path.read_bytes()
    for share in (0.9, 0.5):
        path.write_bytes(content[: int(share * len(content))])
        found = audio.check_one(path)
        assert found.problem == "truncated-sound" and found.detail, (suffix, share, found)


def test_ogg_files_whose_end_is_not_marked_are_read(tmp_path):
    """Some encoders do not mark the last page. The checksum of the page is corrected as well, as libogg ignores pages without."""
    path = sound(tmp_path / "a.ogg", ["seven", "six", "nine"], rate=16000)
    content = bytearray(path.read_bytes())
    at = content.rfind(b"OggS")
    content[at + 5] &= ~4
    content[at + 22 : at + 26] = bytes(4)
    content[at + 22 : at + 26] = compute_ogg_checksum(content[at:]).to_bytes(4, "little")
    path.write_bytes(content)
    found = audio.check_one(path)
    assert found.problem == "" and found.traits == ("unmarked-end",)
    path.write_bytes(content[:-5])
    assert audio.check_one(path).problem == "truncated-sound"


def compute_ogg_checksum(page: bytes) -> int:
    """Return the checksum of a page (RFC 3533, section 6): polynomial 0x04c11db7, no reflection."""
    value = 0
    for byte in page:
        value ^= byte << 24
        for _ in range(8):
            value = (value << 1) ^ 0x04C11DB7 if value & 1 << 31 else value << 1
        value &= 0xFFFFFFFF
    return value


def test_other_files_are_rejected(tmp_path):
    files = {"empty.wav": b"", "text.wav": b"this is a text, not a sound", "notes.txt": b"something else altogether"}
    for name, content in files.items():
        (tmp_path / name).write_bytes(content)
    soundfile.write(tmp_path / "none.wav", np.zeros(0), 8000)
    (tmp_path / "phone.m4a").write_bytes(b"\0\0\0 ftypM4A ")
    problems = {name: audio.check_one(tmp_path / name).problem for name in [*files, "none.wav", "phone.m4a", "gone.wav"]}
    assert problems == {
        "empty.wav": "empty-file",
        "text.wav": "corrupt-sound",
        "notes.txt": "not-a-sound",
        "none.wav": "zero-length",
        "phone.m4a": "not-a-sound",
        "gone.wav": "missing-file",
    }
    assert set(problems.values()) <= set(MEDIA["audio"].problems)
    assert ".flac" in audio.check_one(tmp_path / "phone.m4a").detail
    with pytest.raises(DataError, match=r"gone\.wav"):
        audio.load([tmp_path / "gone.wav"], 8000)


def test_recording_traits(tmp_path):
    wave = voice.speak(["one"], voice.Voice(), np.random.default_rng(0))
    soundfile.write(tmp_path / "stereo.wav", np.stack([wave, 0 * wave], 1), 8000)
    soundfile.write(tmp_path / "silent.wav", wave * 1e-4, 8000)
    soundfile.write(tmp_path / "clipped.wav", (wave * 30).clip(-1, 1), 8000)
    shutil.copy(tmp_path / "stereo.wav", tmp_path / "named.flac")
    traits = {n: audio.check_one(tmp_path / n).traits for n in ("stereo.wav", "silent.wav", "clipped.wav", "named.flac")}
    assert traits == {
        "stereo.wav": ("stereo",),
        "silent.wav": ("silent",),
        "clipped.wav": ("clipped",),
        "named.flac": ("stereo", "wrong-extension"),
    }
    [half] = audio.load([tmp_path / "stereo.wav"], 8000)  # the mean of both channels
    assert np.abs(half / 32768 - wave / 2).max() < 1e-4


def test_equal_audio_has_equal_digests(tmp_path):
    first = sound(tmp_path / "a.wav", ["two"], 1)
    wave, rate = soundfile.read(first, dtype="int16")
    soundfile.write(tmp_path / "b.flac", wave, rate)
    sound(tmp_path / "c.wav", ["two"], 2)
    soundfile.write(tmp_path / "d.wav", wave, 2 * rate)  # the same samples, played faster
    a, b, c, d = (audio.check_one(tmp_path / n).samples for n in ("a.wav", "b.flac", "c.wav", "d.wav"))
    assert a == b and len({a, c, d}) == 3


# Folders


def test_folder_with_a_table(folder):
    data, kind, _ = asked(folder, None)  # recognised without --task
    assert kind is SpeechRecognition and data.target.name == "transcript" and data.columns["file"].kind == "audio"
    assert len(data) == 12 and data.rows["transcript"][3] == said(3) and data.locate_row(3) == "transcripts.csv:5"
    assert data.rows[RATE].to_list() == [8000] * 12 and data.rows[SECONDS].min() > 0.3 and data.rows[HASH].n_unique() == 12
    assert not [f for f in data.findings if f.severity != "note"]


@pytest.mark.parametrize("form", ["stem", "name", "absolute", "windows"])
def test_recording_names_in_any_form(folder, form):
    written = {"stem": "r{}", "name": "r{}.wav", "absolute": f"{folder}/wav/r{{}}.wav", "windows": ".\\wav\\r{}.wav"}[form]
    table(folder, [(said(i), written.format(i)) for i in range(12)], ("text", "clip"))
    data, *_ = asked(folder)
    assert data.target.name == "text" and [str(folder / f"wav/r{i}.wav") for i in range(12)] == data.rows["clip"].to_list()


def test_table_formats(folder):
    rows = [{"path": f"wav/r{i}.wav", "sentence": said(i), "speaker": i % 3} for i in range(12)]
    (folder / "transcripts.csv").unlink()
    (folder / "all.jsonl").write_text("\n".join(map(json.dumps, rows)))
    data, kind, _ = asked(folder, None)
    assert kind is SpeechRecognition and data.target.name == "sentence" and len(data) == 12
    pl.DataFrame(rows).write_parquet(folder / "all.parquet")
    (folder / "all.jsonl").unlink()
    assert asked(folder)[0].target.name == "sentence"
    lone = folder.parent / "lone.csv"  # a table elsewhere, by the values of a column
    pl.DataFrame({"where": [str(folder / r["path"]) for r in rows], "words": [r["sentence"] for r in rows]}).write_csv(lone)
    data = asked(lone)[0]
    assert data.columns["where"].kind == "audio" and data.target.name == "words" and read(lone).columns["where"].kind == "audio"


def test_text_file_next_to_each_recording(twelve, tmp_path):
    for i in range(12):
        part = tmp_path / ("test" if i > 9 else "train")
        part.mkdir(exist_ok=True)
        shutil.copy(twelve / f"r{i}.wav", part)
        (part / f"r{i}.txt").write_text(said(i) + "\n")
    data, kind, _ = asked(tmp_path, None)
    assert kind is SpeechRecognition and (data.splits == "test").sum() == 2 and len(data) == 12
    assert set(zip(data.rows["audio"].str.extract(r"(r\d+)\.wav"), data.rows["transcript"])) == {
        (f"r{i}", said(i)) for i in range(12)
    }
    (tmp_path / "train" / "r3.txt").unlink()
    (tmp_path / "train" / "r4.txt").write_bytes(b"two\0three")
    (tmp_path / "train" / "r5.txt").write_bytes("fünf".encode("latin-1"))
    (tmp_path / "train" / "more.txt").write_text("nobody says this")
    data = asked(tmp_path, allow_bad=True)[0]
    assert len(data) == 10 and "fünf" in data.rows["transcript"].to_list()
    assert finding(data, "no-transcript").places == ("train/r3.wav",) and finding(data, "no-transcript").unusable == 1
    assert "train/r4.txt" in finding(data, "unreadable-text").places[0] and finding(data, "encoding")
    assert finding(data, "no-recording").places == ("train/more.txt",)


def test_lj_speech(twelve, tmp_path):
    shutil.copytree(twelve, tmp_path / "wavs")
    lines = [f'r{i}|Take "{i}"|{said(i)}' for i in range(12)]
    (tmp_path / "metadata.csv").write_text("\n".join(lines) + "\n")
    data, kind, _ = asked(tmp_path, None)
    assert kind is SpeechRecognition and data.rows["transcript"].to_list() == [said(i) for i in range(12)]  # normalised
    assert data.locate_row(4) == "metadata.csv:5" and data.rows["audio"][4].endswith("wavs/r4.wav")
    lines[1] = 'r1|He said "no'  # two cells, and a lone quotation mark
    lines[2] = "r2|one|two|three"
    lines[3] = "r3||"
    lines[4] = "gone|one|one"
    lines[5] = "r1|another|another"
    lines.append("")
    (tmp_path / "metadata.csv").write_bytes("\n".join(lines).replace(said(6), "grüße").encode("cp1252"))
    data = asked(tmp_path, allow_bad=True)[0]
    assert data.rows["transcript"].to_list() == [said(0), 'He said "no', "grüße", *(said(i) for i in range(7, 12))]
    expected = {
        "wrong-cells": ("metadata.csv:3 has 4", 1),
        "target-missing": ("metadata.csv:4", 1),
        "missing-file": ("metadata.csv:5", 1),
        "duplicate-id": ("metadata.csv:6 (r1.wav)", 1),
    }
    for check, (place, unusable) in expected.items():
        one = finding(data, check)
        assert one.places[0].startswith(place) and one.unusable == unusable and one.remedy and one.count == 1, one
    assert finding(data, "encoding") and finding(data, "file-without-row").count == 3  # r2 r4 r5
    with pytest.raises(BadData, match="4 of 12 examples are unusable"):
        asked(tmp_path)


def test_common_voice(twelve, tmp_path):
    shutil.copytree(twelve, tmp_path / "clips")
    for name, rows in {"train": range(6), "dev": range(6, 8), "test": range(8, 12), "invalidated": range(3)}.items():
        lines = ["client_id\tpath\tsentence\tup_votes", *(f"s{i % 3}\tr{i}.wav\t{said(i)}\t2" for i in rows)]
        (tmp_path / f"{name}.tsv").write_text("\n".join(lines) + "\n")
    data, kind, _ = asked(tmp_path, None)
    assert kind is SpeechRecognition and [int((data.splits == s).sum()) for s in ("train", "val", "test")] == [6, 2, 4]
    assert data.columns_with_role("group")[0].name == "client_id" and finding(data, "other-files").places == (
        "invalidated.tsv",
    )
    lines = (tmp_path / "train.tsv").read_text().split("\n")
    lines[1] = 's0\tr0.wav\t"""Two,"" he said."\t2'
    lines[2] = "s1\tr1.wav\tone\ttwo\t2"
    lines[3] = "s2\tgone.mp3\tone\t2"
    lines[4] = "s2\t\tone\t2"
    lines[5] = "s2\tr8.wav\tone\t2"
    lines[6] = "s2\t\ttwo\t2"
    (tmp_path / "train.tsv").write_text("\n".join(lines))
    (tmp_path / "clips" / "r11.wav").write_bytes((tmp_path / "clips" / "r11.wav").read_bytes()[:2000])
    data = asked(tmp_path, allow_bad=True)[0]
    assert '"Two," he said.' in data.rows["transcript"].to_list()
    assert finding(data, "wrong-cells").places == ("train.tsv:3 has 5",)
    assert "gone.mp3" not in "".join(data.rows["audio"]) and finding(data, "missing-file").count == 3
    assert "train.tsv:4" in finding(data, "missing-file").places[0] and "r11" not in "".join(data.rows["audio"])
    assert "test.tsv:5" in finding(data, "truncated-sound").places[0]
    assert finding(data, "duplicate-id").places == ("train.tsv:6 (r8.wav)",) and len(data.splits) == len(data)
    (tmp_path / "dev.tsv").write_text("client_id\tfile\tsentence\nx\ty\tz\n")
    with pytest.raises(DataError, match=r"dev.tsv:1: the column 'path' is missing"):
        asked(tmp_path)


def test_damaged_folders(folder):
    rows = [(f"wav/r{i}.wav", said(i)) for i in range(12)]
    wav = folder / "wav"
    rows[0] = ("wav/r0.wav", None)  # nothing said
    rows[1] = ("wav/nowhere.wav", "one")
    (wav / "r2.wav").write_bytes(b"")
    (wav / "r3.wav").write_bytes((wav / "r3.wav").read_bytes()[:3000])
    soundfile.write(wav / "r4.wav", np.zeros(0), 8000)
    (wav / "r5.wav").write_text("no sound at all")
    sound(wav / "r6.wav", said(6).split(), 6, rate=16000, channels=2)
    shutil.copy(wav / "r7.wav", wav / "r8.wav")  # the same sound, another transcript
    rows[9] = ("wav/r9.wav", "a very long story that nobody can tell in so little time as this one takes " * 2)
    rows.append(("wav/r10.wav", "ten"))
    sound(wav / "extra.wav", ["one"])
    table(folder, rows)
    data = asked(folder, allow_bad=True)[0]
    expected = {
        "target-missing": (2, 1),
        "missing-file": (3, 1),
        "empty-file": (4, 1),
        "truncated-sound": (5, 1),
        "zero-length": (6, 1),
        "corrupt-sound": (7, 1),
        "stereo-sound": (8, 0),
        "mixed-rates": (8, 0),
        "conflicting-duplicate": (10, 0),
        "unlike-lengths": (11, 0),
        "repeated-recording": (12, 0),
    }
    for check, (line, unusable) in expected.items():
        one = next(f for f in data.findings if f.check == check)
        assert f"transcripts.csv:{line}" in one.places[0] and one.unusable == unusable, one
        assert one.count >= 1 and (one.remedy or one.severity == "note"), one
    assert "8,000 Hz" in finding(data, "mixed-rates").what and "16,000 Hz (1)" in finding(data, "mixed-rates").what
    assert finding(data, "file-without-row").places == ("wav/extra.wav", "wav/r1.wav")
    assert len(data) == 7 and "duplicate" in checks(data)
    with pytest.raises(BadData, match="6 of 13 examples are unusable"):
        asked(folder)


def test_unmatched_tables_are_rejected(folder):
    table(folder, [(f"take {i}", said(i)) for i in range(12)])
    with pytest.raises(
        DataError, match=r"no column of transcripts.csv \(file, transcript\) contains the names of the recordings"
    ):
        asked(folder)
    shutil.copytree(folder / "wav", folder / "more")  # two folders with files of the same names
    table(folder, [(f"r{i}.wav", said(i)) for i in range(12)])
    with pytest.raises(BadData, match="recordings that do not exist"):
        asked(folder)
    assert finding(asked_findings(folder), "ambiguous-name").count == 12
    (folder / "transcripts.csv").unlink()
    with pytest.raises(DataError, match="a transcript column"):  # recordings alone say nothing
        asked(folder / "wav")


def asked_findings(path):
    with pytest.raises(BadData) as caught:
        asked(path)
    return list(caught.value.findings)


# Preparation


def prepared(folder, **options):
    data = asked(folder)[0]
    return data, SpeechRecognition.fit(data, SpeechRecognition.options_from(options))


def test_options_chosen_from_the_data(folder):
    data, task = prepared(folder)
    o = task.options
    assert (o.rate, o.bands, o.scale, o.masks, o.longest) == (8000, 40, "corpus", False, 30.0)
    assert task.mel.mean and task.model_dims() == {"vocab_size": task.transcripts.size, "features": 40}
    assert [c.name for c in task.columns] == ["file", "transcript"] and task.longest_seconds == data.rows[SECONDS].max()
    _, other = prepared(folder, rate="16000", scale="recording", hop="0.01")
    assert (other.mel.rate, other.mel.bands, other.mel.hop, other.mel.mean) == (16000, 80, 0.01, ())
    with pytest.raises(SettingsError, match="ratte"):
        SpeechRecognition.options_from({"ratte": 1})
    with pytest.raises(DataError, match=r"longer than 0\.1 s"):
        prepared(folder, longest="0.1")


def test_long_recordings_are_noted_and_not_trained_on(folder):
    data = asked(folder)[0]
    cut = float(data.rows[SECONDS].sort()[8])
    _, task = prepared(folder, longest=str(cut))
    assert any(n.startswith("3 recordings are longer") for n in task.notes)
    assert (
        len(task.train_batches(data, card("conformer"), Settings())) == 9
        and len(task.batches(data, card("conformer"), Settings())) == 12
    )
    _, tight = prepared(folder, hop="0.1")
    assert any("fewer frames than their transcripts need" in n for n in tight.notes)


def test_batches_depend_on_the_generator_only(folder):
    data, task = prepared(folder, masks="true")
    chance = lambda n: torch.Generator().manual_seed(n)
    batches = task.batches(data, card("conformer"), Settings(augmentation="standard"))
    rows = np.array([4, 0, 7])
    plain, again = batches.make(rows, None), batches.make(rows, None)
    one, same, other = (batches.make(rows, chance(n)) for n in (3, 3, 4))
    assert all(torch.equal(plain[k], again[k]) for k in plain) and all(torch.equal(one[k], same[k]) for k in one)
    assert one["features"].shape != other["features"].shape or not torch.equal(one["features"], other["features"])
    assert not torch.equal(one["lengths"], plain["lengths"])  # speed
    light = task.batches(data, card("conformer"), Settings(augmentation="none")).make(rows, chance(3))
    hidden = task.batches(data, card("conformer"), Settings(augmentation="standard")).make(rows, chance(3))
    without = task.batches(data, card("conformer"), Settings(augmentation="light")).make(rows, chance(3))
    assert torch.equal(light["features"], plain["features"])  # none: as it is
    assert torch.equal(hidden["lengths"], without["lengths"])
    assert (hidden["features"] == 0).sum() > (without["features"] == 0).sum()  # standard hides stripes, light does not
    assert [task.transcripts.decode(r) for r in plain["target"].tolist()] == [said(i) for i in rows]
    wave, _ = stack_waves(audio.load(data.rows["file"].to_list()[:2], 8000))
    assert wave.abs().max().item() == pytest.approx(voice.Voice.loudness, abs=0.02)
    alone = batches.make(rows[:1], None)  # nothing depends on the rows beside
    n = int(alone["lengths"][0])
    assert torch.allclose(alone["features"][0, :n], plain["features"][0, :n], atol=1e-5)


def test_scores_are_computed_over_the_corpus(folder):
    data, task = prepared(folder)
    truth = task.targets(data)
    assert task.score({"text": truth["text"]}, truth) == {"wer": 0.0, "cer": 0.0}
    wrong = truth["text"].copy()
    wrong[:6] = ["", "one two three", *(t.split()[0] for t in wrong[2:6])]
    assert task.score({"text": wrong}, truth)["wer"] == pytest.approx((2 + errors("one two three", truth["text"][1]) + 4) / 24)
    path = np.array([[0, 3, 3, 0, 3, 5, 5, -1], [2, 2, 2, 4, 0, -1, -1, -1]])
    symbols = task.transcripts.symbols
    assert task.texts({"path": path}).tolist() == [symbols[2] * 2 + symbols[4], symbols[1] + symbols[3]]
    low, high = task.intervals({"text": wrong}, truth)["wer"]
    rate = task.score({"text": wrong}, truth)["wer"]
    assert low < rate < high and (low + high) / 2 == pytest.approx(rate, abs=0.05)
    assert task.intervals({"text": truth["text"]}, truth)["wer"] == (0, 0)
    often = data.take([0, 5, 3, 5, 7, 5])
    assert task.baselines(often, data)[0].outputs["text"].tolist() == [said(5)] * 12
    _, upper = prepared(folder, lower="false")
    assert normalize_text("Two", True) == "two" and upper.transcripts.lower is False


def errors(a, b):
    from fieldguide.metrics.speech import count_edits

    return int(count_edits([b], [a]).errors[0])


def test_word_times(folder):
    _, task = prepared(folder)
    index = task.transcripts.index
    symbols = [index[c] for c in "two six"]
    outputs = {
        "said": np.array([[*symbols, -1]]),
        "first": np.array([[2, 4, 5, 8, 10, 12, 13, -1]]),
        "end": np.array([[3, 5, 7, 9, 11, 13, 15, -1]]),
        "text": np.array(["two six"]),
        "sure": np.array([0.9]),
    }
    second = 4 * task.mel.hop
    assert task.format_predictions(outputs) == [
        {
            "text": "two six",
            "sure": 0.9,
            "words": [
                {"word": "two", "start": round(2 * second, 3), "end": round(7 * second, 3)},
                {"word": "six", "start": round(10 * second, 3), "end": round(15 * second, 3)},
            ],
        }
    ]


class Near(torch.nn.Module):
    """Returns the means of each four frames and of their neighbors: its receptive field is short, so that chunks must equal the
    whole recording.
    """

    stride = 4

    def __init__(self):
        super().__init__()
        self.seen = []

    def frames(self, lengths):
        return (lengths + 3) // 4

    def forward(self, features, lengths):
        self.seen.append(tuple(features.shape[:2]))
        real = torch.arange(features.shape[1]) < lengths[:, None]
        x = torch.nn.functional.pad(features * real[..., None], (0, 0, 0, -features.shape[1] % 4))
        x = torch.nn.functional.pad(x.unflatten(1, (-1, 4)).mean(2), (0, 0, 1, 1))
        return (x[:, :-2] + x[:, 1:-1] + x[:, 2:]) / 3


def test_long_recordings_are_processed_in_chunks(folder):
    _, task = prepared(folder)
    task.predict_options = task.parse_predict_options({"chunk": "0.8"})
    size, overlap = task.chunk_frames()
    assert size % 8 == overlap % 8 == 0 and abs(size * task.mel.hop - 0.8) < 0.05 and size / 8 < overlap <= size / 4
    lengths = torch.tensor([501, 30, 222, 17, 64])
    features = torch.randn(5, 501, 5) * (torch.arange(501) < lengths[:, None])[..., None]
    model = Near()
    heard, frames = task.compute_logits(model, features, lengths)
    assert max(steps for _, steps in model.seen) == size and (3, 64) in model.seen and frames.tolist() == [126, 8, 56, 5, 16]
    for i, n in enumerate(frames.tolist()):
        whole = Near()(features[i : i + 1, : lengths[i]], lengths[i : i + 1])[0]
        assert torch.allclose(heard[i, :n], whole, atol=1e-6), i
    task.predict_options = task.parse_predict_options({})
    assert task.chunk_frames()[0] * task.mel.hop == pytest.approx(10, abs=0.1)


# From data to answers


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return fit("spoken", minutes=0, out=tmp_path_factory.mktemp("speech") / "run", settings=QUICK)


QUICK = {
    "steps": 100,
    "batch": 32,
    "precision": "float32",
    "evaluate": 50,
    "lr": 4e-3,
    "model.dropout": 0.0,
    "model.depth": 1,
    "task.hop": 0.0125,
    "augment": "none",
}


def test_network_learns_to_transcribe(run):
    baseline = run.record["scores"]["baselines"][0]["scores"]
    assert run.scores["wer"] < 0.35 and run.scores["cer"] < 0.25 and baseline["wer"] > 0.8 and "loss" not in baseline
    low, high = run.record["scores"]["intervals"]["wer"]
    assert low <= run.scores["wer"] <= high
    page = (run.path / "report.html").read_text()
    assert "media-src data:" in page and 'src="data:audio/' in page and "Confused words" in page
    assert "Transcripts during training" in page and len(page) < 3_000_000


def test_predict_reads_any_recording(run, tmp_path):
    path = sound(tmp_path / "said.flac", ["three", "six"], seed=5, rate=16000, channels=2)
    [answer] = run.predict(str(path))
    assert set(answer) == {"input", "text", "sure", "words"} and answer["input"].endswith("said.flac")
    assert answer["text"] == " ".join(w["word"] for w in answer["words"]) and 0 < answer["sure"] <= 1
    length = soundfile.info(path).duration
    times = [t for w in answer["words"] for t in (w["start"], w["end"])]
    assert times == sorted(times) and times[-1] <= length + 0.1
    beams = run.predict(str(path), beams=4)[0]
    assert beams["text"].split()[:1] == answer["text"].split()[:1]
    long = tmp_path / "long.wav"  # three times the longest it was trained on
    rng = np.random.default_rng(3)
    soundfile.write(long, np.concatenate([voice.speak(["two", "six"], voice.Voice(), rng) for _ in range(12)]), 8000)
    whole, parts = (run.predict(str(long), chunk=c)[0]["text"].split() for c in (40, 2.0))
    assert abs(len(parts) - len(whole)) <= 8 and len(parts) >= 12
    folder = run.predict(str(samples.path("spoken") / "recordings"))
    assert len(folder) == 600
    (tmp_path / "bad.wav").write_bytes(path.read_bytes()[:900])
    with pytest.raises(DataError, match=r"bad.wav"):
        run.predict(str(tmp_path / "bad.wav"))


def test_search_with_a_language_model(run, tmp_path):
    """Its n-grams are those of the training transcripts, saved with the run."""
    path = str(sound(tmp_path / "a.wav", ["seven"], 3))
    again = open_run(run.path)
    assert again.task.ngrams.counts == run.task.ngrams.counts and again.task.ngrams.size == again.task.transcripts.size
    [record] = again.predict(path, num_beams=8, language_weight=0.5, symbol_bonus=0.5)
    assert record["text"] and again.predict(path, num_beams=8)[0]["text"]
    with pytest.raises(SettingsError, match="num_beams"):
        again.predict(path, language_weight=0.5)
    again.task.ngrams = None
    with pytest.raises(SettingsError, match="n-gram model of transcripts"):
        again.predict(path, num_beams=4, language_weight=0.5)


def test_evaluate_scores_the_test_rows(run):
    again = open_run(run.path).evaluate("spoken")
    assert again["scores"] == pytest.approx(run.scores) and again["rows"] == 120 and "test rows" in again["note"]


def test_recordings_can_be_played(run):
    task = run.task
    with np.load(run.path / "splits.npz") as splits:
        data = read("spoken", column_spec=task.column_spec).take(splits["test"][:20])
    outputs, truth = run.outputs(data), task.targets(data)
    shown = task.report_elements(data, outputs, truth, run.objective)
    lists = [e for e in shown["Recordings"] if isinstance(e, Sounds)]
    assert lists
    wave, rate = soundfile.read(io.BytesIO(lists[-1].sounds[0].sound))
    assert rate == 8000 and len(wave) > 1000 and np.abs(wave).max() > 0.05


class Quiet(NullCallback):
    """Stops before a step is counted, like a killed process."""

    def __init__(self, stop=-1):
        self.stop = stop

    def on_step(self, step, losses):
        if step == self.stop:
            raise KeyboardInterrupt


def test_resumed_training_equals_uninterrupted(tmp_path):
    """Order, speed and masks depend on the step only."""
    data = asked("spoken")[0].take(np.arange(80))

    def loop(folder, stop=-1):
        folder.mkdir(exist_ok=True)
        plan = build_plan(
            data,
            task=TASK,
            model="conformer-test",
            settings={"steps": 8, "batch": 16, "precision": "float32", "evaluate": 4, "task.masks": True, "checkpoint": 0},
        )
        return build_trainer(plan, Quiet(stop), folder)

    whole = loop(tmp_path / "whole")
    whole.train()
    with pytest.raises(KeyboardInterrupt):
        loop(tmp_path / "half", stop=5).train()
    second = loop(tmp_path / "half")
    assert second.resume() and 0 < second.state.step < 8
    second.train()
    for (name, a), b in zip(whole.objective.state_dict().items(), second.objective.state_dict().values()):
        assert torch.equal(a, b), name
