"""Open and run the graphs for run.py."""

import json
from pathlib import Path

import numpy as np

CONFIG = json.loads(Path(__file__).with_name("export.json").read_text(encoding="utf-8"))
