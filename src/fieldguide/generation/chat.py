"""Chat templates: what was said so far, as a model's own tokenizer writes it for the network (Jinja, in a sandbox)."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import Any

from fieldguide.errors import DataError


class ChatTemplate:
    """Messages of role and content -> one text. The template comes with a checkpoint, from a stranger, so it runs in
    jinja's sandbox: it can neither reach Python nor change what it is given. `tokens` are names such as bos_token.

    Raises `DataError` for a template that cannot be read, does what it may not, or refuses the messages.
    """

    def __init__(self, source: str, tokens: Mapping[str, str] | None = None):
        from jinja2 import TemplateSyntaxError
        from jinja2.ext import loopcontrols
        from jinja2.sandbox import ImmutableSandboxedEnvironment
        made = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols])
        made.filters["tojson"] = lambda x, indent=None: json.dumps(x, ensure_ascii=False, indent=indent)
        made.globals |= {"raise_exception": refused, "strftime_now": lambda form: datetime.now().strftime(form)}
        self.tokens = dict(tokens or {})
        try:
            self.template = made.from_string(source)
        except TemplateSyntaxError as error:
            raise DataError(f"the chat template cannot be read: line {error.lineno}: {error.message}") from None

    def __call__(self, messages: Sequence[Mapping[str, Any]], answer: bool = True, **names: Any) -> str:
        """`answer` ends the text where the assistant begins to speak."""
        from jinja2 import TemplateError
        try:
            return self.template.render(messages=[dict(m) for m in messages], add_generation_prompt=answer, **self.tokens,
                                        **names)
        except (TemplateError, TypeError, ValueError) as error:
            raise DataError(f"the chat template does not take these messages: {error}") from None


def refused(why: str) -> None:
    from jinja2 import TemplateError
    raise TemplateError(why)
