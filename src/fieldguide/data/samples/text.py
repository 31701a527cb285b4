"""Text samples: classification of docstrings, Python help texts, questions on parameters, and a small parallel corpus."""

from __future__ import annotations

import ast
import importlib.util
import json
import re
import sysconfig
from collections.abc import Iterator
from itertools import takewhile
from pathlib import Path
from typing import Any

from fieldguide.data.samples.writers import text_digest, write_csv

MIN_TOPIC_CHARACTERS = 200  # minimum characters per topic of `manual`
TEXTS_PER_CLASS = 800  # texts per class of `docstrings`
LIBRARIES = {"python": "", "numpy": "numpy", "scikit-learn": "sklearn", "polars": "polars", "torch": "torch"}


def write_docstrings(folder: Path) -> None:
    """Write first paragraphs of docstrings, labeled with the library they document."""
    taken: dict[str, str] = {}
    seen: set[str] = set()
    for library, package in LIBRARIES.items():
        before = len(taken)
        for text in paragraphs(library_folder(package)):
            if text.lower() not in seen:
                seen.add(text.lower())
                taken[text] = library
            if len(taken) == before + TEXTS_PER_CLASS:
                break
    order = sorted(taken, key=text_digest)
    write_csv(folder / "data.csv", ["text", "library"], ([t, taken[t]] for t in order))


def library_folder(package: str) -> Path:
    """Return the source folder of a package, or of the standard library for ""."""
    if not package:
        return Path(sysconfig.get_paths()["stdlib"])
    spec = importlib.util.find_spec(package)
    assert spec is not None and spec.origin is not None  # a dependency of fieldguide
    return Path(spec.origin).parent


def paragraphs(folder: Path) -> Iterator[str]:
    """Yield the first paragraphs (30 to 400 characters) of the docstrings of a package, without executing its code.

    The order is pseudo-random, so that the first ones are a representative sample.
    """
    for tree in parse_sources(folder):
        for node in ast.walk(tree):
            if isinstance(node, ast.FunctionDef | ast.ClassDef | ast.AsyncFunctionDef):
                text = " ".join((ast.get_docstring(node) or "").split("\n\n")[0].split())
                if 30 <= len(text) <= 400 and text.isascii():
                    yield text


def parse_sources(folder: Path) -> Iterator[ast.Module]:
    """Yield the parsed sources of a package that contain docstrings, without tests and vendored code."""
    skip = {
        "site-packages",
        "test",
        "tests",
        "testing",
        "idlelib",
        "lib2to3",
        "_vendor",
        "ensurepip",
        "externals",
        "_inductor",
        "_dynamo",
        "onnx",
    }
    files = [p.relative_to(folder).as_posix() for p in folder.rglob("*.py")]
    for name in sorted((f for f in files if not skip & set(f.split("/"))), key=text_digest):
        source = (folder / name).read_bytes()
        if b'"""' not in source:
            continue
        try:
            yield ast.parse(source)
        except (SyntaxError, ValueError):
            continue


def write_manual(folder: Path) -> None:
    """Write Python's help on its language, one text per topic.

    Topics overlap: each paragraph is kept only in the longest topic that contains it, so that the test set does not
    contain training text.
    """
    from pydoc_data.topics import topics

    seen: set[str] = set()
    for name, text in sorted(topics.items(), key=lambda topic: (-len(topic[1]), topic[0])):
        new = []
        for paragraph in re.split(r"\n\s*\n", text):
            if (words := " ".join(paragraph.split())) not in seen:
                seen.add(words)
                new.append(paragraph)
        if len(own := "\n\n".join(new)) >= MIN_TOPIC_CHARACTERS:
            (folder / f"{name}.txt").write_text(own, encoding="utf-8")


CONTEXTS = 1500  # number of contexts in `parameters`
PARAMETER = re.compile(r"(\w+) : (.+)")


def write_parameter_questions(folder: Path) -> None:
    """Write template questions on the type, default and purpose of parameters in scikit-learn's documentation.

    Each context describes two parameters of a function; some questions are unanswerable.
    """
    found: dict[str, list[dict[str, Any]]] = {}
    for tree in parse_sources(library_folder("sklearn")):
        for node in ast.walk(tree):
            if isinstance(node, ast.FunctionDef | ast.ClassDef):
                described = list(parse_parameters(ast.get_docstring(node) or ""))
                for pair in zip(described[::2], described[1::2]):
                    context, questions = make_questions(pair)
                    found.setdefault(context, questions)
    kept = sorted(found, key=text_digest)[:CONTEXTS]
    paragraphs = [
        {"context": context, "qas": [{"id": f"{number}.{place}", **question} for place, question in enumerate(found[context])]}
        for number, context in enumerate(kept)
    ]
    document = {"version": "v2.0", "data": [{"title": "Parameters", "paragraphs": paragraphs}]}
    (folder / "data.json").write_text(json.dumps(document, indent=1), encoding="utf-8")


