"""LoRA files of image generators in all of their formats: the pipeline equals one of diffusers whose weights were changed by hand."""

from __future__ import annotations

import copy
import json
import warnings

import pytest
import torch
from safetensors.torch import save_file

import fieldguide
from fieldguide.checkpoints.lora_files import find_lora, read_updates
from fieldguide.core.errors import WeightsError
from fieldguide.inference.text_to_image import ImageRequest
from test_text_to_image import CLOSE, PROMPT, copy_folder, draw, make

RANK, ALPHA = 3, 6.0
BLOCK = "down_blocks.0.attentions.0"
LINEAR = (f"{BLOCK}.transformer_blocks.0.attn1.to_q", f"{BLOCK}.transformer_blocks.0.attn2.to_out.0", "time_embedding.linear_1")
CONVOLUTIONS = (
    f"{BLOCK}.proj_in",
    "up_blocks.0.resnets.0.conv1",
    "mid_block.resnets.1.conv2",
    "down_blocks.0.downsamplers.0.conv",
)
TEXT = ("encoder.layers.1.self_attn.q_proj", "encoder.layers.0.self_attn.v_proj", "encoder.layers.0.mlp.fc1")
PARTS = {"unet": (*LINEAR, *CONVOLUTIONS), "text_encoder": TEXT}


def draw_factors(peer, parts=None):
    """Return (part, module) -> the two matrices."""
    generator, found = torch.Generator().manual_seed(0), {}
    for part, modules in (parts or PARTS).items():
        for module in modules:
            weight = getattr(peer, part).get_submodule(module).weight
            down = torch.randn(RANK, *weight.shape[1:], generator=generator) * 0.2
            up = torch.randn(weight.shape[0], RANK, *[1] * (weight.ndim - 2), generator=generator) * 0.2
            found[part, module] = down, up
    return found


def change(name: str, factors, scale: float):
    """Return the image of diffusers with weights changed by convolutions with the two matrices."""
    peer = copy.deepcopy(make(name)[0])
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of diffusers about numpy
        for (part, module), (down, up) in factors.items():
            weight = getattr(peer, part).get_submodule(module).weight
            weight += scale * torch.einsum("or,ri...->oi...", up.flatten(1), down)
        peer.set_progress_bar_config(disable=True)
        kept = {"guidance_scale": 2.0, "height": 32, "width": 32, "num_inference_steps": 2}
        return peer(PROMPT, latents=draw(name), output_type="pt", **kept).images


def image_of(folder, name: str, **options):
    ours = fieldguide.pipeline(folder, **options)
    found = ours.parse({"guidance": 2.0, "height": 32, "width": 32, "steps": 2})
    return ours.generate(ImageRequest(PROMPT), found, noise=draw(name)) / 2 + 0.5


def in_diffusers(factors):
    tensors = {}
    for (part, module), (down, up) in factors.items():
        prefix = f"{part}.{'text_model.' if part == 'text_encoder' else ''}{module}"
        tensors |= {f"{prefix}.lora_A.weight": down, f"{prefix}.lora_B.weight": up}
    return tensors


def in_early_diffusers(factors):
    return {k.replace("lora_A", "lora.down").replace("lora_B", "lora.up"): x for k, x in in_diffusers(factors).items()}


def in_kohya(factors):
    tensors = {}
    for (part, module), (down, up) in factors.items():
        prefix = {"unet": "lora_unet_", "text_encoder": "lora_te_text_model_"}[part] + module.replace(".", "_")
        tensors |= {f"{prefix}.lora_down.weight": down, f"{prefix}.lora_up.weight": up, f"{prefix}.alpha": torch.tensor(ALPHA)}
    return tensors


@pytest.mark.parametrize("form, scale", [(in_diffusers, 1.0), (in_early_diffusers, 1.0), (in_kohya, ALPHA / RANK)])
def test_files_of_stable_diffusion(form, scale, tmp_path):
    peer, folder = make("sd")
    factors = draw_factors(peer)
    save_file(form(factors), tmp_path / "lora.safetensors")
    found = image_of(folder, "sd", lora=str(tmp_path / "lora.safetensors"))
    torch.testing.assert_close(found, change("sd", factors, scale), **CLOSE)
    assert (found - image_of(folder, "sd")).abs().max() > 1e-2
    half = image_of(folder, "sd", lora=str(tmp_path / "lora.safetensors"), lora_scale=0.5)
    torch.testing.assert_close(half, change("sd", factors, scale / 2), **CLOSE)


def test_scales_of_peft_and_a_lora_next_to_the_pipeline(tmp_path):
    peer, folder = make("sd")[0], copy_folder("sd", tmp_path)
    factors = draw_factors(peer, {"unet": LINEAR})
    metadata = {"unet.r": RANK, "unet.lora_alpha": ALPHA, "unet.alpha_pattern": {}, "unet.rank_pattern": {}}
    file = folder / "pytorch_lora_weights.safetensors"
    save_file(in_diffusers(factors), file, {"lora_adapter_metadata": json.dumps(metadata)})
    torch.testing.assert_close(image_of(folder, "sd"), change("sd", factors, ALPHA / RANK), **CLOSE)
    assert "merged into denoiser" in fieldguide.pipeline(folder).get_notes()[-1]
    (tmp_path / "peft").mkdir()
    plain = {f"base_model.model.{name.removeprefix('unet.')}": x for name, x in in_diffusers(factors).items()}
    save_file(plain, tmp_path / "peft" / "adapter_model.safetensors")
    (tmp_path / "peft" / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "r": RANK, "lora_alpha": 3 * RANK}))
    found = image_of(make("sd")[1], "sd", lora=str(tmp_path / "peft"))
    torch.testing.assert_close(found, change("sd", factors, 3.0), **CLOSE)


