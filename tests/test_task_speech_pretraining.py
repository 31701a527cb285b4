"""Pre-training on recordings: both objectives from data to run, predictions, and other tasks that start from such a run."""

from __future__ import annotations

import json
import shutil

import numpy as np
import pytest
import torch
from jsonschema import Draft202012Validator

import fieldguide
from fieldguide import fit, open_run
from fieldguide.core.errors import DataError, SettingsError
from fieldguide.data import read
from fieldguide.data.samples import speech, voice
from fieldguide.inference.predictor import TaskPredictor
from fieldguide.models import registry
from fieldguide.objectives.contrastive_frames import ContrastiveFrames
from fieldguide.objectives.masked_clusters import MaskedClusters
from fieldguide.tasks import infer_task, task
from fieldguide.tasks.audio.speech_pretraining import SpeechPretraining

RATE = voice.RATE
STEM = {"model.stem_dims": (8,) * 5, "model.stem_kernels": (10, 8, 4, 4, 4), "model.stem_strides": (5, 4, 2, 2, 2)}
QUICK = {"steps": 4, "batch": 8, "evaluate": 2, "precision": "float32", "model.mask_time": 0.05, **STEM}
CLUSTERS = {"task.objective": "clusters", "task.clusters": 12}


@pytest.fixture(scope="module")
def recordings(tmp_path_factory):
    """Write 40 recordings of one to three words."""
    folder, rng = tmp_path_factory.mktemp("recordings"), np.random.default_rng(0)
    words = list(voice.WORDS)
    for i in range(40):
        sound = voice.speak([str(w) for w in rng.choice(words, 1 + i % 3)], voice.Voice.sample(rng), rng)
        speech.write_wave(folder / f"r{i:02d}.wav", sound, RATE)
    return folder


@pytest.fixture(scope="module")
def contrastive(recordings, tmp_path_factory):
    out = tmp_path_factory.mktemp("runs") / "contrastive"
    return fit(recordings, task="speech-pretraining", model="wav2vec2-test", out=out, settings=QUICK)


@pytest.fixture(scope="module")
def clusters(recordings, tmp_path_factory):
    out = tmp_path_factory.mktemp("runs") / "clusters"
    return fit(recordings, task="speech-pretraining", model="hubert-test", out=out, settings={**QUICK, **CLUSTERS})


def load(source, **options):
    kind = SpeechPretraining
    chosen = kind.options_from({"rate": RATE, **options})
    data = kind.build_examples(kind.select_columns(read(source, column_spec=kind.column_spec)), chosen)
    return kind.fit(data, chosen), data


def test_recordings_alone_are_pretrained_on(recordings, tmp_path):
    assert task("speech-pretraining") is SpeechPretraining
    with pytest.raises(DataError, match="--task speech-pretraining"):  # labels may have been forgotten
        infer_task(read(recordings))
    names = [str(p) for p in sorted(recordings.glob("*.wav"))[:12]]
    (tmp_path / "list.csv").write_text("\n".join(["path", *names]))
    (tmp_path / "list.jsonl").write_text("\n".join(json.dumps({"path": name}) for name in names))
    for file in ("list.csv", "list.jsonl"):
        fitted, data = load(tmp_path / file)
        assert fitted.column == "path" and len(data) == 12
    labeled = tmp_path / "labeled"
    for i, name in enumerate(names):
        (labeled / str(i % 2)).mkdir(parents=True, exist_ok=True)
        shutil.copy(name, labeled / str(i % 2))
    assert infer_task(read(labeled))[0].name == "audio-classification"
    assert len(load(labeled)[1]) == 12
    (tmp_path / "texts.csv").write_text("a,b\nx,y\nz,w\n")
    with pytest.raises(DataError, match="one audio column"):
        fit(tmp_path / "texts.csv", task="speech-pretraining", out=tmp_path / "run")


