"""CLIP with ResNets, and the files of CLIP: TorchScript archives, open_clip folders, activations by checkpoint."""

from __future__ import annotations

import json
import zipfile

import pytest
import torch
from safetensors.torch import save_file

from clips import Official
from fieldguide.checkpoints import load, torchscript, weights
from fieldguide.checkpoints.weights import get_tables, translate
from fieldguide.core.errors import DataError, SettingsError, WeightsError
from fieldguide.models.convolutional.clip_resnet import CONFIG
from fieldguide.models.registry import cards, create
from fieldguide.models.transformer._shared.clip_checkpoints import OPENCLIP_CONFIG
from test_models import batch, tiny

EXACT = {"rtol": 1e-9, "atol": 1e-11}


def archives(test):
    """Suppress torch's warnings about writing and reading archives."""
    for said in ("ignore:.*torch.jit.*:DeprecationWarning", "ignore::torch.jit.TracerWarning"):
        test = pytest.mark.filterwarnings(said)(test)
    return test


@pytest.mark.parametrize("size", ["clip-rn50", "clip-rn101", "clip-rn50x4", "clip-rn50x16", "clip-rn50x64"])
def test_names_and_shapes_of_published_sizes(size):
    with torch.device("meta"):
        model = create(size)
        theirs = Official(model.config)
    renamed = translate(model.state_dict(), get_tables(model)["openai"], reverse=True)
    assert {key: x.shape for key, x in renamed.items()} == {key: x.shape for key, x in theirs.state_dict().items()}


@torch.no_grad()
def test_attention_pooling_weights():
    """The weights times the values equal the pooled output, and a matching key gets the weight."""
    model = tiny("clip-resnet")
    image = batch("clip-resnet")[0]
    pool, x = model.vision.pool, model.vision.features(image)
    *_, v = pool.project_qkv(x)
    share = pool.compute_attention(x)
    torch.testing.assert_close(share.sum(2), torch.ones(5, 4, dtype=torch.float64))
    torch.testing.assert_close(pool.proj(torch.einsum("bhn,bhnd->bhd", share, v).flatten(1)), pool(x), **EXACT)
    seen = model.attention(image)
    assert seen.shape == (5, 3, 3)
    torch.testing.assert_close(seen.sum((1, 2)), torch.ones(5, dtype=torch.float64))
    wanted = share.mean(1)[:, 1:].view(5, 3, 3)
    torch.testing.assert_close(seen, wanted / wanted.sum((1, 2), keepdim=True), **EXACT)
    assert not torch.allclose(seen, seen.mT)  # rows and columns are not taken for each other by both


def test_invalid_sizes_are_rejected():
    with pytest.raises(DataError, match="image=24"):
        create("clip-resnet-test").encode_image(torch.zeros(1, 2, 24, 25))
    with pytest.raises(SettingsError, match="multiple of 8"):
        create("clip-resnet-test", image=28)
    with pytest.raises(SettingsError, match="heads=5"):
        create("clip-resnet-test", heads=5)


def archive(path, name, half=False):
    """Return a TorchScript archive like OpenAI's, with three numbers as buffers and a tensor outside the state, and its
    output in float32.
    """
    torch.manual_seed(1)
    peer = Official(create(f"{name}-test").config).eval()
    for parameter in peer.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    for buffer, value in (("input_resolution", 24), ("context_length", 12), ("vocab_size", 30)):
        peer.register_buffer(buffer, torch.tensor(value))
    peer.unnamed = torch.ones(3)
    image, tokens, mask = batch(name, dtype=torch.float32)
    tokens = torch.where(mask, tokens, 0)
    peer = peer.half() if half else peer
    with torch.no_grad():
        torch.jit.save(torch.jit.trace(peer, (image.half() if half else image, tokens), check_trace=False), path)
        return image, tokens, mask, peer.float()(image, tokens)


@archives
@pytest.mark.parametrize("half", [False, True], ids=["float32", "float16"])
@pytest.mark.parametrize("name", ["clip", "clip-resnet"])
def test_torchscript_archives_are_read_as_by_torch(tmp_path, name, half):
    archive(tmp_path / "x.pt", name, half)
    assert torchscript.is_archive(tmp_path / "x.pt")
    found, wanted = weights.read(tmp_path / "x.pt"), torch.jit.load(tmp_path / "x.pt").state_dict()
    assert list(found) and found.keys() == wanted.keys() and "unnamed" not in found
    for key, x in wanted.items():
        assert torch.equal(found[key], x) and found[key].dtype == x.dtype, key
    torch.save(dict(wanted), tmp_path / "plain.pt")
    assert not torchscript.is_archive(tmp_path / "plain.pt")


@archives
@torch.no_grad()
@pytest.mark.parametrize("name", ["clip", "clip-resnet"])
def test_torchscript_archive_loads_into_a_network(tmp_path, name):
    image, tokens, mask, wanted = archive(tmp_path / "x.pt", name)
    model = load.load(tmp_path / "x.pt", name=f"{name}-test")
    found = model(image, tokens, mask)
    torch.testing.assert_close(found[:, 0] @ found[:, 1].T, wanted, rtol=1e-4, atol=1e-5)


