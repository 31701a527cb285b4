from datetime import datetime, timedelta

ORDER = {"dmy": (6, 5, 4), "mdy": (6, 4, 5), "ymd": (4, 5, 6)}
DATE = re.compile(
    r"(?:(\d{4})[-/.](\d{1,2})[-/.](\d{1,2})|(\d{1,2})\s*[-/. ]\s*(\d{1,2})\s*[-/. ]\s*(\d{4}|\d\d)\.?)(?:[T\s,:]\s*"
    r"(\d{1,2})(?::(\d\d)(?::(\d\d(?:[.,]\d+)?))?)?\s*([AaPp](?:[Mm]|\.[Mm]\.?))?\s*(Z|[+-]\d\d:?(?:\d\d)?)?)?"
)


def prepare(row):
    """Return a number or text for each column that the model reads; NaN or "" if it is missing or cannot be read."""
    item = {}
    for column in CONFIG["columns"]:
        name, convert = column["name"], {"number": to_number, "date": to_days}.get(column["kind"], to_text)
        if name not in row:
            raise SystemExit(f"row {row!r:.200} lacks the column {name!r}")
        value, found = row[name].strip() if isinstance(row[name], str) else row[name], "" if convert is to_text else np.nan
        is_missing = str(value).lower() in CONFIG["missing"] and value not in column["literals"]
        try:
            found = found if is_missing else convert(value, column)
        except (ValueError, TypeError):
            print(f"column {name!r}: {value!r} is read as missing, since it is not a {column['kind']}", file=sys.stderr)
        item[CONFIG["renamed"].get(name, name)] = np.array(found, dtype=object if convert is to_text else np.float64)
    return item


def to_text(value, column):
    if column["kind"] == "boolean":
        return ("true", "false")[CONFIG["truth"].index(str(value).lower().removesuffix(".0")) % 2]
    return str(int(value)) if isinstance(value, float) and value.is_integer() else str(value)


def to_days(value, column):
    """Return days since 1970 of a date: ISO, or three numbers in the order of the training data, with a time or not."""
    found, form = DATE.fullmatch(str(value)), column["format"]
    if not found or not (found[1] or form.get("order")) or (found[7] and not found[8] and not found[10]):
        raise ValueError(value)
    year, month, day = (int(found[i]) for i in ((1, 2, 3) if found[1] else ORDER[form["order"]]))
    year += 0 if year > 99 else 1900 if year >= 69 else 2000
    hour, minute, second = (float((part or "0").replace(",", ".")) for part in found.groups()[6:9])
    hour = hour % 12 + 12 * (found[10][0] in "Pp") if found[10] and hour < 13 else hour
    if hour + minute / 60 > 24 or minute > 59 or second >= 60 or (found[11] and "zone" not in form):
        raise ValueError(value)
    zone = (found[11] or "Z").replace("Z", "+00").replace(":", "") if form.get("zone") == "UTC" else "+00"
    minute -= int(zone[0] + "1") * (60 * int(zone[1:3]) + int(zone[3:] or 0))
    return (datetime(year, month, day) - datetime(1970, 1, 1) + timedelta(0, second, 0, 0, minute, hour)) / timedelta(1)
