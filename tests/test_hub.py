"""Downloads from a local server that behaves like the hub: complete, interrupted, damaged, denied."""

from __future__ import annotations

import hashlib
import itertools
import json
from pathlib import Path

import huggingface_hub
import pytest
import torch
from huggingface_hub import constants

import fieldguide
from fieldguide.checkpoints import hub
from fieldguide.core.errors import WeightsError
from hub_server import Hub
from test_pretrained import gpt2

DEAD = [1000, *[0] * 50]  # the line breaks after 1,000 bytes and stays dead


@pytest.fixture
def server(tmp_path, monkeypatch):
    gpt2().save_pretrained(tmp_path / "made")
    files = {p.name: p.read_bytes() for p in (tmp_path / "made").iterdir()}
    made = Hub(files | {"README.md": b"# words", "pytorch_model.bin": b"pickled", "onnx/model.onnx": b"graph"})
    for name in ("HF_TOKEN", "HF_HUB_CACHE", "HF_HUB_OFFLINE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HF_ENDPOINT", made.address)
    monkeypatch.setenv("HF_HOME", str(tmp_path / "home"))
    monkeypatch.setattr("time.sleep", lambda _: None)  # huggingface_hub waits before it tries again
    yield made
    made.close()


def cached_files(tmp_path: Path, name: str = "*") -> list[Path]:
    return [path for path in (tmp_path / "home").rglob(name) if path.is_file()]


def test_model_by_name(server):
    ours, lines = fieldguide.load("hf:org/tiny"), []
    tokens = torch.randint(40, (1, 5))
    torch.testing.assert_close(ours(tokens), gpt2()(tokens).logits)
    server.requests.clear()
    folder = hub.download_model("org/tiny", lines.append)
    assert not lines and not server.downloads()
    assert {p.name for p in folder.iterdir()} == {"config.json", "generation_config.json", "model.safetensors"}


def test_files_in_folders(server):
    """As of sentence-transformers; only in folders that modules.json makes likely."""
    server.files.update({"modules.json": b"[]", "1_Pooling/config.json": b"{}", "onnx/config.json": b"{}"})
    folder = hub.download_model("org/tiny")
    assert (folder / "config.json").is_file() and (folder / "1_Pooling/config.json").is_file()
    assert not (folder / "onnx").exists() and hub.find_model("org/tiny") == folder and hub.is_downloaded("org/tiny")


def test_cache_is_shared_with_huggingface_hub(server, tmp_path, monkeypatch):
    home = tmp_path / "home/hub"
    huggingface_hub.hf_hub_download("org/tiny", "model.safetensors", cache_dir=home, endpoint=server.address)
    server.requests.clear()
    folder = hub.download_model("org/tiny")
    assert folder == home / "models--org--tiny/snapshots" / server.commit("main")
    assert [name for name, _ in server.downloads()] == ["config.json", "generation_config.json"]
    assert huggingface_hub.try_to_load_from_cache("org/tiny", "config.json", home, "main") == str(folder / "config.json")
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "other"))
    assert hub.download_model("org/tiny").is_relative_to(tmp_path / "other")


def test_revisions(server):
    server.versions["v/1"] = server.files | {"config.json": b"{}"}
    assert (hub.download_model("org/tiny@v/1") / "config.json").read_bytes() == b"{}"
    commit = server.commit("v/1")
    assert hub.download_model(f"org/tiny@{commit}").name == commit
    assert hub.download_model("org/tiny").name == server.commit("main") != commit


def test_interrupted_download_continues(server, monkeypatch):
    monkeypatch.setattr(constants, "DOWNLOAD_CHUNK_SIZE", 250)
    server.cuts = iter([1000, 500])
    folder = hub.download_model("org/tiny")
    assert server.downloads()[-3:] == [("model.safetensors", 0), ("model.safetensors", 1000), ("model.safetensors", 1500)]
    assert (folder / "model.safetensors").read_bytes() == server.files["model.safetensors"]


def test_interrupted_download_keeps_complete_files(server, tmp_path):
    server.cuts = iter(DEAD)
    with pytest.raises(WeightsError, match=r"the download of model.safetensors was interrupted \(.*\). Run again"):
        hub.download_model("org/tiny")
    assert cached_files(tmp_path, "config.json") and not cached_files(tmp_path, "*.incomplete")
    server.cuts = iter(())
    server.requests.clear()
    folder = hub.download_model("org/tiny")
    assert server.downloads() == [("model.safetensors", 0)]
    assert (folder / "model.safetensors").read_bytes() == server.files["model.safetensors"]


