"""Networks that read samples: published folders for CTC and classes, fine-tuning, and their files."""

from __future__ import annotations

import json
import shutil

import numpy as np
import pytest
import soundfile
import torch
from jsonschema import Draft202012Validator

import fieldguide
from fieldguide import fit, open_run
from fieldguide.automl.fit import NullCallback, build_plan, build_trainer
from fieldguide.core.errors import DataError, WeightsError
from fieldguide.core.settings import Settings
from fieldguide.data import read
from fieldguide.data.preprocessing.symbol_files import read_symbols
from fieldguide.data.preprocessing.transcripts import Transcripts
from fieldguide.data.preprocessing.waveform import Waveform
from fieldguide.data.samples import voice
from fieldguide.models.layers.symbol_head import SymbolHead
from fieldguide.models.registry import create
from fieldguide.tasks.audio.speech_recognition import SpeechRecognition
from fieldguide.training import peft
from tv import transformers

RATE = 16_000
LETTERS = ["<pad>", "<s>", "</s>", "<unk>", "|", *"EFGHINORSTUVWXZ", "'"]
STEM = {
    "stem_dims": (8,) * 7,
    "stem_kernels": (10, 3, 3, 3, 3, 2, 2),
    "stem_strides": (5, 2, 2, 2, 2, 2, 2),
}


