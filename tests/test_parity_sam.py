"""SAM against transformers: files of both kinds, mask prompts, preprocessing, masks of prompts and of everything; predictions."""

from __future__ import annotations

import io
import json

import numpy as np
import pytest
import torch
from PIL import Image

import segmenters
from fieldguide import load, pipeline, save
from fieldguide.checkpoints import weights
from fieldguide.checkpoints.load import inspect_checkpoint
from fieldguide.core.errors import DataError, SettingsError
from fieldguide.core.packed_masks import decode_mask, encode_mask
from fieldguide.models.registry import create
from fieldguide.objectives.object_masks import find_box
from fieldguide.objectives.prompted_masks import (
    Mask,
    PromptedMasks,
    Selection,
    build_crops,
    build_grid,
    find_last_pixels,
    fit_longest,
    is_cut_off,
    place_mask,
)
from fieldguide.tasks.vision.prompted_segmentation import load_square, parse_prompts
from test_models import batch, tiny

CLOSE = {"rtol": 1e-4, "atol": 1e-5}
EXACT = {"rtol": 1e-9, "atol": 1e-11}


def make_peer(model):
    """Return the SAM of transformers with the same weights."""
    peer, rename = segmenters.sam(model)
    peer.to(next(model.parameters()).dtype).load_state_dict(rename(model.state_dict()))
    return peer.peer.eval()


@torch.no_grad()
def make_network():
    """Return a network whose predicted IoUs are mostly between 0 and 1, and whose masks have clear borders."""
    model = tiny("sam", torch.float32)
    model.quality[-1].bias += 0.6
    for head in model.masks:
        head[-1].weight *= 30
        head[-1].bias *= 30
    return model


@pytest.fixture(scope="module")
def photo(tmp_path_factory):
    """Return a photograph of 60 x 42 pixels."""
    path = tmp_path_factory.mktemp("photo") / "photo.png"
    rng = np.random.default_rng(0)
    coarse = rng.integers(0, 255, (7, 10, 3), np.uint8)
    Image.fromarray(coarse).resize((60, 42), Image.Resampling.BICUBIC).save(path)
    return path


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Return a folder of transformers with a small network of random weights."""
    from tv import transformers

    path = tmp_path_factory.mktemp("sam")
    make_peer(make_network()).save_pretrained(path)
    processor = transformers.SamImageProcessorPil(size={"longest_edge": 40}, pad_size={"height": 40, "width": 40})
    transformers.SamProcessor(processor).save_pretrained(path)
    return path


def read_mask(one):
    return decode_mask({"size": one["mask"]["size"], "counts": one["mask"]["counts"].encode()})


# ---------------------------------------------------------------------------------------------- network


@torch.no_grad()
def test_files_of_transformers_both_ways(folder, tmp_path):
    from tv import transformers

    model = load(folder)
    assert model.config.decoder_eps == 1e-5  # as written
    inputs = batch("sam", 2, torch.float32)
    torch.testing.assert_close(model(*inputs), make_network()(*inputs), **CLOSE)
    save(model, tmp_path / "ours", "huggingface")
    back = transformers.SamModel.from_pretrained(tmp_path / "ours", attn_implementation="sdpa").eval()
    torch.testing.assert_close(segmenters.PromptedMasks(back)(*inputs), model(*inputs), **CLOSE)
    plain = segmenters.sam_config(model.config)
    plain.mask_decoder_config.layer_norm_eps = 1e-6
    transformers.SamModel(plain).save_pretrained(tmp_path / "default")
    assert load(tmp_path / "default").config.decoder_eps == 1e-6


def test_files_of_the_authors_both_ways(tmp_path):
    """A file with names and shapes of sam_vit_b_01ec64.pth is recognized; the names are those of the authors' modules."""
    model = create("sam-vit-b", depth=1, global_layers=(0,))
    public = weights.translate(model.state_dict(), weights.get_tables(model)["facebook"], reverse=True)
    shapes = {
        "image_encoder.pos_embed": (1, 64, 64, 768),
        "image_encoder.patch_embed.proj.weight": (768, 3, 16, 16),
        "image_encoder.blocks.0.attn.rel_pos_h": (127, 64),
        "image_encoder.blocks.0.mlp.lin1.weight": (3072, 768),
        "image_encoder.neck.0.weight": (256, 768, 1, 1),
        "image_encoder.neck.3.bias": (256,),
        "prompt_encoder.pe_layer.positional_encoding_gaussian_matrix": (2, 128),
        "prompt_encoder.point_embeddings.3.weight": (1, 256),
        "prompt_encoder.not_a_point_embed.weight": (1, 256),
        "prompt_encoder.mask_downscaling.6.weight": (256, 16, 1, 1),
        "prompt_encoder.no_mask_embed.weight": (1, 256),
        "mask_decoder.transformer.layers.1.cross_attn_image_to_token.q_proj.weight": (128, 256),
        "mask_decoder.transformer.layers.0.norm4.weight": (256,),
        "mask_decoder.transformer.final_attn_token_to_image.out_proj.weight": (256, 128),
        "mask_decoder.transformer.norm_final_attn.bias": (256,),
        "mask_decoder.iou_token.weight": (1, 256),
        "mask_decoder.mask_tokens.weight": (4, 256),
        "mask_decoder.output_upscaling.3.weight": (64, 32, 2, 2),
        "mask_decoder.output_hypernetworks_mlps.3.layers.2.weight": (32, 256),
        "mask_decoder.iou_prediction_head.layers.2.weight": (4, 256),
    }
    assert {name: tuple(public[name].shape) for name in shapes} == shapes
    small = tiny("sam", torch.float32)
    torch.save(weights.translate(small.state_dict(), weights.get_tables(small)["facebook"], reverse=True), tmp_path / "sam.pth")
    other = create("sam-test").eval()
    assert weights.load(other, tmp_path / "sam.pth") == []
    inputs = batch("sam", 2, torch.float32)
    assert torch.equal(other(*inputs), small(*inputs))


