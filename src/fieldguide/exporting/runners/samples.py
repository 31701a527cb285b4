from sampling import make_source, run_sampler

LOOP = CONFIG["sampler"]
read_rows = read


def read(path):
    """Yield rows of a file, or a class or caption itself."""
    is_file = Path(path).suffix in (".csv", ".tsv", ".jsonl", ".ndjson")
    yield from read_rows(path) if is_file else [{CONFIG["column"]: path}]


class Model(Model):
    def predict(self, rows, batch=BATCH, seed=0, guidance=LOOP["guidance"], noise=None):
        """Return a sample for each class or caption, from noise by seed and number, or from the file `noise` (.npz: row, draw, ...)."""
        self.seed, self.guidance, self.noise = seed, guidance, np.load(noise) if noise else None
        return super().predict(rows, batch)

    def run(self, group, rows, records):
        for (number, item), x in zip(group, self.denoise(group, rows)):
            records[number] = {**item["record"], **encode_sample(x)}

    def denoise(self, group, rows):
        """Generate samples of one shape."""
        numbers, label = [number for number, _ in group], np.array([item["label"] for _, item in group])
        label, draw = self.condition(label, numbers), make_source(self.noise, "sample", self.seed, CONFIG["shape"], numbers)
        if not LOOP["steps"]:  # a generator of one step
            return self.session.run({"noise": LOOP["prior"] * draw(), "label": label})[0]
        return run_sampler(LOOP, draw, lambda x, times: self.call(x, times, label))

    def condition(self, label, numbers):
        return label

    def call(self, x, times, label):
        """Return the output with guidance: unconditional + guidance * (conditional - unconditional)."""
        ask = lambda label: self.session.run({CONFIG["sample"]: x, "time": times, "label": label})[0]
        if self.guidance in (0, 1):
            return ask(label * label.dtype.type(self.guidance))
        other = ask(np.zeros_like(label))
        return other + self.guidance * (ask(label) - other)
