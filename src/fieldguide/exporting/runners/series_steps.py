def list_series(rows):
    """Return a dictionary from time to value for each series, by name: a row is a step, or the steps of several series."""
    series, targets = {}, CONFIG["targets"]
    for number, row in enumerate(rows):
        owner = ", ".join(str(row[name]) for name in CONFIG["series"])
        time = read_time(row[CONFIG["time"]]) if CONFIG["time"] else number
        for column in targets:
            name = column["name"] if not owner else owner if len(targets) == 1 else f"{owner}: {column['name']}"
            series.setdefault(name, {}).setdefault(time, read_value(row, column))
    return series
