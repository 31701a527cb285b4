"""Whisper against transformers: features, files of all origins, caches, rules of times; transcription of long recordings."""

from __future__ import annotations

import json
import struct

import numpy as np
import pytest
import soundfile
import torch
from jsonschema import Draft202012Validator
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

import fieldguide
from fieldguide import fit, open_run
from fieldguide.automl.fit import NullCallback, build_plan, build_trainer
from fieldguide.checkpoints import ctranslate2, weights
from fieldguide.core.errors import DataError, SettingsError, WeightsError
from fieldguide.data import read
from fieldguide.data.preprocessing import whisper_features
from fieldguide.data.preprocessing.whisper_features import RATE, compute_features, fit_window
from fieldguide.data.samples import voice
from fieldguide.inference.transcription import Transcriber
from fieldguide.models.generation import transcription
from fieldguide.models.generation.transcription import (
    FALLBACKS,
    Segment,
    SpeechTokens,
    TranscriptionConfig,
    Window,
    cut_segments,
    decode_with_fallback,
    restrict_times,
)
from fieldguide.models.registry import card, create
from fieldguide.models.transformer.whisper import OPENAI
from fieldguide.tasks.audio.dictation import Dictation
from fieldguide.tasks.audio.speech_recognition import SpeechRecognition
from test_models import tiny
from tv import transformers

CLOSE = {"rtol": 1e-5, "atol": 1e-5}
TOKENS = SpeechTokens(
    start=21,
    end=20,
    transcribe=23,
    translate=22,
    previous=24,
    no_speech=25,
    no_times=26,
    time=27,
    suppressed=(21, 22, 23, 24, 25),
)


def random(name: str = "whisper", **fields):
    """Return a small network with random weights in all of its parameters."""
    torch.manual_seed(0)
    network = create(f"{name}-test", **fields).eval()
    with torch.no_grad():
        for p in network.parameters():
            p.add_(0.1 * torch.randn_like(p))
    return network


def example(network, rows=2):
    torch.manual_seed(1)
    c = network.config
    return torch.randn(rows, 2 * c.source_length, c.features), torch.randint(c.vocab_size, (rows, 7))


# Features


