from base64 import b64encode
from io import BytesIO


def prepare(row):
    return {"pixels": load_pixels(row[CONFIG["column"]])[0]}


def build_record(outputs, row, item):
    """Return the score, 1 at the threshold, the place of the largest value, and the map as a PNG file: 255 for values from 2 on."""
    heat, score, file = outputs["map"], float(outputs["score"]), BytesIO()
    y, x = np.unravel_index(heat.argmax(), heat.shape)
    Image.fromarray(np.rint(np.clip(heat * 127.5, 0, 255)).astype(np.uint8)).save(file, "PNG")
    return {
        "anomaly": score >= 1,
        "score": score,
        "at": {"x": (float(x) + 0.5) / heat.shape[1], "y": (float(y) + 0.5) / heat.shape[0]},
        "map": "data:image/png;base64," + b64encode(file.getvalue()).decode(),
    }
