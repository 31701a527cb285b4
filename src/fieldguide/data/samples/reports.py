"""Summarization sample: rule-based reports of football matches with one-sentence summaries."""

from __future__ import annotations

import random
from pathlib import Path

from fieldguide.data.samples.writers import write_csv

COUNT = 4000
TEAMS = "Bonn Kiel Ulm Trier Jena Hof Essen Mainz Celle Gera Emden Worms".split()
PLAYERS = (
    "Adler Bauer Cramer Dietz Ebert Franke Graf Huber Issel Jung Keller Lang Maier Neumann Otto Peters Quandt Richter "
    "Sommer Thiel Ulrich Vogt Weber Zander"
).split()
OPENINGS = (
    "It was a cold evening in {place}.",
    "Rain fell on {place} all day.",
    "The sun shone on the ground in {place}.",
    "The stands in {place} were full.",
    "Fog lay over {place} when the teams came out.",
)
ASIDES = (
    "The referee had little to do.",
    "There were {n} thousand people in the stands.",
    "The grass was wet and slow.",
    "Both sides changed three players after the break.",
    "The band played until the end.",
    "The goalkeeper of {team} was hurt and had to be replaced.",
    "{player} hit the post.",
    "Nobody had expected much of {team}.",
    "{player} of {team} saw yellow.",
)
GOALS = (
    "{player} scored for {team} in minute {n}.",
    "In minute {n} {player} put the ball in for {team}.",
    "{team} scored through {player} in minute {n}.",
)


def write_reports(folder: Path) -> None:
    """Write reports and summaries. Winner, score and top scorer must be inferred among irrelevant sentences."""
    rng = random.Random(0)
    made: dict[str, str] = {}
    while len(made) < COUNT:
        document, summary = make_match(rng)
        made.setdefault(document, summary)
    write_csv(folder / "data.csv", ["report", "summary"], iter(map(list, made.items())))


def make_match(rng: random.Random) -> tuple[str, str]:
    """Return a random report and its summary."""
    home, guest = rng.sample(TEAMS, 2)
    squads = dict(zip((home, guest), (lambda names: (names[:3], names[3:]))(rng.sample(PLAYERS, 6))))
    scored = [rng.choice((home, guest)) for _ in range(rng.choice((1, 2, 2, 3, 3, 4)))]
    minutes = sorted(rng.sample(range(2, 91), len(scored)))
    by = [rng.choice(squads[team]) for team in scored]
    events = [rng.choice(GOALS).format(player=player, team=team, n=n) for player, team, n in zip(by, scored, minutes)]
    for _ in range(rng.randint(1, 3)):
        team = rng.choice((home, guest))
        aside = rng.choice(ASIDES).format(player=rng.choice(squads[team]), team=team, n=rng.randint(2, 60))
        events.insert(rng.randint(0, len(events)), aside)
    goals = {team: scored.count(team) for team in (home, guest)}
    document = " ".join([rng.choice(OPENINGS).format(place=home), f"{home} played {guest}.", *events])
    best, worst = sorted(goals, key=lambda team: -goals[team])
    if goals[best] == goals[worst]:
        return document, f"{home} and {guest} drew {goals[home]}:{goals[guest]} in {home}."
    most = max(dict.fromkeys(player for player, team in zip(by, scored) if team == best), key=by.count)
    times = {1: "", 2: " scored twice", 3: " scored three times", 4: " scored four times"}[by.count(most)]
    return document, f"{best} beat {worst} {goals[best]}:{goals[worst]} in {home}; {most}{times or ' scored'}."
