class Model(Model):
    def predict(self, rows, batch=BATCH, max_new_tokens=200, seed=0, **sampling):
        """Return the continuation of each prompt. With temperature=0, the most likely token is always chosen."""
        self.limit, self.choose = max_new_tokens, Chooser(seed, **{**CONFIG["options"], **sampling})
        return super().predict(rows, batch)

    def run(self, group, rows, records):
        """Generate the answers of prompts of one length: the whole prompt is read first, then one token at a time."""
        history = tokens = np.array([item["tokens"] for _, item in group])
        caches, over, made = self.empty(len(group)), np.zeros(len(group), dtype=bool), []
        while len(made) < self.limit and not over.all():
            if caches["keys"].shape[3] == CONFIG["length"]:  # full: the newer half is read again
                tokens, caches = history[:, -(CONFIG["length"] // 2) :], self.empty(len(group))
            logits, *grown = self.session.run({"tokens": tokens, **caches})
            caches, token = dict(zip(caches, grown)), self.choose(logits)
            made.append(np.where(over, -1, token))
            history, tokens = np.concatenate([history, token[:, None]], 1), token[:, None]
            over |= np.isin(token, CONFIG["ends"])
        for (number, _), ids in zip(group, np.stack(made, 1).tolist()):
            text = TOKENIZER.decode([i for i in ids if i >= 0 and i not in CONFIG["ends"]])
            records[number] = {"text": text}

    def empty(self, rows):
        shapes = [(layers, rows, heads, 0, width) for layers, heads, width in CONFIG["empty"]]
        return {name: np.zeros(shape, dtype=np.float32) for name, shape in zip(("keys", "values"), shapes)}


class Chooser:  # of the next token
    def __init__(self, seed, temperature, top_p):
        self.temperature, self.top_p, self.random = temperature, top_p, np.random.default_rng(seed)

    def __call__(self, logits):
        if self.temperature == 0:
            return logits.argmax(-1)
        p = np.exp((logits - logits.max(-1, keepdims=True)) / self.temperature)
        order = np.argsort(-p, -1, kind="stable")
        p = np.take_along_axis(p / p.sum(-1, keepdims=True), order, -1)
        p[p.cumsum(-1) - p >= self.top_p] = 0  # the tokens before it already reach top_p
        place = (p.cumsum(-1) < self.random.random((len(p), 1)) * p.sum(-1, keepdims=True)).sum(-1)
        return np.take_along_axis(order, place[:, None], -1)[:, 0]


def shape_key(item):
    return len(item["tokens"])
