def prepare(row):
    """Return the token ids of a text, after the prompt that belongs to the column that it is in."""
    name = next((name for name in CONFIG["prompts"] if name in row), "text")
    ids = encode(CONFIG["prompts"][name] + (row.get(name) or ""), True).ids
    return {"tokens": np.array([CONFIG["cls"], *ids[: CONFIG["length"] - 2], CONFIG["sep"]])}


def collate(items):
    tokens, mask = pad([item["tokens"] for item in items], CONFIG["pad"])
    return {"tokens": tokens, "mask": mask}


def build_record(outputs, row, item):
    return {"vector": [round(number, 8) for number in outputs["vector"].astype(float).tolist()]}
