def prepare(row):
    """Return the token ids of a row: a text, or two texts in the frame of special tokens that training had."""
    texts, frame, length = [to_text(row.get(name)) for name in CONFIG["columns"]], CONFIG["frame"], CONFIG["length"]
    if not frame:
        ids = encode(texts[0], False).ids or [CONFIG["unknown"]]
        return {"tokens": np.array(ids[:length]), "segments": np.zeros(len(ids[:length]))}
    first, second = (encode(text, True).ids for text in (*texts, "")[:2])
    room = max(2, length - sum(len(frame[part]) for part in ("before", "between", "behind")))
    first = first[: max(room // 2, room - len(second))]  # a short text leaves its tokens to the other one
    second = second[: room - len(first)]
    head, tail = [*frame["before"], *first, *frame["between"]], [*second, *frame["behind"]]
    ids = [*head, *tail] or [CONFIG["unknown"]]
    marks = [frame["segments"][0]] * len(head) + [frame["segments"][1]] * len(tail)
    return {"tokens": np.array(ids), "segments": np.array(marks or [0])}


def collate(items):
    tokens, mask = pad([item["tokens"] for item in items], CONFIG["pad"])
    batch = {"tokens": tokens, "mask": mask, "segments": pad([item["segments"] for item in items], 0)[0]}
    return {name: batch[name] for name in CONFIG["inputs"]}
