"""The formats that `fuzz.py` damages: how to make a small valid example of each, and how it is loaded.

Examples are made with this library and with the libraries that it depends on. Imports are local, so that a process loads only
what its formats need.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from fuzz import Format

GOLDEN = Path(__file__).parent.parent / "tests" / "golden"  # small runs of every task, and tokenizers
PIECES = GOLDEN / "pieces"
TEXTS = ["the cat sat on the mat", "a dog ran to the cat", "who sat on the mat? a cat, 123 times."] * 20
MESSAGES = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "hello"}, {"role": "user", "content": "bye"}]
TEMPLATE = (
    "{% if messages[0]['role'] == 'system' %}{% set rest = messages[1:] %}{% else %}{% set rest = messages %}{% endif %}"
    "{% macro show(m, n=3) %}{{ '<|' ~ m.role ~ '|>' + m['content'] | trim }}{{ '-' * n }}{% endmacro %}"
    "{% set ns = namespace(x='a', n=2) %}{% for m in rest %}{{ show(m, n=loop.index) }}{% set ns.x = ns.x ~ ns.x[:9] ~ 'b' %}"
    "{% set ns.n = ns.n * 3 + 1 %}{% endfor %}{{ ns.n ** 2 }}{{ rest | map(attribute='role') | join(', ') }}{{ messages | tojson }}"
    "{{ '%5s|%d' % (ns.x, ns.n) }}{{ range(10) | list | length }}{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)


# ------------------------------------------------------------------------------------------------ weights


def make_weights(suffix: str, **how: Any) -> Callable[[Path], None]:
    def make(folder: Path) -> None:
        import torch

        import fieldguide
        from fieldguide.checkpoints import weights

        model = fieldguide.create("resnet-test", num_classes=5)
        if suffix == "safetensors":
            weights.save(model, folder / "m.safetensors")
        else:
            torch.save({"state_dict": model.state_dict(), "epoch": 3}, folder / f"m.{suffix}", **how)

    return make


def read_weights(folder: Path) -> None:
    from fieldguide.checkpoints import weights

    weights.read(next(p for p in folder.iterdir() if p.stem == "m"))


def load_weights(folder: Path) -> None:
    import fieldguide

    fieldguide.load(next(p for p in folder.iterdir() if p.stem == "m"), name="resnet-test")


def make_torchscript(folder: Path) -> None:
    import torch

    model = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.BatchNorm1d(4), torch.nn.Sequential(torch.nn.Linear(4, 2)))
    torch.jit.save(torch.jit.trace(model.eval(), torch.zeros(2, 3)), folder / "m.pt")


def make_gguf(folder: Path) -> None:
    import gguf

    import fieldguide
    from fieldguide.checkpoints import weights

    text = train_tokenizer(folder / "tokenizer")
    vocabulary = text.tokenizer.get_vocab()
    tokens = sorted(vocabulary, key=vocabulary.__getitem__)
    merges = json.loads((folder / "tokenizer" / "tokenizer.json").read_text())["model"]["merges"]
    shutil.rmtree(folder / "tokenizer")
    model = fieldguide.create("llama-test", vocab_size=len(tokens), length=64)
    config, writer = model.config, gguf.GGUFWriter(folder / "m.gguf", "llama")
    writer.add_context_length(config.length)
    writer.add_embedding_length(config.dim)
    writer.add_block_count(config.depth)
    writer.add_feed_forward_length(config.hidden)
    writer.add_head_count(config.heads)
    writer.add_head_count_kv(config.kv_heads)
    writer.add_layer_norm_rms_eps(config.eps)
    writer.add_rope_freq_base(config.rope_theta)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("llama-bpe")
    writer.add_token_list(tokens)
    writer.add_token_types([3 if token.startswith("<|") else 1 for token in tokens])
    writer.add_token_merges([merge if isinstance(merge, str) else " ".join(merge) for merge in merges])
    writer.add_eos_token_id(0)
    writer.add_chat_template("{% for m in messages %}{{ m.content }}{% endfor %}")
    state = {k: v for k, v in model.state_dict().items() if not (config.tie_embeddings and k == "head.weight")}
    for name, tensor in weights.translate(state, weights.get_tables(model)["gguf"], reverse=True).items():
        data = tensor.contiguous().numpy()
        kind = gguf.GGMLQuantizationType.F16 if data.ndim > 1 else gguf.GGMLQuantizationType.F32
        writer.add_tensor(name, gguf.quantize(data, kind), raw_dtype=kind)
    for step in (writer.write_header_to_file, writer.write_kv_data_to_file, writer.write_tensors_to_file, writer.close):
        step()


def generate_from_gguf(folder: Path) -> None:
    import fieldguide

    fieldguide.pipeline(folder / "m.gguf").predict("the cat", max_new_tokens=2)


# ------------------------------------------------------------------------------------------------ folders of checkpoints


def train_tokenizer(folder: Path) -> Any:
    """Write a tokenizer of 300 tokens and return it."""
    from fieldguide.data.preprocessing import TextTokenizer

    folder.mkdir(exist_ok=True)
    text = TextTokenizer.fit_exact(TEXTS, size=300)
    text.save(folder)
    (folder / "text.json").unlink()
    return text


def write_json(path: Path, value: Any) -> None:
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(value, indent=1))


def make_language_model(folder: Path) -> None:
    import fieldguide

    text = train_tokenizer(folder)
    fieldguide.save(fieldguide.create("llama-test", vocab_size=text.size, length=64), folder, "hf")
    write_json(
        folder / "generation_config.json",
        {"do_sample": True, "temperature": 0.7, "top_p": 0.9, "top_k": 5, "eos_token_id": 0, "max_new_tokens": 4}
        | {"repetition_penalty": 1.1, "suppress_tokens": [1], "stop_strings": ["dog"], "no_repeat_ngram_size": 3},
    )
    write_json(
        folder / "tokenizer_config.json",
        {"eos_token": "<|endoftext|>", "bos_token": {"content": "<|endoftext|>", "lstrip": False}, "chat_template": TEMPLATE}
        | {"add_bos_token": True, "added_tokens_decoder": {"0": {"content": "<|endoftext|>", "special": True}}},
    )


def make_gpt2(folder: Path) -> None:
    import fieldguide

    make_vocabulary(folder)
    size = len(json.loads((folder / "vocab.json").read_text()))
    fieldguide.save(fieldguide.create("gpt2-test", vocab_size=size, length=32), folder, "hf")
    write_json(folder / "generation_config.json", {"num_beams": 2, "max_length": 12, "length_penalty": 0.5, "min_length": 2})


def make_translator(folder: Path) -> None:
    import fieldguide

    shutil.copy(PIECES / "T5.model", folder / "spiece.model")
    write_json(folder / "tokenizer_config.json", {"tokenizer_class": "T5Tokenizer", "extra_ids": 5})
    size = __import__("fieldguide.data.preprocessing", fromlist=["TextTokenizer"]).TextTokenizer.load(folder).size
    fieldguide.save(fieldguide.create("t5-test", vocab_size=size), folder, "hf")
    write_json(folder / "generation_config.json", {"num_beams": 3, "early_stopping": True, "decoder_start_token_id": 0})


def generate(folder: Path) -> None:
    import fieldguide

    predictor = fieldguide.pipeline(folder)
    predictor.predict("the cat", max_new_tokens=3)


def make_image_classifier(folder: Path) -> None:
    import fieldguide

    fieldguide.save(fieldguide.create("vit-test", num_classes=3, channels=3), folder, "hf")
    config = json.loads((folder / "config.json").read_text())
    side = config["image_size"]
    write_json(folder / "config.json", config | {"id2label": {"0": "cat", "1": "dog", "2": "cow"}})
    write_json(
        folder / "preprocessor_config.json",
        {"image_processor_type": "ViTImageProcessor", "size": {"shortest_edge": side + 4}, "crop_size": side, "resample": 3}
        | {"image_mean": [0.5, 0.4, 0.3], "image_std": [0.2, 0.2, 0.3], "do_normalize": True, "do_center_crop": True},
    )
    make_image(folder / "image.png")


def classify_image(folder: Path) -> None:
    import fieldguide

    fieldguide.pipeline(folder).predict(folder / "image.png")


def make_encoder(folder: Path) -> None:
    import torch
    from safetensors.torch import save_file

    import fieldguide

    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *sorted(set(" ".join(TEXTS).split())), "##s", "c", "##a", "##t"]
    (folder / "vocab.txt").write_text("\n".join(words) + "\n")
    write_json(folder / "tokenizer_config.json", {"tokenizer_class": "BertTokenizer", "do_lower_case": True})
    model = fieldguide.create("bert-test", vocab_size=len(words), output_type="vector")
    fieldguide.save(model, folder, "hf")
    dim = model.config.dim
    kinds = ("Transformer", "Pooling", "Dense", "Normalize")
    modules = [
        {"idx": i, "name": str(i), "path": f"{i}_{k}" if i else "", "type": f"s.models.{k}"} for i, k in enumerate(kinds)
    ]
    write_json(folder / "modules.json", modules)
    write_json(folder / "1_Pooling" / "config.json", {"word_embedding_dimension": dim, "pooling_mode_mean_tokens": True})
    write_json(
        folder / "2_Dense" / "config.json",
        {"in_features": dim, "out_features": 4, "bias": True, "activation_function": "T.Tanh"},
    )
    save_file({"linear.weight": torch.randn(4, dim), "linear.bias": torch.zeros(4)}, folder / "2_Dense" / "model.safetensors")
    write_json(folder / "sentence_bert_config.json", {"max_seq_length": 10, "do_lower_case": False})
    write_json(folder / "config_sentence_transformers.json", {"prompts": {"query": "q: "}, "default_prompt_name": "query"})


def embed(folder: Path) -> None:
    import fieldguide

    fieldguide.pipeline(folder, output_type="vector").predict("the cat sat")


def make_adapter(folder: Path) -> None:
    import torch
    from safetensors.torch import save_file

    make_gpt2(folder)
    config = json.loads((folder / "config.json").read_text())
    dim = config["n_embd"]
    prefix = "base_model.model.transformer.h.0.attn.c_attn"
    save_file(
        {f"{prefix}.lora_A.weight": torch.randn(2, dim), f"{prefix}.lora_B.weight": torch.randn(3 * dim, 2)},
        folder / "adapter_model.safetensors",
    )
    write_json(
        folder / "adapter_config.json",
        {
            "peft_type": "LORA",
            "r": 2,
            "lora_alpha": 4,
            "fan_in_fan_out": True,
            "rank_pattern": {"h.1.attn": 4},
            "alpha_pattern": {},
        }
        | {"use_rslora": False, "base_model_name_or_path": "somewhere", "target_modules": ["c_attn"]},
    )


def make_shards(folder: Path) -> None:
    from safetensors.torch import load_file, save_file

    import fieldguide

    fieldguide.save(fieldguide.create("gpt2-test"), folder, "hf")
    state = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    shards = {name: f"model-0000{1 + i % 2}-of-00002.safetensors" for i, name in enumerate(state)}
    for shard in set(shards.values()):
        save_file({name: t for name, t in state.items() if shards[name] == shard}, folder / shard)
    write_json(folder / "model.safetensors.index.json", {"metadata": {"total_size": 1}, "weight_map": shards})


def load_folder(folder: Path) -> None:
    import fieldguide

    fieldguide.load(folder)


# ------------------------------------------------------------------------------------------------ tokenizers and templates


def make_vocabulary(folder: Path) -> None:
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers

    made = Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(
        vocab_size=280, special_tokens=["<|endoftext|>"], show_progress=False, initial_alphabet=alphabet
    )
    made.train_from_iterator(TEXTS, trainer)
    made.model.save(str(folder))
    write_json(folder / "tokenizer_config.json", {"tokenizer_class": "GPT2Tokenizer", "add_prefix_space": False})


def make_tokenizer_json(folder: Path) -> None:
    """Write a tokenizer with every kind of part: a character map, templates, added tokens, several decoders."""
    from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

    from fieldguide.data.preprocessing import sentencepiece

    model = sentencepiece.parse_file(PIECES / "T5.model")
    made = Tokenizer(models.Unigram([(piece, score) for piece, score, _ in model.pieces], unk_id=2, byte_fallback=False))
    made.normalizer = normalizers.Sequence(
        [
            normalizers.Precompiled(model.charsmap),
            normalizers.Replace(Regex(" {2,}"), " "),
            normalizers.NFC(),
            normalizers.Strip(),
        ]
    )
    made.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split(Regex(r"\d+"), "isolated"), pre_tokenizers.Metaspace("▁")]
    )
    made.decoder = decoders.Sequence([decoders.Metaspace("▁"), decoders.Fuse()])
    made.add_special_tokens([AddedToken("<extra_id_0>", normalized=False, lstrip=True)])
    made.post_processor = processors.TemplateProcessing("$A </s>", "$A </s> $B:1 </s>:1", [("</s>", 1)])
    made.enable_padding(pad_id=0, pad_token="<pad>")
    made.enable_truncation(20)
    made.save(str(folder / "tokenizer.json"))


def make_pieces(kind: str, name: str) -> Callable[[Path], None]:
    return lambda folder: shutil.copy(PIECES / f"{kind}.model", folder / name) and None


def encode(folder: Path) -> None:
    from fieldguide.data.preprocessing import TextTokenizer

    text = TextTokenizer.load(folder)
    texts = ["the cat sat ﬁne Ünï 123", "", "\u2028 x" * 20, "<extra_id_0> 🙂"]
    ids, _ = text.encode(texts, 16)
    text.decode(ids[0])
    text.encode_with_spans(texts)


def make_template(folder: Path) -> None:
    (folder / "chat_template.jinja").write_text(TEMPLATE)


def render(folder: Path) -> None:
    from fieldguide.core.validation import read_text
    from fieldguide.data.preprocessing.chat_template import ChatTemplate

    template = ChatTemplate(read_text(folder / "chat_template.jinja"), {"eos_token": "</s>"})
    template(MESSAGES)
    template.render_with_spans(MESSAGES)


# ------------------------------------------------------------------------------------------------ data


def make_image(path: Path, size: tuple[int, int] = (40, 32), seed: int = 0) -> None:
    import numpy as np
    from PIL import Image

    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(seed).integers(0, 255, (size[1] // 4, size[0] // 4, 3), dtype=np.uint8)
    Image.fromarray(pixels).resize(size).save(path)


def make_images(folder: Path, count: int = 4) -> list[str]:
    names = [f"{i}.png" for i in range(count)]
    for number, name in enumerate(names):
        make_image(folder / name, seed=number)
    return names


def make_rows(count: int = 60) -> list[dict[str, Any]]:
    kinds = ("red", "green", "blue")
    return [
        {"a": i % 7 + 0.5, "b": (i * 13) % 17, "when": f"2025-01-{i % 28 + 1:02d}", "text": TEXTS[i % 3], "kind": kinds[i % 3]}
        for i in range(count)
    ]


def make_csv(folder: Path) -> None:
    rows = make_rows()
    lines = [",".join(rows[0]), *(",".join(f'"{v}"' if "," in str(v) else str(v) for v in row.values()) for row in rows)]
    (folder / "table.csv").write_text("\n".join(lines) + "\n")


def make_json_lines(folder: Path) -> None:
    rows = [{**row, "more": {"x": i, "y": ["p", "q"][: i % 3]}} for i, row in enumerate(make_rows())]
    (folder / "table.jsonl").write_text("\n".join(json.dumps(row) for row in rows) + "\n")


def make_conversations(folder: Path) -> None:
    rows = [
        {"messages": [{"role": "user", "content": f"what is {i}?"}, {"role": "assistant", "content": f"it is {i}"}]}
        for i in range(40)
    ]
    (folder / "chat.jsonl").write_text("\n".join(json.dumps(row) for row in rows) + "\n")


def make_parquet(folder: Path) -> None:
    import polars as pl

    rows = pl.DataFrame(make_rows()).with_columns(pl.col("when").str.to_date(), pl.col("kind").cast(pl.Categorical), l=[1, 2])
    rows.write_parquet(folder / "table.parquet")


def make_coco(folder: Path) -> None:
    names = make_images(folder / "images")
    square = [[4, 4, 20, 4, 20, 20, 4, 20]]
    annotations = [
        {
            "id": i,
            "image_id": i,
            "category_id": 1 + i % 2,
            "bbox": [4, 4, 16, 16],
            "area": 256,
            "iscrowd": 0,
            "segmentation": square,
        }
        for i in range(len(names))
    ]
    annotations.append({**annotations[0], "id": 9, "iscrowd": 1, "segmentation": {"size": [32, 40], "counts": [100, 50, 1130]}})
    write_json(
        folder / "annotations" / "instances.json",
        {"images": [{"id": i, "file_name": name, "width": 40, "height": 32} for i, name in enumerate(names)]}
        | {"annotations": annotations, "categories": [{"id": 1, "name": "cat"}, {"id": 2, "name": "dog"}]},
    )


def make_captions(folder: Path) -> None:
    names = make_images(folder / "images")
    write_json(
        folder / "annotations" / "captions.json",
        {"images": [{"id": i, "file_name": name} for i, name in enumerate(names)]}
        | {"annotations": [{"image_id": i, "caption": TEXTS[i % 3], "id": i} for i in range(len(names))]},
    )


def make_labelme(folder: Path) -> None:
    for name in make_images(folder):
        shapes = [
            {"label": "cat", "shape_type": "polygon", "points": [[4, 4], [20, 4], [20.5, 20]], "flags": {}},
            {"label": "dog", "shape_type": "rectangle", "points": [[1, 2], [30, 25]]},
            {"label": "cat", "shape_type": "circle", "points": [[10, 10], [12, 14]]},
        ]
        write_json(
            folder / f"{name[:-4]}.json",
            {"version": "5.0", "imagePath": name, "imageWidth": 40, "imageHeight": 32, "shapes": shapes},
        )


def make_cvat(folder: Path) -> None:
    shapes = (
        '<polygon label="cat" points="4,4;20,4;20.5,20" group_id="0"/><box label="dog" xtl="1" ytl="2" xbr="30" ybr="25"/>'
        '<mask label="dog" rle="1,3,2" left="3" top="4" width="3" height="2"/><ellipse label="cat" cx="10" cy="9" rx="3" ry="4"/>'
    )
    names = make_images(folder / "images")
    listed = "\n".join(f'<image id="{i}" name="{n}" width="40" height="32">\n{shapes}</image>' for i, n in enumerate(names))
    (folder / "annotations.xml").write_text(f"<annotations><version>1.1</version><meta></meta>\n{listed}</annotations>")


def make_voc(folder: Path) -> None:
    (folder / "Annotations").mkdir()
    for name in make_images(folder / "JPEGImages"):
        thing = (
            "<object><name>cat</name><difficult>0</difficult><bndbox><xmin>4</xmin><ymin>4.5</ymin><xmax>20</xmax><ymax>20</ymax>"
            "</bndbox></object>"
        )
        (folder / "Annotations" / f"{name[:-4]}.xml").write_text(
            f'<?xml version="1.0" encoding="utf-8"?>\n<annotation><filename>{name}</filename><size><width>40</width>'
            f"<height>32</height><depth>3</depth></size>\n{thing}\n{thing.replace('cat', 'dog')}</annotation>"
        )


def make_yolo(folder: Path) -> None:
    for part in ("train", "val"):
        (folder / "labels" / part).mkdir(parents=True)
        for name in make_images(folder / "images" / part):
            (folder / "labels" / part / f"{name[:-4]}.txt").write_text("0 0.5 0.5 0.4 0.3\n1 0.3 0.3 0.2 0.2\n")
    (folder / "data.yaml").write_text(
        "# two classes\npath: .\ntrain: images/train\nval: images/val\nnc: 2\nnames: &names\n  0: cat\n  1: dog\nsame: *names\n"
        "released: 2024-05-01\nflip: [0, 1]\n"
    )


def make_squad(folder: Path) -> None:
    context = "The cat sat on the mat. The dog ran to the cat."
    answers = [{"text": "the mat", "answer_start": 15}]
    questions = [{"id": str(i), "question": "where?", "answers": answers, "is_impossible": False} for i in range(3)]
    paragraphs = [{"context": context, "qas": questions}] * 6
    write_json(folder / "train.json", {"version": "2.0", "data": [{"title": "t", "paragraphs": paragraphs}]})


def make_conll(folder: Path) -> None:
    sentence = "The DT O\ncat NN B-X\nsat VB O\nin IN O\nNew NNP B-LOC\nYork NNP I-LOC\n. . O\n\n"
    (folder / "train.conll").write_text("-DOCSTART- -X- O\n\n" + sentence * 12)


def make_text(folder: Path) -> None:
    (folder / "book.txt").write_text("\n".join(TEXTS * 5) + "\n")


def make_mixed_images(folder: Path) -> None:
    import numpy as np
    from PIL import Image

    for kind in ("cat", "dog"):
        for number, suffix in enumerate(("png", "jpg", "gif", "bmp", "webp", "tif")):
            make_image(folder / kind / f"{number}.{suffix}", seed=number)
        Image.fromarray(np.arange(1024, dtype=np.uint16).reshape(32, 32)).save(folder / kind / "deep.png")
        np.save(folder / kind / "array.npy", np.zeros((32, 32, 3), np.uint8))


def make_recordings(folder: Path) -> None:
    import numpy as np
    import soundfile

    for kind in ("low", "high"):
        (folder / kind).mkdir()
        for number, (suffix, subtype) in enumerate(
            (("wav", "PCM_16"), ("wav", "FLOAT"), ("flac", "PCM_16"), ("ogg", "VORBIS"))
        ):
            wave = np.sin(np.arange(2000) * 0.1 * (1 + number)).astype("float32")
            soundfile.write(folder / kind / f"{number}.{suffix}", wave, 8000, subtype=subtype)


def read_data(folder: Path) -> None:
    """Read a folder, and one batch as a task would."""
    from fieldguide.data import read

    data = read(folder, allow_bad=True)
    len(data)


def make_config_file(folder: Path) -> None:
    (folder / "fit.yaml").write_text(
        "# a comment\ndata: iris\ntarget: species\nminutes: 0.5\nseed: 3\nsettings:\n  lr: 0.001\n  model: {dim: 64, depth: 2}\n"
        "  column: &kinds\n    a: number\n  task: *kinds\n  betas: [0.9, 0.99]\n"
    )


def read_config_file(folder: Path) -> None:
    from fieldguide.automl.config_file import read_config

    read_config(folder / "fit.yaml")


# ------------------------------------------------------------------------------------------------ run folders


def make_run(data: str, model: str, **settings: Any) -> Callable[[Path], None]:
    def make(folder: Path) -> None:
        import fieldguide

        fieldguide.fit(data, model=model, out=folder / "run", settings={"steps": 3, "precision": "float32", **settings})
        record = json.loads((folder / "run" / "run.json").read_text())
        record.pop("digests", None)  # as in runs of earlier versions, and of strangers who compute them anew
        write_json(folder / "run" / "run.json", record)

    return make


def use_run(rows: Any) -> Callable[[Path], None]:
    def load(folder: Path) -> None:
        import fieldguide

        run = fieldguide.open_run(folder / "run")
        repr(run)
        run.predict(rows)
        run.read_splits()
        run.losses()

    return load


def copy_runs(folder: Path) -> None:
    for run in GOLDEN.glob("v*"):
        shutil.copytree(run, folder / run.name)


def open_damaged(folder: Path) -> None:
    """Open the run with the file that was written last."""
    import fieldguide

    newest = max((path for path in folder.rglob("*") if path.is_file()), key=lambda path: path.stat().st_mtime_ns)
    run = fieldguide.open_run(folder / newest.relative_to(folder).parts[0])
    _ = run.task, run.objective, run.config, run.scores
    run.losses()


def load_checkpoint(folder: Path) -> None:
    from fieldguide.training import checkpoint

    checkpoint.load(folder / "run" / "checkpoints", lambda text: None)


IRIS = [{"sepal_length_cm": 5.1, "sepal_width_cm": 3.5, "petal_length_cm": 1.4, "petal_width_cm": 0.2}]
RUN_FILES = ("run.json", "task.json", "*.npz", "metrics.jsonl", "model.safetensors", "tokenizer.json", "text.json")

FORMATS = [
    Format("safetensors", make_weights("safetensors"), load_weights),
    Format("pth", make_weights("pth"), load_weights),
    Format("pth-legacy", make_weights("pth", _use_new_zipfile_serialization=False), load_weights),
    Format("torchscript", make_torchscript, read_weights),
    Format("gguf", make_gguf, generate_from_gguf),
    Format("shards", make_shards, load_folder, ("*.json", "*.json", "*.safetensors")),
    Format("llama-folder", make_language_model, generate, ("*.json",)),
    Format("gpt2-folder", make_gpt2, generate, ("*.json",)),
    Format("t5-folder", make_translator, generate, ("*.json",)),
    Format("vit-folder", make_image_classifier, classify_image, ("*.json",)),
    Format("sentence-transformers", make_encoder, embed, ("*.json", "vocab.txt")),
    Format("adapter", make_adapter, load_folder, ("adapter*",)),
    Format("tokenizer-json", make_tokenizer_json, encode),
    Format("sentencepiece-unigram", make_pieces("T5", "spiece.model"), encode),
    Format("sentencepiece-bpe", make_pieces("Llama", "tokenizer.model"), encode),
    Format("vocab-merges", make_vocabulary, encode),
    Format("chat-template", make_template, render),
    Format("csv", make_csv, read_data),
    Format("json-lines", make_json_lines, read_data),
    Format("conversations", make_conversations, read_data),
    Format("parquet", make_parquet, read_data),
    Format("coco", make_coco, read_data, ("*.json",)),
    Format("coco-captions", make_captions, read_data, ("*.json",)),
    Format("labelme", make_labelme, read_data, ("*.json",)),
    Format("cvat", make_cvat, read_data, ("*.xml",)),
    Format("voc", make_voc, read_data, ("*.xml",)),
    Format("yolo", make_yolo, read_data, ("*.yaml", "*.txt")),
    Format("squad", make_squad, read_data),
    Format("conll", make_conll, read_data),
    Format("text", make_text, read_data),
    Format("images", make_mixed_images, read_data),
    Format("recordings", make_recordings, read_data),
    Format("config-file", make_config_file, read_config_file),
    Format("run-table", make_run("iris", "mlp-s"), use_run(IRIS), RUN_FILES),
    Format("run-text", make_run("docstrings", "gru-s", **{"task.length": 16}), use_run(["sort a list"]), RUN_FILES),
    Format("run-all-tasks", copy_runs, open_damaged, ("run.json", "task.json", "task.json", "*.parquet", "*.npz")),
    Format("checkpoint", make_run("iris", "mlp-s"), load_checkpoint, ("step-*",)),
]