def write_wave(path, words, seed=0, rate=RATE):
    wave = voice.speak(words, voice.Voice(), np.random.default_rng(seed))
    wave = np.interp(np.arange(len(wave) * rate // voice.RATE) * voice.RATE / rate, np.arange(len(wave)), wave)
    soundfile.write(path, wave.astype(np.float32), rate, "PCM_16")
    return path


def write_checkpoint(folder, letters=LETTERS, pad="<pad>", kind="wav2vec2", output="ctc", **fields):
    """Write a tiny network with the files of transformers' tokenizer and feature extractor."""
    torch.manual_seed(0)
    blank = letters.index(pad)
    model = create(
        f"{kind}-test", **{"vocab_size": len(letters), "dim": 8, "blank": blank, "output_type": output, **STEM, **fields}
    ).eval()
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(2.0)
    fieldguide.save(model, folder, "hf")
    extractor = transformers.Wav2Vec2FeatureExtractor(do_normalize=True, return_attention_mask=False)
    extractor.save_pretrained(folder)
    if output == "ctc":
        (folder / "vocab.json").write_text(json.dumps({name: i for i, name in enumerate(letters)}))
        transformers.Wav2Vec2CTCTokenizer(folder / "vocab.json", pad_token=pad, do_lower_case=False).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def recordings(tmp_path_factory):
    folder = tmp_path_factory.mktemp("recordings")
    return [write_wave(folder / f"r{i}.wav", ["seven", "two"][: 1 + i % 2], i) for i in range(3)]


@pytest.fixture(scope="module")
def published(tmp_path_factory):
    return write_checkpoint(tmp_path_factory.mktemp("published"))


def transcribe(folder, paths):
    """Return the texts of transformers, each recording alone."""
    processor = transformers.Wav2Vec2Processor.from_pretrained(folder)
    model = transformers.AutoModelForCTC.from_pretrained(folder).eval()
    texts = []
    for path in paths:
        inputs = processor(soundfile.read(path)[0], sampling_rate=RATE, return_tensors="pt")
        with torch.no_grad():
            ids = model(inputs.input_values).logits.argmax(-1)
        texts.append(" ".join(processor.batch_decode(ids)[0].split()))
    return texts


# Published folders


@pytest.mark.parametrize("form", ["group", "layer", "hubert", "last blank"])
def test_published_folders_transcribe_as_transformers(form, recordings, tmp_path):
    stable = {"pre_norm": True, "stem_norm": "layer", "stem_bias": True}
    if form == "last blank":
        write_checkpoint(tmp_path, [*LETTERS[1:], "[PAD]"], "[PAD]")
    else:
        write_checkpoint(tmp_path, kind="hubert" if form == "hubert" else "wav2vec2", **({} if form == "group" else stable))
    predictor = fieldguide.pipeline(tmp_path)
    assert predictor.task.name == "automatic-speech-recognition" and predictor.task.options.rate == RATE
    records = predictor.predict([str(path) for path in recordings])
    texts = [record["text"] for record in records]
    assert texts == transcribe(tmp_path, recordings) and len(set(texts)) > 1
    words = records[0]["words"]
    assert words and words[-1]["end"] <= soundfile.info(recordings[0]).duration + 0.02
    Draft202012Validator(predictor.signature.output_schema()).validate(json.loads(json.dumps(records[0])))


def test_other_rates_and_beams(published, recordings, tmp_path):
    predictor = fieldguide.pipeline(published)
    slow = write_wave(tmp_path / "slow.wav", ["seven"], 0, 8000)
    assert predictor.predict([str(slow)])[0]["text"]
    assert predictor.predict([str(recordings[1])], num_beams=4)[0]["text"]


def test_long_recordings_are_read_in_chunks(published, recordings, tmp_path):
    """With chunks of a second, a recording of two seconds gives about the text of the whole."""
    path = write_wave(tmp_path / "long.wav", ["seven", "two", "nine", "one", "six"])
    predictor = fieldguide.pipeline(published)
    records = [predictor.predict([str(path)], **options)[0] for options in ({}, {"chunk": 1.0})]
    seconds = soundfile.info(path).duration
    assert seconds > 1.5
    assert all(record["words"][-1]["end"] <= seconds for record in records)
    assert abs(len(records[0]["text"]) - len(records[1]["text"])) <= 0.5 * len(records[0]["text"])


def test_evaluate_ignores_case(published, recordings, tmp_path):
    texts = transcribe(published, recordings)
    for path, text in zip(recordings, texts):
        shutil.copy(path, tmp_path)
        (tmp_path / f"{path.stem}.txt").write_text(text.lower())
    found = fieldguide.pipeline(published).evaluate(tmp_path)
    assert found["scores"]["wer"] == 0 and found["scores"]["loss"] > 0


def test_symbols_of_published_tokenizers(tmp_path):
    def write(vocabulary, **settings):
        (tmp_path / "vocab.json").write_text(json.dumps(vocabulary))
        (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))

    write({"A": 0, "[PAD]": 2, "|": 1}, pad_token={"content": "[PAD]"})
    assert read_symbols(tmp_path).symbols == ("A", " ")
    (tmp_path / "added_tokens.json").write_text('{"<s>": 3}')
    (tmp_path / "config.json").write_text('{"vocab_size": 6, "pad_token_id": 2}')
    assert read_symbols(tmp_path).symbols == ("A", " ", "<s>", "<unk>", "<unk>")
    write({"A": 0, "<pad>": 2, "_": 1}, do_lower_case=True, word_delimiter_token="_")
    assert read_symbols(tmp_path).symbols == ("a", " ", "<s>", "<unk>", "<unk>")
    write({"eng": {"<pad>": 2, "a": 0}, "fra": {"<pad>": 2, "é": 0}}, target_lang="fra")
    assert read_symbols(tmp_path).symbols[0] == "é"
    for vocabulary, message in (
        ({"eng": {"a": 0}}, "several languages"),
        ({"a": 0}, "padding token"),
        ({"a": 0, "<pad>": 1}, "pad_token_id of the network is 2"),
        ({"a": 9, "<pad>": 2}, "10 symbols, but the network 6"),
        ({"a": "b", "<pad>": 2}, "place"),
        ({}, "padding token"),
    ):
        write(vocabulary)
        with pytest.raises(DataError, match=message):
            read_symbols(tmp_path)
    (tmp_path / "vocab.json").write_text("{")
    with pytest.raises(DataError, match="not valid JSON"):
        read_symbols(tmp_path)


def test_symbols_in_upper_case():
    known = Transcripts(["A", "B", " ", "<unk>"])
    assert known.upper and known.decode([1, 3, 2]) == "a b" and known.encode(["Ab a"])[0][0].tolist() == [1, 2, 3, 1]
    assert Transcripts(["A", " "], lower=False).decode([1]) == "A"
    longer = known.extend(["7", "A", "É"])
    assert longer.symbols == ("A", "B", " ", "<unk>", "7", "É") and longer.encode(["é7"])[0][0].tolist() == [6, 5]
    assert not Transcripts(["a", "B"]).upper and not Transcripts(["1"]).upper


def test_waveforms_are_standardized_without_padding():
    torch.manual_seed(0)
    waves, lengths = torch.randn(2, 900) * 3 + 1, torch.tensor([900, 500])
    values, counts = Waveform().apply(waves, lengths)
    expected = transformers.Wav2Vec2FeatureExtractor(return_attention_mask=True)(
        [waves[0].numpy(), waves[1, :500].numpy()], sampling_rate=RATE, padding=True, return_tensors="pt"
    )
    torch.testing.assert_close(values, expected.input_values, rtol=1e-5, atol=1e-5)
    assert torch.equal(counts, lengths)
    assert torch.equal(Waveform(normalize=False).apply(waves, lengths)[0][0], waves[0])


def test_folders_without_symbols_are_rejected(published, tmp_path):
    shutil.copytree(published, tmp_path / "bare")
    (tmp_path / "bare" / "vocab.json").unlink()
    with pytest.raises(WeightsError, match="no task can use"):
        fieldguide.pipeline(tmp_path / "bare")


# Classes


def test_published_classifiers_equal_transformers(recordings, tmp_path):
    write_checkpoint(tmp_path, output="label", pre_norm=True, stem_norm="layer", stem_bias=True)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "id2label": {"0": "yes", "1": "no", "2": "other"}}))
    predictor = fieldguide.pipeline(tmp_path)
    assert predictor.task.name == "audio-classification"
    extractor = transformers.Wav2Vec2FeatureExtractor.from_pretrained(tmp_path)
    model = transformers.Wav2Vec2ForSequenceClassification.from_pretrained(tmp_path).eval()
    for path, record in zip(recordings, predictor.predict([str(path) for path in recordings])):
        inputs = extractor(soundfile.read(path)[0], sampling_rate=RATE, return_tensors="pt").input_values
        with torch.no_grad():
            expected = model(inputs).logits.softmax(-1)[0]
        probabilities = torch.tensor([record["probabilities"][name] for name in ("yes", "no", "other")])
        torch.testing.assert_close(probabilities, expected, rtol=1e-3, atol=1e-4)
    Draft202012Validator(predictor.signature.output_schema()).validate(json.loads(json.dumps(record)))


