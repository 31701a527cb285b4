"""The metadata of GGUF files is used or named: rotary scaling, missing vocabulary sizes, other architectures."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

import fieldguide
from fieldguide.checkpoints import weights
from fieldguide.core.errors import WeightsError
from fieldguide.models.transformer.llama import fit_rope_scaling
from test_pretrained import settled
from tv import transformers

gguf = pytest.importorskip("gguf")
IDS = torch.arange(20).reshape(2, 10) % 17 + 2


def write(path, model, architecture, factors=None, **metadata):
    """Write a network as a GGUF file in float32, without a vocabulary."""
    c, writer = model.config, gguf.GGUFWriter(path, architecture)
    writer.add_context_length(c.length)
    writer.add_embedding_length(c.dim)
    writer.add_block_count(c.depth)
    writer.add_feed_forward_length(c.hidden)
    writer.add_head_count(c.heads)
    writer.add_head_count_kv(c.kv_heads)
    writer.add_layer_norm_rms_eps(c.eps)
    writer.add_rope_freq_base(c.rope_theta)
    if hasattr(c, "width"):
        writer.add_key_length(c.width)
        writer.add_value_length(c.width)
    for key, value in metadata.items():
        getattr(writer, f"add_{key}")(value)
    state = {k: v for k, v in model.state_dict().items() if not (c.tie_embeddings and k == "head.weight")}
    for name, tensor in weights.translate(state, weights.get_tables(model)["gguf"], reverse=True).items():
        writer.add_tensor(name, tensor.contiguous().numpy())
    if factors is not None:
        writer.add_tensor("rope_freqs.weight", np.array(factors, dtype=np.float32))
    for step in (writer.write_header_to_file, writer.write_kv_data_to_file, writer.write_tensors_to_file, writer.close):
        step()
    return path


def logits(model):
    with torch.no_grad():
        return model.eval()(IDS, torch.ones_like(IDS, dtype=torch.bool))


def llama3_factors(width, theta, factor, low, high, original):
    """The scaling of Llama 3.1, written as in its release: by wavelengths."""
    out = []
    for i in range(width // 2):
        wavelength = 2 * math.pi * theta ** (2 * i / width)
        if wavelength < original / high:
            out.append(1.0)
        elif wavelength > original / low:
            out.append(factor)
        else:
            smooth = (original / wavelength - low) / (high - low)
            out.append(1 / ((1 - smooth) / factor + smooth))
    return out


@pytest.mark.parametrize(
    "scaling", [(8.0, 1.0, 4.0, 8192.0), (32.0, 1.0, 4.0, 8192.0), (4.0, 1.0, 4.0, 2048.0), (16.0, 1.0, 8.0, 4096.0)]
)
@pytest.mark.parametrize("width", [64, 128])
def test_the_scaling_of_llama_is_recovered_from_the_factors(scaling, width):
    factors = np.float32(llama3_factors(width, 500_000.0, *scaling)).tolist()
    assert fit_rope_scaling(factors, 500_000.0, width, None) == pytest.approx(scaling, rel=0.01)


def test_factors_of_another_scaling_are_rejected():
    with pytest.raises(WeightsError, match=r"not those of Llama 3\.1"):
        fit_rope_scaling(np.linspace(1, 9, 32).tolist(), 10_000.0, 64, None)


def test_the_original_length_of_a_file_changes_its_logits(tmp_path):
    scaling = (4.0, 1.0, 4.0, 64.0)
    model = settled(fieldguide.create("llama-test", dim=64, hidden=32, heads=2, kv_heads=1, length=256, rope_scaling=scaling))
    path = write(tmp_path / "a.gguf", model, "llama", llama3_factors(32, model.config.rope_theta, *scaling))
    again = fieldguide.load(path)
    assert again.config.rope_scaling == pytest.approx(scaling, rel=0.02)
    torch.testing.assert_close(logits(again), logits(model), rtol=0, atol=2e-4)


@pytest.mark.parametrize("kind", ["linear", "yarn"])
def test_other_scalings_are_named(tmp_path, kind):
    model = settled(fieldguide.create("llama-test"))
    scaling = {"rope_scaling_type": gguf.RopeScalingType(kind), "rope_scaling_factor": 4.0}
    path = write(tmp_path / "a.gguf", model, "llama", **scaling)
    with pytest.raises(WeightsError, match=rf"rope\.scaling\.type='{kind}'"):
        fieldguide.load(path)


@pytest.mark.parametrize("tied", [True, False])
def test_qwen3_files(tmp_path, tied):
    model = settled(fieldguide.create("qwen3-test", dim=32, hidden=48, heads=4, kv_heads=2, width=16, tie_embeddings=tied))
    write(tmp_path / "a.gguf", model, "qwen3")
    again = fieldguide.load(tmp_path / "a.gguf")
    assert again.config == model.config
    torch.testing.assert_close(logits(again), logits(model), rtol=0, atol=1e-5)


def test_qwen3_files_are_those_of_transformers(tmp_path):
    """transformers reads the same file, and gives the same logits."""
    pytest.importorskip("accelerate")
    model = settled(
        fieldguide.create("qwen3-test", dim=32, hidden=48, heads=4, kv_heads=2, width=128, length=64)
    )  # transformers ignores the width
    write(tmp_path / "a.gguf", model, "qwen3", vocab_size=model.config.vocab_size)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file="a.gguf", dtype=torch.float32).eval()
    with torch.no_grad():
        torch.testing.assert_close(theirs(IDS).logits, logits(fieldguide.load(tmp_path / "a.gguf")), rtol=0, atol=1e-4)


def test_other_architectures_are_named(tmp_path):
    model = settled(fieldguide.create("llama-test"))
    write(tmp_path / "a.gguf", model, "falcon")
    with pytest.raises(WeightsError, match="falcon"):
        fieldguide.load(tmp_path / "a.gguf")
