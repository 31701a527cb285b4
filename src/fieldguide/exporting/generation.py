"""Step graphs of language models: the next tokens and what is cached of those before -> logits and the longer cache.

A program calls the graph once with a prompt and then once per token (`loop.json`).
"""

from __future__ import annotations

import copy
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from fieldguide.core.signature import Axis, TensorSpec
from fieldguide.data.text_values import MISSING_MARKERS
from fieldguide.exporting.graph import BATCH, ExportError, Graph
from fieldguide.models.layers.kv_cache import Cache
from fieldguide.tasks.text.text_generation import CHAT_SPECIAL_TOKENS

if TYPE_CHECKING:
    from fieldguide.inference.predictor import TaskPredictor

TEST_OPTIONS = {"temperature": 0, "max_new_tokens": 24}  # of the answers that are compared: always the most likely token


class GrowingCache(Cache):
    """A cache whose keys and values grow by concatenation, as tensors of a graph do. Rows are not padded."""

    def __init__(self, keys: Tensor, values: Tensor):  # layers B heads T d
        self.keys, self.values, self.states, self.cross = list(keys), list(values), [], None
        self.past, self.used, self.padded = (
            keys.shape[3],
            0,
            True,
        )  # padded: a mask for each row, which needs no case of its own
        self.real = torch.zeros(keys.shape[1], 0, dtype=torch.bool)

    def reserve(self, steps: int, mask: Tensor | None) -> None:
        """Count new tokens."""
        rows = self.real.shape[0]
        self.start, self.used = self.past, self.past + steps
        self.real = torch.ones(rows, self.used, dtype=torch.bool)
        self.count = torch.full((rows,), self.used, dtype=torch.int64)

    def update(self, layer: int, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """Append new keys and values, B heads steps d; return all stored so far."""
        self.keys[layer] = torch.cat([self.keys[layer], key], 2)
        self.values[layer] = torch.cat([self.values[layer], value], 2)
        return self.keys[layer], self.values[layer]


class DecoderStep(nn.Module):
    """Return the logits of the last token, B vocab, and all keys and values, layers B heads T d."""

    def __init__(self, network: nn.Module):
        super().__init__()
        self.network = network

    def forward(self, *inputs: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        tokens, keys, values = inputs
        cache = GrowingCache(keys, values)
        logits = self.network.last(tokens, None, cache)  # type: ignore[operator]
        return logits.float(), torch.stack(cache.keys), torch.stack(cache.values)


def build_text_generation(predictor: TaskPredictor) -> Graph:
    """Return the step graph of a language model. Raises `ExportError` for networks with another memory than keys and values."""
    task: Any = predictor.task
    network: Any = predictor.objective.model
    if not hasattr(network, "new_cache"):
        raise ExportError(f"{predictor.name} has no cache of keys and values, so it has no step graph.")
    cache = network.new_cache(1, 1)
    if cache.states or type(cache) is not Cache:
        raise ExportError(
            f"{predictor.name} keeps more than keys and values, which has no step graph yet. Use --to huggingface."
        )
    length, text = network.config.length, task.text
    shapes = [(t.shape[1], t.shape[3]) for t in (cache.keys[0], cache.values[0])]
    most = max(length // 2, 1)
    past = [
        TensorSpec(
            name,
            "float32",
            (Axis("layers", len(cache.keys)), BATCH, Axis("heads", heads), Axis("past", most=most), Axis("width", width)),
        )
        for name, (heads, width) in zip(("keys", "values"), shapes)
    ]
    tokens = TensorSpec("tokens", "int64", (BATCH, Axis("steps", most=most)), low=0, high=network.config.vocab_size - 1)
    begin = [text.end] if task.chat else text.prefix_ids() or [text.end]
    values = {
        "column": task.column,
        "missing": MISSING_MARKERS,
        "length": length,
        "begin": begin,
        "end": text.end,
        "ends": list(task.ends),
        "roles": {name[2:-2]: text.tokenizer.token_to_id(name) for name in CHAT_SPECIAL_TOKENS[1:]}
        if task.chat and not task.template
        else {},
        "empty": [[len(cache.keys), heads, width] for heads, width in shapes],
        "options": {name: getattr(task.PredictOptions().sampling, name) for name in ("temperature", "top_p")},
    }
    prompts, requires = "prompts", ["tokenizers"]
    if task.template:
        values |= {"template": text.template, "special": dict(text.special)}
        prompts, requires = "chat_template", ["tokenizers", "jinja2"]
    module = DecoderStep(copy.deepcopy(network).eval().requires_grad_(False).float().cpu())
    outputs = ("logits", "keys_after", "values_after")
    return Graph(
        module,
        (tokens, *past),
        outputs,
        ("tokens", "to_text", "generation", prompts),
        values,
        requires=tuple(requires),
        files=("tokenizer.json",),
        loop=asdict(predictor.signature.loop) if predictor.signature.loop else {},
        test_options=TEST_OPTIONS,
    )
