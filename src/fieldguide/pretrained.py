"""Pretrained networks: a folder or file of anybody's -> a network of ours with its weights, and back.

`load` recognises architecture and size by the configuration beside the weights, or by names and shapes of the tensors
themselves. `save` writes a folder that transformers reads. Tables in the model files say how keys are called.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import nullcontext
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from fieldguide import weights
from fieldguide.blocks.configs import Absent, ConfigRow, Counted, Derived, Fixed, Is, Known
from fieldguide.card import Card
from fieldguide.errors import FieldguideError, SettingsError, WeightsError, nearest
from fieldguide.registry import cards, find

CONFIG = "config.json"
CONFIGS = (CONFIG, "params.json")                        # the second is Meta's
WRITTEN = ("model_type", "_class_name")                  # keys that say what a configuration is of: where we write such,
IDENTITY = (*WRITTEN, "general.architecture")            # and all
FREE = ("classes", "channels", "vocab", "length")        # what checkpoints of one size may differ in
PIXELS = "preprocessor_config.json"                      # how transformers prepares pictures
IMAGENET = {"image_mean": (0.485, 0.456, 0.406), "image_std": (0.229, 0.224, 0.225)}     # as most networks have learnt
FILE = {"model_type": "model.safetensors", "_class_name": "diffusion_pytorch_model.safetensors"}       # beside it
TIMM = "timm"                                            # whose configurations say a name, and what was asked for beside it
ASKED = {"img_size": "image", "drop_rate": "dropout", "drop_path_rate": "drop_path"}     # there, here
SEEN = ("num_classes", "in_chans", "global_pool", "pretrained", "checkpoint_path")       # tensors say it, or it has no effect
PARTS = "consolidated.*.pth"                             # Meta's, one for each machine
HUB = "hf:"
STEP = 8                                                 # by which a number is changed to see what shapes it decides
SPARE = 3                                                # tensors that a file may lack: tied ones
Identified = tuple[Card, str, Mapping[str, ConfigRow]]   # card, origin, table of configuration keys


@dataclass(frozen=True)
class Checkpoint:
    """A network as it lies on disk: whose it is, and the config that its file or its tensors imply."""

    path: Path
    card: Card
    origin: str | None
    values: Mapping[str, Any]
    state: Mapping[str, Tensor]

    @property
    def size(self) -> str:
        """The size that it is, or else the bare name of its architecture."""
        if self.path and (self.path / "run.json").is_file():
            return read_config(self.path / "run.json")["model"]["size"]
        card, free = self.card, {"gives", *(self.card.names.get(word, word) for word in FREE)}
        mine = asdict(card.config(**self.values))
        best, most = card.name, -1
        for size, said in card.sizes.items():
            apart = {k for k, v in asdict(card.config(**said.overrides)).items() if v != mine[k]}
            if not apart - free and len(mine) - len(apart) > most:       # of sizes that differ in such alone, the nearest
                best, most = size, len(mine) - len(apart)
        return best

    def config(self, needs: Mapping[str, Any], changes: Mapping[str, Any]) -> Any:
        """Its config with another head, and for pictures of another size. Raises `SettingsError` for more tokens than it
        has, and for numbers that it cannot have."""
        card, kept = self.card, {k: v for k, v in needs.items() if k in ("classes", "image") and self.card.accepts(k)}
        if len(card.answers) > 1:
            kept["gives"] = next(given for given in needs.get("gives", card.answers) if given in card.answers)
            if kept["gives"] == "label" and self.values.get("gives") == "vector" and card.accepts("mean"):
                kept["mean"] = True                      # by which it has learnt to say what a text is
        if card.takes == "image" and needs.get("channels", self.channels) != self.channels:
            raise SettingsError(f"{self.path} reads pictures of {self.channels} channels, and these are to have "
                                f"{needs['channels']}: leave task.channels to it.")
        if needs.get("vocab", 0) > self.values.get("vocab", getattr(card.config(**self.values), "vocab", 0)):
            raise SettingsError(f"the tokenizer has {needs['vocab']:,} tokens, more than {self.path} knows: give the one that "
                                "it was trained with (--set task.tokenizer=PATH).")
        try:
            return card.config(**{card.names.get(k, k): v for k, v in {**self.values, **kept, **changes}.items()})
        except TypeError as error:
            raise SettingsError(f"{card.name}: {error}") from None

    @property
    def channels(self) -> int:
        """Of the pictures that it reads."""
        return getattr(self.card.config(**self.values), self.card.names.get("channels", "channels"), 3)

    def offers(self) -> dict[str, Any]:
        """What must be prepared for it as it was for its first training, by the names of tasks' options."""
        folder = self.path if self.path.is_dir() else self.path.parent
        offered: dict[str, Any] = {}
        for place in (folder, folder / "preprocess"):    # the second: of a run
            if (place / "tokenizer.json").is_file():
                offered["tokenizer"] = str(place / "tokenizer.json")
        if self.card.accepts("begin"):
            offered["begin"] = self.card.config(**self.values).begin
        if self.card.takes == "image":
            said = read_config(folder / PIXELS) if (folder / PIXELS).is_file() else pixels(folder / CONFIG)
            scale = [said.get(key, value) for key, value in IMAGENET.items()]
            if (folder / "run.json").is_file():
                from fieldguide.run import open_run
                if pictures := getattr(open_run(folder).task, "pictures", None):
                    scale = [pictures.mean, pictures.std]
            if self.channels == 1:
                scale = [[sum(values) / len(values)] for values in scale]
            offered["pixels"] = "/".join(",".join(map(str, values)) for values in scale)
            offered["channels"] = self.channels
        return offered


