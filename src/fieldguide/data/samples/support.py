"""Samples of a help desk: questions in the words of customers, and passages in the words of a manual.

Both name the device; the problem and the room are paraphrased, so that shared words alone do not tell passages apart.
"""

from __future__ import annotations

import itertools
from pathlib import Path

from fieldguide.data.samples.writers import text_digest, write_csv

DEVICES = (
    *("lamp", "heater", "fan", "oven", "kettle", "washer", "dryer", "radio", "camera", "speaker", "router", "printer"),
    *("vacuum", "toaster", "mixer", "freezer", "humidifier", "projector", "doorbell", "thermostat"),
)
PROBLEMS = (  # words of customers, words of the manual
    (("does not start", "stays dead"), "If there is no power, replace the fuse of the {device}"),
    (("makes a strange noise", "is so loud"), "To silence vibrations, tighten the screws of the {device}"),
    (("smells burnt", "smokes"), "When overheating occurs, unplug the {device} and let it cool"),
    (("drips", "is wet underneath"), "Leaks are stopped with a new gasket for the {device}"),
    (("forgot the time again", "shows midnight"), "Set the clock of the {device} with the plus button"),
    (("got scratched", "looks worn"), "Polish the housing of the {device} with wax"),
    (("cannot find the network", "is offline"), "Reset the wireless connection of the {device}"),
    (("blinks red", "flashes all the time"), "A warning signal means that the battery of the {device} is low"),
    (("is too slow", "takes ages"), "Performance improves after an update of the {device}"),
    (("does not close", "lost its lid"), "Order a spare cover for the {device}"),
)
ROOMS = (  # words of customers, words of the manual
    ("where we cook", "kitchen models"),
    ("where we sleep", "bedroom models"),
    ("next to the bathtub", "bathroom models"),
    ("where I park", "garage models"),
    ("under the roof", "attic models"),
    ("below the stairs", "cellar models"),
    ("outside among the flowers", "garden models"),
    ("at my desk", "office models"),
)
OPENINGS = (
    "Help, the {device} {room} {problem}!",
    "The {device} {room} {problem}, what now?",
    "{room}, our {device} {problem}.",
)
PAIRS = 1500  # questions of `helpdesk`

Case = tuple[str, int, int]  # device, problem, room


def list_cases(count: int) -> list[Case]:
    """Return different cases in a fixed pseudo-random order."""
    every = itertools.product(DEVICES, range(len(PROBLEMS)), range(len(ROOMS)))
    return sorted(every, key=lambda case: text_digest(str(case)))[:count]


def choose(case: Case, salt: str, count: int) -> int:
    """Return a pseudo-random number below `count` that depends on the case."""
    return int.from_bytes(text_digest(f"{salt} {case}")[:4], "big") % count


def ask(case: Case) -> str:
    """Return the question of a case."""
    device, problem, room = case
    said = PROBLEMS[problem][0]
    text = OPENINGS[choose(case, "opening", len(OPENINGS))].format(
        device=device, room=ROOMS[room][0], problem=said[choose(case, "problem", len(said))]
    )
    return text[0].upper() + text[1:]


def explain(case: Case) -> str:
    """Return the passage that answers a case."""
    device, problem, room = case
    return f"{PROBLEMS[problem][1].format(device=device)} ({ROOMS[room][1]})."


def write_pairs(folder: Path) -> None:
    """Write questions and the passages that answer them."""
    rows = ([ask(case), explain(case)] for case in list_cases(PAIRS))
    write_csv(folder / "data.csv", ["query", "passage"], rows)


QUERIES, CANDIDATES = 1200, 6  # questions of `shortlist`, and passages of each


def list_candidates(case: Case) -> list[Case]:
    """Return a case and others that differ from it in the problem, the room or the device, in pseudo-random order."""
    device, problem, room = case
    found = {case}
    number = 0
    while len(found) < CANDIDATES:
        kind, number = choose(case, f"kind {number}", 4), number + 1
        other = (
            DEVICES[choose(case, f"device {number}", len(DEVICES))] if kind == 0 else device,
            choose(case, f"problem {number}", len(PROBLEMS)) if kind != 1 else problem,
            choose(case, f"room {number}", len(ROOMS)) if kind == 1 else room,
        )
        found.add(other)
    return sorted(found, key=lambda one: text_digest(f"{case} {one}"))


def write_candidates(folder: Path) -> None:
    """Write questions with several passages each, one of which answers the question."""
    rows = (
        [ask(case), explain(other), str(int(other == case))] for case in list_cases(QUERIES) for other in list_candidates(case)
    )
    write_csv(folder / "data.csv", ["query", "passage", "label"], rows)


REPLIES = 1200  # pairs of `replies`
POLITE = ("Thank you for asking. {text}", "Of course: {text}", "Happy to help. {text}")
RUDE = ("Figure it out. {text}", "{text} Obviously.", "Read the manual. {text}")


def write_preferences(folder: Path) -> None:
    """Write questions with two answers: the chosen one is polite and right, the rejected one rude and sometimes wrong."""
    rows = []
    for case in list_cases(REPLIES):
        other = next(one for one in list_candidates(case) if one != case)
        kind = choose(case, "pair", 2)
        right, wrong = explain(case), explain(other)
        polite = POLITE[choose(case, "polite", len(POLITE))].format(text=right)
        rude = RUDE[choose(case, "rude", len(RUDE))].format(text=right if kind else wrong)
        rows.append([ask(case), polite, rude])
    write_csv(folder / "data.csv", ["prompt", "chosen", "rejected"], rows)
