"""CTC: loss, searches and alignments against an enumeration of all paths; chunks against the whole recording."""

from __future__ import annotations

import itertools
import math
from collections import Counter, defaultdict

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from fieldguide.core.errors import RunError, SettingsError
from fieldguide.data.loader import Batches
from fieldguide.data.preprocessing import symbol_ngrams
from fieldguide.data.preprocessing.symbol_ngrams import SymbolNGrams
from fieldguide.metrics.ngram_baseline import NGram
from fieldguide.objectives.ctc import CTC, min_frames
from fieldguide.objectives.ctc_decoding import align, beam_search, collapse, compute_logits_in_chunks, stitch_chunks
from fieldguide.training.inference_loop import collect
from test_models import tiny


class Saying(nn.Module):
    """Returns every second frame of its features as logits, so that tests can specify the output."""

    stride = 2

    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(()))

    def frames(self, lengths: Tensor) -> Tensor:
        return (lengths + 1) // 2

    def forward(self, features: Tensor, lengths: Tensor) -> Tensor:  # B T V -> B S V
        return self.scale * features[:, ::2]


def written(path: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(symbol for symbol, _ in itertools.groupby(path) if symbol)


def paths(logs: Tensor) -> dict[tuple[int, ...], list[tuple[float, tuple[int, ...]]]]:
    """Yield every path through S V log-probabilities with its transcript."""
    found = defaultdict(list)
    for path in itertools.product(range(logs.shape[1]), repeat=len(logs)):
        found[written(path)].append((sum(logs[t, s].item() for t, s in enumerate(path)), path))
    return found


def total(entries: list[tuple[float, tuple[int, ...]]]) -> float:
    return math.log(sum(math.exp(value) for value, _ in entries))


def answers(rows: int, steps: int, vocab: int, seed: int = 0) -> Tensor:
    torch.manual_seed(seed)
    return 2 * torch.randn(rows, steps, vocab, dtype=torch.float64)


# ---------------------------------------------------------------------------------------------- loss


def test_loss_equals_the_sum_over_all_paths():
    features, lengths = answers(4, 9, 3), torch.tensor([9, 7, 4, 10])[:4].clamp(max=9)
    target, size = torch.tensor([[1, 2, 1], [2, 2, 0], [1, 0, 0], [0, 0, 0]]), torch.tensor([3, 2, 1, 0])
    batch = {"features": features, "lengths": lengths, "target": target, "target_lengths": size}
    objective = CTC(Saying().double())
    values = objective(batch)
    each = []
    for row in range(4):
        logs = features[row, ::2][: (lengths[row] + 1) // 2].log_softmax(-1)
        each.append(-total(paths(logs)[tuple(target[row, : size[row]].tolist())]) / max(1, int(size[row])))
    assert values["loss"].item() == pytest.approx(sum(each) / 4, rel=1e-9) and values["impossible"] == 0
    answer = objective.outputs(batch)
    assert answer["loss"].tolist() == pytest.approx(each, rel=1e-9)
    values["loss"].backward()
    slow = objective.model.scale.grad.item()
    with torch.no_grad():
        objective.model.scale.add_(1e-5)
        high = objective(batch)["loss"]
        objective.model.scale.sub_(2e-5)
        assert ((high - objective(batch)["loss"]) / 2e-5).item() == pytest.approx(slow, rel=1e-5)


def test_impossible_transcripts_are_counted_and_have_no_gradient():
    features, lengths = answers(3, 6, 4), torch.tensor([6, 6, 4])  # 3, 3 and 2 frames
    target, size = torch.tensor([[1, 2, 3], [1, 1, 0], [2, 2, 3]]), torch.tensor([3, 2, 2])
    batch = {"features": features, "lengths": lengths, "target": target, "target_lengths": size}
    assert min_frames(target, size).tolist() == [3, 3, 3]
    objective = CTC(Saying())
    values, answer = objective(batch), objective.outputs(batch)
    assert values["impossible"].item() == pytest.approx(1 / 3)
    assert answer["loss"].isnan().tolist() == [False, False, True]
    assert values["loss"].item() == pytest.approx(answer["loss"][:2].mean().item())
    features.requires_grad_()
    objective(batch)["loss"].backward()
    assert not features.grad[2].any() and features.grad[:2].any() and features.grad.isfinite().all()
    hopeless = {name: x[2:] for name, x in batch.items()}
    assert objective(hopeless) == {"loss": 0.0, "impossible": 1.0}


def test_min_frames_ignores_padding():
    target = torch.tensor([[1, 1, 1, 1], [1, 2, 2, 9], [3, 0, 0, 0], [0, 0, 0, 0]])
    assert min_frames(target, torch.tensor([3, 3, 1, 0])).tolist() == [5, 4, 1, 0]


def test_low_precision_logits_are_summed_in_float32():
    features = answers(2, 20, 5).bfloat16()
    batch = {
        "features": features,
        "lengths": torch.tensor([20, 12]),
        "target": torch.tensor([[1, 2], [3, 0]]),
        "target_lengths": torch.tensor([2, 1]),
    }
    objective = CTC(Saying().bfloat16())
    assert objective(batch)["loss"].dtype == torch.float32
    batch["features"] = features.double()
    exact = CTC(Saying().double())(batch)["loss"]
    assert exact.dtype == torch.float64 and objective(batch | {"features": features})["loss"].item() == pytest.approx(
        exact.item(), rel=1e-5
    )


def test_outputs_of_different_length_are_collected():
    lengths = np.array([4, 20, 11, 7, 2, 15])
    features = answers(6, 20, 5).float()

    def make(index, generator):
        longest = lengths[index].max()
        return {"features": features[index, :longest], "lengths": torch.from_numpy(lengths[index])}

    got = collect(CTC(Saying()), Batches(6, make, lengths), batch=2, device=torch.device("cpu"))
    assert got["path"].shape == (6, 10) and got["path"].dtype == np.int64
    assert got["frames"].tolist() == [2, 10, 6, 4, 1, 8] and "loss" not in got
    for row, count in enumerate(got["frames"]):
        probabilities, path = features[row, ::2][:count].softmax(-1).max(-1)
        assert got["path"][row, :count].tolist() == path.tolist() and (got["path"][row, count:] == -1).all()
        assert got["sure"][row] == pytest.approx(probabilities.log().mean().exp().item(), rel=1e-5)


def test_conformer_learns_to_transcribe():
    model = tiny("conformer", torch.float32).train()
    torch.manual_seed(0)
    batch = {
        "features": torch.randn(4, 32, 6),
        "lengths": torch.tensor([32, 30, 24, 29]),
        "target": torch.tensor([[1, 1, 2], [3, 4, 0], [5, 0, 0], [2, 6, 2]]),
        "target_lengths": torch.tensor([3, 2, 1, 3]),
    }
    objective, optimizer = CTC(model), torch.optim.AdamW(model.parameters(), 1e-2)
    for _ in range(80):
        optimizer.zero_grad()
        objective(batch)["loss"].backward()
        optimizer.step()
    answer = objective.outputs(batch)
    text, count = collapse(answer["path"], answer["frames"])
    assert [row[:n].tolist() for row, n in zip(text, count)] == [[1, 1, 2], [3, 4], [5], [2, 6, 2]]


# ---------------------------------------------------------------------------------------------- reading


def test_collapse_equals_the_definition_for_every_path():
    every = torch.tensor(list(itertools.product(range(3), repeat=5)))
    for frames in range(6):
        text, count = collapse(every, torch.full((len(every),), frames))
        for path, row, n in zip(every, text, count):
            assert tuple(row[:n].tolist()) == written(tuple(path[:frames].tolist())) and not row[n:].any()
    mixed = torch.randint(5, (len(every),))
    text, count = collapse(every, mixed)
    assert [tuple(r[:n].tolist()) for r, n in zip(text, count)] == [
        written(tuple(p[:k].tolist())) for p, k in zip(every, mixed)
    ]


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize(("steps", "vocab"), [(1, 3), (4, 3), (6, 3), (4, 4)])
def test_wide_beam_search_is_exact(steps, vocab, seed):
    logs = answers(1, steps, vocab, seed)[0].log_softmax(-1)
    want = sorted(((total(entries), text) for text, entries in paths(logs).items()), reverse=True)
    got = beam_search(logs, width=10_000)
    assert len(got) == len(want)
    for hypothesis, (value, text) in zip(got, want):
        assert hypothesis.symbols == text and hypothesis.log_probability == pytest.approx(value, abs=1e-9)
        assert hypothesis.score == hypothesis.log_probability
    assert sum(math.exp(h.log_probability) for h in got) == pytest.approx(1)


def test_beam_search_sums_over_alignments():
    """The most likely single path is blank, blank, but the three paths of "1" are more likely in total."""
    logs = torch.tensor([[0.6, 0.4], [0.6, 0.4]]).log()
    assert collapse(logs.argmax(-1)[None], torch.tensor([2]))[1].item() == 0
    best = beam_search(logs, width=2)[0]
    assert best.symbols == (1,) and best.log_probability == pytest.approx(math.log(0.64))


@pytest.mark.parametrize("seed", range(3))
def test_language_model_and_bonus_equal_an_exhaustive_search(seed):
    logs = answers(1, 5, 3, seed)[0].log_softmax(-1)
    model = {(): {1: 0.9, 2: 0.1}, (1,): {1: 0.2, 2: 0.8}, (2,): {1: 0.5, 2: 0.5}}  # by the symbol before
    language = lambda prefix, symbol: math.log(model[prefix[-1:]][symbol])
    want = []
    for text, entries in paths(logs).items():
        spoken = sum(language(text[:i], symbol) for i, symbol in enumerate(text))
        want.append((total(entries) + 0.7 * spoken + 0.3 * len(text), total(entries), text))
    got = beam_search(logs, 10_000, language=language, weight=0.7, bonus=0.3)
    for h, (score, value, text) in zip(got, sorted(want, reverse=True)):
        assert h.symbols == text and h.log_probability == pytest.approx(value) and h.score == pytest.approx(score)


def test_narrow_beam_search_keeps_its_limits():
    logs = answers(1, 10, 20)[0].log_softmax(-1)
    got = beam_search(logs, width=8, symbols=5)
    assert len(got) == 8 and got == sorted(got, key=lambda h: h.score, reverse=True)
    assert got[0].log_probability >= logs.max(-1).values.sum().item()  # no worse than the likeliest path
    few = beam_search(logs, width=50, symbols=2)
    allowed = {int(c) for row in logs for c in row[1:].topk(2).indices + 1}
    assert len(allowed) < 19 and {c for h in few for c in h.symbols} <= allowed
    with pytest.raises(SettingsError, match="at least 1"):
        beam_search(logs, width=0)


# ---------------------------------------------------------------------------------------------- alignment


@pytest.mark.parametrize("seed", range(4))
def test_alignment_is_the_most_likely_path(seed):
    targets = [(1, 2), (1, 1), (2,), (), (1, 2, 1), (2, 2, 2)]
    frames = torch.tensor([6, 5, 6, 4, 3, 4])  # the last does not fit
    logs = answers(6, 6, 3, seed).log_softmax(-1)
    target = torch.full((6, 3), 7)  # padded with anything
    for row, symbols in enumerate(targets):
        target[row, : len(symbols)] = torch.tensor(symbols)
    got = align(logs, frames, target, torch.tensor([len(t) for t in targets]))
    for row, symbols in enumerate(targets[:-1]):
        value, path = max(paths(logs[row, : frames[row]])[symbols])
        assert got.score[row].item() == pytest.approx(value)
        spans, t = [], 0
        for symbol, run in itertools.groupby(path):
            size = len(list(run))
            spans += [[t, t + size]] if symbol else []
            t += size
        assert got.spans[row, : len(symbols)].tolist() == spans and (got.spans[row, len(symbols) :] == -1).all()
        for i, (first, end) in enumerate(spans):
            mean = sum(logs[row, t, symbols[i]].item() for t in range(first, end)) / (end - first)
            assert got.confidence[row, i].item() == pytest.approx(math.exp(mean))
        assert not got.confidence[row, len(symbols) :].any()
    assert got.score[-1] == -math.inf and (got.spans[-1] == -1).all() and not got.confidence[-1].any()


def test_batched_alignment_is_bounded_by_the_loss():
    logs, frames = answers(9, 50, 12).log_softmax(-1), torch.randint(30, 51, (9,))
    lengths, target = torch.randint(1, 13, (9,)), torch.randint(1, 12, (9, 12))
    got = align(logs, frames, target, lengths)
    nll = nn.functional.ctc_loss(logs.transpose(0, 1), target, frames, lengths, reduction="none")
    assert (got.score <= -nll + 1e-9).all()
    for row in range(9):
        alone = align(
            logs[row : row + 1, : frames[row]],
            frames[row : row + 1],
            target[row : row + 1, : lengths[row]],
            lengths[row : row + 1],
        )
        assert torch.equal(alone.spans[0], got.spans[row, : lengths[row]])
        first, end = alone.spans[0].T
        assert (first < end).all() and (end[:-1] <= first[1:]).all()


# ---------------------------------------------------------------------------------------------- chunks


@pytest.mark.parametrize("length", [3, 31, 32, 33, 50, 55, 56, 57, 80, 81, 200, 203])
def test_chunks_equal_the_whole_for_a_small_receptive_field(length):
    """Without attention, the tiny Conformer sees 3 + 2 * 4 steps to either side: less than half of 24."""
    model = tiny("conformer")
    with torch.no_grad():
        for block in model.blocks:
            block.attn.proj.weight.zero_()
    x = torch.randn(length, 6, dtype=torch.float64)
    whole = model(x[None])[0].detach()
    for batch in (1, 3):
        got = compute_logits_in_chunks(model, x, size=48, overlap=24, batch=batch)
        torch.testing.assert_close(got, whole, rtol=1e-9, atol=1e-11)
    if length > 60:
        cut = compute_logits_in_chunks(model, x, size=48, overlap=0)
        assert cut.shape == whole.shape and not torch.allclose(cut, whole)


@torch.no_grad()
def test_one_chunk_equals_the_whole_with_attention():
    model, x = tiny("conformer"), torch.randn(47, 6, dtype=torch.float64)
    torch.testing.assert_close(compute_logits_in_chunks(model, x, size=48, overlap=24), model(x[None])[0])


def test_stitching_uses_the_half_far_from_each_edge():
    chunks = torch.arange(3)[:, None, None] * 100 + torch.arange(10)[:, None].expand(3, 10, 1)
    got = stitch_chunks(chunks, 4, 21)[:, 0].tolist()
    assert got == [*range(8), *range(102, 108), *range(202, 209)]


@pytest.mark.parametrize("wrong", [{"size": 47, "overlap": 8}, {"size": 48, "overlap": 12}, {"size": 48, "overlap": 48}])
def test_chunk_sizes_off_the_frame_grid_are_rejected(wrong):
    with pytest.raises(SettingsError, match="must be a multiple of 4"):
        compute_logits_in_chunks(tiny("conformer"), torch.zeros(100, 6), **wrong)


# ---------------------------------------------------------------------------------------------- n-grams of symbols


def test_ngrams_equal_the_baseline_model():
    """A row of symbols has the probabilities of the model of the metrics, which counts arrays."""
    rows = [[1, 2, 3, 1, 2, 3, 3], [2, 2, 1], [3, 1, 2, 1]]
    ours = SymbolNGrams.fit(rows, 4, order=3)
    total = Counter(s for row in rows for s in [*row, 0])
    p0 = {s: (total[s] + 4 * 0.25) / (total.total() + 4) for s in range(4)}
    after = Counter(row[i + 1] if i + 1 < len(row) else 0 for row in rows for i, s in enumerate(row) if s == 2)
    p1 = {s: (after[s] + len(after) * p0[s]) / (after.total() + len(after)) for s in range(4)}
    assert ours.score((), 3) == pytest.approx(math.log(p0[3]))
    assert ours.score((2,), 1) == pytest.approx(math.log(p1[1]))
    for prefix in [(), (1,), (1, 2), (3, 3, 2)]:
        assert sum(math.exp(ours(prefix, s)) for s in range(4)) == pytest.approx(1)
    text = np.array([1, 2, 1, 3, 2, 2, 1, 2] * 5)
    baseline = NGram(text, 4, order=3).compute_nats(np.array([1, 2, 2]))
    counts = SymbolNGrams.fit([text.tolist()], 4, order=3)
    inner = {c: dict(a) for c, a in counts.counts.items() if 0 not in c}
    for context in inner:  # the baseline has neither edges nor an end
        inner[context].pop(0, None)
    plain = SymbolNGrams({c: a for c, a in inner.items() if a}, 4, 3)
    assert [-plain.score((), 1), -plain.score((1,), 2), -plain.score((1, 2), 2)] == pytest.approx(baseline.tolist())


def test_ngrams_are_saved_and_limited(tmp_path, monkeypatch):
    rows = torch.randint(1, 9, (60, 30), generator=torch.Generator().manual_seed(0)).tolist()
    model = SymbolNGrams.fit(rows, 9)
    model.save(tmp_path)
    again = SymbolNGrams.load(tmp_path)
    assert again.counts == model.counts and again((1, 2), 3) == model((1, 2), 3)
    assert SymbolNGrams.load(tmp_path / "none") is None
    monkeypatch.setattr(symbol_ngrams, "MAX_NGRAMS", 500)
    few = SymbolNGrams.fit(rows, 9)
    assert sum(map(len, few.counts.values())) <= 500
    assert sum(math.exp(few((1, 2, 3, 4), s)) for s in range(9)) == pytest.approx(1)
    for content in ("{", '{"order": 2, "size": 3, "counts": [[[1], [2], [-1]]]}', '{"order": 2}'):
        (tmp_path / "ngrams.json").write_text(content)
        with pytest.raises(RunError, match="damaged"):
            SymbolNGrams.load(tmp_path)


def test_language_model_decides_between_similar_transcripts():
    """The frames hardly tell 1 2 from 1 3; the transcripts know only 1 2, and that it ends there."""
    model = SymbolNGrams.fit([[1, 2]] * 20, 4)
    logs = torch.tensor([[0.1, 0.8, 0.05, 0.05], [0.9, 0.03, 0.03, 0.04], [0.1, 0.1, 0.39, 0.41], [0.7, 0.1, 0.1, 0.1]]).log()
    assert beam_search(logs, 8)[0].symbols == (1, 3)
    found = beam_search(logs, 8, language=model, weight=0.5, ends=True)
    assert found[0].symbols == (1, 2) and found == sorted(found, key=lambda h: h.score, reverse=True)
    best = found[0]
    spoken = model((), 1) + model((1,), 2) + model((1, 2), 0)
    assert best.score == pytest.approx(best.log_probability + 0.5 * spoken)
