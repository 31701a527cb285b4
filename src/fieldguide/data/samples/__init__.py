"""Samples: small real data for every task, made from what is installed, without a network.

`path("digits")` makes a sample on first use in the user's cache folder and gives its path; `read("digits")`
reads it.
"""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from fieldguide.core.errors import DataError, nearest
from fieldguide.data.samples import digits, interactions, reports, scenes, speech, text

VERSION = 2  # of what the makers below write; a change of it makes every sample anew


@dataclass(frozen=True)
class Sample:
    """A sample: what it is, the task it is for, its licence, where it is from. `made`: our code derives it
    from something that was not a data set. `minutes`: how long training takes at most where the user does not say.
    `reaches`: a score of the test that such a fit comes to on two cores, with something to spare."""

    name: str
    task: str
    what: str
    licence: str
    source: str
    made: bool
    target: str
    make: Callable[[Path], None]
    minutes: float = 2.5
    reaches: tuple[str, float] = ("", 0.0)


def path(name: str) -> Path:
    """Where a sample is, after making it if it is not there yet. Raises DataError for an unknown name."""
    if name not in SAMPLES:
        names = ", ".join(SAMPLES)
        raise DataError(f"{name!r} is no sample.{nearest(name, SAMPLES)} The samples are: {names}.")
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    home = cache / "fieldguide" / "samples" / f"{name}-v{VERSION}"
    if not home.exists():
        # Made beside its place and then renamed: whoever looks sees all of it or nothing.
        home.parent.mkdir(parents=True, exist_ok=True)
        work = Path(tempfile.mkdtemp(prefix=f".{name}-", dir=home.parent))
        try:
            SAMPLES[name].make(work)
            work.chmod(0o755)
            work.rename(home)
        except OSError:
            if not home.exists():  # else another process made it meanwhile
                raise
        finally:
            shutil.rmtree(work, ignore_errors=True)
    only = list(home.iterdir())
    return only[0] if len(only) == 1 and only[0].is_file() else home


