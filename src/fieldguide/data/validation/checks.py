"""Data checks: problems in data with their locations, counts and remedies. Nothing is dropped without a finding.

`check` examines data after reading; problems that only reading can detect (encodings, corrupt images, values that do
not fit) are reported in the same form by `findings` and the readers. `enforce` raises one error for all of them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import polars as pl

from fieldguide.core.errors import DataError
from fieldguide.data.column_spec import ColumnSpec
from fieldguide.data.dataset import RATE, SECONDS, Column, Data, Finding, Kind
from fieldguide.data.text_values import count_values, mean_value
from fieldguide.data.timeseries.frequency import are_regular_steps
from fieldguide.data.validation.class_names import find_unseen_classes
from fieldguide.data.validation.duplicates import same_inputs
from fieldguide.data.validation.findings import MAX_SHOWN_PLACES, places, simplify_label
from fieldguide.data.validation.sentinels import check_sentinels

MAX_LISTED = 8  # problems that an error lists
MAX_UNUSABLE_FRACTION = 0.01  # maximum fraction of unusable examples
MIN_LEAK_ACCURACY = 0.99  # minimum accuracy of a single feature that is reported as a leak,
MIN_LEAK_CORRELATION = 0.9999  # or for a numeric target, minimum correlation
MIN_LEAK_ROWS = 50  # minimum number of rows for leak detection; with fewer, a perfect feature may be chance
BINS = 64  # quantile bins of a numeric feature
MAX_LENGTH_RATIO, MIN_LENGTH_DIFFERENCE = (
    8,
    60,
)  # factor and number of characters by which the lengths of a pair of texts must deviate to be reported
MAX_CHARACTERS_PER_SECOND = 45  # maximum plausible characters per second of speech
INPUT_NOUNS: dict[Kind, str] = {"image": "images", "audio": "recordings", "text": "texts"}
MIN_SERIES_ROWS = 10  # minimum mean number of rows of a series for a table to look like time series
MAX_LEAK_ROWS = 20_000  # maximum number of rows used for leak detection
TARGET_TYPES = ("category", "boolean", "number", "date", "identifier")  # types of targets that are classes or quantities


class BadData(DataError):
    """Raised if the data cannot be used. `findings` holds all findings, including those that are not errors."""

    def __init__(self, message: str, findings: Sequence[Finding]) -> None:
        super().__init__(message)
        self.findings = tuple(findings)


def enforce(
    findings: Sequence[Finding], rows: int, allow_bad: bool = False, source: str = "the data", offer: bool = True
) -> None:
    """Raise BadData, listing all problems, for any error or if over 1 % of the examples are unusable.

    `rows` is the number of examples before any were dropped. `allow_bad` accepts unusable examples but never errors;
    `offer` mentions that option in the message.
    """
    errors = [f for f in findings if f.severity == "error"]
    unusable = sum(f.unusable for f in findings)
    too_many = unusable > MAX_UNUSABLE_FRACTION * rows and not allow_bad
    if not errors and not too_many:
        return
    listed = errors + ([f for f in findings if f.unusable and f.severity != "error"] if too_many else [])
    head = f"{source}: the data cannot be used."
    if too_many:
        share = 100 * unusable / max(rows, 1)
        head += (
            f" {unusable:,} of {rows:,} examples are unusable ({share:.1f} %; up to "
            f"{100 * MAX_UNUSABLE_FRACTION:.0f} % would be dropped and reported). Correct them, or "
            + ("drop them all with --allow-bad (in Python: allow_bad=True)." if offer else "remove them.")
        )
    lines = [f"  {i}. {f} [{f.check}]" for i, f in enumerate(listed[:MAX_LISTED], 1)]
    if len(listed) > MAX_LISTED:
        lines.append(f"  and {len(listed) - MAX_LISTED} more problems, which are listed once these are solved")
    lines += [f"  note: {f}" for f in findings if f.check == "target-chosen"]
    raise BadData("\n".join([head, *lines]), findings)


def check(data: Data, checks: Sequence[Callable[[Data], Iterator[Finding]]] | None = None) -> list[Finding]:
    """Return all findings about data. `checks` defaults to `CHECKS`."""
    return [finding for one in (CHECKS if checks is None else checks) for finding in one(data)]


def check_columns(data: Data) -> Iterator[Finding]:
    """Report columns without information."""
    for column in data.columns.values():
        where = (f"column {column.name!r}",)
        if column.missing == len(data) and column.role != "target":
            yield Finding(
                "all-missing",
                "warning",
                f"column {column.name!r} has no values; it is ignored",
                where,
                1,
                "Fill it or remove it.",
            )
    ignored = [c for c in data.columns.values() if c.role == "ignored" and c.missing < len(data)]
    for kind in dict.fromkeys(c.kind for c in ignored):
        yield describe_ignored([c for c in ignored if c.kind == kind])
    if not data.features() and not data.columns_with_role("series") + data.columns_with_role("item") + data.columns_with_role(
        "time"
    ):
        yield Finding(
            "no-features",
            "error",
            "there are no usable feature columns",
            (),
            1,
            "Every column is the target, constant, empty or an identifier; see the notes.",
        )


def describe_ignored(columns: Sequence[Column]) -> Finding:
    """Return the finding about ignored columns of one kind."""
    first, reasons = columns[0], {c.why for c in columns}
    if len(columns) == 1:
        what = f"column {first.name!r} is ignored: {first.why}"
    else:
        reason = first.why if len(reasons) == 1 else f"{first.kind} columns, such as {first.name!r}: {first.why}"
        what = f"{len(columns):,} columns are ignored: {reason}"
    named = tuple(f"column {c.name!r}" for c in columns[:MAX_SHOWN_PLACES])
    remedy = f"To use {'it' if len(columns) == 1 else 'one'}, specify its type: --set 'column.{first.name}=category' (in Python: kinds=)."
    return Finding(f"{first.kind}-column", "note", what, named, len(columns), remedy)


def check_target(data: Data) -> Iterator[Finding]:
    """Report targets that cannot be learned: a single value, classes with one example, nearly equal class names."""
    column = data.target
    if column is None or column.kind not in TARGET_TYPES or len(data.columns_with_role("target")) > 1 or not len(data):
        return
    values, where = data.rows[column.name].drop_nulls(), (f"column {column.name!r}",)
    names, counts = count_values(values)
    if len(names) == 1:
        yield Finding(
            "single-class",
            "error",
            f"the target {column.name!r} is {names[0]!r} in every row",
            where,
            1,
            "There is nothing to learn. Check the target column.",
        )
    if column.kind != "category":
        return
    ordered = sorted(zip(names, counts))
    names, seen = [name for name, _ in ordered], np.array([count for _, count in ordered])
    if len(names) > max(20, len(data) // 2):
        yield Finding(
            "many-classes",
            "warning",
            f"the target {column.name!r} has {len(names):,} classes for {len(data):,} rows",
            where,
            1,
            "Check the target column. A regression target must be numeric.",
        )
    single = [n for n, s in zip(names, seen) if s == 1]
    if single and len(names) > 1:
        rows = data.rows[column.name].is_in(single[:MAX_SHOWN_PLACES]).fill_null(False).to_numpy()
        shown = ", ".join(repr(n) for n in single[:MAX_SHOWN_PLACES])
        yield Finding(
            "class-of-one",
            "warning",
            f"classes with a single example ({shown}), which can be used for training or test but not both",
            places(data, rows),
            len(single),
            "Add examples or merge classes.",
        )
    alike: dict[str, list[str]] = {}
    for name in names:
        alike.setdefault(simplify_label(str(name)), []).append(str(name))
    for same in (a for a in alike.values() if len(a) > 1):
        yield Finding(
            "class-names-alike",
            "warning",
            f"classes whose names differ only by case, whitespace or a trailing period: {', '.join(map(repr, same))}",
            where,
            len(same),
            "Use the same spelling if they are the same class.",
        )


def check_duplicates(data: Data) -> Iterator[Finding]:
    """Report equal inputs: in two given splits, with different targets, or repeated."""
    same = same_inputs(data)
    if same is None or not len(data):
        return
    sizes = np.bincount(same)
    twice = sizes[same] > 1
    if not twice.any():
        return
    what = next((words for kind, words in INPUT_NOUNS.items() if data.features(kind)), "rows")
    rows = np.flatnonzero(twice)
    order = rows[np.argsort(same[rows], kind="stable")]  # duplicates side by side
    heads = order[np.r_[True, np.diff(same[order]) != 0]]
    first = np.zeros(sizes.size, dtype=np.int64)
    first[same[heads]] = heads
    if data.splits is not None:
        train = np.zeros(sizes.size, dtype=bool)
        train[same[data.splits == "train"]] = True
        source = np.zeros(sizes.size, dtype=np.int64)
        at = np.flatnonzero(data.splits == "train")[::-1]
        source[same[at]] = at
        over = np.flatnonzero((data.splits != "train") & train[same])
        if over.size:
            pairs = tuple(
                f"{data.locate_row(int(i))} = {data.locate_row(int(source[same[i]]))}" for i in over[:MAX_SHOWN_PLACES]
            )
            yield Finding(
                "duplicate-across-splits",
                "warning",
                f"{what} of val or test that also occur in train, which makes the scores too optimistic",
                pairs,
                int(over.size),
                "Remove them from one of the splits.",
            )
    yield from check_conflicts(data, same, order, first, what)
    extra = int(rows.size - heads.size)
    pairs = tuple(f"{data.locate_row(int(i))} = {data.locate_row(int(first[same[i]]))}" for i in order if i != first[same[i]])
    yield Finding(
        "duplicate",
        "note",
        f"duplicate {what} with the same input; they are kept in the same split",
        pairs[:MAX_SHOWN_PLACES],
        extra,
    )


def check_conflicts(data: Data, same: np.ndarray, order: np.ndarray, first: np.ndarray, what: str) -> Iterator[Finding]:
    """Report equal inputs with different targets."""
    column = data.target
    has_audio = bool(data.features("audio"))  # a recording has one transcript, whereas a text may have several translations
    if column is None or column.kind not in ("category", "boolean", *(["text"] if has_audio else [])):
        return
    codes = data.rows[column.name].cast(pl.String).fill_null("").rank("dense").to_numpy()
    other = order[codes[order] != codes[first[same[order]]]]
    if other.size:
        label = data.rows[column.name]
        pairs = tuple(
            f"{data.locate_row(int(i))} is {label[int(i)]!r}, {data.locate_row(j)} is {label[j]!r}"
            for i in other[:MAX_SHOWN_PLACES]
            for j in (int(first[same[i]]),)
        )
        answers = "transcripts" if has_audio else "classes"
        yield Finding(
            "conflicting-duplicate",
            "warning",
            f"equal {what} with different {answers}",
            pairs,
            int(other.size),
            "Correct or remove them.",
        )


def check_leaks(data: Data) -> Iterator[Finding]:
    """Report features that reveal the target."""
    column = data.target
    if (
        column is None
        or column.kind not in TARGET_TYPES
        or len(data.columns_with_role("target")) > 1
        or len(data) < MIN_LEAK_ROWS
    ):
        return
    others = [c for c in data.features("number", "category", "boolean") if c.distinct > 1]
    if len(data) > MAX_LEAK_ROWS:
        data = data.take(np.random.default_rng(0).choice(len(data), MAX_LEAK_ROWS, replace=False))
    for feature in others:
        measure = correlation if column.kind == "number" else mapping
        strength = measure(data, feature, column)
        if strength:
            exact = strength == "exactly" and len(others) > 1
            yield Finding(
                "leak",
                "error" if exact else "warning",
                f"column {feature.name!r} predicts the target {column.name!r} {strength}",
                (f"column {feature.name!r}",),
                1,
                f"If it is not known before the target, remove it, or ignore it with "
                f"--set 'column.{feature.name}=identifier' (in Python: kinds=)."
                + (" If it is known, use it with --allow-bad (in Python: allow_bad=True)." if exact else ""),
            )
    for feature in data.features("text"):
        if column.kind != "category":
            continue
        text, label = pl.col(feature.name).str.to_lowercase(), pl.col(column.name).str.to_lowercase()
        named = text.str.contains(label, literal=True) & (label.str.len_chars() >= 3)
        found = data.rows.select(named).to_series()
        if (share := mean_value(found)) > 0.5:
            rows = found.fill_null(False).to_numpy()
            yield Finding(
                "label-in-text",
                "note",
                f"{100 * share:.0f} % of the texts in {feature.name!r} contain the name of their class",
                places(data, rows),
                int(found.sum()),
                "Check that the class name is not added to the text.",
            )


def correlation(data: Data, feature: Column, column: Column) -> str:
    """Return a description if a numeric feature is almost perfectly correlated with the target, else ""."""
    if feature.kind != "number":
        return ""
    both = data.rows.select(feature.name, column.name).drop_nulls().to_numpy()
    if len(both) < MIN_LEAK_ROWS or not both.std(0).all():
        return ""
    r = abs(np.corrcoef(both.T)[0, 1])
    return "exactly" if r > 1 - 1e-9 else f"(correlation {r:.5f})" if r > MIN_LEAK_CORRELATION else ""


def mapping(data: Data, feature: Column, column: Column) -> str:
    """Return a description if a feature predicts the class almost perfectly, else "". Fitted on half of the rows and
    evaluated on the rest."""
    values = data.rows[feature.name]
    binned = feature.kind == "number" and feature.distinct > len(data) // 4
    if binned:
        x = values.fill_null(np.nan).to_numpy()
        cuts = np.unique(np.nanquantile(x, np.linspace(0, 1, BINS + 1)[1:-1]))
        codes = np.searchsorted(cuts, x)
    else:
        codes = np.unique(values.rank("dense").fill_null(0).to_numpy(), return_inverse=True)[1]
    labels = data.rows[column.name].cast(pl.String).fill_null("").to_numpy()
    classes = np.unique(labels, return_inverse=True)[1]
    mixed = np.random.default_rng(0).permutation(len(data))
    learn, tried = mixed[::2], mixed[1::2]
    counted = pl.DataFrame({"x": codes[learn], "y": classes[learn]}).group_by("x", "y").len()
    best = counted.sort("len", "y").group_by("x", maintain_order=True).last()
    answer = np.full(codes.max() + 1, -1)
    answer[best["x"].to_numpy()] = best["y"].to_numpy()
    right = float((answer[codes[tried]] == classes[tried]).mean())
    chance = float(np.bincount(classes[tried]).max() / tried.size)
    if right < MIN_LEAK_ACCURACY or 1 - right > 0.1 * (1 - chance) or chance == 1:
        return ""
    return (
        "exactly"
        if right == 1 and not binned and feature.distinct == column.distinct
        else f"on {100 * right:.1f} % of the rows"
    )


def check_text_pairs(data: Data) -> Iterator[Finding]:
    """Report text pairs that are unlikely to match: unusual length ratios, or identical texts."""
    target, inputs = data.target, data.features("text")
    if target is None or target.kind != "text" or len(inputs) != 1 or not len(data):
        return
    first, second = data.rows[inputs[0].name], data.rows[target.name]
    sizes = np.stack([c.str.len_chars().fill_null(0).to_numpy().astype(float) for c in (first, second)])
    usual = np.median((sizes[1] + 1) / (sizes[0] + 1))
    ratio = (sizes[1] + 1) / (sizes[0] + 1) / usual
    odd = (np.maximum(ratio, 1 / ratio) > MAX_LENGTH_RATIO) & (np.abs(sizes[1] - usual * sizes[0]) > MIN_LENGTH_DIFFERENCE)
    if odd.any():
        yield Finding(
            "unlike-lengths",
            "warning",
            f"texts in {inputs[0].name!r} and {target.name!r} whose lengths are "
            f"more than {MAX_LENGTH_RATIO} times off the usual ratio, which suggests that they do not belong together",
            places(data, odd),
            int(odd.sum()),
            "Check for shifted lines.",
        )
    same = (first == second).fill_null(False).to_numpy()
    if same.mean() > 0.2:
        yield Finding(
            "copies",
            "warning",
            f"{100 * same.mean():.0f} % of the texts in {inputs[0].name!r} and {target.name!r} are the same",
            places(data, same),
            int(same.sum()),
            "Check the target column.",
        )


def check_recordings(data: Data) -> Iterator[Finding]:
    """Report recordings with different sample rates, and recordings that are unlikely to match their transcripts."""
    rows, answer = data.rows, data.target
    if not data.features("audio"):
        return
    if RATE in rows.columns and rows[RATE].n_unique() > 1:
        rates, counts = count_values(rows[RATE])
        listed = ", ".join(f"{rate:,} Hz ({count:,})" for rate, count in list(zip(rates, counts))[:MAX_SHOWN_PLACES])
        few = (rows[RATE] != rates[0]).to_numpy()
        yield Finding(
            "mixed-rates",
            "note",
            f"recordings with a less common sample rate: {listed}; all are resampled to one rate",
            places(data, few),
            int(few.sum()),
            "Check that they are comparable. Telephone recordings contain nothing above 4 kHz.",
        )
    if SECONDS not in rows.columns or answer is None or answer.kind != "text" or not len(data):
        return
    seconds = rows[SECONDS].to_numpy()
    pace = rows[answer.name].str.len_chars().fill_null(0).to_numpy() / np.maximum(seconds, 0.01)
    usual = float(np.median(pace))
    odd = (pace > MAX_CHARACTERS_PER_SECOND) | ((pace > MAX_LENGTH_RATIO * usual) | (pace < usual / MAX_LENGTH_RATIO)) & (
        seconds > 1
    )
    if odd.any():
        yield Finding(
            "unlike-lengths",
            "warning",
            f"recordings whose transcript is more than {MAX_LENGTH_RATIO} times longer or shorter "
            f"than usual ({usual:.0f} characters per second), or too long for their duration "
            f"(over {MAX_CHARACTERS_PER_SECOND} characters per second)",
            places(data, odd),
            int(odd.sum()),
            "Check for shifted lines or wrong transcripts.",
        )


def check_events(data: Data) -> Iterator[Finding]:
    """Report repeated events of the same user, item and time."""
    keys = [c.name for role in ("user", "item", "time") for c in data.columns_with_role(role)]
    if not (data.columns_with_role("user") and data.columns_with_role("item")) or len(keys) < 3:
        return
    rows = data.rows.select(pl.struct(keys).is_first_distinct()).to_series()
    again = ~rows.to_numpy()
    if again.any():
        yield Finding(
            "repeated-event",
            "warning",
            "repeated events with the same user, item and time",
            places(data, again),
            int(again.sum()),
            "Remove them unless each should count.",
        )


def check_series(data: Data) -> Iterator[Finding]:
    """Report tables with a numeric target that look like time series, for which forecasting is the usual task."""
    target = data.target
    if target is None or target.kind != "number" or data.columns_with_role("time") or data.columns_with_role("series"):
        return
    spec = ColumnSpec("none", names=())
    names = [c.name for c in data.columns.values() if c.role in ("feature", "ignored") and c.name in data.rows.columns]
    dates = [n for n in names if data.columns[n].kind == "date"]
    time = spec.by_name("time", names) or (dates[0] if len(dates) == 1 else find_counter(data, names))
    series = spec.by_name("series", [n for n in names if n != time])
    if time is None or data.rows[time].dtype == pl.String or data.columns[time].kind not in ("number", "date", "identifier"):
        return
    times = data.rows[time].cast(pl.Int64 if data.columns[time].kind == "date" else pl.Float64)
    keys = data.rows[series].cast(pl.String) if series else pl.repeat("", len(data), eager=True)
    table = pl.DataFrame({"series": keys, "time": times, "held": data.splits == "test" if data.splits is not None else False})
    if table["time"].null_count() or bool(table.select("series", "time").is_duplicated().any()):
        return
    each = table.group_by("series").agg(
        pl.len(),
        pl.col("time").filter(~pl.col("held")).max().alias("last"),
        pl.col("time").filter("held").min().alias("next"),
    )
    continues = bool(table["held"].any()) and bool((each["next"] > each["last"]).drop_nulls().all())
    steps = not series and data.columns[time].kind == "date" and are_regular_steps(table["time"].to_numpy())
    if mean_value(each["len"]) < MIN_SERIES_ROWS or not (continues or series or steps):
        return
    if spec.by_name("time", [time]) is None and not (continues or steps):  # the name alone says nothing
        return
    of = f"series in column {series!r}" if series else "one series"
    yield Finding(
        "looks-like-series",
        "warning",
        f"the table looks like time series: {of}, time in column {time!r}"
        + (", one row per step" if steps else "")
        + (", and the test rows continue the training rows in time" if continues else ""),
        (f"column {time!r}",),
        1,
        f"To forecast the target, use --task time-series-forecasting --time {time}. To predict rows from their other columns, "
        f"split them by time with --time {time}.",
    )


def find_counter(data: Data, names: list[str]) -> str | None:
    """Return the column of whole numbers whose test values all follow the training values, if there is one such column."""
    if data.splits is None:
        return None
    held = data.splits == "test"
    counters = []
    for name in (n for n in names if data.columns[n].kind in ("number", "identifier") and data.rows[n].dtype.is_numeric()):
        values = data.rows[name].cast(pl.Float64)
        first, last = values.filter(held).min(), values.filter(~held).max()
        if isinstance(first, float) and isinstance(last, float) and first == last + 1 and bool((values % 1 == 0).all()):
            counters.append(name)
    return counters[0] if len(counters) == 1 else None


def check_duplicate_columns(data: Data) -> Iterator[Finding]:
    """Report columns with equal values."""
    seen: dict[tuple[Any, ...], list[str]] = {}
    for column in data.columns.values() if len(data) else ():
        if column.name not in data.rows.columns or column.distinct < 2:
            continue
        values = data.rows[column.name]
        if values.dtype.is_nested() or values.dtype == pl.Object:
            continue
        key = (values.dtype, column.missing, column.distinct, values[0], values[-1])
        same = next((n for n in seen.get(key, ()) if data.rows[n].equals(values, null_equal=True)), None)
        if same is None:
            seen.setdefault(key, []).append(column.name)
            continue
        yield Finding(
            "duplicate-column",
            "warning",
            f"column {column.name!r} has the same values as column {same!r}",
            (f"column {same!r}", f"column {column.name!r}"),
            1,
            f"Remove one, or ignore it with --set 'column.{column.name}=identifier' (in Python: kinds=).",
        )


def check_tags(data: Data) -> Iterator[Finding]:
    """Report tags of val and test that do not occur in train."""
    target = data.target
    if target is not None and target.kind == "list" and data.rows.schema[target.name] == pl.List(pl.String):
        yield from find_unseen_classes(data, [set(tags or []) for tags in data.rows[target.name].to_list()], "rows")


CHECKS: tuple[Callable[[Data], Iterator[Finding]], ...] = (
    check_columns,
    check_target,
    check_duplicates,
    check_leaks,
    check_text_pairs,
    check_recordings,
    check_events,
    check_series,
    check_duplicate_columns,
    check_sentinels,
    check_tags,
)
