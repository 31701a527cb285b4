"""What a publisher writes into generation_config.json is used as transformers uses it, or named."""

from __future__ import annotations

import json

import pytest
import torch

from fieldguide.core.errors import SettingsError
from fieldguide.inference.text_generation import TextGenerator
from fieldguide.models.generation import generate_batch
from fieldguide.models.generation.token_rules import TokenRules, repeated_ngrams
from test_speaker import bpe, settled
from tv import transformers

GREEDY = {"temperature": 0}
WORDS = ("the cat", "a dog ran after", "who sat on the mat")


def save(model, path, **generation):
    model.save_pretrained(path)
    (path / "generation_config.json").write_text(json.dumps({"eos_token_id": 1, **generation}))
    fast = transformers.PreTrainedTokenizerFast(tokenizer_object=bpe(), bos_token="<s>", eos_token="</s>")
    fast.save_pretrained(path)
    return path


def llama(**changes):
    torch.manual_seed(3)
    return settled(
        transformers.LlamaForCausalLM(
            transformers.LlamaConfig(
                vocab_size=bpe().get_vocab_size(),
                hidden_size=32,
                intermediate_size=40,
                num_hidden_layers=2,
                num_attention_heads=4,
                max_position_embeddings=128,
                bos_token_id=0,
                eos_token_id=1,
                pad_token_id=1,
                **changes,
            )
        )
    )


def bart():
    torch.manual_seed(5)
    return settled(
        transformers.BartForConditionalGeneration(
            transformers.BartConfig(
                vocab_size=bpe().get_vocab_size(),
                d_model=32,
                encoder_layers=2,
                decoder_layers=2,
                encoder_attention_heads=4,
                decoder_attention_heads=4,
                encoder_ffn_dim=40,
                decoder_ffn_dim=40,
                max_position_embeddings=64,
                bos_token_id=0,
                eos_token_id=1,
                pad_token_id=1,
                decoder_start_token_id=1,
                forced_eos_token_id=None,
            )
        )
    )


def expected(path, prompt: str) -> list[int]:
    """Return what transformers generates with the published options alone."""
    fast = transformers.AutoTokenizer.from_pretrained(path)
    kind = json.loads((path / "config.json").read_text())["architectures"][0]
    model = getattr(transformers, kind).from_pretrained(path).eval()
    ids = fast(prompt, return_tensors="pt").input_ids
    out = model.generate(ids, attention_mask=torch.ones_like(ids))[0]
    return fast.decode(out if model.config.is_encoder_decoder else out[ids.shape[1] :], skip_special_tokens=True)


CASES = {
    "greedy": {"do_sample": False, "max_new_tokens": 20},
    "n-grams": {"do_sample": False, "max_new_tokens": 30, "no_repeat_ngram_size": 2},
    "repetition": {"do_sample": False, "max_new_tokens": 30, "repetition_penalty": 1.7},
    "repetition and n-grams": {"do_sample": False, "max_new_tokens": 30, "repetition_penalty": 1.3, "no_repeat_ngram_size": 3},
    "minimum": {"do_sample": False, "max_new_tokens": 30, "min_new_tokens": 25},
    "lengths with the prompt": {"do_sample": False, "max_length": 24, "min_length": 20},
    "suppressed": {
        "do_sample": False,
        "max_new_tokens": 15,
        "suppress_tokens": [3, 4, 5, 6, 7],
        "begin_suppress_tokens": [8, 9, 1],
    },
    "forced end": {"do_sample": False, "max_new_tokens": 9, "forced_eos_token_id": 1},
    "beams": {"num_beams": 3, "max_new_tokens": 15, "length_penalty": 2.0},
    "beams, early": {"num_beams": 3, "max_new_tokens": 15, "early_stopping": True, "length_penalty": 0.5},
    "beams with rules": {
        "num_beams": 4,
        "max_new_tokens": 18,
        "min_new_tokens": 6,
        "no_repeat_ngram_size": 2,
        "early_stopping": True,
        "repetition_penalty": 1.2,
        "forced_eos_token_id": 1,
    },
}


