import regex

prepare = dict  # of a window


def list_windows(row):
    """Yield the windows of a row: its question, with a piece of its context."""
    context, question = ((row.get(name) or "").strip() for name in CONFIG["columns"])
    frame, encoded = CONFIG["frame"], encode(context, True)
    head = [*frame["before"], *encode(question, True).ids[: CONFIG["question"]], *frame["between"]]
    room, size = CONFIG["length"] - len(head) - len(frame["behind"]), len(encoded.ids)
    stride = min(CONFIG["stride"], max(room // 2, room - CONFIG["longest"]))
    for first in [0] if size <= room else [*range(0, size - room, min(stride, room)), size - room]:
        piece, behind = encoded.ids[first : first + room], frame["behind"]
        yield {
            "tokens": [*head, *piece, *behind],
            "segments": np.repeat(frame["segments"], (len(head), len(piece) + len(behind))),
            "answerable": np.repeat((0, 1, 0), (len(head), len(piece), len(behind))),
            "spans": [(0, 0)] * len(head) + encoded.offsets[first : first + room],
        }


def collate(items):
    batch = {name: pad([item[name] for item in items], 0)[0] for name in ("segments", "answerable")}
    batch["tokens"], batch["mask"] = pad([item["tokens"] for item in items], CONFIG["pad"])
    return {name: batch[name] > 0 if name == "answerable" else batch[name] for name in CONFIG["inputs"]}


def build_record(outputs, row, item):  # log-probabilities of the best span and of none; first and last token in characters
    return float(outputs["score"]), float(outputs["none"]), *(item["spans"][place] for place in outputs["place"])


class Model(Model):
    def predict(self, rows, batch=BATCH):
        """Return a record for each row: the best answer of its windows."""
        windows = [(row, [*list_windows(row)]) for row in rows]
        found = iter(super().predict([window for _, some in windows for window in some], batch))
        return [choose_answer(row, [next(found) for _ in some]) for row, some in windows]


def choose_answer(row, found):
    """Return the record of a row from the best spans of its windows."""
    context, none = (row[CONFIG["columns"][0]] or "").strip(), min(one[1] for one in found)
    score, _, first, last = max(found, key=lambda one: one[0])
    begin, end = widen(context, *first)[0], widen(context, *last)[1]
    if end <= begin or (CONFIG["threshold"] is not None and score - none <= CONFIG["threshold"]):
        return {"answer": "", "start": None, "end": None, "probability": float(np.exp(none))}
    piece = context[begin:end].strip()
    begin = context.index(piece, begin)
    return {"answer": piece, "start": begin, "end": begin + len(piece), "probability": float(np.exp(score))}


def widen(text, begin, end):
    """Return the characters of a token, without whitespace before it, or of the words that it is part of."""
    begin += len(text[begin:end]) - len(text[begin:end].lstrip())
    words = [word.span() for word in regex.finditer(CONFIG["word"], text)] if CONFIG["word"] else []
    before = [first for first, last in words if first <= begin < last]
    after = [last for first, last in words if first < end < last and begin < end]
    return [*before, begin][0], [*after, end][0]