def test_published_names_and_shapes_are_recognized(tmp_path):
    with torch.device("meta"):
        state = create("sam-vit-l").state_dict()
    for origin in ("facebook", "huggingface"):
        public = weights.translate(state, weights.get_tables(create("sam-test"))[origin], reverse=True)
        public = {name: torch.zeros(1).expand(t.shape) for name, t in public.items()}  # small files
        path = tmp_path / f"{origin}.pth"
        torch.save(public, path)
        found = inspect_checkpoint(path)
        path.unlink()
        assert (found.card.name, found.origin) == ("sam", origin)
        assert found.values.get("global_layers", create("sam-test").config.global_layers) == (5, 11, 17, 23)


@torch.no_grad()
def test_mask_prompts_equal_transformers():
    model = tiny("sam")
    peer = make_peer(model)
    image, points, labels = batch("sam", 2)
    masks = torch.randn(2, 1, 20, 20, dtype=torch.float64)
    theirs = peer(image, points[:, :1, :2], labels[:, :1, :2], input_masks=masks, multimask_output=True)
    scores, found = model.decode(model.encode(image), points[:, :1], labels[:, :1], masks)
    torch.testing.assert_close(scores[..., 1:], theirs.iou_scores, **EXACT)
    torch.testing.assert_close(found[:, :, 1:], theirs.pred_masks, **EXACT)


def test_mask_prompts_are_trained():
    model = tiny("sam")
    image, points, labels = batch("sam", 2)
    _, found = model.decode(model.encode(image), points, labels, torch.randn(2, 2, 20, 20, dtype=torch.float64))
    found.sum().backward()
    assert all(p.grad.any() for p in model.mask_prompt.parameters()) and model.no_mask.grad is None


@torch.no_grad()
def test_padding_points_equal_those_of_transformers():
    """Padding is a token of zeros there, too; it is marked by -10."""
    model = tiny("sam")
    points, labels = torch.rand(1, 1, 3, 2, dtype=torch.float64) * 40, torch.tensor([[[1, -2, -1]]])
    want = make_peer(model).prompt_encoder(points[:, :, :2], torch.tensor([[[1, -10]]]), None, None)[0]
    torch.testing.assert_close(model.encode_points(points, labels), want, **EXACT)