def test_early_attention_processors(tmp_path):
    peer, folder = make("sd")
    modules = [f"{BLOCK}.transformer_blocks.0.attn1.{part}" for part in ("to_k", "to_out.0")]
    factors, tensors = draw_factors(peer, {"unet": modules}), {}
    for (_, module), (down, up) in factors.items():
        layer, part = module.removesuffix(".0").rsplit(".", 1)
        tensors |= {f"{layer}.processor.{part}_lora.down.weight": down, f"{layer}.processor.{part}_lora.up.weight": up}
    save_file(tensors, tmp_path / "lora.safetensors")
    torch.testing.assert_close(image_of(folder, "sd", lora=str(tmp_path)), change("sd", factors, 1.0), **CLOSE)


def test_names_of_stability_for_sdxl(tmp_path):
    """Files of kohya for SDXL have the U-Net's names of its authors; diffusers' conversion says which modules they mean."""
    from tv import diffusers

    convert = diffusers.loaders.lora_conversion_utils._maybe_map_sgm_blocks_to_diffusers
    peer, folder = make("sdxl")
    modules = [
        f"{block}.attentions.0.transformer_blocks.1.attn2.to_v" for block in ("down_blocks.1", "mid_block", "up_blocks.0")
    ]
    factors = draw_factors(peer, {"unet": [*modules, "down_blocks.1.attentions.0.proj_out"]})
    places = {"down_blocks.1.attentions.0": "input_blocks_3_1", "mid_block.attentions.0": "middle_block_1"}
    places |= {"up_blocks.0.attentions.0": "output_blocks_0_1"}
    tensors = {}
    for (_, module), (down, up) in factors.items():
        block = next(block for block in places if module.startswith(block))
        name = f"lora_unet_{places[block]}{module.removeprefix(block).replace('.', '_')}"
        tensors |= {f"{name}.lora_down.weight": down, f"{name}.lora_up.weight": up, f"{name}.alpha": torch.tensor(ALPHA)}
    theirs = {key.removeprefix("lora_unet_").partition(".")[0] for key in convert(dict(tensors), peer.unet.config)}
    for here, there in (("input_blocks", "down_blocks"), ("middle_block", "mid_block"), ("output_blocks", "up_blocks")):
        theirs = {name.replace(here, there) for name in theirs}
    assert theirs == {module.replace(".", "_") for _, module in factors}
    save_file(tensors, tmp_path / "lora.safetensors")
    found = image_of(folder, "sdxl", lora=str(tmp_path / "lora.safetensors"))
    torch.testing.assert_close(found, change("sdxl", factors, ALPHA / RANK), **CLOSE)


@pytest.mark.parametrize("name", ["sd3", "flux"])
def test_files_of_transformers(name, tmp_path):
    peer, folder = make(name)
    modules = [f"transformer_blocks.0.attn.{part}" for part in ("to_q", "add_k_proj", "to_out.0")]
    factors = draw_factors(peer, {"transformer": [*modules, "transformer_blocks.0.ff.net.0.proj"]})
    save_file(in_diffusers(factors), tmp_path / "lora.safetensors")
    updates = read_updates(tmp_path / "lora.safetensors", 0.5)["denoiser"]
    theirs = fieldguide.load(folder).state_dict()
    ours = fieldguide.pipeline(folder, lora=str(tmp_path / "lora.safetensors"), lora_scale=0.5).model.state_dict()
    changed = {key for key, x in ours.items() if not torch.equal(x, theirs[key])}
    assert len(changed) == len(factors) == len(updates)
    assert {key.rpartition(".")[0].split(".", 2)[2] for key in changed} == {
        "image.attn.q", "text.attn.k", "image.attn.proj", "image.mlp.up" if name == "sd3" else "image.up"
    }  # fmt: skip
    for (_, module), (down, up) in factors.items():
        torch.testing.assert_close(updates[module], 0.5 * up @ down)


def test_wrong_files(tmp_path):
    peer, folder = make("sd")
    factors = draw_factors(peer, {"unet": LINEAR})
    good = in_diffusers(factors)
    first = next(iter(good)).removesuffix(".lora_A.weight")
    cases = (
        ({key.replace("attn1", "attn7"): x for key, x in good.items()}, "attn7.to_q belongs to no weight"),
        ({key: x for key, x in good.items() if key != f"{first}.lora_B.weight"}, "lacks one of its two matrices"),
        (good | {f"{first}.dora_scale": torch.ones(1)}, "dora_scale is no tensor of a LoRA"),
        (good | {f"{first}.lora_A.weight": torch.ones(RANK, 5)}, "trained for another model"),
        (good | {f"{first}.lora_A.weight": torch.ones(RANK + 1, 8)}, "ranks"),
        ({key.replace("unet.", "text_encoder_2."): x for key, x in good.items()}, "does not have"),
    )
    for tensors, words in cases:
        save_file(tensors, tmp_path / "lora.safetensors")
        with pytest.raises(WeightsError, match=words):
            fieldguide.pipeline(folder, lora=str(tmp_path / "lora.safetensors"))
    with pytest.raises(WeightsError, match="does not exist"):
        find_lora(tmp_path / "other.safetensors")
