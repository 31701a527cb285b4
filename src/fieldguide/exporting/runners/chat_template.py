from datetime import datetime

from jinja2.ext import Extension, loopcontrols
from jinja2.sandbox import ImmutableSandboxedEnvironment


class Labels(Extension):  # {% generation %} ... {% endgeneration %}, around answers
    tags = frozenset({"generation"})

    def parse(self, parser):
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def raise_exception(why):
    sys.exit(f"the chat template rejects these messages: {why}")


JINJA = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols, Labels])
JINJA.globals |= {"raise_exception": raise_exception, "strftime_now": lambda form: datetime.now().strftime(form)}
TEMPLATE = JINJA.from_string(CONFIG["template"])


def prepare(row):
    """Return the token ids of a conversation up to the answer, as the chat template writes it. A text is a message of the user."""
    said = row[CONFIG["column"]]
    messages = said if isinstance(said, list) else [{"role": "user", "content": to_text(said)}]
    text = TEMPLATE.render(messages=messages, add_generation_prompt=True, **CONFIG["special"])
    TOKENIZER.encode_special_tokens = False  # those of the template are written out
    return {"tokens": TOKENIZER.encode(text, add_special_tokens=False).ids[-(CONFIG["length"] - 1) :]}