BSD = "as distributed with scikit-learn (BSD-3-Clause)"
SAMPLES: dict[str, Sample] = {
    s.name: s
    for s in (
        Sample(
            "digits",
            "image-classification",
            "1,797 handwritten digits, 8 x 8 grey pixels, 10 classes",
            BSD,
            "scikit-learn load_digits (UCI optical recognition of handwritten digits, test part)",
            False,
            "label",
            digits.digits,
            reaches=("accuracy", 0.97),
        ),
        Sample(
            "iris",
            "tabular-classification",
            "150 irises, 4 measurements, 3 species",
            BSD,
            "scikit-learn load_iris (Fisher 1936)",
            False,
            "species",
            digits.classes("load_iris", "species"),
            reaches=("accuracy", 0.85),
        ),
        Sample(
            "wine",
            "tabular-classification",
            "178 wines, 13 chemical measurements, 3 growers",
            BSD,
            "scikit-learn load_wine (UCI)",
            False,
            "grower",
            digits.classes("load_wine", "grower"),
            reaches=("accuracy", 0.88),
        ),
        Sample(
            "breast-cancer",
            "tabular-classification",
            "569 tumours, 30 measurements, benign or malignant",
            BSD,
            "scikit-learn load_breast_cancer (UCI, Wisconsin)",
            False,
            "diagnosis",
            digits.classes("load_breast_cancer", "diagnosis"),
            reaches=("accuracy", 0.9),
        ),
        Sample(
            "diabetes",
            "tabular-regression",
            "442 patients, 10 measurements, course of the disease in a year",
            BSD,
            "scikit-learn load_diabetes, unscaled (Efron et al. 2004)",
            False,
            "progression",
            digits.diabetes,
            reaches=("rmse", 63),
        ),
        Sample(
            "docstrings",
            "text-classification",
            f"about {text.EACH * len(text.LIBRARIES):,} sentences of documentation: of which of {len(text.LIBRARIES)} "
            "libraries? Differs a little with the installed versions",
            "each library's own; made on your machine, not distributed",
            "docstrings in the installed sources of " + ", ".join(text.LIBRARIES),
            True,
            "library",
            text.docstrings,
            reaches=("accuracy", 0.78),
        ),
        Sample(
            "manual",
            "text-generation",
            "chapters of help on the Python language, about 370,000 characters",
            "Python's own (PSF-2.0)",
            "pydoc_data of the Python that runs",
            False,
            "",
            text.manual,
            reaches=("loss", 4.3),
        ),
        Sample(
            "parameters",
            "question-answering",
            f"about 4,600 questions on {text.CONTEXTS:,} pieces of documentation: of what "
            "type is a parameter, what is its default, what is it for? Differs a little with the installed version",
            "the library's own (BSD-3-Clause); made on your machine, not distributed",
            "what the docstrings of the installed scikit-learn say of parameters; questions by template",
            True,
            "answers",
            text.parameters,
            3.0,
            reaches=("f1", 0.5),
        ),
        Sample(
            "reports",
            "summarization",
            "4,000 reports of football matches, made by rules: who won, how high, who scored?",
            "made by fieldguide (Apache-2.0)",
            "written by our code: teams, players, goals, and what does not matter",
            True,
            "summary",
            reports.reports,
            3.0,
            reaches=("rouge1", 0.6),
        ),
        Sample(
            "phrases",
            "translation",
            "6,000 simple sentences, English and German, made by rules of grammar",
            "made by fieldguide (Apache-2.0)",
            "written by our code: 20 nouns, 10 verbs, gender, case and word order",
            True,
            "german",
            text.phrases,
            reaches=("bleu", 95),
        ),
        Sample(
            "inked",
            "image-segmentation",
            "500 pictures of 64 x 64 with scanned digits on uneven ground: which pixels are white ink, which black?",
            "scenes by fieldguide (Apache-2.0), digits " + BSD,
            "composed by our code from scikit-learn's load_digits",
            True,
            "mask",
            scenes.inked,
            reaches=("miou", 0.9),
        ),
        Sample(
            "scattered",
            "object-detection",
            "900 pictures of 96 x 96 with one to five scanned digits on uneven ground, and a "
            "box around each: where are they, and which?",
            "scenes by fieldguide (Apache-2.0), digits " + BSD,
            "composed by our code from scikit-learn's load_digits",
            True,
            "objects",
            scenes.scattered,
            reaches=("map", 0.7),
        ),
        Sample(
            "figures",
            "image-generation",
            "1,797 handwritten digits, 8 x 8 grey pixels, 10 classes: what would others look like?",
            BSD,
            "scikit-learn load_digits (UCI optical recognition of handwritten digits, test part)",
            False,
            "label",
            digits.digits,
            reaches=("classifier_accuracy", 0.9),
        ),
        Sample(
            "demand",
            "time-series-forecasting",
            "20 weeks of hourly electricity at six sites, with temperature and holidays: how much in the next 48 hours?",
            "made by fieldguide (Apache-2.0)",
            "drawn by our code: rhythms of day and week, weather, chance",
            True,
            "demand",
            interactions.demand,
            reaches=("mase", 0.9),
        ),
        Sample(
            "moving",
            "video-generation",
            "480 films of 8 frames, 16 x 16 pixels: scanned digits that move left, right, up or down",
            "films by fieldguide (Apache-2.0), digits " + BSD,
            "composed by our code from scikit-learn's load_digits",
            True,
            "label",
            scenes.moving,
            reaches=("recognised", 0.5),
        ),
        Sample(
            "series",
            "recommendation",
            "600 viewers of 20 shows with 8 episodes each, about 5,000 views: what do they watch next?",
            "made by fieldguide (Apache-2.0)",
            "drawn by our code",
            True,
            "",
            interactions.episodes,
            reaches=("ndcg_10", 0.7),
        ),
        Sample(
            "clicks",
            "click-prediction",
            "12,000 times one of 300 readers was shown one of 120 articles: did they open it?",
            "made by fieldguide (Apache-2.0)",
            "drawn by our code: tastes, devices, times of day, chance",
            True,
            "clicked",
            interactions.clicks,
            reaches=("auc", 0.66),
        ),
        Sample(
            "spoken",
            "automatic-speech-recognition",
            "600 recordings of one to three English digits, 8 kHz, each in a voice of its own",
            "made by fieldguide (Apache-2.0)",
            "synthesised by our code: formants, pitch, tempo, breath, noise",
            True,
            "transcript",
            speech.spoken,
            reaches=("wer", 0.04),
        ),
        Sample(
            "captions",
            "image-text",
            "3,000 pictures of 32 x 32 with one or two scanned digits, and a sentence on each: which belongs to which?",
            "scenes by fieldguide (Apache-2.0), digits " + BSD,
            "composed by our code from scikit-learn's load_digits",
            True,
            "caption",
            scenes.captions,
            reaches=("mean_recall", 0.45),
        ),
        Sample(
            "questions",
            "visual-question-answering",
            "4,500 questions about 1,500 pictures of 32 x 32 with up to three scanned digits: how many, where, of what colour?",
            "scenes by fieldguide (Apache-2.0), digits " + BSD,
            "composed by our code from scikit-learn's load_digits",
            True,
            "answer",
            scenes.questions,
            reaches=("accuracy", 0.8),
        ),
    )
}
