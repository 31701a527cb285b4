"""Generation: how a network that says what follows is made to go on: by chance, by the best, or by searching beams."""

from fieldguide.generation.beams import beam_search
from fieldguide.generation.sampling import Sampling, generate

__all__ = ["Sampling", "beam_search", "generate"]