@torch.no_grad()
def test_attention_in_parts_of_heads(monkeypatch):
    model, inputs = tiny("sam"), batch("sam", 2)
    want = model(*inputs)
    monkeypatch.setattr("fieldguide.models.transformer.sam.MAX_BIAS", 1)
    torch.testing.assert_close(model(*inputs), want, **EXACT)


def test_impossible_sizes_are_rejected():
    with pytest.raises(SettingsError, match="divisible by patch=8"):
        create("sam-test", image=44)


# ---------------------------------------------------------------------------------------------- prompts


def test_prompts_of_options():
    assert parse_prompts("", " ") == []
    assert parse_prompts("1,2", "") == [[(1, 2, 1), (0, 0, -1)]]
    assert parse_prompts("1,2;3,4,0|5,6,1", "") == [[(1, 2, 1), (3, 4, 0), (0, 0, -1)], [(5, 6, 1), (0, 0, -1)]]
    assert parse_prompts("", "1,2,3,4|5,6,7,8") == [[(1, 2, 2), (3, 4, 3)], [(5, 6, 2), (7, 8, 3)]]
    assert parse_prompts("9,9,0", "1,2,3,4") == [[(9, 9, 0), (1, 2, 2), (3, 4, 3)]]
    for points, boxes, message in (
        ("1", "", "points: '1' is not 2 or 3 numbers"),
        ("1,x", "", "Example: points="),
        ("", "1,2,3", "boxes: '1,2,3' is not 4 numbers"),
        ("", "5,2,3,4", "5 must be less than 3"),
        ("1,2|3,4", "1,2,3,4", "2 prompts of points"),
    ):
        with pytest.raises(SettingsError, match=message):
            parse_prompts(points, boxes)


@torch.no_grad()
def test_placed_masks_equal_the_processor():
    from tv import transformers

    processor = transformers.SamImageProcessorPil(size={"longest_edge": 40}, pad_size={"height": 40, "width": 40})
    logits = torch.randn(1, 3, 20, 20)
    for width, height in ((60, 42), (17, 33), (41, 40)):
        fitted = fit_longest(width, height, 40)
        (want,) = processor.post_process_masks([logits[0, None]], [(height, width)], [fitted[::-1]], binarize=False)
        for mask, expected in zip(logits[0], want[0]):
            torch.testing.assert_close(place_mask(mask, (width, height), 40), expected)


def predict_theirs(folder, photo, multiple, **prompts):
    """Return masks and scores by the processor and the network of transformers."""
    from tv import transformers

    processor = transformers.SamProcessor(transformers.SamImageProcessorPil.from_pretrained(folder))
    peer = transformers.SamModel.from_pretrained(folder).eval()
    inputs = processor(Image.open(photo), return_tensors="pt", **prompts)
    inputs = {k: v.float() if torch.is_tensor(v) and v.dtype == torch.float64 else v for k, v in inputs.items()}
    sizes = inputs.pop("original_sizes"), inputs.pop("reshaped_input_sizes")
    with torch.no_grad():
        found = peer(**inputs, multimask_output=multiple)
    masks = processor.image_processor.post_process_masks(found.pred_masks, *sizes)[0]
    return masks.numpy(), found.iou_scores[0].numpy()


@pytest.mark.parametrize(
    ("options", "prompts", "multiple"),
    [
        ({"points": "30,20|10,5", "candidates": True}, {"input_points": [[[[30, 20]], [[10, 5]]]]}, True),
        (
            {"points": "30,20;50,40,0"},
            {"input_points": [[[[30, 20], [50, 40]]]], "input_labels": [[[1, 0]]]},
            False,
        ),
        ({"boxes": "5,6,40,38"}, {"input_boxes": [[[5, 6, 40, 38]]]}, False),
    ],
    ids=["points", "background", "box"],
)
def test_predictions_equal_transformers(options, prompts, multiple, folder, photo):
    (answer,) = pipeline(folder).predict(str(photo), **options)
    masks, scores = predict_theirs(folder, photo, multiple, **prompts)
    masks, scores = masks.reshape(-1, 42, 60), scores.ravel()
    assert len(answer["masks"]) == len(scores)
    for one, mask, score in zip(answer["masks"], masks, scores):
        assert one["score"] == pytest.approx(score, abs=1e-4)
        assert (read_mask(one) == mask).mean() > 0.999 and one["area"] == read_mask(one).sum()
        assert tuple(one["box"]) == find_box(read_mask(one))
    Image.open(io.BytesIO(answer["picture"].content)).verify()