@archives
def test_damaged_archives_and_other_objects_are_rejected(tmp_path):
    archive(tmp_path / "good.pt", "clip")

    def rewritten(name, change):
        with zipfile.ZipFile(tmp_path / "good.pt") as old, zipfile.ZipFile(tmp_path / name, "w") as new:
            for part in old.namelist():
                if (content := change(part, old.read(part))) is not None:
                    new.writestr(part, content)
        return tmp_path / name

    marker = tmp_path / "was-run"
    evil = b"cos\nsystem\n(S'touch " + str(marker).encode() + b"'\ntR."
    path = rewritten("evil.pt", lambda part, x: evil if part.endswith("data.pkl") else x)
    with pytest.raises(
        WeightsError, match=r"evil.pt is a TorchScript archive that cannot be read: it holds an object of type os.system"
    ):
        weights.read(path)
    assert not marker.exists()
    short = rewritten("short.pt", lambda part, x: x[: len(x) // 2] if "/data/" in part else x)
    lost = rewritten("lost.pt", lambda part, x: None if part.endswith("/data/0") else x)
    cut = rewritten("cut.pt", lambda part, x: x[:100] if part.endswith("data.pkl") else x)
    bare = rewritten("bare.pt", lambda part, x: None if "/code/" in part else x)
    for path in (short, lost, cut, bare):
        with pytest.raises(WeightsError, match=f"{path.name} is damaged or malformed"):
            weights.read(path)


def test_openai_archives_imply_their_activation():
    """ViT-B/32 of OpenAI and of LAION have the same tensors; only OpenAI's archives hold three more."""
    from fieldguide.checkpoints.identify import recognize

    with torch.device("meta"):
        state = translate(create("clip-b32").state_dict(), get_tables(create("clip-b32"))["openai"], reverse=True)
        numbers = {name: torch.zeros(()) for name in ("input_resolution", "context_length", "vocab_size")}
    with pytest.raises(WeightsError, match="could be clip-b32 or clip-b32-laion2b"):
        recognize(state, "x.pt")
    card, size, origin, _ = recognize(state | numbers, "x.pt")
    assert (card.name, size, origin) == ("clip", "clip-b32", "openai")


def test_openai_resnet_is_identified():
    from fieldguide.checkpoints.identify import recognize

    with torch.device("meta"):
        model = create("clip-rn50")
        state = translate(model.state_dict(), get_tables(model)["openai"], reverse=True)
    card, size, origin, _ = recognize(state, "RN50.pt")
    assert (card.name, size, origin) == ("clip-resnet", "clip-rn50", "openai")


def published(folder, name, quick, **said):
    """Return an open_clip folder."""
    model = create(f"{name}-test", quick=quick, channels=3)
    c = model.config
    flat = hasattr(c, "patch")
    vision = {
        "image_size": c.image,
        "width": c.dim,
        "layers": c.depth if flat else list(c.depths),
        "patch_size": c.patch if flat else None,
        "head_width": (1 if flat else 32) * c.dim // c.heads,
    }
    text = {
        "context_length": c.length,
        "vocab_size": c.vocab_size,
        "width": c.text_dim,
        "heads": c.text_heads,
        "layers": c.text_depth,
    }
    config = {
        "embed_dim": c.embed,
        **({"quick_gelu": True} if quick else {}),
        "vision_cfg": vision | said.get("vision", {}),
        "text_cfg": text | said.get("text", {}),
    }
    folder.mkdir()
    (folder / "open_clip_config.json").write_text(json.dumps({"model_cfg": config, "preprocess_cfg": {"mean": [0.5, 0.5]}}))
    state = translate(model.state_dict(), get_tables(model)["openai"], reverse=True)
    save_file({key: x.contiguous() for key, x in state.items()}, folder / "open_clip_model.safetensors")
    return model


@pytest.mark.parametrize("quick", [True, False], ids=["quick gelu", "gelu"])
@pytest.mark.parametrize("name", ["clip", "clip-resnet"])
def test_open_clip_folders(tmp_path, name, quick):
    wanted = published(tmp_path / "x", name, quick)
    model = load.load(tmp_path / "x")
    assert model.config == wanted.config and type(model) is type(wanted)
    assert all(torch.equal(x, wanted.state_dict()[key]) for key, x in model.state_dict().items())
    assert load.inspect_checkpoint(tmp_path / "x").card is cards()[name]


@pytest.mark.parametrize(
    ("part", "key", "value"),
    [
        ("vision", "timm_model_name", "vit"),
        ("vision", "mlp_ratio", 3.0),
        ("text", "hf_model_name", "roberta"),
        ("text", "pool_type", "last"),
        ("vision", "ls_init_value", 0.1),
        ("text", "no_causal_mask", True),
    ],
)
def test_unsupported_open_clip_models_are_rejected(tmp_path, part, key, value):
    published(tmp_path / "x", "clip", True, **{part: {key: value}})
    with pytest.raises(WeightsError, match=f"{part}_cfg.{key}={value!r}, which clip does not support"):
        load.load(tmp_path / "x")


def test_each_configuration_matches_one_card():
    assert cards()["clip"].configs["openclip"] is OPENCLIP_CONFIG and cards()["clip-resnet"].configs["openclip"] is CONFIG
