def shape_key(item):
    return None


def prepare(row):
    """Return the number of the class, from 1, and the record's own part; without classes 0."""
    if not CONFIG["classes"]:
        return {"label": 0, "record": {}}
    name = row[CONFIG["column"]]
    if name not in CONFIG["classes"]:
        sys.exit(f"{name!r} is no class of this model: {', '.join(CONFIG['classes'])}")
    return {"label": 1 + CONFIG["classes"].index(name), "record": {"class": name}}
