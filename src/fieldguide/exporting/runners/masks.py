from base64 import b64encode
from io import BytesIO


def fit(size):  # an image is at most as large as those of training
    scale = min(1.0, CONFIG["side"] / max(size))
    return tuple(max(1, round(number * scale)) for number in size)


def prepare(row):
    """Return pixels, the part of them that is resized, what it becomes, and the size of the image, each height first."""
    pixels, size = load_pixels(row[CONFIG["column"]], fit)
    inner, (height, width) = fit(size), pixels.shape[:2]
    factors = tuple(int(have / want / 2) or 1 for have, want in zip((width, height), inner))  # Pillow's `reducing_gap`
    image = Image.fromarray(pixels if pixels.shape[2] > 1 else pixels[..., 0]).reduce(factors)
    pixels = np.asarray(image).reshape(*image.size[::-1], -1)
    return {"pixels": pixels, "part": (height / factors[1], width / factors[0]), "inner": inner[::-1], "full": size[::-1]}


def shape_key(item):
    return item["pixels"].shape, item["part"], item["inner"], item["full"]


def collate(items):
    _, part, inner, full = shape_key(items[0])
    sizes = [-(-number // CONFIG["multiple"]) * CONFIG["multiple"] for number in inner] + list(full)
    batch = {name: np.arange(size, dtype=np.float64) for name, size in zip(CONFIG["sizes"], sizes)}
    return batch | {
        "pixels": np.stack([item["pixels"] for item in items]),
        "part": np.array(part),
        "inner": np.array(inner, float),
    }


def build_record(outputs, row, item):
    """Return the mask as a PNG file in a data URL, and the share of each class."""
    names, shares = CONFIG["classes"], np.bincount(outputs["map"].ravel()) / outputs["map"].size
    order = [i for i in np.argsort(-shares) if shares[i] > 0]
    image, file = Image.fromarray(outputs["map"]).convert("P"), BytesIO()
    image.putpalette(CONFIG["palette"])
    image.save(file, "PNG")
    found = ", ".join(f"{names[i]} {100 * shares[i]:.0f} %" for i in order[:5])
    mask = "data:image/png;base64," + b64encode(file.getvalue()).decode()
    return {"classes": found, "mask": mask, "shares": {names[i]: float(shares[i]) for i in order}}
