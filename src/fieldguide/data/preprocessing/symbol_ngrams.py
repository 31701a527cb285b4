"""An n-gram model of the symbols of transcripts, for the search over the outputs of a CTC network.

Probabilities are those of `metrics.ngram_baseline` (Witten and Bell 1991, doi:10.1109/18.87000), one symbol at a time. Symbols are
integers from 1; 0 stands for the beginning of a transcript in contexts, and for its end as a symbol.
"""

from __future__ import annotations

import json
import math
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from functools import lru_cache
from pathlib import Path

from fieldguide.core.errors import RunError
from fieldguide.core.validation import guard

FILE = "ngrams.json"
ORDER = 5  # symbols of an n-gram
MAX_NGRAMS = 300_000  # that are stored; the rarest long ones are left out
EDGE = 0
Context = tuple[int, ...]


class SymbolNGrams:
    """Interpolated n-gram probabilities of a symbol after those before it:

        p_n(s | c) = (count(c s) + kinds(c) p_{n-1}(s | c')) / (count(c) + kinds(c))

    where c' is the context without its first symbol, kinds(c) the number of different symbols after c, and p_0 uniform.
    """

    def __init__(self, counts: dict[Context, dict[int, int]], size: int, order: int = ORDER):
        self.counts, self.size, self.order = counts, size, order
        self.totals = {context: sum(after.values()) for context, after in counts.items()}
        self.score = lru_cache(1 << 18)(self.compute_score)

    @classmethod
    def fit(cls, rows: Iterable[Sequence[int]], size: int, order: int = ORDER) -> SymbolNGrams:
        """Count the n-grams of rows of symbols; `size` is the number of symbols including the edge."""
        counts: dict[Context, Counter[int]] = defaultdict(Counter)
        for row in rows:
            padded = [*[EDGE] * (order - 1), *map(int, row), EDGE]
            for end in range(order - 1, len(padded)):
                for length in range(order):
                    counts[tuple(padded[end - length : end])][padded[end]] += 1
        kept: dict[Context, dict[int, int]] = {context: dict(after) for context, after in counts.items()}
        least, most = 2, max((n for after in kept.values() for n in after.values()), default=0)
        while sum(map(len, kept.values())) > MAX_NGRAMS and least <= 2 * most:  # pairs are always kept
            often = lambda after, least=least: {symbol: n for symbol, n in after.items() if n >= least}
            kept = {context: after if len(context) < 2 else often(after) for context, after in kept.items()}
            kept = {context: after for context, after in kept.items() if after}
            least *= 2
        return cls(kept, size, order)

    def compute_score(self, context: Context, symbol: int) -> float:
        """Return the log-probability of a symbol after a context of at most `order` - 1 symbols."""
        p = 1 / self.size
        for length in range(len(context) + 1):
            part = context[len(context) - length :]
            if (total := self.totals.get(part)) is None:
                break  # longer contexts do not occur either
            after = self.counts[part]
            p = (after.get(symbol, 0) + len(after) * p) / (total + len(after))
        return math.log(p)

    def __call__(self, prefix: Context, symbol: int) -> float:
        """Return the log-probability that `symbol` follows the symbols of a transcript so far; 0: that it ends."""
        long = self.order - 1
        context = prefix[-long:] if len(prefix) >= long else (*[EDGE] * (long - len(prefix)), *prefix)
        return self.score(context, symbol)

    def save(self, folder: Path) -> None:
        """Write the counts to a folder."""
        rows = [[list(context), list(after), list(after.values())] for context, after in self.counts.items()]
        content = {"order": self.order, "size": self.size, "counts": rows}
        (folder / FILE).write_text(json.dumps(content, separators=(",", ":")), encoding="utf-8")

    @classmethod
    def load(cls, folder: Path) -> SymbolNGrams | None:
        """Return what `save` wrote; None if there is no file. Raises `RunError` for a damaged file."""
        if not (folder / FILE).is_file():
            return None
        with guard(folder / FILE, RunError):
            content = json.loads((folder / FILE).read_text(encoding="utf-8"))
            counts = {
                tuple(context): dict(zip(symbols, numbers, strict=True)) for context, symbols, numbers in content["counts"]
            }
            if not all(type(n) is int and n > 0 for after in counts.values() for n in after.values()):
                raise ValueError("counts must be positive integers")
            return cls(counts, int(content["size"]), int(content["order"]))
