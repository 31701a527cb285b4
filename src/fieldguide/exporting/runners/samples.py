LOOP = CONFIG["sampler"]
read_rows = read


def read(path):
    """Yield rows of a file, or a class or caption itself."""
    is_file = Path(path).suffix in (".csv", ".tsv", ".jsonl", ".ndjson")
    yield from read_rows(path) if is_file else [{CONFIG["column"]: path}]


class Model(Model):
    def predict(self, rows, batch=BATCH, seed=0, guidance=LOOP["guidance"], noise=None):
        """Return a sample for each class or caption, from noise by seed and number, or from the file `noise` (row, draw, ...)."""
        self.seed, self.guidance, self.noise = seed, guidance, np.load(noise) if noise else None
        return super().predict(rows, batch)

    def run(self, group, rows, records):
        for (number, item), x in zip(group, self.denoise(group, rows)):
            records[number] = {**item["record"], **encode_sample(x)}

    def denoise(self, group, rows):
        """Denoise samples of one shape: each step is a sum of x, the last predictions of the clean sample, and new noise."""
        numbers, label = [number for number, _ in group], np.array([item["label"] for _, item in group])
        streams = [np.random.default_rng([self.seed, number]) for number in numbers]
        draw = lambda: np.stack([s.standard_normal(CONFIG["shape"], dtype=np.float32) for s in streams])
        if self.noise is not None:
            draw = iter(np.moveaxis(self.noise[numbers], 1, 0)).__next__
        x, history = LOOP["prior"] * draw(), []
        for step in LOOP["steps"]:
            output = self.call(np.float32(step["scale"] * x), np.full(len(x), step["time"], np.float32), label)
            clean = step["clean"][0] * x + step["clean"][1] * output
            history = [np.clip(clean, -LOOP["clip"], LOOP["clip"]) if LOOP["clip"] else clean, *history[:2]]
            *factors, fresh = step["next"]
            x = sum(factor * part for factor, part in zip(factors, (x, *history)) if factor)
            x = x + fresh * draw() if fresh else x
        return x if LOOP["steps"] else self.session.run({"noise": x, "label": label})[0]  # a generator of one step

    def call(self, x, times, label):
        """Return the output with guidance: unconditional + guidance * (conditional - unconditional)."""
        ask = lambda label: self.session.run({CONFIG["sample"]: x, "time": times, "label": label})[0]
        if self.guidance in (0, 1):
            return ask(label * int(self.guidance))
        other = ask(np.zeros_like(label))
        return other + self.guidance * (ask(label) - other)
