"""Images, recordings and texts."""

from __future__ import annotations

import base64
import io
import re
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field, replace

from markupsafe import Markup, escape
from PIL import Image

from fieldguide.core.report_elements import Code, Gallery, Legend, Picture, Quote, Quotes, Sounds
from fieldguide.report.charts import NOTHING
from fieldguide.report.tables import build_remark, fold
from fieldguide.report.text import clean_text, draw_label, el, format_number, join, join_units

MAX_QUOTES, MAX_PICTURES = 50, 60  # on the page per element; the number of others is stated
MAX_IMAGE_BYTES = 2_000_000  # of all images of a page
MAX_SIDE = 512  # pixels per side, for the enlarged view
MAX_WIDE_SIDE = 800  # the same for tiles of wide galleries
MAX_CAPTION_CHARACTERS, MAX_QUOTE_CAPTION_CHARACTERS = 160, 400
MAX_QUOTE_CHARACTERS = 20_000  # of a text on the page, unfolded
MAX_UNFOLDED_CHARACTERS, MAX_UNFOLDED_LINES = 240, 6  # of a text that is folded
BLANK_LINES = re.compile(r"\n[ \t]*\n\s*\n")
MIN_SHADE = 0.15  # weights of a text that are smaller than this fraction of the largest one are not shaded
MAX_SOUND_BYTES = 3_000_000  # of all recordings of a page
SOUND_TYPES = {b"RIFF": "wav", b"fLaC": "flac", b"OggS": "ogg", b"ID3": "mpeg", b"\xff": "mpeg"}  # first bytes -> type


@dataclass
class PageMedia:
    """Images and recordings of the page that is drawn. Repeated images are stored once; the total size is limited."""

    repeated: set[bytes] = field(default_factory=set)
    placed: dict[bytes, tuple[str, str]] = field(default_factory=dict)
    image_bytes: int = 0
    sound_bytes: int = 0


_page_media: ContextVar[PageMedia] = ContextVar("page_media")


@contextmanager
def open_page(repeated: set[bytes]) -> Iterator[None]:
    """Draw a page inside; `repeated` are the images that occur several times on it."""
    token = _page_media.set(PageMedia(repeated))
    try:
        yield
    finally:
        _page_media.reset(token)


def draw_gallery(element: Gallery) -> Markup:
    """Return images with captions, and those beyond the first two rows folded. The script of the page enlarges them."""
    page = _page_media.get(None) or PageMedia()
    tiles, left_out = [], max(0, len(element.pictures) - MAX_PICTURES)
    for picture in element.pictures[:MAX_PICTURES]:
        image = build_views(picture, page) if picture.views else build_image(picture.image, picture.caption, page, element.wide)
        left_out += image is None
        if image is not None:
            caption = draw_label("span", join_units(picture.caption), MAX_CAPTION_CHARACTERS, class_="caption", dir="auto")
            tiles.append(el("li", image, caption, class_="bad" if picture.bad else None))
    if not tiles and not left_out:
        return NOTHING
    tall = element.wide or any(p.views for p in element.pictures)
    box = el("ul", *tiles, class_="gallery wide" if tall else "gallery")
    return join([fold(box, len(tiles), 6 if tall else 9, "images"), note_left_out(left_out, "image")])


def build_views(picture: Picture, page: PageMedia) -> Markup | None:
    """Return the views of an example side by side with their names, or None if the size limit of the page is reached."""
    views = []
    for name, content in {picture.view: picture.image, **picture.views}.items():
        image = build_image(content, f"{name}: {picture.caption}", page)
        if image is None:
            return None
        views.append(el("span", image, el("span", name, class_="view-name") if name else None, class_="view"))
    return el("div", *views, class_="views")


def note_left_out(count: int, what: str) -> Markup:
    be = " is" if count == 1 else "s are"
    return build_remark(f"{format_number(count)} more {what}{be} left out to keep this page small." if count else "")


def build_image(content: bytes, caption: str, page: PageMedia, wide: bool = False) -> Markup | None:
    """Return the markup of an image, or None if the size limit of the page is reached."""
    if content in page.placed:
        name, view = page.placed[content]
        return el("svg", el("use", href=f"#{name}"), viewBox=view, role="img", aria_label=caption)
    try:
        kind, data, (width, height) = embed(content, MAX_WIDE_SIDE if wide else MAX_SIDE)
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError):  # what Pillow raises
        return el("span", "This image cannot be read.", class_="broken")
    if page.image_bytes + len(data) > MAX_IMAGE_BYTES:
        return None
    page.image_bytes += len(data)
    source = f"data:image/{kind};base64,{base64.b64encode(data).decode()}"
    small = "pixels" if max(width, height) <= 96 else None  # enlarge digits and icons without blurring
    if content not in page.repeated:
        return el("img", src=source, alt=caption, width=width, height=height, class_=small)
    name, view = f"picture-{len(page.placed)}", f"0 0 {width} {height}"
    page.placed[content] = name, view
    image = el("image", id=name, href=source, width=width, height=height, class_=small)
    return el("svg", image, viewBox=view, role="img", aria_label=caption)


