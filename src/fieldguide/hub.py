"""Downloads from the Hugging Face hub, when and only when the user names a model there.

Files come whole or not at all: each is written aside, goes on where an earlier attempt stopped, is checked against the
digest that the hub states, and only then gets its name.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import Any

from fieldguide.errors import WeightsError

CHUNK = 2 ** 20
TIMEOUT = 60                                             # seconds without a byte
KINDS = ("config.json", "*.safetensors", "*.safetensors.index.json", "tokenizer*", "vocab*", "merges.txt", "spiece.model",
         "sentencepiece*", "special_tokens_map.json", "generation_config.json", "preprocessor_config.json")
PICKLED = ("pytorch_model*.bin", "pytorch_model.bin.index.json")     # only where there are no safetensors


def fetched(name: str, watch: Callable[[str], None] = lambda text: None) -> Path:
    """The folder that holds the files of `organisation/name` or `organisation/name@revision`; what is there stays.

    `HF_ENDPOINT`, `HF_HOME` and `HF_TOKEN` mean what they mean elsewhere. Raises `WeightsError` for a model that is not
    there, a network that cannot be reached, or a file whose digest is another than the hub's.
    """
    repository, _, revision = name.partition("@")
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", repository):
        raise WeightsError(f"hf:{name} is no model of the hub: say hf:organisation/name, or hf:organisation/name@revision")
    revision = revision or "main"
    entries = [e for e in answered(f"/api/models/{repository}/tree/{urllib.parse.quote(revision, safe='')}", name)
               if e.get("type") == "file"]
    wanted = chosen([e["path"] for e in entries])
    if not any(path.endswith((".safetensors", ".bin")) for path in wanted):
        raise WeightsError(f"hf:{name} holds no weights in safetensors or of torch.save; it has: "
                           f"{', '.join(sorted(e['path'] for e in entries)[:20])}")
    folder = home() / repository.replace("/", "--") / revision.replace("/", "--")
    folder.mkdir(parents=True, exist_ok=True)
    for entry in entries:
        if entry["path"] in wanted:
            fetch(f"/{repository}/resolve/{urllib.parse.quote(revision, safe='')}/{urllib.parse.quote(entry['path'])}",
                  folder / entry["path"], entry, name, watch)
    return folder


def chosen(paths: list[str]) -> set[str]:
    """The files of a model that are of use: configuration, tokenizer, and weights, as safetensors where there are such."""
    import fnmatch
    of = lambda kinds: {p for p in paths if "/" not in p and any(fnmatch.fnmatch(p, k) for k in kinds)}     # noqa: E731
    found = of(KINDS)
    if "model.safetensors" in found:                     # some repositories hold the same weights in other forms beside it
        found = {p for p in found if not p.endswith(".safetensors") or p == "model.safetensors"}
    return found if any(p.endswith(".safetensors") for p in found) else found | of(PICKLED)


def home() -> Path:
    base = os.environ.get("HF_HOME") or Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "huggingface"
    return Path(base) / "fieldguide"


def opened(url: str, name: str, start: int = 0) -> Any:
    endpoint = os.environ.get("HF_ENDPOINT", "https://huggingface.co").rstrip("/")
    headers = {"User-Agent": "fieldguide"}
    if token := os.environ.get("HF_TOKEN"):
        headers["Authorization"] = f"Bearer {token}"
    if start:
        headers["Range"] = f"bytes={start}-"
    try:
        return urllib.request.urlopen(urllib.request.Request(endpoint + url, headers=headers), timeout=TIMEOUT)
    except urllib.error.HTTPError as error:
        why = {401: "it is private or gated: accept its terms on its page, then set HF_TOKEN", 403: "you may not read it",
               404: "there is no such model or revision"}.get(error.code, error.reason)
        raise WeightsError(f"hf:{name}: {why} ({endpoint} answered {error.code})") from None
    except (urllib.error.URLError, OSError) as error:
        raise WeightsError(f"hf:{name}: {endpoint} cannot be reached ({getattr(error, 'reason', error)}). Where the files lie "
                           "on this machine already, give their folder.") from None


def answered(url: str, name: str) -> list[dict[str, Any]]:
    with opened(url, name) as answer:
        return json.load(answer)


def digest(path: Path, entry: dict[str, Any]) -> bool:
    """Whether a file is what the hub says it is: SHA-256 of large files, git's blob hash of small ones."""
    large = entry.get("lfs")
    check = hashlib.sha256() if large else hashlib.sha1(b"blob %d\0" % path.stat().st_size)
    with open(path, "rb") as file:
        while block := file.read(CHUNK):
            check.update(block)
    return check.hexdigest() == (large["oid"] if large else entry["oid"])


def fetch(url: str, path: Path, entry: dict[str, Any], name: str, watch: Callable[[str], None]) -> None:
    """One file, going on where it was broken off."""
    if path.is_file() and path.stat().st_size == entry["size"]:
        return
    part = path.with_name(path.name + ".part")
    start = part.stat().st_size if part.is_file() and part.stat().st_size < entry["size"] else 0
    with opened(url, name, start) as answer, open(part, "ab" if start and answer.status == 206 else "wb") as file:
        watch(f"{entry['path']}: {entry['size'] / 1e6:,.1f} MB" + (f", from {start / 1e6:,.1f} MB on" if start else ""))
        try:
            while block := answer.read(CHUNK):
                file.write(block)
        except OSError as error:
            raise WeightsError(f"hf:{name}: {entry['path']} broke off after {part.stat().st_size:,} of {entry['size']:,} bytes "
                               f"({error}). Ask again to go on from there.") from None
    if part.stat().st_size < entry["size"]:
        raise WeightsError(f"hf:{name}: {entry['path']} broke off after {part.stat().st_size:,} of {entry['size']:,} bytes. "
                           "Ask again to go on from there.")
    if not digest(part, entry):
        part.unlink()
        raise WeightsError(f"hf:{name}: {entry['path']} is not what the hub says it is (another digest); it was not kept. "
                           "Ask again; where it happens again, something between here and the hub changes files.")
    os.replace(part, path)