def test_damaged_file_is_discarded(server, tmp_path):
    server.damage = True
    with pytest.raises(WeightsError, match=r"model.safetensors does not match the digest"):
        hub.download_model("org/tiny")
    assert max(path.stat().st_size for path in cached_files(tmp_path)) < len(server.files["model.safetensors"])
    server.damage = False
    assert (hub.download_model("org/tiny") / "model.safetensors").read_bytes() == server.files["model.safetensors"]


def test_interrupted_verification_discards_the_file(server, tmp_path, monkeypatch):
    def interrupt(*_):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt), monkeypatch.context() as patch:
        patch.setattr(hashlib, "file_digest", interrupt)
        hub.download_model("org/tiny")
    assert not cached_files(tmp_path, "model.safetensors")
    server.requests.clear()
    hub.download_model("org/tiny")
    assert server.downloads() == [("model.safetensors", 0)]


def test_token_is_sent_to_the_hub_only(server, monkeypatch):
    """Large files are on other servers, with signed addresses."""
    monkeypatch.setenv("HF_TOKEN", "secret")
    server.store = Hub(server.files)
    try:
        assert (hub.download_model("org/tiny") / "model.safetensors").read_bytes() == server.files["model.safetensors"]
        assert all(headers["authorization"] == "Bearer secret" for headers in map(lowered, server.headers))
        assert len(server.store.headers) == 1 and "authorization" not in lowered(server.store.headers[0])
    finally:
        server.store.close()


def lowered(headers: dict[str, str]) -> dict[str, str]:
    return {name.lower(): value for name, value in headers.items()}


def test_changed_files_are_downloaded_again(server):
    """Also if they are as long as before; unchanged files are not."""
    hub.download_model("org/tiny")
    server.requests.clear()
    server.files["config.json"] = server.files["config.json"][::-1]
    folder = hub.download_model("org/tiny")
    assert (folder / "config.json").read_bytes() == server.files["config.json"]
    assert (folder / "model.safetensors").read_bytes() == server.files["model.safetensors"]
    assert server.downloads() == [("config.json", 0)]


def test_parts_of_other_contents_are_not_continued(server):
    server.cuts = iter(DEAD)
    with pytest.raises(WeightsError, match="was interrupted"):
        hub.download_model("org/tiny")
    server.cuts, server.files["model.safetensors"] = iter(()), server.files["model.safetensors"][::-1]
    server.requests.clear()
    assert (hub.download_model("org/tiny") / "model.safetensors").read_bytes() == server.files["model.safetensors"]
    assert all(start == 0 for _, start in server.downloads())


