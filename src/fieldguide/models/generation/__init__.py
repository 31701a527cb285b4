"""Text generation with decoders: greedy decoding, sampling and beam search."""

from fieldguide.models.generation.beam_search import beam_search
from fieldguide.models.generation.encoder_decoder import EncoderDecoderState
from fieldguide.models.generation.engine import (
    MAX_NEW_TOKENS,
    SAMPLING_OPTIONS,
    BeamSearch,
    GenerationConfig,
    Greedy,
    generate_batch,
    stream_text,
)
from fieldguide.models.generation.sampling import Sampling, generate
from fieldguide.models.generation.token_rules import TokenRules

__all__ = [
    "MAX_NEW_TOKENS",
    "SAMPLING_OPTIONS",
    "BeamSearch",
    "EncoderDecoderState",
    "GenerationConfig",
    "Greedy",
    "Sampling",
    "TokenRules",
    "beam_search",
    "generate",
    "generate_batch",
    "stream_text",
]
