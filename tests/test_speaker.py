"""Text generation with pretrained models: templates, tokenizers, batches, beam search and streams, against transformers."""

from __future__ import annotations

import json

import pytest
import torch
from jinja2 import Environment
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

from fieldguide.core.errors import DataError, SettingsError, WeightsError
from fieldguide.data.preprocessing.chat_template import ChatTemplate
from fieldguide.inference.text_generation import TextGenerator
from fieldguide.models.generation.stop_strings import decode_stream, truncate_at_stop
from test_pretrained import settled
from tv import transformers

GREEDY = {"temperature": 0.0}
TEXT = ["the cat sat on the mat", "a dog ran after the cat, and the cat ran too", "who sat on the mat? the dog", "ünïcödé ☃"]
TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}{% if message['role'] not in ['user', 'assistant', 'system'] %}"
    "{{ raise_exception('nobody is called ' + message['role']) }}{% endif %}\n"
    "<|{{ message.role }}|>{{ message.content | trim }}{{ eos_token }}\n{% endfor %}\n"
    "{%- if add_generation_prompt %}<|assistant|>{% endif %}"
)


def bpe() -> Tokenizer:
    made = Tokenizer(models.BPE())
    made.pre_tokenizer, made.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    made.train_from_iterator(
        TEXT,
        trainers.BpeTrainer(
            vocab_size=300,
            special_tokens=["<s>", "</s>"],
            initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
            show_progress=False,
        ),
    )
    return made


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("model")
    tokenizer = bpe()
    torch.manual_seed(0)
    theirs = settled(
        transformers.LlamaForCausalLM(
            transformers.LlamaConfig(
                vocab_size=tokenizer.get_vocab_size(),
                hidden_size=32,
                intermediate_size=40,
                num_hidden_layers=2,
                num_attention_heads=4,
                num_key_value_heads=2,
                max_position_embeddings=64,
                bos_token_id=0,
                eos_token_id=1,
                pad_token_id=None,
            )
        )
    )
    theirs.save_pretrained(path)
    fast = transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>")
    fast.chat_template = TEMPLATE
    fast.save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def speaker(folder):
    return TextGenerator.load(folder)


def theirs(folder, prompt: str, **how) -> str:
    fast = transformers.AutoTokenizer.from_pretrained(folder)
    model = transformers.LlamaForCausalLM.from_pretrained(folder).eval()
    ids = fast(prompt, return_tensors="pt").input_ids
    out = model.generate(ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=12, pad_token_id=1, **how)
    return fast.decode(out[0, ids.shape[1] :], skip_special_tokens=True)


def test_greedy_output_equals_transformers(folder, speaker):
    prompts = ["the cat", "a dog ran after", "who"]
    together = speaker.generate(prompts, tokens=12, **GREEDY)
    assert together == [theirs(folder, p) for p in prompts]
    assert together == [speaker.generate([p], tokens=12, **GREEDY)[0] for p in prompts]
    assert ["".join(speaker.stream(p, chat=False, tokens=12, **GREEDY)) for p in prompts] == together


def test_sampling_depends_on_the_seed(speaker):
    hot = {"temperature": 2.0, "tokens": 8}
    assert speaker.generate(["the"], seed=1, **hot) == speaker.generate(["the"], seed=1, **hot)
    assert len({speaker.generate(["the"], seed=s, **hot)[0] for s in range(5)}) > 1


def test_conversations_are_rendered_as_in_transformers(folder, speaker):
    said = [{"role": "system", "content": " be brief "}, {"role": "user", "content": "who sat?"}]
    fast = transformers.AutoTokenizer.from_pretrained(folder)
    assert speaker.template(said) == fast.apply_chat_template(said, tokenize=False, add_generation_prompt=True)
    assert speaker.template(said, answer=False) == fast.apply_chat_template(said, tokenize=False)
    assert speaker.tokens(said) == fast(speaker.template(said), add_special_tokens=False).input_ids
    with pytest.raises(DataError, match="nobody is called robot"):
        speaker.template([{"role": "robot", "content": "?"}])


@pytest.mark.parametrize(
    "source",
    [
        "{{ ''.__class__.__mro__ }}",
        "{{ messages.append(1) }}",
        "{{ messages[0].update(x=1) }}",
        "{{ cycler.__init__.__globals__ }}",
    ],
)
def test_templates_are_sandboxed(source):
    said = [{"role": "user", "content": "hi"}]
    Environment().from_string(source).render(messages=list(said))  # would be done elsewhere
    with pytest.raises(DataError, match="chat template"):
        ChatTemplate(source)(said)


