"""A LLaMA-family decoder (Touvron et al. 2023) on PyTorch's scaled dot-product attention.

Shapes: B rows, T new positions, S positions attended to (T plus what the cache holds), D width, H query heads,
K key/value heads, h channels of a head. Parameter names are Meta's.
"""

from __future__ import annotations

import math
from typing import Optional

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from sphinx_pl.models.attention import attend, attention_weights
from sphinx_pl.models.config import DecoderConfig


class RMSNorm(nn.Module):
    """x / rms(x) in float32, cast back, then times the weight: LLaMA's order of operations."""

    def __init__(self, width: int, eps: float) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x.float(), x.shape[-1:], eps=self.eps).type_as(x) * self.weight


class KVCache:
    """Keys and values of all layers for up to `max_length` positions, allocated by the first forward pass.

    If `watched` is a layer, `weights` are its attention weights in the last forward pass, [B, H, T, S] in float32.
    """

    def __init__(self, layers: int, max_length: int) -> None:
        self.max_length = max_length
        self.length = 0
        self._keys: list[Optional[Tensor]] = [None] * layers
        self._values: list[Optional[Tensor]] = [None] * layers
        self.watched: Optional[int] = None
        self.weights: Optional[Tensor] = None

    def update(self, layer: int, k_BKTh: Tensor, v_BKTh: Tensor) -> tuple[Tensor, Tensor]:
        """Append to `layer`, return all of its keys and values, [B, K, S, h].

        Raises:
            ValueError: more positions than `max_length`.
        """
        end = self.length + k_BKTh.shape[2]
        if end > self.max_length:
            raise ValueError(f"KVCache of {self.max_length} positions cannot hold {end}")
        keys, values = self._keys[layer], self._values[layer]
        if keys is None or values is None:
            batch, heads, _, channels = k_BKTh.shape
            keys = self._keys[layer] = k_BKTh.new_empty(batch, heads, self.max_length, channels)
            values = self._values[layer] = torch.empty_like(keys)
        keys[:, :, self.length : end] = k_BKTh
        values[:, :, self.length : end] = v_BKTh
        return keys[:, :, :end], values[:, :, :end]

    def advance(self, positions: int) -> None:
        """Called once all layers have been updated."""
        self.length += positions

    def rewind(self, length: int) -> None:
        """Forget what is behind the first `length` positions."""
        self.length = length

    def select(self, rows_B: Tensor) -> None:
        """Row i becomes a copy of row `rows_B[i]`; there may be more or fewer of them than before."""
        for held in (self._keys, self._values):
            held[:] = [None if tensor is None else tensor[rows_B] for tensor in held]

    def reorder(self, rows_B: Tensor, start: int) -> None:
        """Row i becomes row `rows_B[i]` from position `start` on, before which they are the same."""
        for tensor in (*self._keys, *self._values):
            if tensor is not None:
                tensor[:, :, start : self.length] = tensor[rows_B, :, start : self.length]

    def keep(self, choices_B: Tensor, count: int) -> None:
        """Of each row's last `count` positions only the one at `choices_B`."""
        self.length -= count - 1
        rows = torch.arange(len(choices_B), device=choices_B.device)
        for tensor in (*self._keys, *self._values):
            if tensor is not None:
                tensor[:, :, self.length - 1] = tensor[rows, :, self.length - 1 + choices_B]


def rotary_angles(position_ids_BT: Tensor, config: DecoderConfig) -> Tensor:
    """cos + i sin of every position and channel pair (Su et al. 2021), complex64 [B, T, 1, h/2].

    Not a buffer: it would be rounded with a bf16 model, and be missing from a model built on the meta device.
    """
    exponent = torch.arange(0, config.head_dim, 2, device=position_ids_BT.device).float() / config.head_dim
    angles = position_ids_BT[:, :, None, None].float() * config.rope_theta**-exponent
    return torch.polar(torch.ones_like(angles), angles)


def rotate(x_BTHh: Tensor, angles: Tensor) -> Tensor:
    """Turn channel pairs (0, 1), (2, 3), ... by `angles`, in float32."""
    pairs = torch.view_as_complex(torch.unflatten(x_BTHh.float(), -1, (-1, 2)))
    return torch.view_as_real(pairs * angles).flatten(-2)


