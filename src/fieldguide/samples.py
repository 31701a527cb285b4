"""Samples: small real data for every task, made from what is installed, without a network.

`path("digits")` makes a sample on first use in the user's cache folder and gives its path; `read("digits")`
reads it.
"""

from __future__ import annotations

import ast
import csv
import hashlib
import importlib.util
import os
import shutil
import sysconfig
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fieldguide.errors import DataError, nearest

VERSION = 1                # of what the makers below write; a change of it makes every sample anew
EACH = 800                 # texts of every class of `docstrings`
LIBRARIES = {"python": "", "numpy": "numpy", "scikit-learn": "sklearn", "polars": "polars", "torch": "torch"}


@dataclass(frozen=True)
class Sample:
    """A sample: what it is, the task it is for, its licence, where it is from. `made`: our code derives it
    from something that was not a data set."""

    name: str
    task: str
    what: str
    licence: str
    source: str
    made: bool
    target: str
    make: Callable[[Path], None]


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
            if not home.exists():              # else another process made it meanwhile
                raise
        finally:
            shutil.rmtree(work, ignore_errors=True)
    only = list(home.iterdir())
    return only[0] if len(only) == 1 and only[0].is_file() else home


def digits(folder: Path) -> None:
    """1,797 handwritten digits of 8 x 8 pixels as PNG, a folder a class; 17 grey levels become 0 to 255."""
    from PIL import Image
    from sklearn.datasets import load_digits

    data = load_digits()
    for digit in range(10):
        (folder / str(digit)).mkdir()
    for i, (pixels, digit) in enumerate(zip(data.images, data.target)):
        grey = (pixels * (255 / 16)).round().astype("uint8")
        Image.fromarray(grey).save(folder / str(digit) / f"{i:04d}.png")


def classes(loader: str, target: str) -> Callable[[Path], None]:
    """A classification table of scikit-learn as CSV, with class names instead of numbers."""
    def make(folder: Path) -> None:
        import sklearn.datasets

        data = getattr(sklearn.datasets, loader)()
        rows = ([*(f"{v:g}" for v in x), str(data.target_names[y])] for x, y in zip(data.data, data.target))
        write(folder / "data.csv", [*(plain(n) for n in data.feature_names), target], rows)

    return make


def diabetes(folder: Path) -> None:
    from sklearn.datasets import load_diabetes

    names = ("age", "sex", "bmi", "blood_pressure", "cholesterol", "ldl", "hdl", "cholesterol_hdl_ratio",
             "log_triglycerides", "blood_sugar")
    data = load_diabetes(scaled=False)
    rows = ([*(f"{v:.10g}" for v in x), f"{y:g}"] for x, y in zip(data.data, data.target))
    write(folder / "data.csv", [*names, "progression"], rows)


def docstrings(folder: Path) -> None:
    """Which library does this sentence document? First paragraphs of docstrings in installed sources."""
    taken: dict[str, str] = {}
    seen: set[str] = set()
    for library, package in LIBRARIES.items():
        before = len(taken)
        for text in paragraphs(library_folder(package)):
            if text.lower() not in seen:
                seen.add(text.lower())
                taken[text] = library
            if len(taken) == before + EACH:
                break
    order = sorted(taken, key=digest)
    write(folder / "data.csv", ["text", "library"], ([t, taken[t]] for t in order))


def manual(folder: Path) -> None:
    """Python's own help on its language, a text a topic."""
    from pydoc_data.topics import topics
    for name, text in topics.items():
        (folder / f"{name}.txt").write_text(text, encoding="utf-8")


NOUNS = ("man:Mann:m woman:Frau:f child:Kind:n dog:Hund:m cat:Katze:f horse:Pferd:n teacher:Lehrer:m girl:Mädchen:n "
         "bird:Vogel:m doctor:Arzt:m book:Buch:n letter:Brief:m house:Haus:n apple:Apfel:m flower:Blume:f picture:Bild:n "
         "bread:Brot:n bag:Tasche:f table:Tisch:m boat:Boot:n").split()
VERBS = ("sees:sieht buys:kauft finds:findet paints:malt sells:verkauft takes:nimmt brings:bringt loves:liebt knows:kennt "
         "hears:hört").split()