def test_long_downloads_report_progress(server, monkeypatch, capsys):
    monkeypatch.setattr(constants, "DOWNLOAD_CHUNK_SIZE", 1000)
    lines = []
    hub.download_model("org/tiny", lines.append)
    size = len(server.files["model.safetensors"])
    assert lines[-1] == f"model.safetensors: {size / 1e6:,.1f} MB"  # done before the first line is due
    monkeypatch.setattr(hub, "LOG_INTERVAL_S", 0)
    server.files["model.safetensors"] = server.files["model.safetensors"][::-1]
    hub.download_model("org/tiny")
    progress = [
        line for line in capsys.readouterr().err.splitlines() if line.startswith("model.safetensors") and "s left" in line
    ]
    assert len(progress) == -(-size // 1000) and progress[-1].endswith("; about 0 s left")


@pytest.mark.parametrize(
    "name, message",
    [
        ("org/other", "this model does not exist, or it is private"),
        ("org/private", "For a private model set HF_TOKEN"),
        ("org/tiny@v2", "this revision does not exist"),
        ("org/gated", "access is gated. Accept the terms"),
        ("org/blocked", r"the hub refuses the request \(403 Forbidden"),
        ("tiny", "use hf:organization/name"),
        ("../x/y", "use hf:organization/name"),
        ("org/a--b", "use hf:organization/name"),
    ],
)
def test_inaccessible_models(server, name, message):
    with pytest.raises(WeightsError, match=message):
        hub.download_model(name)


def test_private_model_with_token(server, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "secret")
    assert (hub.download_model("org/private") / "config.json").is_file()


def test_model_without_weights(server):
    server.versions["main"] = {"config.json": b"{}", "model.gguf": b"GGUF"}
    with pytest.raises(WeightsError, match=r"holds no weights.*it has: config.json, model.gguf"):
        hub.download_model("org/tiny")


def test_unreachable_hub(server, monkeypatch):
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(WeightsError, match=r"cannot be reached.*pass their folder"):
        hub.download_model("org/tiny")


@pytest.mark.parametrize("variable, value", [("HF_ENDPOINT", "http://127.0.0.1:9"), ("HF_HUB_OFFLINE", "1")])
def test_earlier_download_is_used_without_a_network(server, monkeypatch, variable, value):
    folder, lines = hub.download_model("org/tiny"), []
    server.requests.clear()
    monkeypatch.setenv(variable, value)
    for name in ("org/tiny", f"org/tiny@{server.commit('main')}"):
        assert hub.download_model(name, lines.append) == folder
        assert "cannot be reached" in lines[-1] and str(folder) in lines[-1]
    with pytest.raises(WeightsError, match="cannot be reached"):
        hub.download_model("org/tiny@v1")
    assert not server.requests


@pytest.mark.parametrize("status", [429, 503])
def test_earlier_download_is_used_if_the_hub_is_busy(server, status):
    folder, lines = hub.download_model("org/tiny"), []
    server.status = status
    assert hub.download_model("org/tiny", lines.append) == folder and "cannot be reached" in lines[0]


def test_incomplete_download_is_not_used(server, monkeypatch):
    server.cuts = iter(DEAD)
    with pytest.raises(WeightsError, match="was interrupted"):
        hub.download_model("org/tiny")
    with pytest.raises(WeightsError, match="cannot be reached"), monkeypatch.context() as patch:
        patch.setenv("HF_HUB_OFFLINE", "1")
        hub.download_model(f"org/tiny@{server.commit('main')}")
    server.cuts = iter(())
    folder = hub.download_model("org/tiny")
    server.cuts, server.files["model.safetensors"] = iter(DEAD), server.files["model.safetensors"][::-1]
    with pytest.raises(WeightsError, match="was interrupted"):
        hub.download_model("org/tiny")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert hub.download_model("org/tiny") == folder  # the earlier commit is complete


def test_shards_are_complete_only_together(server, monkeypatch):
    names = ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"]
    index = {"weight_map": dict(zip("ab", names, strict=True))}
    shards = {name: name.encode() * 100 for name in names}
    server.versions["main"] = {"config.json": b"{}", "model.safetensors.index.json": json.dumps(index).encode(), **shards}
    server.cuts = itertools.chain([10**6], DEAD)
    with pytest.raises(WeightsError, match=r"model-00002-of-00002.safetensors was interrupted"):
        hub.download_model("org/tiny")
    commit = server.commit("main")
    with pytest.raises(WeightsError, match="cannot be reached"), monkeypatch.context() as patch:
        patch.setenv("HF_HUB_OFFLINE", "1")
        hub.download_model(f"org/tiny@{commit}")
    server.cuts = iter(())
    assert {p.name for p in hub.download_model("org/tiny").iterdir()} == set(server.files)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert hub.download_model(f"org/tiny@{commit}").name == commit


def test_pickled_weights_are_downloaded_without_safetensors(server):
    del server.files["model.safetensors"]
    folder = hub.download_model("org/tiny")
    assert {p.name for p in folder.iterdir()} == {"config.json", "generation_config.json", "pytorch_model.bin"}


def test_all_files_of_a_tokenizer_are_chosen():
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
    assert hub.choose_files([*words, "model.safetensors", "README.md", "original/tokenizer.model"]) == {
        *words,
        "model.safetensors",
    }


def test_safetensors_are_preferred():
    names = ["config.json", "pytorch_model.bin", "model.safetensors", "model.fp16.safetensors", "onnx/model.onnx", "vocab.txt"]
    assert hub.choose_files(names) == {"config.json", "model.safetensors", "vocab.txt"}
    assert hub.choose_files(names[:2]) == {"config.json", "pytorch_model.bin"}
    shards = ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors", "model.safetensors.index.json"]
    assert hub.choose_files([*shards, "2_Dense/model.safetensors", "onnx/config.json"]) == set(shards)


def test_names_in_files_are_not_downloaded(server, tmp_path, monkeypatch):
    """A stranger's run, or an adapter, must neither contact the hub nor send the token."""
    monkeypatch.setenv("HF_TOKEN", "secret")
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    record = {"peft_type": "LORA", "r": 2, "lora_alpha": 2, "base_model_name_or_path": "org/tiny"}
    (adapter / "adapter_config.json").write_text(json.dumps(record))
    (adapter / "adapter_model.safetensors").write_bytes(b"")
    with pytest.raises(WeightsError, match=r"(?s)adapter of another model.*hf:org/tiny.*names in files are not downloaded"):
        fieldguide.load(adapter)
    with pytest.raises(WeightsError, match="names in files are not downloaded"):
        hub.find_model("org/tiny")
    assert not server.requests
    hub.download_model("org/tiny")  # the user names it
    server.requests.clear()
    assert (hub.find_model("org/tiny") / "model.safetensors").exists()
    assert not server.requests


def test_a_resumed_run_finds_its_checkpoint_without_the_hub(server, tmp_path, monkeypatch):
    from fieldguide.checkpoints import load

    asked = []

    def record(source, name=None, callback=None, download=True):
        asked.append((source, download))
        raise WeightsError("recorded")

    text = tmp_path / "texts.csv"
    text.write_text("text,label\n" + "".join(f"{'good' if i % 2 else 'bad'} thing {i},{i % 2}\n" for i in range(60)))
    run = fieldguide.fit(text, "label", model="bert-mini", out=tmp_path / "run", settings={"steps": 1, "batch_size": 8})
    stolen = json.loads((run.path / "run.json").read_text())
    stolen["model"]["fresh"], stolen["request"]["weights"], stolen["status"] = [], "hf:org/tiny", "training"
    (run.path / "run.json").write_text(json.dumps(stolen))
    for path in (run.path / "checkpoints").glob("*"):
        path.unlink()
    monkeypatch.setattr(load, "inspect_checkpoint", record)
    with pytest.raises(WeightsError, match="recorded"):
        fieldguide.resume(run.path)
    assert asked == [("hf:org/tiny", False)] and not server.requests


def test_pipelines_of_diffusers(server, tmp_path, monkeypatch):
    """The parts of a pipeline: one form of each weight, without the safety checker and the whole pipeline as a single file."""
    import diffusion_pipelines

    diffusion_pipelines.stable_diffusion().save_pretrained(tmp_path / "sd")
    files = {p.relative_to(tmp_path / "sd").as_posix(): p.read_bytes() for p in (tmp_path / "sd").rglob("*") if p.is_file()}
    more = ("v1-5-pruned.safetensors", "v1-5-pruned.ckpt", "safety_checker/model.safetensors", "safety_checker/config.json")
    forms = (
        "unet/diffusion_pytorch_model.fp16.safetensors",
        "unet/diffusion_pytorch_model.bin",
        "text_encoder/pytorch_model.bin",
    )
    server.versions["main"] = files | dict.fromkeys(
        (*more, *forms, "unet/diffusion_pytorch_model.non_ema.safetensors"), b"other"
    )
    predictor = fieldguide.pipeline("hf:org/tiny")
    assert len(predictor.predict("a cat", steps=1, width=32, height=32)) == 1
    folder = hub.find_model("org/tiny")
    assert {p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file()} == files.keys()
    assert hub.is_downloaded("org/tiny")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert fieldguide.pipeline("hf:org/tiny").signature == predictor.signature
    (folder / "vae/diffusion_pytorch_model.safetensors").unlink()
    assert not hub.is_downloaded("org/tiny")
    with pytest.raises(WeightsError, match="HF_HUB_OFFLINE"):
        fieldguide.pipeline("hf:org/tiny")


def test_forms_of_the_weights_of_pipelines():
    index, shards = (
        "diffusion_pytorch_model.safetensors.index.json",
        [f"diffusion_pytorch_model-0000{i}-of-00002" for i in (1, 2)],
    )
    transformer = {f"transformer/{name}" for name in ("config.json", index, *(f"{name}.safetensors" for name in shards))}
    half = {"text_encoder/model.fp16.safetensors", "text_encoder/config.json", "scheduler/scheduler_config.json"}
    words = {"tokenizer/vocab.json", "tokenizer/merges.txt", "tokenizer_2/spiece.model", "tokenizer_2/tokenizer.json"}
    wanted = {"model_index.json", *transformer, *half, *words}
    others = {
        "flux1-dev.safetensors",
        "README.md",
        "text_encoder/pytorch_model.bin",
        "ae.safetensors",
        "tokenizer/flax.msgpack",
    }
    assert hub.choose_files(wanted | others) == wanted
