def read_value(row, column):
    value = row.get(column["name"])
    try:
        return np.nan if str(value).strip().lower() in CONFIG["missing"] else to_number(value, column)
    except (ValueError, TypeError):
        raise SystemExit(f"column {column['name']!r}: {value!r} is no number") from None
