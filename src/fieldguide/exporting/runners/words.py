def prepare(row):
    """Return the token ids of a row's words, and the position of the first token of each word."""
    tokens, places = [CONFIG["cls"]], []
    for word in row[CONFIG["column"]] or []:
        ids = encode(f" {word}", True).ids or [CONFIG["unknown"]]
        if len(tokens) + len(ids) >= CONFIG["length"]:
            break
        places.append(len(tokens))
        tokens += ids
    return {"tokens": [*tokens, CONFIG["sep"]], "words": places}


def collate(items):
    tokens, mask = pad([item["tokens"] for item in items], CONFIG["pad"])
    batch = {"tokens": tokens, "mask": mask, "words": pad([item["words"] for item in items], -1)[0]}
    return {name: batch[name] for name in CONFIG["inputs"]}


def build_record(outputs, row, item):
    """Return the words, their tags, and the entities that consecutive tags make."""
    words = [str(word) for word in row[CONFIG["column"]] or []]
    codes = [int(code) for code in outputs["code"][: len(item["words"])]]
    tags = [CONFIG["tags"][code] for code in codes] + [CONFIG["outside"]] * (len(words) - len(codes))
    entities = []
    for first, last, kind in find_entities(codes):
        found = {"text": " ".join(words[first : last + 1]), "type": kind, "first": first, "last": last}
        entities.append({**found, "probability": float(outputs["probability"][first : last + 1].min())})
    return {"tokens": words, "tags": tags, "entities": entities}


def find_entities(codes):
    """Yield first word, last word and type of each entity."""
    letters = [CONFIG["letters"][code] for code in codes]  # O B I E S as 0 to 4
    kinds = [CONFIG["kinds"][code] for code in codes]
    first = 0
    for i, (letter, kind) in enumerate(zip(letters, kinds)):
        if not i or is_boundary(letters[i - 1], letter, kinds[i - 1], kind):
            first = i
        if letter and (i + 1 == len(codes) or is_boundary(letter, letters[i + 1], kind, kinds[i + 1])):
            yield first, i, CONFIG["types"][kind - 1]


def is_boundary(letter, following, kind, next_kind):
    """Return whether an entity ends or begins between two words."""
    return kind != next_kind or letter in (0, 3, 4) or following in (0, 1, 4)