def parse_parameters(text: str) -> Iterator[tuple[str, str, str, str]]:
    """Yield name, type, default and first sentence of each parameter of a numpydoc docstring."""
    lines = text.partition("Parameters\n----------\n")[2].split("\n")
    for place, line in enumerate(lines):
        if line.startswith("---"):  # the next section
            return
        if not (named := PARAMETER.fullmatch(line)) or not line.isascii():
            continue
        words = " ".join(inner.strip() for inner in takewhile(lambda inner: inner.startswith(" "), lines[place + 1 :]))
        kind, _, default = named[2].partition(", default=")
        if words.isascii() and (said := re.split(r"(?<=\.)\s(?=[A-Z])", words)[0][:200]):
            yield named[1], kind, default, said


def make_questions(pair: tuple[tuple[str, str, str, str], ...]) -> tuple[str, list[dict[str, Any]]]:
    """Return the descriptions of parameters as one context, and about half of the possible questions on them."""
    context = ""
    questions: list[dict[str, Any]] = []
    for name, kind, default, said in pair:
        context += f"{' ' if context else ''}{name} : "
        for question, answer, before in (
            (f"What type is {name}?", kind, ""),
            (f"What is the default of {name}?", default, ", default=" if default else ""),
            (f"What is {name} for?", said, ". "),
        ):
            context += before
            questions.append(
                {
                    "question": question,
                    "answers": [{"text": answer, "answer_start": len(context)}] if answer else [],
                    "is_impossible": not answer,
                }
            )
            context += answer
    chosen = [entry for entry in questions if text_digest(context + entry["question"])[0] % 2]
    return context, chosen or questions[:1]


NOUNS = (
    "man:Mann:m woman:Frau:f child:Kind:n dog:Hund:m cat:Katze:f horse:Pferd:n teacher:Lehrer:m girl:Mädchen:n "
    "bird:Vogel:m doctor:Arzt:m book:Buch:n letter:Brief:m house:Haus:n apple:Apfel:m flower:Blume:f picture:Bild:n "
    "bread:Brot:n bag:Tasche:f table:Tisch:m boat:Boot:n"
).split()
VERBS = (
    "sees:sieht buys:kauft finds:findet paints:malt sells:verkauft takes:nimmt brings:bringt loves:liebt knows:kennt hears:hört"
).split()
ADJECTIVES = "old:alt young:jung small:klein big:groß red:rot green:grün good:gut new:neu quiet:leis beautiful:schön".split()
TIMES = (
    "today:heute tomorrow:morgen now:jetzt often:oft never:nie in|the|morning:am|Morgen in|the|garden:im|Garten "
    "in|summer:im|Sommer at|home:zu|Hause after|lunch:nach|dem|Essen"
).split()
# German by gender and case (0 nominative, 1 accusative): "the", "a", and the adjective endings after either.
FORMS = {
    "m0": ("der", "ein", "e", "er"),
    "f0": ("die", "eine", "e", "e"),
    "n0": ("das", "ein", "e", "es"),
    "m1": ("den", "einen", "en", "en"),
    "f1": ("die", "eine", "e", "e"),
    "n1": ("das", "ein", "e", "es"),
}


def write_translations(folder: Path) -> None:
    """Write simple English sentences with German translations by rules: gender, case, endings, verb in second position."""
    import random

    rng = random.Random(0)
    pairs: dict[str, str] = {}

    def noun(case: int) -> tuple[str, str]:
        """Return a random noun phrase in English and German."""
        english, german, gender = rng.choice(NOUNS).split(":")
        article, kind = rng.choice(("the", "a")), rng.choice((*ADJECTIVES, "", "", ""))
        adjective, german_adjective = kind.split(":") if kind else ("", "")
        the, a, weak, strong = FORMS[f"{gender}{case}"]
        german_article, ending = (the, weak) if article == "the" else (a, strong)
        first = adjective or english
        said = "an" if article == "a" and first[0] in "aeiou" else article
        return " ".join(filter(None, (said, adjective, english))), " ".join(
            filter(None, (german_article, german_adjective and german_adjective + ending, german))
        )

    while len(pairs) < 6000:
        (subject, ours), (thing, unser) = noun(0), noun(1)
        verb, german_verb = rng.choice(VERBS).split(":")
        when, wann = rng.choice(TIMES).replace("|", " ").split(":")
        if rng.random() < 0.5:
            english, german = f"{when} {subject} {verb} {thing}", f"{wann} {german_verb} {ours} {unser}"
        else:
            english, german = f"{subject} {verb} {thing} {when}", f"{ours} {german_verb} {unser} {wann}"
        pairs.setdefault(english[0].upper() + english[1:] + ".", german[0].upper() + german[1:] + ".")
    write_csv(folder / "data.csv", ["english", "german"], iter(map(list, pairs.items())))
