"""Mamba-2: a state-space model computed by matrix products (Dao and Gu 2024, arXiv:2405.21060).

New here: each head has one decay per token, instead of one for each channel and each number of its state as in Mamba. The recurrence
then equals attention without a softmax, whose scores shrink by the decays between two tokens. So a sequence is cut into chunks:
within a chunk it is computed like attention, and from chunk to chunk one state per head is passed on (section 6). Memory and time of
a generated token do not grow with the text.

Initialization: as in the authors' code. Matrices and convolutions as in torch, those of outputs divided by the square root of the
depth; embeddings N(0, 0.02); rates of decay uniform from 1 to 16; time steps from 0.001 to 0.1, uniform in their logarithm; skip
weights 1.
Shapes: B batch, T tokens, L tokens of a chunk, D width, I = expand D, H heads, G groups, R = H / G, S state size, d = I / H.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fieldguide.core.card import Card, Size
from fieldguide.core.errors import SettingsError, WeightsError
from fieldguide.models.layers.kv_cache import Cache
from fieldguide.models.layers.norm import RMSNorm
from fieldguide.models.mapping.config_rules import ConfigRow, Derived, Expect, WithDefault
from fieldguide.models.mapping.key_rules import Row
from fieldguide.models.transformer import llama

STEP_RANGE, MIN_STEP = (0.001, 0.1), 1e-4  # initial time steps
DECAY_RANGE = (1.0, 16.0)  # initial rates of decay
HEAD_WIDTH = 64  # d in the authors' files, which do not contain it


@dataclass(frozen=True, kw_only=True)
class Config:
    vocab_size: int = 50_288
    length: int = 1_048_576  # sequence length in training, in tokens; longer inputs are possible
    dim: int = 768  # D
    depth: int = 24
    heads: int = 24  # H
    state: int = 128  # S
    state_groups: int = 1  # G: heads of a group write the same vectors to their states and read by the same
    expand: int = 2  # I / D
    kernel: int = 4  # length of the convolutions, in tokens
    chunk: int = 256  # tokens of a chunk, which influence the speed only
    eps: float = 1e-5
    tie_embeddings: bool = True  # the output head shares the weights of the embedding


class GatedNorm(nn.Module):
    """RMS normalization of each group of channels, after multiplication by a gate."""

    def __init__(self, dim: int, groups: int, eps: float):
        super().__init__()
        self.weight, self.groups, self.eps = nn.Parameter(torch.ones(dim)), groups, eps

    def forward(self, x: Tensor, gate: Tensor) -> Tensor:  # B T I, B T I -> B T I
        x = (x * F.silu(gate)).unflatten(-1, (self.groups, -1))
        return F.rms_norm(x, x.shape[-1:], None, self.eps).flatten(-2) * self.weight.to(x.dtype)


class Mixer(nn.Module):
    """The layer that mixes tokens: a convolution over the last few, then for each head the recurrence

        state = exp(-step * decay) * state + step * write x^T,   y = read^T state + skip * x

    where step, write (S), read (S) and x (d) depend on the token. Padding leaves the state as it is. Raises `SettingsError` if the
    numbers of heads and groups do not divide the width.
    """

    def __init__(self, c: Config):
        super().__init__()
        inner = c.expand * c.dim
        if inner % c.heads or c.heads % c.state_groups:
            raise SettingsError(
                f"heads={c.heads} must divide expand * dim = {inner}, and be divisible by state_groups={c.state_groups}."
            )
        self.groups, self.kernel, self.chunk, self.depth = c.state_groups, c.kernel, c.chunk, c.depth
        self.parts = [inner, c.state_groups * c.state, c.state_groups * c.state]  # of x, write and read
        self.widths = [inner, sum(self.parts), c.heads]
        self.up = nn.Linear(c.dim, sum(self.widths), bias=False)
        self.conv = nn.Conv1d(sum(self.parts), sum(self.parts), c.kernel, groups=sum(self.parts))
        self.step_bias = nn.Parameter(torch.empty(c.heads))
        self.log_decay = nn.Parameter(torch.empty(c.heads))
        self.skip = nn.Parameter(torch.ones(c.heads))
        self.norm = GatedNorm(inner, c.state_groups, c.eps)
        self.down = nn.Linear(inner, c.dim, bias=False)
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        nn.init.uniform_(self.step_bias, math.log(STEP_RANGE[0]), math.log(STEP_RANGE[1]))
        step = self.step_bias.exp().clamp(min=MIN_STEP)
        self.step_bias.copy_(step + torch.log(-torch.expm1(-step)))  # the inverse of softplus
        nn.init.uniform_(self.log_decay, *DECAY_RANGE)
        self.log_decay.log_()
        self.down.weight /= math.sqrt(self.depth)

    def forward(self, x: Tensor, mask: Tensor | None, cache: Cache | None, layer: int) -> Tensor:  # B T D -> B T D
        gate, mixed, step = self.up(x).split(self.widths, -1)
        step = F.softplus(step + self.step_bias)  # B T H
        if mask is not None:
            mixed, step = mixed * mask[..., None], step * mask[..., None]
        states = None if cache is None else cache.states[2 * layer : 2 * layer + 2]
        mixed = F.silu(self.convolve(mixed, None if states is None else states[0]))
        x, write, read = mixed.split(self.parts, -1)
        x, step = self.group(x), self.group(step)  # B G R T d, B G R T 1
        write, read = (part.unflatten(-1, (self.groups, -1)).transpose(1, 2)[:, :, None] for part in (write, read))  # B G 1 T S
        decay = -self.log_decay.exp().view(self.groups, -1, 1) * step[..., 0]  # B G R T
        y, last = scan(x * step, decay, write, read, self.chunk, None if states is None else states[1])
        if states is not None:
            states[1].copy_(last)
        y = y + self.skip.view(self.groups, -1, 1, 1) * x
        return self.down(self.norm(y.flatten(1, 2).transpose(1, 2).flatten(2), gate))

    def group(self, x: Tensor) -> Tensor:  # B T H*d -> B G R T d
        """Return what belongs to each head."""
        return x.unflatten(-1, (self.widths[2], -1)).transpose(1, 2).unflatten(1, (self.groups, -1))

    def convolve(self, x: Tensor, state: Tensor | None) -> Tensor:  # B T C -> B T C
        """Return the convolution over the last tokens; `state` B C kernel-1 holds those before these, and is updated."""
        x = x.transpose(1, 2)
        x = F.pad(x, (self.kernel - 1, 0)) if state is None else torch.cat([state.to(x.dtype), x], -1)
        if state is not None:
            state.copy_(x[..., x.shape[-1] - self.kernel + 1 :])
        return self.conv(x).transpose(1, 2)


def scan(
    x: Tensor, decay: Tensor, write: Tensor, read: Tensor, chunk: int, state: Tensor | None = None
) -> tuple[Tensor, Tensor]:  # B G R T d, B G R T, B G 1 T S, B G 1 T S -> B G R T d, B G R S d
    """Return the outputs of the recurrence state = exp(decay) state + write x^T, y = read^T state, and the last state.

    `state` B G R S d is that before the first token. A traced graph, which leaves the number of tokens open, has a single chunk.
    """
    parts = (x, decay, write, read)
    chunks: Iterable[Sequence[Tensor]] = [parts]
    if isinstance(x.shape[3], int):
        chunks = zip(*(part.split(chunk, 3) for part in parts))
    state = x.new_zeros(*x.shape[:3], write.shape[-1], x.shape[-1]) if state is None else state
    found = []
    for xs, decays, writes, reads in chunks:
        total = decays.cumsum(-1)[..., None]  # B G R L 1, since the start of the chunk
        end = total[..., -1:, :]
        scores = (reads @ writes.mT) * sum_segments(decays).exp()  # B G R L L
        found.append(scores @ xs + (reads @ state) * total.exp())
        state = state * end.exp() + writes.mT @ (xs * (end - total).exp())
    return torch.cat(found, 3), state


def sum_segments(decay: Tensor) -> Tensor:  # ... L -> ... L L
    """Return the sums of the decays after token j up to token i, in row i and column j; minus infinity for j > i.

    Differences of one cumulative sum would lose precision.
    """
    length = decay.shape[-1]
    later = torch.ones(length, length, dtype=torch.bool, device=decay.device).triu(1)
    return decay[..., None].expand(*decay.shape, length).tril(-1).cumsum(-2).masked_fill(later, -torch.inf)


class Block(nn.Module):
    """A pre-norm block: a mixer with a residual connection. There is no MLP."""

    def __init__(self, c: Config):
        super().__init__()
        self.norm, self.mixer = RMSNorm(c.dim, c.eps), Mixer(c)

    def forward(self, x: Tensor, mask: Tensor | None, cache: Cache | None, layer: int) -> Tensor:  # B T D -> B T D
        return x + self.mixer(self.norm(x), mask, cache, layer)


class Mamba2(llama.Decoder):
    """A decoder that returns the logits of the next token at each position; same interface as `Llama`.

    Its cache holds the states of all layers, whose size does not depend on the number of tokens.
    """

    block = Block

    def __init__(self, config: Config):
        super().__init__(config, RMSNorm(config.dim, config.eps), config.tie_embeddings)

    def reset_parameters(self) -> None:
        nn.init.normal_(self.embed.weight, std=0.02)

    def new_cache(self, rows: int, length: int | None = None) -> Cache:
        """Return a cache for `length` tokens per row, by default and at most the length in training."""
        c, weight = self.config, self.embed.weight
        inner = c.expand * c.dim
        convolution = (inner + 2 * c.state_groups * c.state, c.kernel - 1)
        state = (c.state_groups, c.heads // c.state_groups, c.state, inner // c.heads)
        capacity = min(length or c.length, c.length)
        return Cache(rows, capacity, 0, 0, 0, states=[convolution, state] * c.depth, dtype=weight.dtype, device=weight.device)

    def features(self, tokens: Tensor, mask: Tensor | None = None, cache: Cache | None = None) -> Tensor:  # -> B T D
        if cache is not None:
            cache.reserve(tokens.shape[1], mask)
        x = self.embed(tokens)
        for layer, block in enumerate(self.blocks):
            x = block(x, mask, cache, layer)
        return self.norm(x)


LAYER, OURS = "backbone.layers.{i}.", "blocks.{i}."
HUGGINGFACE: dict[str, Row] = {
    "backbone.embeddings.weight": "embed.weight",
    LAYER + "norm.weight": OURS + "norm.weight",
    LAYER + "mixer.in_proj.weight": OURS + "mixer.up.weight",
    LAYER + "mixer.conv1d.*": OURS + "mixer.conv.*",
    LAYER + "mixer.dt_bias": OURS + "mixer.step_bias",
    LAYER + "mixer.A_log": OURS + "mixer.log_decay",
    LAYER + "mixer.D": OURS + "mixer.skip",
    LAYER + "mixer.norm.weight": OURS + "mixer.norm.weight",
    LAYER + "mixer.out_proj.weight": OURS + "mixer.down.weight",
    "backbone.norm_f.weight": "norm.weight",
    "lm_head.weight": "head.weight",  # absent if tied to the embedding
}
AUTHORS: dict[str, Row] = {name.replace("embeddings", "embedding"): row for name, row in HUGGINGFACE.items()}


def check_step_limit(theirs: Mapping[str, Any]) -> dict[str, Any]:
    """Raise `WeightsError` if time steps are limited."""
    limits = theirs.get("time_step_limit") or [0.0, math.inf]
    if limits not in ([0.0, math.inf], [0.0, {"__float__": "Infinity"}]):  # the latter is how transformers 5 writes it
        raise WeightsError(f"time_step_limit={limits} is not supported: time steps must be unlimited.")
    return {}


def read_heads(theirs: Mapping[str, Any]) -> dict[str, Any]:
    """Return the numbers of heads and tokens, which follow from others in the authors' files."""
    ssm, multiple = theirs["ssm_cfg"], theirs.get("pad_vocab_size_multiple", 8)
    inner = ssm.get("expand", 2) * theirs["d_model"]
    return {
        "heads": inner // ssm.get("headdim", HEAD_WIDTH),
        "vocab_size": multiple * -(-theirs["vocab_size"] // multiple),
        "state": ssm.get("d_state", 128),
        "state_groups": ssm.get("ngroups", 1),
        "expand": ssm.get("expand", 2),
        "kernel": ssm.get("d_conv", 4),
    }


CONFIG: dict[str, ConfigRow] = {
    "model_type": Expect("mamba2"),
    "architectures": Expect(["Mamba2ForCausalLM"]),
    "vocab_size": "vocab_size",
    "max_position_embeddings": WithDefault("length", 1_048_576),  # ours; absent from public files
    "hidden_size": "dim",
    "num_hidden_layers": "depth",
    "num_heads": "heads",
    "head_dim": Expect(lambda c: c.expand * c.dim // c.heads),
    "state_size": WithDefault("state", 128),
    "n_groups": WithDefault("state_groups", 8),
    "expand": WithDefault("expand", 2),
    "conv_kernel": WithDefault("kernel", 4),
    "chunk_size": WithDefault("chunk", 256),
    "layer_norm_epsilon": WithDefault("eps", 1e-5),
    "use_bias": Expect(False),
    "use_conv_bias": Expect(True),
    "hidden_act": Expect("silu"),
    "time_step_limit": Derived(check_step_limit, lambda c: [0.0, math.inf]),
    "tie_word_embeddings": WithDefault("tie_embeddings", False),
}
AUTHORS_CONFIG: dict[str, ConfigRow] = {
    "ssm_cfg.layer": Expect("Mamba2", among=("Mamba2",)),
    "d_model": "dim",
    "n_layer": "depth",
    "<heads>": Derived(read_heads, lambda c: None),
    "d_intermediate": Expect(0),
    "attn_layer_idx": Expect([]),
    "rms_norm": Expect(True),
    "tie_embeddings": WithDefault("tie_embeddings", True),
}


def make_size(dim: int, depth: int, params: int, source: str) -> Size:
    """Return a size with heads of width 64."""
    return Size(dim=dim, depth=depth, heads=2 * dim // HEAD_WIDTH, params=params, source=source)


CARD = Card(
    name="mamba2",
    model=Mamba2,
    config=Config,
    paper="arXiv:2405.21060",
    year=2024,
    input_type="tokens",
    output_type="tokens",
    endless=True,
    sizes={
        "mamba2-130m": make_size(768, 24, 128_989_632, "state-spaces/mamba2-130m"),
        "mamba2-370m": make_size(1024, 48, 368_346_624, "state-spaces/mamba2-370m"),
        "mamba2-780m": make_size(1536, 48, 780_161_280, "state-spaces/mamba2-780m"),
        "mamba2-1.3b": make_size(2048, 48, 1_343_757_312, "state-spaces/mamba2-1.3b"),
        "mamba2-2.7b": make_size(2560, 64, 2_702_599_680, "state-spaces/mamba2-2.7b"),
        "codestral-mamba-7b": Size(
            vocab_size=32_768,
            dim=4096,
            depth=64,
            heads=128,
            state_groups=8,
            tie_embeddings=False,
            params=7_285_403_648,
            source="mistralai/Mamba-Codestral-7B-v0.1",
        ),
        "mamba2-test": Size(
            vocab_size=30, length=12, dim=12, depth=2, heads=4, state=5, state_groups=2, chunk=4, tie_embeddings=False
        ),
    },
    weights={"huggingface": HUGGINGFACE, "state-spaces": AUTHORS},
    configs={"huggingface": CONFIG, "state-spaces": AUTHORS_CONFIG},
    recipe=llama.CARD.recipe,
)
