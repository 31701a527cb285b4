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
        label, draw = self.condition(label, numbers), self.make_source("sample", CONFIG["shape"], numbers)
        if not LOOP["steps"]:  # a generator of one step
            return self.session.run({"noise": LOOP["prior"] * draw(), "label": label})[0]
        return run_sampler(LOOP, draw, lambda x, times: self.call(x, times, label))

    def condition(self, label, numbers):
        return label

    def make_source(self, name, shape, numbers, *mark):
        """Return a function that draws noise for each number."""
        if self.noise is not None:
            return iter(np.moveaxis(self.noise[name][numbers], 1, 0)).__next__
        streams = [np.random.default_rng([self.seed, number, *mark]) for number in numbers]
        return lambda: np.stack([s.standard_normal(shape, dtype=np.float32) for s in streams])

    def call(self, x, times, label):
        """Return the output with guidance: unconditional + guidance * (conditional - unconditional)."""
        ask = lambda label: self.session.run({CONFIG["sample"]: x, "time": times, "label": label})[0]
        if self.guidance in (0, 1):
            return ask(label * label.dtype.type(self.guidance))
        other = ask(np.zeros_like(label))
        return other + self.guidance * (ask(label) - other)


def run_sampler(loop, draw, call):
    """Return x after all steps: each is a sum of x, the last predictions of the clean sample, and new noise."""
    x, history = loop["prior"] * draw(), []
    for step in loop["steps"]:
        output = call(np.float32(step["scale"] * x), np.full(len(x), step["time"], np.float32))
        clean = step["clean"][0] * x + step["clean"][1] * output
        history = [np.clip(clean, -loop["clip"], loop["clip"]) if loop["clip"] else clean, *history[:2]]
        *factors, fresh = step["next"]
        x = sum(factor * part for factor, part in zip(factors, (x, *history)) if factor)
        x = x + fresh * draw() if fresh else x
    return x
