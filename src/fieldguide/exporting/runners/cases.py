class Model(Model):
    def predict(self, rows, batch=BATCH):
        """Return a record for each series."""
        cases = list(list_cases(rows))
        usable = [c for c in cases if c["values"].shape[1] > 1 and np.isfinite(c["values"]).any()]
        if len(usable) < len(cases):
            print(f"{len(cases) - len(usable)} series without values, or with a single step, are dropped", file=sys.stderr)
        return super().predict(usable, batch)


def prepare(case):
    """Return a series, C T, as steps of channels: gaps are interpolated, and long series are averaged over `factor` steps."""
    values, steps = case["values"], np.arange(case["values"].shape[1])
    for row, mean in zip(values, CONFIG["mean"]):
        known = np.isfinite(row)
        row[:] = np.interp(steps, steps[known], row[known]) if known.any() else mean
    if CONFIG["by_series"]:
        std, own = values.std(1, keepdims=True), np.array(CONFIG["std"])[:, None]
        values = (values - values.mean(1, keepdims=True)) / np.where(std > 1e-9 * own, std, own)
    if CONFIG["factor"] > 1:
        edges = np.linspace(0, len(steps), max(round(len(steps) / CONFIG["factor"]), 1) + 1)
        sums = np.pad(values.cumsum(1), ((0, 0), (1, 0)))
        values = np.diff([np.interp(edges, np.arange(len(steps) + 1), row) for row in sums]) / np.diff(edges)
    values, after = values[:, : CONFIG["length"]], max(CONFIG["length"] - values.shape[1], 0)
    return {"values": np.pad(values, ((0, 0), (0, after))).T, "steps": np.int64(values.shape[1])}


build_record = lambda outputs, case, item: {**case["name"], **classify(outputs)}
