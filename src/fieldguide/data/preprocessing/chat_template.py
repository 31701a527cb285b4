"""Chat templates: what was said so far, as a model's own tokenizer writes it for the network (Jinja, in a sandbox)."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import Any, ClassVar

from fieldguide.core.errors import DataError

FROM, TO = "\ufdd0", "\ufdd1"  # no characters of any text (Unicode 23.7): where a template says that the assistant speaks
MARK = re.compile(f"[{FROM}{TO}]")


class ChatTemplate:
    """Messages of role and content -> one text. The template comes with a checkpoint, from a stranger, so it runs in
    jinja's sandbox: it can neither reach Python nor change what it is given. `tokens` are names such as bos_token.

    Raises `DataError` for a template that cannot be read, does what it may not, or refuses the messages.
    """

    def __init__(self, source: str, tokens: Mapping[str, str] | None = None):
        from jinja2 import TemplateSyntaxError
        from jinja2.ext import loopcontrols
        from jinja2.sandbox import ImmutableSandboxedEnvironment

        made = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols, speaking()])
        made.filters["tojson"] = lambda x, indent=None: json.dumps(x, ensure_ascii=False, indent=indent)
        made.globals |= {"raise_exception": refused, "strftime_now": lambda form: datetime.now().strftime(form)}
        self.tokens = dict(tokens or {})
        try:
            self.template = made.from_string(source)
        except TemplateSyntaxError as error:
            raise DataError(f"the chat template cannot be read: line {error.lineno}: {error.message}") from None

    def __call__(self, messages: Sequence[Mapping[str, Any]], answer: bool = True, **names: Any) -> str:
        """`answer` ends the text where the assistant begins to speak."""
        return MARK.sub("", self.marked(messages, answer, **names))

    def marked(self, messages: Sequence[Mapping[str, Any]], answer: bool, **names: Any) -> str:
        """The text, with marks around what the template itself says is the assistant's ({% generation %})."""
        from jinja2 import TemplateError

        try:
            return self.template.render(
                messages=[dict(m) for m in messages], add_generation_prompt=answer, **self.tokens, **names
            )
        except (TemplateError, TypeError, ValueError) as error:
            raise DataError(f"the chat template does not take these messages: {error}") from None

    def spoken(self, messages: Sequence[Mapping[str, Any]]) -> tuple[str, list[tuple[int, int]] | None]:
        """The whole text, and which characters of it the assistant says, each turn with what ends it. None where the template
        does not let this be told.

        A template may say so itself. Else a turn begins where the text would that asks for it, if the whole begins with that,
        and ends with its content and what stands behind that, but for blanks, when it is the last.
        """
        pieces = re.split(MARK, marked := self.marked(messages, False))
        if len(pieces) > 1:
            if [c for c in marked if c in (FROM, TO)] != [FROM, TO] * (len(pieces) // 2):
                return "".join(pieces), None
            ends = [0]
            for piece in pieces:
                ends.append(ends[-1] + len(piece))
            return "".join(pieces), [(ends[i], ends[i + 1]) for i in range(1, len(pieces), 2)]
        whole, spans = marked, []
        for i, message in enumerate(messages):
            if message["role"] != "assistant":
                continue
            try:
                before, after = self(messages[:i]), self(messages[: i + 1], answer=False)
            except DataError:
                return whole, None
            said = message["content"].strip()
            begin = whole.find(said, len(before))
            closing = after[after.rfind(said) + len(said) :].rstrip()
            if not whole.startswith(before) or begin < 0 or (spans and len(before) < spans[-1][1]):
                return whole, None
            end = begin + len(said)
            spans.append((len(before), end + len(closing) if whole.startswith(closing, end) else end))
        return whole, spans

    def closing(self) -> str:
        """What stands behind an answer, such as <|im_end|>; empty where that cannot be told."""
        try:
            after = self([{"role": "user", "content": "question"}, {"role": "assistant", "content": "answer"}], answer=False)
        except DataError:
            return ""
        return after[after.rfind("answer") + len("answer") :].strip()


def speaking() -> Any:
    """The tag {% generation %} ... {% endgeneration %} of templates, which says what the assistant speaks."""
    from jinja2 import nodes
    from jinja2.ext import Extension

    class Speaking(Extension):
        tags: ClassVar[set[str]] = {"generation"}

        def parse(self, parser: Any) -> Any:
            line = next(parser.stream).lineno
            body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
            return nodes.CallBlock(self.call_method("marked"), [], [], body).set_lineno(line)

        def marked(self, caller: Any) -> str:
            return f"{FROM}{caller()}{TO}"

    return Speaking


def refused(why: str) -> None:
    from jinja2 import TemplateError

    raise TemplateError(why)
