from collections import Counter


def prepare(row):
    pixels, size = load_pixels(row[CONFIG["column"]])
    return {"pixels": pixels, "size": np.array(size, dtype=np.float32)}


def build_record(outputs, row, item):
    """Return the objects whose score reaches the threshold, with boxes (left, top, right, bottom) in pixels of the image."""
    found = []
    for i, (label, score) in enumerate(zip(outputs["labels"], outputs["scores"])):
        if label and score >= CONFIG["threshold"]:
            box = [round(float(v), 1) for v in outputs["boxes"][i]]
            found.append({"label": str(label), "score": float(score), "box": box})
            if CONFIG["parts"]:
                points = zip(CONFIG["parts"], outputs["keypoints"][i])
                found[-1]["keypoints"] = [
                    {"name": name, "x": round(float(x), 1), "y": round(float(y), 1), "score": float(p)}
                    for name, (x, y, p) in points
                ]
    counts = Counter(one["label"] for one in found).most_common()
    return {"found": ", ".join(f"{n} {name}" for name, n in counts) or "nothing", "objects": found}
