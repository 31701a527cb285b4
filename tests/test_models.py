"""The contract that every architecture fulfills, over all cards. A new one only needs a row in cases.py."""

from __future__ import annotations

import copy
import inspect
import re
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from cases import CASES, Case
from fieldguide.checkpoints import weights
from fieldguide.core.card import Card
from fieldguide.core.errors import SettingsError
from fieldguide.core.settings import Settings
from fieldguide.models.initialization import make_on_meta
from fieldguide.models.registry import cards, create, find, names

EVERY = pytest.mark.parametrize("name", list(CASES))
# What they take ends in a mask of the tokens or items.
MASKED = pytest.mark.parametrize("name", [name for name in CASES if cards()[name].inputs[-1] == "mask"])
# Output types with a vector for each token or item.
PER_TOKEN = ("tokens", "items", "words", "masked-items", "towers", "sequence")
IMAGES = pytest.mark.parametrize("name", [name for name in CASES if cards()[name].input_type == "image"])

CLASSIFIERS = pytest.mark.parametrize(
    "name",
    [
        name
        for name in CASES
        if cards()[name].input_type == "image" and "label" in cards()[name].output_types and not cards()[name].solver
    ],
)


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    """Use one thread: for networks this small, more threads are slower."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def case(name: str) -> tuple[Card, Case]:
    return cards()[name], CASES[name]


def tiny(name: str, dtype: torch.dtype = torch.float64, **overrides) -> nn.Module:
    """Return a tiny network with random parameters and statistics, so that no error is hidden by zeros or ones."""
    card, row = case(name)
    torch.manual_seed(0)
    model = create(card.tiny, **{**dict(row.overrides), **overrides}).to(dtype)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.2)
        for key, buffer in model.named_buffers():
            if key.endswith("running_mean"):
                buffer.normal_(0, 0.2)
            if key.endswith("running_var"):
                buffer.uniform_(0.5, 1.5)
    return model.eval()


def batch(name: str, rows: int = 5, dtype: torch.dtype = torch.float64, seed: int = 1) -> tuple[Tensor, ...]:
    card, row = case(name)
    torch.manual_seed(seed)
    inputs = row.inputs(card.resolve_config(card.tiny, **dict(row.overrides)), rows)
    return tuple(x.to(dtype) if x.is_floating_point() else x for x in inputs)


def peer_of(model: nn.Module, name: str) -> nn.Module:
    """Return the peer of a network with its weights."""
    peer, rename = CASES[name].peer(model)
    peer = peer.to(next(model.parameters()).dtype).eval()
    peer.load_state_dict(rename(model.state_dict()))
    return peer


def meant(name: str, output: Tensor, inputs: tuple[Tensor, ...]) -> Tensor:
    """Set outputs at padding positions to zero."""
    gives = cards()[name].output_types[0]
    if gives == "ctc":
        real = torch.arange(output.shape[1]) < tiny(name).frames(inputs[-1])[:, None]
        return output * real[..., None]
    return output * inputs[-1][..., None] if gives in PER_TOKEN and cards()[name].inputs[-1] == "mask" else output


def gradients(name: str, model: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, dict[str, Tensor]]:
    """Return the output, and the gradient of every parameter for a fixed random weighting of the output."""
    model.zero_grad()
    torch.manual_seed(2)
    output = meant(name, model(*inputs), inputs)
    torch.manual_seed(3)
    (output * torch.randn(output.shape, dtype=output.dtype)).sum().backward()
    return output.detach(), {name: torch.zeros_like(p) if p.grad is None else p.grad for name, p in model.named_parameters()}


def loss(gives: str, output: Tensor, inputs: tuple[Tensor, ...] = ()) -> Tensor:
    """Return a loss with targets fixed by the output's shape, or derived from the input if it has the same shape."""
    torch.manual_seed(4)
    first = inputs[0] if inputs else output
    if gives == "label":
        members = output if output.ndim == 3 else output[:, None]
        target = torch.randint(output.shape[-1], (len(output), 1)).expand(-1, members.shape[1])
        return nn.functional.cross_entropy(members.flatten(0, 1), target.flatten())
    if gives in ("tokens", "items"):  # another target at every place, the same in all rows
        target = torch.randint(output.shape[-1], (1, output.shape[1])).expand(len(output), -1)
        return nn.functional.cross_entropy(output.transpose(1, 2), target)
    if gives == "towers":  # the first item of each row, at all places
        return nn.functional.cross_entropy(output.transpose(1, 2), first[:, :1].expand(output.shape[:2]))
    if gives in ("words", "masked-items"):  # each token's own number and one
        return nn.functional.cross_entropy(output.transpose(1, 2), (first + 1) % output.shape[-1])
    if gives == "ctc":  # two symbols for each recording, somewhere in it
        logs = output.float().log_softmax(-1).transpose(0, 1)
        target = torch.randint(1, output.shape[-1], (len(output), 2))
        return nn.functional.ctc_loss(logs, target, torch.full((len(output),), len(logs)), torch.full((len(output),), 2))
    if gives == "mask":  # bright or dark, under the middle of the picture
        top, left = ((a - b) // 2 for a, b in zip(first.shape[2:], output.shape[2:]))
        middle = first[:, 0, top : top + output.shape[2], left : left + output.shape[3]]
        return nn.functional.cross_entropy(output, (middle > 0).long())
    if gives in ("boxes", "poses", "prototypes"):  # the same answer at every point
        wanted = torch.arange(output.shape[-1]) % 2
        return nn.functional.binary_cross_entropy_with_logits(output, wanted.to(output.dtype).expand_as(output))
    if gives == "queries":  # the same box and the same classes for all
        wanted = torch.arange(output.shape[-1] - 4) % 2
        classes = nn.functional.binary_cross_entropy_with_logits(
            output[..., 4:], wanted.to(output.dtype).expand_as(output[..., 4:])
        )
        return classes + (output[..., :4] - 0.2).abs().mean()
    if gives in ("mask-queries", "prompted-masks"):  # the same classes or scores, and masks, for all
        wanted = torch.arange(output.shape[-1]) % 2
        return nn.functional.binary_cross_entropy_with_logits(output, wanted.to(output.dtype).expand_as(output))
    if gives == "regions":  # the same classes and offsets for all
        wanted = torch.arange(output.shape[-1] - 5) % 2
        return nn.functional.mse_loss(output[..., 5:], wanted.to(output.dtype).expand_as(output[..., 5:]))
    if gives == "embeddings":  # which belongs to which
        logits, target = output[:, 0] @ output[:, 1].T, torch.arange(len(output))
        return nn.functional.cross_entropy(logits, target) + nn.functional.cross_entropy(logits.T, target)
    if gives == "sigmoid-embeddings":  # whether each belongs to each
        logits, target = output[:, 0] @ output[:, 1].T, torch.eye(len(output), dtype=output.dtype)
        return nn.functional.binary_cross_entropy_with_logits(logits, target, reduction="sum") / len(output)
    if gives == "score":  # probabilities or unbounded
        return nn.functional.mse_loss(output, torch.randint(2, output.shape).to(output.dtype))
    if gives in ("image", "video"):
        wide = (
            first
            if first.shape == output.shape
            else (torch.rand(len(output), *[1] * (output.ndim - 1)) - 0.5).expand_as(output)
        )
        return nn.functional.mse_loss(output, wide.to(output.dtype))
    if gives == "forecast":  # the first value of each series goes on
        return nn.functional.mse_loss(output, first[:, :1, :, None].expand_as(output))
    if gives == "reconstruction":  # of which the code holds enough
        return nn.functional.mse_loss(output, first[..., :1].expand_as(output).to(output.dtype))
    return nn.functional.mse_loss(output, torch.rand(output.shape, dtype=output.dtype) - 0.5)


def test_every_card_has_a_row():
    assert list(cards()) and set(cards()) == set(CASES)


@EVERY
def test_docstring_has_the_required_parts(name):
    card = cards()[name]
    text = sys.modules[card.model.__module__].__doc__
    assert re.fullmatch(r"[^\n]{20,110}\.", text.splitlines()[0]), "a title line that ends with a full stop"
    assert str(card.year) in text.splitlines()[0] and card.new.endswith(".") and len(card.new) > 40
    assert "\nInitialization" in text
    assert re.search(r"^Shapes: .*B batch", text, re.M)
    source = Path(inspect.getsourcefile(card.model.forward)).read_text()  # its own file, or its base's
    forwards = re.findall(r"def forward\(.*?\) -> [^\n]*", source, re.S)  # to the last line of the signature
    assert forwards and all("# " in line and "->" in line.split("#")[-1] for line in forwards)


@EVERY
def test_config_vocabulary_is_mapped(name):
    card = cards()[name]
    assert card.tiny in card.sizes and card.tiny not in names() and card.tiny in names(tests=True)
    assert find(name) == (card, card.default) and card.default in names(family=card.family, input_type=card.input_type)
    with pytest.raises(SettingsError, match="no field 'colour'"):
        create(card.tiny, colour=1)


MANY_EXPERTS = ("deepseek-v3", "qwen3-235b-a22b", "gpt-oss-120b")  # tens of thousands of modules


@pytest.mark.parametrize("size", [pytest.param(n, marks=[pytest.mark.slow] * (n in MANY_EXPERTS)) for n in names(tests=True)])
def test_sizes_have_the_published_parameter_counts(size):
    card, _ = find(size)
    model = make_on_meta(card, card.resolve_config(size))
    assert card.sizes[size].params in (None, sum(p.numel() for p in model.parameters()))


@EVERY
def test_recipe_names_known_settings(name):
    recipe = cards()[name].recipe
    settled = Settings().with_(recipe)  # raises for what it does not know
    assert all(getattr(settled, key) == value for key, value in recipe.items())


@EVERY
def test_output_has_the_declared_shape(name):
    card, _ = case(name)
    inputs = batch(name, 3)
    assert len(inputs) == len(card.inputs)
    output = tiny(name)(*inputs)
    assert output.isfinite().all() and output.shape[0] == 3
    config = card.resolve_config(card.tiny, **dict(CASES[name].overrides))
    gives = card.output_types[0]
    if gives == "label":
        assert output.shape[-1] == getattr(config, card.names.get("num_classes", "num_classes"))
        assert tiny(name, num_classes=CASES[name].num_classes)(*inputs).shape[-1] == CASES[name].num_classes
    word = {
        "tokens": "vocab_size",
        "words": "vocab_size",
        "ctc": "vocab_size",
        "mask": "num_classes",
        "image": "channels",
        "video": "channels",
        "items": "items",
        "masked-items": "items",
        "towers": "items",
    }.get(gives, "")
    if gives == "image" and card.accepts("outputs"):  # of networks that translate images
        word = "outputs"
    width = getattr(config, card.names.get(word, word), None)
    assert {
        "score": output.shape[1:] == (1,),
        "scores": output.ndim == 4 and output.shape[1] == 1,
        "sequence": output.ndim == 3 and output.shape[:2] == inputs[0].shape[:2],
        "reconstruction": output.shape == inputs[0].shape,
        "anomaly-map": output.shape == (len(inputs[0]), *inputs[0].shape[2:]),
        "vector": output.ndim == 2,
        "label": output.ndim in (2, 3),
        "tokens": output.shape == (*inputs[-1].shape, width),
        "words": output.shape == (*inputs[-1].shape, width),
        "items": output.shape == (*inputs[-1].shape, width),
        "masked-items": output.shape == (*inputs[-1].shape, width),
        "towers": output.shape == (*inputs[-1].shape, width),
        "ctc": output.ndim == 3 and output.shape[2] == width,
        "embeddings": output.shape == (3, 2, getattr(config, "embed", None)),
        "sigmoid-embeddings": output.shape == (3, 2, getattr(config, "dim", 0) + 1),
        "video": output.shape == (*inputs[0].shape[:2], width, *inputs[0].shape[3:]),
        "mask": output.ndim == 4 and output.shape[1] == width,
        "image": output.ndim == 4 and output.shape[1] == width,
        "boxes": output.ndim == 3 and output.shape[2] == 4 * getattr(config, "bins", 0) + getattr(config, "num_classes", 0),
        "poses": output.ndim == 3
        and output.shape[2]
        == 4 * getattr(config, "bins", 0) + getattr(config, "num_classes", 0) + 3 * getattr(config, "keypoints", 0),
        "prototypes": output.ndim == 2,
        "queries": output.shape == (3, getattr(config, "queries", 0), 4 + getattr(config, "num_classes", 0) + 1),
        "scored-queries": output.shape == (3, getattr(config, "queries", 0), 4 + getattr(config, "num_classes", 0)),
        "mask-queries": output.shape[:2] == (3, getattr(config, "queries", 0))
        and output.shape[2] > getattr(config, "num_classes", 0) + 1,
        "prompted-masks": output.shape[:3] == (3, *inputs[-1].shape[1:2], getattr(config, "candidates", 0) + 1),
        "regions": output.shape == (3, getattr(config, "proposals", 0), 5 + 5 * (getattr(config, "num_classes", 0) + 1)),
        "forecast": output.ndim == 4 and output.shape[2] == inputs[0].shape[-1],
    }[gives]


@IMAGES
def test_image_networks_accept_other_sizes(name):
    card, _ = case(name)
    for channels, side in ((1, 28), (3, 32), (4, 45)):
        sizes = {"channels": channels, **({"image": side} if card.accepts("image") else {})}
        assert create(card.tiny, **sizes).eval()(torch.randn(2, channels, side, side)).isfinite().all()


@CLASSIFIERS
def test_feature_maps_match_levels(name):
    """Widths equal those in `levels`, and an image larger by one stride has one position more."""
    card, row = case(name)
    maps = {}
    for side in (224, 448):
        values = dict(row.overrides) | ({"image": side} if hasattr(card.resolve_config(card.tiny), "image") else {})
        with torch.device("meta"):
            model = create(card.tiny, **values)
            maps[side] = model.features(torch.empty(2, card.resolve_config(card.tiny, **values).channels, side, side))
    assert list(maps[224]) == list(maps[448]) == list(model.levels)
    for level, (dim, stride) in model.levels.items():
        assert maps[224][level].shape[:2] == (2, dim)
        assert [b - a for a, b in zip(maps[224][level].shape[2:], maps[448][level].shape[2:])] == [224 // stride] * 2


@EVERY
def test_initialization_is_complete_and_reproducible(name):
    """Memory is filled with NaN first, so that uninitialized parameters are detected."""
    torch.use_deterministic_algorithms(True)
    try:
        torch.manual_seed(5)
        first = create(cards()[name].tiny).state_dict()
    finally:
        torch.use_deterministic_algorithms(False)
    torch.manual_seed(5)
    second = create(cards()[name].tiny).state_dict()
    for key, tensor in first.items():
        assert tensor.isfinite().all() and torch.equal(tensor, second[key]), key


@EVERY
@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["float32", "float64"])
def test_equals_its_peer(name, dtype, training):
    """Outputs, gradients of every parameter, and buffers after training."""
    model = tiny(name, dtype)
    peer, rename = CASES[name].peer(model)
    peer = peer.to(dtype)
    peer.load_state_dict(rename({k: v.clone() for k, v in model.state_dict().items()}), strict=True)
    inputs = batch(name, 4, dtype)
    ours, our_grads = gradients(name, model.train(training), inputs)
    theirs, their_grads = gradients(name, peer.train(training), inputs)
    close = (
        {"rtol": 1e-9, "atol": 1e-11}
        if dtype == torch.float64
        else {"rtol": 2e-4 * CASES[name].slack, "atol": 2e-5 * CASES[name].slack}
    )
    torch.testing.assert_close(ours, theirs, **close)
    renamed = rename(our_grads)
    assert renamed.keys() == their_grads.keys()
    for key, grad in renamed.items():
        scale = their_grads[key].abs().max().clamp(min=1)
        torch.testing.assert_close({key: grad / scale}, {key: their_grads[key] / scale}, **close)
    their_state = peer.state_dict()
    for key, tensor in rename(model.state_dict()).items():
        torch.testing.assert_close(tensor, their_state[key], **close)


@EVERY
def test_multiply_adds_are_counted(name):
    """On the meta device, as in the advisor; at least each matrix of the head once. Lookups count nothing."""
    from fieldguide.automl import profile

    card = cards()[name]
    config = card.resolve_config(card.tiny)
    assert profile.count_multiply_adds(name, config, length=8, side=getattr(config, "image", 33)) > 0 or card.solver


@EVERY
def test_batch_equals_single_rows(name):
    """Other rows and padding change nothing."""
    card, _ = case(name)
    model, inputs = tiny(name), batch(name)
    together = meant(name, model(*inputs), inputs)
    for i in range(len(together)):
        alone, want = [x[i : i + 1] for x in inputs], together[i]
        torch.testing.assert_close(meant(name, model(*alone), alone)[0], want, rtol=1e-9, atol=1e-11)
        # Without its padding: each row of tokens stands before its mask.
        for place in [place for place, word in enumerate(card.inputs) if word.endswith("mask")]:
            length = int(alone[place].sum())
            alone[place - 1 : place + 1] = [x[:, :length] for x in alone[place - 1 : place + 1]]
            same = card.output_types[0] in PER_TOKEN
            want = want[:length] if place == len(alone) - 1 and same else want
        if "mask" in card.inputs:
            torch.testing.assert_close(model(*alone)[0], want, rtol=1e-9, atol=1e-11)
            alone = [None if word.endswith("mask") else x for word, x in zip(card.inputs, alone)]
            torch.testing.assert_close(model(*alone)[0], want, rtol=1e-9, atol=1e-11)


def is_same(model: nn.Module, a: Tensor, b: Tensor) -> bool:
    """Return whether outputs are equal: to the bit, unless the number of tokens of an expert changes how it rounds."""
    return torch.allclose(a, b, rtol=0, atol=1e-13) if hasattr(getattr(model, "config", None), "experts") else torch.equal(a, b)


@MASKED
def test_padding_content_is_never_read(name):
    model, inputs = tiny(name), list(batch(name))
    before = meant(name, model(*inputs), inputs)
    for place in [place for place, word in enumerate(cards()[name].inputs) if word.endswith("mask")]:
        tokens, mask = inputs[place - 1 : place + 1]
        other = torch.where(mask, tokens, (tokens + 1) % 30)
        assert not torch.equal(other, tokens)
        changed = [*inputs[: place - 1], other, *inputs[place:]]
        assert is_same(model, meant(name, model(*changed), inputs), before)
        empty = mask.clone()
        empty[0] = False
        assert model(*inputs[:place], empty, *inputs[place + 1 :]).isfinite().all()


NEXT = pytest.mark.parametrize(
    "name", [name for name in CASES if cards()[name].output_types[0] in ("tokens", "items", "towers")]
)


@NEXT
def test_padding_may_be_on_either_side(name):
    """For networks with one output per token, rows may be padded on the left."""
    model, inputs = tiny(name), batch(name)
    want, moved = meant(name, model(*inputs), inputs), list(inputs)
    for place in [place for place, word in enumerate(cards()[name].inputs) if word.endswith("mask")]:
        for part in (place - 1, place):
            moved[part] = torch.stack([row.roll(int((~mask).sum())) for row, mask in zip(inputs[part], inputs[place])])
    got = meant(name, model(*moved), tuple(moved))
    got = torch.stack([row.roll(-int((~mask).sum()), 0) for row, mask in zip(got, inputs[-1])])
    torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-11)


