class Model(Model):
    def __init__(self, folder=HERE):
        super().__init__(folder)
        self.encoder = Session(folder, "encoder")

    def predict(self, rows, batch=BATCH, beams=CONFIG["beams"]):
        """Return the best answer to each source that a search with this many beams finds."""
        return [{"text": TOKENIZER.decode(self.search(*encode_source(row), beams)).strip()} for row in rows]

    def search(self, source, most, beams):
        """Return the token ids of the best answer, `most` at most. Beams that end are kept, and the best of the others go on."""
        cross = self.encoder.run(source)
        state = {name: np.repeat(v, beams, 1) for name, v in zip(("cross_keys", "cross_values"), cross)}
        layers, heads, width = CONFIG["shape"]
        state |= {name: np.zeros((layers, beams, heads, 0, width), dtype=np.float32) for name in ("keys", "values")}
        tokens, scores = np.tile(CONFIG["start"], (beams, 1)), np.full(beams, -np.inf, dtype=np.float32)
        scores[0], done, said = 0, [], [[] for _ in range(beams)]  # all beams begin equal, so only the first one counts
        for length in range(1, most + 1):
            logp, keys, values = self.session.run({"tokens": tokens, **state})
            scale = (len(CONFIG["start"]) - 1 + length) ** CONFIG["length_penalty"]
            likely = (scores[:, None] + logp).ravel()
            best = np.argsort(-likely, kind="stable")[: 2 * beams]
            found = [(likely[i], *divmod(int(i), logp.shape[1])) for i in best]
            ends = [token == CONFIG["end"] or length == most for *_, token in found]
            for (score, parent, token), is_end in zip(found[:beams], ends):
                if is_end and np.isfinite(score):
                    done.append((score / scale, said[parent] + [token] * (token != CONFIG["end"])))
            done = sorted(done, key=lambda entry: -entry[0])[:beams]
            going = [one for one, is_end in zip(found, ends) if not is_end][:beams]
            if not going or (len(done) == beams and going[0][0] / scale <= done[-1][0]):
                break
            scores, parents, tokens = (np.array(column) for column in zip(*going))
            said = [said[parent] + [int(token)] for parent, token in zip(parents, tokens)]
            state |= {"keys": keys[:, parents], "values": values[:, parents]}
            tokens, scores = tokens[:, None], scores.astype(np.float32)
        return done[0][1]
