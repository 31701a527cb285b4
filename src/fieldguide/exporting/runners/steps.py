def group_steps(rows):
    """Return for each name of a series its rows, each a step, with their times, in order of time."""
    series, time = {}, CONFIG["time"]
    for number, row in enumerate(rows):
        text = str(row[time]).strip().replace(" ", "T").removesuffix("Z") if time else number
        moment = np.datetime64(text, "us") if CONFIG["dates"] else float(text)
        series.setdefault(tuple(str(row[name]) for name in CONFIG["series"]), []).append((moment, number, row))
    return {name: [(t, row) for t, _, row in sorted(steps, key=lambda s: s[:2])] for name, steps in series.items()}
