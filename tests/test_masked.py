"""Masked tokens, token labels and spans: compared with the losses of transformers and slow counts; masking rates."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from encoders import encoder
from fieldguide.models.registry import create
from fieldguide.objectives import MaskedLM, SpanPrediction, TokenClassificationObjective
from fieldguide.objectives.masked_lm import mask_tokens
from test_models import batch, tiny

MASK, FIRST, VOCAB = 4, 5, 1000
CLOSE = {"rtol": 1e-5, "atol": 1e-6}  # losses are in float32


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def test_masking_rates():
    """15 % of the allowed positions: 80 % of them the mask, 10 % a random token, 10 % unchanged."""
    tokens = torch.randint(FIRST, VOCAB, (400, 500), generator=generator(0))
    open_to = torch.rand(tokens.shape, generator=generator(1)) < 0.7
    shown, target = mask_tokens(tokens, open_to, MASK, FIRST, VOCAB, generator(2))
    asked = target >= 0
    assert not (asked & ~open_to).any() and torch.equal(target[asked], tokens[asked])
    assert torch.equal(shown[~asked], tokens[~asked]) and (target[~asked] == -1).all()
    near = lambda found, want, count: abs(found - want) < 4.5 * (want * (1 - want) / count) ** 0.5
    assert near(asked.sum() / open_to.sum(), 0.15, open_to.sum())
    count, stayed, masked = asked.sum(), (shown == tokens)[asked].float().mean(), (shown == MASK)[asked].float().mean()
    assert near(masked, 0.8, count) and near(stayed, 0.1 + 0.1 / (VOCAB - FIRST), count)
    other = shown[asked & (shown != MASK) & (shown != tokens)]
    assert other.min() == FIRST and other.max() == VOCAB - 1
    assert abs(other.float().mean() - (FIRST + VOCAB - 1) / 2) < 4.5 * VOCAB / (12 * len(other)) ** 0.5
    by_place = asked.float().mean(0) / 0.7
    assert by_place.min() > 0.05 and by_place.max() < 0.3  # no place is preferred


def test_masking_depends_on_the_generator_only():
    tokens = torch.randint(FIRST, VOCAB, (8, 40), generator=generator(0))
    open_to = torch.ones_like(tokens, dtype=torch.bool)
    first, again, other = (mask_tokens(tokens, open_to, MASK, FIRST, VOCAB, generator(seed)) for seed in (3, 3, 4))
    assert all(torch.equal(a, b) for a, b in zip(first, again)) and not torch.equal(first[1], other[1])


def test_short_rows_have_one_masked_token():
    tokens = torch.randint(FIRST, VOCAB, (300, 3), generator=generator(0))
    open_to = torch.zeros_like(tokens, dtype=torch.bool)
    open_to[:200, 1] = True
    _, target = mask_tokens(tokens, open_to, MASK, FIRST, VOCAB, generator(1))
    assert (target[:200, 1] >= 0).all() and (target[:, [0, 2]] == -1).all() and (target[200:] == -1).all()


@pytest.mark.parametrize("name", ["bert", "deberta-v2", "modernbert"])
def test_loss_and_gradients_equal_those_of_transformers(name):
    model = tiny(name)
    tokens, mask = batch(name, 6)
    shown, target = mask_tokens(tokens, mask, MASK, FIRST, 30, generator(0))
    found = MaskedLM(model, ("tokens", "mask"))({"tokens": shown, "mask": mask, "target": target})["loss"]
    peer, rename = encoder(model)
    peer.double().load_state_dict(rename(model.state_dict()))
    want = peer.eval().peer(input_ids=shown, attention_mask=mask.long(), labels=target.masked_fill(target < 0, -100)).loss
    torch.testing.assert_close(found.double(), want.double(), **CLOSE)
    found.backward()
    want.backward()
    grads = rename({key: p.grad for key, p in model.named_parameters()})
    for key, p in peer.named_parameters():
        torch.testing.assert_close(grads[key], p.grad, **CLOSE)


@torch.no_grad()
def test_outputs_are_counted_per_row():
    model = tiny("bert")
    tokens, mask = batch("bert", 6)
    shown, target = mask_tokens(tokens, mask, MASK, FIRST, 30, generator(0), share=0.5)
    target[2] = -1  # a row of which nothing is asked
    inputs = {"tokens": shown, "mask": mask, "target": target}
    objective = MaskedLM(model, ("tokens", "mask"))
    found = objective.outputs(inputs)
    logits = model(shown, mask)
    for row in range(6):
        nats, right = 0.0, 0
        for place in range(9):
            if target[row, place] >= 0:
                nats -= float(logits[row, place].float().log_softmax(0)[target[row, place]])
                right += int(logits[row, place].argmax() == target[row, place])
        assert found["nats"][row].item() == pytest.approx(nats, abs=1e-4) and found["right"][row] == right
        assert found["count"][row] == (target[row] >= 0).sum()
    assert objective(inputs)["loss"].item() == pytest.approx((found["nats"].sum() / found["count"].sum()).item(), rel=1e-5)
    target[:] = -1
    assert objective(inputs)["loss"] == 0


def test_token_classification_loss_equals_transformers():
    model = tiny("roberta", output_type="labels")
    tokens, mask = batch("roberta", 6)
    target = torch.randint(3, tokens.shape).masked_fill(~mask | (torch.rand(tokens.shape) < 0.3), -1)
    objective = TokenClassificationObjective(model, ("tokens", "mask"))
    found = objective({"tokens": tokens, "mask": mask, "target": target})["loss"]
    peer, rename = encoder(model)
    peer.double().load_state_dict(rename(model.state_dict()))
    want = peer.eval().peer(input_ids=tokens, attention_mask=mask.long(), labels=target.masked_fill(target < 0, -100)).loss
    torch.testing.assert_close(found.double(), want.double(), **CLOSE)
    best = model(tokens, mask).float().softmax(-1).max(-1)
    outputs = objective.outputs({"tokens": tokens, "mask": mask})
    assert torch.equal(outputs["label"], best.indices) and torch.equal(outputs["probability"], best.values)
    words = torch.tensor([[0, 2, -1], [1, -1, -1]] * 3)
    outputs = objective.outputs({"tokens": tokens, "mask": mask, "words": words})
    for row in range(6):
        for number, place in enumerate(words[row].tolist()):
            assert outputs["label"][row, number] == (best.indices[row, place] if place >= 0 else -1)
            assert outputs["probability"][row, number].isnan() == (place < 0)
    assert objective({"tokens": tokens, "mask": mask, "target": torch.full_like(tokens, -1)})["loss"] == 0


def test_spans_equal_transformers_and_a_slow_search():
    model = tiny("bert", output_type="span")
    tokens, mask = batch("bert", 6)
    mask[:] = True
    answerable = mask.clone()
    objective = SpanPrediction(model, ("tokens", "mask"))
    inputs = {
        "tokens": tokens,
        "mask": mask,
        "answerable": answerable,
        "first": torch.tensor([0, 1, 2, 3, 4, 8]),
        "last": torch.tensor([0, 1, 4, 8, 5, 8]),
    }
    peer, rename = encoder(model)
    peer.double().load_state_dict(rename(model.state_dict()))
    want = (
        peer.eval()
        .peer(input_ids=tokens, attention_mask=mask.long(), start_positions=inputs["first"], end_positions=inputs["last"])
        .loss
    )
    torch.testing.assert_close(objective(inputs)["loss"].double(), want.double(), **CLOSE)
    answerable[:, :3], answerable[:, 7:], answerable[5] = False, False, False
    objective.longest = 2
    with torch.no_grad():
        found = objective.outputs(inputs)
        logits = model(tokens, mask).float()
    for row in range(6):
        allowed = [0, *(place for place in range(9) if answerable[row, place])]
        begin, end = (logits[row, :, side] - logits[row, allowed, side].logsumexp(0) for side in (0, 1))
        pairs = {(i, j): float(begin[i] + end[j]) for i in allowed[1:] for j in allowed[1:] if 0 <= j - i < 2}
        assert found["none"][row].item() == pytest.approx(float(begin[0] + end[0]), abs=1e-4)
        if pairs:
            best = max(pairs, key=pairs.get)
            assert tuple(found["place"][row].tolist()) == best
            assert found["score"][row].item() == pytest.approx(pairs[best], abs=1e-4)
        else:
            assert found["place"][row].tolist() == [0, 0] and found["score"][row] == -torch.inf


def test_masked_tokens_are_learned_from_both_sides():
    """Rows are a, a + 1, a + 2, ...: a masked token follows from either neighbor."""
    torch.manual_seed(0)
    model = create("bert-test", dim=32, hidden=64, vocab_size=15, length=8)
    objective, source = MaskedLM(model, ("tokens", "mask")), generator(0)
    optimizer = torch.optim.AdamW(model.parameters(), 6e-3)
    rows = lambda: 5 + (torch.randint(10, (48, 1), generator=source) + torch.arange(8)) % 10

    def inputs():
        tokens = rows()
        shown, target = mask_tokens(tokens, torch.ones_like(tokens, dtype=torch.bool), MASK, FIRST, 15, source, share=0.25)
        return {"tokens": shown, "target": target}

    for _ in range(100):
        optimizer.zero_grad()
        objective(inputs())["loss"].backward()
        optimizer.step()
    with torch.no_grad():
        found = [objective.outputs(inputs()) for _ in range(5)]
    right, count = (sum(int(f[key].sum()) for f in found) for key in ("right", "count"))
    assert right > 0.6 * count
    tokens = rows()
    for place in (0, 4, 7):  # said by the whole network too: at the place itself
        shown = tokens.clone()
        shown[:, place] = MASK
        with torch.no_grad():
            assert (model(shown)[:, place].argmax(-1) == tokens[:, place]).float().mean() > 0.6


def test_logits_are_computed_at_masked_positions_only():
    """The head is applied to the masked positions, not to all."""
    model = tiny("bert", torch.float32)
    tokens, mask = batch("bert", 6)
    shown, target = mask_tokens(tokens, mask, MASK, FIRST, 30, generator(0))
    seen = []
    model.words.register_forward_hook(lambda module, inputs, output: seen.append(output.shape))
    loss = MaskedLM(model, ("tokens", "mask"))({"tokens": shown, "mask": mask, "target": target})["loss"]
    assert seen == [(int((target >= 0).sum()), 30)]
    want = F.cross_entropy(model(shown, mask).flatten(0, 1), target.flatten(), ignore_index=-1)
    torch.testing.assert_close(loss, want)