@torch.no_grad()
@pytest.mark.parametrize("options", [{}, {"points": "30,20"}, {"boxes": "10,8,50,30", "candidates": True}], ids=str)
def test_rough_masks_equal_transformers(options, folder, photo):
    """A mask in the form of predictions is a prompt: averaged to four times the sides of the features, and as logits of 10."""
    from tv import transformers

    model = pipeline(str(folder))
    mask = np.zeros((42, 60), bool)
    mask[8:30, 10:50] = True
    first = {"size": [42, 60], "counts": encode_mask(mask).decode()}
    small = np.array(Image.fromarray(mask.astype(np.uint8) * 255).resize((40, 28), Image.Resampling.BILINEAR)) / 255
    square = np.zeros((40, 40))
    square[:28] = small
    logits = 20 * square.reshape(20, 2, 20, 2).mean((1, 3)) - 10
    peer = transformers.SamModel.from_pretrained(folder).eval()
    image = load_square(str(photo), model.task.pictures)[None]
    scale = 40 / 60
    prompts = {}
    if "points" in options:
        points = torch.tensor([[[[30 * scale, 20 * scale * 28 / 28]]]])
        prompts = {"input_points": points, "input_labels": torch.ones(1, 1, 1, dtype=torch.long)}
    if "boxes" in options:
        prompts = {"input_boxes": torch.tensor([[[10 * scale, 8 * scale, 50 * scale, 30 * scale]]])}
    given = torch.from_numpy(logits)[None, None].float()
    many = options.get("candidates", False)
    found = model.predict(str(photo), masks=json.dumps(first), **options)[0]["masks"]
    assert len(found) == (3 if many else 1)
    if prompts:
        theirs = peer(pixel_values=image, input_masks=given, multimask_output=many, **prompts)
        scores, masks = theirs.iou_scores[0, 0], theirs.pred_masks[0, 0]
    else:  # which transformers requires: the decoder alone
        quality, every = model.model.decode(
            model.model.encode(image), torch.zeros(1, 1, 0, 2), torch.zeros(1, 1, 0).long(), given
        )
        scores, masks = quality[0, 0, :1], every[0, 0, :1]
    for one, score, low in zip(found, scores, masks):
        assert one["score"] == pytest.approx(float(score), rel=1e-4)
        want = (place_mask(low, (60, 42), 40) > 0).numpy()
        assert (decode_mask({"size": one["mask"]["size"], "counts": one["mask"]["counts"].encode()}) == want).all()
    plain = model.predict(str(photo), **options)[0]["masks"]
    assert [m["score"] for m in plain] != [m["score"] for m in found]


def test_rough_masks_are_checked(folder, photo):
    model, mask = pipeline(str(folder)), {"size": [42, 60], "counts": [42 * 60]}
    two = json.dumps([mask, mask])
    assert len(model.predict(str(photo), masks=two)[0]["masks"]) == 2
    with pytest.raises(SettingsError, match="there are 1 prompts of points or boxes, but 2 masks"):
        model.predict(str(photo), masks=two, points="30,20")
    for wrong in ("photo.png", json.dumps({**mask, "counts": [5]}), json.dumps({"size": [42], "counts": [42]}), "[1]", "null"):
        with pytest.raises(SettingsError, match="is no mask"):
            model.predict(str(photo), masks=wrong)
    with pytest.raises(DataError, match="the mask has 42 x 60 pixels, but the image has 60 x 42"):
        model.predict(str(photo), masks=json.dumps({**mask, "size": [60, 42]}))


