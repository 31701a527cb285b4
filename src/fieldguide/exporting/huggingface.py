"""Folders of the Hugging Face libraries: weights and configuration, tokenizer or image processor, names of classes."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from fieldguide.checkpoints.load import load, save
from fieldguide.checkpoints.sentence_transformers import write_modules
from fieldguide.core.card import Card
from fieldguide.data.preprocessing import ImageTransform, TextTokenizer
from fieldguide.data.preprocessing.image_transform import ResizeTransform
from fieldguide.exporting.folder import dump, make_folder
from fieldguide.exporting.graph import ExportError
from fieldguide.exporting.language import get_begin_token, get_chat_template, get_tokenizer
from fieldguide.exporting.network import build_network_graph
from fieldguide.objectives.embedding import Pooling
from fieldguide.tasks.text.windows import pair_template

README = """# {name}

{task} with `{architecture}`, exported by fieldguide in the format of transformers or diffusers.
{notes}
"""
SPECIAL = {"pad": "pad_token", "unknown": "unk_token", "cls": "cls_token", "sep": "sep_token"}


def write_huggingface(predictor: Any, out: Path, name: str) -> list[str]:
    """Write a folder that transformers or diffusers read, and load it again.

    Returns notes: what the format cannot hold. Raises `WeightsError` for a network without such a format, `ExportError` if the loaded
    network differs.
    """
    with make_folder(out) as folder:
        network = copy.deepcopy(predictor.model).cpu().eval()
        save(network, folder, "huggingface")
        notes = write_assets(predictor, folder)
        compare_networks(predictor.card, network, load(folder))
        values = {"name": Path(name).name, "task": predictor.signature.task, "architecture": predictor.card.name}
        text = README.format(notes="\n".join(f"\n- {note}" for note in notes), **values)
        (folder / "README.md").write_text(text, encoding="utf-8")
    return notes


def write_assets(predictor: Any, folder: Path) -> list[str]:
    """Write names of classes, tokenizer and image processor. Returns notes about what is not part of the folder."""
    task: Any = getattr(predictor, "task", None)  # language models from checkpoints have none
    notes = []
    config_path = folder / "config.json"
    config = json.loads(config_path.read_text(encoding="utf-8"))
    if labels := list(getattr(task, "labels", ())):
        config |= {
            "id2label": {str(i): label for i, label in enumerate(labels)},
            "label2id": {v: i for i, v in enumerate(labels)},
        }
        if abs(getattr(task, "temperature", 1.0) - 1) > 1e-3:
            notes.append(
                f"Probabilities are calibrated by a temperature, which the format lacks: divide logits by {task.temperature:.4g}."
            )
        if getattr(task, "threshold", None) is not None:
            notes.append(f"{labels[task.positive]!r} is predicted from a probability of {task.threshold:.4g} on.")
    text = get_tokenizer(predictor)
    if isinstance(text, TextTokenizer):
        length = int(getattr(getattr(task, "options", None), "length", 0) or predictor.model.config.length)
        has_segments = "segments" in getattr(getattr(predictor, "objective", None), "inputs", ())
        begin = get_begin_token(predictor, text)
        config |= write_tokenizer(text, folder, length, bool(predictor.card.has_class_token), has_segments, begin)
        if template := get_chat_template(predictor, text):
            (folder / "chat_template.jinja").write_text(template, encoding="utf-8")
    if isinstance(pooled := getattr(task, "pooled", None), Pooling):
        prompts = {"query": task.options.query_prompt or "", "document": pooled.prompt}
        write_modules(folder, pooled.modes, predictor.model.config.dim, task.options.length, prompts)
        notes.append(
            "sentence-transformers reads this folder: SentenceTransformer(FOLDER).encode_query(...), encode_document(...)."
        )
    pictures = getattr(task, "pictures", None)
    if isinstance(pictures, ImageTransform):
        dump(folder / "preprocessor_config.json", describe_processor(pictures))
    if hasattr(task, "standard"):
        notes.append(f"Outputs are standardized: multiply by {task.standard.std:.6g} and add {task.standard.mean:.6g}.")
    dump(config_path, config)
    return notes


def write_tokenizer(
    text: TextTokenizer, folder: Path, length: int, around: bool, has_segments: bool, begin: int | None
) -> dict[str, int]:
    """Write tokenizer.json, with the special tokens that training had around texts, and its configuration.

    Returns the numbers of special tokens for config.json.
    """
    from tokenizers import Tokenizer
    from tokenizers.processors import TemplateProcessing

    text.save(folder)
    (folder / "text.json").unlink()
    path = folder / "tokenizer.json"
    tokenizer = Tokenizer.from_file(str(path))
    if around:
        word = lambda number: str(tokenizer.id_to_token(number))
        pair = pair_template(text)
        spell = lambda ids, kind: [f"{word(i)}:{kind}" for i in ids]
        first, second = pair.segments
        template = [
            *spell(pair.before, first),
            f"$A:{first}",
            *spell(pair.between, first),
            f"$B:{second}",
            *spell(pair.behind, second),
        ]
        tokenizer.post_processor = TemplateProcessing(
            single=f"{word(text.cls)} $A {word(text.sep)}",
            pair=" ".join(template),
            special_tokens=[
                (word(i), i) for i in dict.fromkeys((text.cls, text.sep, *pair.before, *pair.between, *pair.behind))
            ],
        )
        tokenizer.save(str(path))
    elif begin is not None and not text.prefix_ids():
        opening = tokenizer.id_to_token(begin)
        tokenizer.post_processor = TemplateProcessing(
            single=f"{opening} $A", pair=f"{opening} $A $B", special_tokens=[(opening, begin)]
        )
        tokenizer.save(str(path))
    known = {key: getattr(text, name, None) for name, key in SPECIAL.items()} | {"bos_token": begin, "eos_token": text.end}
    names = {key: tokenizer.id_to_token(number) for key, number in known.items() if number is not None and number >= 0}
    settings: dict[str, Any] = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": length,
        "clean_up_tokenization_spaces": False,
    }
    if has_segments:  # else transformers leaves them out, and the network takes both texts for one
        settings["model_input_names"] = ["input_ids", "token_type_ids", "attention_mask"]
    dump(folder / "tokenizer_config.json", settings | {k: v for k, v in names.items() if v})
    return {"pad_token_id": text.pad, "eos_token_id": text.end} | ({} if begin is None else {"bos_token_id": begin})


def describe_processor(transform: ImageTransform) -> dict[str, Any]:
    """Return the configuration of an image processor. Images that it pads are padded by no processor of transformers."""
    side = transform.side
    if transform.fit == "pad":
        raise ExportError("images are padded to a square, which image processors of transformers cannot do. Use --to onnx.")
    edge, resample = side, int(Image.Resampling.BILINEAR)
    if isinstance(transform, ResizeTransform):
        edge, resample = transform.edge, int(transform.filter)
    is_cropped = transform.fit == "crop"
    return {
        "image_processor_type": "ViTImageProcessor" if not is_cropped else "ConvNextImageProcessor",
        "do_resize": True,
        "size": {"shortest_edge": edge} if is_cropped else {"height": side, "width": side},
        **(
            {"do_center_crop": True, "crop_size": {"height": side, "width": side}, "crop_pct": side / edge}
            if is_cropped
            else {}
        ),
        "resample": resample,
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": list(transform.mean),
        "image_std": list(transform.std),
        "do_convert_rgb": transform.channels == 3,
    }


def compare_networks(card: Card, network: Any, loaded: Any) -> None:
    """Raise `ExportError` if a loaded network gives other outputs than the original."""
    graph = build_network_graph(card, network.config, network)
    batch = graph.build_example()
    again = build_network_graph(card, loaded.config, loaded)
    with torch.no_grad():
        pairs = zip(graph.module(*batch.values()), again.module(*batch.values()))
    if not all(is_close(one, other) for one, other in pairs):
        raise ExportError("the exported folder, loaded again, gives other outputs. Please report this network.")


def is_close(one: Tensor, other: Tensor) -> bool:
    return one.shape == other.shape and torch.allclose(one.double(), other.double(), rtol=1e-5, atol=1e-6, equal_nan=True)