def described(source: str | Path, name: str | None = None) -> Checkpoint:
    """What a checkpoint is of. Raises `WeightsError` where that cannot be told."""
    if isinstance(source, str) and source.startswith(HUB):
        from fieldguide.hub import fetched
        source = fetched(source.removeprefix(HUB))
    path = Path(source)
    if not path.exists():
        raise WeightsError(f"{path} does not exist. For a model of the Hugging Face hub say hf:organisation/name; for a "
                           "network with fresh weights, fieldguide.create.")
    if (path / "run.json").is_file():
        from fieldguide.run import open_run
        run = open_run(path)
        return Checkpoint(path, run.card, weights.OURS, asdict(run.model.config), run.model.state_dict())
    folder = path if path.is_dir() else path.parent
    beside = next((folder / name for name in CONFIGS if (folder / name).is_file()), None)
    if path.suffix == ".gguf":                           # says itself what it is
        beside = path
    said = read_config(beside) if beside and name is None else {}
    known = identified(said) if said else None
    if path.is_dir() and len(parts := sorted(path.glob(PARTS))) > 1:
        return joined(path, parts, known, inwards(known[0], known[2], said, beside) if known else {})
    state = weights.read(path)
    if known:
        card, origin, table = known
        values = inwards(card, table, said, beside)
        origin = sibling(card, origin, values, state)
        if card.accepts("tied"):                         # the file itself says it best: it has a head, or not
            values["tied"] = not headed(card, values, state, origin)
        return Checkpoint(path, card, origin, values, state)
    changes: Mapping[str, Any] = {}
    if name is not None:
        card, size = find(name)
        origin = None
    elif "architecture" in said and "pretrained_cfg" in said:
        card, size, changes = named(said, beside)
        origin = TIMM if TIMM in card.weights else None
    else:
        card, size, origin = recognised(state, str(path))
    values = {**card.sizes[size].overrides, **changes}
    return Checkpoint(path, card, origin, {**values, **seen(card, values, state)}, state)


def load(source: str | Path, *, name: str | None = None, head: Literal["load", "skip"] = "load",
         **overrides: Any) -> nn.Module:
    """A network with the weights of a checkpoint, in evaluation mode.

    `source`: a folder of transformers, diffusers or of a fieldguide run; a file of timm, torchvision, llama.cpp or the
    authors; or `hf:organisation/name`, which downloads it first. `name` says which size it is, where that cannot be seen;
    `overrides` are laid over the config that the file implies, such as `gives="vector"` or another `image`. `head="skip"`
    leaves a head that the file lacks, or has for other classes, as chance made it (see `fieldguide.weights.load`, which
    says what it left). Raises `WeightsError` where nothing fits, and says what came nearest.
    """
    found = described(source, name)
    return filled(found.card, {**found.values, **overrides}, found.state, found.origin, str(source), head)


def filled(card: Card, values: Mapping[str, Any], state: Mapping[str, Tensor], origin: str | None, where: str,
           head: Literal["load", "skip"] = "load") -> nn.Module:
    try:
        config = card.config(**{card.names.get(k, k): v for k, v in values.items()})
    except TypeError as error:
        raise SettingsError(f"{card.name}: {error}") from None
    with Unfilled() if head == "load" else nullcontext():
        model = card.make(config)
    try:
        weights.load(model, state, origin, head)
    except WeightsError as error:
        raise WeightsError(str(error).replace("the checkpoint", where, 1)) from None
    return model.eval()


