"""Checkpoints in FP8 and MXFP4: dequantized as transformers does, and loaded by the names on disk."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

import fieldguide
from fieldguide.checkpoints import weights
from fieldguide.checkpoints.quantized_blocks import dequantize_blocks, dequantize_fp8, dequantize_mxfp4
from fieldguide.core.errors import WeightsError
from test_parity_decoders import CONFIGS, edit, theirs
from tv import transformers


def quantize_fp8(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Return 8-bit floats and the factor of each block of 128 x 128."""
    rows, columns = weight.shape
    scales = torch.empty(-(-rows // 128), -(-columns // 128))
    numbers = torch.empty(rows, columns, dtype=torch.float8_e4m3fn)
    for i in range(scales.shape[0]):
        for j in range(scales.shape[1]):
            block = slice(128 * i, 128 * i + 128), slice(128 * j, 128 * j + 128)
            scales[i, j] = weight[block].abs().max() / 448
            numbers[block] = (weight[block] / scales[i, j]).to(torch.float8_e4m3fn)
    return numbers, scales


def test_fp8_equals_transformers():
    from transformers.integrations.finegrained_fp8 import Fp8Dequantize, _dequantize_fp8_weight

    torch.manual_seed(0)
    numbers, scales = quantize_fp8(torch.randn(256, 384))
    want = Fp8Dequantize(None).convert({"weight": [numbers], "weight_scale_inv": [scales]})["weight"]
    assert want.dtype == torch.float32 and torch.equal(dequantize_fp8(numbers, scales, ""), want)
    numbers, scales = quantize_fp8(torch.randn(300, 130))  # the last blocks are smaller
    want = _dequantize_fp8_weight(numbers, scales, [128, 128], torch.float32)
    assert torch.equal(dequantize_fp8(numbers, scales, ""), want)


def test_mxfp4_equals_transformers():
    """All bytes, and all exponents of normal numbers."""
    from transformers.integrations.mxfp4 import convert_moe_packed_tensors

    torch.manual_seed(0)
    blocks = torch.stack([torch.randperm(256).view(16, 16) for _ in range(6)]).view(2, 3, 16, 16).to(torch.uint8)
    scales = torch.randint(1, 250, (2, 3, 16), dtype=torch.uint8)
    want = convert_moe_packed_tensors(blocks, scales, dtype=torch.float32)
    found = dequantize_mxfp4(blocks, scales, "")
    assert found.shape == (2, 512, 3) and torch.equal(found, want) and found.unique().numel() > 500


@torch.no_grad()
def test_gpt_oss_with_mxfp4_experts(tmp_path):
    """The published files hold the experts as blocks and scales, and everything else as it is."""
    changes = {**CONFIGS["gpt-oss"][0], "hidden_size": 32, "intermediate_size": 64}
    peer = theirs("gpt-oss", changes)
    state = {key: x.clone() for key, x in peer.state_dict().items()}
    for key in [key for key in state if key.endswith("_proj") and ".experts." in key]:
        columns, rows = state.pop(key).shape[1:]
        state[f"{key}_blocks"] = torch.randint(256, (5, rows, columns // 32, 16), dtype=torch.uint8)
        state[f"{key}_scales"] = torch.randint(122, 127, (5, rows, columns // 32), dtype=torch.uint8)
    plain = dequantize_blocks(state, "")
    assert plain.keys() == peer.state_dict().keys()
    peer.load_state_dict(plain)
    peer.save_pretrained(tmp_path)
    save_file(state, tmp_path / "model.safetensors", {"format": "pt"})
    edit(tmp_path, quantization_config={"quant_method": "mxfp4", "modules_to_not_convert": ["lm_head"]})
    ours, tokens = fieldguide.load(tmp_path), torch.randint(30, (2, 11))
    torch.testing.assert_close(ours(tokens), peer(tokens).logits, rtol=1e-4, atol=1e-4)
    theirs_again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, experts_implementation="eager").float()
    torch.testing.assert_close(ours(tokens), theirs_again(tokens).logits, rtol=2e-2, atol=2e-2)  # it dequantizes to bfloat16


@torch.no_grad()
def test_deepseek_v3_as_published(tmp_path):
    """FP8 matrices with scales in two shards, and the layer that predicts one more token."""
    peer = theirs("deepseek-v3", CONFIGS["deepseek-v3"][0])
    peer.save_pretrained(tmp_path)
    state, plain = {}, load_file(tmp_path / "model.safetensors")
    quantized = [
        key for key, x in plain.items() if x.ndim == 2 and "embed" not in key and "lm_head" not in key and "gate." not in key
    ]
    assert any(".experts.11." in key for key in quantized)
    for key, x in plain.items():
        if key in quantized:
            state[key], state[f"{key}_scale_inv"] = quantize_fp8(x)
            plain[key] = dequantize_fp8(state[key], state[f"{key}_scale_inv"], "")
        else:
            state[key] = x
    last = {key.replace("layers.2.", "layers.3."): x.clone() for key, x in state.items() if "layers.2." in key}
    last |= {f"model.layers.3.{part}.weight": torch.ones(16) for part in ("enorm", "hnorm", "shared_head.norm")}
    last |= {f"model.layers.3.{part}.weight": torch.ones(30, 16) for part in ("embed_tokens", "shared_head.head")}
    last |= {"model.layers.3.eh_proj.weight": torch.ones(16, 32)}
    (tmp_path / "model.safetensors").unlink()
    parts = {"a.safetensors": {}, "b.safetensors": {}}
    for i, (key, x) in enumerate((state | last).items()):  # matrices and their scales may stand in different files
        parts["ab"[i % 2] + ".safetensors"][key] = x
    for file, some in parts.items():
        save_file(some, tmp_path / file, {"format": "pt"})
    index = {"weight_map": {key: file for file, some in parts.items() for key in some}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    edit(tmp_path, num_nextn_predict_layers=1, quantization_config={"quant_method": "fp8", "weight_block_size": [128, 128]})
    plain.pop("lm_head.weight")
    want = type(peer).from_pretrained(None, config=peer.config, state_dict=plain | {"lm_head.weight": state["lm_head.weight"]})
    ours, tokens = fieldguide.load(tmp_path), torch.randint(30, (2, 11))
    torch.testing.assert_close(ours(tokens), want.eval()(tokens).logits, rtol=1e-4, atol=1e-4)
    assert (ours(tokens) - peer(tokens).logits).abs().max() > 1e-3  # 8 bits are not exact


def test_incomplete_or_misshaped_scales_are_rejected(tmp_path):
    numbers, scales = quantize_fp8(torch.randn(130, 20))
    with pytest.raises(WeightsError, match=r"a\.weight_scale_inv, the scales of a quantized tensor, is missing"):
        dequantize_blocks({"a.weight": numbers}, "file")
    with pytest.raises(WeightsError, match=r"a\.weight \(130x20\) has scales of the shape 1x1"):
        dequantize_blocks({"a.weight": numbers, "a.weight_scale_inv": scales[:1]}, "file")
    blocks, bytes_ = torch.zeros(2, 3, 1, 16, dtype=torch.uint8), torch.zeros(2, 3, 1, dtype=torch.uint8)
    with pytest.raises(WeightsError, match=r"x_scales, the scales of a quantized tensor, is missing"):
        dequantize_blocks({"x_blocks": blocks}, "file")
    with pytest.raises(WeightsError, match="one byte is needed for each block"):
        dequantize_blocks({"x_blocks": blocks, "x_scales": bytes_[:1]}, "file")
    other = {"a.weight": torch.ones(2, 2), "a.weight_scale_inv": torch.ones(1, 1), "b_scales": torch.ones(1)}
    assert dequantize_blocks(other, "file").keys() == other.keys()  # of other formats
    save_file({"a.weight": numbers, "a.weight_scale_inv": scales}, tmp_path / "model.safetensors")
    assert weights.read(tmp_path)["a.weight"].dtype == torch.float32
