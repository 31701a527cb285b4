def list_series(rows):
    """Return a dictionary from step to value for each series, by name: a row is a series, and its columns are steps."""
    name, column, series = CONFIG["series"][0], CONFIG["targets"][0], {}
    others = {name, *CONFIG["ignored"]}
    for row in rows:
        cells = [read_value(row, {**column, "name": other}) for other in row if other not in others]
        series[row[name]] = dict(enumerate(cells))
    return series