@NEXT
def test_later_tokens_are_never_read(name):
    model, inputs = tiny(name), batch(name)
    before = model(*inputs)
    *rest, tokens, mask = inputs
    cut = tokens.shape[1] // 2
    other = torch.cat([tokens[:, :cut], (tokens[:, cut:] + 1) % 30], 1)
    after = model(*rest, other, mask)
    assert is_same(model, before[:, :cut], after[:, :cut]) and not torch.allclose(before[:, cut:], after[:, cut:])


@EVERY
def test_gradient_reaches_every_parameter(name):
    _, grads = gradients(name, tiny(name).train(), batch(name, 8))
    dead = [key for key, grad in grads.items() if not grad.isfinite().all() or not grad.any()]
    assert dead == [key for key in grads if key.startswith(CASES[name].skipped or ("none is",))]


@EVERY
def test_rows_are_independent(name):
    """The gradient of one row's output with respect to another row's input is zero."""
    model, inputs = tiny(name), batch(name)
    first, *rest = inputs  # the first place of a row is never padding
    if not first.is_floating_point():
        changed = first.clone()
        changed[1] = (changed[1] + 1) % 30
    else:
        changed = first.clone()
        changed[1] = 1 - changed[1]  # a norm may remove a shift, or a scale
    before, after = model(first, *rest), model(changed, *rest)
    torch.testing.assert_close(before[[0, 2]], after[[0, 2]], rtol=1e-9, atol=1e-11)
    assert not torch.allclose(before[1], after[1])