def embed(data: bytes, largest: int = MAX_SIDE) -> tuple[str, bytes, tuple[int, int]]:
    """Return format, bytes and size of an image for the page; large ones are downscaled."""
    with Image.open(io.BytesIO(data)) as image:
        kind, size = (image.format or "").lower(), image.size
        if kind not in ("png", "jpeg", "webp", "gif"):
            raise ValueError(f"image format {kind or 'unknown'} is not PNG, JPEG, WebP or GIF")
        if max(size) <= largest or len(data) <= 24_000:
            return kind, data, size
        image.draft("RGB", (largest, largest))  # lets JPEG decode at a fraction of its size
        clear = "A" in image.getbands() or "transparency" in image.info
        smaller = image.convert("RGBA" if clear else "RGB")
        smaller.thumbnail((largest, largest))
        kind, out = "webp" if clear else "jpeg", io.BytesIO()  # JPEG is several times faster to write than PNG
        smaller.save(out, kind, quality=80)
        return kind, out.getvalue(), smaller.size


def draw_sounds(element: Sounds) -> Markup:
    """Return recordings with audio players; those beyond the size limit of the page are only counted."""
    page = _page_media.get(None) or PageMedia()
    items, left_out = [], 0
    for sound in element.sounds:
        kind = next((kind for head, kind in SOUND_TYPES.items() if sound.sound.startswith(head)), None)
        if kind and page.sound_bytes + len(sound.sound) > MAX_SOUND_BYTES:
            left_out += 1
            continue
        player = el("span", "This recording cannot be played.", class_="broken")
        if kind:
            page.sound_bytes += len(sound.sound)
            source = f"data:audio/{kind};base64,{base64.b64encode(sound.sound).decode()}"
            player = el("audio", src=source, controls="", preload="metadata", aria_label=sound.caption)
        items.append(
            el(
                "li",
                player,
                el("span", join_units(sound.caption), class_="caption", dir="auto"),
                class_="bad" if sound.bad else None,
            )
        )
    if not items and not left_out:
        return NOTHING
    return join([el("ul", *items, class_="sounds"), note_left_out(left_out, "recording")])


def draw_quotes(element: Quotes) -> Markup:
    """Return texts with captions. Long texts show their beginning only, and many texts are folded."""
    items = []
    for quote in element.quotes[:MAX_QUOTES]:
        cut = max(0, len(quote.text) - MAX_QUOTE_CHARACTERS)
        if not quote.weights:
            quote = replace(quote, text=BLANK_LINES.sub("\n\n", quote.text.strip("\n")))
        body = el("p", mark_weights(quote), dir="auto", class_="text")
        start = find_beginning(quote.text)
        if len(start) < len(quote.text):
            more = el("span", f"all {format_number(len(quote.text))} characters", class_="more")
            summary = el("summary", el("span", mark_weights(quote, len(start)), " …", class_="text start", dir="auto"), more)
            body = el("details", summary, body)
        note = f"{format_number(cut)} more characters are not shown." if cut else ""
        caption = draw_label("span", join_units(quote.caption), MAX_QUOTE_CAPTION_CHARACTERS, class_="caption", dir="auto")
        items.append(el("li", body, build_remark(note), caption, class_="bad" if quote.bad else None))
    if not items:
        return NOTHING
    box = fold(el("ul", *items, class_="quotes"), len(items), 6, "texts")
    return join([box, note_left_out(len(element.quotes) - len(items), "text")])


def find_beginning(text: str) -> str:
    """Return the part of a text that is shown unfolded: the whole text if it is not much longer."""
    lines = list(re.finditer("\n", text))
    if len(text) <= MAX_UNFOLDED_CHARACTERS * 4 // 3 and len(lines) <= MAX_UNFOLDED_LINES:
        return text
    start = text[: lines[MAX_UNFOLDED_LINES - 1].start()] if len(lines) >= MAX_UNFOLDED_LINES else text
    return start[:MAX_UNFOLDED_CHARACTERS].rsplit(" ", 1)[0] if len(start) > MAX_UNFOLDED_CHARACTERS else start


def mark_weights(quote: Quote, end: int = MAX_QUOTE_CHARACTERS) -> Markup:
    """Return the text up to `end` with its weighted parts shaded."""
    text, parts, place = quote.text[:end], [], 0
    largest = max((abs(weight) for *_, weight in quote.weights), default=0.0) or 1.0
    for start, stop, weight in sorted(quote.weights):
        if place <= start < stop <= len(text) and abs(weight) / largest >= MIN_SHADE:
            shade = f"--shade:{abs(weight) / largest:.2f}"
            parts += [text[place:start], el("mark", text[start:stop], style=shade, class_="against" if weight < 0 else None)]
            place = stop
    return join(escape(clean_text(part)) for part in (*parts, text[place:]))


def draw_legend(element: Legend) -> Markup:
    """Return names next to their colors."""
    items = (
        el("li", el("i", style=f"background: rgb({red} {green} {blue})"), name)
        for name, (red, green, blue) in element.colors.items()
    )
    return el("ul", *items, class_="colors")


def draw_code(element: Code) -> Markup:
    """Return source code or commands; long lines are wrapped."""
    return el("pre", el("code", element.code))
