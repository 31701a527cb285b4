prepare, shape_key = lambda row: {"pixels": load_pixels(row[CONFIG["column"]])[0]}, lambda item: item["pixels"].shape


class Model(Model):
    def __init__(self, folder=HERE):
        super().__init__(folder)
        self.encoder = Session(folder, "encoder")

    def predict(self, rows, batch=BATCH, classes="", templates=""):
        """Return for each image the most probable text. `classes` are separated by commas, `templates` by |."""
        self.names = [name.strip() for name in classes.split(",") if name.strip()] or CONFIG["texts"]
        if not self.names:
            sys.exit('name the classes: Model().predict(rows, classes="cat,dog"), or write them to "texts" in export.json')
        own = CONFIG["templates_of_classes" if classes else "templates"]
        ways = [way.strip() for way in templates.split("|") if way.strip()] or own
        self.texts = np.mean([self.embed([way.replace("{}", name) for name in self.names]) for way in ways], 0)
        if len(ways) > 1:
            self.texts /= np.linalg.norm(self.texts, axis=1, keepdims=True)
        return super().predict(rows, batch)

    def embed(self, texts):
        """Return the vectors of texts, of length 1."""
        batch = dict(zip(("tokens", "mask"), pad([list_tokens(text) for text in texts], CONFIG["pad"])))
        return self.encoder.run({name: batch[name] for name in self.encoder.inputs})[0]

    def run(self, group, rows, records):
        pixels = np.stack([item["pixels"] for _, item in group])
        found = dict(zip(self.session.outputs, self.session.run({"pixels": pixels, "texts": self.texts})))
        near, sure = found["similarity"], found["probabilities"]
        for (number, _), s, p in zip(group, near.tolist(), sure.tolist()):
            best = np.argsort(-np.array(p), kind="stable")[: None if len(self.names) <= CONFIG["most"] else 5]
            values = [{self.names[i]: numbers[i] for i in best} for numbers in (p, s)]
            label = {"label": self.names[best[0]], "probability": p[best[0]]}
            records[number] = {**label, **dict(zip(("probabilities", "similarity"), values))}