def test_runs_say_how_good_chance_is(contrastive, clusters):
    for run, baseline in ((contrastive, "chance"), (clusters, "most frequent cluster")):
        scores = run.record["scores"]
        assert set(scores["test"]) == {"accuracy", "loss", "code_perplexity"}
        known = scores["baselines"][0]
        assert known["name"] == baseline and 0 < known["scores"]["accuracy"] < 0.6 and known["scores"]["loss"] > 1
        page = (run.path / "report.html").read_text()
        assert "Use of the codes" in page and "Hardest recordings" in page
        low, high = scores["intervals"]["accuracy"]
        assert low <= scores["test"]["accuracy"] <= high
    assert contrastive.record["scores"]["test"]["code_perplexity"] <= 5
    assert clusters.record["scores"]["test"]["code_perplexity"] <= 12


def test_chance_is_that_of_random_guesses(recordings):
    fitted, data = load(recordings, distractors=7)
    found = fitted.baselines(data, data)[0].outputs
    objective = fitted.build_objective(fitted.grid, ("waveform", "lengths"), 0.0).eval()
    batch = objective.hide(fitted.batches(data, None).make(np.arange(8), None))
    rng = np.random.default_rng(0)
    for row in range(8):
        frames = batch["hidden"][row].nonzero()[:, 0].tolist()
        wins = 0
        for _ in range(400):
            appeal = rng.random(batch["hidden"].shape[1])  # of each frame
            wins += sum(all(appeal[s] > appeal[d] for d in batch["distractors"][row, s].tolist() if d != s) for s in frames)
        assert found["right"][row] == pytest.approx(wins / 400, rel=0.15)
        assert found["count"][row] == len(frames)
        assert found["nats"][row] == pytest.approx(len(frames) * np.log(8))


def test_most_frequent_cluster_is_counted(clusters, recordings):
    data = SpeechPretraining.select_columns(read(recordings, column_spec=SpeechPretraining.column_spec))
    fitted = open_run(clusters.path).task
    found = fitted.baselines(data, data)[0].outputs
    labels = np.concatenate([fitted.known[path] for path in data.rows["audio"].to_list()])
    best = np.bincount(labels).argmax()
    outputs = TaskPredictor(fitted, clusters.card, clusters.objective).run_batches(fitted, fitted.batches(data, clusters.card))
    assert found["count"].tolist() == outputs["count"].tolist()
    objective = fitted.build_objective(fitted.grid, ("waveform", "lengths"), 0.0).eval()
    assert isinstance(objective, MaskedClusters)
    batch = objective.hide(fitted.batches(data, None).make(np.arange(40), None))
    target = objective.align(batch, batch["hidden"].shape[1])
    assert found["right"].tolist() == ((target == best) & batch["hidden"]).sum(1).tolist()


def test_codes_are_predicted(contrastive, clusters, recordings):
    path = str(recordings / "r02.wav")
    for run, books in ((contrastive, 2), (clusters, 1)):
        record = open_run(run.path).predict(path)[0]
        predictor = fieldguide.pipeline(run.path)
        Draft202012Validator(predictor.signature.output_schema()).validate(json.loads(json.dumps(record)))
        samples = len(fieldguide.data.media.audio.load([path], RATE)[0])
        codes = np.array(record["codes"])
        assert codes.shape == (run.objective.model.frames(samples), books) and record["frame_seconds"] == 160 / RATE
        both = run.predict([path, str(recordings / "r00.wav")])  # padding has no influence
        assert both[0]["codes"] == record["codes"]


def test_long_recordings_are_processed_in_parts(contrastive, recordings):
    """Of networks without statistics over time, so that parts are equal to the whole."""
    predictor = open_run(contrastive.path)
    torch.manual_seed(0)
    fields = {**{k.removeprefix("model."): v for k, v in STEM.items()}, "stem_norm": "layer", "output_type": "contexts"}
    model = registry.create("wav2vec2-test", **fields).eval()
    fitted = predictor.task
    objective = fitted.objective(model, registry.card("wav2vec2"), None).eval()
    data = SpeechPretraining.select_columns(read(recordings, column_spec=SpeechPretraining.column_spec))
    batch = fitted.predict_batches(data, None).make(np.arange(4), None)
    whole = fitted.predict_codes(objective, batch)["codes"]
    fitted.options = fitted.options.__class__(**{**fitted.options.__dict__, "seconds": 0.2})
    assert torch.equal(fitted.predict_codes(objective, batch)["codes"], whole) and (whole[0] == -1).any()


