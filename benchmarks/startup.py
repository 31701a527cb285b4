"""How long it takes to start: our commands beside the bare imports of torch, transformers and timm.

    python benchmarks/startup.py [--rounds 5] [--save]

Each is a new process; the median of rounds that take turns. Files are in the cache of the system after round one.
"""

from __future__ import annotations

import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

from common import HERE, make_parser, parse_options, report, time_in_turns

TV = f"import sys; sys.path.insert(0, {str(HERE.parent / 'tests')!r}); import tv"  # timm needs torchvision to import
FIRST = "import fieldguide; fieldguide.open_run({!r}).predict({!r})"


def main() -> None:
    parser = make_parser(__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=5)
    options = parse_options(parser)
    import fieldguide
    from fieldguide.data import samples

    with tempfile.TemporaryDirectory() as folder:
        run = Path(folder) / "run"
        fieldguide.fit("iris", model="mlp-s", out=run, settings={"steps": 20, "precision": "float32"})
        python, command = [sys.executable, "-c"], [sys.executable, "-m", "fieldguide"]
        jobs = {
            "python": [*python, "pass"],
            "import fieldguide": [*python, "import fieldguide"],
            "fieldguide --help": [*command, "--help"],
            "fieldguide models": [*command, "models"],
            "first prediction, from nothing": [*python, FIRST.format(str(run), str(samples.path("iris")))],
            "import torch": [*python, "import torch"],
            "import transformers": [*python, "import transformers"],
            "import transformers.AutoModel": [*python, "from transformers import AutoModel"],
            "import timm (and transformers)": [*python, TV],
        }

        def job(words: list[str]) -> None:
            subprocess.run(words, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)

        times = time_in_turns({name: lambda words=words: job(words) for name, words in jobs.items()}, options.rounds)
    base = statistics.median(times["import torch"])
    rows = [
        [name, f"{statistics.median(t):.2f}", f"{min(t):.2f}", f"{statistics.median(t) / base:.2f}"]
        for name, t in times.items()
    ]
    report("Starting up", ["", "median s", "best s", "times `import torch`"], rows, options.save)


if __name__ == "__main__":
    main()
