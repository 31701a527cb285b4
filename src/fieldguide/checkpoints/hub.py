"""Downloads from the Hugging Face Hub, only for models that the user names.

A file is downloaded to a temporary name, resumed if it was interrupted, checked against the digest that the hub
states, and then renamed. Files that exist are compared with the hub by the digests stored next to them. If the
hub is unreachable, a complete earlier download is used.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import sys
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import Any

from fieldguide.core.errors import WeightsError

NOTED = "fetched.json"  # digests of a folder's files, once all are there
CHUNK = 2**20
TOLD = 5  # seconds between words on how far a file is
TIMEOUT = 60  # seconds without a byte
KINDS = (
    "config.json",
    "*.safetensors",
    "*.safetensors.index.json",
    "tokenizer*",
    "vocab*",
    "merges.txt",
    "spiece.model",
    "spm.model",
    "sentencepiece*",
    "added_tokens.json",
    "special_tokens_map.json",
    "chat_template*",
    "generation_config.json",
    "preprocessor_config.json",
    "processor_config.json",
)
PICKLED = ("pytorch_model*.bin", "pytorch_model.bin.index.json")  # only where there are no safetensors


class Unreachable(WeightsError):
    """The hub is unreachable."""


def aloud(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def fetched(name: str, callback: Callable[[str], None] = aloud) -> Path:
    """Return the folder with the files of `organization/name` or `organization/name@revision`, downloading what is
    missing.

    `HF_ENDPOINT`, `HF_HOME` and `HF_TOKEN` have their usual meaning. Raises `WeightsError` for a model that
    does not exist, an unreachable hub, or a file whose digest differs from the hub's.
    """
    repository, _, revision = name.partition("@")
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", repository):
        raise WeightsError(f"hf:{name} is not a model name: use hf:organization/name or hf:organization/name@revision")
    revision = revision or "main"
    folder = home() / repository.replace("/", "--") / revision.replace("/", "--")
    quoted, note = urllib.parse.quote(revision, safe=""), folder / NOTED
    try:
        entries = {e["path"]: e for e in answered(f"/api/models/{repository}/tree/{quoted}", name) if e.get("type") == "file"}
    except Unreachable as error:
        if not note.is_file():
            raise
        callback(f"{error}\nUsing the files downloaded before, in {folder}")
        return folder
    wanted = chosen(list(entries))
    if not any(path.endswith((".safetensors", ".bin")) for path in wanted):
        raise WeightsError(
            f"hf:{name} holds no weights in safetensors or of torch.save; it has: {', '.join(sorted(entries)[:20])}"
        )
    folder.mkdir(parents=True, exist_ok=True)
    noted = json.loads(note.read_text()) if note.is_file() else {}
    for path in sorted(wanted):
        if noted.get(path) != digest(entries[path]) or not (folder / path).is_file():
            note.unlink(missing_ok=True)  # until all is there again
            fetch(f"/{repository}/resolve/{quoted}/{urllib.parse.quote(path)}", folder / path, entries[path], name, callback)
    note.write_text(json.dumps({path: digest(entries[path]) for path in sorted(wanted)}, indent=2))
    return folder


def chosen(paths: list[str]) -> set[str]:
    """Return the files to download: configuration, tokenizer and weights, as safetensors if there are any."""
    import fnmatch

    def of(kinds: tuple[str, ...]) -> set[str]:
        return {p for p in paths if "/" not in p and any(fnmatch.fnmatch(p, k) for k in kinds)}

    found = of(KINDS)
    if "model.safetensors" in found:  # some repositories hold the same weights in other forms beside it
        found = {p for p in found if not p.endswith(".safetensors") or p == "model.safetensors"}
    return found if any(p.endswith(".safetensors") for p in found) else found | of(PICKLED)


def home() -> Path:
    base = os.environ.get("HF_HOME") or Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "huggingface"
    return Path(base) / "fieldguide"


def opened(url: str, name: str, start: int = 0) -> Any:
    endpoint = os.environ.get("HF_ENDPOINT", "https://huggingface.co").rstrip("/")
    request = urllib.request.Request(endpoint + url, headers={"User-Agent": "fieldguide"})
    if token := os.environ.get("HF_TOKEN"):  # for the hub alone: where it sends us on to must not see it
        request.add_unredirected_header("Authorization", f"Bearer {token}")
    if start:
        request.add_header("Range", f"bytes={start}-")
    try:
        return urllib.request.urlopen(request, timeout=TIMEOUT)
    except urllib.error.HTTPError as error:
        why = {
            401: "it is private or gated: accept its terms on its page, then set HF_TOKEN",
            403: "access is denied",
            404: "this model or revision does not exist",
        }.get(error.code, error.reason)
        raise WeightsError(f"hf:{name}: {why} ({endpoint} answered {error.code})") from None
    except (urllib.error.URLError, OSError) as error:
        raise Unreachable(
            f"hf:{name}: {endpoint} cannot be reached ({getattr(error, 'reason', error)}). If the files are "
            "on this machine already, pass their folder."
        ) from None


def answered(url: str, name: str) -> list[dict[str, Any]]:
    with opened(url, name) as answer:
        return json.load(answer)


def digest(entry: dict[str, Any]) -> str:
    """Return the digest that the hub states for a file: SHA-256 for large files, git's blob hash for small ones."""
    return entry["lfs"]["oid"] if entry.get("lfs") else entry["oid"]


def digested(path: Path, entry: dict[str, Any]) -> str:
    """Return the same digest, computed from a local file."""
    check = hashlib.sha256() if entry.get("lfs") else hashlib.sha1(b"blob %d\0" % path.stat().st_size)
    with open(path, "rb") as file:
        while block := file.read(CHUNK):
            check.update(block)
    return check.hexdigest()


def fetch(url: str, path: Path, entry: dict[str, Any], name: str, callback: Callable[[str], None]) -> None:
    """Download one file, resuming an interrupted download; do nothing if the same file exists."""
    if path.is_file() and digested(path, entry) == digest(entry):
        return
    part, size = path.with_name(f"{path.name}.{digest(entry)[:12]}.part"), entry["size"]  # of this content, not another
    start = part.stat().st_size if part.is_file() and part.stat().st_size < size else 0
    with opened(url, name, start) as answer, open(part, "ab" if start and answer.status == 206 else "wb") as file:
        callback(f"{entry['path']}: {size / 1e6:,.1f} MB" + (f", from {start / 1e6:,.1f} MB on" if file.tell() else ""))
        began, told, before = time.monotonic(), time.monotonic(), file.tell()
        try:
            while block := answer.read(CHUNK):
                file.write(block)
                if (now := time.monotonic()) - told > TOLD:
                    told, done = now, file.tell()
                    left = (size - done) * (now - began) / (done - before)
                    callback(f"{entry['path']}: {done / 1e6:,.1f} of {size / 1e6:,.1f} MB; about {left:,.0f} s left")
        except OSError as error:
            raise WeightsError(
                f"hf:{name}: {entry['path']} was interrupted after {file.tell():,} of {size:,} bytes "
                f"({error}). Run again to resume the download."
            ) from None
    if part.stat().st_size < size:
        raise WeightsError(
            f"hf:{name}: {entry['path']} was interrupted after {part.stat().st_size:,} of {size:,} bytes. "
            "Run again to resume the download."
        )
    if digested(part, entry) != digest(entry):
        part.unlink()
        raise WeightsError(
            f"hf:{name}: {entry['path']} does not match the digest of the hub and was discarded. "
            "Run again; if it fails again, something between this machine and the hub alters files."
        )
    os.replace(part, path)
