"""The choice of a public checkpoint for some data: `fit --weights auto`, and the line that suggests it.

The rule, over the rows of checkpoints/public.toml that can do the task and have a permissive licence:

1. The row must suit the data: images of at least a quarter of the side that it was trained with; texts of a language that it was
   trained on, judged by their letters and their most frequent words.
2. It must fit the machine: its weights take at most a quarter of the memory. (Those that take more than an eighth are trained with
   LoRA, see `finetune.choose_settings`.)
3. Its download is at most 200 MB, and 100 MB more for each minute, unless it was downloaded before.
4. It must fit the time: fine-tuning for three passes over the data, at the speed of this machine, takes at most half of the
   minutes. Of these rows the last one in the file is chosen, since within a task later rows usually score higher.
5. If there are none, the cheapest row is chosen if one pass without training, for frozen features, takes at most the minutes. A
   sample of the data then has to do: MiniLM gained 6 points on TREC-6 from a third of the rows in one minute.
6. A network that predicts from labeled rows (TabICL) is not trained: it fits the time if it can read 500 rows in a quarter of the
   minutes. As many training rows as the time allows become its context. It must be able to tell the classes of the data apart.

If the hub cannot be reached, or HF_HUB_OFFLINE is set, only rows that were downloaded before are considered. Nothing is downloaded
unless the user asks for it.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from fieldguide.automl import profile
from fieldguide.automl.advisor import get_speed
from fieldguide.checkpoints import hub, load
from fieldguide.checkpoints.public import PublicCheckpoint, list_public_checkpoints
from fieldguide.core import distributed
from fieldguide.core.card import PRETRAINED_SOLVER
from fieldguide.core.errors import SettingsError
from fieldguide.core.settings import Settings
from fieldguide.data.dataset import HEIGHT, WIDTH, Data
from fieldguide.models import registry

AUTO = "auto"
SAMPLED_TEXTS = 300  # texts that language and length are judged by
MAX_CHARACTERS = 2000  # of each of them
MAX_SIDE = {"cpu": 96, "mps": 160, "cuda": 224}  # of images as `fit` chooses it, by device
MAX_TOKENS = 256  # of texts, likewise
CHARACTERS_PER_TOKEN = 4
MIN_SIDE_FRACTION = 0.25  # of the side that a checkpoint was trained with
MAX_MEMORY_FRACTION = 0.25  # of the machine's memory, for weights in float32
PASSES = 3  # of fine-tuning
FORWARDS_PER_STEP = 3  # a backward pass costs two forward passes
MIN_CONTEXT_ROWS, MAX_CONTEXT_FRACTION = (
    500,
    0.25,
)  # rows of context, and the fraction of the minutes that reading them may take
MAX_TUNING_FRACTION, MAX_FEATURES_FRACTION = 0.5, 1.0  # of the minutes
MIN_MB, MB_PER_MINUTE = 200, 100
MAX_REASONS = 3  # that an error lists
# Of the words of English prose, about a third are among these; of related languages, less than a tenth.
ENGLISH = frozenset(
    "the of and to a in is that for it on with was as be by this are what i you how which from at do does who not have".split()
)
MIN_ENGLISH_WORDS = 0.1
MAX_OTHER_SCRIPT = 0.1  # of the letters, outside of the Latin script
MAX_ACCENTED = 0.002  # of the letters of short English texts such as titles, which have few of the words above


@dataclass(frozen=True)
class Facts:
    """What the choice depends on."""

    task: str
    rows: int
    minutes: float
    memory: float  # bytes
    speed: float  # floating-point operations per second in training
    model: str = AUTO  # the architecture or size that the user wants
    side: int = 0  # pixels of the shorter side of the images; 0 without images
    length: int = 0  # tokens of a text; 0 without texts
    language: str = ""  # "en", "other", or "" if unknown
    classes: int = 0  # of the target; 0 if it has none


def read_facts(source: Data, task: str, settings: Settings, model: str = AUTO) -> Facts:
    """Return the facts of some data, before any preprocessing. A run with a number of steps counts as one of default length."""
    machine = profile.get_nominal_machine() if settings.deterministic else profile.measure_machine()
    machine = distributed.broadcast(machine)
    minutes = settings.minutes or Settings().minutes
    side, length, language = 0, 0, ""
    if WIDTH in source.rows.columns and HEIGHT in source.rows.columns:
        shorter = source.rows.select(WIDTH, HEIGHT).min_horizontal().median()
        side = int(shorter) if isinstance(shorter, int | float) else 0
    if texts := sample_texts(source):
        average = sum(map(len, texts)) / len(texts)
        length = max(8, min(MAX_TOKENS, round(average / CHARACTERS_PER_TOKEN)))
        language = judge_language(texts)
    classes = source.target.distinct if source.target and "classification" in task else 0
    return Facts(task, len(source), minutes, machine["memory"], get_speed(machine), model, side, length, language, classes)


def sample_texts(source: Data) -> list[str]:
    """Return some texts of the data, of all of its text columns."""
    found: list[str] = []
    rows = source.rows.head(SAMPLED_TEXTS)
    for column in source.columns.values():
        if column.kind == "text" and column.role in ("feature", "target") and column.name in rows.columns:
            found += [str(text)[:MAX_CHARACTERS] for text in rows[column.name].drop_nulls().to_list()]
    return found


def judge_language(texts: list[str]) -> str:
    """Return "en" for English, "other" for other languages, and "" if there are no letters."""
    joined = " ".join(texts).lower()
    letters = [c for c in joined if c.isalpha()]
    if not letters:
        return ""
    beyond_ascii = sum(c > "\x7f" for c in letters) / len(letters)
    if sum(c > "\u024f" for c in letters) / len(letters) > MAX_OTHER_SCRIPT:
        return "other"
    words = re.findall(r"[^\W\d_]+", joined)
    frequent = sum(word in ENGLISH for word in words) / max(len(words), 1)
    is_short = len(words) < 8 * len(texts)
    return "en" if frequent >= MIN_ENGLISH_WORDS or (is_short and beyond_ascii <= MAX_ACCENTED) else "other"


def explain_unfit(row: PublicCheckpoint, facts: Facts) -> str:
    """Return why a checkpoint does not suit the data or the machine, or an empty string."""
    card, size = registry.find(row.size)
    if facts.model not in (AUTO, size, card.name):
        return f"it is no {facts.model}"
    if not row.is_permissive:
        return f"its licence is {row.licence}"
    if row.side and facts.side and facts.side < MIN_SIDE_FRACTION * row.side:
        return f"it was trained with images of {row.side} pixels per side, and these have {facts.side}"
    if not row.reads_language(facts.language):
        return "it was trained on English only"
    if row.classes and facts.classes > row.classes:
        return f"it tells apart {row.classes} classes, and there are {facts.classes}"
    if 4 * count_parameters(row) > MAX_MEMORY_FRACTION * facts.memory:
        return f"its {count_parameters(row) / 1e6:,.0f} M parameters need too much memory"
    most = MIN_MB + MB_PER_MINUTE * facts.minutes
    if row.mb > most and not hub.is_downloaded(row.path):
        return f"its {row.mb:,.0f} MB are more than {most:,.0f} MB, which is allowed for {facts.minutes:g} minutes"
    return ""


def count_parameters(row: PublicCheckpoint) -> float:
    """Return the number of parameters, estimated from the size of the file, which has 2 or 4 bytes for each."""
    card, size = registry.find(row.size)
    return max(card.sizes[size].params or 0, row.mb * 1e6 / 4)


def reads_context(row: PublicCheckpoint) -> bool:
    """Return whether a checkpoint predicts from labeled rows, so that nothing is trained."""
    return registry.find(row.size)[0].solver == PRETRAINED_SOLVER


def estimate_forward_seconds(row: PublicCheckpoint, facts: Facts) -> float:
    """Return the seconds of a forward pass over all rows of the data."""
    part = 1.0
    if row.side and facts.side:
        part *= (min(facts.side, MAX_SIDE[distributed.device().type]) / row.side) ** 2
    if row.length and not row.side:
        part *= (facts.length or 64) / 64
    return facts.rows * 2e9 * row.gmacs * part / facts.speed


def choose(facts: Facts, is_allowed: Callable[[PublicCheckpoint], bool] = lambda row: True) -> PublicCheckpoint | None:
    """Return the checkpoint that the rule gives, or None. `is_allowed` restricts the rows."""
    rows = [row for row in list_public_checkpoints() if facts.task in row.tasks and is_allowed(row)]
    rows = [row for row in rows if not explain_unfit(row, facts)]
    seconds = {row: estimate_forward_seconds(row, facts) for row in rows}
    limit = 60 * facts.minutes
    readers = {row: seconds[row] / facts.rows * MIN_CONTEXT_ROWS for row in rows if reads_context(row)}
    tuned = [
        row
        for row in rows
        if (
            readers[row] <= MAX_CONTEXT_FRACTION * limit
            if row in readers
            else PASSES * FORWARDS_PER_STEP * seconds[row] <= MAX_TUNING_FRACTION * limit
        )
    ]
    if tuned:
        return tuned[-1]
    return min(
        (row for row in rows if row not in readers and seconds[row] <= MAX_FEATURES_FRACTION * limit),
        key=lambda row: seconds[row],
        default=None,
    )


def explain_none(facts: Facts) -> str:
    """Return why no row suits, naming what comes closest."""
    rows = [row for row in list_public_checkpoints() if facts.task in row.tasks]
    if not rows:
        return f"there are none for {facts.task}"
    reasons: dict[str, str] = {}
    for row in reversed(rows):  # the best one for each reason
        reasons.setdefault(explain_unfit(row, facts) or "it takes too long for the given minutes", row.path)
    return "; ".join(f"{name}: {reason}" for reason, name in list(reasons.items())[:MAX_REASONS])


def resolve_auto(facts: Facts, callback: Any) -> tuple[str, load.Checkpoint]:
    """Return location and content of the checkpoint for `--weights auto`, which is downloaded if necessary.

    Raises `SettingsError` if no row suits, and `WeightsError` if the download fails; if the hub cannot be reached, a checkpoint that
    was downloaded before takes the place.
    """
    only_cached = lambda row: hub.is_downloaded(row.path)
    if hub.is_offline():
        row = distributed.broadcast(choose(facts, only_cached))
        if row is None:
            better = choose(facts)
            hint = f" The choice would be {better.describe()}." if better else ""
            raise SettingsError(
                "--weights auto: HF_HUB_OFFLINE is set, and no checkpoint for this data was downloaded before."
                f"{hint} Unset it, or leave out --weights."
            )
        return row.location, inspect(row, facts, callback)
    row = distributed.broadcast(choose(facts))
    if row is None:
        raise SettingsError(
            f"--weights auto: no public checkpoint suits this data ({explain_none(facts)}). Leave out --weights, or name one: "
            "--weights hf:organization/name."
        )
    try:
        return row.location, inspect(row, facts, callback)
    except hub.UnreachableError as error:
        other = distributed.broadcast(choose(facts, only_cached))
        if other is None:
            raise
        callback.log(f"note: {error}")
        return other.location, inspect(other, facts, callback)


def inspect(row: PublicCheckpoint, facts: Facts, callback: Any) -> load.Checkpoint:
    """Return what a row's checkpoint holds, and log its name, size and licence before it is downloaded."""
    state = "downloaded before" if hub.is_downloaded(row.path) else "downloading"
    callback.log(f"pretrained weights: {row.describe()}, {state}; trained on {row.data}; see {row.source}")
    return load.inspect_checkpoint(row.location, None, callback.log)


def suggest(source: Data, task: str, settings: Settings, model: str = AUTO) -> str:
    """Return the line on what `--weights auto` would start from, or an empty string. Nothing is contacted."""
    if not any(task in row.tasks for row in list_public_checkpoints()):
        return ""
    if (row := choose(read_facts(source, task, settings, model))) is None:
        return ""
    state = "; already downloaded" if hub.is_downloaded(row.path) else ""
    return f"pretrained weights: `--weights auto` would start from {row.path} ({row.mb:,.0f} MB, {row.licence}{state})"
