"""Text generation of all network types: equal to transformers', greedy and with beam search, in batches."""

from __future__ import annotations

import json
import sys

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from typer.testing import CliRunner

from fieldguide.cli.commands import app
from fieldguide.core.errors import SettingsError
from fieldguide.inference.text_generation import TextGenerator
from fieldguide.models.generation import BeamSearch, GenerationConfig, beam_search
from fieldguide.models.registry import create
from test_pretrained import settled
from tv import transformers
from writers import configuration

WORDS = "a cat dog sees the old house small tree and bird in green red runs far".split()
SPECIAL = ["<s>", "<pad>", "</s>", "<unk>"]
CODES = ["deu_Latn", "eng_Latn", "fra_Latn"]
PROMPTS = ["a cat sees the old house", "dog", "the small bird runs far and a red tree"]


def words(path, before=(), after=()):
    names = [*SPECIAL, *WORDS, *CODES]
    made = Tokenizer(models.WordLevel({word: i for i, word in enumerate(names)}, unk_token="<unk>"))
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    made.add_special_tokens([*SPECIAL, *CODES])
    if frame := {name: made.token_to_id(name) for name in (*before, *after)}:
        made.post_processor = processors.TemplateProcessing(single=[*before, "$A", *after], special_tokens=list(frame.items()))
    transformers.PreTrainedTokenizerFast(
        tokenizer_object=made, bos_token="<s>", eos_token="</s>", pad_token="<pad>", unk_token="<unk>"
    ).save_pretrained(path)
    return made


def ends_sometimes(network, ends, lift):
    """Change the head so that these tokens are likely, since random networks hardly ever generate an end token."""
    head = network.get_output_embeddings().weight
    with torch.no_grad():
        for number, end in enumerate(ends):
            head[end] = lift * head[4 + number] + 0.1 * head[end]
    return network


FORMS = {
    # name: around a source; our config; what answers begin with, as transformers is told; languages as a user names them
    "t5": ((), ("</s>",), {"begin": 1, "end": 2, "pad": 1}, {}, {}),
    "bart": (("<s>",), ("</s>",), {"begin": 2}, {"forced_bos_token_id": 0}, {}),
    "mbart": ((), ("</s>", "eng_Latn"), {"begin": 20}, {}, {"source": "eng_Latn", "target": "deu_Latn"}),
    "nllb": (
        ("eng_Latn",),
        ("</s>",),
        {"begin": 2},
        {"forced_bos_token_id": 22},
        {"source": "deu_Latn", "target": "fra_Latn"},
    ),
}
CODE = {name: 20 + i for i, name in enumerate(CODES)}


@pytest.fixture(scope="module", params=FORMS)
def pair(request, tmp_path_factory):
    """A folder written by save_pretrained, with its network, configuration and tokenizer."""
    before, after, config, forced, languages = FORMS[request.param]
    folder = tmp_path_factory.mktemp(request.param)
    more = {"decoder_depth": 2} | ({} if request.param == "t5" else {"length": 40})  # their cache counts encoder layers
    torch.manual_seed(3)
    wanted = configuration(create(f"{request.param}-test", **config, **more))
    network = settled(transformers.AutoModelForSeq2SeqLM.from_config(wanted))
    with torch.no_grad():
        for p in network.parameters():
            p.mul_(2.0)
    network = ends_sometimes(network, [2], 1.4).eval()
    network.generation_config.forced_eos_token_id = network.config.forced_eos_token_id = None
    network.save_pretrained(folder)
    made = words(folder, before, after)
    return folder, network, request.param, made, forced, languages


def framed(form, made, languages, prompt):
    ids = made.encode(prompt, add_special_tokens=False).ids
    code = CODE.get(languages.get("source"))
    return {"t5": [*ids, 2], "bart": [0, *ids, 2], "mbart": [*ids, 2, code], "nllb": [code, *ids, 2]}[form]


def theirs(network, rows, pad, **how):
    width = max(map(len, rows))
    ids = torch.tensor([row + [pad] * (width - len(row)) for row in rows])
    mask = (torch.arange(width) < torch.tensor([[len(row)] for row in rows])).long()
    out = network.generate(input_ids=ids, attention_mask=mask, do_sample=False, **how)
    return out[:, 1:].tolist()


