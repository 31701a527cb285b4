"""Fine-tuning: LoRA, frozen networks, layer-wise rates, gradual unfreezing, gradient checkpointing; and fits from
checkpoints.
"""

from __future__ import annotations

import json
import shutil

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks

import fieldguide
from fieldguide.automl import fit as fitting
from fieldguide.automl.fit import NullCallback, finish, fit, resume
from fieldguide.checkpoints import load, weights
from fieldguide.core.errors import SettingsError, WeightsError, WeightsWarning
from fieldguide.core.settings import Settings
from fieldguide.data import read
from fieldguide.data.loader import Batches
from fieldguide.inference.run import open_run
from fieldguide.models.registry import create, find
from fieldguide.objectives import Classification, Supervised
from fieldguide.training import peft
from fieldguide.training.state import Interrupted
from fieldguide.training.trainer import Trainer
from test_tasks_resume import StopAt, log
from tv import timm, torchvision, transformers

HEAD = ["head.weight", "head.bias"]
FAST = {"batch": 8, "precision": "float32", "evaluate": 2}


def settled(**changes) -> Settings:
    return Settings().with_(
        {
            "steps": 6,
            "batch": 8,
            "evaluate": 100,
            "precision": "float32",
            "channels_last": False,
            "minutes": 0,
            "schedule": "constant",
            "warmup": 0.0,
        }
        | changes
    )


def texts(count: int = 32, classes: int = 3) -> Batches:
    generator = torch.Generator().manual_seed(3)
    tokens = torch.randint(1, 30, (count, 7), generator=generator)
    mask = torch.arange(7) < torch.randint(2, 8, (count, 1), generator=generator)
    return Batches(count, lambda index, _: {"tokens": tokens[index], "mask": mask[index], "target": tokens[index, 0] % classes})


def pictures(count: int = 32, classes: int = 3) -> Batches:
    x = torch.randn(count, 3, 32, 32, generator=torch.Generator().manual_seed(3))
    return Batches(count, lambda index, _: {"image": x[index], "target": (torch.as_tensor(index) % classes)})


def bert(**changes) -> nn.Module:
    torch.manual_seed(0)
    return create("bert-test", output_type="label", **changes)


def trainer(model: nn.Module, batches: Batches, settings: Settings) -> Trainer:
    objective = Supervised(
        model, ("tokens", "mask") if "tokens" in batches.make(np.arange(1), None) else ("image",), Classification()
    )
    return Trainer(objective, batches, settings, device=torch.device("cpu"), callback=NullCallback())


def copied(model: nn.Module) -> dict[str, Tensor]:
    return {name: t.detach().clone() for name, t in model.state_dict().items()}


def randomised(model: nn.Module) -> None:
    """Set low-rank parts to random values other than zero."""
    torch.manual_seed(5)
    for name, p in model.named_parameters():
        if name.endswith(".b"):
            p.data.normal_(std=0.3)


# ------------------------------------------------------------------------------------------------ low rank