ADJECTIVES = "old:alt young:jung small:klein big:groß red:rot green:grün good:gut new:neu quiet:leis beautiful:schön".split()
TIMES = ("today:heute tomorrow:morgen now:jetzt often:oft never:nie in|the|morning:am|Morgen in|the|garden:im|Garten "
         "in|summer:im|Sommer at|home:zu|Hause after|lunch:nach|dem|Essen").split()
# German by gender and case: the, a, and what an adjective ends in after either.
FORMS = {"m0": ("der", "ein", "e", "er"), "f0": ("die", "eine", "e", "e"), "n0": ("das", "ein", "e", "es"),
         "m1": ("den", "einen", "en", "en"), "f1": ("die", "eine", "e", "e"), "n1": ("das", "ein", "e", "es")}


def phrases(folder: Path) -> None:
    """Simple English sentences and their German, by rule: gender, case, endings, and the verb in second place."""
    import random
    rng, pairs = random.Random(0), {}

    def noun(case: int) -> tuple[str, str]:
        english, german, gender = rng.choice(NOUNS).split(":")
        article, kind = rng.choice(("the", "a")), rng.choice((*ADJECTIVES, "", "", ""))
        adjective, german_adjective = kind.split(":") if kind else ("", "")
        the, a, weak, strong = FORMS[f"{gender}{case}"]
        german_article, ending = (the, weak) if article == "the" else (a, strong)
        first = adjective or english
        said = "an" if article == "a" and first[0] in "aeiou" else article
        return " ".join(filter(None, (said, adjective, english))), " ".join(filter(None, (
            german_article, german_adjective and german_adjective + ending, german)))

    while len(pairs) < 6000:
        (subject, ours), (thing, unser) = noun(0), noun(1)
        verb, german_verb = rng.choice(VERBS).split(":")
        when, wann = rng.choice(TIMES).replace("|", " ").split(":")
        if rng.random() < 0.5:
            english, german = f"{when} {subject} {verb} {thing}", f"{wann} {german_verb} {ours} {unser}"
        else:
            english, german = f"{subject} {verb} {thing} {when}", f"{ours} {german_verb} {unser} {wann}"
        pairs.setdefault(english[0].upper() + english[1:] + ".", german[0].upper() + german[1:] + ".")
    write(folder / "data.csv", ["english", "german"], iter(map(list, pairs.items())))


SHOWS = ("tides mines roofs wires salt lanterns orchards comets harbours clocks ravens ponds bridges maps glaciers stoves "
         "violins deserts letters ferries").split()


def episodes(folder: Path) -> None:
    """Who watched which episode when: most go on with the next of a show, some begin another, popular ones first."""
    import random
    rng, rows = random.Random(0), []
    for viewer in range(600):
        shows = rng.sample(SHOWS, len(SHOWS), counts=[20 - i for i in range(20)])
        shows = list(dict.fromkeys(shows))[:4]
        at, day = dict.fromkeys(shows, 1), rng.randrange(200)
        for show in shows:
            at[show] = rng.randrange(1, 5)
        show = shows[0]
        for _ in range(rng.randrange(5, 16)):
            if rng.random() < 0.25 or at[show] > 8:
                show = rng.choice(shows)
            if at[show] > 8:
                continue
            rows.append([f"viewer{viewer}", f"{show}-{at[show]}", str(day)])
            at[show] += 1
            day += rng.randrange(1, 4)
    write(folder / "data.csv", ["user", "item", "time"], sorted(rows, key=lambda r: int(r[2])))


