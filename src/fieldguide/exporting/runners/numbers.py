import re


def to_number(value, column):
    if isinstance(value, str):
        found = re.fullmatch(column["pattern"], value.translate(str.maketrans(CONFIG["characters"])).strip())
        digits = found[2].replace(column["format"].get("grouping", ""), "").replace(column["format"].get("decimal", "."), ".")
        value = float(digits) * (-1 if re.search(r"[-(]", found[1] + found[3]) else 1)
    return float(value) if np.isfinite(value) else np.nan