class Unfilled(TorchFunctionMode):
    """Inside, zeros stand for chance: all tensors are about to be read."""

    def __torch_function__(self, func: Any, types: Any, args: tuple = (), kwargs: Any = None) -> Any:
        if func in (Tensor.normal_, Tensor.uniform_):
            return args[0].zero_()                       # within any bounds: torch draws a cut normal until all is
        return func(*args, **kwargs or {})


def headed(card: Card, values: Mapping[str, Any], state: Mapping[str, Tensor], origin: str) -> bool:
    """Whether a file has a head of its own."""
    table = card.weights[origin]
    names = {name: tensor.to("meta") for name, tensor in state.items()}
    return "head.weight" in weights.inwards(names, table(card.config(**values)) if callable(table) else table).state


def sibling(card: Card, origin: str, values: Mapping[str, Any], state: Mapping[str, Tensor]) -> str:
    """Of an origin and those named after it ("diffusers-2022"), the one that knows most of a file's names."""
    names, config = {name: tensor.to("meta") for name, tensor in state.items()}, card.config(**values)
    tables = {key: table(config) if callable(table) else table for key, table in card.weights.items()
              if key == origin or key.startswith(f"{origin}-")}
    return min(tables, key=lambda key: len(weights.inwards(names, tables[key]).unknown))


def joined(path: Path, parts: list[Path], known: Identified | None, values: Mapping[str, Any]) -> Checkpoint:
    """A network whose tensors were parted among machines: each along the axis on which its parts make up the whole."""
    if known is None:
        raise WeightsError(f"{path} holds {len(parts)} parts of a network, and no {' or '.join(CONFIGS)} that says which it is")
    card, origin, _ = known
    with torch.device("meta"):
        model = card.make(card.config(**values))
    names = card.weights[origin](model.config) if callable(card.weights[origin]) else card.weights[origin]
    wanted = {name: t.shape for name, t in weights.translate(model.state_dict(), names, reverse=True).items()}
    files = [weights.read(part) for part in parts]
    if strange := {name for file in files for name in file} - {name for file in files[:1] for name in file}:
        raise WeightsError(f"{parts[0]} lacks {', '.join(sorted(strange)[:3])}, which other parts have")
    state = {}
    for name, first in files[0].items():
        shape = wanted.get(name, first.shape)
        axis = next((i for i, (part, whole) in enumerate(zip(first.shape, shape)) if part * len(parts) == whole), None)
        state[name] = first if axis is None or first.shape == shape else torch.cat([file[name] for file in files], axis)
    return Checkpoint(path, card, origin, values, state)


# ------------------------------------------------------------------------------------------------ configurations

def read_config(path: Path) -> dict[str, Any]:
    if path.suffix == ".gguf":
        from fieldguide.ggml import metadata
        return metadata(path)
    try:
        content = json.loads(path.read_text())
    except ValueError as error:
        raise WeightsError(f"{path} is no JSON: {error}") from None
    if not isinstance(content, dict):
        raise WeightsError(f"{path} holds a {type(content).__name__}, not the keys of a configuration")
    return content


def identified(config: Mapping[str, Any]) -> Identified | None:
    """Whose configuration this is; None where no card knows it."""
    for card in cards().values():
        for origin, table in card.configs.items():
            said = [key for key in IDENTITY if key in table]
            plain = {key for key, row in table.items() if isinstance(row, str)}
            if all(at(config, key)[1] in (table[key].among or (table[key].value,)) for key in said) if said else (
                    plain <= config.keys()):
                return card, origin, table
    return None


def named(config: Mapping[str, Any], where: Any) -> tuple[Card, str, dict[str, Any]]:
    """What timm calls by the name that its configuration says: card, size, and what differs from that. Raises `WeightsError`
    for a name that is no network here, or changes that are unknown."""
    known = {name: (card, meant) for card in cards().values() for name, meant in card.aliases.get(TIMM, {}).items()}
    name = str(config["architecture"]).partition(".")[0]
    if name not in known:
        raise WeightsError(f"{where} is of timm's {name}, which is no network here.{nearest(name, known)} Relatives may have "
                           "the same tensors and compute otherwise; where you know what it is, say name=...")
    card, meant = known[name]
    size, changes = (meant, {}) if isinstance(meant, str) else meant
    asked = {key: value for key, value in (config.get("model_args") or {}).items() if key not in SEEN}
    if strange := [key for key in asked if key not in ASKED or not card.accepts(ASKED[key])]:
        raise WeightsError(f"{where} describes another network than {size}: model_args.{strange[0]}={asked[strange[0]]!r}")
    return card, size, {**changes, **{ASKED[key]: value for key, value in asked.items() if value is not None}}


