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
        self._positions: Optional[Tensor] = None
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

    def place(self, position_ids_BT: Tensor) -> Tensor:
        """Append the positions of new keys, return those of all keys, [B, S]."""
        end = self.length + position_ids_BT.shape[1]
        if self._positions is None:
            self._positions = position_ids_BT.new_zeros(len(position_ids_BT), self.max_length)
        self._positions[:, self.length : end] = position_ids_BT
        return self._positions[:, :end]

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
        if self._positions is not None:
            self._positions = self._positions[rows_B]

    def reorder(self, rows_B: Tensor, start: int) -> None:
        """Row i becomes row `rows_B[i]` from column `start` on, before which they are the same."""
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


def rotary_frequencies(config: DecoderConfig, long: bool, device: torch.device) -> tuple[Tensor, float]:
    """The angle by which each channel pair turns from one position to the next, in radians,
    float32 [rotary_dim/2]; and what queries and keys are multiplied by.

    Sources: `RopeScaling`.

    Args:
        long: whether the sequence may become longer than `original_positions` (longrope).
    """
    exponent = torch.arange(0, config.rotary_dim, 2, device=device).float() / config.rotary_dim
    frequencies, scaling = config.rope_theta**-exponent, config.rope_scaling
    if scaling is None:
        return frequencies, 1.0
    log_factor = math.log(max(1.0, scaling.factor))
    if scaling.kind == "linear":
        frequencies, attention_factor = frequencies / scaling.factor, 1.0
    elif scaling.kind == "llama3":
        # How often a pair turns in the first training, between the two borders.
        turns = scaling.original_positions * frequencies / (2 * math.pi)
        kept = (turns - scaling.low_freq_factor) / (scaling.high_freq_factor - scaling.low_freq_factor)
        frequencies, attention_factor = torch.lerp(frequencies / scaling.factor, frequencies, kept.clamp(0, 1)), 1.0
    elif scaling.kind == "yarn":
        low, high = (_pair_that_turns(turns, config) for turns in (scaling.beta_fast, scaling.beta_slow))
        if scaling.truncate:
            low, high = math.floor(low), math.ceil(high)
        low, high = max(low, 0), min(high, config.rotary_dim - 1)
        pairs = torch.arange(len(frequencies), device=device)
        divided = ((pairs - low) / max(high - low, 1e-3)).clamp(0, 1)
        frequencies = torch.lerp(frequencies, frequencies / scaling.factor, divided)
        attention_factor = 0.1 * log_factor + 1
    else:
        divisors = scaling.long_factor if long else scaling.short_factor
        frequencies = frequencies / torch.tensor(divisors, device=device)
        attention_factor = math.sqrt(1 + log_factor / math.log(scaling.original_positions))
    return frequencies, attention_factor if scaling.attention_factor is None else scaling.attention_factor


def _pair_that_turns(turns: float, config: DecoderConfig) -> float:
    """The index, not rounded, of the channel pair that turns so often within `original_positions`
    (YaRN, appendix).
    """
    assert config.rope_scaling is not None
    wavelength = config.rope_scaling.original_positions / turns
    return config.rotary_dim * math.log(wavelength / (2 * math.pi)) / (2 * math.log(config.rope_theta))


def rotary_angles(position_ids_BT: Tensor, config: DecoderConfig, length: int) -> Tensor:
    """cos + i sin of every position and channel pair (Su et al. 2021), complex64 [B, T, 1, rotary_dim/2].

    Not a buffer: it would be rounded with a bf16 model, and be missing from a model built on the meta device.

    Args:
        length: positions that the sequences may reach.
    """
    long = config.rope_scaling is not None and length > config.rope_scaling.original_positions
    frequencies, attention_factor = rotary_frequencies(config, long, position_ids_BT.device)
    angles = position_ids_BT[:, :, None, None].float() * frequencies
    return torch.polar(torch.full_like(angles, attention_factor), angles)


