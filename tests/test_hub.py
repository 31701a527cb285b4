"""Downloads by name, from a server on this machine that speaks as the hub does: whole, broken off, damaged, refused."""

from __future__ import annotations

import hashlib
import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import torch

import fieldguide
from fieldguide.checkpoints import hub
from fieldguide.core.errors import WeightsError
from test_pretrained import gpt2


class Hub:
    """One model, `org/tiny`. `cut` bytes are sent of each large file, then the line is dead; `asked` are the ranges, `seen`
    the headers of each request. With another server as `store`, large files lie there, and the hub sends on to it."""

    def __init__(self, files: dict[str, bytes]):
        self.files, self.cut, self.asked, self.damage, self.store, self.seen = files, None, [], False, None, []
        stand_in = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                stand_in.answer(self)

            def log_message(self, *_: object) -> None: ...

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        threading.Thread(target=self.server.serve_forever, daemon=True).start()
        self.address = f"http://127.0.0.1:{self.server.server_address[1]}"

    def entries(self) -> list[dict]:
        return [{"type": "directory", "path": "onnx"}] + [
            {
                "type": "file",
                "path": name,
                "size": len(content),
                "oid": hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest(),
                **({"lfs": {"oid": hashlib.sha256(content).hexdigest()}} if name.endswith(".safetensors") else {}),
            }
            for name, content in self.files.items()
        ]

    def answer(self, request: BaseHTTPRequestHandler) -> None:
        self.seen.append(dict(request.headers))
        if self.store and request.path.endswith(".safetensors"):
            request.send_response(302)
            request.send_header("Location", self.store.address + request.path)
            return request.end_headers()
        if request.path == "/api/models/org/tiny/tree/main":
            return self.send(request, 200, json.dumps(self.entries()).encode())
        name = request.path.removeprefix("/org/tiny/resolve/main/")
        if name not in self.files:
            return self.send(request, 401 if "gated" in request.path else 404, b"no")
        content, start = self.files[name], 0
        if asked := request.headers.get("Range"):
            start = int(asked.removeprefix("bytes=").removesuffix("-"))
            self.asked.append((name, start))
        content = content[start:]
        if self.damage and name.endswith(".safetensors"):
            content = content[:-1] + bytes([content[-1] ^ 1])
        self.send(request, 206 if start else 200, content, self.cut if name.endswith(".safetensors") else None)

    def send(self, request: BaseHTTPRequestHandler, status: int, content: bytes, cut: int | None = None) -> None:
        request.send_response(status)
        request.send_header("Content-Length", str(len(content)))
        request.end_headers()
        request.wfile.write(content[:cut])

    def close(self) -> None:
        self.server.shutdown()
        self.server.server_close()


@pytest.fixture
def here(tmp_path, monkeypatch):
    gpt2().save_pretrained(tmp_path / "made")
    files = {p.name: p.read_bytes() for p in (tmp_path / "made").iterdir()}
    made = Hub(files | {"README.md": b"# words", "pytorch_model.bin": b"pickled"})
    monkeypatch.setenv("HF_ENDPOINT", made.address)
    monkeypatch.setenv("HF_HOME", str(tmp_path / "home"))
    yield made
    made.close()


def test_a_model_of_the_hub_by_name(here):
    ours, said = fieldguide.load("hf:org/tiny"), []
    tokens = torch.randint(40, (1, 5))
    torch.testing.assert_close(ours(tokens), gpt2()(tokens).logits)
    folder = hub.fetched("org/tiny", said.append)
    assert not said  # nothing is fetched twice
    assert {p.name for p in folder.iterdir()} == {"config.json", "generation_config.json", "model.safetensors", hub.NOTED}


def test_a_download_goes_on_where_it_was_broken_off(here):
    here.cut = 1000
    with pytest.raises(WeightsError, match=r"model.safetensors was interrupted after 1,000 of [\d,]+ bytes.*Run again"):
        hub.fetched("org/tiny")
    here.cut = None
    folder = hub.fetched("org/tiny")
    assert here.asked == [("model.safetensors", 1000)]
    assert (folder / "model.safetensors").read_bytes() == here.files["model.safetensors"]


def test_damage_on_the_way_is_found_and_not_kept(here):
    here.damage = True
    with pytest.raises(WeightsError, match="does not match the digest"):
        hub.fetched("org/tiny")
    assert not list(Path(hub.home()).rglob("model.safetensors*"))
    here.damage = False
    assert hub.fetched("org/tiny")