@pytest.mark.slow
@EVERY
def test_learns_one_batch(name):
    card, row = case(name)
    if card.solver in ("none", "neighbors", "memory"):
        pytest.skip("its weights are counted or stored, or do not depend on the data")
    torch.manual_seed(0)
    model = create(card.tiny, **dict(row.overrides)).train()
    inputs = batch(name, 8, torch.float32)
    optimizer = torch.optim.AdamW(model.parameters(), row.lr)
    losses = []
    for _ in range(40):
        optimizer.zero_grad()
        value = loss(card.output_types[0], model(*inputs), inputs)
        value.backward()
        optimizer.step()
        losses.append(value.item())
        if len(losses) >= 5 and sum(losses[-5:]) / 5 < 0.4 * losses[0]:
            return
    pytest.fail(f"the loss does not fall: {losses[::10]}")


@EVERY
def test_save_and_load_round_trip(name, tmp_path):
    model, inputs = tiny(name, torch.float32), batch(name, dtype=torch.float32)
    path = weights.save(model, tmp_path / "model.safetensors")
    assert [p.name for p in tmp_path.iterdir()] == [path.name]
    torch.manual_seed(9)
    other = create(cards()[name].tiny, **dict(CASES[name].overrides)).eval()
    assert not torch.equal(other(*inputs), model(*inputs))
    assert weights.load(other, path) == []
    assert torch.equal(other(*inputs), model(*inputs))