class Attention(nn.Module):
    """Grouped-query attention (Ainslie et al. 2023), rotary embeddings and, by option, normalised queries and keys."""

    def __init__(self, config: DecoderConfig) -> None:
        super().__init__()
        self.head_dim = config.head_dim
        self.groups = config.heads // config.kv_heads
        self.wq = nn.Linear(config.width, config.heads * config.head_dim, bias=False)
        self.wk = nn.Linear(config.width, config.kv_heads * config.head_dim, bias=False)
        self.wv = nn.Linear(config.width, config.kv_heads * config.head_dim, bias=False)
        self.wo = nn.Linear(config.heads * config.head_dim, config.width, bias=False)
        self.q_norm = RMSNorm(config.head_dim, config.norm_eps) if config.qk_norm else nn.Identity()
        self.k_norm = RMSNorm(config.head_dim, config.norm_eps) if config.qk_norm else nn.Identity()

    def forward(
        self, x_BTD: Tensor, angles: Tensor, bias: Optional[Tensor], cache: Optional[KVCache], layer: int
    ) -> Tensor:
        q, k, v = (w(x_BTD).unflatten(-1, (-1, self.head_dim)) for w in (self.wq, self.wk, self.wv))
        q, k = rotate(self.q_norm(q), angles).type_as(v), rotate(self.k_norm(k), angles).type_as(v)
        q, k, v = (t.transpose(1, 2) for t in (q, k, v))
        if cache is not None:
            k, v = cache.update(layer, k, v)
            if layer == cache.watched:
                cache.weights = attention_weights(q, k, bias)
        if self.groups > 1 and q.shape[2] == 1:  # a group's heads as positions: nothing of the cache is copied
            out = attend(q.unflatten(1, (-1, self.groups)).squeeze(3), k, v, bias, causal=False).flatten(1)[:, None]
            return torch.as_tensor(self.wo(out))
        if self.groups > 1:  # not `enable_gqa`: on GPUs, with a mask, it falls back to the unfused kernel
            k, v = (t.repeat_interleave(self.groups, dim=1) for t in (k, v))
        return torch.as_tensor(self.wo(attend(q, k, v, bias).transpose(1, 2).flatten(2)))


class FeedForward(nn.Module):
    """SwiGLU (Shazeer 2020): w2(silu(w1 x) * w3 x)."""

    def __init__(self, config: DecoderConfig) -> None:
        super().__init__()
        self.w1 = nn.Linear(config.width, config.ffn_width, bias=False)
        self.w2 = nn.Linear(config.ffn_width, config.width, bias=False)
        self.w3 = nn.Linear(config.width, config.ffn_width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return torch.as_tensor(self.w2(F.silu(self.w1(x)) * self.w3(x)))


class SparseFeedForward(nn.Module):
    """Mixtral's mixture of SwiGLU experts (Jiang et al. 2024, section 2.1).

    A token's output is the sum of its best experts', weighted by their softmax renormalised over the chosen ones. All
    experts are one matrix, [experts * F, D], as MegaBlocks stores them; w2 is not transposed.
    """

    def __init__(self, config: DecoderConfig) -> None:
        super().__init__()
        self.experts = config.experts
        self.per_token = config.experts_per_token
        shape = (config.experts * config.ffn_width, config.width)
        self.w1, self.w2, self.w3 = (nn.Parameter(torch.empty(shape)) for _ in range(3))
        self.gate = nn.Linear(config.width, config.experts, bias=False)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """[B, T, D] -> the same shape, and how unevenly the experts are used: 1 if evenly, up to `experts`.

        Unevenness is Switch Transformer's (Fedus et al. 2021, eq. 4): experts * sum of share of choices * mean softmax.
        """
        x_MD = x.flatten(0, -2)
        probabilities = self.gate(x_MD).float().softmax(-1)
        weights, chosen = probabilities.topk(self.per_token)
        weights = (weights / weights.sum(-1, keepdim=True)).to(x.dtype)
        out = torch.zeros_like(x_MD)
        parts = (w.view(self.experts, -1, w.shape[-1]) for w in (self.w1, self.w2, self.w3))
        # Every expert runs, also on no token: its weights take part in every backward pass.
        for expert, (w1, w2, w3) in enumerate(zip(*parts, strict=True)):
            token, rank = torch.where(chosen == expert)
            seen = x_MD[token]
            hidden = F.silu(F.linear(seen, w1)) * F.linear(seen, w3)
            out = out.index_add(0, token, (hidden @ w2.to(hidden.dtype) * weights[token, rank, None]).to(out.dtype))
        share = F.one_hot(chosen, self.experts).float().mean(dim=(0, 1))
        return out.view_as(x), self.experts * (share * probabilities.mean(dim=0)).sum()


class Block(nn.Module):
    """Pre-norm attention and feed-forward, each with its residual."""

    def __init__(self, config: DecoderConfig) -> None:
        super().__init__()
        self.attention = Attention(config)
        self.feed_forward = SparseFeedForward(config) if config.experts else FeedForward(config)
        self.attention_norm = RMSNorm(config.width, config.norm_eps)
        self.ffn_norm = RMSNorm(config.width, config.norm_eps)

    def forward(
        self, x_BTD: Tensor, angles: Tensor, bias: Optional[Tensor], cache: Optional[KVCache], layer: int
    ) -> tuple[Tensor, Optional[Tensor]]:
        """[B, T, D] -> the same shape, and the unevenness of experts where there are any."""
        x_BTD = x_BTD + self.attention(self.attention_norm(x_BTD), angles, bias, cache, layer)
        out = self.feed_forward(self.ffn_norm(x_BTD))
        out, unevenness = out if isinstance(out, tuple) else (out, None)
        return x_BTD + out, unevenness


class TokenEmbedding(nn.Embedding):
    """Ids -> embeddings; hidden states -> logits, where the output head is tied to them.

    The second is a call of this module too, since sharded parameters are whole only while their module is called.
    """

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight) if x.is_floating_point() else super().forward(x)


