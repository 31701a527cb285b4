from datetime import datetime, timezone


def read_time(value):
    time = datetime.fromisoformat(str(value).strip())
    time = time.astimezone(timezone.utc) if time.tzinfo and CONFIG["zone"] else time
    return round(time.replace(tzinfo=timezone.utc).timestamp() * 1e6)  # microseconds since 1970


def label(time):
    text = str(np.datetime64(int(time), "us").astype(f"M8[{CONFIG['parts']}]")).replace("T", " ")
    return f"{text.removesuffix(' 00:00:00') if CONFIG['days'] else text} {CONFIG['zone']}".strip()
