"""Predict with an exported network: python run.py INPUT... prints one JSON record for each row (see README.md).

From Python: `import run; run.Model().predict([row, ...])`.
"""

import csv
import json
import sys
from pathlib import Path

import numpy as np
from session import Session

HERE = Path(__file__).resolve().parent
CONFIG = json.loads((HERE / "export.json").read_text(encoding="utf-8"))
BATCH = 64  # rows


class Model:  # in `folder`
    def __init__(self, folder=HERE):
        self.session = Session(folder)

    def predict(self, rows, batch=BATCH):
        """Return a record for each row. Rows of one shape enter the model together."""
        rows, groups, batch = list(rows), {}, min(batch, CONFIG.get("batch", batch))
        records = [None] * len(rows)
        for number, row in enumerate(rows):
            item = prepare(row)
            group = groups.setdefault(shape_key(item), [])
            group.append((number, item))
            if len(group) == batch:
                self.run(groups.pop(shape_key(item)), rows, records)
        for group in groups.values():
            self.run(group, rows, records)
        return records

    def run(self, group, rows, records):
        outputs = self.session.run(collate([item for _, item in group]))
        for i, (number, item) in enumerate(group):
            records[number] = build_record({k: v[i] for k, v in zip(self.session.outputs, outputs)}, rows[number], item)


def read(path):
    """Yield the rows of a CSV, TSV or JSON Lines file as dictionaries."""
    with open(path, encoding="utf-8-sig", newline="") as file:
        if Path(path).suffix in (".jsonl", ".ndjson"):
            yield from (json.loads(line) for line in file if line.strip())
        else:
            delimiter = max(",;\t|", key=file.readline().count)
            file.seek(0)
            yield from csv.DictReader(file, delimiter=delimiter)


def main():
    if not sys.argv[1:]:
        sys.exit(__doc__)
    for record in Model().predict(row for path in sys.argv[1:] for row in read(path)):
        print(json.dumps(record, ensure_ascii=False))