# A network of each kind quickly, the others in `make test-all`: an export takes seconds.
EXPORTED = {
    "resnet",
    "gpt2",
    "bert",
    "t5",
    "lstm-classifier",
    "ddpm-unet",
    "yolov8",
    "patchtst",
}


@pytest.mark.parametrize("name", [n if n in EXPORTED else pytest.param(n, marks=pytest.mark.slow) for n in CASES])
# torch's own recurrent layers keep a second list of their weights, which its exporter remarks on.
@pytest.mark.filterwarnings("ignore:The tensor attributes? .*_flat_weights:UserWarning")
@pytest.mark.slow
def test_exports_with_dynamic_batch(name):
    model = tiny(name, torch.float32)
    batch_axis = torch.export.Dim("batch", min=2, max=64)
    program = torch.export.export(
        model, batch(name, 4, torch.float32), dynamic_shapes=tuple({0: batch_axis} for _ in batch(name)), strict=False
    )
    for rows in (2, 7):
        inputs = batch(name, rows, torch.float32, seed=rows)
        torch.testing.assert_close(program.module()(*inputs), model(*inputs), rtol=1e-4, atol=1e-5)


@EVERY
def test_runs_in_bfloat16_autocast(name):
    card, _ = case(name)
    model, inputs = tiny(name, torch.float32), batch(name, dtype=torch.float32)
    full = model(*inputs)
    with torch.autocast("cpu", torch.bfloat16):
        try:
            half = model(*inputs).float()
        except RuntimeError as error:  # oneDNN has no bfloat16 LSTM for CPUs below AVX-512; training then stays in float32
            if "primitive descriptor for the LSTM" not in str(error):
                raise
            pytest.skip("this CPU has no LSTM in bfloat16")
        output = model.train()(*inputs).float()
    value = loss(card.output_types[0], output, inputs)  # outside: that on probabilities is not made for autocast
    assert CASES[name].selects or (half - full).abs().max() < 0.05 * full.abs().max() + 0.05
    value.backward()
    skipped = CASES[name].skipped or ("none is",)
    assert all(
        p.grad.isfinite().all() for key, p in model.named_parameters() if p.requires_grad and not key.startswith(skipped)
    )


@EVERY
def test_copies_share_no_state(name):
    model = tiny(name)
    other = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.zero_()
    assert any(p.any() for p in model.parameters())