def test_best_candidate_is_chosen(folder, photo):
    model = pipeline(folder)
    every = model.predict(str(photo), points="30,20", candidates=True)[0]["masks"]
    (one,) = model.predict(str(photo), points="30,20")[0]["masks"]
    assert len(every) == 3 and one == max(every, key=lambda mask: mask["score"])


def test_grid_equals_transformers():
    from transformers.models.sam.image_processing_pil_sam import _build_point_grid

    np.testing.assert_allclose(build_grid(5), np.asarray(_build_point_grid(5)).reshape(-1, 2), atol=1e-6)


def slow_nms(boxes, scores, idxs, iou_threshold):
    """Return the kept boxes by descending score, as torchvision's operator, which needs a compiled extension."""
    kept = []
    for i in scores.argsort(descending=True).tolist():
        left, top, right, bottom = boxes[i].tolist()
        for j in kept:
            a, b, c, d = boxes[j].tolist()
            shared = max(0, min(right, c) - max(left, a)) * max(0, min(bottom, d) - max(top, b))
            joint = (right - left) * (bottom - top) + (c - a) * (d - b) - shared
            if shared > iou_threshold * joint:
                break
        else:
            kept.append(i)
    return torch.tensor(kept, dtype=torch.int64)


def test_masks_of_everything_equal_the_pipeline(folder, photo, monkeypatch):
    from tv import transformers

    monkeypatch.setattr("torchvision.ops.boxes.batched_nms", slow_nms)
    limits = {"points_per_crop": 6, "pred_iou_thresh": 0.05, "stability_score_thresh": 0.05}
    theirs = transformers.pipeline(
        "mask-generation",
        model=transformers.SamModel.from_pretrained(folder),
        image_processor=transformers.SamImageProcessorPil.from_pretrained(folder),
    )
    ours, image, counts = pipeline(folder), Image.open(photo), []
    for overlap in (0.3, 0.5, 0.7, 0.8, 0.9, 0.95):
        want = theirs(image, **limits, crops_nms_thresh=overlap)
        (answer,) = ours.predict(str(photo), grid=6, min_quality=0.05, min_stability=0.05, overlap=overlap)
        assert len(answer["masks"]) == len(want["masks"]) and "prompt" not in answer["masks"][0]
        for one, mask, score in zip(answer["masks"], want["masks"], want["scores"]):
            assert one["score"] == pytest.approx(float(score), abs=1e-4) and one["stability"] > 0.05
            assert (read_mask(one) == np.asarray(mask)).mean() > 0.999
        counts.append(len(answer["masks"]))
    assert counts[0] < counts[-1]
    (strict,) = ours.predict(str(photo), grid=3, min_stability=1.0)
    assert strict["masks"] == [] and strict["found"] == "0 masks"


def test_duplicates_are_found_by_boxes_that_end_at_the_last_pixel():
    """Boxes of 11 x 2 and 11 x 3 pixels count as 10 x 1 and 10 x 2, whose IoU is 1/2 and not 2/3."""
    masks = np.zeros((2, 5, 12), dtype=bool)
    masks[0, :2, :11] = masks[1, :3, :11] = True
    found = [Mask(mask, 0, quality, 1.0) for mask, quality in zip(masks, (0.8, 0.9))]
    objective = PromptedMasks(create("sam-test"))
    for overlap, kept in ((0.6, [0.9, 0.8]), (0.4, [0.9])):
        objective.selection = Selection(every=True, overlap=overlap)
        left = objective.remove_duplicates(found, [one.quality for one in found])
        assert sorted((one.quality for one in left), reverse=True) == kept


def test_of_duplicates_the_mask_of_the_smaller_crop_is_kept():
    mask = np.zeros((5, 12), dtype=bool)
    mask[:2, :11] = True
    objective = PromptedMasks(create("sam-test"))
    for areas in ((60, 20), (20, 60)):
        found = [Mask(mask, 0, quality, 1.0, area) for quality, area in zip((0.8, 0.9), areas)]
        assert [one.crop_area for one in objective.join([*found, Mask(mask[::-1], 0, 0.85, 1.0, 60)])] == (
            [20, 60] if areas[1] == 20 else [60, 20]
        )


