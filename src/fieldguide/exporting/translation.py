"""Graphs of encoder-decoders: the encoder, and one step of the decoder with its cache. The program searches with beams."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from fieldguide.core.signature import Axis, TensorSpec
from fieldguide.data.text_values import MISSING_MARKERS
from fieldguide.exporting.generation import GrowingCache
from fieldguide.exporting.graph import BATCH, ExportError, Graph
from fieldguide.models.transformer._shared.encoder_decoder import EncoderDecoder

if TYPE_CHECKING:
    from fieldguide.inference.predictor import TaskPredictor

CROSS = ("cross_keys", "cross_values")


class EncoderStep(nn.Module):
    """Return the keys and values of a source for all layers of the decoder, layers B heads S d.

    `front` turns the graph's input into the source of the network.
    """

    def __init__(self, network: EncoderDecoder, front: nn.Module | None = None):
        super().__init__()
        self.network, self.front = network, front or nn.Identity()

    def forward(self, *inputs: Tensor) -> tuple[Tensor, Tensor]:
        pairs, _ = self.network.encode_source(self.front(*inputs), None)
        return torch.stack([key for key, _ in pairs]), torch.stack([value for _, value in pairs])


class DecoderStep(nn.Module):
    """Return the log-probabilities of the next token, B vocab, and all keys and values, layers B heads T d."""

    def __init__(self, network: EncoderDecoder):
        super().__init__()
        self.network = network
        network.check_length = lambda *rest: None  # type: ignore[method-assign]  # the program never exceeds it

    def forward(self, *inputs: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        tokens, keys, values, cross_keys, cross_values = inputs
        cache = GrowingCache(keys, values)
        cache.cross = list(zip(cross_keys, cross_values)), None
        logits = self.network.last(tokens, None, cache)
        return logits.float().log_softmax(-1), torch.stack(cache.keys), torch.stack(cache.values)


def build_translation(predictor: TaskPredictor) -> Graph:
    """Return the step graph of an encoder-decoder, with the graph of its encoder. Raises `ExportError` for recurrent ones."""
    task: Any = predictor.task
    network: Any = predictor.objective.model
    if not isinstance(network, EncoderDecoder):
        raise ExportError(f"{predictor.name} is no Transformer; encoder-decoders of other kinds have no step graph yet.")
    network = copy.deepcopy(network).eval().requires_grad_(False).float().cpu()
    frame, text, options = task.frame, task.text, task.PredictOptions()
    if text.target is not None:
        raise ExportError("run.py knows one tokenizer, but this model has another one for its targets. Use --to huggingface.")
    most = task.options.length
    words = Axis("source_tokens", most=max(most // 2, 1))
    ids = TensorSpec("source", "int64", (BATCH, words), low=0, high=text.size - 1)
    encoder = Graph(EncoderStep(network), (ids,), CROSS, parts=())
    limits = task.for_request(options).limits(torch.arange(most + 1)).clamp(max=most - len(frame.target_start))
    values = {
        "column": task.column,
        "missing": MISSING_MARKERS,
        "limits": limits.tolist(),  # tokens of an answer, by the number of tokens of the source
        "prefix": task.options.prefix,
        "before": list(frame.before),
        "after": list(frame.after),
        "start": list(frame.target_start),
        "end": frame.end,
        "unknown": text.unknown,
        "exact": bool(task.options.tokenizer),
        "length": most,
        "beams": options.effective_beams,
        "length_penalty": options.length_penalty,
    }
    return build_step(
        predictor, network, encoder, words, ("tokens", "to_text", "beams", "text_source"), values, ("tokenizers",)
    )


def build_step(
    predictor: TaskPredictor,
    network: EncoderDecoder,
    encoder: Graph,
    source: Axis,
    parts: tuple[str, ...],
    values: dict[str, Any],
    requires: tuple[str, ...],
    modules: Mapping[str, Sequence[str]] | None = None,
) -> Graph:
    """Return the graph of one step of a decoder, whose encoder has its own graph. `source` is the axis of encoded tokens."""
    task: Any = predictor.task
    cache = network.new_cache(1, 1)
    heads, width, layers = cache.keys[0].shape[1], cache.keys[0].shape[3], len(cache.keys)
    block = lambda name, axis: TensorSpec(
        name, "float32", (Axis("layers", layers), BATCH, Axis("heads", heads), axis, Axis("width", width))
    )
    half = max(task.options.length // 2, 1)
    past, steps = Axis("past", most=half), Axis("steps", most=half)
    tokens = TensorSpec("tokens", "int64", (BATCH, steps), low=0, high=task.text.size - 1)
    return Graph(
        DecoderStep(copy.deepcopy(network)),
        (tokens, *(block(name, past) for name in ("keys", "values")), *(block(name, source) for name in CROSS)),
        ("log_probabilities", "keys_after", "values_after"),
        parts,
        {**values, "shape": [layers, heads, width]},
        requires=requires,
        modules=modules or {},
        files=("tokenizer.json",),
        loop=asdict(predictor.signature.loop) if predictor.signature.loop else {},
        further={"encoder": encoder},
    )
