from base64 import b64encode
from io import BytesIO


def prepare(row):
    pixels, size = load_pixels(row[CONFIG["column"]])
    return {"pixels": pixels, "size": size}


def shape_key(item):
    return item["pixels"].shape


def collate(items):
    return {"pixels": np.stack([item["pixels"] for item in items])}


def build_record(outputs, row, item):
    """Return the translated image as a PNG file in a data URL, `zoom` times as large as the input."""
    levels, file = outputs["levels"].transpose(1, 2, 0), BytesIO()
    size = tuple(round(number * CONFIG["zoom"]) for number in item["size"])
    image = Image.fromarray(levels if levels.shape[2] > 1 else levels[..., 0])
    image.resize(size, Image.Resampling.BICUBIC).save(file, "PNG")
    url = "data:image/png;base64," + b64encode(file.getvalue()).decode()
    return {"image": url, "width": size[0], "height": size[1]}
