from collections import Counter


class Model(Model):
    def predict(self, rows, batch=BATCH, threshold=CONFIG["threshold"]):
        """Return a record for each image, with the objects whose score reaches the threshold."""
        records = super().predict(rows, batch)
        for record in records:
            record["objects"] = [one for one in record["objects"] if one["score"] >= threshold]
            counts = Counter(one["label"] for one in record["objects"]).most_common()
            record["found"] = ", ".join(f"{n} {name}" for name, n in counts) or "nothing"
        return records


def prepare(row):
    pixels, size = load_pixels(row[CONFIG["column"]])
    return {"pixels": pixels, "size": np.array(size, dtype=np.float32)}


def build_record(outputs, row, item):
    """Return all objects, with boxes (left, top, right, bottom) in pixels of the image."""
    found = []
    for i, (label, score) in enumerate(zip(outputs["labels"], outputs["scores"])):
        if label:
            box = [round(float(v), 1) for v in outputs["boxes"][i]]
            found.append({"label": str(label), "score": float(score), "box": box})
            if CONFIG["parts"]:
                points = zip(CONFIG["parts"], outputs["keypoints"][i])
                found[-1]["keypoints"] = [
                    {"name": name, "x": round(float(x), 1), "y": round(float(y), 1), "score": float(p)}
                    for name, (x, y, p) in points
                ]
    return {"found": "", "objects": found}
