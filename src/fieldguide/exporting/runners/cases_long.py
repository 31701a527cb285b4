def list_cases(rows):
    """Yield the series of rows, each of which is a step."""
    for name, steps in group_steps(rows).items():
        values = np.array([[read_value(row, column) for _, row in steps] for (column,) in CONFIG["channels"]])
        yield {"name": {"series": " ".join(name)}, "values": values}