def pixels(path: Path) -> dict[str, Any]:
    """How timm prepares pictures, as transformers says it."""
    said = read_config(path).get("pretrained_cfg") or {} if path.is_file() else {}
    return {f"image_{key}": said[key] for key in ("mean", "std") if key in said}


def at(config: Mapping[str, Any], key: str) -> tuple[bool, Any]:
    """Whether a dotted key is there, and what it says."""
    for part in key.split("."):
        if not isinstance(config, Mapping) or part not in config:
            return False, None
        config = config[part]
    return True, config


def inwards(card: Card, table: Mapping[str, ConfigRow], config: Mapping[str, Any], where: Any) -> dict[str, Any]:
    """A public configuration as fields of ours. Raises `WeightsError` that lists every key by which it is another network."""
    values: dict[str, Any] = {}
    kinds = {f.name: str(f.type) for f in fields(card.config)}
    faults = []
    for key, row in table.items():
        there, value = at(config, key)
        if isinstance(row, Absent):
            values[row.ours] = value if there and value is not None else row.value
        elif isinstance(row, Known) and there:
            value = value[0] if isinstance(value, list) and value else value
            if value not in row.values:
                faults.append(f"{key}={value!r} is none of {', '.join(map(repr, row.values))}")
            else:
                values[row.ours] = row.values[value]
        elif isinstance(row, Counted):
            values[row.ours] = len(value) if there else row.absent
        elif isinstance(row, Fixed):
            values[row.ours] = row.value
        elif isinstance(row, Derived):
            values |= row.read(config)
        elif isinstance(row, str) and there and value is not None:
            values[row] = value
    values = {k: tuple(v) if kinds.get(k, "").startswith("tuple") and isinstance(v, list) else v for k, v in values.items()}
    if not faults:
        made = card.config(**values)
        for key, row in table.items():
            there, value = at(config, key)
            if isinstance(row, Is) and not there and row.absent is not ...:
                there, value = True, row.absent
            if isinstance(row, Is) and there and (wanted := row.value(made) if callable(row.value) else row.value) != value:
                faults.append(f"{key}={value!r}, and {card.name} here has {wanted!r}")
    if faults:
        raise WeightsError("\n".join([f"{where} describes another network than {card.name}:", *(f"  {f}" for f in faults)]))
    return values


def outwards(card: Card, table: Mapping[str, ConfigRow], config: Any) -> dict[str, Any]:
    """Our config under public keys. Raises `WeightsError` for what cannot be said there."""
    out: dict[str, Any] = {}
    for key, row in table.items():
        if isinstance(row, Fixed):
            if (own := getattr(config, row.ours)) != row.value:
                raise WeightsError(f"{card.name} with {row.ours}={own!r} cannot be written so: there, {key.strip('<>')}.")
            continue
        if isinstance(row, Is):
            if not row.written:
                continue
            value = row.value(config) if callable(row.value) else row.value
        elif isinstance(row, Known):
            own = getattr(config, row.ours)
            value = next(theirs for theirs, ours in row.values.items() if ours == own)
            value = [value] if key == "architectures" else value
        elif isinstance(row, Derived):
            value = row.write(config)
        elif isinstance(row, Counted):
            value = {str(i): f"LABEL_{i}" for i in range(getattr(config, row.ours))}
        else:
            value = getattr(config, row if isinstance(row, str) else row.ours)
        *parents, last = key.split(".")
        part = out
        for parent in parents:
            part = part.setdefault(parent, {})
        part[last] = list(value) if isinstance(value, tuple) else value
    return out


def save(model: nn.Module, path: str | Path, format: str = weights.OURS) -> Path:
    """Writes a network under our names or those of an origin ("torchvision", "hf"): one file where `path` ends in
    .safetensors, else a folder that the origin's library reads, with its configuration.

    Raises `WeightsError` for an unknown format, or one whose configuration is not known here.
    """
    format = "huggingface" if format == "hf" else format
    card = next((c for c in cards().values() if c.model is type(model)), None)
    if format == "huggingface" and card and format not in card.weights and "diffusers" in card.weights:
        format = "diffusers"                             # the other library whose folders lie there
    if Path(path).suffix == ".safetensors":
        return weights.save(model, path, format)
    return export(model, path, format)