def test_cuts_keep_their_clusters(recordings):
    fitted, data = load(recordings, seconds=0.3, objective="clusters", clusters=12)
    assert any("longer than 0.3 s" in note for note in fitted.notes)
    batches = fitted.batches(data, None)
    paths, step = data.rows["audio"].to_list(), round(fitted.clusters.step)
    waves = fieldguide.data.media.audio.load(paths, RATE)
    starts = set()
    for seed in (None, 0, 1, 2):
        generator = None if seed is None else torch.Generator().manual_seed(seed)
        batch = batches.make(np.arange(6), generator)
        assert ("seed" in batch) == (seed is None)
        for i in range(6):
            count = int(batch["lengths"][i])
            wave = waves[i].astype(float) / 32768
            part = batch["waveform"][i, :count].double().numpy()
            fits = [
                at
                for at in range(0, len(wave) - count + 1, step)
                if np.allclose(
                    part, (wave[at : at + count] - wave[at : at + count].mean()) / wave[at : at + count].std(), atol=1e-2
                )
            ]
            assert len(fits) == 1
            starts.add((i, fits[0]))
            labels = fitted.known[paths[i]][fits[0] // step :][: batch["clusters"].shape[1]]
            assert batch["clusters"][i, : len(labels)].tolist() == labels.tolist()
    assert len(starts) > 12


def test_options_are_checked(recordings, tmp_path):
    with pytest.raises(SettingsError, match="Choose contrastive or clusters"):
        load(recordings, objective="both")
    with pytest.raises(SettingsError, match=r"belong to task\.objective=clusters"):
        load(recordings, layer=3)
    with pytest.raises(SettingsError, match=r"name the network with task\.features_from"):
        load(recordings, objective="clusters", layer=3)
    with pytest.raises(SettingsError, match=r"task\.share=0\.0 must be"):
        load(recordings, share=0)
    with pytest.raises(SettingsError, match="hubert-test"):
        fit(recordings, task="speech-pretraining", model="hubert-test", out=tmp_path / "run", settings=QUICK)
    for i in range(2):
        speech.write_wave(tmp_path / f"s{i}.wav", np.random.default_rng(i).normal(0, 0.1, 300), RATE)
    fitted, data = load(tmp_path)
    assert any("2 recordings are shorter than 0.1 s" in note for note in fitted.notes)
    outputs = ContrastiveFrames(registry.create("wav2vec2-test", output_type="contexts")).eval().outputs
    assert torch.isfinite(outputs(fitted.batches(data, None).make(np.arange(2), None))["nats"]).all()


@pytest.mark.slow
def test_features_of_a_run_are_clustered(clusters, recordings, tmp_path):
    """The second round of HuBERT: clusters of the outputs of a block of the first network, which becomes part of the run."""
    settings = {**QUICK, **CLUSTERS, "task.features_from": str(clusters.path), "task.layer": 1}
    run = fit(recordings, task="speech-pretraining", model="hubert-test", out=tmp_path / "run", settings=settings)
    first = open_run(clusters.path)
    fitted = run.task
    assert fitted.clusters.centers.shape == (12, 8) and (fitted.clusters.step, fitted.clusters.first) == (160.0, 232.5)
    wave = fieldguide.data.media.audio.load([str(recordings / "r01.wav")], RATE)[0]
    samples, lengths = fitted.wave.apply(torch.from_numpy(wave / 32768.0).float()[None], torch.tensor([len(wave)]))
    expected = first.objective.model.list_states(samples, lengths)[1][0].detach().numpy()
    np.testing.assert_allclose(fitted.features(wave), expected, rtol=1e-4, atol=1e-5)
    shutil.rmtree(tmp_path / "moved", ignore_errors=True)
    shutil.move(run.path, tmp_path / "moved")
    again = open_run(tmp_path / "moved").task
    np.testing.assert_allclose(again.features(wave), expected, rtol=1e-4, atol=1e-5)
    assert np.array_equal(again.label(wave), fitted.label(wave))
    with pytest.raises(SettingsError, match="has 2 blocks"):
        load(recordings, objective="clusters", features_from=str(clusters.path), layer=3)
    with pytest.raises(SettingsError, match=r"Set task\.rate=8000"):
        load(recordings, objective="clusters", features_from=str(clusters.path), rate=16_000)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["contrastive", "clusters"])
