"""Audio classification: readers, damage, batches, networks and the baseline, runs and their reports."""

from __future__ import annotations

import shutil
from collections import Counter

import numpy as np
import polars as pl
import pytest
import soundfile
import torch

from damage import checks, finding
from fieldguide import open_run
from fieldguide.automl.fit import fit
from fieldguide.automl.request import read_for
from fieldguide.core.errors import DataError, SettingsError
from fieldguide.core.report_elements import Gallery, Sounds
from fieldguide.core.settings import Settings
from fieldguide.data import BadData, read, samples
from fieldguide.data.dataset import SECONDS
from fieldguide.data.media import audio
from fieldguide.data.samples import voice
from fieldguide.models import registry
from fieldguide.tasks.audio.audio_classification import AudioClassification, scale_waves
from fieldguide.tasks.audio.speech_recognition import SpeechRecognition

WORDS = ["one", "two", "six"]
CNN, MFCC = registry.card("simplecnn"), registry.card("mfcc-linear")


def sound(path, word="two", seed=0, rate=8000, channels=1):
    wave = voice.speak([word], voice.Voice(), np.random.default_rng(seed))
    wave = np.interp(np.arange(len(wave) * rate // 8000) * 8000 / rate, np.arange(len(wave)), wave).astype(np.float32)
    path.parent.mkdir(parents=True, exist_ok=True)
    soundfile.write(path, np.stack([wave] * channels, 1) if channels > 1 else wave, rate)
    return path


def ask(path, task=None, **more):
    request = {"data": str(path), "target": None, "kinds": {}, "roles": {}, "group": None, "time": None, "allow_bad": False}
    return read_for({**request, "task": task, **more})


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """Write six recordings of each of three words, one folder for each."""
    root = tmp_path_factory.mktemp("made")
    for k, word in enumerate(WORDS):
        for i in range(6):
            sound(root / word / f"r{i}.wav", word, 10 * k + i)
    return root


@pytest.fixture
def folder(made, tmp_path):
    return shutil.copytree(made, tmp_path / "data")


# Readers


def test_folder_for_each_class(folder):
    data, kind, _ = ask(folder)
    assert kind is AudioClassification and data.target.name == "label" and len(data) == 18
    assert data.rows["label"].to_list() == [name for name in sorted(WORDS) for _ in range(6)]
    assert not [f for f in data.findings if f.severity != "note"]
    for path in sorted(folder.rglob("*.wav")):
        part = "test" if path.stem in ("r4", "r5") else "train"
        target = folder / part / path.parent.name / path.name
        target.parent.mkdir(parents=True, exist_ok=True)
        path.rename(target)
    for word in WORDS:
        (folder / word).rmdir()
    data, kind, _ = ask(folder)
    assert kind is AudioClassification and Counter(data.splits) == {"train": 12, "test": 6}


def test_table_of_paths_and_labels(made, tmp_path):
    rows = [{"file": str(p.relative_to(made)), "label": p.parent.name} for p in sorted(made.rglob("*.wav"))]
    shutil.copytree(made, tmp_path / "data")
    pl.DataFrame(rows).write_csv(tmp_path / "data" / "labels.csv")
    data, kind, _ = ask(tmp_path / "data")
    assert kind is AudioClassification and data.target.name == "label" and data.columns["file"].kind == "audio"
    lone = tmp_path / "lone.parquet"  # a table elsewhere
    pl.DataFrame([{"what": r["label"], "where": str(made / r["file"])} for r in rows]).write_parquet(lone)
    data, kind, _ = ask(lone, target="what")
    assert kind is AudioClassification and data.columns["where"].kind == "audio" and len(data) == 18
    words = tmp_path / "words.csv"  # the name of the column says that these are transcripts
    pl.DataFrame([{"path": str(made / r["file"]), "transcript": r["label"]} for r in rows]).write_csv(words)
    assert ask(words)[1] is SpeechRecognition and ask(words, "audio-classification")[1] is AudioClassification


def test_names_of_spoken_digits(tmp_path):
    for digit in range(10):
        for speaker in ("ann", "bob"):
            for take in (0, 4, 5, 11):
                sound(tmp_path / "recordings" / f"{digit}_{speaker}_{take}.wav", seed=100 * digit + take + len(speaker))
    (tmp_path / "metadata.py").write_text("metadata = {}\n")
    data, kind, _ = ask(tmp_path, allow_bad=True)
    assert kind is AudioClassification and data.target.name == "label" and data.rows["label"].n_unique() == 10
    takes = [int(p.rpartition("_")[2].removesuffix(".wav")) for p in data.rows["audio"]]
    assert data.splits.tolist() == ["test" if take < 5 else "train" for take in takes]
    assert finding(data, "labels-of-names").severity == finding(data, "official-split").severity == "note"
    assert data.columns["speaker"].role == "ignored" and set(data.rows["speaker"]) == {"ann", "bob"}
    for path in list(tmp_path.rglob("9_*.wav")):  # nine digits are another data set: its split is ours to draw
        path.unlink()
    data = ask(tmp_path, allow_bad=True)[0]
    assert data.splits is None and data.rows["label"].n_unique() == 9
    sound(tmp_path / "recordings" / "intro.wav")  # not all names have the form: nothing is guessed
    with pytest.raises(DataError, match=r"a target column|a transcript column|cannot be inferred"):
        ask(tmp_path)


def test_speech_commands(made, tmp_path):
    speakers = [f"{i:08x}" for i in range(6)]
    for word in WORDS:
        for i, speaker in enumerate(speakers):
            (tmp_path / word).mkdir(exist_ok=True)
            shutil.copy(made / word / f"r{i}.wav", tmp_path / word / f"{speaker}_nohash_0.wav")
    sound(tmp_path / "_background_noise_" / "rain.wav")
    (tmp_path / "validation_list.txt").write_text("".join(f"{w}/{speakers[4]}_nohash_0.wav\n" for w in WORDS))
    (tmp_path / "testing_list.txt").write_text("".join(f"{w}/{speakers[5]}_nohash_0.wav\n" for w in WORDS))
    (tmp_path / "README.md").write_text("# commands\n")
    data, kind, _ = ask(tmp_path)
    assert kind is AudioClassification and set(data.rows["label"]) == set(WORDS)
    assert Counter(data.splits) == {"train": 12, "val": 3, "test": 3}
    assert data.columns["speaker"].role == "group" and finding(data, "noise-folder").count == 1
    (tmp_path / "two" / f"{speakers[5]}_nohash_0.wav").unlink()
    lost = finding(ask(tmp_path, allow_bad=True)[0], "missing-file")
    assert lost.places == (f"testing_list.txt:2 (two/{speakers[5]}_nohash_0.wav)",) and lost.unusable == 1
    (tmp_path / "testing_list.txt").write_text("elsewhere/a.wav\n")
    with pytest.raises(DataError, match=r"testing_list.txt: the list names none of the recordings"):
        ask(tmp_path)


def test_damaged_folders(folder):
    (folder / "one" / "r0.wav").write_bytes(b"")
    (folder / "one" / "r1.wav").write_bytes((folder / "one" / "r1.wav").read_bytes()[:2000])
    soundfile.write(folder / "two" / "r0.wav", np.zeros(0), 8000)
    (folder / "two" / "r1.wav").write_text("no sound at all")
    sound(folder / "six" / "r0.wav", "six", 70, rate=16000, channels=2)
    shutil.copy(folder / "six" / "r1.wav", folder / "two" / "r2.wav")  # the same sound, another class
    soundfile.write(folder / "six" / "r3.wav", np.full(4000, 1e-5), 8000)
    soundfile.write(folder / "six" / "r5.wav", np.sign(np.sin(np.arange(4000) / 9)), 8000)
    sound(folder / "lost.wav")
    (folder / "two" / "notes.rtf").write_text("a note")
    (folder / "Two").mkdir()
    shutil.copy(folder / "two" / "r5.wav", folder / "Two" / "r9.wav")
    (folder / "four").mkdir()
    (folder / "four" / "phone.m4a").write_bytes(b"\0\0\0 ftypM4A ")
    data = ask(folder, allow_bad=True)[0]
    expected = {
        "empty-file": ("one/r0.wav", 1),
        "truncated-sound": ("one/r1.wav", 1),
        "zero-length": ("two/r0.wav", 1),
        "corrupt-sound": ("two/r1.wav", 1),
        "no-class": ("lost.wav", 1),
        "stereo-sound": ("six/r0.wav", 0),
        "mixed-rates": ("six/r0.wav", 0),
        "silent-sound": ("six/r3.wav", 0),
        "clipped-sound": ("six/r5.wav", 0),
    }
    for check, (place, unusable) in expected.items():
        one = finding(data, check)
        assert place in one.places[0] and one.unusable == unusable and (one.remedy or one.severity == "note"), one
    assert {"conflicting-duplicate", "class-names-alike", "class-of-one"} <= checks(data)
    unread = [f for f in data.findings if f.check == "not-a-sound"]
    assert sum(f.count for f in unread) == 2 and any("phone.m4a" in f.places[0] for f in unread)
    with pytest.raises(BadData, match="examples are unusable"):
        ask(folder)


def test_data_that_lack_something(made, folder):
    with pytest.raises(DataError, match="one audio column"):
        ask("iris", "audio-classification")
    with pytest.raises(DataError, match="a target column"):
        ask(made / "one", "audio-classification")
    for word in WORDS[1:]:
        shutil.rmtree(folder / word)
    for path in (folder / "one").iterdir():
        path.rename(folder / path.name)
    with pytest.raises(DataError, match=r"a target column|cannot be inferred"):
        ask(folder, None)


# Preprocessing


def prepare(folder, **options):
    data = ask(folder)[0]
    return data, AudioClassification.fit(data, AudioClassification.options_from(options))


def test_options_chosen_from_the_data(folder):
    data, task = prepare(folder)
    o = task.options
    assert (o.rate, o.bands, o.side) == (8000, 40, 64) and o.seconds >= np.quantile(data.rows[SECONDS], 0.99)
    assert task.model_dims() == {"num_classes": 3, "channels": 1, "image": 64, "features": 40}
    assert task.smaller_inputs()[0][0] < 64 and task.with_input_size(32).options.side == 32 and task.options.side == 64
    _, other = prepare(folder, rate="16000", seconds="0.3", side="32")
    assert (other.mel.rate, other.mel.bands, other.options.side, other.smaller_inputs()) == (16000, 64, 32, [])
    assert any(note.startswith("18 training recordings are longer than 0.3 s") for note in other.notes)
    for wrong in ({"ratte": 1}, {"seconds": 0}, {"side": 4}):
        with pytest.raises(SettingsError, match=r"ratte|seconds|side"):
            prepare(folder, **wrong)


def test_batches_depend_on_the_generator_only(folder):
    data, task = prepare(folder)
    chance = lambda n: torch.Generator().manual_seed(n)
    batches = task.batches(data, CNN, Settings(augmentation="standard"))
    rows = np.array([4, 0, 7])
    plain, again = batches.make(rows, None), batches.make(rows, None)
    one, same, other = (batches.make(rows, chance(n)) for n in (3, 3, 4))
    assert all(torch.equal(plain[k], again[k]) for k in plain) and all(torch.equal(one[k], same[k]) for k in one)
    assert plain["image"].shape == (3, 1, 64, 64) and not torch.equal(one["image"], other["image"])
    assert not torch.equal(one["image"], plain["image"]) and one["target"].tolist() == plain["target"].tolist()
    untouched = task.batches(data, CNN, Settings(augmentation="none")).make(rows, chance(3))
    assert torch.equal(untouched["image"], plain["image"])
    alone = batches.make(rows[:1], None)  # nothing depends on the rows beside
    assert torch.allclose(alone["image"][0], plain["image"][0], atol=1e-5)
    heard = task.batches(data, MFCC, Settings())
    batch = heard.make(rows, None)
    assert list(batch) == ["features", "lengths", "target"] and batch["features"].shape[2] == 40
    mixed = task.batches(data, CNN, Settings(mixup=0.4)).make(rows, chance(3))
    assert mixed["target"].shape == (3, 3)
    with pytest.raises(SettingsError, match="mfcc-linear"):
        task.batches(data, MFCC, Settings(mixup=0.4))


def test_spectrograms_are_upright_and_centered(tmp_path):
    """A tone that rises from 500 to 3,500 Hz in the middle of the input is a line from the bottom left to the top right."""
    for k in range(4):
        time = np.arange(4000) / 8000
        tone = 0.5 * np.sin(2 * np.pi * (500 * time + 3000 * time**2) + k)
        path = tmp_path / "ab"[k % 2] / f"{k}.wav"
        path.parent.mkdir(exist_ok=True)
        soundfile.write(path, tone, 8000)
    data, task = prepare(tmp_path, seconds=1.0)
    image = task.batches(data, CNN).make(np.arange(1), None)["image"][0, 0]
    assert image[:, :12].abs().max() < 0.05 and image[:, -12:].abs().max() < 0.05  # a quarter of the time on each side
    waves, lengths = scale_waves(audio.load(data.rows["audio"].to_list()[:1], 8000))
    loud = task.mel.spectrogram(waves)[0, : int(task.mel.frames(lengths)[0])]
    canvas = task.draw(loud[None], torch.tensor([len(loud)]), torch.tensor([0.5]))[0, 0]
    rows = [int(canvas[:, column].argmax()) for column in (20, 32, 44)]
    assert rows[0] > rows[1] > rows[2]
    first = task.draw(loud[None], torch.tensor([len(loud)]), torch.tensor([0.0]))[0, 0]
    assert first[:, 40:].abs().max() < 1e-5 < first[:, :20].abs().max()


def test_longer_recordings_keep_their_middle(folder):
    _, task = prepare(folder, seconds=0.25)
    wave = np.arange(6000, dtype=np.int16)
    assert (
        task.cut(wave).tolist() == list(range(2000, 4000)) and task.cut(wave, 0.0)[0] == 0 and task.cut(wave, 1.0)[-1] == 5999
    )
    assert len(task.cut(wave[:100])) == 100


# Runs


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    out = tmp_path_factory.mktemp("run") / "words"
    return fit("words", out=out, model="mfcc-linear")


def test_baseline_is_a_model(run):
    assert run.scores["accuracy"] >= samples.SAMPLES["words"].reaches[1]
    page = (run.path / "report.html").read_text()
    for title in ("Spectrograms", "Correct predictions", "Accuracy by duration", "Confusion"):
        assert title in page


def test_predictions_of_files_and_folders(run, tmp_path):
    path = next((samples.path("words") / "seven").iterdir())
    [record] = run.predict(str(path))
    assert record["label"] == "seven" and record["probabilities"]["seven"] == record["probability"] > 0.3
    wave, rate = soundfile.read(path)
    soundfile.write(tmp_path / "a.flac", np.stack([wave] * 2, 1), 2 * rate)  # faster, stereo, another format
    soundfile.write(tmp_path / "b.wav", wave, rate)
    assert [r["label"] for r in run.predict(str(tmp_path))][1] == "seven"
    table = pl.DataFrame({"audio": [str(path)] * 2})
    assert [r["probability"] for r in run.predict(table)] == pytest.approx([record["probability"]] * 2)
    (tmp_path / "b.wav").write_bytes(b"RIFF")
    with pytest.raises(DataError, match=r"b\.wav"):
        run.predict(str(tmp_path / "b.wav"))
    assert open_run(run.path).evaluate("words")["scores"]["accuracy"] == pytest.approx(run.scores["accuracy"])


def test_recordings_and_pictures_of_the_report(run):
    data = read("words").take(np.arange(0, 800, 20))
    outputs, truth = run.outputs(data), run.task.targets(data)
    shown = run.task.report_elements(data, outputs, truth)["Errors"]
    pictures = next(e for e in shown if isinstance(e, Gallery))
    assert pictures.pictures and all(p.image[:4] == b"\x89PNG" for p in pictures.pictures)
    assert any(isinstance(e, Sounds) and e.sounds for e in shown)


@pytest.mark.slow
def test_network_learns_the_sample(tmp_path):
    """The floor of a small network alone, in steps, so that it does not depend on the machine."""
    settings = {
        "steps": 600,
        "batch": 32,
        "precision": "float32",
        "task.side": 32,
    }
    run = fit("words", out=tmp_path / "run", model="resnet20", settings=settings)
    assert run.scores["accuracy"] > 0.9
