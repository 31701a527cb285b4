"""Chat templates: conversations as text in the format of a checkpoint's tokenizer (Jinja, in a sandbox)."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import Any

from fieldguide.core.errors import DataError

SPAN_START, SPAN_END = "\ufdd0", "\ufdd1"  # noncharacters (Unicode 23.7) that mark the assistant's part of a rendered template
SPAN_MARKS = re.compile(f"[{SPAN_START}{SPAN_END}]")


class ChatTemplate:
    """A chat template that renders messages of role and content as one text.

    Templates come with checkpoints from untrusted sources, so they run in jinja's sandbox, which gives no access to
    Python and cannot change its arguments. `tokens` maps names such as bos_token to special tokens.

    Raises DataError for a template that is invalid, attempts forbidden operations, or rejects the messages.
    """

    def __init__(self, source: str, tokens: Mapping[str, str] | None = None):
        from jinja2 import TemplateSyntaxError
        from jinja2.ext import loopcontrols
        from jinja2.sandbox import ImmutableSandboxedEnvironment

        made = ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols, generation_extension()]
        )
        made.filters["tojson"] = lambda x, indent=None: json.dumps(x, ensure_ascii=False, indent=indent)
        made.globals |= {"raise_exception": raise_exception, "strftime_now": lambda form: datetime.now().strftime(form)}
        self.tokens = dict(tokens or {})
        try:
            self.template = made.from_string(source)
        except TemplateSyntaxError as error:
            raise DataError(f"the chat template is invalid: line {error.lineno}: {error.message}") from None

    def __call__(self, messages: Sequence[Mapping[str, Any]], answer: bool = True, **names: Any) -> str:
        """Render the messages; `answer` appends the start of the assistant's next turn."""
        return SPAN_MARKS.sub("", self.render_marked(messages, answer, **names))

    def render_marked(self, messages: Sequence[Mapping[str, Any]], answer: bool, **names: Any) -> str:
        """Render the messages, with marks around the parts that the template labels as the assistant's ({% generation %})."""
        from jinja2 import TemplateError

        try:
            return self.template.render(
                messages=[dict(m) for m in messages], add_generation_prompt=answer, **self.tokens, **names
            )
        except (TemplateError, TypeError, ValueError) as error:
            raise DataError(f"the chat template rejects these messages: {error}") from None

    def render_with_spans(self, messages: Sequence[Mapping[str, Any]]) -> tuple[str, list[tuple[int, int]] | None]:
        """Return the rendered text and the character spans of the assistant's turns including their end tokens, or None.

        If the template does not label the turns ({% generation %}), a turn begins after the text rendered up to it with
        a generation prompt, and ends with its content and the closing text. The spans are None if this is ambiguous.
        """
        pieces = re.split(SPAN_MARKS, marked := self.render_marked(messages, False))
        if len(pieces) > 1:
            if [c for c in marked if c in (SPAN_START, SPAN_END)] != [SPAN_START, SPAN_END] * (len(pieces) // 2):
                return "".join(pieces), None
            ends = [0]
            for piece in pieces:
                ends.append(ends[-1] + len(piece))
            return "".join(pieces), [(ends[i], ends[i + 1]) for i in range(1, len(pieces), 2)]
        whole = marked
        spans: list[tuple[int, int]] = []
        for i, message in enumerate(messages):
            if message["role"] != "assistant":
                continue
            try:
                before, after = self(messages[:i]), self(messages[: i + 1], answer=False)
            except DataError:
                return whole, None
            content = message["content"].strip()
            begin = whole.find(content, len(before))
            closing = after[after.rfind(content) + len(content) :].rstrip()
            if not whole.startswith(before) or begin < 0 or (spans and len(before) < spans[-1][1]):
                return whole, None
            end = begin + len(content)
            spans.append((len(before), end + len(closing) if whole.startswith(closing, end) else end))
        return whole, spans

    def closing_text(self) -> str:
        """Return the text that follows an answer, such as <|im_end|>, or "" if it cannot be determined."""
        try:
            after = self([{"role": "user", "content": "question"}, {"role": "assistant", "content": "answer"}], answer=False)
        except DataError:
            return ""
        return after[after.rfind("answer") + len("answer") :].strip()


def generation_extension() -> Any:
    """Return the Jinja extension for {% generation %} ... {% endgeneration %}, which labels the assistant's text."""
    from jinja2 import nodes
    from jinja2.ext import Extension

    class GenerationExtension(Extension):
        tags: set[str] = {"generation"}  # noqa: RUF012  (jinja2 declares an instance variable)

        def parse(self, parser: Any) -> Any:
            line = next(parser.stream).lineno
            body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
            return nodes.CallBlock(self.call_method("marked"), [], [], body).set_lineno(line)

        def marked(self, caller: Any) -> str:
            return f"{SPAN_START}{caller()}{SPAN_END}"

    return GenerationExtension


def raise_exception(why: str) -> None:
    """Raise a template error; available to templates as `raise_exception`."""
    from jinja2 import TemplateError

    raise TemplateError(why)
