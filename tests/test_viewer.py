"""Vision-language models loaded from a folder: generated text equal to transformers with its processor."""

from __future__ import annotations

import json

import pytest
import torch
from PIL import Image
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from typer.testing import CliRunner

from fieldguide.checkpoints.load import save
from fieldguide.cli import commands
from fieldguide.core.errors import SettingsError, WeightsError
from fieldguide.inference.image_to_text import ImageToText
from fieldguide.models.registry import create
from test_folders import settled
from tv import transformers

TEMPLATE = (
    "{% for m in messages %}{{ m['role'].upper() + ': ' }}{% for c in m['content'] %}{% if c['type'] == 'image' %}"
    "{{ '<image>\n' }}{% endif %}{% endfor %}{% for c in m['content'] %}{% if c['type'] == 'text' %}{{ c['text'] }} "
    "{% endif %}{% endfor %}{% endfor %}{% if add_generation_prompt %}{{ 'ASSISTANT:' }}{% endif %}"
)
ASKED = "What is there?"


def words() -> Tokenizer:
    """Return a byte-level tokenizer with start, end and image tokens."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    made = Tokenizer(models.BPE({letter: i for i, letter in enumerate(letters)}, []))
    made.pre_tokenizer, made.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    made.add_special_tokens(["<s>", "</s>", "<image>"])
    made.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", made.token_to_id("<s>"))])
    return made


def written(path, template=None):
    made = words()
    ids = {token: made.token_to_id(token) for token in ("<s>", "</s>", "<image>")}
    torch.manual_seed(0)
    tower = {
        "model_type": "clip_vision_model",
        "hidden_size": 16,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "image_size": 24,
        "patch_size": 8,
        "projection_dim": 8,
    }
    body = {
        "model_type": "llama",
        "vocab_size": 264,
        "hidden_size": 16,
        "intermediate_size": 24,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 96,
        "eos_token_id": ids["</s>"],
    }
    peer = settled(
        transformers.LlavaForConditionalGeneration(
            transformers.LlavaConfig(vision_config=tower, text_config=body, image_token_index=ids["<image>"])
        )
    )
    peer.save_pretrained(path)
    fast = transformers.PreTrainedTokenizerFast(tokenizer_object=made, bos_token="<s>", eos_token="</s>", pad_token="</s>")
    images = transformers.CLIPImageProcessorPil(size={"shortest_edge": 24}, crop_size={"height": 24, "width": 24})
    ready = transformers.LlavaProcessor(
        images,
        fast,
        patch_size=8,
        vision_feature_select_strategy="default",
        image_token="<image>",
        num_additional_image_tokens=1,
        chat_template=template,
    )
    ready.save_pretrained(path)
    return path, peer.eval(), ready


@pytest.fixture(scope="module")
def llava(tmp_path_factory):
    return written(tmp_path_factory.mktemp("llava"), TEMPLATE)


@torch.no_grad()
def theirs(peer, ready, paths, text, **how):
    said = []
    for path in paths:
        made = ready(text=text, images=Image.open(path).convert("RGB"), return_tensors="pt")
        out = peer.generate(
            **{k: v for k, v in made.items() if k != "token_type_ids"},
            max_new_tokens=12,
            do_sample=False,
            pad_token_id=0,
            **how,
        )
        said.append(ready.tokenizer.decode(out[0, made["input_ids"].shape[1] :], skip_special_tokens=True).strip())
    return said


@pytest.mark.parametrize("template", [TEMPLATE, None], ids=["conversation", "plain"])
def test_generated_text_equals_transformers(llava, pictures, tmp_path, template):
    folder, peer, ready = llava if template else written(tmp_path / "plain")
    paths = sorted(map(str, pictures.glob("*.png")))
    text = f"USER: <image>\n{ASKED} ASSISTANT:" if template else f"<image>\n{ASKED}"
    if template:
        asked = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": ASKED}]}]
        assert ready.apply_chat_template(asked, add_generation_prompt=True) == text
    viewer = ImageToText.load(folder)
    assert viewer.format_prompt(ASKED) == text and viewer.tokens(text) == viewer.tokens(ASKED)
    assert viewer.tokens(ASKED) == ready(text=text, images=Image.open(paths[0]).convert("RGB"))["input_ids"][0]
    found = viewer.predict(str(pictures), ASKED, tokens=12)
    want = theirs(peer, ready, paths, text)
    searched = viewer.predict(str(pictures), ASKED, tokens=12, beams=3)
    assert [r["text"] for r in searched] == theirs(peer, ready, paths, text, num_beams=3, length_penalty=1.0) != want
    assert (
        [r["text"] for r in found] == want
        and len(set(want)) > 1
        and [r["input"] for r in found] == [path.rpartition("/")[2] for path in paths]
    )


def test_prompts_and_options(llava, pictures, tmp_path):
    viewer, photo = ImageToText.load(llava[0]), str(pictures / "a.png")
    plain = viewer.predict(photo, ASKED, tokens=12)[0]["text"]
    assert plain.startswith(viewer.predict(photo, ASKED, tokens=4)[0]["text"])
    drawn = [viewer.predict(photo, ASKED, tokens=12, seed=seed, temperature=5.0)[0]["text"] for seed in (1, 1, 2)]
    assert drawn[0] == drawn[1] != drawn[2]
    assert viewer.predict(photo, ASKED, tokens=12, stop=plain[3:5])[0]["text"] == plain[: plain.find(plain[3:5])].strip()
    (tmp_path / "broken.png").write_bytes(b"no picture")
    said = viewer.predict([photo, str(tmp_path / "broken.png")], ASKED, tokens=12)
    assert said[0]["text"] == plain and set(said[1]) == {"input", "error"}
    with pytest.raises(SettingsError, match="contains <image> 2 times"):
        viewer.predict(photo, "<image> and <image>")
    with pytest.raises(SettingsError, match="but the network reads 96"):
        viewer.predict(photo, "why? " * 40)
    viewer.end_tokens = []
    room = 96 - len(viewer.tokens(ASKED))
    assert viewer.predict(photo, ASKED, tokens=500) == viewer.predict(photo, ASKED, tokens=room)


def test_on_the_command_line(llava, pictures):
    run = lambda *words: CliRunner().invoke(commands.app, ["predict", str(llava[0]), str(pictures), *words])
    done = run("--json", "--set", f"prompt={ASKED}", "--set", "tokens=12")
    assert done.exit_code == 0, done.output
    want = ImageToText.load(llava[0]).predict(str(pictures), ASKED, tokens=12)
    assert [json.loads(line) for line in done.stdout.splitlines()] == want
    for words, said in (((), "--set prompt="), (("--set", "chat=true"), "has no option chat")):
        assert said in str(run(*words).exception) and isinstance(run(*words).exception, SettingsError)


def test_other_networks_are_rejected(llava, tmp_path):
    save(create("vit-test", channels=3), tmp_path / "vit", "hf")
    with pytest.raises(WeightsError, match="is vit, which maps image to label"):
        ImageToText.load(tmp_path / "vit")
    save(create("llava-test", channels=3), tmp_path / "llava", "hf")
    with pytest.raises(WeightsError, match="needs its tokenizer"):
        ImageToText.load(tmp_path / "llava")
    words().save(str(tmp_path / "llava/tokenizer.json"))
    with pytest.raises(WeightsError, match=r"has 259 tokens, but the network 32 .*another network"):
        ImageToText.load(tmp_path / "llava")
