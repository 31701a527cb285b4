"""Sampling follows its definitions independently of other rows; a full-width beam search finds the best output."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from torch import nn

from fieldguide.core.errors import SettingsError
from fieldguide.metrics.ngram_baseline import NGram
from fieldguide.models.generation import Sampling, beam_search, generate
from test_models import tiny

LOGITS = torch.tensor([[2.0, 1.0, 0.5, -1.0, -3.0], [0.0, 0.1, 0.2, 0.3, 5.0]])
NOTHING = torch.full((2, 1), -1)


def slow(logits: list[float], seen: set[int], s: Sampling) -> list[float]:
    """Compute one row from the definitions."""
    x = [(v / s.repetition if v > 0 else v * s.repetition) if i in seen else v for i, v in enumerate(logits)]
    if s.temperature == 0:
        return [float(i == int(np.argmax(x))) for i in range(len(x))]
    x = [v / s.temperature for v in x]
    keep = sorted(range(len(x)), key=lambda i: -x[i])[: s.top_k or len(x)]
    total = sum(np.exp(x[i]) for i in keep)
    p = {i: np.exp(x[i]) / total for i in keep}
    kept, mass = {}, 0.0
    for i in keep:
        if mass < s.top_p:
            kept[i] = p[i]
        mass += p[i]
    best = max(kept.values())
    kept = {i: v for i, v in kept.items() if v >= s.min_p * best}
    return [kept.get(i, 0.0) / sum(kept.values()) for i in range(len(x))]


@pytest.mark.parametrize(
    "sampling",
    [
        Sampling(),
        Sampling(0.5),
        Sampling(0),
        Sampling(top_k=2),
        Sampling(top_p=0.7),
        Sampling(min_p=0.2),
        Sampling(repetition=1.7),
        Sampling(0.8, 4, 0.9, 0.05, 1.3),
        Sampling(2.0, 3, 0.99, 0.3, 0.5),
    ],
    ids=str,
)
def test_probabilities(sampling):
    seen = torch.tensor([[0, 3, -1], [4, 4, 2]])
    got = sampling.probabilities(LOGITS, seen)
    for row in range(2):
        wanted = slow(LOGITS[row].tolist(), set(seen[row].tolist()) - {-1}, sampling)
        np.testing.assert_allclose(got[row], wanted, rtol=1e-5, atol=1e-7)


def test_choice_follows_the_probabilities():
    sampling = Sampling(0.9, top_k=4)
    uniform = (torch.arange(20_000) + 0.5) / 20_000
    drawn = sampling.choose(LOGITS[:1].expand(20_000, -1), NOTHING[:1].expand(20_000, -1), uniform)
    shares = torch.bincount(drawn, minlength=5) / 20_000
    torch.testing.assert_close(shares, sampling.probabilities(LOGITS[:1], NOTHING[:1])[0], rtol=0, atol=1e-4)


@pytest.mark.parametrize(
    "bad", [{"temperature": -1}, {"top_k": -1}, {"top_p": 0}, {"top_p": 1.1}, {"min_p": 2}, {"repetition": 0}]
)
def test_values_out_of_range_are_rejected(bad):
    with pytest.raises(SettingsError, match=next(iter(bad))):
        Sampling(**bad)


def rows(model, prompts, most, **how):
    return torch.stack(list(generate(model, prompts, most, **how)), 1)


@torch.no_grad()
def test_greedy_equals_the_argmax_with_a_sliding_context():
    model = tiny("gpt2")  # it reads 12 tokens at most
    prompt, most = [3, 1, 4, 1, 5], 20
    got = rows(model, [prompt], most, sampling=Sampling(0))[0].tolist()
    said, window = list(prompt), list(prompt)
    for token in got:
        assert token == int(model(torch.tensor([window]))[0, -1].argmax())
        said.append(token)
        window = [*window, token] if len(window) < 12 else said[-6:]
    assert len(got) == most


def test_sampling_depends_on_seed_and_row_only():
    model = tiny("gpt2")
    prompts = [[1, 2, 3], [7], [4, 9]]
    together = rows(model, prompts, 6, seed=5)
    assert not torch.equal(together, rows(model, prompts, 6, seed=6))
    for number, prompt in enumerate(prompts):
        assert torch.equal(rows(model, [prompt], 6, seed=5, row_ids=[number])[0], together[number])


def test_rows_end_independently():
    model = tiny("gpt2")
    free = rows(model, [[1], [2]], 8, sampling=Sampling(0))
    end = int(free[0, 2])
    got = rows(model, [[1], [2]], 8, sampling=Sampling(0), eos_token_ids=(end,))
    for row in range(2):
        where = (free[row] == end).nonzero()
        last = int(where[0]) if len(where) else got.shape[1] - 1
        assert torch.equal(got[row, : last + 1], free[row, : last + 1]) and (got[row, last + 1 :] == -1).all()
    with pytest.raises(SettingsError, match="empty"):
        rows(model, [[1], []], 3)


class Chain(nn.Module):
    """A model whose output depends on the last two tokens and the input only, so that outputs can be enumerated."""

    def __init__(self, inputs: int, vocab: int):
        super().__init__()
        chance = torch.Generator().manual_seed(3)
        self.table = torch.randn(inputs, vocab, vocab, vocab, generator=chance, dtype=torch.float64) * 2

    def logp(self, number: int, tokens: list[int]) -> float:
        before, total = [0, 0, *tokens], 0.0
        for i in range(1, len(tokens)):
            total += float(self.table[number, before[i], before[i + 1]].log_softmax(-1)[tokens[i]])
        return total


class Memory:
    """The part of the cache interface that beam search uses, for `Chain`."""

    def __init__(self, numbers):
        self.real, self.numbers = torch.zeros(len(numbers), 1), numbers
        self.before = torch.zeros(len(numbers), dtype=torch.int64)

    def select(self, which):
        self.numbers, self.before = self.numbers[which], self.before[which]


def search(chain, inputs, beams, **how):
    memory = Memory(torch.arange(inputs).repeat_interleave(beams))

    def step(tokens):
        logits = chain.table[memory.numbers, memory.before, tokens[:, 0]]
        memory.before = tokens[:, 0].clone()
        return logits[:, None]

    return beam_search(step, memory, begin=0, eos_token_ids=(1,), num_beams=beams, **how)


@pytest.mark.parametrize("penalty", [0.0, 0.6, 1.0])
@pytest.mark.parametrize("before", [0, 2])
def test_full_width_beam_search_is_exhaustive(penalty, before):
    """For outputs that end and outputs of maximum length."""
    inputs, vocab, most = 3, 4, 3
    chain = Chain(inputs, vocab)
    said, scores = search(chain, inputs, 64, max_new_tokens=most, length_penalty=penalty, prefix_length=before)
    for number in range(inputs):
        every = {}
        for length in range(most + 1):
            for answer in itertools.product([t for t in range(vocab) if t != 1], repeat=length):
                tokens = [*answer, 1][:most]
                every[answer] = chain.logp(number, [0, *tokens]) / (len(tokens) + before) ** penalty
        best = sorted(every, key=lambda a: -every[a])
        for place in range(10):
            answer = tuple(t for t in said[number, place].tolist() if t >= 0)
            assert answer == best[place] and abs(float(scores[number, place]) - every[answer]) < 1e-5


def test_one_beam_equals_greedy_decoding():
    chain = Chain(5, 6)
    said, _ = search(chain, 5, 1, max_new_tokens=9, length_penalty=0.0, max_lengths=torch.tensor([9, 9, 2, 1, 4]))
    for number, limit in enumerate([9, 9, 2, 1, 4]):
        before, greedy = [0, 0], []
        while len(greedy) < limit and 1 not in before:
            before = [before[-1], int(chain.table[number, before[-2], before[-1]].argmax())]
            greedy += [t for t in before[1:] if t != 1]
        assert [t for t in said[number, 0].tolist() if t >= 0] == greedy
    few, _ = search(chain, 5, 3, max_new_tokens=9, length_penalty=0.6)
    for number in range(5):  # an input's answers do not depend on those beside it
        alone = beam_search_alone(chain, number, 3)
        assert torch.equal(few[number], alone)


def beam_search_alone(chain, number, beams):
    memory = Memory(torch.full((beams,), number))

    def step(tokens):
        logits = chain.table[memory.numbers, memory.before, tokens[:, 0]]
        memory.before = tokens[:, 0].clone()
        return logits[:, None]

    return beam_search(step, memory, begin=0, eos_token_ids=(1,), num_beams=beams, max_new_tokens=9, length_penalty=0.6)[0][0]


def test_ngram_equals_its_definition():
    rng = np.random.default_rng(0)
    train, asked, vocab = rng.integers(0, 4, 60), rng.integers(0, 5, 15), 5
    model = NGram(train, vocab, order=3)

    def p(word, context):
        if context is None:
            return 1 / vocab
        n = len(context)
        follow = [train[i + n] for i in range(len(train) - n) if tuple(train[i : i + n]) == context]
        shorter = p(word, context[1:] if n else None)
        if not follow:
            return shorter
        kinds = len(set(follow))
        return (follow.count(word) + kinds * shorter) / (len(follow) + kinds)

    got = model.compute_nats(asked)
    for i, word in enumerate(asked):
        np.testing.assert_allclose(got[i], -np.log(p(word, tuple(asked[max(0, i - 2) : i]))), rtol=1e-10)
    total = sum(np.exp(-model.compute_nats(np.array([1, 2, w]))[2]) for w in range(vocab))
    assert abs(total - 1) < 1e-9  # a distribution


@pytest.mark.parametrize("repetition, best", [(1.0, 0), (1.1, 1)])
def test_greedy_choice_with_repetition_penalty(repetition, best):
    logits, seen = torch.tensor([[3.0, 2.9, -1.0], [-2.0, -2.1, -9.0]]), torch.tensor([[-1, 0], [0, 0]])
    sampling = Sampling(temperature=0.0, repetition=repetition)
    chosen = sampling.choose(logits, seen, torch.tensor([0.99, 0.0]))
    assert chosen.tolist() == [best, best] == sampling.probabilities(logits, seen).argmax(-1).tolist()
