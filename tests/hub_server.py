"""A local server that speaks as much of the Hugging Face Hub as huggingface_hub needs for downloads."""

from __future__ import annotations

import hashlib
import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote, urlsplit

LARGE = (".safetensors", ".bin", ".pth")


class Hub:
    """A hub with the models `org/tiny`, `org/private`, and `org/gated` and `org/blocked`, whose files are listed only.

    `models` holds the files of further models by name.

    `versions` holds the files of each branch and tag. `cuts` says how many bytes of each next large response are sent before
    the line breaks. `requests` are method, path and first byte, `headers` those of each request. If another server is the
    `store`, large files are there and requests for them are redirected.
    """

    def __init__(self, files: dict[str, bytes], models: dict[str, dict[str, bytes]] | None = None):
        self.models = models or {}
        self.versions = {"main": files}
        self.cuts: Iterator[int] = iter(())
        self.damage, self.status = False, 0
        self.store: Hub | None = None
        self.requests: list[tuple[str, str, int]] = []
        self.headers: list[dict[str, str]] = []
        stand_in = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                stand_in.answer(self)

            do_HEAD = do_GET

            def log_message(self, *_: object) -> None: ...

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        threading.Thread(target=self.server.serve_forever, daemon=True).start()
        self.address = f"http://127.0.0.1:{self.server.server_address[1]}"

    @property
    def files(self) -> dict[str, bytes]:
        return self.versions["main"]

    def downloads(self) -> list[tuple[str, int]]:
        """Return name and first byte of each file that was requested."""
        return [
            (path.rpartition("/")[2], start) for method, path, start in self.requests if method == "GET" and "/resolve/" in path
        ]

    def commit(self, revision: str, versions: dict[str, dict[str, bytes]] | None = None) -> str | None:
        versions = self.versions if versions is None else versions
        commits = {name: digest_files(files) for name, files in versions.items()}
        return commits.get(revision, revision if revision in commits.values() else None)

    def answer(self, request: BaseHTTPRequestHandler) -> None:
        path = urlsplit(request.path).path
        start = int(request.headers.get("Range", "bytes=0-").removeprefix("bytes=").removesuffix("-"))
        self.requests.append((request.command, path, start))
        self.headers.append(dict(request.headers))
        if self.status:
            return self.send(request, self.status)
        api = path.startswith("/api/models/")
        repository, _, rest = path.removeprefix("/api/models").strip("/").partition("/revision/" if api else "/resolve/")
        revision, _, name = map(unquote, rest.partition("/"))
        if repository == "org/private" and request.headers.get("Authorization") != "Bearer secret":
            return self.send(request, 401, {"X-Error-Code": "RepoNotFound"})
        versions = {"main": self.models[repository]} if repository in self.models else self.versions
        if repository not in ("org/tiny", "org/gated", "org/blocked", "org/private", *self.models):
            return self.send(request, 401, {"X-Error-Code": "RepoNotFound"})  # the hub hides which models exist
        if (commit := self.commit(revision, versions)) is None:
            return self.send(request, 404, {"X-Error-Code": "RevisionNotFound"})
        files = next(files for version, files in versions.items() if self.commit(version, versions) == commit)
        if api:
            return self.send(request, 200, body=json.dumps(listing(repository, commit, files)).encode())
        if repository == "org/gated":
            return self.send(request, 403, {"X-Error-Code": "GatedRepo", "X-Error-Message": "Access is restricted."})
        if repository == "org/blocked":
            return self.send(request, 403)
        content = files[name]
        etag = sha256(content) if name.endswith(LARGE) else blob_id(content)
        headers = {"ETag": f'"{etag}"', "X-Repo-Commit": commit, "Accept-Ranges": "bytes"}
        if self.store and name.endswith(LARGE):
            linked = {"X-Linked-Etag": f'"{etag}"', "X-Linked-Size": str(len(content)), "Location": self.store.address + path}
            return self.send(request, 302, headers | linked)
        if self.damage and name.endswith(LARGE):
            content = content[:-1] + bytes([content[-1] ^ 1])
        if start:
            headers["Content-Range"] = f"bytes {start}-{len(content) - 1}/{len(content)}"
        cut = next(self.cuts, None) if name.endswith(LARGE) and request.command == "GET" else None
        self.send(request, 206 if start else 200, headers, content[start:], cut)

    def send(
        self,
        request: BaseHTTPRequestHandler,
        status: int,
        headers: dict | None = None,
        body: bytes = b"",
        cut: int | None = None,
    ) -> None:
        request.send_response(status)
        for name, value in {"Content-Length": str(len(body)), **(headers or {})}.items():
            request.send_header(name, value)
        request.end_headers()
        if request.command == "GET":
            request.wfile.write(body[:cut])

    def close(self) -> None:
        self.server.shutdown()
        self.server.server_close()


def digest_files(files: dict[str, bytes]) -> str:
    """Return a stand-in for the hash of a commit."""
    return hashlib.sha1("".join(f"{name}{sha256(content)}" for name, content in sorted(files.items())).encode()).hexdigest()


def sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def blob_id(content: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


def listing(repository: str, commit: str, files: dict[str, bytes]) -> dict:
    siblings = []
    for name, content in files.items():
        lfs = {"sha256": sha256(content), "size": len(content), "pointerSize": 134}
        entry = {"rfilename": name, "size": len(content), "blobId": blob_id(content)}
        siblings.append(entry | ({"lfs": lfs} if name.endswith(LARGE) else {}))
    return {"id": repository, "sha": commit, "private": False, "tags": [], "downloads": 0, "likes": 0, "siblings": siblings}