def rotate(x_BTHh: Tensor, angles: Tensor) -> Tensor:
    """Turn channel pairs (0, 1), (2, 3), ... by `angles`, in float32; channels beyond them stay."""
    x_BTHh, rest = x_BTHh.float().tensor_split([2 * angles.shape[-1]], dim=-1)
    pairs = torch.view_as_complex(torch.unflatten(x_BTHh, -1, (-1, 2)))
    rotated = torch.view_as_real(pairs * angles).flatten(-2)
    return torch.cat([rotated, rest], dim=-1) if rest.shape[-1] else rotated


class Attention(nn.Module):
    """Grouped-query attention (Ainslie et al. 2023), rotary embeddings and, by option, normalised queries and keys."""

    def __init__(self, config: DecoderConfig) -> None:
        super().__init__()
        self.head_dim = config.head_dim
        self.groups = config.heads // config.kv_heads
        self.wq = nn.Linear(config.width, config.heads * config.head_dim, bias=config.qkv_bias)
        self.wk = nn.Linear(config.width, config.kv_heads * config.head_dim, bias=config.qkv_bias)
        self.wv = nn.Linear(config.width, config.kv_heads * config.head_dim, bias=config.qkv_bias)
        self.wo = nn.Linear(config.heads * config.head_dim, config.width, bias=False)
        self.norm_over_width = config.qk_norm_over == "width"
        q_width, k_width = (
            config.head_dim * (n if self.norm_over_width else 1) for n in (config.heads, config.kv_heads)
        )
        self.q_norm = RMSNorm(q_width, config.norm_eps) if config.qk_norm else nn.Identity()
        self.k_norm = RMSNorm(k_width, config.norm_eps) if config.qk_norm else nn.Identity()

    def forward(
        self, x_BTD: Tensor, angles: Optional[Tensor], bias: Optional[Tensor], cache: Optional[KVCache], layer: int
    ) -> Tensor:
        q, k, v = self.wq(x_BTD), self.wk(x_BTD), self.wv(x_BTD)
        if self.norm_over_width:
            q, k = self.q_norm(q), self.k_norm(k)
        q, k, v = (t.unflatten(-1, (-1, self.head_dim)) for t in (q, k, v))
        if not self.norm_over_width:
            q, k = self.q_norm(q), self.k_norm(k)
        if angles is not None:
            q, k = rotate(q, angles), rotate(k, angles)
        q, k, v = (t.type_as(v).transpose(1, 2) for t in (q, k, v))
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

    A token's output is the sum of its best experts', weighted by their softmax, which is renormalised over the chosen
    ones unless `normalise_experts` is off. All experts are one matrix, [experts * F, D], as MegaBlocks stores them; w2
    is not transposed.
    """

    def __init__(self, config: DecoderConfig) -> None:
        super().__init__()
        self.experts = config.experts
        self.per_token = config.experts_per_token
        self.normalise = config.normalise_experts
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
        if self.normalise:
            weights = weights / weights.sum(-1, keepdim=True)
        weights = weights.to(x.dtype)
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
    """Attention and feed-forward, each with its residual and a norm of its input or output."""

    def __init__(self, config: DecoderConfig) -> None:
        super().__init__()
        self.attention = Attention(config)
        self.feed_forward = SparseFeedForward(config) if config.experts else FeedForward(config)
        self.attention_norm = RMSNorm(config.width, config.norm_eps)
        self.ffn_norm = RMSNorm(config.width, config.norm_eps)
        self.norm_after = config.norm_position == "after"

    def forward(
        self, x_BTD: Tensor, angles: Optional[Tensor], bias: Optional[Tensor], cache: Optional[KVCache], layer: int
    ) -> tuple[Tensor, Optional[Tensor]]:
        """[B, T, D] -> the same shape, and the unevenness of experts where there are any."""
        out = self.attention(x_BTD if self.norm_after else self.attention_norm(x_BTD), angles, bias, cache, layer)
        x_BTD = x_BTD + (self.attention_norm(out) if self.norm_after else out)
        out = self.feed_forward(x_BTD if self.norm_after else self.ffn_norm(x_BTD))
        out, unevenness = out if isinstance(out, tuple) else (out, None)
        return x_BTD + (self.ffn_norm(out) if self.norm_after else out), unevenness


class TokenEmbedding(nn.Embedding):
    """Ids -> embeddings; hidden states -> logits, where the output head is tied to them.

    The second is a call of this module too, since sharded parameters are whole only while their module is called.
    """

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight) if x.is_floating_point() else super().forward(x)


def new_weight(name: str, tensor: Tensor, config: DecoderConfig) -> Tensor:
    """Fill a decoder's parameter: normal with deviation 1 / sqrt(inputs), onto the residual stream divided by
    sqrt(2 layers) (GPT-2); norms are ones, biases zeros.

    At LLaMA's widths that is near the usual 0.02, which in a narrow decoder would be too little to start with.
    """
    if "norm" in name:
        return nn.init.ones_(tensor)
    if name.endswith("bias"):
        return nn.init.zeros_(tensor)
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
            mask: bool, broadcastable to [B, 1, T, S], True = may attend, as far as a layer's window reaches; every
                position may attend to itself. None: causal.
            cache: holds earlier positions; the new ones are added to it.
            unevenness: gets that of each layer's experts.
        """
        angles = rotary_angles(position_ids_BT, self.config, cache.max_length if cache else x_BTD.shape[1])
        biases = self._biases(x_BTD, position_ids_BT, mask, cache)
        training = self.training and torch.is_grad_enabled()
        again = {"none": 0, "selective": 2, "full": 1}[self.checkpointing if training else "none"]
        for index, layer in enumerate(self.layers):
            turns = None if index in self.config.unrotated_layers else angles
            bias = biases[self.config.has_window(index)]
            if again and index % again == 0:
                x_BTD, uneven = checkpoint(layer, x_BTD, turns, bias, cache, index, use_reentrant=False)
            else:
                x_BTD, uneven = layer(x_BTD, turns, bias, cache, index)
            if unevenness is not None and uneven is not None:
                unevenness.append(uneven)
        if cache is not None:
            cache.advance(x_BTD.shape[1])
        return torch.as_tensor(self.norm(x_BTD))

    def _biases(
        self, x_BTD: Tensor, position_ids_BT: Tensor, mask: Optional[Tensor], cache: Optional[KVCache]
    ) -> tuple[Optional[Tensor], Optional[Tensor]]:
        """The masks of layers without and with a window, as biases in the attention's dtype.

        They are converted here once, not in every layer. A window counts positions, not columns:
        questions that share a prefix lie one after the other in a packed row.
        """
        length, past = x_BTD.shape[1], cache.length if cache else 0
        window = self.config.window
        keys_BS = cache.place(position_ids_BT) if window and cache else position_ids_BT
        if window >= past + length:  # no key is further away
            window = 0
        if mask is None and length > 1 and (past or window):  # SDPA's own causal flag aligns to the top left
            mask = torch.ones(length, past + length, dtype=torch.bool, device=x_BTD.device).tril(past)[None, None]
        bias = self._bias(x_BTD, mask)
        if not window:
            return bias, bias
        near = position_ids_BT[:, None, :, None] - keys_BS[:, None, None, :] < window
        return bias, self._bias(x_BTD, near if mask is None else near & mask)

    def _bias(self, x_BTD: Tensor, mask: Optional[Tensor]) -> Optional[Tensor]:
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
            pairs: how many pairs of positions the mask lets through. Layers with a window compare at
                most `window` for each position.
        """
        c = self.config
        windows = sum(c.has_window(layer) for layer in range(c.layers))
        pairs = (c.layers - windows) * pairs + windows * min(pairs, tokens * c.window)
        attention = c.width * c.head_dim * (2 * c.heads + 2 * c.kv_heads)
        feed_forward = 3 * c.width * c.ffn_width * (c.experts_per_token if c.experts else 1) + c.width * c.experts
        layers = 2 * c.layers * tokens * (attention + feed_forward) + 4 * pairs * c.heads * c.head_dim
        return float(layers + 2 * supervised * c.width * c.vocab_size)
