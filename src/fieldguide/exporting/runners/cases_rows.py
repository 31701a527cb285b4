def list_cases(rows):
    """Yield the series of rows, each of which is a whole series."""
    for row in rows:
        values = np.array([[read_value(row, column) for column in channel] for channel in CONFIG["channels"]])
        steps = np.flatnonzero(np.isfinite(values).any(0))
        name = {"series": " ".join(str(row[name]) for name in CONFIG["series"])} if CONFIG["series"] else {}
        yield {"name": name, "values": values[:, : steps[-1] + 1 if len(steps) else 0]}
