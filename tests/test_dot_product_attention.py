"""Attention by matrix products against torch's fused kernel, and when which is used."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from fieldguide.models.layers.dot_product_attention import (
    MAX_SCORES,
    attend_unfused,
    dot_product_attention,
    is_unfused_faster,
    slice_attention,
    use_fused_kernels,
)

PADDING = torch.ones(2, 1, 1, 7, dtype=torch.bool)
PADDING[0, ..., 4:] = False
CASES = {
    "plain": {},
    "causal": {"is_causal": True},
    "padding": {"mask": PADDING},
    "bias": {"mask": torch.randn(1, 4, 7, 7, generator=torch.Generator().manual_seed(3))},
    "scale": {"scale": 1.0},
}


def draw(heads: int = 4, keys: int = 4) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(2, n, 7, 8, generator=generator, requires_grad=True) for n in (heads, keys, keys)]


@pytest.mark.parametrize("case", CASES)
def test_unfused_attention_equals_the_fused_one(case):
    options, gradients = CASES[case], []
    for attend in (dot_product_attention, lambda q, k, v, mask=None, **o: F.scaled_dot_product_attention(q, k, v, mask, **o)):
        inputs = draw()
        with torch.autocast("cpu", torch.bfloat16):
            y = attend(*inputs, **options)
        assert y.dtype == torch.bfloat16
        y.float().square().sum().backward()
        gradients.append([y.detach().float(), *(x.grad for x in inputs)])
    for ours, fused in zip(*gradients):
        torch.testing.assert_close(ours, fused, rtol=0, atol=0.03 * fused.abs().max().item())


def test_groups_of_heads_share_their_keys():
    q, k, v = draw(heads=4, keys=2)
    expected = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
    ours = attend_unfused(q, k, v, None, 0.0, True, None)
    torch.testing.assert_close(ours.float(), expected, rtol=0, atol=0.03)


def test_query_without_keys_gets_zeros():
    mask = PADDING.clone()
    mask[1] = False
    inputs = draw()
    y = attend_unfused(*inputs, mask, 0.0, False, None)
    assert (y[1] == 0).all()
    y.float().sum().backward()
    assert all(x.grad.isfinite().all() for x in inputs)


def test_dropout_keeps_the_mean():
    torch.manual_seed(0)
    q, k, v = draw()
    many = torch.stack([attend_unfused(q, k, v, None, 0.5, False, None).float() for _ in range(400)]).mean(0)
    torch.testing.assert_close(many, F.scaled_dot_product_attention(q, k, v), rtol=0, atol=0.2)


def test_the_fused_kernel_is_kept_in_float32_for_prediction_and_for_long_texts():
    q, k, _ = draw()
    assert not is_unfused_faster(q, k)
    with torch.autocast("cpu", torch.bfloat16):
        assert is_unfused_faster(q, k)
        with use_fused_kernels():
            assert not is_unfused_faster(q, k)
        with torch.inference_mode():
            assert not is_unfused_faster(q, k)
        long = torch.empty(1, 1, 1, 1, requires_grad=True).expand(1, 1, MAX_SCORES, 1)
        assert not is_unfused_faster(long, long)


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("size", [1, 3, 7, 50])
def test_sliced_attention_equals_the_whole(case, size):
    options = CASES[case]
    inputs = draw()
    want = dot_product_attention(*inputs, **options)
    with slice_attention(size):
        torch.testing.assert_close(dot_product_attention(*inputs, **options), want)
    with slice_attention(3), slice_attention(0):
        assert torch.equal(dot_product_attention(*inputs, **options), want)