@pytest.mark.parametrize("case", CASES)
def test_a_decoder_generates_as_in_transformers(case, tmp_path):
    path = save(llama(), tmp_path, **CASES[case])
    ours = TextGenerator.load(path)
    for prompt in WORDS:
        assert ours.generate([prompt]) == [expected(path, prompt)]


@pytest.mark.parametrize("case", CASES)
def test_an_encoder_decoder_generates_as_in_transformers(case, tmp_path):
    path = save(bart(), tmp_path, decoder_start_token_id=1, **CASES[case])
    ours = TextGenerator.load(path)
    for prompt in WORDS:
        assert ours.generate([prompt]) == [expected(path, prompt)]


def test_the_options_of_bart_large_cnn_from_its_configuration(tmp_path):
    """Before 2023 the options were part of config.json."""
    path = save(bart(), tmp_path)
    options = {"num_beams": 4, "length_penalty": 2.0, "max_length": 30, "min_length": 12, "no_repeat_ngram_size": 3}
    options |= {"early_stopping": True, "forced_bos_token_id": 0, "decoder_start_token_id": 1}
    config = json.loads((path / "config.json").read_text())
    (path / "generation_config.json").unlink()
    (path / "config.json").write_text(json.dumps(config | options))
    ours = TextGenerator.load(path)
    (path / "generation_config.json").write_text(json.dumps({"eos_token_id": 1, "pad_token_id": 1, **options}))
    for prompt in WORDS:
        assert ours.generate([prompt]) == [expected(path, prompt)]


def test_published_sampling_is_the_default_and_a_request_replaces_it(tmp_path):
    path = save(llama(), tmp_path, do_sample=True, temperature=0.3, top_p=0.7, max_new_tokens=5)
    ours = TextGenerator.load(path)
    config = ours.build_config({}, 3)
    assert (config.temperature, config.top_p, config.top_k, config.max_new_tokens) == (0.3, 0.7, 50, 5)
    assert ours.build_config({"num_beams": 3}, 3).effective_beams == 3
    assert ours.build_config({"temperature": 0, "max_new_tokens": 7}, 3).max_new_tokens == 7
    path = save(llama(), tmp_path, num_beams=4)
    ours = TextGenerator.load(path)
    assert ours.build_config({}, 3).effective_beams == 4 and ours.build_config({"temperature": 0.5}, 3).effective_beams == 1


def test_unsupported_options_are_named(tmp_path):
    path = save(llama(), tmp_path, do_sample=False, penalty_alpha=0.6, bad_words_ids=[[3, 4]], typical_p=1.0, max_new_tokens=3)
    answer = TextGenerator.load(path).predict(["the cat"])
    assert (
        len(answer.notes) == 1
        and "penalty_alpha, bad_words_ids of several tokens" in answer.notes[0]
        and "typical_p" not in answer.notes[0]
    )


def test_streams_follow_the_rules_too(tmp_path):
    path = save(llama(), tmp_path, do_sample=False, max_new_tokens=30, no_repeat_ngram_size=2)
    ours = TextGenerator.load(path)
    assert "".join(ours.stream("the cat", chat=False)) == ours.generate(["the cat"])[0]


def test_options_of_a_request_block_ngrams(tmp_path):
    ours = TextGenerator.load(save(llama(), tmp_path))
    config = ours.build_config({"no_repeat_ngram_size": 1, "max_new_tokens": 20, **GREEDY}, 3)
    ids = generate_batch(ours.network, [ours.tokens("the cat")], config, eos_token_ids=ours.end_tokens)[0]
    assert len(set(ids)) == len(ids) > 3
    with pytest.raises(SettingsError, match="no_repeat_ngram_size=-1 must be at least 0"):
        ours.generate(["the cat"], no_repeat_ngram_size=-1)


def test_repeated_ngrams_are_found_in_padded_rows():
    history = torch.tensor([[-1, -1, 3, 4, 3], [5, 6, 5, 7, 5]])
    assert repeated_ngrams(history, 2, 9).nonzero().tolist() == [[0, 4], [1, 6], [1, 7]]
    assert repeated_ngrams(history, 6, 9).sum() == 0 and not TokenRules(eos_token_ids=(1,)).is_active
