"""What a language model has around its network: the tokenizer, the token that begins texts, and the chat template."""

from __future__ import annotations

from typing import Any

from fieldguide.data.preprocessing import TextTokenizer

# The conversations of our own text-generation task: each message between the token of its role and the end token.
CHAT = (
    "{{ bos_token }}{% for message in messages %}{{ '<|' + message['role'] + '|>' + message['content'] + eos_token }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)


def get_tokenizer(predictor: Any) -> TextTokenizer | None:
    """Return the tokenizer of a predictor of texts, or None."""
    return getattr(predictor, "text", None) or getattr(getattr(predictor, "task", None), "text", None)


def get_begin_token(predictor: Any, text: TextTokenizer) -> int | None:
    """Return the token that begins every text, or None. Runs begin texts with the end token if the tokenizer has none."""
    if found := text.prefix_ids():
        return found[0]
    return text.end if getattr(getattr(predictor, "task", None), "name", "") == "text-generation" else None


def get_chat_template(predictor: Any, text: TextTokenizer) -> str | None:
    """Return the chat template, as transformers and llama.cpp read it."""
    task: Any = getattr(predictor, "task", None)
    if getattr(task, "name", "") == "text-generation" and task.chat:
        return text.template or CHAT
    return getattr(getattr(predictor, "template", None), "source", None) or text.template
