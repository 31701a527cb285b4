"""Tables of preferences: a prompt, a chosen and a rejected answer.

Read are the columns `prompt, chosen, rejected` with texts or lists of messages, in a CSV also written as JSON; and conversations
that begin alike and differ in the last answer (`chosen, rejected`), as lists of messages or as one text with "\\n\\nHuman:" and
"\\n\\nAssistant:" before the turns.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import polars as pl

from fieldguide.core.errors import DataError
from fieldguide.data.column_spec import ColumnSpec, normalize_name
from fieldguide.data.column_types import CHAT_ROLES
from fieldguide.data.conversation_formats import MESSAGE_TYPE, MESSAGES, ROLE_OF
from fieldguide.data.dataset import Column, Data, Finding, Kind
from fieldguide.data.validation.findings import places

PROMPT_NAMES = ("prompt", "question", "instruction", "input", "query")
CHOSEN, REJECTED = "#chosen", "#rejected"  # the answers as texts
TURN = re.compile(r"\n\n(Human|Assistant):[ ]?")

Turns = list[tuple[str, str]]  # (role, content)


@dataclass(frozen=True)
class PreferenceColumns:
    """The names of the columns; `prompt` is "" if it is part of the answers."""

    prompt: str
    chosen: str
    rejected: str


@dataclass
class Preferences:
    """The checked rows of a table. Prompts of plain texts are one turn without a role."""

    prompts: list[Turns]
    chosen: list[str]
    rejected: list[str]
    bad: np.ndarray
    findings: list[Finding]

    @property
    def is_chat(self) -> bool:
        """Whether any prompt is a conversation."""
        return any(role for prompt in self.prompts for role, _ in prompt)


class MalformedError(Exception):
    """A cell or a pair of answers that cannot be read; the message is the key of the problem."""


PROBLEMS = {  # key -> what, remedy
    "malformed-messages": (
        "rows with messages that are not a list of {role, content}, or that have another role than " + ", ".join(CHAT_ROLES),
        "Correct or remove them.",
    ),
    "no-prompt": ("rows with an empty prompt", "Add the prompt or remove the rows."),
    "no-answer": ("rows with an empty answer", "Add the answer or remove the rows."),
    "other-prompts": (
        "rows whose chosen and rejected conversations differ before the last message, or do not end with an answer",
        "Cut them at the first answer that differs.",
    ),
    "identical-answers": ("rows whose chosen and rejected answers are equal", "Remove them: they prefer nothing."),
}


def find_columns(data: Data) -> PreferenceColumns | None:
    """Find the columns by name; None without chosen and rejected answers."""
    names = {normalize_name(name): name for name in reversed(list(data.columns)) if name in data.rows.columns}
    if not {"chosen", "rejected"} <= names.keys():
        return None
    prompt = next((names[name] for name in PROMPT_NAMES if name in names), "")
    return PreferenceColumns(prompt, names["chosen"], names["rejected"])


def parse_cell(value: Any) -> str | Turns:
    """Return a cell as a text or as the turns of a conversation. Raises `MalformedError`."""
    if isinstance(value, str):
        if re.match(r"\s*\[\s*\{", value):
            try:
                value = json.loads(value)
            except (ValueError, RecursionError):
                raise MalformedError("malformed-messages") from None
        elif value.lstrip().startswith("Human:") and "\n\nAssistant:" in value:
            parts = TURN.split("\n\n" + value.lstrip())[1:]
            return [(ROLE_OF[role.lower()], text.strip()) for role, text in zip(parts[::2], parts[1::2])]
        else:
            return value
    if value is None:
        return ""
    if not isinstance(value, list):
        return str(value)
    turns = []
    for message in value:
        if not isinstance(message, dict):
            raise MalformedError("malformed-messages")
        role = message.get("role") or message.get("from")
        content = message["content"] if "content" in message else message.get("value")
        role = ROLE_OF.get(str(role).lower(), str(role))
        if role not in CHAT_ROLES or not isinstance(content, str):
            raise MalformedError("malformed-messages")
        turns.append((role, content))
    return turns


def parse_row(prompt: Any, chosen: Any, rejected: Any) -> tuple[Turns, str, str]:
    """Return the turns of the prompt and the two answers. Raises `MalformedError`."""
    start, *answers = parse_cell(prompt), parse_cell(chosen), parse_cell(rejected)
    if all(isinstance(answer, list) and len(answer) > 1 for answer in answers):  # whole conversations
        begins = [answer[:-1] for answer in answers]
        if begins[0] != begins[1] or any(answer[-1][0] != "assistant" for answer in answers):
            raise MalformedError("other-prompts")
        turns: Turns = begins[0]  # type: ignore[assignment]
    else:
        turns = start if isinstance(start, list) else [("", start)]
    texts = []
    for answer in answers:
        if isinstance(answer, list) and (len(answer) > 1 or (answer and answer[-1][0] != "assistant")) and turns is start:
            raise MalformedError("other-prompts")
        texts.append(answer if isinstance(answer, str) else answer[-1][1] if answer else "")
    if any(isinstance(answer, list) for answer in answers) and turns[0][0] == "":
        turns = [("user", text) for _, text in turns]
    if not turns or not turns[-1][1].strip():
        raise MalformedError("no-prompt")
    if not all(text.strip() for text in texts):
        raise MalformedError("no-answer")
    if texts[0].strip() == texts[1].strip():
        raise MalformedError("identical-answers")
    return turns, texts[0], texts[1]


def check_preferences(data: Data, columns: PreferenceColumns) -> Preferences:
    """Read every row and collect findings."""
    count = len(data)
    cells = [data.rows[name].to_list() if name else [""] * count for name in (columns.prompt, columns.chosen, columns.rejected)]
    found = Preferences([], [], [], np.zeros(count, dtype=bool), [])
    problems: dict[str, list[int]] = {}
    seen: dict[tuple[str, ...], int] = {}
    again, opposed = [], []
    for row, values in enumerate(zip(*cells)):
        try:
            turns, chosen, rejected = parse_row(*values)
        except MalformedError as error:
            problems.setdefault(str(error), []).append(row)
            found.bad[row] = True
            turns, chosen, rejected = [], "", ""
        else:
            key = (repr(turns), chosen, rejected)
            again += [row] if key in seen else []
            opposed += [row] if (key[0], rejected, chosen) in seen else []
            seen.setdefault(key, row)
        found.prompts.append(turns)
        found.chosen.append(chosen)
        found.rejected.append(rejected)
    for check, (what, remedy) in PROBLEMS.items():
        if rows := problems.get(check):
            found.findings.append(Finding(check, "warning", what, places(data, rows), len(rows), remedy, len(rows)))
    for check, rows, what in (
        ("duplicate-preference", again, "rows that repeat an earlier prompt with the same answers"),
        ("opposed-preferences", opposed, "rows that prefer the answer that an earlier row rejects"),
    ):
        if rows:
            remedy = "Remove one of each." if check == "duplicate-preference" else "Decide, or set label_smoothing."
            found.findings.append(Finding(check, "warning", what, places(data, rows), len(rows), remedy))
    return found


def check(data: Data) -> Iterator[Finding]:
    """Run the data checks for preferences."""
    if columns := find_columns(data):
        yield from check_preferences(data, columns).findings


KINDS: dict[str, Kind] = dict.fromkeys((*PROMPT_NAMES, "chosen", "rejected"), "text")
COLUMN_SPEC = ColumnSpec("none", columns=KINDS, gaps=True, checks=(check,))


def prepare(data: Data, columns: PreferenceColumns) -> Data:
    """Return one row per pair: the prompt as a text or as `messages`, and both answers; unusable rows are left out.

    If some prompts are conversations, the others become messages of the user.
    """
    found = check_preferences(data, columns)
    kept = np.flatnonzero(~found.bad)
    if not len(kept):
        raise DataError(f"{data.source}: no row has a prompt with a chosen and a rejected answer.")
    made = data.take(kept)
    answers = [[texts[i] for i in kept] for texts in (found.chosen, found.rejected)]
    prompts = [found.prompts[i] for i in kept]
    if found.is_chat:
        name, kind = MESSAGES, "messages"
        listed = [[{"role": role or "user", "content": text} for role, text in turns] for turns in prompts]
        series = pl.Series(name, listed, dtype=MESSAGE_TYPE)
    else:
        name, kind = columns.prompt, "text"
        series = pl.Series(name, [turns[0][1] for turns in prompts], dtype=pl.String)
    others = [n for n in (columns.prompt, columns.chosen, columns.rejected) if n]
    made.rows = made.rows.drop(others).with_columns(
        series, pl.Series(CHOSEN, answers[0], dtype=pl.String), pl.Series(REJECTED, answers[1], dtype=pl.String)
    )
    made.columns = {c.name: c for c in data.columns.values() if c.name not in others and c.role in ("group", "split")}
    made.columns[name] = Column(name, kind, why="the prompts")  # type: ignore[arg-type]
    made.manifest = data.drop_rows(found.bad).manifest
    checked = {f.check for f in data.findings}
    made.findings = data.findings + [f for f in found.findings if f.check not in checked]
    return made
