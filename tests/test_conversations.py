"""Fits on conversations from checkpoints with a chat template, compared with `apply_chat_template` of transformers."""

from __future__ import annotations

import json
import subprocess
import sys

import numpy as np
import polars as pl
import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from fieldguide import fit
from fieldguide.automl.fit import NullCallback
from fieldguide.core.errors import DataError
from fieldguide.data import read
from fieldguide.data.preprocessing import TextTokenizer
from fieldguide.data.preprocessing.chat_template import ChatTemplate
from fieldguide.objectives import NextToken
from fieldguide.tasks.text.text_generation import CHAT_SPECIAL_TOKENS, TextGeneration
from tv import transformers

# As SmolLM2-Instruct publishes it; as Llama 3; as Llama 2, whose turns have no token of their own; one that marks what the
# assistant says by itself; and one that drops what was thought in earlier turns, as Qwen3's does.
CHATML = (
    "{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}"
    "{{ '<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging "
    "Face<|im_end|>\n' }}{% endif %}"
    "{{'<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n'}}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
LLAMA3 = (
    "{% set loop_messages = messages %}{% for message in loop_messages %}"
    "{% set content = '<|start_header_id|>' + message['role'] + '<|end_header_id|>\n\n'+ "
    "message['content'] | trim + '<|eot_id|>' %}{% if loop.index0 == 0 %}"
    "{% set content = bos_token + content %}{% endif %}{{ content }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"
)
LLAMA2 = (
    "{% for message in messages %}{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('roles must alternate') }}{% endif %}{% if message['role'] == 'user' %}"
    "{{ bos_token + '[INST] ' + message['content'].strip() + ' [/INST]' }}{% else %}"
    "{{ ' '  + message['content'].strip() + ' ' + eos_token }}{% endif %}{% endfor %}"
)
MARKED = (
    "{% for message in messages %}{% if message.role == 'assistant' %}<|im_start|>assistant\n"
    "{% generation %}{{ message.content }}<|im_end|>{% endgeneration %}\n{% else %}<|im_start|>"
    "{{ message.role }}\n{{ message.content }}<|im_end|>\n{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
THOUGHT = "('<think></think>' if loop.last and message['role'] == 'assistant' else '') + message['content'] + '<|im_end|>'"
THINKS = CHATML.replace("message['content'] + '<|im_end|>'", THOUGHT)
SHOUTS = CHATML.replace("message['content'] + '<|im_end|>'", "message['content'] | upper + '<|im_end|>'")
TOKENS = [
    "<|endoftext|>",
    "<|im_start|>",
    "<|im_end|>",
    "<|begin_of_text|>",
    "<|start_header_id|>",
    "<|end_header_id|>",
    "<|eot_id|>",
]
# template -> bos_token, eos_token, what stands behind an answer
TEMPLATES = {
    "chatml": (CHATML, "<|im_start|>", "<|im_end|>", "<|im_end|>"),
    "marked": (MARKED, None, "<|endoftext|>", "<|im_end|>"),
    "llama3": (LLAMA3, "<|begin_of_text|>", "<|endoftext|>", "<|eot_id|>"),
    "llama2": (LLAMA2, "<|begin_of_text|>", "<|endoftext|>", "<|endoftext|>"),
    "thinks": (THINKS, "<|im_start|>", "<|im_end|>", "<|im_end|>"),
}
CHATS = [
    [{"role": "user", "content": "hello there"}, {"role": "assistant", "content": "how are you"}],
    [
        {"role": "system", "content": "be kind"},
        {"role": "user", "content": "  what?  "},
        {"role": "assistant", "content": "Ünïcödé ☃ 你好 🙂\n\nand more"},
        {"role": "user", "content": "how are you"},
        {"role": "assistant", "content": "how are you"},
    ],
    [
        {"role": "user", "content": "a"},
        {"role": "assistant", "content": "b"},
        {"role": "user", "content": "b"},
        {"role": "assistant", "content": "a"},
    ],
    [{"role": "user", "content": "x"}],
]
ALTERNATING = [chat for chat in CHATS if chat[0]["role"] == "user"]


class Said(NullCallback):
    def __init__(self):
        self.words = []

    def log(self, text):
        self.words.append(text)


def words() -> Tokenizer:
    made = Tokenizer(models.BPE())
    made.pre_tokenizer, made.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    made.train_from_iterator(
        ["hello there user assistant system how are you question answer"] * 3,
        trainers.BpeTrainer(
            vocab_size=310,
            special_tokens=TOKENS,
            initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
            show_progress=False,
        ),
    )
    return made


def fast(template: str, begin: str | None, end: str):
    begins = {"bos_token": begin} if begin else {}
    peer = transformers.PreTrainedTokenizerFast(tokenizer_object=words(), eos_token=end, **begins)
    peer.chat_template = template
    return peer


def table(chats):
    return read(pl.DataFrame({"messages": chats}))


def learnt_from(folder, chats, **options) -> TextGeneration:
    return TextGeneration.fit(table(chats), TextGeneration.Options(tokenizer=str(folder), **{"length": 16, **options}))


@pytest.mark.parametrize("name", TEMPLATES)
def test_conversations_are_rendered_as_in_transformers(name, tmp_path):
    template, begin, end, closing = TEMPLATES[name]
    peer, chats = fast(template, begin, end), ALTERNATING if name == "llama2" else CHATS
    peer.save_pretrained(tmp_path)
    task = learnt_from(tmp_path, chats)
    tokens, learnt = task.concatenate_texts(table(chats))
    assert tokens.tolist() == [i for chat in chats for i in peer.apply_chat_template(chat).input_ids]
    for chat in chats:
        turns = [(m["role"], m["content"]) for m in chat]
        assert task.prompt(turns) == peer.apply_chat_template(chat, add_generation_prompt=True).input_ids
    wanted = [m["content"].strip() + closing for chat in chats for m in chat if m["role"] == "assistant"]
    said = task.text.tokenizer.decode(tokens[learnt].tolist(), skip_special_tokens=False)
    if name == "thinks":  # the last answer of each conversation after its empty thought
        assert said == "<think></think>" + wanted[0] + wanted[1] + "<think></think>" + wanted[2] + wanted[3] + (
            "<think></think>" + wanted[4]
        )
    else:
        assert said.replace(" ", "") == "".join(wanted).replace(" ", "")
    assert task.ends[0] == peer.eos_token_id and set(task.ends) == {peer.eos_token_id, peer.convert_tokens_to_ids(closing)}
    assert task.notes == [
        "conversations are rendered with the checkpoint's chat template: the assistant's turns are trained on"
    ]


def test_assistant_tokens_follow_the_template(tmp_path):
    template, _, end, _ = TEMPLATES["marked"]
    peer = fast(template, None, end)
    peer.save_pretrained(tmp_path)
    tokens, learnt = learnt_from(tmp_path, CHATS).concatenate_texts(table(CHATS))
    theirs = [peer.apply_chat_template(chat, return_dict=True, return_assistant_tokens_mask=True) for chat in CHATS]
    assert learnt.tolist() == [bool(x) for one in theirs for x in one["assistant_masks"]] and 0 < learnt.sum() < len(tokens)


def test_unidentified_turns_are_trained_on_and_noted(tmp_path):
    fast(SHOUTS, "<|im_start|>", "<|im_end|>").save_pretrained(tmp_path)
    task = learnt_from(tmp_path, CHATS[:2])
    assert task.concatenate_texts(table(CHATS[:2]))[1].all() and "all text is trained on" in task.notes[0]
    same = [{"role": "user", "content": "!"}, {"role": "assistant", "content": "?!"}]  # has no letters to raise
    task = learnt_from(tmp_path, [CHATS[0], same])
    assert "and all text of 1 conversations whose turns cannot be identified" in task.notes[0]
    tokens, learnt = task.concatenate_texts(table([same]))
    assert task.text.tokenizer.decode(tokens[learnt].tolist(), skip_special_tokens=False) == "?!<|im_end|>"


def test_unmatched_generation_marks_are_ignored():
    template = ChatTemplate("{% for m in messages %}{% generation %}{{ m.content }}{% endgeneration %}{% endfor %}")
    assert template.render_with_spans([{"role": "assistant", "content": "a\ufdd1b"}]) == ("ab", None)
    assert template([{"role": "assistant", "content": "a"}]) == "a"


def test_conversations_that_cannot_be_rendered_are_rejected(tmp_path):
    peer = fast(LLAMA2, "<|begin_of_text|>", "<|endoftext|>")
    peer.save_pretrained(tmp_path)
    with pytest.raises(DataError, match=r"memory:2: .*roles must alternate"):
        learnt_from(tmp_path, CHATS[:2])
    (tmp_path / "chat_template.jinja").unlink()
    with pytest.raises(DataError) as error:
        learnt_from(tmp_path, CHATS[:2])
    assert str(error.value) == (
        f"{tmp_path}: conversations need a chat template in the tokenizer's folder (chat_template.jinja, or chat_template in "
        f"tokenizer_config.json) or the tokens {', '.join(CHAT_SPECIAL_TOKENS)}. "
        f"Missing tokens: {', '.join(CHAT_SPECIAL_TOKENS[1:])}."
    )


def checkpoint(folder, name="chatml", length=64):
    template, begin, end, _ = TEMPLATES[name]
    peer = fast(template, begin, end)
    torch.manual_seed(0)
    transformers.LlamaForCausalLM(
        transformers.LlamaConfig(
            vocab_size=len(peer),
            hidden_size=32,
            intermediate_size=40,
            num_hidden_layers=1,
            num_attention_heads=2,
            num_key_value_heads=1,
            max_position_embeddings=length,
            bos_token_id=peer.bos_token_id,
            eos_token_id=peer.eos_token_id,
            pad_token_id=None,
        )
    ).save_pretrained(folder)
    peer.save_pretrained(folder)
    return peer


STEPS = {"batch": 8, "precision": "float32", "evaluate": 100, "task.length": 32}


def test_fit_on_conversations_learns_to_answer_and_stop(tmp_path):
    peer = checkpoint(tmp_path / "net")
    chats = [[{"role": "user", "content": f"hello {i}"}, {"role": "assistant", "content": "how are you"}] for i in range(60)]
    (tmp_path / "chat.jsonl").write_text("\n".join(json.dumps({"messages": chat}) for chat in chats))
    run = fit(
        tmp_path / "chat.jsonl",
        weights=tmp_path / "net",
        out=tmp_path / "run",
        callback=(said := Said()),
        settings={**STEPS, "steps": 60, "lr": 1e-2, "tune": "whole"},
    )
    assert any("the assistant's turns are trained on" in text for text in said.words)
    greedy = {"temperature": "0.0", "tokens": 12}
    question = [{"role": "user", "content": "hello 77"}]
    answers = [a["text"] for a in run.predict(["hello 77", pl.DataFrame({"messages": [question]})], **greedy)]
    assert answers == ["how are you"] * 2  # ends where it is to, typed or in a table
    assert run.task.prompt([("user", "hello 77")]) == peer.apply_chat_template(question, add_generation_prompt=True).input_ids
    again = fit(tmp_path / "chat.jsonl", weights=run.path, out=tmp_path / "again", settings={**STEPS, "steps": 1})
    assert again.task.text.template == run.task.text.template and again.task.ends == run.task.ends


def test_batch_without_targets_is_no_error():
    net = torch.nn.Embedding(5, 5)
    objective = NextToken(net, ("tokens",), smoothing=0.1)
    tokens = torch.arange(4)[None]
    loss = objective({"tokens": tokens, "target": torch.full((1, 4), -1)})["loss"]
    loss.backward()
    assert loss == 0 and not net.weight.grad.any()
    target = torch.tensor([[2, -1, 4, -1]])
    wanted = torch.nn.functional.cross_entropy(net(tokens)[0], target[0], ignore_index=-1, label_smoothing=0.1)
    torch.testing.assert_close(objective({"tokens": tokens, "target": target})["loss"], wanted)


def test_fit_on_texts_adds_the_prefix_of_the_tokenizer(tmp_path):
    from tokenizers import processors

    peer = checkpoint(tmp_path / "net", "llama3")
    made = Tokenizer.from_file(str(tmp_path / "net" / "tokenizer.json"))
    begin = peer.bos_token_id
    made.post_processor = processors.TemplateProcessing(f"{peer.bos_token} $A", special_tokens=[(peer.bos_token, begin)])
    made.save(str(tmp_path / "net" / "tokenizer.json"))
    (tmp_path / "t.jsonl").write_text("\n".join(json.dumps({"text": f"hello there {i}"}) for i in range(60)))
    run = fit(
        tmp_path / "t.jsonl",
        task="text-generation",
        weights=tmp_path / "net",
        out=tmp_path / "run",
        settings={**STEPS, "steps": 2},
    )
    rows = read(pl.DataFrame({"text": ["hello", "there"]}))
    tokens, learnt = run.task.concatenate_texts(TextGeneration.build_examples(rows, run.task.options))
    one, two = (made.encode(text).ids for text in ("hello", "there"))
    assert tokens.tolist() == [run.task.text.end, *one, run.task.text.end, *two] and one[0] == begin
    assert np.flatnonzero(~learnt).tolist() == np.flatnonzero(tokens == begin).tolist()
    assert run.task.prompt([("", "hello")]) == one
    assert isinstance(run.predict(["hello there"], tokens=3)[0]["text"], str)


def test_chat_template_is_saved_with_the_run(tmp_path):
    fast(*TEMPLATES["llama3"][:3]).save_pretrained(tmp_path)
    task = learnt_from(tmp_path, CHATS)
    (tmp_path / "kept").mkdir()
    task.save(tmp_path / "kept")
    again = TextGeneration.from_state(task.columns, task.options, json.loads(json.dumps(task.state())), tmp_path / "kept")
    assert again.ends == task.ends and again.first == [("user", "hello there")]
    assert again.prompt(again.first) == task.prompt(task.first)
    assert TextTokenizer.load(tmp_path / "kept").special["bos_token"] == "<|begin_of_text|>"


@pytest.mark.slow
@pytest.mark.parametrize("name", ["chatml", "marked"])
def test_exports_apply_the_chat_template(name, tmp_path):
    """The program of an ONNX folder takes messages, and transformers finds the template in its folder."""
    peer = checkpoint(tmp_path / "net", name)
    chats = [[{"role": "user", "content": f"hello {i}"}, {"role": "assistant", "content": "how are you"}] for i in range(60)]
    (tmp_path / "chat.jsonl").write_text("\n".join(json.dumps({"messages": chat}) for chat in chats))
    settings = {**STEPS, "steps": 20, "lr": 1e-2, "tune": "whole"}
    run = fit(tmp_path / "chat.jsonl", weights=tmp_path / "net", out=tmp_path / "run", settings=settings)
    done = run.export(out=tmp_path / "onnx")
    assert done.passed and "jinja2" in (done.path / "requirements.txt").read_text(), done.verification.problems
    talk = [*chats[0], {"role": "user", "content": "hello 5"}]
    program = "import json, run; print(json.dumps([run.prepare({'messages': m})['tokens'] for m in json.loads(sys.argv[2])]))"
    command = [sys.executable, "-IBc", f"import sys; sys.path.insert(0, sys.argv[1]); {program}", str(done.path)]
    found = subprocess.run([*command, json.dumps([talk, "hello 7"])], capture_output=True, text=True)
    said = [talk, [{"role": "user", "content": "hello 7"}]]
    want = [peer.apply_chat_template(one, add_generation_prompt=True).input_ids for one in said]
    room = json.loads((done.path / "export.json").read_text())["length"] - 1  # earlier tokens are left out
    assert json.loads(found.stdout) == [ids[-room:] for ids in want], found.stderr
    folder = run.export("huggingface", out=tmp_path / "hf").path
    again = transformers.AutoTokenizer.from_pretrained(folder)
    assert again.apply_chat_template(talk, add_generation_prompt=True).input_ids == want[0]