@pytest.mark.parametrize(
    "how",
    [
        {},
        {"beams": 4},
        {"beams": 3, "penalty": 2.0},
        {"beams": 4, "penalty": 0.0},
        {"repetition": 1.6},
        {"beams": 4, "repetition": 1.6},
    ],
    ids=str,
)
def test_encoder_decoder_folders_generate_as_transformers(pair, how):
    folder, network, form, made, forced, languages = pair
    speaker = TextGenerator.load(folder, **languages)
    rows = [framed(form, made, languages, p) for p in PROMPTS]
    assert [speaker.tokens(p) for p in PROMPTS] == rows
    names = {"beams": "num_beams", "penalty": "length_penalty", "repetition": "repetition_penalty"}
    said = theirs(network, rows, 1, max_new_tokens=14 + len(forced), **forced, **{names[k]: v for k, v in how.items()})
    skipped = [[i for i in row if i not in (0, 1, 2, *CODE.values())] for row in said]
    ours = speaker.generate(PROMPTS, tokens=14, **how)
    assert ours == [made.decode(row) for row in skipped]
    assert ours == [speaker.generate([p], tokens=14, **how)[0] for p in PROMPTS]
    assert any(ours) and (form == "mbart" or len(set(map(len, skipped))) > 1)  # they say something, and end by themselves


def test_forced_start_tokens_count_toward_the_length(pair, monkeypatch):
    folder, _, _, _, forced, languages = pair
    seen = []
    monkeypatch.setattr(
        sys.modules[GenerationConfig.__module__],
        "beam_search",
        lambda *a, **k: (seen.append(k["prefix_length"]), beam_search(*a, **k))[1],
    )
    TextGenerator.load(folder, **languages).generate(["a"], beams=2, tokens=3)
    assert seen == [len(forced)]


def test_streaming_honors_stop_strings_and_seeds(pair):
    folder, _, form, _, _, languages = pair
    speaker = TextGenerator.load(folder, **languages)
    whole = speaker.generate(PROMPTS, tokens=14)
    assert ["".join(speaker.stream(p, tokens=14)) for p in PROMPTS] == whole
    longest = max(whole, key=len)
    stop = longest.split()[len(longest.split()) // 2]
    for more in ({}, {"beams": 1}):
        assert speaker.generate(PROMPTS, tokens=14, stop=stop, **more) == [text.partition(stop)[0] for text in whole]
    both = json.dumps([stop, longest.split()[0]])
    assert speaker.generate([PROMPTS[whole.index(longest)]], tokens=14, stop=both) == [""]
    drawn = [speaker.generate(PROMPTS, tokens=8, temperature=1.5, seed=s) for s in (1, 1, 2, 3)]
    assert drawn[0] == drawn[1] and len({tuple(d) for d in drawn}) > 1
    assert len("".join(speaker.generate(["a"] * 6, tokens=8, temperature=3.0)).split()) > 6
    assert len(set(speaker.generate(["a"] * 6, tokens=8, temperature=3.0))) > 1  # chance comes to each by its number
    if form != "t5":  # no longer than the network has places for
        assert len(speaker.generate(["a"], tokens=300, temperature=3.0, repetition=0.5)[0].split()) <= 40


def test_language_tokens_are_required_or_inferred(pair):
    folder, _, form, _, _, _ = pair
    if form == "nllb":
        with pytest.raises(SettingsError, match=r"default: eng_Latn.*--set target="):
            TextGenerator.load(folder)
        with pytest.raises(SettingsError, match=r"target='fra_Lat' is not a token of .*fra_Latn"):
            TextGenerator.load(folder, target="fra_Lat")
        assert TextGenerator.load(folder, target="deu_Latn").markers.before == (CODE["eng_Latn"],)
    if form == "mbart":  # fitted to one language, with which its answers begin
        frame = TextGenerator.load(folder).markers
        assert (frame.before, frame.after, frame.target_start) == ((), (2, CODE["eng_Latn"]), (CODE["deu_Latn"],))
        assert TextGenerator.load(folder, target="fra_Latn").markers.target_start == (CODE["fra_Latn"],)


def test_folders_on_the_command_line(pair):
    folder, _, _, _, _, languages = pair
    named = [x for side, name in languages.items() for x in ("--set", f"{side.removesuffix('_language')}={name}")]
    run = lambda *words: CliRunner().invoke(app, ["predict", str(folder), *words, *named, "--set", "tokens=14"])
    speaker = TextGenerator.load(folder, **languages)
    assert run(PROMPTS[0]).stdout.strip("\n") == speaker.generate(PROMPTS[:1], tokens=14)[0]  # streamed
    assert run(PROMPTS[0], "--set", "beams=4").stdout.strip("\n") == speaker.generate(PROMPTS[:1], tokens=14, beams=4)[0]
    lines = [json.loads(line) for line in run(*PROMPTS, "--json").stdout.splitlines()]
    assert [line["text"] for line in lines] == speaker.generate(PROMPTS, tokens=14)
    failed = run("x", "--set", "beams=4", "--set", "top_p=0.5")
    assert failed.exit_code and "cannot be combined with sampling" in str(failed.exception)


# ------------------------------------------------------------------------------------------------ decoders


@pytest.fixture(scope="module", params=["llama", "gpt2"])
def decoder(request, tmp_path_factory):
    """A decoder with two end tokens, the second of which is generated first."""
    folder = tmp_path_factory.mktemp(request.param)
    torch.manual_seed({"llama": 6, "gpt2": 4}[request.param])  # of those with which both end some answers
    shape = {"vocab_size": 23, "bos_token_id": 0, "eos_token_id": 2, "pad_token_id": 1}
    config = transformers.LlamaConfig(
        hidden_size=32,
        intermediate_size=40,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
        **shape,
    )
    if request.param == "gpt2":
        config = transformers.GPT2Config(n_embd=32, n_layer=2, n_head=2, n_positions=64, **shape)
    network = transformers.AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for p in network.parameters():
            p.add_(0.3 * torch.randn_like(p))
    network = ends_sometimes(network, [0, 2], 1.2).eval()
    network.generation_config.eos_token_id = [0, 2]
    network.save_pretrained(folder)
    return folder, network, words(folder)


@pytest.mark.parametrize(
    "how",
    [
        {"temperature": 0},
        {"beams": 2},
        {"beams": 5, "penalty": 0.0},
        {"beams": 4, "penalty": 2.0},
        {"beams": 4, "repetition": 1.4},
    ],
    ids=str,
)
def test_any_end_token_ends_the_output(decoder, how):
    folder, network, made = decoder
    speaker = TextGenerator.load(folder)
    assert speaker.end_tokens == (0, 2)
    names = {"beams": "num_beams", "penalty": "length_penalty", "repetition": "repetition_penalty"}
    peer, lasts = [], set()
    for prompt in (*PROMPTS, *WORDS):
        ids = torch.tensor([made.encode(prompt).ids])
        said = network.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            do_sample=False,
            max_new_tokens=12,
            **{names[k]: v for k, v in how.items() if k in names},
        )[0, ids.shape[1] :].tolist()
        lasts |= {i for i in said if i in (0, 2)}
        peer.append(made.decode(said[: next((i for i, token in enumerate(said) if token in (0, 2)), len(said))]))
    assert speaker.generate([*PROMPTS, *WORDS], tokens=12, **how) == peer
    assert lasts == {0, 2}  # both end answers here


