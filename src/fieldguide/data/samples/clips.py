"""Short videos of moving digits with captions."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from fieldguide.data.samples.writers import write_csv

FRAMES, SIDE, DIGIT = 8, 16, 8  # frames, and pixels per side of a frame and of a digit
JITTER = 1  # pixels across its way by which a digit is displaced at random
DIGIT_NAMES = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
DIRECTIONS = {"left": (-1, 0), "right": (1, 0), "up": (0, -1), "down": (0, 1)}  # pixels per frame to the right and down


def write_narrated(folder: Path) -> None:
    """Write each scanned digit as it moves from the middle of a frame in one of four directions, with captions in a table."""
    import numpy as np
    from PIL import Image
    from sklearn.datasets import load_digits

    rng, data, rows = np.random.default_rng(0), load_digits(), list[list[Any]]()
    seen = dict.fromkeys(range(10), 0)
    (folder / "clips").mkdir()
    for number in rng.permutation(len(data.images)):
        digit = int(data.target[number])
        direction = list(DIRECTIONS)[seen[digit] % len(DIRECTIONS)]  # equally many of each digit
        seen[digit] += 1
        strip = draw_strip(data.images[number] * 255 / 16, direction, int(rng.integers(-JITTER, JITTER + 1)))
        name = f"clips/{len(rows):04d}.png"
        Image.fromarray(strip).save(folder / name)
        rows.append([name, f"a {DIGIT_NAMES[digit]} moving {direction}", DIGIT_NAMES[digit], direction])
    write_csv(folder / "captions.csv", ["video", "caption", "digit", "direction"], rows)


def draw_strip(digit: Any, direction: str, shift: int) -> Any:  # DIGIT DIGIT, 0 .. 255 -> SIDE FRAMES*SIDE uint8
    """Return the frames of a moving digit side by side. It leaves the frame by half; `shift` displaces it across its way."""
    import numpy as np

    across, down = DIRECTIONS[direction]
    middle, frames = (SIDE - DIGIT) // 2, []
    for step in range(FRAMES):
        left = middle + (across * step if across else shift)
        top = middle + (down * step if down else shift)
        wide = np.zeros((2 * SIDE, 2 * SIDE))  # a frame with a margin of half a side
        wide[SIDE // 2 + top : SIDE // 2 + top + DIGIT, SIDE // 2 + left : SIDE // 2 + left + DIGIT] = digit
        frames.append(wide[SIDE // 2 : -SIDE // 2, SIDE // 2 : -SIDE // 2])
    return np.concatenate(frames, 1).round().astype(np.uint8)
