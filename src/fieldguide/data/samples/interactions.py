"""Samples of events and time series: views of episodes, clicks on articles, electricity demand, motions of a hand, pumps."""

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


MOTIONS = ("circle", "eight", "shake", "tap", "wave")
MOTION_STEPS = 64


def write_motions(folder: Path) -> None:
    """Write 900 short recordings of the horizontal and vertical acceleration of a hand, which makes one of five motions."""
    import numpy as np

    rng, lines = np.random.default_rng(0), []
    for number in range(900):
        motion = MOTIONS[number % len(MOTIONS)]
        steps = MOTION_STEPS - int(rng.integers(0, 16))
        turn = 2 * np.pi * (rng.uniform(1.5, 3) * np.arange(steps) / steps + rng.uniform())
        beat = np.exp(-((((turn / (2 * np.pi)) % 1) - 0.5) ** 2) / 0.004)
        x, y = {
            "circle": (np.cos(turn), np.sin(turn)),
            "eight": (np.cos(turn), np.sin(2 * turn)),
            "shake": (np.sign(np.sin(2 * turn)) * 0.9, 0.2 * np.sin(turn)),
            "tap": (0.1 * np.sin(turn), 1.6 * beat - 0.3),
            "wave": (np.cos(turn), 0.5 * np.abs(np.sin(turn)) - 0.3),
        }[motion]
        angle, size = rng.normal(0, 0.25), rng.uniform(0.6, 1.4)
        turned = np.stack([np.cos(angle) * x - np.sin(angle) * y, np.sin(angle) * x + np.cos(angle) * y])
        drift = np.cumsum(rng.normal(0, 0.05, turned.shape), 1)
        values = size * turned + drift + 0.35 * rng.normal(size=turned.shape)
        lines.append(":".join(",".join(f"{v:.3f}" for v in channel) for channel in values) + f":{motion}")
    header = [
        "@problemName Motions",
        "@univariate false",
        "@equalLength false",
        f"@classLabel true {' '.join(MOTIONS)}",
        "@data",
    ]
    (folder / "motions.ts").write_text("\n".join([*header, *lines]) + "\n", encoding="utf-8")


PUMPS = ("north", "south")
PUMP_STEPS = 3000
FAULTS = ("spike", "stuck", "apart", "cycle")  # a jump, a sensor that stands still, channels that part, a wrong rhythm


def write_pumps(folder: Path) -> None:
    """Write two pumps' pressure, flow, temperature and vibration every ten minutes; faults in the last 40 % of the time are labeled."""
    import numpy as np

    rng, rows = np.random.default_rng(0), []
    for pump in PUMPS:
        steps = np.arange(PUMP_STEPS)
        load = 1 + 0.3 * np.sin(2 * np.pi * steps / 144) + 0.15 * np.sign(np.sin(2 * np.pi * steps / 36))
        wander = lambda size: size * np.convolve(rng.normal(size=PUMP_STEPS + 20), np.ones(20) / 20**0.5, "same")[:PUMP_STEPS]
        values = np.stack(
            [
                4 * load + wander(0.1) + 0.08 * rng.normal(size=PUMP_STEPS),
                20 * load**0.8 + wander(0.3) + 0.3 * rng.normal(size=PUMP_STEPS),
                40 + 8 * np.convolve(load, np.ones(30) / 30, "same") + wander(0.4) + 0.2 * rng.normal(size=PUMP_STEPS),
                1 + 0.5 * load + 0.1 * np.abs(rng.normal(size=PUMP_STEPS)),
            ],
            1,
        )
        fault = np.zeros(PUMP_STEPS, int)
        for number, first in enumerate(range(int(0.62 * PUMP_STEPS), PUMP_STEPS - 60, 57)):
            kind, at = FAULTS[number % len(FAULTS)], first + int(rng.integers(0, 20))
            length = {"spike": 1, "stuck": 12, "apart": 10, "cycle": 12}[kind]
            span = slice(at, at + length)
            channel = int(rng.integers(0, 4))
            spread = values[:, channel].std()
            if kind == "spike":
                values[span, channel] += rng.choice([-1, 1]) * 4 * spread
            elif kind == "stuck":
                values[span, :2] = values[at - 1, :2]
            elif kind == "apart":
                values[span, 1] -= 2.5 * values[:, 1].std()
            else:
                values[span, 3] += 1.5 * values[:, 3].std() * np.sin(np.pi * np.arange(length) / 2)
            fault[span] = 1
        times = (np.datetime64("2024-03-01T00:00") + (10 * steps).astype("m8[m]")).astype(str)
        rows += [[pump, t.replace("T", " "), *(f"{v:.3f}" for v in row), int(f)] for t, row, f in zip(times, values, fault)]
    header = ["series", "time", "pressure", "flow", "temperature", "vibration", "anomaly"]
    write_csv(folder / "data.csv", header, iter(rows))