def test_a_token_is_shown_to_the_hub_alone(here, monkeypatch):
    """Large files lie elsewhere, under addresses that hold their own permission and refuse a second one."""
    monkeypatch.setenv("HF_TOKEN", "secret")
    here.store = Hub(here.files)
    try:
        assert (hub.fetched("org/tiny") / "model.safetensors").read_bytes() == here.files["model.safetensors"]
        assert all(headers["Authorization"] == "Bearer secret" for headers in here.seen)
        assert len(here.store.seen) == 1 and "Authorization" not in here.store.seen[0]
    finally:
        here.store.close()


def test_what_the_hub_has_changed_is_fetched_again(here):
    """Though it is as long as before."""
    folder = hub.fetched("org/tiny")
    before = here.files["config.json"]
    here.files["config.json"] = before[::-1]
    assert (hub.fetched("org/tiny") / "config.json").read_bytes() == before[::-1]
    (folder / "config.json").write_bytes(before)  # and nobody noted what lies there
    (folder / hub.NOTED).unlink()
    assert (hub.fetched("org/tiny") / "config.json").read_bytes() == before[::-1]


def test_parts_of_other_contents_are_not_gone_on_with(here):
    here.cut = 1000
    with pytest.raises(WeightsError, match="was interrupted"):
        hub.fetched("org/tiny")
    here.cut, here.files["model.safetensors"] = None, here.files["model.safetensors"][::-1]
    assert (hub.fetched("org/tiny") / "model.safetensors").read_bytes() == here.files["model.safetensors"] and not here.asked


def test_long_downloads_say_how_far_they_are(here, monkeypatch):
    monkeypatch.setattr(hub, "CHUNK", 1000)
    monkeypatch.setattr(hub, "TOLD", 0)
    said = []
    hub.fetched("org/tiny", said.append)
    told = [line for line in said if line.startswith("model.safetensors") and "s left" in line]
    assert len(told) == -(-len(here.files["model.safetensors"]) // 1000) and told[-1].endswith("; about 0 s left")


@pytest.mark.parametrize(
    "name, message",
    [
        ("org/other", "this model or revision does not exist"),
        ("tiny", "use hf:organization/name"),
        ("../x/y", "use hf:organization/name"),
    ],
)
def test_what_is_not_there(here, name, message):
    with pytest.raises(WeightsError, match=message):
        hub.fetched(name)


def test_without_a_network(here, monkeypatch):
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(WeightsError, match=r"cannot be reached.*pass their folder"):
        hub.fetched("org/tiny")


def test_what_is_there_serves_without_a_network(here, monkeypatch):
    folder, said = hub.fetched("org/tiny"), []
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    assert hub.fetched("org/tiny", said.append) == folder and "cannot be reached" in said[0] and str(folder) in said[0]
    with pytest.raises(WeightsError, match="was interrupted"), monkeypatch.context() as other:  # with half of what is new
        other.setenv("HF_ENDPOINT", here.address)
        here.cut, here.files["model.safetensors"] = 1000, here.files["model.safetensors"][::-1]
        hub.fetched("org/tiny")
    with pytest.raises(WeightsError, match="cannot be reached"):
        hub.fetched("org/tiny")


def test_all_of_a_tokenizer_is_fetched():
    words = {
        "tokenizer.json",
        "tokenizer_config.json",
        "vocab.txt",
        "vocab.json",
        "merges.txt",
        "added_tokens.json",
        "spm.model",
        "spiece.model",
        "tokenizer.model",
        "special_tokens_map.json",
        "generation_config.json",
        "chat_template.jinja",
    }
    assert hub.chosen([*words, "model.safetensors", "README.md", "original/tokenizer.model"]) == {*words, "model.safetensors"}


def test_pickled_weights_only_where_there_are_no_others():
    names = ["config.json", "pytorch_model.bin", "model.safetensors", "model.fp16.safetensors", "onnx/model.onnx", "vocab.txt"]
    assert hub.chosen(names) == {"config.json", "model.safetensors", "vocab.txt"}
    assert hub.chosen(names[:2]) == {"config.json", "pytorch_model.bin"}
    shards = ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors", "model.safetensors.index.json"]
    assert hub.chosen(shards) == set(shards)