def test_beam_search_needs_an_end_token_and_free_context(decoder):
    speaker = TextGenerator.load(decoder[0])
    with pytest.raises(SettingsError, match="Beam search needs an end token"):
        TextGenerator(speaker.network, speaker.text, ()).generate(["a"], beams=2)
    with pytest.raises(SettingsError, match="leaves beam search no room in the model's length=64"):
        speaker.generate(["a " * 70], beams=2)
    assert speaker.generate(["a " * 60], beams=2, tokens=200)
    assert speaker.stream("a", beams=2) is None  # the answer is known only at the end
    with pytest.raises(SettingsError, match="leave out source"):
        TextGenerator.load(decoder[0], source="deu_Latn")


def test_generation_config_defaults_and_ranges():
    assert (GenerationConfig().effective_beams, GenerationConfig().sampling.temperature, GenerationConfig().sampling.top_p) == (
        1,
        0.8,
        0.95,
    )
    assert (
        BeamSearch().effective_beams,
        BeamSearch(temperature=0).effective_beams,
        BeamSearch(num_beams=2).effective_beams,
    ) == (4, 1, 2)
    assert BeamSearch(temperature=0).sampling.temperature == 0 and BeamSearch(top_p=0.9).sampling.temperature == 1
    assert BeamSearch(top_k=5).effective_beams == 1 and GenerationConfig(num_beams=3, temperature=0).effective_beams == 3
    assert (
        GenerationConfig(stop_strings="x").stop_list == ["x"]
        and GenerationConfig().stop_list == []
        and GenerationConfig(stop_strings='["a", "b"]').stop_list == ["a", "b"]
    )
    assert GenerationConfig(stop_strings="[").stop_list == ["["]
    for bad, why in (
        ({"num_beams": 2, "top_k": 3}, "top_k"),
        ({"num_beams": 0}, "at least 1"),
        ({"max_new_tokens": 0}, "at least 1"),
        ({"temperature": -1}, "at least 0"),
    ):
        with pytest.raises(SettingsError, match=why):
            GenerationConfig(**bad)


def test_rows_may_hold_lists_and_conversations():
    from fieldguide.data.readers.memory import as_table

    turns = [{"role": "user", "content": "hello"}]
    for source in ({"messages": turns}, [{"messages": turns}]):
        assert as_table(source).to_dicts() == [{"messages": turns}]
    assert as_table([{"tokens": ["a", "b"], "x": 1}, {"tokens": ["c"], "x": 2}])["tokens"].to_list() == [["a", "b"], ["c"]]
    assert as_table({"a": [1, 2]}) is None  # columns


def test_options_without_a_value_are_errors():
    from fieldguide.core.options import parse_value

    assert parse_value("x", None, int | None) is None
    with pytest.raises(SettingsError, match="must not be empty"):
        parse_value("x", None, int)