def export(model: nn.Module, folder: str | Path, origin: str) -> Path:
    """Writes config.json and model.safetensors as the library of that origin reads them."""
    card = next((c for c in cards().values() if c.model is type(model)), None)
    known = card.configs if card else {}
    known = {name: table for name, table in known.items() if any(key in table for key in WRITTEN)}
    if origin not in known:
        raise WeightsError(f"{type(model).__name__} cannot be written as a folder of {origin!r}.{nearest(origin, known)} "
                           f"Known are {', '.join(known) or 'none'}.")
    folder, said = Path(folder), outwards(card, known[origin], model.config)
    folder.mkdir(parents=True, exist_ok=True)
    weights.save(model, folder / next(FILE[key] for key in WRITTEN if key in said), origin)
    (folder / CONFIG).write_text(json.dumps(said, indent=2) + "\n")
    return folder


# ------------------------------------------------------------------------------------------------ names and shapes

def shapes(card: Card, values: Mapping[str, Any]) -> dict[str, torch.Size]:
    with torch.device("meta"), Unfilled():
        return {name: t.shape for name, t in card.make(card.config(**values)).state_dict().items()}


def translations(card: Card, values: Mapping[str, Any], state: Mapping[str, Tensor]) -> Iterator[tuple[str, Any]]:
    """A checkpoint's names as each table of a card reads them, where it knows most of the first few."""
    for origin, table in card.weights.items():
        table = table(card.config(**values)) if callable(table) else table
        for form in weights.forms(state):
            first = dict(list(form.items())[:12])
            if len(weights.inwards(first, table).unknown) <= len(first) // 3:
                yield origin, weights.inwards(form, table)


def differing(card: Card, values: Mapping[str, Any], found: Mapping[str, Tensor]) -> dict[str, int]:
    """The numbers of `FREE` in which tensors under our names differ from a config, read off the shapes they decide."""
    here, out = shapes(card, values), {}
    for word in FREE:
        field = card.names.get(word, word)
        if not card.accepts(word) or str(card.config.__dataclass_fields__[field].type) != "int":
            continue
        start = getattr(card.config(**values), field)
        try:
            more = shapes(card, {**values, field: start + STEP})
        except (FieldguideError, RuntimeError, ValueError):          # a number that this network cannot have
            continue
        decided = ((name, i) for name, shape in here.items() if name in found and found[name].ndim == len(shape)
                   for i, (a, b) in enumerate(zip(shape, more.get(name, shape))) if a != b)
        if (place := next(decided, None)) is None:
            continue
        name, axis = place
        slope = (more[name][axis] - here[name][axis]) / STEP
        value = start + (found[name].shape[axis] - here[name][axis]) / slope
        if value == int(value) and value > 0 and value != start:
            out[field] = int(value)
    return out


def seen(card: Card, values: Mapping[str, Any], state: Mapping[str, Tensor]) -> dict[str, int]:
    """In what a checkpoint differs from what it is said to be: classes, vocabulary."""
    best = max((done.state for _, done in translations(card, values, state)), key=len, default=state)
    return differing(card, values, best)


def recognised(state: Mapping[str, Tensor], where: str) -> tuple[Card, str, str]:
    """The card, size and origin whose tensors these are. Raises `WeightsError` where none is, or several could be."""
    fits, near = [], []
    for card in cards().values():
        for size in card.sizes:
            values = dict(card.sizes[size].overrides)
            for origin, done in translations(card, values, state):
                near.append((len(done.state), card.name, origin))
                if done.unknown or done.faults:
                    continue
                there, wanted = {name: t.shape for name, t in done.state.items()}, shapes(card, values)
                apart = [n for n in wanted if n not in there and not n.endswith("num_batches_tracked")]
                if there.keys() - wanted.keys() or len(apart) > SPARE:
                    continue
                changes = differing(card, values, done.state)
                wanted = shapes(card, {**values, **changes}) if changes else wanted
                if all(there.get(n, shape) == shape for n, shape in wanted.items()):
                    fits.append((len(apart), len(changes), card, size, origin, card.config(**{**values, **changes})))
    if not fits:
        nearby = ", ".join(dict.fromkeys(f"{name} ({origin})" for _, name, origin in sorted(near, reverse=True)))
        raise WeightsError(f"{where}: these {len(state)} tensors are of no network here"
                           + (f"; nearest come {nearby}. Say which it is: name=..." if nearby else
                              f" (they begin {', '.join(list(state)[:3])})."))
    fewest = min(apart for apart, *_ in fits)
    best = sorted((fit for fit in fits if fit[0] == fewest), key=lambda fit: fit[1])
    if len({(card.name, config) for _, _, card, _, _, config in best}) > 1:
        raise WeightsError(f"{where} could be {' or '.join(dict.fromkeys(fit[3] for fit in best))}: their tensors look "
                           "the same, but they compute differently. Say which: name=...")
    return best[0][2:5]
