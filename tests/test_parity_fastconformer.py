"""FastConformer: files and features of transformers' Parakeet, and invalid settings."""

from __future__ import annotations

import json

import numpy as np
import pytest
import soundfile
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

import fieldguide
from fieldguide.core.errors import DataError, SettingsError, WeightsError
from fieldguide.data.preprocessing.speech import LogMel
from fieldguide.models.registry import create
from recognizers import parakeet
from test_models import tiny
from test_waveforms import RATE, write_wave
from tv import transformers


def record(dtype=torch.float32):
    torch.manual_seed(1)
    return torch.randn(3, 21, 8, dtype=dtype), torch.tensor([21, 16, 9])


@pytest.mark.parametrize("fields", [{}, {"bias": False, "conv_bias": False, "scaled": False}, {"reduction": 8, "blank": 2}])
def test_folders_of_both_libraries(fields, tmp_path):
    model = tiny("fastconformer", torch.float32, **fields)
    fieldguide.save(model, tmp_path / "ours", "hf")
    theirs, report = transformers.ParakeetForCTC.from_pretrained(tmp_path / "ours", output_loading_info=True)
    assert not any(report[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    theirs.save_pretrained(tmp_path / "theirs")
    again = fieldguide.load(tmp_path / "theirs")
    assert again.config == model.config
    features, lengths = record()
    features = features * (torch.arange(21) < lengths[:, None])[..., None]  # theirs expects zeros as padding
    torch.testing.assert_close(again(features, lengths), model(features, lengths))
    found = theirs.eval()(features, attention_mask=torch.arange(21) < lengths[:, None]).logits
    order = [model.config.blank, *(i for i in range(7) if i != model.config.blank)]
    for row, n in enumerate(model.frames(lengths).tolist()):
        torch.testing.assert_close(model(features, lengths)[row, :n], found[row, :n, order], rtol=1e-4, atol=1e-4)


def test_frames_and_padding():
    model = tiny("fastconformer")
    features = torch.randn(2, 41, 8, dtype=torch.float64)
    for length in (1, 4, 5, 17, 40):
        lengths = torch.tensor([41, length])
        alone = model(features[1:, :length])
        assert alone.shape[1] == model.frames(length) == -(-length // 4)
        torch.testing.assert_close(model(features, lengths)[1, : alone.shape[1]], alone[0], rtol=1e-9, atol=1e-11)


def test_invalid_settings_are_rejected(tmp_path):
    for fields in ({"reduction": 6}, {"reduction": 16}, {"features": 9}, {"kernel": 4}, {"heads": 3}):
        with pytest.raises(SettingsError, match="must be"):
            create("fastconformer-test", **fields)
    with pytest.raises(DataError, match="expects features=8"):
        create("fastconformer-test")(torch.randn(1, 9, 7))
    fieldguide.save(tiny("fastconformer", torch.float32), tmp_path, "hf")
    config = json.loads((tmp_path / "config.json").read_text())
    config["encoder_config"]["subsampling_conv_kernel_size"] = 5
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(WeightsError, match="subsampling_conv_kernel_size"):
        fieldguide.load(tmp_path)


# Features and symbols


def test_features_equal_transformers():
    torch.manual_seed(0)
    extractor = transformers.ParakeetFeatureExtractor()
    waves = [torch.randn(n).numpy() * 0.1 for n in (16_000, 9_001, 640)]
    expected = extractor(waves, sampling_rate=RATE, return_tensors="pt")
    batch = torch.zeros(3, 16_000)
    for row, wave in enumerate(waves):
        batch[row, : len(wave)] = torch.from_numpy(wave)
    mel = LogMel(style="nemo")
    features, frames = mel.apply(batch, torch.tensor([16_000, 9_001, 640]))
    assert frames.tolist() == expected.attention_mask.sum(1).tolist() == [mel.frames(n) for n in (16_000, 9_001, 640)]
    torch.testing.assert_close(features, expected.input_features[:, : features.shape[1]], rtol=1e-4, atol=1e-4)
    assert mel.apply(torch.zeros(1, 20), torch.tensor([20]))[0].isfinite().all()
    assert LogMel.from_json(mel.to_json()) == mel


def write_checkpoint(folder):
    """Write a tiny Parakeet with a tokenizer of word pieces, the last of which is the blank."""
    pieces = ["<unk>", "▁", "▁t", "he", "o", "n", "e", "▁s", "ix", "w"]
    tokenizer = Tokenizer(models.BPE({piece: i for i, piece in enumerate(pieces)}, [], unk_token="<unk>"))
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
    made = transformers.ParakeetTokenizer(tokenizer_object=tokenizer, pad_token="<pad>", unk_token="<unk>")
    torch.manual_seed(0)
    fields = {"features": 80, "dim": 16, "reduction": 8, "vocab_size": len(made), "blank": made.pad_token_id}
    model = create("fastconformer-test", **fields).eval()
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(3.0)
    fieldguide.save(model, folder, "hf")
    made.save_pretrained(folder)
    transformers.ParakeetFeatureExtractor().save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def published(tmp_path_factory):
    return write_checkpoint(tmp_path_factory.mktemp("parakeet"))


def test_published_folders_transcribe_as_transformers(published, tmp_path):
    paths = [write_wave(tmp_path / f"r{i}.wav", ["seven", "two"][: 1 + i], i) for i in range(2)]
    predictor = fieldguide.pipeline(published)
    assert predictor.task.options.style == "nemo" and predictor.task.mel.style == "nemo"
    extractor = transformers.ParakeetFeatureExtractor.from_pretrained(published)
    tokenizer = transformers.ParakeetTokenizer.from_pretrained(published)
    theirs = transformers.ParakeetForCTC.from_pretrained(published).eval()
    expected = []
    for path in paths:
        inputs = extractor(soundfile.read(path, dtype="float32")[0], sampling_rate=RATE, return_tensors="pt")
        with torch.no_grad():
            ids = theirs(**inputs).logits.argmax(-1)[0][: -(-int(inputs.attention_mask.sum()) // 8)]
        expected.append(" ".join(tokenizer.decode(ids.tolist()).split()))
    found = [record["text"] for record in predictor.predict([str(path) for path in paths])]
    assert found == expected and len(set(found)) == 2
    seconds = soundfile.info(paths[1]).duration
    assert all(word["end"] <= seconds + 0.08 for word in predictor.predict([str(paths[1])])[0]["words"])


def test_checkpoints_are_fine_tuned(published, tmp_path):
    data = tmp_path / "data"
    data.mkdir()
    for i in range(16):
        write_wave(data / f"r{i}.wav", ["one", "two"] if i % 2 else ["six"], i)
        (data / f"r{i}.txt").write_text("one two" if i % 2 else "six")
    settings = {"steps": 2, "batch": 4, "precision": "float32", "finetune": "whole"}
    run = fieldguide.fit(data, weights=str(published), out=tmp_path / "run", settings=settings)
    assert run.task.mel.style == "nemo" and run.task.transcripts.saved and run.objective.model.config.features == 80
    assert fieldguide.open_run(run.path).task.mel == run.task.mel
    assert np.isfinite(run.scores["loss"])


def test_other_features_are_rejected(published, tmp_path):
    import shutil

    shutil.copytree(published, tmp_path / "other")
    file = tmp_path / "other" / "preprocessor_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "preemphasis": 0.5}))
    with pytest.raises(WeightsError, match="preemphasis"):
        fieldguide.pipeline(tmp_path / "other")


def test_peer_is_that_of_the_cases():
    peer, rename = parakeet(tiny("fastconformer"))
    peer.load_state_dict(rename(tiny("fastconformer", torch.float32).state_dict()))