def test_invalid_template_is_rejected():
    with pytest.raises(DataError, match="line 2"):
        ChatTemplate("fine\n{% if %}")


def test_streamed_pieces_are_complete_characters():
    tokenizer = bpe()
    for text in TEXT:
        ids = tokenizer.encode(text).ids
        found = list(decode_stream(ids, tokenizer.decode))
        assert "".join(found) == text and all("\ufffd" not in piece for piece in found)
        stops = ["the m", "and"]
        assert "".join(decode_stream([*ids, 1, -1], tokenizer.decode, eos_token_ids=(1,), stops=stops)) == truncate_at_stop(
            text, stops
        )
    assert truncate_at_stop("abcd", ["cd", "b"]) == "a" and truncate_at_stop("abcd", ["", "x"]) == "abcd"


def test_invalid_requests_are_rejected(folder, tmp_path, speaker):
    with pytest.raises(SettingsError, match="A prompt is empty"):
        TextGenerator(speaker.network, speaker.text, ()).generate([""])
    with pytest.raises(DataError, match="no chat template"):
        TextGenerator(speaker.network, speaker.text, (1,)).tokens([{"role": "user", "content": "?"}])
    for file in folder.iterdir():
        if "token" not in file.name:
            (tmp_path / file.name).write_bytes(file.read_bytes())
    with pytest.raises(WeightsError, match=r"needs its tokenizer"):
        TextGenerator.load(tmp_path)


@pytest.mark.parametrize(
    "parted, begin, begun",
    [("gpt-2", None, False), ("gpt-2", True, True), ("llama-bpe", None, True), ("llama-bpe", False, False)],
)
def test_gguf_tokenizer(tmp_path, parted, begin, begun):
    """Merges and special tokens give the same tokens as the original tokenizer; the start token is added if the file
    or its type says so.
    """
    gguf = pytest.importorskip("gguf")
    from fieldguide.data.preprocessing.gguf_tokenizer import LLAMA3
    from fieldguide.data.preprocessing.gguf_tokenizer import read_tokenizer as read

    made = bpe()
    made.add_special_tokens(["<s>", "</s>"])
    if parted == "llama-bpe":
        made.pre_tokenizer = pre_tokenizers.Sequence(
            [pre_tokenizers.Split(Regex(LLAMA3), "isolated"), pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
        )
    state = json.loads(made.to_str())["model"]
    tokens = sorted(state["vocab"], key=state["vocab"].get)
    writer = gguf.GGUFWriter(tmp_path / "t.gguf", "llama")
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(parted)
    writer.add_token_list(tokens)
    writer.add_token_types([3 if t in ("<s>", "</s>") else 1 for t in tokens])
    writer.add_token_merges([" ".join(m) for m in state["merges"]])
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(1)
    if begin is not None:
        writer.add_add_bos_token(begin)
    writer.add_chat_template(TEMPLATE)
    for step in (writer.write_header_to_file, writer.write_kv_data_to_file, writer.write_tensors_to_file, writer.close):
        step()
    again, named, template = read(tmp_path / "t.gguf")
    for text in [*TEXT, "a</s>b", "x  y\n\n z 123"]:
        ids = made.encode(text).ids
        assert again.encode(text, add_special_tokens=False).ids == ids and again.decode(ids) == made.decode(ids)
        assert again.encode(text).ids == [0] * begun + ids
    assert named == {"bos_token": "<s>", "eos_token": "</s>"} and template == TEMPLATE


def test_on_the_command_line(folder, capsys):
    from typer.testing import CliRunner

    from fieldguide.cli.commands import app

    run = lambda *words: CliRunner().invoke(app, ["predict", str(folder), *words])
    greedy = ("--set", "temperature=0", "--set", "tokens=12", "--set", "chat=false")
    assert run("the cat", *greedy).stdout.strip("\n") == theirs(folder, "the cat")
    lines = [json.loads(line) for line in run("the cat", "who", *greedy, "--json").stdout.splitlines()]
    assert [line["text"] for line in lines] == [theirs(folder, p) for p in ("the cat", "who")]
    assert "nothing" not in run("--set", "tokens=3").stdout
    for words, message in (
        (("x", "--set", "heat=1"), "has no option heat"),
        ((), "no prompt"),
        (("x", "--set", "temperature=-1"), "must be at least 0"),
    ):
        failed = run(*words)
        assert failed.exit_code and message in str(failed.exception)
