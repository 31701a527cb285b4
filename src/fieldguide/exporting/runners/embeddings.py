class Model(Model):
    def __init__(self, folder=HERE):
        super().__init__(folder)
        self.text, self.prior = Session(folder, "text"), Session(folder, "prior")

    def condition(self, label, numbers):
        """Return an embedding of an image for each text: of several samples of the prior the one that fits the text best."""
        loop, count = CONFIG["prior"], CONFIG["prior"]["candidates"]
        found = zip(self.text.outputs, self.text.run({"label": label}))
        texts = {name: values.repeat(count, 0) for name, values in found}
        none = {name: np.zeros_like(values) for name, values in texts.items()} | {"mask": np.ones_like(texts["mask"])}
        rows = [count * number + k for number in numbers for k in range(count)]

        def call(x, times):
            batch = {"embedding": x, "time": times}
            without, with_text = (self.prior.run({**batch, **inputs})[0] for inputs in (none, texts))
            return without + loop["guidance"] * (with_text - without)

        x = run_sampler(loop, make_source(self.noise, "prior", self.seed, [len(loop["mean"])], rows, 1), call)
        fit = ((x * loop["std"] + loop["mean"]) * texts["pooled"]).sum(1).reshape(-1, count)
        return np.float32(x.reshape(len(fit), count, -1)[np.arange(len(fit)), fit.argmax(1)])
