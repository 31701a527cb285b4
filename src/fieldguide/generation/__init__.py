"""Generation: how a network that says what follows is made to go on: by chance, by the best, or by searching beams."""

from fieldguide.generation.answers import Faithful, Greedy, Manner, answers, streamed
from fieldguide.generation.beams import beam_search
from fieldguide.generation.sampling import Sampling, generate
from fieldguide.generation.sourced import Sourced

__all__ = ["Faithful", "Greedy", "Manner", "Sampling", "Sourced", "answers", "beam_search", "generate", "streamed"]
