"""Conversations about digits, and tiny vision-language checkpoints with random weights that can be tuned on them."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from sklearn.datasets import load_digits
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors

from fieldguide.checkpoints.load import save
from fieldguide.models.registry import create

NAMES = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
QUESTION = "Which digit?"
LLAVA_TEMPLATE = (
    "{% for m in messages %}{{ m['role'].upper() + ': ' }}{% for c in m['content'] %}{% if c['type'] == 'image' %}"
    "{{ '<image>\n' }}{% endif %}{% endfor %}{% for c in m['content'] %}{% if c['type'] == 'text' %}{{ c['text'] }} "
    "{% endif %}{% endfor %}{% endfor %}{% if add_generation_prompt %}{{ 'ASSISTANT:' }}{% endif %}"
)
QWEN_TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{% if m['content'] is string %}{{ m['content'] }}{% else %}"
    "{% for c in m['content'] %}{% if c['type'] == 'image' %}<|vision_start|><|image_pad|><|vision_end|>"
    "{% else %}{{ c['text'] }}{% endif %}{% endfor %}{% endif %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
QWEN_TOKENS = (
    "<|endoftext|>",
    "<|im_end|>",
    "<|image_pad|>",
    "<|im_start|>",
    "<|vision_start|>",
    "<|vision_end|>",
    "<|video_pad|>",
)


def make_tokenizer(special: tuple[str, ...], begin: str = "") -> Tokenizer:
    """Return a byte-level tokenizer with special tokens, one of which may begin every text."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    made = Tokenizer(models.BPE({letter: i for i, letter in enumerate(letters)}, []))
    made.pre_tokenizer, made.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    made.add_special_tokens(list(special))
    if begin:
        special_tokens = [(begin, made.token_to_id(begin))]
        made.post_processor = processors.TemplateProcessing(single=f"{begin} $A", special_tokens=special_tokens)
    return made


def write_checkpoint(folder: Path, kind: str = "llava", template: bool = True, **changes) -> Path:
    """Write a tiny vision-language model with its tokenizer; with `template`, the tokenizer has a chat template."""
    torch.manual_seed(0)
    if kind == "llava":
        sizes = {"image": 24, "patch": 8, "length": 96, "vocab_size": 264, "picture": 258, "channels": 3, **changes}
        made, told = make_tokenizer(("<s>", "</s>", "<image>"), "<s>"), {"bos_token": "<s>", "eos_token": "</s>"}
        text = LLAVA_TEMPLATE
    else:
        sizes = {"image": 16, "length": 160, "vocab_size": 264, "picture": 258, "channels": 3, **changes}
        made, told = make_tokenizer(QWEN_TOKENS), {"eos_token": "<|im_end|>", "pad_token": "<|endoftext|>"}
        text = QWEN_TEMPLATE
    save(create(f"{kind}-test", **sizes), folder, "hf")
    made.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps({**told, **({"chat_template": text} if template else {})}))
    if kind == "qwen2.5-vl":
        unit = sizes.get("patch", 4) * 2
        limits = {"patch_size": unit // 2, "merge_size": 2, "min_pixels": 4 * unit**2, "max_pixels": 9 * unit**2}
        (folder / "preprocessor_config.json").write_text(
            json.dumps({"image_processor_type": "Qwen2VLImageProcessor", **limits})
        )
    return folder


def make_row(form: str, image: str, answer: str) -> dict:
    """Return a conversation in one of the forms that are read."""
    asked, said = {"type": "text", "text": QUESTION}, {"role": "assistant", "content": answer}
    part = lambda image: {"messages": [{"role": "user", "content": [image, asked]}, said]}
    return {
        "path": part({"type": "image", "path": image}),
        "image": part({"type": "image", "image": image}),
        "url": part({"type": "image_url", "image_url": {"url": image}}),
        "column": {**part({"type": "image"}), "images": [image]},
        "structs": {**part({"type": "image"}), "images": [{"path": image, "bytes": None}]},
        "text": {"messages": [{"role": "user", "content": QUESTION}, said], "image": image},
        "llava": {
            "id": image,
            "image": image,
            "conversations": [{"from": "human", "value": f"<image>\n{QUESTION}"}, {"from": "gpt", "value": answer}],
        },
    }[form]


def write_digits(folder: Path, count: int = 40, form: str = "path", size: int = 24, square: bool = False) -> Path:
    """Write conversations about the first digits of scikit-learn; return their file. Unless `square`, images alternate in size."""
    digits = load_digits()
    (folder / "images").mkdir(parents=True)
    rows = []
    for i in range(count):
        made = Image.fromarray((15 * digits.images[i]).astype(np.uint8)).convert("RGB")
        made.resize((size, size + size // 3 * (i % 2) * (not square))).save(folder / f"images/{i}.png")
        rows.append(make_row(form, f"images/{i}.png", NAMES[digits.target[i]]))
    return write_rows(folder / "messages.jsonl", rows)


def write_rows(path: Path, rows: list[dict]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def read_rows(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]