@pytest.mark.parametrize(("size", "layers"), [((60, 42), 2), ((1500, 1000), 2), ((333, 777), 3), ((50, 50), 0)])
def test_crops_equal_transformers(size, layers):
    from transformers.models.sam.image_processing_pil_sam import _generate_per_layer_crops

    boxes, numbers = _generate_per_layer_crops(layers, 512 / 1500, size[::-1])
    assert build_crops(size, layers) == [(number, tuple(box)) for number, box in zip(numbers, boxes)]


def test_boxes_that_a_crop_cuts_off():
    """Equal to transformers' filter, which is that of the authors: an edge of the crop that is one of the image cuts nothing."""
    from transformers.models.sam.image_processing_pil_sam import _is_box_near_crop_edge

    size, chance, results = (300, 200), np.random.default_rng(0), []
    for _, crop in build_crops(size, 2):
        own = (crop[2] - crop[0], crop[3] - crop[1])
        for _ in range(40):
            x, y = (np.sort(chance.integers(0, length, 2)) for length in own)
            inside = torch.tensor([[x[0], y[0], x[1], y[1]]])
            want = bool(_is_box_near_crop_edge(inside, list(crop), [0, 0, *size]))
            moved = (x[0] + crop[0], y[0] + crop[1], x[1] + crop[0], y[1] + crop[1])
            results.append(is_cut_off(tuple(map(int, moved)), crop, size))
            assert results[-1] == want
    assert 0.1 < np.mean(results) < 0.9


@torch.no_grad()
def test_masks_of_crops_equal_the_equations(folder, photo, tmp_path):
    """Each crop as an image of its own; of duplicates of two crops, the mask of the smaller one is kept."""
    limits = {"min_quality": 0.05, "min_stability": 0.05, "overlap": 0.5}
    ours, picture = pipeline(folder), Image.open(photo)
    (answer,) = ours.predict(str(photo), grid=4, crops=2, crop_factor=2, **limits)
    found = []
    for layer, corners in build_crops(picture.size, 2):
        left, top, right, bottom = corners
        picture.crop(corners).save(tmp_path / "crop.png")
        (masks,) = ours.predict(str(tmp_path / "crop.png"), grid=max(1, 4 // 2**layer), **limits)
        for one in masks["masks"]:
            whole = np.zeros((picture.height, picture.width), bool)
            whole[top:bottom, left:right] = read_mask(one)
            box = tuple(int(v) for v in find_last_pixels(whole))
            if not is_cut_off(box, corners, picture.size):
                found.append(((right - left) * (bottom - top), one["score"], whole, box))
    found.sort(key=lambda one: one[0])
    order = slow_nms(torch.tensor([one[3] for one in found]), torch.tensor([1.0 / one[0] for one in found]), None, 0.5)
    want = sorted((found[i] for i in order.tolist()), key=lambda one: -one[1])
    assert len(want) == len(answer["masks"]) and len({one[0] for one in want}) > 1
    for one, (_, score, mask, _) in zip(answer["masks"], want):
        assert one["score"] == pytest.approx(score, abs=1e-4) and (read_mask(one) == mask).all()


def test_signature_and_errors(folder, photo, tmp_path):
    model = pipeline(folder)
    names = [spec.name for spec in model.signature.tensors]
    assert names == ["image", "points", "point_labels", "size"]
    assert {"points", "boxes", "grid"} <= {option.name for option in model.signature.options}
    with pytest.raises(DataError, match=r"the point 70,20 is outside of the image, which has 60 x 42"):
        model.predict(str(photo), points="70,20")
    with pytest.raises(SettingsError, match="has no option point"):
        model.predict(str(photo), point="1,2")
    with pytest.raises(DataError, match="no targets"):
        model.evaluate(str(photo))
    small = tmp_path / "small.png"
    Image.new("L", (20, 30), 90).save(small)
    answers = model.predict([str(photo), str(small)], points="10,10")
    assert [a["masks"][0]["mask"]["size"] for a in answers] == [[42, 60], [30, 20]]
    assert json.loads(json.dumps(answers[0]["masks"]))
