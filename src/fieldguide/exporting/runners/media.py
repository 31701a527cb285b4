read_rows = read


def read(path):
    """Yield the files of a folder, of a table, or one file: `SUFFIXES` are those that the model reads."""
    path, column = Path(path), CONFIG["column"]
    if path.is_dir():
        yield from ({column: str(p)} for p in sorted(path.rglob("*")) if p.suffix.lower() in SUFFIXES)
    elif path.suffix.lower() in SUFFIXES:
        yield {column: str(path)}
    else:
        yield from ({**row, column: str(path.parent / row[column])} for row in read_rows(path))