def test_other_tasks_start_from_a_run(name, recordings, tmp_path, request):
    """The encoder is taken over, its head is new."""
    first = request.getfixturevalue(name)
    labeled, spoken = tmp_path / "labeled", tmp_path / "spoken"
    labeled.mkdir()
    spoken.mkdir()
    for i, path in enumerate(sorted(recordings.glob("*.wav"))[:24]):
        shutil.copy(path, labeled / f"{i % 3}_ann_{i}.wav")
        shutil.copy(path, spoken / path.name)
        (spoken / path.with_suffix(".txt").name).write_text("one two"[: 3 + i % 5])
    settings = {"steps": 1, "batch": 4, "precision": "float32", "finetune": "frozen", "augmentation": "none"}
    encoder = {
        k: v for k, v in first.objective.model.state_dict().items() if k.split(".")[0] in ("stem", "blocks", "proj", "pos")
    }
    for data, output in ((labeled, "label"), (spoken, "ctc")):
        run = fit(data, weights=str(first.path), out=tmp_path / output, settings=settings)
        model = run.objective.model
        assert model.config.output_type == output and run.task.options.rate == RATE
        assert all(torch.equal(x, model.state_dict()[k]) for k, x in encoder.items()) and len(encoder) > 20
        assert {n.split(".")[0] for n in run.record["model"]["fresh"]} == (
            {"head", "projector"} if output == "label" else {"head"}
        )


@pytest.mark.slow
def test_pretraining_goes_on_from_a_checkpoint(contrastive, recordings, tmp_path):
    """Also from files of transformers, with the quantizer and the projections."""
    fieldguide.save(contrastive.objective.model.cpu(), tmp_path / "public", "hf")
    settings = {"steps": 1, "batch": 8, "precision": "float32", "task.rate": RATE, "lr": 0.0, "finetune": "whole"}
    for source in (contrastive.path, tmp_path / "public"):
        out = tmp_path / f"from-{source.name}"
        run = fit(recordings, task="speech-pretraining", weights=str(source), out=out, settings=settings)
        before, after = contrastive.objective.model.state_dict(), run.objective.model.state_dict()
        assert run.record["model"]["fresh"] == [] and all(torch.equal(before[k], after[k]) for k in before)
    codes = fieldguide.pipeline(tmp_path / "public").predict(str(recordings / "r00.wav"))
    assert len(codes[0]["codes"][0]) == 2


@pytest.mark.slow
def test_hidden_frames_are_learned(tmp_path):
    """Both objectives beat their baselines on synthetic speech."""
    (tmp_path / "data").mkdir()
    speech.write_utterances(tmp_path / "data")
    fields = {"model.dim": 64, "model.depth": 2, "model.heads": 4, "model.hidden": 128, "model.stem_norm": "layer"}
    fields |= {**STEM, "model.stem_dims": (32,) * 5, "model.codes": 16, "model.code_dim": 32, "model.contrast_dim": 32}
    settings = {"steps": 400, "batch": 16, "precision": "float32", "lr": 1e-3, "model.mask_time": 0.05, **fields}
    for name, model, more in (("a", "wav2vec2-test", {}), ("b", "hubert-test", {"task.objective": "clusters"})):
        kept = {k: v for k, v in settings.items() if model.startswith("wav2vec2") or "code" not in k} | more
        run = fit(tmp_path / "data", task="speech-pretraining", model=model, out=tmp_path / name, settings=kept)
        baseline = run.record["scores"]["baselines"][0]["scores"]["accuracy"]
        assert run.scores["accuracy"] > 1.2 * baseline
