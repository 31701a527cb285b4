"""Continuous batching: texts that join and leave a running batch are those that `generate` writes alone."""

from __future__ import annotations

import pytest
import torch

from fieldguide.models.generation import GenerationConfig, Sampling, TokenRules, generate_batch
from fieldguide.models.generation.slots import SlotEngine, SlotRow
from fieldguide.models.generation.stop_strings import StreamDecoder, decode_stream, truncate_at_stop
from fieldguide.models.registry import card

NAMES = ("gpt2", "llama", "gemma2", "qwen3", "mixtral", "deepseek-v3", "mamba2")
WINDOW = 24


def make_network(name: str):
    torch.manual_seed(1)
    found = card(name)
    network = found.make(found.resolve_config(found.tiny, length=WINDOW)).eval()
    for weight in network.parameters():
        weight.data.mul_(1.5)  # clearer choices than those of new weights
    return network


def decode(tokens: list[int]) -> str:
    return "".join(chr(97 + token % 26) for token in tokens)


def make_row(prompt, config: GenerationConfig, eos=(), row_id=0, rules=None) -> tuple[SlotRow, dict]:
    told: dict = {"text": ""}
    row = SlotRow(
        prompt,
        config.sampling,
        StreamDecoder(decode, config.stop_list),
        eos,
        config.max_new_tokens,
        config.seed,
        row_id,
        config.token_rules(eos, rules),
        on_piece=lambda piece: told.update(text=told["text"] + piece),
        on_end=lambda reason: told.update(reason=reason),
    )
    return row, told


def run(engine: SlotEngine, rows, every: int) -> None:
    """Generate texts, one of which joins at every so many steps if there is room."""
    waiting, step = list(rows), 0
    while waiting or engine.is_active:
        if waiting and engine.has_room and step % every == 0:
            engine.admit(waiting.pop(0))
        engine.step()
        step += 1
        assert step < 2000


@pytest.mark.parametrize("every", [1, 3])
@pytest.mark.parametrize("name", NAMES)
def test_texts_in_company_are_those_alone(name, every):
    """Greedy and sampled texts, longer than the context, with rules and stop strings, in four slots."""
    network = make_network(name)
    vocabulary = network.config.vocab_size
    generator = torch.Generator().manual_seed(0)
    cases = []
    for i in range(12):
        length = (1, 5, 30, 12)[i % 4]
        prompt = torch.randint(0, vocabulary, (length,), generator=generator).tolist()
        options = (
            {"temperature": 0.0},
            {"temperature": 0.9, "top_p": 0.9, "seed": i},
            {"temperature": 0.0, "repetition_penalty": 1.3, "no_repeat_ngram_size": 2, "min_new_tokens": 4},
            {"temperature": 0.0, "stop_strings": '["qa", "b"]'},
        )[i // 3]
        cases.append((prompt, GenerationConfig(max_new_tokens=(7, 45, 20)[i % 3], **options)))
    eos = [3]
    rules = TokenRules(suppress_tokens=(5,), begin_suppress_tokens=(6,))
    made = [make_row(prompt, config, eos, i, rules if i % 2 else None) for i, (prompt, config) in enumerate(cases)]
    engine = SlotEngine(network, 4)
    run(engine, [row for row, _ in made], every)
    for i, ((prompt, config), (row, told)) in enumerate(zip(cases, made)):
        wanted = generate_batch(
            network,
            [prompt],
            config,
            eos_token_ids=eos,
            decode=decode,
            row_ids=[i],
            rules=rules if i % 2 else None,
        )[0]
        assert row.decoder.tokens == wanted, i
        assert told["text"] == truncate_at_stop(decode(wanted), config.stop_list)
        assert told["reason"] == ("length" if len(wanted) == config.max_new_tokens and not row.decoder.stopped else "stop")
    assert engine.generated == sum(row.steps for row, _ in made) and not engine.rows


def test_cancelled_texts_leave_and_faults_concern_one_text():
    network = make_network("llama")
    config = GenerationConfig(max_new_tokens=30, temperature=0.0)
    (kept, told), (gone, gone_told), (broken, broken_told) = (make_row([i + 1, 2], config) for i in range(3))
    gone.is_cancelled = lambda: gone.steps >= 5
    broken.on_piece = lambda piece: [][1]
    run(SlotEngine(network, 4), [kept, gone, broken], 1)
    assert gone_told["reason"] == "cancelled" and gone.steps == 5
    assert isinstance(broken_told["reason"], IndexError) and broken.steps == 1
    assert kept.decoder.tokens == generate_batch(network, [[1, 2]], config, eos_token_ids=[])[0] and told["reason"] == "length"


def test_random_numbers_do_not_depend_on_how_many_are_drawn_at_once():
    row, _ = make_row([1], GenerationConfig(temperature=1.0, seed=3), row_id=2)
    wanted = torch.rand(600, generator=torch.Generator().manual_seed(3 * 1_000_003 + 2)).tolist()
    assert [row.draw() for _ in range(600)] == wanted


def test_pieces_never_split_a_character_or_show_a_stop_string():
    def decode_bytes(tokens):
        return bytes(tokens).decode("utf-8", "replace")

    text = "naïve 🙂 日本語 end"
    pieces = list(decode_stream(text.encode(), decode_bytes))
    assert "".join(pieces) == text and not any("\ufffd" in piece for piece in pieces)
    pieces = list(decode_stream(text.encode(), decode_bytes, stops=["本語"]))
    assert "".join(pieces) == "naïve 🙂 日"
    assert list(decode_stream(text.encode()[:8], decode_bytes))[-1] == "\ufffd"  # the end of an incomplete answer


def test_sampling_objects_group_rows():
    assert Sampling(temperature=0.5) == Sampling(temperature=0.5) and hash(Sampling()) == hash(Sampling())
