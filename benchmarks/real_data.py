"""Turn the archives of real data (see `FIELDGUIDE_DATA`) into files that `fieldguide` reads, once, in a cache folder."""

from __future__ import annotations

import csv
import json
import os
import shutil
import zipfile
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

ARCHIVES = Path(os.environ.get("FIELDGUIDE_DATA", "../shared/data"))
CACHE = Path(os.environ.get("FIELDGUIDE_CACHE", Path.home() / ".cache/fieldguide")) / "benchmarks"
ADULT = (
    "age workclass fnlwgt education education_num marital_status occupation relationship race sex capital_gain capital_loss "
    "hours_per_week native_country income"
).split()


def write_csv(path: Path, header: Iterable[str], rows: Iterable[Iterable[Any]]) -> None:
    with open(path, "w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(header)
        writer.writerows(rows)


def make_tables(raw: Path, out: Path) -> None:
    with open(raw / "adult/adult-train.csv", encoding="utf-8") as file:
        write_csv(out / "adult.csv", ADULT, (row for row in csv.reader(file, skipinitialspace=True) if row))
    shutil.copy(raw / "california/housing.csv", out / "california.csv")


def make_texts(raw: Path, out: Path) -> None:
    lines = (raw / "trec/TREC.train.all").read_text("latin-1").splitlines()
    write_csv(out / "trec.csv", ("label", "text"), (line.split(" ", 1) for line in lines if line))
    clinc = json.loads((raw / "clinc150/data_full.json").read_text(encoding="utf-8"))
    write_csv(out / "clinc.csv", ("text", "label"), clinc["train"])
    shutil.copy(raw / "tinyshakespeare/input.txt", out / "tinyshakespeare.txt")
    pair = [(raw / f"multi30k/train.{lang}").read_text("utf-8").splitlines() for lang in ("de", "en")]
    write_csv(out / "multi30k.csv", ("de", "en"), zip(*pair))


def make_series(raw: Path, out: Path) -> None:
    for name in ("ETTh1", "ETTh2"):
        shutil.copy(raw / f"ett/{name}.csv", out / f"{name.lower()}.csv")


def make_beauty(raw: Path, out: Path) -> None:
    rows = []
    for line in (raw / "sequences/Beauty.txt").read_text().splitlines():
        user, *items = line.split()
        rows += [(user, item, when) for when, item in enumerate(items)]
    write_csv(out / "beauty.csv", ("user", "item", "time"), rows)


def make_imdb(raw: Path, out: Path) -> None:
    shutil.copy(raw / "imdb/train.csv", out / "imdb.csv")


def make_daquar(raw: Path, out: Path) -> None:
    with open(raw / "data_train.csv", encoding="utf-8") as file:
        rows = [(row["question"], row["answer"], f"daquar/{row['image_id']}.jpg") for row in csv.DictReader(file)]
    shutil.copytree(raw / "images", out / "daquar", dirs_exist_ok=True)
    write_csv(out / "daquar.csv", ("question", "answer", "image"), rows)


def copy_as(name: str, part: str = ".") -> Callable[[Path, Path], None]:
    """Return the maker that copies a folder of the archive."""
    return lambda raw, out: shutil.copytree(raw / part, out / name, dirs_exist_ok=True) and None


MAKERS: dict[str, Callable[[Path, Path], None]] = {
    "tables": make_tables,
    "texts": make_texts,
    "series": make_series,
    "interactions": make_beauty,
    "imdb": make_imdb,
    "cifar10": copy_as("cifar10"),
    "camvid": copy_as("camvid"),
    "bccd": copy_as("bccd", "BCCD"),
    "daquar": make_daquar,
}


def prepare(archives: Path = ARCHIVES, out: Path = CACHE) -> Path:
    """Unpack the archives that exist, and return the folder of the files made from them."""
    for name, make in MAKERS.items():
        done = out / f"{name}.done"
        if done.exists() or not (archives / f"{name}.zip").exists():
            continue
        raw = out / f"{name}.raw"
        with zipfile.ZipFile(archives / f"{name}.zip") as archive:
            archive.extractall(raw)
        make(raw, out)
        shutil.rmtree(raw)
        done.touch()
    return out


if __name__ == "__main__":
    print(prepare())
