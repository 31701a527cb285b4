read_rows, prepare, shape_key = read, dict, lambda item: None  # histories are padded


def read(path):
    """Yield the events of a file, or those of items in order of time, separated by commas."""
    name = lambda item: {CONFIG["user"]: path, CONFIG["item"]: item}
    yield from read_rows(path) if Path(path).is_file() else map(name, path.split(","))


class Model(Model):
    def predict(self, rows, batch=BATCH, count=10):
        """Return for each user of events the items that may come next, best first."""
        if count > CONFIG["most"]:
            sys.exit(f"count={count}: this model recommends at most {CONFIG['most']} items")
        found = super().predict(list_histories(rows), batch)
        if unknown := sum(record.pop("unknown") for record in found):
            print(f"{unknown} events have items that are not in the training data; they are ignored", file=sys.stderr)
        for record in found:
            kept = sum(item != "" for item in record["items"][:count])  # all others were seen
            record |= {name: record[name][:kept] for name in ("items", "scores")}
            record["recommended"] = ", ".join(record["items"])
        return found


def list_histories(rows):
    """Yield the items of each user in order of time, with their times in seconds. An event without a time is the first."""
    users, lost = {}, 0
    for row in rows:
        user, item = (read_id(row.get(CONFIG[name])) for name in ("user", "item"))
        lost += not user or not item
        if user and item:
            users.setdefault(user, []).append((find_time(row.get(CONFIG["time"]["name"])), item))
    if lost:
        print(f"{lost} events without a user or an item are ignored", file=sys.stderr)
    known = [time for events in users.values() for time, _ in events if time > -np.inf]
    latest = max([CONFIG["latest"], *map(to_seconds, known)])
    for user, events in sorted(users.items()):
        times, items = zip(*sorted(events, key=lambda event: event[0]))
        first = next((to_seconds(time) for time in times if time > -np.inf), latest)
        times = [to_seconds(time) if time > -np.inf else first for time in times]
        yield {"user": user, "items": list(items), "times": times, "latest": latest}


def read_id(value):
    text = str(int(value)) if isinstance(value, float) and value.is_integer() else str(value).strip()
    return "" if text.lower() in CONFIG["missing"] else text


def find_time(value):
    try:
        return -np.inf if read_id(value) == "" else parse_time(value)
    except (ValueError, TypeError):
        print(f"column {CONFIG['time']['name']!r}: {value!r} is read as missing, since it is no time", file=sys.stderr)
        return -np.inf


def collate(items):
    width = max(len(item["items"]) for item in items)
    fill = lambda name, value, kind: np.array([[value] * (width - len(i[name])) + i[name] for i in items], dtype=kind)
    batch = {"history": fill("items", "", object), "times": fill("times", 0, np.int64)}
    batch["request_time"], batch["user"] = (np.array([i[name] for i in items]) for name in ("latest", "user"))
    return {CONFIG["renamed"].get(name, name): batch[name] for name in CONFIG["inputs"]}


def build_record(outputs, row, item):
    ranked = {"items": outputs["items"].tolist(), "scores": outputs["scores"].astype(float).tolist()}
    return {"user": item["user"], "recommended": "", **ranked, "unknown": int(outputs["unknown"])}
