"""Chat templates: conversations as text in the format of a checkpoint's tokenizer (Jinja, in a sandbox)."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import Any

from fieldguide.core.errors import DataError
from fieldguide.core.validation import describe

SPAN_START, SPAN_END = "\ufdd0", "\ufdd1"  # noncharacters (Unicode 23.7) that mark the assistant's part of a rendered template
MAX_TIME_FORMAT_CHARACTERS = 100
SPAN_MARKS = re.compile(f"[{SPAN_START}{SPAN_END}]")


class ChatTemplate:
    """A chat template that renders messages of role and content as one text.

    Templates come with checkpoints from untrusted sources, so they run in a sandbox, which gives no access to Python,
    cannot change its arguments, and limits time and memory. `tokens` maps names such as bos_token to special tokens.

    Raises DataError for a template that is invalid, attempts forbidden operations, exceeds a limit, or rejects the messages.
    """

    def __init__(self, source: str, tokens: Mapping[str, str] | None = None):
        from jinja2 import TemplateSyntaxError
        from jinja2.ext import loopcontrols

        from fieldguide.data.preprocessing.template_sandbox import MAX_SOURCE_CHARACTERS, LimitedEnvironment

        if not isinstance(source, str) or len(source) > MAX_SOURCE_CHARACTERS:
            raise DataError(f"the chat template must be a text of at most {MAX_SOURCE_CHARACTERS:,} characters.")
        self.sandbox = LimitedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols, generation_extension()]
        )
        self.sandbox.globals |= {"raise_exception": raise_exception, "strftime_now": format_now}
        self.tokens = dict(tokens or {})
        try:
            with self.sandbox.limit():
                self.template = self.sandbox.from_string(source)
        except TemplateSyntaxError as error:
            raise DataError(f"the chat template is invalid: line {error.lineno}: {error.message}") from None
        except Exception as error:
            raise DataError(f"the chat template is invalid: {describe(error)}.") from error

    def __call__(self, messages: Sequence[Mapping[str, Any]], answer: bool = True, **names: Any) -> str:
        """Render the messages; `answer` appends the start of the assistant's next turn."""
        return SPAN_MARKS.sub("", self.render_marked(messages, answer, **names))

    def render_marked(self, messages: Sequence[Mapping[str, Any]], answer: bool, **names: Any) -> str:
        """Render the messages, with marks around the parts that the template labels as the assistant's ({% generation %})."""
        from jinja2 import TemplateError

        from fieldguide.data.preprocessing.template_sandbox import TemplateLimitError

        values = {"messages": [dict(m) for m in messages], "add_generation_prompt": answer, **self.tokens, **names}
        try:
            with self.sandbox.limit(values):
                return self.template.render(values)
        except TemplateLimitError as error:
            raise DataError(f"the chat template was stopped: {error}.") from None
        except TemplateError as error:
            raise DataError(f"the chat template rejects these messages: {describe(error)}.") from None
        except Exception as error:  # whatever the operations of a template raise
            raise DataError(f"the chat template fails: {describe(error)}.") from error

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
            content = get_text(message["content"]).strip()
            begin = whole.find(content, len(before))
            closing = after[after.rfind(content) + len(content) :].rstrip()
            if not whole.startswith(before) or begin < 0 or (spans and len(before) < spans[-1][1]):
                return whole, None
            end = begin + len(content)
            spans.append((len(before), end + len(closing) if whole.startswith(closing, end) else end))
        return whole, spans

    def closing_text(self) -> str:
        """Return the text that follows an answer, such as <|im_end|>, or "" if it cannot be determined."""
        for write in (str, lambda text: [{"type": "text", "text": text}]):  # some templates read lists of parts only
            try:
                turns = {"user": write("question"), "assistant": write("answer")}
                after = self([{"role": role, "content": content} for role, content in turns.items()], answer=False)
            except DataError:
                continue
            if "answer" in after:
                return after[after.rfind("answer") + len("answer") :].strip()
        return ""


def get_text(content: Any) -> str:
    """Return the text of a message, whose content is a text or a list of parts."""
    if isinstance(content, str):
        return content
    return "".join(str(part.get("text") or "") for part in content if part.get("type") == "text")


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


def format_now(form: str) -> str:
    """Return the present date and time; available to templates as `strftime_now`."""
    if len(form) > MAX_TIME_FORMAT_CHARACTERS:
        raise ValueError("the format of the time is too long")
    return datetime.now().strftime(form)


def raise_exception(why: str) -> None:
    """Raise a template error; available to templates as `raise_exception`."""
    from jinja2 import TemplateError

    raise TemplateError(why)