def test_lora_equals_its_equation():
    """Outputs and gradients of both parts (arXiv:2106.09685, equation 3)."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(5, 4)).double()
    weight, bias = (p.detach().clone() for p in net.parameters())
    peft.prepare(net, settled(tune="lora", lora_rank=2, lora_scale=1.7), [])
    low = net[0].parametrizations.weight[0].double()
    assert low.a.shape == (2, 5) and low.b.shape == (4, 2) and not low.b.any() and low.a.any()
    x, target = torch.randn(3, 5).double(), torch.randn(3, 4).double()
    torch.testing.assert_close(net(x), x @ weight.T + bias)  # it begins as what it was
    low.b.data.normal_()
    ((net(x) - target) ** 2).sum().backward()
    a, b = low.a.detach().clone().requires_grad_(), low.b.detach().clone().requires_grad_()
    y = x @ weight.T + 1.7 * (x @ a.T) @ b.T + bias
    torch.testing.assert_close(net(x), y)
    ((y - target) ** 2).sum().backward()
    torch.testing.assert_close(low.a.grad, a.grad)
    torch.testing.assert_close(low.b.grad, b.grad)
    assert {n for n, p in net.named_parameters() if p.grad is not None} == {
        "0.parametrizations.weight.0.a",
        "0.parametrizations.weight.0.b",
    }


def test_lora_trains_only_new_parameters_and_merges(tmp_path):
    model = bert()
    peft.prepare(model, settled(tune="lora", lora_rank=2), HEAD)
    changed = {n.removesuffix(".parametrizations.weight.0.a") for n, _ in model.named_parameters() if n.endswith(".a")}
    assert changed == {
        "pool",
        *(f"blocks.{i}.{part}" for i in (0, 1) for part in ("attn.qkv", "attn.proj", "mlp.up", "mlp.down")),
    }
    before = copied(model)
    loop = trainer(model, texts(), settled(tune="lora", lr=0.05, weight_decay=0.1))
    loop.train()
    moved = {name for name, t in model.state_dict().items() if not torch.equal(t, before[name])}
    assert moved == {n for n, _ in model.named_parameters() if n.endswith((".0.a", ".0.b"))} | set(HEAD)
    batch = texts().make(np.arange(8), None)
    expected, names = model.eval()(batch["tokens"], batch["mask"]), list(bert().state_dict())
    peft.merge(loop.objective)
    assert list(dict(model.named_parameters())) and set(model.state_dict()) == set(names)
    assert all(type(m) in (nn.Linear, type(m)) and not hasattr(m, "parametrizations") for m in model.modules())
    torch.testing.assert_close(model(batch["tokens"], batch["mask"]), expected, rtol=0, atol=1e-6)
    fieldguide.save(model, tmp_path, "hf")
    theirs = transformers.BertForSequenceClassification.from_pretrained(tmp_path).eval()
    torch.testing.assert_close(theirs(batch["tokens"], batch["mask"]).logits, expected, rtol=1e-4, atol=1e-5)
    exported = torch.export.export(model, (batch["tokens"], batch["mask"])).module()
    torch.testing.assert_close(exported(batch["tokens"], batch["mask"]), expected, rtol=1e-4, atol=1e-5)


def test_lora_with_tied_embeddings():
    model = create("llama-test", tie_embeddings=True)
    peft.prepare(model, settled(tune="lora"), [])
    assert not any(name.startswith(("embed.", "head.")) for name, p in model.named_parameters() if p.requires_grad)
    assert model.head.weight is model.embed.weight


# ------------------------------------------------------------------------------------------------ rates


def test_layer_wise_learning_rates():
    """Against AdamW by hand: embeddings lowest, each block higher, layers after the blocks the full rate."""
    decay, lr = 0.5, 0.01
    ours, plain = bert().double(), bert().double()  # in float32 chance alone moves biases of keys, which change nothing
    loop = trainer(ours, texts(), settled(layer_decay=decay, lr=lr, weight_decay=0.1, clip=0))
    level = lambda name: 1 + int(name[7]) if name.startswith("blocks") else 3 if name.startswith(("pool", "head")) else 0
    assert {level(name) for name, _ in plain.named_parameters()} == {0, 1, 2, 3}
    tables = {id(m.weight) for m in plain.modules() if isinstance(m, nn.Embedding)}
    groups = [
        {
            "params": [p],
            "lr": lr * decay ** (3 - level(name)),
            "weight_decay": 0.1 if p.ndim > 1 and id(p) not in tables else 0.0,
        }
        for name, p in plain.named_parameters()
    ]
    by_hand = torch.optim.AdamW(groups, betas=(0.9, 0.999), fused=True)
    stream = loop.make_batch_stream()
    for _, batch in stream:
        Supervised(plain, ("tokens", "mask"), Classification())(batch)["loss"].backward()
        by_hand.step()
        by_hand.zero_grad()
    loop.train()
    for p, q in zip(ours.parameters(), plain.parameters()):
        torch.testing.assert_close(p, q, rtol=1e-9, atol=1e-12)


def test_towers_end_at_the_same_depth():
    net = create("clip-test", depth=3, text_depth=2)
    named = [f"model.{name}" for name, _ in net.named_parameters()]
    found, top = peft.get_layer_depths(named, peft.get_tower_prefixes(nn.ModuleDict({"model": net})))
    assert top == 4 and peft.get_tower_prefixes(nn.ModuleDict({"model": net})) == ("model.vision.", "model.text.")
    assert [found[f"model.vision.blocks.{i}.norm1.weight"] for i in range(3)] == [1, 2, 3]
    assert [found[f"model.text.blocks.{i}.norm1.weight"] for i in range(2)] == [2, 3]
    assert found["model.vision.patch.weight"] == 0 and found["model.text.embed.weight"] == 1
    assert found["model.text.proj.weight"] == found["model.vision.proj.weight"] == found["model.logit_scale"] == top
    part, top = peft.get_layer_depths([name for name in named if "text" in name], ("model.vision.", "model.text."))
    assert top == 3 and part["model.text.blocks.1.norm1.weight"] == 2


@pytest.mark.parametrize(
    "names, expected, top",
    [
        (["stem.weight", "stages.0.0.w", "stages.0.1.w", "stages.1.0.w", "norm.w", "head.weight"], [0, 1, 2, 3, 4, 4], 4),
        (
            ["model.cls", "model.pos", "model.blocks.0.a.w", "model.blocks.0.b", "model.blocks.1.a.w", "model.head.weight"],
            [0, 0, 1, 1, 2, 3],
            3,
        ),
        (["model.encoder.blocks.0.w", "model.decoder.blocks.0.w", "model.head.w"], [1, 2, 3], 3),
        (["model.head.weight", "model.head.bias"], [0, 0], 0),  # alone, as where all else is frozen
    ],
)
def test_depths(names, expected, top):
    found, highest = peft.get_layer_depths(names)
    assert [found[name] for name in names] == expected and highest == top


def test_single_head_has_the_full_rate_from_the_first_step():
    model = bert()
    settings = settled(tune="frozen", layer_decay=0.5, unfreeze=0.9, lr=0.1)
    peft.prepare(model, settings, HEAD)
    loop = trainer(model, texts(), settings)
    before = copied(model)
    loop.train_step(loop.make_batch_stream())
    assert [g["lr"] for o in loop.runners[0].optimizers for g in o.param_groups] == [0.1, 0.1]
    assert not torch.equal(model.head.weight, before["head.weight"])


def test_gradual_unfreezing_from_the_top():
    """Depth 2, so 4 levels, over half of 16 steps: one more every two steps (arXiv:1801.06146, section 3.3)."""
    model = bert()
    settings = settled(steps=16, unfreeze=0.5, lr=0.01, weight_decay=0.1)
    loop = trainer(model, texts(64), settings)
    parts = [["head.weight", "pool.weight"], ["blocks.1.mlp.up.weight"], ["blocks.0.attn.qkv.weight"], ["word.weight"]]
    before, stream, first = copied(model), loop.make_batch_stream(), {}
    for step in range(10):
        loop.train_step(stream)
        loop.state.step += 1
        state = model.state_dict()
        for name in (name for names in parts for name in names):
            if not torch.equal(state[name], before[name]):
                first.setdefault(name, step)
    assert first == {name: 2 * level for level, names in enumerate(parts) for name in names}


# ------------------------------------------------------------------------------------------------ frozen


def test_frozen_networks_keep_weights_and_statistics():
    torch.manual_seed(0)
    model = create("resnet-test", num_classes=3)
    peft.prepare(model, settled(tune="frozen"), HEAD)
    before = copied(model)
    loop = trainer(model, pictures(), settled(tune="frozen", lr=0.1, weight_decay=0.1))
    loop.train()
    moved = {name for name, t in model.state_dict().items() if not torch.equal(t, before[name])}
    assert moved == set(HEAD) and any("running_mean" in name for name in before)
    free = create("resnet-test", num_classes=3)
    start = copied(free)
    trainer(free, pictures(), settled(lr=0.1)).train()
    assert all(not torch.equal(t, start[n]) for n, t in free.state_dict().items() if "running_mean" in n)


def test_frozen_networks_have_no_dropout():
    """Two passes in training differ only by layers in front of the new head."""
    model = bert(dropout=0.5)
    peft.prepare(model, settled(tune="frozen"), HEAD)
    loop = trainer(model, texts(), settled(tune="frozen"))
    loop.set_train_mode()
    assert model.training and model.last_dropout.training and not model.blocks[0].training
    assert not model.blocks[0].dropout.training and not model.norm.training


def test_invalid_modes_are_rejected():
    with pytest.raises(SettingsError, match=r"finetune=frozen trains only new layers.*finetune=whole or finetune=lora"):
        peft.prepare(bert(), settled(tune="frozen"), [])
    with pytest.raises(SettingsError, match=r"finetune=lora needs pretrained weights.*--weights"):
        fit("iris", model="mlp-test", settings={"steps": 2, "tune": "lora"})
    with pytest.raises(SettingsError, match="has no blocks"):
        peft.prepare(nn.Sequential(nn.Linear(2, 2)), settled(recompute=True), None)


# ------------------------------------------------------------------------------------------------ computed again


def learnt(model: nn.Module, batches: Batches) -> tuple[list[Tensor], int, dict[str, Tensor]]:
    """Return the gradients of one pass, the number of stored activations, and the state after it."""
    loop, kept = trainer(model, batches, settled()), {}
    loop.set_train_mode()
    own = {p.data_ptr() for p in model.parameters()}

    def pack(t: Tensor) -> Tensor:
        if t.data_ptr() not in own:
            kept[t.data_ptr(), t.shape] = t.numel()
        return t

    torch.manual_seed(1)
    with saved_tensors_hooks(pack, lambda t: t):
        loss = loop.objective(batches.make(np.arange(8), None))["loss"]
    count = sum(kept.values())
    loss.backward()
    return [p.grad.clone() for p in model.parameters()], count, copied(model)


@pytest.mark.parametrize(
    "make, batches", [(lambda: bert(dropout=0.2, depth=4), texts), (lambda: create("resnet-test", num_classes=3), pictures)]
)
def test_checkpointed_gradients_are_equal_with_less_memory(make, batches):
    """With the same dropout, and batch statistics that are counted once."""
    torch.manual_seed(0)
    plain = make()
    again = make()
    again.load_state_dict(plain.state_dict())
    peft.prepare(again, settled(recompute=True), None)
    (expected, much, state), (grads, little, seen) = learnt(plain, batches()), learnt(again, batches())
    for a, b in zip(grads, expected):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-7)
    assert little < 0.6 * much
    assert all(torch.equal(t, seen[name]) for name, t in state.items())


@pytest.mark.parametrize("name, blocks", [("bert", 2), ("t5", 5), ("transformer", 4), ("unet-resnet", 8)])
def test_gradient_checkpointing_covers_all_blocks(name, blocks):
    """In encoders and decoders, on both sides of a network."""
    model = create(f"{name}-test")
    peft.prepare(model, settled(recompute=True), None)
    assert sum("forward" in vars(m) for m in model.modules()) == blocks


# ------------------------------------------------------------------------------------------------ fits

WORDS = ["red", "green", "blue", "small", "old", "new"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Write a masked language model of transformers with its tokenizer."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    path = tmp_path_factory.mktemp("masked")
    vocab = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "the", "house", "is", *WORDS]
    tokenizer = Tokenizer(models.WordLevel({w: i for i, w in enumerate(vocab)}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.save(str(path / "tokenizer.json"))
    torch.manual_seed(0)
    transformers.BertForMaskedLM(
        transformers.BertConfig(
            vocab_size=20,
            hidden_size=8,
            num_hidden_layers=2,
            num_attention_heads=2,
            intermediate_size=16,
            max_position_embeddings=24,
            hidden_dropout_prob=0.0,
            attention_probs_dropout_prob=0.0,
        )
    ).save_pretrained(path)
    return path


def sentences(path, count: int = 90):
    rng = np.random.default_rng(0)
    lines = [f"the {rng.choice(WORDS)} house is {WORDS[k % 3]} {rng.choice(WORDS)},{'abc'[k % 3]}" for k in range(count)]
    path.write_text("text,label\n" + "\n".join(lines) + "\n")
    return path


@pytest.fixture(scope="module")
def table(tmp_path_factory):
    return sentences(tmp_path_factory.mktemp("texts") / "texts.csv")


class Says(NullCallback):
    def __init__(self):
        self.said = []

    def log(self, text):
        self.said.append(text)


def test_missing_head_is_initialized_randomly(folder):
    with pytest.raises(WeightsError, match=r'head="skip"'):
        load.load(folder, output_type="label", num_classes=3)
    with pytest.warns(WeightsWarning, match="heads that this network does not have"):
        model = load.load(folder, output_type="label", num_classes=3, head="skip")
    theirs = transformers.BertModel.from_pretrained(folder, add_pooling_layer=False).eval()
    tokens = torch.randint(5, 14, (2, 6))
    torch.testing.assert_close(model.features(tokens), theirs(tokens).last_hidden_state, rtol=1e-4, atol=1e-5)
    assert model.head.weight.std() > 0.01 and not model.training


@pytest.mark.parametrize("way", ["whole", pytest.param("frozen", marks=pytest.mark.slow), "lora"])
def test_fit_from_a_folder_resumes_bit_exact(way, folder, table, tmp_path):
    """Also if stopped before the first checkpoint."""
    more = {"whole": {"layer_decay": 0.7, "unfreeze": 0.5, "recompute": "true"}, "lora": {"lora_rank": 2}}.get(way, {})
    arguments = {"weights": folder, "settings": {**FAST, "steps": 6, "tune": way, "lr": 0.01, "model.dropout": 0.1, **more}}
    callback = Says()
    whole = fit(table, out=tmp_path / "whole", callback=callback, **arguments)
    assert "starting from" in "\n".join(callback.said) and whole.record["model"]["fresh"] == ["pool.weight", "pool.bias", *HEAD]
    with pytest.raises(Interrupted, match="after step 3 of 6"):
        fit(table, out=tmp_path / "stopped", callback=StopAt(3), **arguments)
    stopped = open_run(shutil.copytree(tmp_path / "stopped", tmp_path / "finished"))
    assert "not finished" in stopped.predict(["one two"]).notes[0]
    finished = finish(tmp_path / "finished").model.state_dict()
    assert all(torch.equal(tensor, finished[name]) for name, tensor in stopped.model.state_dict().items())
    again = resume(tmp_path / "stopped")
    assert log(whole.path) == log(again.path) and len(log(whole.path)) >= 6
    assert (whole.path / "model.safetensors").read_bytes() == (again.path / "model.safetensors").read_bytes()
    with pytest.raises(Interrupted):
        fit(table, out=tmp_path / "early", callback=StopAt(1), **arguments)
    for file in (tmp_path / "early" / "checkpoints").iterdir():
        file.unlink()
    first = resume(tmp_path / "early")
    assert (whole.path / "model.safetensors").read_bytes() == (first.path / "model.safetensors").read_bytes()
    start, end = weights.read(folder), whole.model.state_dict()
    same = torch.equal(start["bert.encoder.layer.0.output.dense.weight"], end["blocks.0.mlp.down.weight"])
    assert same == (way == "frozen")
    assert not any("parametrizations" in name for name in end)
    assert whole.task.text.tokenizer.to_str() == _tokenizer(folder) and whole.task.options.vocab_size == 14


def _tokenizer(folder) -> str:
    from tokenizers import Tokenizer

    return Tokenizer.from_file(str(folder / "tokenizer.json")).to_str()


def test_run_as_a_checkpoint(folder, table, tmp_path):
    """With its tokenizer; the head is kept if the number of classes is equal, else it is new."""
    first = fit(table, out=tmp_path / "first", weights=folder, settings={**FAST, "steps": 2})
    two = tmp_path / "two.csv"
    two.write_text(table.read_text().replace(",c\n", ",b\n"))
    plan = fitting.build_plan(read(table), weights=first.path, settings={**FAST, "steps": 2})
    assert plan.fresh == [] and torch.equal(plan.objective.model.head.weight, first.model.head.weight)
    assert plan.task.text.tokenizer.to_str() == first.task.text.tokenizer.to_str()
    other = fitting.build_plan(read(two), weights=first.path, settings={**FAST, "steps": 2})
    assert other.fresh == HEAD and other.objective.model.head.weight.shape == (2, 8)
    assert torch.equal(other.objective.model.word.weight, first.model.word.weight)


def test_tokenizer_with_a_larger_vocabulary_is_rejected(folder, table):
    with pytest.raises(SettingsError, match=r"the tokenizer has \d+ tokens, more than the vocabulary of "):
        fitting.build_plan(
            read(table), weights=folder, settings={**FAST, "steps": 2, "task.tokenizer": "none", "task.vocab": 300}
        )


def test_advice_describes_the_given_network(folder, table):
    seen = Says()
    seen.on_plan = lambda advice, config: seen.said.append(advice.best)
    plan = fitting.build_plan(read(table), weights=folder, callback=seen, settings={**FAST, "steps": 2})
    best = next(one for one in seen.said if not isinstance(one, str))
    assert best.parameters == sum(p.numel() for p in plan.objective.model.parameters()) and best.name == "bert" == plan.size


def test_size_is_identified_by_all_fields():
    names = {"minilm-l6": {}, "minilm-l12": {}, "bert-base": {}, "bert-base-cased": {}, "bert-large": {}}
    card = find("bert")[0]
    for name in names:
        found = load.Checkpoint(None, card, None, {**card.sizes[name].overrides, "output_type": "label", "num_classes": 7}, {})
        assert found.size == name
    assert load.Checkpoint(None, card, None, {"depth": 5}, {}).size == "bert"


def test_embedding_networks_classify_by_the_mean(folder, table, tmp_path):
    """Networks trained for embeddings use the mean over the tokens; transformers has no such classifier."""
    transformers.BertModel.from_pretrained(folder).save_pretrained(tmp_path / "bare")
    plan = fitting.build_plan(
        read(table), weights=tmp_path / "bare", settings={**FAST, "steps": 2, "task.tokenizer": str(folder / "tokenizer.json")}
    )
    model = plan.objective.model.eval()
    assert plan.config.mean and plan.fresh == HEAD and not hasattr(model, "pool")
    tokens, mask = torch.randint(5, 14, (2, 6)), torch.arange(6) < torch.tensor([[6], [3]])
    x = model.features(tokens, mask)
    by_hand = torch.stack([x[0].mean(0), x[1, :3].mean(0)]) @ model.head.weight.T + model.head.bias
    torch.testing.assert_close(model(tokens, mask), by_hand)
    with pytest.raises(WeightsError, match="first token"):
        fieldguide.save(model, tmp_path / "out", "hf")


# Pictures


@pytest.fixture(scope="module")
def painted(tmp_path_factory):
    path, rng = tmp_path_factory.mktemp("painted"), np.random.default_rng(0)
    for number in range(48):
        name = ("left", "right")[number % 2]
        (path / name).mkdir(exist_ok=True)
        x = rng.integers(0, 256, (32, 32, 3), dtype=np.uint8)
        x[:, 16 * (number % 2) :][:, :16] //= 3
        Image.fromarray(x).save(path / name / f"{number}.png")
    return path


def narrow(library) -> nn.Module:
    torch.manual_seed(0)
    if library is timm:
        return timm.models.resnet.ResNet(timm.models.resnet.BasicBlock, (2, 2, 2, 2), num_classes=7)
    return torchvision.models.resnet18(num_classes=7)


@pytest.mark.parametrize("library", [timm, torchvision])
def test_image_checkpoint_provides_its_normalization(library, painted, tmp_path):
    theirs = narrow(library)
    torch.save(theirs.state_dict(), tmp_path / "weights.pth")
    plan = fitting.build_plan(read(painted), weights=tmp_path / "weights.pth", settings={**FAST, "steps": 2, "augment": "none"})
    assert plan.fresh == HEAD and plan.size == "resnet18" and plan.task.pictures.channels == 3
    rows = plan.source.take(plan.splits.test)
    batch = plan.task.batches(rows, plan.card).make(np.arange(len(rows)), None)["image"]
    transform = timm.data.create_transform(
        32, is_training=False, crop_pct=1.0, mean=timm.data.IMAGENET_DEFAULT_MEAN, std=timm.data.IMAGENET_DEFAULT_STD
    )
    expected = torch.stack([transform(Image.open(path)) for path in rows.rows[plan.task.column].to_list()])
    torch.testing.assert_close(batch, expected, rtol=1e-5, atol=1e-5)
    model = plan.objective.model.eval()
    if library is timm:
        last = theirs.eval().forward_head(theirs.forward_features(expected), pre_logits=True)
    else:
        theirs.fc = nn.Identity()
        last = theirs.eval()(expected)
    torch.testing.assert_close(model(batch), model.head(last), rtol=1e-3, atol=1e-4)


def test_gray_networks_reject_color_images(painted, tmp_path):
    fieldguide.save(create("resnet18", channels=1, num_classes=2), tmp_path / "grey.safetensors")
    plan = fitting.build_plan(
        read(painted), weights=tmp_path / "grey.safetensors", model="resnet18", settings={**FAST, "steps": 2}
    )
    assert plan.task.pictures.channels == 1 and plan.task.pictures.mean == pytest.approx([0.449])
    with pytest.raises(SettingsError, match=r"reads images with 1 channels.*Leave out task\.channels"):
        fitting.build_plan(
            read(painted),
            weights=tmp_path / "grey.safetensors",
            model="resnet18",
            settings={**FAST, "steps": 2, "task.channels": 3, "task.pixels": "0.5,0.5,0.5/1,1,1"},
        )
    with pytest.raises(SettingsError, match=r"task\.pixels='0\.5/0\.2' is not a mean and standard deviation for 3 channels"):
        fit(painted, settings={"task.pixels": "0.5/0.2", "task.channels": 3, "steps": 2})


def test_run_provides_its_normalization(painted, tmp_path):
    settings = {**FAST, "steps": 2, "augment": "none"}
    first = fit(painted, model="resnet-test", out=tmp_path / "first", settings=settings)
    plan = fitting.build_plan(read(painted), seed=3, weights=first.path, settings=settings)
    mine, theirs = plan.task.pictures, first.task.pictures
    assert mine.mean == theirs.mean and mine.std == theirs.std and plan.fresh == [] and plan.size == "resnet-test"


def test_few_examples_train_the_head_only(folder, table):
    seen = Says()
    plan = fitting.build_plan(read(table), weights=folder, callback=seen, settings={**FAST, "steps": 2})
    assert plan.settings.finetune == "frozen" and any("would overfit" in line for line in seen.said)
    assert {n for n, p in plan.objective.model.named_parameters() if p.requires_grad} == {"pool.weight", "pool.bias", *HEAD}


def test_record_names_the_initial_checkpoint(folder, table, tmp_path, monkeypatch):
    monkeypatch.chdir(folder.parent)
    run = fit(table, out=tmp_path / "run", weights=folder.name, settings={**FAST, "steps": 2})
    record = json.loads((run.path / "run.json").read_text())
    assert record["request"]["weights"] == str(folder) and record["settings"]["finetune"] == "frozen"
    (answer,) = open_run(run.path).predict("the red house is green old")
    assert answer["label"] in "abc"
