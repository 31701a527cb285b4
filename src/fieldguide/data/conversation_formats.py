"""The formats in which conversations are stored, converted to one column `messages` of {role, content}.

Read are: `messages` whose content is a text or a list of parts, or that are written as JSON; ShareGPT (`conversations` of {from,
value}); lists of exchanges, such as {human, assistant}; the columns `prompt` and `completion` or `response`; and the columns
`instruction`, `input` or `context`, and `output` or `response` of Alpaca and Dolly. A column `system` holds the first message.
Images become columns `image`, `image_2`, ... (`conversation_images`).
Identifiers, sources and the like are left out. Pairs of a chosen and a rejected answer are left as they are.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import polars as pl

from fieldguide.data import conversation_images
from fieldguide.data.conversation_images import IMAGE_MARK, PART_TYPES, find_path, list_paths, name_columns, place_images
from fieldguide.data.dataset import BOOKKEEPING

MESSAGES = "messages"
ROLE_OF = {
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "bot": "assistant",
    "model": "assistant",
    "assistant": "assistant",
    "system": "system",
}
ALPACA = {"instruction", "input", "output", "system", "text"}  # `text` repeats the others with a template
PAIRS = ({"prompt", "completion"}, {"prompt", "response"})
SAME = {"context": "input", "response": "output"}  # names of Dolly -> names of Alpaca
SIDE = {
    "id",
    "idx",
    "index",
    "category",
    "source",
    "dataset",
    "meta",
    "metadata",
    "language",
    "lang",
}  # not part of a conversation
MESSAGE_NAMES = ("messages", "conversations", "conversation", "dialog", "dialogue", "turns", "chat")
EXCHANGES = (  # fields of a list of exchanges -> their roles, in order
    {"system": "system", "human": "user", "assistant": "assistant"},
    {"system": "system", "human": "user", "gpt": "assistant"},
    {"system": "system", "human": "user", "bot": "assistant"},
    {"system": "system", "user": "user", "assistant": "assistant"},
    {"system": "system", "user": "user", "bot": "assistant"},
    {"system": "system", "input": "user", "output": "assistant"},
    {"system": "system", "prompt": "user", "response": "assistant"},
    {"system": "system", "question": "user", "answer": "assistant"},
)
SAMPLED_ROWS = 200
MESSAGE_TYPE = pl.List(pl.Struct({"role": pl.String, "content": pl.String}))


@dataclass
class Conversations:
    """Rows with a column `messages`, and the rows whose messages hold something other than text, by problem."""

    rows: pl.DataFrame
    problems: dict[str, list[int]] = field(default_factory=dict)  # description -> rows
    unused: list[str] = field(default_factory=list)  # columns that are left out
    images: tuple[str, ...] = ()  # columns with the paths of images, which may be empty

    def add_problem(self, problem: str, row: int) -> None:
        """Note what the messages of a row hold that is not supported."""
        rows_with = self.problems.setdefault(problem, [])
        if not rows_with or rows_with[-1] != row:
            rows_with.append(row)


def to_messages(rows: pl.DataFrame) -> Conversations | None:
    """Return the rows with their conversations as `messages`, or None if they hold none in a format other than ours."""
    written, rows = rows.schema, split_exchanges(parse_written(rows))
    pictured = conversation_images.find_column(rows)
    names = [name for name in rows.columns if name not in BOOKKEEPING]
    if {"chosen", "rejected"} <= set(names):
        return None  # pairs of answers, which the task preference-tuning reads
    for name in names:
        inner = getattr(rows.schema[name], "inner", None)
        keys = {f.name for f in inner.fields} if isinstance(inner, pl.Struct) else set()
        if pictured and name in MESSAGE_NAMES and keys & {"content", "value"}:
            return drop_side(convert_lists(put_system_first(rows, name) if "system" in names else rows, name, pictured))
        with_system = name in MESSAGE_NAMES and rows.schema.get("system") == pl.String
        if {"from", "value"} <= keys or (
            {"role", "content"} <= keys and (with_system or written[name] != rows.schema[name] or not is_plain(rows[name]))
        ):
            return drop_side(convert_lists(put_system_first(rows, name) if with_system else rows, name))
        if {"role", "content"} <= keys and name in MESSAGE_NAMES and any(map(is_side, names)):
            return drop_side(Conversations(rows))
    main = [name for name in names if not is_side(name)]
    if set(main) in PAIRS:
        found = convert_pairs(rows, "completion" if "completion" in main else "response")
    elif {"instruction", "output"} <= (known := {SAME.get(n, n) for n in main}) <= ALPACA and len(known) == len(main):
        found = convert_alpaca(rows.rename({n: SAME[n] for n in main if n in SAME}))
    else:
        return None
    return drop_side(found)


def is_side(name: str) -> bool:
    """Return whether a column next to conversations is no part of them, such as an identifier or a source."""
    return name.lower() in SIDE or name.lower().endswith(("_id", "_uuid"))


def drop_side(found: Conversations) -> Conversations:
    """Return conversations without the columns that are no part of them."""
    found.unused = [name for name in found.rows.columns if name not in BOOKKEEPING and is_side(name)]
    found.rows = found.rows.drop(found.unused)
    return found


def parse_written(rows: pl.DataFrame) -> pl.DataFrame:
    """Return the rows with messages that are written as JSON text as lists."""
    for name in MESSAGE_NAMES:
        if rows.schema.get(name) != pl.String:
            continue
        some = rows[name].drop_nulls().head(SAMPLED_ROWS)
        if not some.len() or not bool(some.str.strip_chars().str.starts_with("[{").all()):
            continue
        try:
            parsed = [None if text is None else json.loads(text) for text in rows[name].to_list()]
            made = pl.Series(name, parsed, strict=False)
        except (ValueError, TypeError, RecursionError, pl.exceptions.PolarsError):
            continue
        if isinstance(inner := getattr(made.dtype, "inner", None), pl.Struct) and len(inner.fields) > 1:
            rows = rows.with_columns(made)
    return rows


def split_exchanges(rows: pl.DataFrame) -> pl.DataFrame:
    """Return the rows with lists of exchanges, such as {human, assistant}, as lists of messages."""
    for name in MESSAGE_NAMES:
        inner = getattr(rows.schema.get(name), "inner", None)
        fields = {f.name for f in inner.fields} if isinstance(inner, pl.Struct) else set()
        roles = next((r for r in EXCHANGES if set(r) - {"system"} <= fields <= {*r, *SIDE}), None)
        if roles is None:
            continue
        made = [
            messages
            and [
                {"role": role, "content": one[field]}
                for one in filter(None, messages)
                for field, role in roles.items()
                if field in fields and (one[field] is not None or role != "system")
            ]
            for messages in rows[name].to_list()
        ]
        rows = rows.with_columns(pl.Series(name, made, dtype=MESSAGE_TYPE, strict=False))
    return rows


def put_system_first(rows: pl.DataFrame, name: str) -> pl.DataFrame:
    """Return the rows with the text in the column `system` as the first message, where there is no other system message."""
    made: list[Any] = []
    for system, messages in zip(rows["system"].to_list(), rows[name].to_list()):
        first = (messages or [{}])[0] or {}
        role, content = ("from", "value") if "from" in first else ("role", "content")
        has_own = str(first.get(role)).lower() == "system"
        made.append(messages if not system or not messages or has_own else [{role: "system", content: system}, *messages])
    return rows.with_columns(pl.Series(name, made, dtype=rows.schema[name], strict=False)).drop("system")


def is_plain(messages: pl.Series) -> bool:
    """Return whether all contents are texts and all roles usual, so that nothing needs to be converted."""
    part = pl.element().struct.field
    if dict(messages.dtype.inner).get("content") != pl.String:  # type: ignore[attr-defined]
        return False
    odd = (
        part("content").str.starts_with('[{"')
        | ~part("role").is_in(["user", "assistant", "system"])
        | part("content").is_null()
    )
    return not messages.list.eval(odd.fill_null(True)).list.any().any()


def convert_lists(rows: pl.DataFrame, name: str, pictured: str | None = None) -> Conversations:
    """Convert a column of lists of messages; `pictured` is the column of their images, if there is one."""
    found = Conversations(rows)
    converted: list[Any] = []
    paths: list[list[str]] = []
    given = rows[pictured].to_list() if pictured else [None] * rows.height
    for i, messages in enumerate(rows[name].to_list()):
        if messages is None:
            converted.append(None)
            paths.append([])
            continue
        turns: list[dict[str, Any]] = []
        parts: list[Any] = []
        for message in messages:
            message = message or {}
            role = message.get("role") or message.get("from")
            content = message["content"] if "content" in message else message.get("value")
            text, problem, own = to_text(content)
            if own and ROLE_OF.get(str(role).lower()) != "user":
                problem = "image parts"
            parts += own
            if problem is None and text is None and message.get("tool_calls"):
                problem = "tool calls"
            if problem:
                found.add_problem(problem, i)
                text = text or ""
            turns.append({"role": ROLE_OF.get(str(role).lower(), role), "content": text})
        own_paths: list[str] = []
        if not any(i in rows_with[-1:] for rows_with in found.problems.values()):
            turns, own_paths, problem = place_images(turns, parts, list_paths(given[i]))
            if problem:
                found.add_problem(problem, i)
        converted.append(turns)
        paths.append(own_paths)
    found.rows = rows.with_columns(pl.Series(name, converted, dtype=MESSAGE_TYPE))
    if pictured or any(paths):
        found.images = tuple(name_columns(max(map(len, paths))))
        padded = [own + [None] * (len(found.images) - len(own)) for own in paths]
        columns = [pl.Series(name, values, dtype=pl.String) for name, values in zip(found.images, zip(*padded))]
        found.rows = found.rows.drop(pictured or []).with_columns(columns)
    if name in MESSAGE_NAMES and MESSAGES not in found.rows.columns:
        found.rows = found.rows.rename({name: MESSAGES})
    return found


def to_text(content: Any) -> tuple[str | None, str | None, list[Any]]:
    """Return the text of a message, what it holds that is neither text nor image, if anything, and the paths of its images.

    An image is a mark in the text; its path is None if the part has none.
    """
    if isinstance(content, str) and content.startswith('[{"'):  # polars keeps mixed values as JSON
        try:
            content = json.loads(content)
        except ValueError:
            return content, None, []
    if not isinstance(content, list):
        return (content if content is None else str(content)), None, []
    if content and all(isinstance(part, str) for part in content):
        return "\n".join(content), None, []
    if not all(isinstance(part, dict) and "type" in part for part in content):
        return json.dumps(content), None, []
    show = lambda part: IMAGE_MARK if part["type"] in PART_TYPES else str(part.get("text") or "") * (part["type"] == "text")
    images = [find_path({k: v for k, v in part.items() if k != "type"}) for part in content if part["type"] in PART_TYPES]
    other = sorted({str(part["type"]).replace("_url", "") for part in content if part["type"] not in PART_TYPES} - {"text"})
    return "".join(map(show, content)), f"{' and '.join(other)} parts" if other else None, images


def convert_pairs(rows: pl.DataFrame, answers: str) -> Conversations:
    """Convert `prompt` and the column of answers, which hold a text or messages."""
    made = [
        [*as_turns(prompt, "user"), *as_turns(answer, "assistant")] if prompt is not None and answer is not None else None
        for prompt, answer in zip(rows["prompt"].to_list(), rows[answers].to_list())
    ]
    return Conversations(with_messages(rows, made, {"prompt", answers}))


def as_turns(value: Any, role: str) -> list[dict[str, Any]]:
    """Return a text as one message of a role, or messages as they are."""
    if isinstance(value, list):
        return [{"role": m.get("role", role), "content": m.get("content")} for m in value]
    return [{"role": role, "content": to_plain(value)}]


def convert_alpaca(rows: pl.DataFrame) -> Conversations:
    """Convert `instruction`, optional `input` and `system`, and `output`."""
    columns = {name: rows[name].to_list() if name in rows.columns else [None] * rows.height for name in ALPACA}
    made: list[Any] = []
    for instruction, further, output, system in zip(*(columns[n] for n in ("instruction", "input", "output", "system"))):
        if instruction is None or output is None:
            made.append(None)
            continue
        asked = f"{to_plain(instruction)}\n\n{to_plain(further)}" if further else to_plain(instruction)
        first = [{"role": "system", "content": to_plain(system)}] if system else []
        made.append([*first, {"role": "user", "content": asked}, {"role": "assistant", "content": to_plain(output)}])
    return Conversations(with_messages(rows, made, ALPACA))


def to_plain(value: Any) -> str:
    """Return a value as the text that the file holds: truth values as in JSON."""
    return str(value).lower() if isinstance(value, bool) else str(value)


def with_messages(rows: pl.DataFrame, made: list[Any], replaced: Iterable[str]) -> pl.DataFrame:
    """Return the rows with a column `messages` in the place of others."""
    kept = rows.drop([name for name in replaced if name in rows.columns])
    return kept.with_columns(pl.Series(MESSAGES, made, dtype=MESSAGE_TYPE)).select(MESSAGES, *kept.columns)