def test_encoders_are_fine_tuned_on_classes(spoken, tmp_path):
    """The name of a recording begins with its class."""
    data, folder = tmp_path / "data", tmp_path / "encoder"
    data.mkdir()
    for i in range(24):
        shutil.copy(spoken / f"r{i}.wav", data / f"{i % 3}_ann_{i}.wav")
    write_checkpoint(folder, kind="hubert", output="vector")
    run = fit(data, weights=str(folder), out=tmp_path / "run", settings=SETTINGS)
    assert run.task.name == "audio-classification" and run.task.options.rate == RATE
    assert run.objective.model.config.output_type == "label" and run.objective.model.config.num_classes == 3
    assert open_run(run.path).predict(str(data / "0_ann_0.wav"))[0]["label"] in ("0", "1", "2")


# Fine-tuning


@pytest.fixture(scope="module")
def spoken(tmp_path_factory):
    """Write 24 recordings with a text file each."""
    folder = tmp_path_factory.mktemp("spoken")
    words = list(voice.WORDS)
    for i in range(24):
        said = [words[i % 10], words[i * 7 % 10]]
        write_wave(folder / f"r{i}.wav", said, i, voice.RATE)
        (folder / f"r{i}.txt").write_text(" ".join(said).capitalize())
    return folder


SETTINGS = {"steps": 4, "batch": 4, "evaluate": 2, "precision": "float32", "finetune": "whole"}


def test_checkpoints_are_fine_tuned(published, spoken, tmp_path):
    run = fit(spoken, weights=str(published), out=tmp_path / "run", settings=SETTINGS)
    assert run.card.name == "wav2vec2" and run.task.options.rate == RATE and run.task.options.normalize
    assert run.objective.model.config.vocab_size == len(LETTERS) and run.task.transcripts.upper
    before, after = fieldguide.load(published).state_dict(), run.objective.model.state_dict()
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert not any(name.startswith("stem.") for name in changed) and {"head.weight", "proj.weight", "pos.direction"} <= changed
    again = open_run(run.path)
    record = again.predict(str(spoken / "r1.wav"))[0]
    assert record["text"] == record["text"].lower() and record == run.predict(str(spoken / "r1.wav"))[0]
    assert "Alignment" in (run.path / "report.html").read_text()
    second = fit(spoken, weights=str(run.path), out=tmp_path / "second", settings=SETTINGS)
    assert second.task.transcripts.symbols == run.task.transcripts.symbols and second.task.options.rate == RATE