@pytest.mark.parametrize("bands", [80, 128])
def test_features_equal_transformers(bands):
    wave = np.random.default_rng(0).normal(0, 0.1, 3 * RATE).astype(np.float32)
    wave[: RATE // 2] = 0
    extractor = transformers.WhisperFeatureExtractor(feature_size=bands)
    theirs = extractor(wave, sampling_rate=RATE, return_tensors="pt").input_features[0].T
    ours = compute_features(torch.from_numpy(wave)[None], bands, 27 * RATE)[0]
    assert ours.shape == theirs.shape == (3000, bands)
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(
        torch.from_numpy(whisper_features.slaney_filters(bands)).double(),
        torch.from_numpy(extractor.mel_filters),
        rtol=1e-5,
        atol=1e-8,
    )


def test_short_recordings_and_windows():
    assert compute_features(torch.zeros(1, 3), 80).shape == (1, 1, 80)
    part = fit_window(torch.ones(1, 10, 4))
    assert part.shape == (1, 3000, 4) and part[0, :10].all() and not part[0, 10:].any()
    assert fit_window(torch.ones(1, 3500, 4)).shape == (1, 3000, 4)


# The network and its files


def test_traps_of_the_architecture():
    """Keys have no bias, the encoder's positions are a buffer, the output layer is the embedding, and transformers counts both."""
    network = random()
    names = dict(network.named_parameters())
    assert "encoder.0.attn.k.weight" in names and not any(".k.bias" in name for name in names)
    assert "encoder_pos" in dict(network.named_buffers()) and "encoder_pos" not in names
    theirs = transformers.WhisperConfig(d_model=384)
    sinusoids = transformers.models.whisper.modeling_whisper.sinusoids(1500, 384)
    torch.testing.assert_close(create("whisper-tiny").encoder_pos, sinusoids, rtol=0, atol=1e-6)
    assert theirs.max_source_positions * 384 + card("whisper").sizes["whisper-tiny"].params == 37_760_640
    with pytest.raises(DataError, match="21 frames exceed the 20"):
        network.encode(torch.zeros(1, 21, 6))
    with pytest.raises(DataError, match="expects features=6"):
        network.encode(torch.zeros(1, 20, 7))
    with pytest.raises(DataError, match="length=12"):
        network(torch.zeros(1, 20, 6), torch.zeros(1, 13, dtype=torch.int64))


@torch.no_grad()
def test_folders_of_transformers_round_trip(tmp_path):
    network = random()
    features, tokens = example(network)
    fieldguide.save(network, tmp_path / "ours", "hf")
    theirs, found = transformers.WhisperForConditionalGeneration.from_pretrained(tmp_path / "ours", output_loading_info=True)
    assert set(found["missing_keys"]) <= {"proj_out.weight"} and not found["unexpected_keys"]
    expected = theirs.eval()(input_features=features.transpose(1, 2), decoder_input_ids=tokens, use_cache=False).logits
    torch.testing.assert_close(network(features, tokens), expected, **CLOSE)
    theirs.save_pretrained(tmp_path / "theirs")
    again = fieldguide.load(tmp_path / "theirs")
    assert again.config == network.config
    torch.testing.assert_close(again(features, tokens), expected, **CLOSE)


@torch.no_grad()
def test_files_of_openai(tmp_path):
    """A dictionary `dims` and the tensors; half precision, as published."""
    network = random()
    c = network.config
    dims = {"n_mels": 6, "n_vocab": 30, "n_audio_ctx": 10, "n_audio_state": 16, "n_audio_head": 2, "n_audio_layer": 2}
    dims |= {"n_text_ctx": 12, "n_text_state": 16, "n_text_head": 2, "n_text_layer": 3}
    network = random(hidden=64)  # four times the width, which the file does not say
    state = {key: x.half() for key, x in weights.translate(network.state_dict(), OPENAI, reverse=True).items()}
    assert "encoder.blocks.0.attn.query.weight" in state and "decoder.blocks.2.cross_attn.key.weight" in state
    assert "encoder.blocks.0.attn.key.bias" not in state and "encoder.positional_embedding" in state
    torch.save({"dims": dims, "model_state_dict": state}, tmp_path / "small.pt")
    ours = fieldguide.load(tmp_path / "small.pt")
    assert ours.config == network.config and c.hidden != 64
    features, tokens = example(network)
    torch.testing.assert_close(ours(features, tokens), network(features, tokens), rtol=1e-2, atol=1e-2)
    torch.save({"dims": {**dims, "n_text_head": 4}, "model_state_dict": state}, tmp_path / "other.pt")
    with pytest.raises(WeightsError, match="n_text_head=4"):
        fieldguide.load(tmp_path / "other.pt")


def pack(values, aliases=(), version=6, spec="WhisperSpec"):
    """Return the bytes of a file of CTranslate2."""
    text = lambda s: struct.pack("<H", len(s) + 1) + s.encode() + b"\0"
    kinds = {torch.float32: 0, torch.int8: 1, torch.int16: 2, torch.int32: 3, torch.float16: 4}
    out = struct.pack("<I", version) + text(spec) + struct.pack("<II", 3, len(values))
    for name, x in values.items():
        content = x.contiguous().numpy().tobytes()
        out += text(name) + struct.pack(f"<B{x.ndim}IBI", x.ndim, *x.shape, kinds[x.dtype], len(content)) + content
    return out + struct.pack("<I", len(aliases)) + b"".join(text(a) + text(b) for a, b in aliases)


def to_ctranslate2(network):
    """Return the values of a file: joined projections, gamma and beta, settings."""
    state, out = network.state_dict(), {}
    zeros = torch.zeros(network.config.dim)
    for side, depth in (("encoder", network.config.depth), ("decoder", network.config.decoder_depth)):
        for i in range(depth):
            ours, theirs = f"{side}.{i}.", f"{side}/layer_{i}/"
            norms = {"norm1": "self_attention", "norm2": "attention" if side == "decoder" else "ffn", "norm3": "ffn"}
            for norm, part in norms.items():
                if f"{ours}{norm}.weight" in state:
                    out[f"{theirs}{part}/layer_norm/gamma"] = state[f"{ours}{norm}.weight"]
                    out[f"{theirs}{part}/layer_norm/beta"] = state[f"{ours}{norm}.bias"]
            get = lambda part, name, kind: state.get(f"{ours}{part}.{name}.{kind}", zeros)  # noqa: B023
            for kind in ("weight", "bias"):
                out[f"{theirs}self_attention/linear_0/{kind}"] = torch.cat([get("attn", x, kind) for x in "qkv"])
                out[f"{theirs}self_attention/linear_1/{kind}"] = get("attn", "proj", kind)
                if side == "decoder":
                    out[f"{theirs}attention/linear_0/{kind}"] = get("cross", "q", kind)
                    out[f"{theirs}attention/linear_1/{kind}"] = torch.cat([get("cross", x, kind) for x in "kv"])
                    out[f"{theirs}attention/linear_2/{kind}"] = get("cross", "proj", kind)
                out[f"{theirs}ffn/linear_0/{kind}"] = get("mlp", "up", kind)
                out[f"{theirs}ffn/linear_1/{kind}"] = get("mlp", "down", kind)
        out[f"{side}/layer_norm/gamma"], out[f"{side}/layer_norm/beta"] = (
            state[f"{side}_norm.{k}"] for k in ("weight", "bias")
        )
        out[f"{side}/position_encodings/encodings"] = state[f"{side}_pos"]
        out[f"{side}/num_heads"] = torch.tensor(2, dtype=torch.int16)
        out[f"{side}/pre_norm"] = torch.tensor(1, dtype=torch.int8)
    for conv in ("conv1", "conv2"):
        for kind in ("weight", "bias"):
            out[f"encoder/{conv}/{kind}"] = state[f"{conv}.{kind}"]
    return out | {"decoder/embeddings/weight": state["embed.weight"], "decoder/activation": torch.tensor(3, dtype=torch.int8)}


ALIAS = (("decoder/projection/weight", "decoder/embeddings/weight"),)


@torch.no_grad()
def test_files_of_ctranslate2(tmp_path):
    network = random()
    values = to_ctranslate2(network)
    file = tmp_path / "model.bin"
    file.write_bytes(pack(values, ALIAS))
    (tmp_path / "config.json").write_text(json.dumps({"suppress_ids": [1], "lang_ids": []}))
    ours = fieldguide.load(tmp_path)
    for name, x in network.state_dict().items():
        assert torch.equal(ours.state_dict()[name], x), name
    # Weights of 8 bits with a scale for each row, the rest in half precision
    small = {}
    for name, x in values.items():
        if x.ndim == 2 and name.endswith("weight"):
            scale = 127 / x.abs().amax(1)
            small[name], small[f"{name}_scale"] = (x * scale[:, None]).round().to(torch.int8), scale
        else:
            small[name] = x.half() if x.is_floating_point() else x
    file.write_bytes(pack(small, ALIAS))
    for name, x in fieldguide.load(file).state_dict().items():
        torch.testing.assert_close(x, network.state_dict()[name], rtol=2e-2, atol=5e-3)


def test_damaged_and_other_files_of_ctranslate2(tmp_path):
    values, file = to_ctranslate2(random()), tmp_path / "model.bin"
    whole = pack(values, ALIAS)
    key = "encoder/layer_0/self_attention/linear_0/bias"
    wrong = {
        "ends within a value": whole[:-300],
        "ends within": whole[:5000],
        "holds a TransformerDecoder of CTranslate2": pack(values, spec="TransformerDecoderSpec"),
        "has version 3": pack(values, version=3),
        "pre_norm=0 is not supported": pack({**values, "encoder/pre_norm": torch.tensor(0, dtype=torch.int8)}),
        "adds a bias to the keys": pack({**values, key: torch.ones(48)}),
        "is no projection of attention": pack({**values, key: torch.ones(47)}),
        "which is not in the file": pack(values, [("a", "b")]),
        "which do not match": pack({key: torch.ones(48)}).replace(struct.pack("<BI", 0, 192), struct.pack("<BI", 4, 192)),
    }
    for message, content in wrong.items():
        file.write_bytes(content)
        with pytest.raises(WeightsError, match=message):
            ctranslate2.read_tensors(file)
    assert ctranslate2.find_kind(file) == "Whisper"
    file.write_bytes(b"PK\3\4")
    assert ctranslate2.find_kind(file) is None


@torch.no_grad()
def test_cached_steps_equal_the_whole():
    network = random()
    features, tokens = example(network)
    whole = network(features, tokens)
    cache = network.new_cache(2)
    first = network(features, tokens[:, :3], None, cache)
    rest = [network(None, tokens[:, i : i + 1], None, cache) for i in range(3, 7)]
    torch.testing.assert_close(torch.cat([first, *rest], 1), whole, **CLOSE)
    cache = network.new_cache(6)  # three samples of each recording
    cache.cross = network.encode_source(features, None)
    torch.testing.assert_close(network(None, tokens.repeat_interleave(3, 0), None, cache)[::3], whole, **CLOSE)


# Rules of times


def test_rules_of_times_equal_transformers():
    config = transformers.GenerationConfig(
        eos_token_id=TOKENS.end, no_timestamps_token_id=TOKENS.no_times, max_initial_timestamp_index=50, bos_token_id=21
    )
    theirs = transformers.generation.WhisperTimeStampLogitsProcessor(config, begin_index=2)
    rng = np.random.default_rng(0)
    rows = [[], [27], [27, 3], [27, 3, 35], [27, 3, 35, 35], [27, 3, 35, 40], [3], [3, 4, 5], [27, 3, 35, 35, 7, 41]]
    for known in rows:
        for boost in (0.0, 3.0, -3.0):
            logits = torch.from_numpy(rng.normal(size=(1, 120))).float()
            logits[:, TOKENS.time :] += boost
            ours = restrict_times(logits, [known], TOKENS)
            expected = theirs(torch.tensor([[21, 23, *known]]), logits.clone())
            assert torch.equal(ours, expected), (known, boost)


def window(tokens, no_speech=0.0, score=-0.1, text="a text", temperature=0.0):
    return Window(list(tokens), text, score, no_speech, temperature)


def words(ids):
    return " ".join(str(i) for i in ids if i < TOKENS.end)


def test_windows_are_cut_at_pairs_of_times():
    t = TOKENS.time
    pairs = [
        t,
        1,
        2,
        t + 50,
        t + 60,
        3,
        t + 100,
        t + 120,
        4,
        5,
    ]  # the last phrase has not ended: the next window begins with it
    found, step = cut_segments(window(pairs), 30.0, 3000, TOKENS, words)
    assert [(s.start, s.end, s.text) for s in found] == [(30.0, 31.0, "1 2"), (31.2, 32.0, "3")] and step == 200
    single = [t, 1, t + 50, t + 60, 3, t + 100]  # it has ended: the whole window is done
    found, step = cut_segments(window(single), 0.0, 3000, TOKENS, words)
    assert [(s.start, s.end, s.text) for s in found] == [(0.0, 1.0, "1"), (1.2, 2.0, "3")] and step == 3000
    found, step = cut_segments(window([t, 1, 2]), 5.0, 700, TOKENS, words)
    assert [(s.start, s.end) for s in found] == [(5.0, 12.0)] and step == 700
    found, step = cut_segments(window([t, 1, 2, t + 25]), 5.0, 700, TOKENS, words)
    assert [(s.start, s.end) for s in found] == [(5.0, 5.5)] and step == 700
    assert isinstance(found[0], Segment)


def test_fallback_to_higher_temperatures(monkeypatch):
    """Texts that repeat themselves or are improbable are decoded again, silence is not."""

    def run(windows, **options):
        asked = []

        def decode(network, cross, tokens, sequence, context, temperature, config, decode):
            asked.append(temperature)
            return windows[min(len(asked), len(windows)) - 1]

        monkeypatch.setattr(transcription, "decode_window", decode)
        found = decode_with_fallback(None, None, TOKENS, [], [], TranscriptionConfig(**options), words)
        return found, asked

    good, repeats = window([1]), window([1], text="ha " * 100)
    improbable, silent = window([1], score=-1.5), window([1], score=-1.5, no_speech=0.9)
    assert repeats.compression > 2.4 > good.compression
    assert run([good])[1] == [0.0]
    assert run([repeats, improbable, good])[1] == [0.0, 0.2, 0.4] and run([silent, good])[1] == [0.0]
    assert run([improbable])[1] == list(FALLBACKS) and run([improbable], temperature=0.3)[1] == [0.3]
    assert run([improbable], min_log_probability=-2.0)[1] == [0.0] and run([repeats], max_compression=90.0)[1] == [0.0]


# Transcription


LETTERS = sorted({*pre_tokenizers.ByteLevel.alphabet()})
SPECIAL = ["endoftext", "startoftranscript", "en", "de", "translate", "transcribe", "startoflm", "startofprev", "nospeech"]


def write_checkpoint(folder, languages=True):
    """Write a small network with a byte-level tokenizer in the format of transformers."""
    vocab = {letter: i for i, letter in enumerate(LETTERS)}
    tokenizer = Tokenizer(models.BPE(vocab, []))
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    names = [name for name in [*SPECIAL, "notimestamps"] if languages or name not in ("en", "de")]
    tokenizer.add_special_tokens([AddedToken(f"<|{name}|>", special=True) for name in names])
    tokenizer.add_special_tokens([AddedToken(f"<|{i / 50:.2f}|>", special=False) for i in range(1501)])
    torch.manual_seed(0)
    network = create("whisper-test", vocab_size=tokenizer.get_vocab_size(), source_length=1500, length=40).eval()
    with torch.no_grad():
        for p in network.parameters():
            p.mul_(2.0)
    fieldguide.save(network, folder, "hf")
    tokenizer.save(str(folder / "tokenizer.json"))
    return folder


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return write_checkpoint(tmp_path_factory.mktemp("whisper"))


@pytest.fixture(scope="module")
def recording(tmp_path_factory):
    """Write 35 seconds, more than a window."""
    wave = voice.speak(["one", "two"], voice.Voice(), np.random.default_rng(0))
    path = tmp_path_factory.mktemp("sound") / "long.wav"
    soundfile.write(path, np.resize(wave, 35 * voice.RATE), voice.RATE)
    return path


def test_pipeline_transcribes_long_recordings(checkpoint, recording, tmp_path):
    predictor = fieldguide.pipeline(checkpoint)
    assert isinstance(predictor, Transcriber) and list(predictor.tokens.languages) == ["en", "de"]
    tokens = predictor.tokens
    options = {"temperature": 0.0, "max_silence": 1.0}
    [record] = predictor.predict(str(recording), **options)
    assert record["language"] in ("en", "de") and record["text"]
    Draft202012Validator(predictor.signature.output_schema()).validate(json.loads(json.dumps(record)))
    times = [(s["start"], s["end"]) for s in record["segments"]]
    assert times == sorted(times) and times[-1][1] <= 65.0 + 1e-6
    again = predictor.predict([str(recording)] * 2, **options)
    assert [r["text"] for r in again] == [record["text"]] * 2
    sampled = {"temperature": 1.0, "best_of": 2, "max_silence": 1.0}
    one, other, same = (predictor.predict(str(recording), seed=s, **sampled)[0]["text"] for s in (0, 1, 0))
    assert one == same != other
    [english] = predictor.predict(str(recording), language="de", task="translate", times=False, prompt="Names", **options)
    assert english["language"] == "de" and tokens.build_sequence("de", "translate", False)[-1] == tokens.no_times
    soundfile.write(tmp_path / "short.wav", np.zeros(20), 8000)  # shorter than a frame
    assert predictor.predict(str(tmp_path / "short.wav"))[0]["text"] == ""
    for wrong in ({"language": "xx"}, {"task": "sing"}, {"temperatur": 1}, {"best_of": 0}):
        with pytest.raises(SettingsError, match=next(iter(wrong))):
            predictor.predict(str(recording), **wrong)


def test_greedy_windows_equal_transformers(checkpoint, recording):
    """The tokens of the first window with their times, against generate of transformers."""
    predictor = fieldguide.pipeline(checkpoint)
    tokens = predictor.tokens
    theirs = transformers.WhisperForConditionalGeneration.from_pretrained(checkpoint).eval()
    wave, rate = soundfile.read(recording, dtype="float32")
    from fieldguide.data.preprocessing.speech import resample

    features = fit_window(compute_features(torch.from_numpy(resample(wave, rate, RATE))[None], 6))
    cross = predictor.network.encode_source(features, None)
    sequence = tokens.build_sequence("de", "transcribe", True)
    config = TranscriptionConfig()
    ours = transcription.decode_window(predictor.network, cross, tokens, sequence, [], 0.0, config, predictor.decode)
    settings = transformers.GenerationConfig(
        eos_token_id=tokens.end,
        bos_token_id=tokens.start,
        pad_token_id=tokens.end,
        no_timestamps_token_id=tokens.no_times,
        max_initial_timestamp_index=50,
        suppress_tokens=list(tokens.suppressed),
        begin_suppress_tokens=list(tokens.first_suppressed),
    )
    processors = transformers.LogitsProcessorList(
        [
            transformers.generation.SuppressTokensAtBeginLogitsProcessor(settings.begin_suppress_tokens, 3),
            transformers.generation.SuppressTokensLogitsProcessor(settings.suppress_tokens),
            transformers.generation.WhisperTimeStampLogitsProcessor(settings, begin_index=3),
        ]
    )
    known = torch.tensor([sequence])
    with torch.no_grad():
        for _ in range(20):
            logits = theirs(input_features=features.transpose(1, 2), decoder_input_ids=known).logits[:, -1]
            best = processors(known, logits).argmax(-1)
            if int(best) == tokens.end:
                break
            known = torch.cat([known, best[:, None]], 1)
    assert ours.tokens == known[0, 3:].tolist() and len(ours.tokens) > 1


def test_evaluation_ignores_case_and_marks(checkpoint, tmp_path, monkeypatch):
    soundfile.write(tmp_path / "a.wav", np.zeros(800), 8000)
    (tmp_path / "a.txt").write_text("Ask not, my fellow Americans!")
    predictor = fieldguide.pipeline(checkpoint)
    monkeypatch.setattr(Transcriber, "transcribe", lambda *a: {"text": "ask not my fellow americans"})
    assert predictor.evaluate(tmp_path)["scores"]["wer"] == 0


def test_tokenizers_of_other_networks(checkpoint, recording, tmp_path):
    english = fieldguide.pipeline(write_checkpoint(tmp_path / "english", languages=False))
    assert not english.tokens.languages and english.tokens.build_sequence("en", "transcribe", True) == [english.tokens.start]
    with pytest.raises(SettingsError, match="knows only English"):
        english.predict(str(recording), task="translate")
    with pytest.raises(SettingsError, match="language='de'"):
        english.predict(str(recording), language="de")
    (tmp_path / "english" / "tokenizer.json").unlink()
    with pytest.raises(WeightsError, match="tokenizer"):
        fieldguide.pipeline(tmp_path / "english")
    other = Tokenizer(models.BPE({letter: i for i, letter in enumerate(LETTERS)}, []))
    other.save(str(tmp_path / "english" / "tokenizer.json"))
    with pytest.raises(WeightsError, match="startoftranscript"):
        fieldguide.pipeline(tmp_path / "english")


# Fine-tuning


@pytest.fixture(scope="module")
def spoken(tmp_path_factory):
    """Write 24 recordings with a text file each."""
    folder = tmp_path_factory.mktemp("spoken")
    words = list(voice.WORDS)
    for i in range(24):
        said = [words[i % 10], words[i * 7 % 10]]
        wave = voice.speak(said, voice.Voice(), np.random.default_rng(i))
        soundfile.write(folder / f"r{i}.wav", wave, voice.RATE)
        (folder / f"r{i}.txt").write_text(" ".join(said).capitalize() + ".")
    return folder


class StopAt(NullCallback):
    def on_step(self, step, losses):
        if step == 3:
            raise KeyboardInterrupt


@pytest.mark.slow
def test_checkpoints_are_fine_tuned(checkpoint, spoken, recording, tmp_path):
    settings = {"steps": 4, "batch": 4, "evaluate": 2, "precision": "float32", "finetune": "whole", "task.language": "de"}
    run = fit(spoken, weights=str(checkpoint), out=tmp_path / "run", settings=settings)
    assert isinstance(run.task, Dictation) and run.card.name == "whisper"
    assert run.task.options.rate == RATE and run.task.options.bands == 6 and run.task.options.language == "de"
    assert run.scores["loss"] > 0 and run.scores["wer"] >= 0
    sequence = run.task.sequence
    known = run.task.tokens
    assert sequence == [known.start, known.languages["de"], known.transcribe, known.no_times]
    data = read(spoken, column_spec=run.task.column_spec)
    batch = run.task.batches(data, run.card, None).make(np.arange(2), None)
    ids = run.task.text.encode_exact([" Zero zero."])[0].tolist()
    assert batch["tokens"][0, : 4 + len(ids)].tolist() == [*sequence, *ids]
    assert batch["target"][0, : 4 + len(ids)].tolist() == [-1, -1, -1, *ids, known.end]
    assert batch["features"].shape == (2, 3000, 6) and batch["mask"].sum(1).tolist() == [4 + len(ids), 4 + len(" One seven.")]
    again = open_run(run.path)
    [record] = again.predict(str(spoken / "r1.wav"))
    assert record["text"] == run.predict(str(spoken / "r1.wav"))[0]["text"]
    Draft202012Validator(again.signature.output_schema()).validate(json.loads(json.dumps(record)))
    assert again.task.batches(again.task.read([str(recording)]), run.card).make(np.arange(1), None)["features"].shape[1] == 6000
    assert len(again.predict(str(recording))) == 1  # two windows
    assert "Confused words" in (run.path / "report.html").read_text()
    with pytest.raises(SettingsError, match="at most 30 s"):
        fit(spoken, weights=str(checkpoint), out=tmp_path / "long", settings={**settings, "task.longest": 40})
    with pytest.raises(SettingsError, match=r"language='xx'"):
        fit(spoken, weights=str(checkpoint), out=tmp_path / "xx", settings={**settings, "task.language": "xx"})


@pytest.mark.slow
def test_resumed_fine_tuning_equals_uninterrupted(checkpoint, spoken, tmp_path):
    settings = {"steps": 5, "batch": 4, "evaluate": 10, "precision": "float32", "finetune": "whole", "checkpoint": 0}
    data = read(spoken, column_spec=SpeechRecognition.column_spec)

    def loop(folder, callback):
        folder.mkdir(exist_ok=True)
        plan = build_plan(data, task=SpeechRecognition.name, weights=str(checkpoint), settings=settings)
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


def test_tiny_size_is_that_of_the_cases():
    assert tiny("whisper").config == card("whisper").resolve_config("whisper-test")
