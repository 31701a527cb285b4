class Model(Model):
    def predict(self, rows, batch=BATCH):
        """Return a record for each step, in order of series and time."""
        return super().predict(list_windows(rows), batch)


def list_windows(rows):
    """Yield the steps of all series, each with the values until it. A missing value is the last one before it, or else the mean."""
    for name, steps in sorted(group_steps(rows).items(), key=lambda pair: ", ".join(pair[0])):
        values = np.array([[read_value(row, column) for column in CONFIG["channels"]] for _, row in steps])
        last = np.maximum.accumulate(np.where(np.isfinite(values), np.arange(len(steps))[:, None], -1), 0)
        values = np.where(last >= 0, np.take_along_axis(values, last.clip(0), 0), CONFIG["mean"])
        for step, (moment, _) in enumerate(steps):
            at = np.arange(step + 1 - CONFIG["length"], step + 1).clip(0)
            time = str(moment.item() if CONFIG["dates"] else moment)
            yield {"place": {"series": ", ".join(name), "time": time}, "values": values[at]}


def prepare(window):
    return {"values": window["values"]}


def build_record(outputs, window, item):
    return {**window["place"], **describe_score(outputs)}