def test_new_characters_get_symbols(published, spoken, tmp_path):
    shutil.copytree(spoken, tmp_path / "data")
    (tmp_path / "data" / "r0.txt").write_text("zéro 0")
    data = read(tmp_path / "data", column_spec=SpeechRecognition.column_spec)
    plan = build_plan(data, task=SpeechRecognition.name, weights=str(published), settings=SETTINGS)
    assert plan.task.transcripts.symbols[-2:] == ("0", "É") and any("new ones are added" in n for n in plan.task.notes)
    assert plan.config.vocab_size == len(LETTERS) + 2
    head, old = plan.objective.model.head, fieldguide.load(published).head
    assert torch.equal(head.weight[: len(LETTERS)], old.weight) and "head.weight" not in plan.fresh


def test_heads_keep_the_symbols_of_a_checkpoint():
    head = SymbolHead(3, 5)
    assert torch.equal(head.resize_weight("weight", torch.ones(4, 3))[:4], torch.ones(4, 3))
    assert head.resize_weight("weight", torch.ones(6, 3)) is None and head.resize_weight("weight", torch.ones(4, 2)) is None


@pytest.mark.filterwarnings("ignore::fieldguide.core.errors.WeightsWarning")
def test_encoders_without_symbols_are_fine_tuned(spoken, tmp_path):
    """The pre-trained network has a quantizer and no output layer."""
    folder = tmp_path / "pretrained"
    write_checkpoint(folder, output="contexts", mask_time=0.05)
    data = read(spoken, column_spec=SpeechRecognition.column_spec)
    settings = {**SETTINGS, "keep_frozen": False}
    plan = build_plan(data, task=SpeechRecognition.name, weights=str(folder), settings=settings)
    model = plan.objective.model
    assert set(plan.task.transcripts.symbols) <= set("efghinorstuvwxz ") and model.config.output_type == "ctc"
    assert sorted(plan.fresh) == ["head.bias", "head.weight"] and all(p.requires_grad for p in model.parameters())
    assert torch.equal(model.proj.weight, fieldguide.load(folder).proj.weight)


def test_frozen_parts():
    model = create("wav2vec2-test")
    peft.prepare(model, Settings(), None)
    assert all(p.requires_grad for p in model.parameters())
    peft.prepare(model, Settings(), ["head.weight", "stem.0.conv.weight"])
    frozen = {name for name, p in model.named_parameters() if not p.requires_grad}
    assert frozen == {name for name, _ in model.named_parameters() if name.startswith("stem.")} - {"stem.0.conv.weight"}
    assert not peft.get_frozen_modules(create("wav2vec2-test"))


class StopAt(NullCallback):
    def on_step(self, step, losses):
        if step == 3:
            raise KeyboardInterrupt


def test_resumed_fine_tuning_equals_uninterrupted(published, spoken, tmp_path):
    """With masks and dropout, whose draws depend on the seed and the step."""
    settings = {**SETTINGS, "steps": 5, "evaluate": 10, "checkpoint": 0, "model.mask_time": 0.3, "model.dropout": 0.1}
    data = read(spoken, column_spec=SpeechRecognition.column_spec)

    def loop(folder, callback):
        folder.mkdir(exist_ok=True)
        plan = build_plan(data, task=SpeechRecognition.name, weights=str(published), settings=settings)
        return build_trainer(plan, callback, folder)

    whole = loop(tmp_path / "whole", NullCallback())
    whole.train()
    with pytest.raises(KeyboardInterrupt):
        loop(tmp_path / "half", StopAt()).train()
    second = loop(tmp_path / "half", NullCallback())
    assert second.resume() and 0 < second.state.step < 5
    second.train()
    for (name, a), b in zip(whole.objective.state_dict().items(), second.objective.state_dict().values()):
        assert torch.equal(a, b), name


def test_networks_from_scratch_read_samples(spoken, tmp_path):
    settings = {"steps": 2, "batch": 4, "precision": "float32", "model.dim": 16, "model.depth": 1, "model.heads": 2}
    settings |= {"model.hidden": 16, "model.stem_dims": "(8, 8, 8, 8, 8, 8, 8)"}
    run = fit(spoken, model="hubert-base", out=tmp_path / "run", settings=settings)
    assert run.task.signal == "waveform" and run.task.options.normalize is None
    assert run.predict(str(spoken / "r0.wav"))[0]["text"] is not None
