"""Samples of events and time series: views of episodes, clicks on articles, and electricity demand."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from fieldguide.data.samples.writers import write_csv

SHOWS = (
    "tides mines roofs wires salt lanterns orchards comets harbours clocks ravens ponds bridges maps glaciers stoves "
    "violins deserts letters ferries"
).split()


def write_episodes(folder: Path) -> None:
    """Write views of episodes: viewers mostly continue with the next episode of a show, and prefer popular shows."""
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
    write_csv(folder / "data.csv", ["user", "item", "time"], sorted(rows, key=lambda r: int(r[2])))


TOPICS = "sport politics science travel food music".split()


def write_clicks(folder: Path) -> None:
    """Write impressions of articles: readers have tastes, articles an appeal, and long ones are avoided on phones."""
    import numpy as np

    rng = np.random.default_rng(0)
    tastes, appeal = rng.normal(0, 1.2, (300, len(TOPICS))), rng.normal(0, 0.7, 120)
    topic, long = rng.integers(len(TOPICS), size=120), rng.random(120) < 0.4
    rows = []
    for _ in range(12_000):
        reader, article, hour = int(rng.integers(300)), int(rng.integers(120)), int(rng.integers(24))
        phone = rng.random() < (0.8 if hour < 18 else 0.4)
        wish = tastes[reader, topic[article]] + appeal[article] - (1.2 if long[article] and phone else 0) - 0.4
        opened = rng.random() < 1 / (1 + np.exp(-wish))
        rows.append(
            [
                f"reader{reader}",
                f"article{article}",
                TOPICS[topic[article]],
                "long" if long[article] else "short",
                "phone" if phone else "computer",
                str(hour),
                "yes" if opened else "no",
            ]
        )
    write_csv(folder / "data.csv", ["user", "item", "topic", "length", "device", "hour", "clicked"], iter(rows))


# Level in MW, fraction that is off on weekends, increase per degree below 16 °C.
SITES = {
    "homes-north": (0.9, 0.0, 0.055),
    "homes-south": (1.2, 0.0, 0.04),
    "offices": (2.1, 0.75, 0.02),
    "school": (0.7, 0.9, 0.03),
    "shops": (1.5, 0.35, 0.015),
    "works": (3.0, 0.5, 0.005),
}
HOLIDAYS = (0, 88, 91, 120, 129, 140)  # days of 2024: New Year, Easter, May, ...


def write_demand(folder: Path) -> None:
    """Write 20 weeks of hourly electricity demand at six sites: daily patterns, weekends, holidays, weather and noise."""
    import numpy as np

    rng, hours = np.random.default_rng(0), np.arange(20 * 7 * 24)
    day, hour = hours // 24, hours % 24
    holiday = np.isin(day, HOLIDAYS)
    rest = (day % 7 >= 5) | holiday  # 2024-01-01 was a Monday
    bump = lambda middle, width: np.exp(-0.5 * (((hour - middle + 12) % 24 - 12) / width) ** 2)

    def wander(count: int, keep: float) -> Any:
        """Return a first-order autoregressive process with unit variance."""
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
        rows += [
            [name, t.replace("T", " "), f"{p:.4f}", f"{w:.1f}", "yes" if h else "no"]
            for t, p, w, h in zip(times, power, warmth, holiday)
        ]
    write_csv(folder / "data.csv", ["site", "time", "demand", "temperature", "holiday"], iter(rows))