def new_weight(name: str, tensor: Tensor, config: DecoderConfig) -> Tensor:
    """Fill a decoder's parameter: normal with deviation 1 / sqrt(inputs), onto the residual stream divided by
    sqrt(2 layers) (GPT-2); norms are ones.

    At LLaMA's widths that is near the usual 0.02, which in a narrow decoder would be too little to start with.
    """
    if "norm" in name:
        return nn.init.ones_(tensor)
    depth = 2 * config.layers if name.endswith(("wo.weight", "w2.weight", "w2")) else 1
    # Experts' w2 is not transposed: its inputs are rows.
    inputs = config.ffn_width if name.endswith("w2") else tensor.shape[-1]
    return nn.init.normal_(tensor, std=1 / math.sqrt(inputs * depth))


CHECKPOINTING = ("none", "selective", "full")


class Decoder(nn.Module):
    """Token embedding, `config.layers` blocks, final norm and output head.

    `checkpointing`: which blocks are computed again in the backward pass (training only) instead of keeping their
    activations: none, every second one (selective), all (full).
    """

    def __init__(self, config: DecoderConfig) -> None:
        super().__init__()
        self.config = config
        self.checkpointing = "none"
        self.tok_embeddings = TokenEmbedding(config.vocab_size, config.width)
        self.layers = nn.ModuleList(Block(config) for _ in range(config.layers))
        self.norm = RMSNorm(config.width, config.norm_eps)
        self.output = None if config.tie_embeddings else nn.Linear(config.width, config.vocab_size, bias=False)
        self.init_weights()

    def init_weights(self) -> None:
        """New weights, see `new_weight`."""
        for name, parameter in self.named_parameters():
            new_weight(name, parameter, self.config)

    def embed(self, ids_BT: Tensor) -> Tensor:
        """[B, T] ids -> [B, T, D]."""
        return torch.as_tensor(self.tok_embeddings(ids_BT))

    def forward(
        self,
        x_BTD: Tensor,
        position_ids_BT: Tensor,
        mask: Optional[Tensor] = None,
        cache: Optional[KVCache] = None,
        unevenness: Optional[list[Tensor]] = None,
    ) -> Tensor:
        """Hidden states after the final norm, [B, T, D].

        Args:
            position_ids_BT: rotary positions.
            mask: bool, broadcastable to [B, 1, T, S], True = may attend; every row needs at least one. None: causal.
            cache: holds earlier positions; the new ones are added to it.
            unevenness: gets that of each layer's experts.
        """
        angles = rotary_angles(position_ids_BT, self.config)
        bias = self._bias(x_BTD, mask, cache.length if cache else 0)
        training = self.training and torch.is_grad_enabled()
        again = {"none": 0, "selective": 2, "full": 1}[self.checkpointing if training else "none"]
        for index, layer in enumerate(self.layers):
            if again and index % again == 0:
                x_BTD, uneven = checkpoint(layer, x_BTD, angles, bias, cache, index, use_reentrant=False)
            else:
                x_BTD, uneven = layer(x_BTD, angles, bias, cache, index)
            if unevenness is not None and uneven is not None:
                unevenness.append(uneven)
        if cache is not None:
            cache.advance(x_BTD.shape[1])
        return torch.as_tensor(self.norm(x_BTD))

    def _bias(self, x_BTD: Tensor, mask: Optional[Tensor], past: int) -> Optional[Tensor]:
        """The mask as an additive bias in the attention's dtype: converted here once, not in every layer."""
        length = x_BTD.shape[1]
        if mask is None and past and length > 1:  # SDPA's own causal flag aligns to the top left
            mask = torch.ones(length, past + length, dtype=torch.bool, device=x_BTD.device).tril(past)[None, None]
        if mask is None:
            return None
        kind = x_BTD.device.type
        dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else x_BTD.dtype
        return torch.zeros(mask.shape, dtype=dtype, device=mask.device).masked_fill_(~mask, -math.inf)

    def logits(self, hidden: Tensor) -> Tensor:
        """[..., D] hidden states -> [..., vocab]."""
        return torch.as_tensor((self.tok_embeddings if self.output is None else self.output)(hidden))

    def flops(self, tokens: int, pairs: float, supervised: int) -> float:
        """FLOPs of a forward pass over `tokens` positions, of which `supervised` have logits.

        Args:
            pairs: how many pairs of positions attention compares.
        """
        c = self.config
        attention = c.width * c.head_dim * (2 * c.heads + 2 * c.kv_heads)
        feed_forward = 3 * c.width * c.ffn_width * (c.experts_per_token if c.experts else 1) + c.width * c.experts
        layer = 2 * tokens * (attention + feed_forward) + 4 * pairs * c.width
        return float(c.layers * layer + 2 * supervised * c.width * c.vocab_size)
