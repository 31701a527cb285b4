"""Generation: how a network that says what follows is made to go on: by chance, by the best, or by searching beams."""

from fieldguide.models.generation.beam_search import beam_search
from fieldguide.models.generation.encoder_decoder import Sourced
from fieldguide.models.generation.engine import Faithful, GenerationConfig, Greedy, answers, streamed
from fieldguide.models.generation.sampling import Sampling, generate

__all__ = ["Faithful", "GenerationConfig", "Greedy", "Sampling", "Sourced", "answers", "beam_search", "generate", "streamed"]
