prepare, shape_key = dict, lambda item: None  # windows have one length


class Model(Model):
    def predict(self, rows, batch=BATCH):
        """Return the steps of the forecasts of all series."""
        known = {name: values for name, values in list_series(rows).items() if np.isfinite([*values.values()]).any()}
        return [step for steps in super().predict(map(cut_window, known, known.values()), batch) for step in steps]


def cut_window(name, values):
    """Return the last steps of a series from time to value, with its mean and deviation."""
    known = np.array(sorted(time for time, value in values.items() if np.isfinite(value)))
    times = list_times(known[0], 1 + int((known[-1] - known[0]) / CONFIG["least"] + 1e-4))
    place = np.searchsorted(times, known - 1e-4 * CONFIG["least"]).clip(max=len(times) - 1)
    on = np.abs(times[place] - known) < 1e-4 * CONFIG["least"]
    if not on.all():
        print(f"series {name!r}: {(~on).sum()} rows between the time steps are dropped", file=sys.stderr)
    place, seen, length = place[on], np.array([values[time] for time in known[on].tolist()]), CONFIG["length"]
    observed = np.isin(np.arange(place[-1] + 1), place)
    filled = seen[observed.cumsum() - 1][-length:]  # a missing step has the value before it
    before = (length - len(filled), 0)
    mean, std = CONFIG["standards"].get(name) or (seen.mean(), seen.std() or 1.0)
    window = {"values": np.pad(filled, before, "edge"), "observed": np.pad(observed[-length:], before)}
    return window | {"series_mean": mean, "series_std": std, "name": name, "times": times[: place[-1] + 1]}


def collate(items):
    return {name: np.array([item[name] for item in items]) for name in CONFIG["inputs"]}


def build_record(outputs, row, item):
    times = list_times(item["times"][-1], CONFIG["horizon"] + 1)[1:]
    steps = zip(times, outputs["forecast"][:, [0, *CONFIG["interval"]]].tolist())
    return [{"series": item["name"], "time": label(time), **dict(zip(("value", "low", "high"), s))} for time, s in steps]
