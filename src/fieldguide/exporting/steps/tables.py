"""Preprocessing of tables as tensor operations: raw numbers, dates and category codes -> `numbers` and `categories`."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from fieldguide.data.preprocessing.table import MIN_PROBABILITY, Category, TablePreparer

EPOCH_SHIFT = 719_468  # days from 0000-03-01 to 1970-01-01
# Rational approximations of the normal quantile (Wichura 1988, algorithm AS 241, PPND16): center and tails.
CENTER = (
    (3.3871328727963666080, 133.14166789178437745, 1971.5909503065514427, 13731.693765509461125),
    (45921.953931549871457, 67265.770927008700853, 33430.575583588128105, 2509.0809287301226727),
    (1.0, 42.313330701600911252, 687.18700749205790830, 5394.1960214247511077),
    (21213.794301586595867, 39307.895800092710610, 28729.085735721942674, 5226.4952788528545610),
)
TAIL = (
    (1.42343711074968357734, 4.63033784615654529590, 5.76949722146069140550, 3.64784832476320460504),
    (1.27045825245236838258, 0.241780725177450611770, 2.27238449892691845833e-2, 7.74545014278341407640e-4),
    (1.0, 2.05319162663775882187, 1.67638483018380384940, 0.689767334985100004550),
    (0.148103976427480074590, 1.51986665636164571966e-2, 5.47593808499534494600e-4, 1.05075007164441684324e-9),
)


class TableSteps(nn.Module):
    """Convert raw values to what a network of tables takes, as `TablePreparer.apply` or `vector` does.

    `forward` takes `raw`, B R float64, one column for each of `raw_columns` (NaN is missing; dates are days since 1970), and
    `codes`, B K int64, the codes of `text_categories`; only one of them if a table has no columns of the other kind.
    """

    knots: Tensor  # F K float64, quantiles of the scaled numbers, filled up with infinity

    def __init__(self, preparer: TablePreparer, dates: Sequence[str], scale: str, as_vector: bool):
        super().__init__()
        self.preparer, self.scale, self.as_vector = preparer, scale, as_vector
        numeric = dict.fromkeys(
            [n.column for n in preparer.numbers] + [c.column for c in preparer.categories if c.part != "value"]
        )
        self.raw_columns, self.dates = list(numeric), [name for name in numeric if name in dates]
        self.text_categories = [c for c in preparer.categories if c.part == "value"]
        self.place = {name: i for i, name in enumerate(self.raw_columns)}
        scaled = [n for n in preparer.numbers if n.quantiles]
        width = max((len(n.quantiles) for n in scaled), default=0)
        knots = torch.tensor([[*n.quantiles] + [math.inf] * (width - len(n.quantiles)) for n in scaled], dtype=torch.float64)
        self.register_buffer("knots", knots.reshape(len(scaled), width), persistent=False)
        self.scaled = scaled

    def forward(self, *tensors: Tensor) -> dict[str, Tensor]:  # B R, B K
        raw, codes = tensors if len(tensors) == 2 else (tensors[0], tensors[0][:, :0])
        if not self.raw_columns:
            raw, codes = codes.double(), raw
        values = {name: raw[:, i] for name, i in self.place.items()}
        days = {name: torch.floor(values[name]).nan_to_num().long() for name in self.dates}
        numbers = self.scale_numbers(raw)
        columns = [
            numbers[n] if n in numbers else self.extract_part(values[n.column], days.get(n.column), n.part)
            for n in self.preparer.numbers
        ]
        rows = tensors[0]
        stacked = torch.stack(columns, 1).float() if columns else rows[:, :0].float()
        found = [self.code(c, values, days, codes) for c in self.preparer.categories]
        categories = torch.stack(found, 1) if found else rows[:, :0].long()
        if not self.as_vector:
            return {"numbers": stacked, "categories": categories}
        hot = [
            (categories[:, i, None] == torch.arange(1, c.size)).float() for i, c in enumerate(self.preparer.categories)
        ]  # code 0, unknown, is all zeros
        return {"vector": torch.cat([stacked, *hot], 1)}

    def scale_numbers(self, raw: Tensor) -> dict[object, Tensor]:  # B R -> of each scaled number, B
        """Return the numbers that have quantiles, scaled; a missing one is 0."""
        if not self.scaled:
            return {}
        x = raw[:, torch.tensor([self.place[n.column] for n in self.scaled])]
        if self.scale == "normal":
            counts = torch.tensor([len(n.quantiles) for n in self.scaled])
            y = compute_normal_quantile(interpolate(x, self.knots, counts))
        else:
            means = [sum(n.quantiles) / len(n.quantiles) for n in self.scaled]
            stds = [
                math.sqrt(sum((q - m) ** 2 for q in n.quantiles) / len(n.quantiles)) or 1.0 for n, m in zip(self.scaled, means)
            ]
            y = (x - torch.tensor(means, dtype=torch.float64)) / torch.tensor(stds, dtype=torch.float64)
        y = torch.where(torch.isnan(x), torch.zeros((), dtype=torch.float64), y)
        return {n: y[:, i] for i, n in enumerate(self.scaled)}

    def extract_part(self, value: Tensor, days: Tensor | None, part: str) -> Tensor:
        """Return a number that is not scaled, 0 if missing: a value, or a part of a date as sine or cosine."""
        if days is None or part in ("value", "time"):
            return value.nan_to_num()
        turn = value - days if part.startswith("hour") else (find_day_of_year(days) - 1) / 365.25
        angle = 2 * math.pi * turn.nan_to_num()
        wave = torch.sin(angle.float()) if part.endswith("sin") else torch.cos(angle.float())
        return torch.where(torch.isnan(value), torch.zeros(()), wave).double()

    def code(self, category: Category, values: dict[str, Tensor], days: dict[str, Tensor], codes: Tensor) -> Tensor:  # -> B
        """Return the codes of a category."""
        if category.part == "value":
            return codes[:, self.text_categories.index(category)]
        names = {name: i for i, name in enumerate(category.values, 1)}
        gone = torch.isnan(values[category.column])
        if category.part == "missing":
            return torch.where(gone, names.get("yes", 0), names.get("no", 0))
        weekdays = torch.tensor([names.get(str(day), 0) for day in range(1, 8)])
        code = weekdays[(days[category.column] + 3) % 7]  # 1970-01-01 was a Thursday
        return torch.where(gone, category.size - 1 if category.missing else 0, code)


def interpolate(x: Tensor, knots: Tensor, counts: Tensor) -> Tensor:  # B F, F K, F -> B F
    """Return the probabilities of values among quantiles (see `table.to_normal`), the mean of both sides of equal ones."""
    wide, most = x[:, :, None], counts - 1
    feature = torch.arange(len(counts))
    at_most, below = (knots <= wide).sum(-1), (knots < wide).sum(-1)  # B F
    sides = []
    for left in (at_most - 1, below - 1):
        left = torch.minimum(left.clamp(min=0), most - 1)
        low, high = knots[feature, left], knots[feature, left + 1]
        part = ((x - low) / torch.where(high > low, high - low, 1.0)).clamp(0, 1)
        sides.append(torch.where(high > low, left.double() + part, left.double() + 1) / most)
    upper = torch.where(at_most >= counts, 1.0, torch.where(at_most == 0, 0.0, sides[0]))
    lower = torch.where(below >= counts, 1.0, torch.where(below == 0, 0.0, sides[1]))
    least, most = (torch.tensor(p, dtype=torch.float64) for p in (MIN_PROBABILITY, 1 - MIN_PROBABILITY))
    return torch.minimum(torch.maximum((upper + lower) / 2, least), most)  # the limits of `clamp` are exported as float32


def compute_normal_quantile(p: Tensor) -> Tensor:
    """Return the quantiles of the standard normal, float64, for probabilities from 1e-11 to 1 - 1e-11."""
    q = p - 0.5
    middle = q * evaluate(CENTER, 0.180625 - q * q)
    distance = torch.sqrt(-torch.log(torch.minimum(p, 1 - p)))
    return torch.where(q.abs() <= 0.425, middle, torch.sign(q) * evaluate(TAIL, distance - 1.6))


def evaluate(parts: Sequence[Sequence[float]], x: Tensor) -> Tensor:
    """Return a rational function: coefficients of the numerator in two parts, lowest power first, then of the denominator."""
    top, bottom = (*parts[0], *parts[1]), (*parts[2], *parts[3])
    value = lambda powers: sum_powers(powers, x)
    return value(top) / value(bottom)


def sum_powers(powers: Sequence[float], x: Tensor) -> Tensor:
    total = torch.full_like(x, powers[-1])
    for power in reversed(powers[:-1]):
        total = total * x + power
    return total


def find_day_of_year(days: Tensor) -> Tensor:
    """Return the day of the year, from 1, of days since 1970-01-01 (proleptic Gregorian calendar, counted from March)."""
    shifted = days + EPOCH_SHIFT
    in_era = shifted - 146_097 * torch.div(shifted, 146_097, rounding_mode="floor")
    divide = lambda value, by: torch.div(value, by, rounding_mode="floor")
    year = divide(in_era - divide(in_era, 1460) + divide(in_era, 36_524) - divide(in_era, 146_096), 365)  # of the era
    from_march = in_era - (365 * year + divide(year, 4) - divide(year, 100))
    is_leap = ((year % 4 == 0) & ((year % 100 != 0) | (year % 400 == 0))).long()  # of the year in which it begins in March
    return torch.where(from_march < 306, from_march + 60 + is_leap, from_march - 305)