def scene(rng: Any, side: int = 64, most: int = 4) -> tuple[Any, list[tuple[int, tuple[int, int, int, int], Any]]]:
    """A grey picture (uint8, side x side) with one to `most` scanned digits of scikit-learn's on uneven ground, none over
    another; and for each digit what it is, its box (left, top, right, bottom) and where its ink is (bool, side x side)."""
    import numpy as np
    from PIL import Image
    from sklearn.datasets import load_digits
    data = load_digits()
    slope = rng.uniform(-30, 30, 2)
    y, x = np.mgrid[0:side, 0:side] / side - 0.5
    ground = np.clip(rng.uniform(90, 140) + slope[0] * x + slope[1] * y + rng.normal(0, 6, (side, side)), 0, 255)
    taken, found = np.zeros((side, side), dtype=bool), []
    for _ in range(int(rng.integers(1, most + 1))):
        size, number = int(rng.integers(side // 5, side // 2 - 2)), int(rng.integers(len(data.images)))
        ink = np.asarray(Image.fromarray((data.images[number] * 255 / 16).astype(np.uint8)).resize(
            (size, size), Image.Resampling.BICUBIC)) / 255
        left, top = (int(v) for v in rng.integers(0, side - size + 1, 2))
        if taken[max(0, top - 2):top + size + 2, max(0, left - 2):left + size + 2].any():
            continue
        taken[top:top + size, left:left + size] = True
        colour = 255 if rng.random() < 0.5 else 0
        part = ground[top:top + size, left:left + size]
        ground[top:top + size, left:left + size] = part + (colour - part) * ink
        where = np.zeros((side, side), dtype=bool)
        where[top:top + size, left:left + size] = ink > 0.4
        rows, columns = np.flatnonzero(where.any(1)), np.flatnonzero(where.any(0))
        box = (int(columns[0]), int(rows[0]), int(columns[-1]) + 1, int(rows[-1]) + 1)
        found.append((int(data.target[number]), box, where))
    return ground.astype(np.uint8), found


def inked(folder: Path) -> None:
    """500 scenes with a mask each: ground, white ink, black ink."""
    import numpy as np
    from PIL import Image
    rng = np.random.default_rng(0)
    for name in ("images", "masks"):
        (folder / name).mkdir()
    (folder / "classes.txt").write_text("ground\nwhite ink\nblack ink\n")
    for number in range(500):
        picture, found = scene(rng)
        mask = np.zeros(picture.shape, dtype=np.uint8)
        for _, _, where in found:
            mask[where] = 1 if picture[where].mean() > 128 else 2
        Image.fromarray(picture).save(folder / "images" / f"{number:04d}.png")
        Image.fromarray(mask).save(folder / "masks" / f"{number:04d}.png")


def scattered(folder: Path) -> None:
    """900 scenes of 96 x 96 with the boxes of their digits, as YOLO keeps them."""
    import numpy as np
    from PIL import Image
    rng, side = np.random.default_rng(0), 96
    for name in ("images", "labels"):
        (folder / name).mkdir()
    (folder / "data.yaml").write_text(f"train: images\nnames: [{', '.join(map(repr, map(str, range(10))))}]\n")
    for number in range(900):
        picture, found = scene(rng, side, most=5)
        Image.fromarray(picture).save(folder / "images" / f"{number:04d}.png")
        lines = [f"{digit} {(left + right) / 2 / side:.6f} {(top + bottom) / 2 / side:.6f} {(right - left) / side:.6f} "
                 f"{(bottom - top) / side:.6f}\n" for digit, (left, top, right, bottom), _ in found]
        (folder / "labels" / f"{number:04d}.txt").write_text("".join(lines))


SCENE = 32                 # pixels a side of scenes to be told or asked about


def told(picture: Any, found: list[Any]) -> list[tuple[str, float, float, int]]:
    """Of each digit in a scene its colour, the middle of its box (from the left, from above), its area."""
    return [("white" if picture[where].mean() > 128 else "black", (box[0] + box[2]) / 2, (box[1] + box[3]) / 2,
             (box[2] - box[0]) * (box[3] - box[1])) for _, box, where in found]


def captions(folder: Path) -> None:
    """3,000 scenes of one or two digits, and where what stands: "a small white digit at the top left"."""
    import numpy as np
    from PIL import Image
    rng, rows = np.random.default_rng(0), []
    (folder / "images").mkdir()
    for number in range(3000):
        picture, found = scene(rng, SCENE, 2)
        said = [f"a {'small' if area < SCENE ** 2 / 20 else 'large'} {colour} digit at the "
                f"{'top' if y < SCENE / 2 else 'bottom'} {'left' if x < SCENE / 2 else 'right'}"
                for colour, x, y, area in sorted(told(picture, found), key=lambda t: t[1])]
        Image.fromarray(picture).save(folder / "images" / f"{number:04d}.png")
        rows.append([f"images/{number:04d}.png", " and ".join(said)])
    write(folder / "captions.csv", ["image", "caption"], iter(rows))


def questions(folder: Path) -> None:
    """1,500 scenes of one to three digits and three questions about each."""
    import numpy as np
    from PIL import Image
    rng, rows = np.random.default_rng(0), []
    (folder / "images").mkdir()
    for number in range(1500):
        picture, found = scene(rng, SCENE, 3)
        things = told(picture, found)
        white = sum(colour == "white" for colour, *_ in things)
        largest, leftmost = max(things, key=lambda t: t[3]), min(things, key=lambda t: t[1])
        lowest = max(things, key=lambda t: t[2])
        asked = [("how many digits are there?", len(things)), ("how many digits are white?", white),
                 ("how many digits are black?", len(things) - white), ("is there a white digit?", "yes" if white else "no"),
                 ("is there a black digit?", "yes" if white < len(things) else "no"),
                 ("what colour is the largest digit?", largest[0]), ("what colour is the leftmost digit?", leftmost[0]),
                 ("what colour is the lowest digit?", lowest[0]),
                 ("on which side is the largest digit?", "left" if largest[1] < SCENE / 2 else "right")]
        Image.fromarray(picture).save(folder / "images" / f"{number:04d}.png")
        for i in rng.choice(len(asked), 3, replace=False):
            rows.append([f"images/{number:04d}.png", asked[i][0], str(asked[i][1])])
    write(folder / "questions.csv", ["image", "question", "answer"], iter(rows))


# Level in MW, share that rests at weekends, more for each degree below 16.
SITES = {"homes-north": (0.9, 0.0, 0.055), "homes-south": (1.2, 0.0, 0.04), "offices": (2.1, 0.75, 0.02),
         "school": (0.7, 0.9, 0.03), "shops": (1.5, 0.35, 0.015), "works": (3.0, 0.5, 0.005)}
HOLIDAYS = (0, 88, 91, 120, 129, 140)                                 # days of 2024: new year, Easter, May, ...


def demand(folder: Path) -> None:
    """20 weeks of hourly electricity at six sites: two daily rhythms, weekends, holidays, weather and chance."""
    import numpy as np
    rng, hours = np.random.default_rng(0), np.arange(20 * 7 * 24)
    day, hour = hours // 24, hours % 24
    holiday = np.isin(day, HOLIDAYS)
    rest = (day % 7 >= 5) | holiday                                   # 2024 began on a Monday
    bump = lambda middle, width: np.exp(-0.5 * (((hour - middle + 12) % 24 - 12) / width) ** 2)      # noqa: E731

    def wander(count: int, keep: float) -> Any:
        steps = rng.normal(0, (1 - keep * keep) ** 0.5, count)
        for i in range(1, count):
            steps[i] += keep * steps[i - 1]
        return steps

    weather = 4 + 12 * day / 140 + 4 * wander(len(hours), 0.985)
    rows = []
    for name, (level, rests, degree) in SITES.items():
        homely = bump(7.5, 1.5) * 0.35 + bump(19.5, 2.5) * 0.6 + 0.55
        busy = np.clip(bump(13, 4) * 1.3, 0, 1) * np.where(rest, 1 - rests, 1) + 0.3
        warmth = weather + 4 * bump(15, 4) - (2 if name.endswith("north") else 0) + 0.5 * wander(len(hours), 0.9)
        shape = (busy if rests else homely * np.where(rest, 1.1, 1)) + degree * np.clip(16 - warmth, 0, None)
        power = level * shape * (1 + 0.03 * wander(len(hours), 0.95) + 0.02 * rng.normal(size=len(hours)))
        times = (np.datetime64("2024-01-01T00:00") + hours.astype("m8[h]")).astype(str)
        rows += [[name, t.replace("T", " "), f"{p:.4f}", f"{w:.1f}", "yes" if h else "no"]
                 for t, p, w, h in zip(times, power, warmth, holiday)]
    write(folder / "data.csv", ["site", "time", "demand", "temperature", "holiday"], iter(rows))


def spoken(folder: Path) -> None:
    """600 recordings of one to three digits that nobody spoke, each in a voice of its own, and a table of what they say."""
    import wave

    import numpy as np

    from fieldguide import voice
    rng, rows = np.random.default_rng(0), []
    (folder / "recordings").mkdir()
    for number in range(600):
        words = [str(w) for w in rng.choice(list(voice.WORDS), rng.integers(1, 4))]
        sound = voice.speak(words, voice.Voice.drawn(rng), rng)
        with wave.open(str(folder / "recordings" / f"{number:04d}.wav"), "wb") as file:
            file.setnchannels(1)
            file.setsampwidth(2)
            file.setframerate(voice.RATE)
            file.writeframes((sound * 32767).astype("<i2").tobytes())
        rows.append([f"recordings/{number:04d}.wav", " ".join(words)])
    write(folder / "transcripts.csv", ["file", "transcript"], iter(rows))


def moving(folder: Path) -> None:
    """Digits that move one pixel a frame, in four directions, as strips of eight frames of 16 x 16 pixels."""
    import numpy as np
    from PIL import Image
    from sklearn.datasets import load_digits
    rng, data = np.random.default_rng(0), load_digits().images * 255 / 16
    for name, (across, down) in {"left": (-1, 0), "right": (1, 0), "up": (0, -1), "down": (0, 1)}.items():
        (folder / name).mkdir()
        for number in range(120):
            digit = data[rng.integers(len(data))]
            left, top = (int(rng.integers(0, 9)) if step == 0 else 8 if step < 0 else 0 for step in (across, down))
            strip = np.zeros((16, 8 * 16), dtype=np.uint8)
            for frame in range(8):
                x, y = 16 * frame + left + across * frame, top + down * frame
                strip[y:y + 8, x:x + 8] = digit
            Image.fromarray(strip).save(folder / name / f"{number:03d}.png")


def library_folder(package: str) -> Path:
    if not package:
        return Path(sysconfig.get_paths()["stdlib"])
    spec = importlib.util.find_spec(package)
    assert spec is not None and spec.origin is not None      # a dependency of ours
    return Path(spec.origin).parent


def paragraphs(folder: Path) -> Iterator[str]:
    """First paragraphs of the docstrings of a package, 30 to 400 characters, without running any of its code.

    In an order that is neither the alphabet's nor the file system's, so that the first few are a fair choice.
    """
    skip = {"site-packages", "test", "tests", "testing", "idlelib", "lib2to3", "_vendor", "ensurepip",
            "externals", "_inductor", "_dynamo", "onnx"}
    files = [p.relative_to(folder).as_posix() for p in folder.rglob("*.py")]
    for name in sorted((f for f in files if not skip & set(f.split("/"))), key=digest):
        source = (folder / name).read_bytes()
        if b'"""' not in source:
            continue
        try:
            tree = ast.parse(source)
        except (SyntaxError, ValueError):
            continue
        for node in ast.walk(tree):
            if isinstance(node, ast.FunctionDef | ast.ClassDef | ast.AsyncFunctionDef):
                text = " ".join((ast.get_docstring(node) or "").split("\n\n")[0].split())
                if 30 <= len(text) <= 400 and text.isascii():
                    yield text


def digest(text: str) -> bytes:
    return hashlib.sha256(text.encode()).digest()


def plain(name: str) -> str:
    return name.replace(" (cm)", "_cm").replace(" ", "_").replace("/", "_")


def write(file: Path, names: list[str], rows: Iterator[list[str]]) -> None:
    with file.open("w", newline="", encoding="utf-8") as out:
        writer = csv.writer(out, lineterminator="\n")
        writer.writerow(names)
        writer.writerows(rows)


BSD = "as distributed with scikit-learn (BSD-3-Clause)"
SAMPLES: dict[str, Sample] = {s.name: s for s in (
    Sample("digits", "image-classification", "1,797 handwritten digits, 8 x 8 grey pixels, 10 classes", BSD,
           "scikit-learn load_digits (UCI optical recognition of handwritten digits, test part)", False,
           "label", digits),
    Sample("iris", "tabular-classification", "150 irises, 4 measurements, 3 species", BSD,
           "scikit-learn load_iris (Fisher 1936)", False, "species", classes("load_iris", "species")),
    Sample("wine", "tabular-classification", "178 wines, 13 chemical measurements, 3 growers", BSD,
           "scikit-learn load_wine (UCI)", False, "grower", classes("load_wine", "grower")),
    Sample("breast-cancer", "tabular-classification", "569 tumours, 30 measurements, benign or malignant",
           BSD,
           "scikit-learn load_breast_cancer (UCI, Wisconsin)", False, "diagnosis",
           classes("load_breast_cancer", "diagnosis")),
    Sample("diabetes", "tabular-regression", "442 patients, 10 measurements, course of the disease in a year",
           BSD,
           "scikit-learn load_diabetes, unscaled (Efron et al. 2004)", False, "progression", diabetes),
    Sample("docstrings", "text-classification",
           f"about {EACH * len(LIBRARIES):,} sentences of documentation: of which of {len(LIBRARIES)} "
           "libraries? Differs a little with the installed versions",
           "each library's own; made on your machine, not distributed",
           "docstrings in the installed sources of " + ", ".join(LIBRARIES), True, "library", docstrings),
    Sample("manual", "text-generation", "79 chapters of help on the Python language, about 460,000 characters",
           "Python's own (PSF-2.0)", "pydoc_data of the Python that runs", False, "", manual),
    Sample("phrases", "translation", "6,000 simple sentences, English and German, made by rules of grammar",
           "made by fieldguide (Apache-2.0)", "written by our code: 20 nouns, 10 verbs, gender, case and word order", True,
           "german", phrases),
    Sample("inked", "image-segmentation", "500 pictures of 64 x 64 with scanned digits on uneven ground: which pixels are "
           "white ink, which black?", "scenes by fieldguide (Apache-2.0), digits " + BSD,
           "composed by our code from scikit-learn's load_digits", True, "mask", inked),
    Sample("scattered", "object-detection", "900 pictures of 96 x 96 with one to five scanned digits on uneven ground, and a "
           "box around each: where are they, and which?", "scenes by fieldguide (Apache-2.0), digits " + BSD,
           "composed by our code from scikit-learn's load_digits", True, "objects", scattered),
    Sample("demand", "time-series-forecasting", "20 weeks of hourly electricity at six sites, with temperature and holidays: "
           "how much in the next 48 hours?", "made by fieldguide (Apache-2.0)",
           "drawn by our code: rhythms of day and week, weather, chance", True, "demand", demand),
    Sample("moving", "video-generation", "480 films of 8 frames, 16 x 16 pixels: scanned digits that move left, right, "
           "up or down", "films by fieldguide (Apache-2.0), digits " + BSD,
           "composed by our code from scikit-learn's load_digits", True, "label", moving),
    Sample("series", "recommendation", "600 viewers of 20 shows with 8 episodes each, about 5,000 views: what do they watch "
           "next?", "made by fieldguide (Apache-2.0)", "drawn by our code", True, "", episodes),
    Sample("spoken", "automatic-speech-recognition", "600 recordings of one to three English digits, 8 kHz, each in a voice of "
           "its own", "made by fieldguide (Apache-2.0)", "synthesised by our code: formants, pitch, tempo, breath, noise", True,
           "transcript", spoken),
    Sample("captions", "image-text", "3,000 pictures of 32 x 32 with one or two scanned digits, and a sentence on each: which "
           "belongs to which?", "scenes by fieldguide (Apache-2.0), digits " + BSD,
           "composed by our code from scikit-learn's load_digits", True, "caption", captions),
    Sample("questions", "visual-question-answering", "4,500 questions about 1,500 pictures of 32 x 32 with up to three scanned "
           "digits: how many, where, of what colour?", "scenes by fieldguide (Apache-2.0), digits " + BSD,
           "composed by our code from scikit-learn's load_digits", True, "answer", questions),
)}
