from PIL import Image, ImageOps

SUFFIXES = {".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff"}
DEEP = ("I", "F", "I;16", "I;16B", "I;16L")


def load_pixels(path, fit=lambda size: (CONFIG["side"],) * 2):
    """Return an image file as H W C uint8, upright and over white, and the size of the file's image. `fit` is what it becomes."""
    with Image.open(path) as image:
        size = image.size[::-1] if image.getexif().get(0x0112, 1) > 4 else image.size
        width, height = fit(size)
        if CONFIG["draft"] and image.format == "JPEG" and min(image.size) >= CONFIG["draft"] * max(width, height):
            image.draft(None, (2 * width, 2 * height))  # decodes at a reduced size, as in training
        image.load()
        image = ImageOps.exif_transpose(image)
        if image.mode in DEEP:
            image = to_8_bit(np.asarray(image), image.mode)
        if image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info:
            image = image.convert("RGBA")
            image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
        image = image.convert("L" if CONFIG["channels"] == 1 else "RGB")
        return np.atleast_3d(np.asarray(image)), size
