def read_features(row, column):
    """Return a number with mean 0 and standard deviation 1, or 1 for its category; NaN if it is missing."""
    text, values = str(row.get(column["name"])).strip(), column["values"]
    if text.lower() in CONFIG["missing"] and text not in column["literals"]:
        return [np.nan] * max(1, len(values))
    if values:
        text = text.removesuffix(".0") if text.removesuffix(".0") in values else text
        return [float(text == value) for value in values]
    is_truth = column["kind"] == "boolean"
    number = 1 - CONFIG["truth"].index(text.lower().removesuffix(".0")) % 2 if is_truth else read_value(row, column)
    return [(number - column["mean"]) / column["std"]]


def list_known(rows, times):
    """Return what is known of each step, past or future: its features in rows, and sine and cosine of its phases in the calendar."""
    features = [np.array([read_features(row, column) for row in rows]) for column in CONFIG["covariates"]["known"]]
    turns = [2 * np.pi * find_phase(period, times)[:, None] for period in CONFIG["turns"]]
    return features + [wave for turn in turns for wave in (np.sin(turn), np.cos(turn))]


def find_phase(period, times):
    """Return where times (microseconds) are in their hour, day, week, month or year, 0 to 1."""
    if period in ("month", "year"):
        begin = times.astype("M8[us]").astype(f"M8[{period[0].upper()}]")
        first, after = (moment.astype("M8[us]").astype(np.int64) for moment in (begin, begin + 1))
        return (times - first) / (after - first)
    return (times + CONFIG["monday"] * (period == 7 * CONFIG["day"])) % period / period


def find_last(rows, moments, past, column):
    """Return the last known features until each step; those of the first known step before it, and 0 if none is known."""
    features = np.array([read_features(rows[moment.item()], column) for moment in moments])
    known = np.isfinite(features).all(1)
    if not known.any():
        return np.zeros((len(past), features.shape[1]))
    at = np.searchsorted(np.array(moments)[known], past + 1e-4 * CONFIG["least"], "right") - 1
    return features[known][at.clip(0)]


def locate(times, moments):
    """Return the place of moments among time steps, and whether they are there."""
    place = np.searchsorted(times, moments - 1e-4 * CONFIG["least"]).clip(max=len(times) - 1)
    return place, np.abs(times[place] - moments) < 1e-4 * CONFIG["least"]
