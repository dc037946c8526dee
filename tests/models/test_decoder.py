"""The decoder against transformers' LLaMA with the same weights, and its cache, masks and checkpointing."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from sphinx_pl.checkpoints.families.base import half_split
from sphinx_pl.generation.prompt import Prefix, Prompt
from sphinx_pl.models.config import DecoderConfig, SphinxConfig
from sphinx_pl.models.decoder import CHECKPOINTING, Decoder, KVCache, SparseFeedForward
from sphinx_pl.models.sphinx import Sphinx, packed_mask
from sphinx_pl.utils.errors import UserError
from tests.conftest import transformers_decoder

CONFIG = DecoderConfig(vocab_size=61, width=48, layers=3, heads=6, kv_heads=2, ffn_width=80, max_positions=64)


def reference(decoder: Decoder) -> torch.nn.Module:
    c = decoder.config
    model = transformers_decoder(c)
    ours = decoder.state_dict()
    theirs = {
        "model.embed_tokens.weight": ours["tok_embeddings.weight"],
        "model.norm.weight": ours["norm.weight"],
        "lm_head.weight": ours["output.weight"],
    }
    names = {"wv": "self_attn.v_proj", "wo": "self_attn.o_proj", "w1": "mlp.gate_proj", "w2": "mlp.down_proj"}
    names |= {"w3": "mlp.up_proj", "attention_norm": "input_layernorm", "ffn_norm": "post_attention_layernorm"}
    for n in range(c.layers):
        for name, value in ours.items():
            if name.startswith(f"layers.{n}."):
                short = name.split(".")[-2]
                if short in names:
                    theirs[f"model.layers.{n}.{names[short]}.weight"] = value
        prefix = f"layers.{n}.attention"
        theirs[f"model.layers.{n}.self_attn.q_proj.weight"] = half_split(ours[f"{prefix}.wq.weight"], c.heads)
        theirs[f"model.layers.{n}.self_attn.k_proj.weight"] = half_split(ours[f"{prefix}.wk.weight"], c.kv_heads)
        if c.experts:
            w1, w2, w3 = (ours[f"layers.{n}.feed_forward.w{i}"].unflatten(0, (c.experts, -1)) for i in (1, 2, 3))
            theirs[f"model.layers.{n}.mlp.gate.weight"] = ours[f"layers.{n}.feed_forward.gate.weight"]
            theirs[f"model.layers.{n}.mlp.experts.gate_up_proj"] = torch.cat([w1, w3], dim=1)
            theirs[f"model.layers.{n}.mlp.experts.down_proj"] = w2.transpose(1, 2)
    model.load_state_dict(theirs, strict=True)
    return model.eval()


SPARSE = {"experts": 4, "experts_per_token": 2}


@pytest.fixture(params=[{}, SPARSE], ids=["dense", "sparse"])
def decoder(request: pytest.FixtureRequest) -> Decoder:
    torch.manual_seed(0)
    decoder = Decoder(DecoderConfig(**{**vars(CONFIG), **request.param})).eval()
    for parameter in decoder.parameters():  # larger than the initial weights, so that logits have a spread of about 1
        torch.nn.init.normal_(parameter, std=0.3)
    return decoder


def run(decoder: Decoder, ids: Tensor, cache: KVCache | None = None, start: int = 0) -> Tensor:
    positions = torch.arange(start, start + ids.shape[1]).expand_as(ids)
    return decoder.logits(decoder(decoder.embed(ids), positions, None, cache))


@torch.no_grad()
@pytest.mark.parametrize("chunks", [[17], [9, *[1] * 8], [5, 6, 6]], ids=["whole", "token by token", "in chunks"])
def test_logits_equal_transformers(decoder: Decoder, chunks: list[int]) -> None:
    ids = torch.randint(0, 61, (2, 17))
    expected = reference(decoder)(ids).logits
    assert expected.std() > 0.5
    cache = KVCache(CONFIG.layers, 17) if len(chunks) > 1 else None
    starts = [sum(chunks[:n]) for n in range(len(chunks))]
    parts = [run(decoder, ids[:, s : s + n], cache, s) for s, n in zip(starts, chunks, strict=True)]
    torch.testing.assert_close(torch.cat(parts, dim=1), expected, atol=1e-5, rtol=1e-5)


def test_training_kernel_gives_the_same_logits(decoder: Decoder) -> None:
    ids = torch.randint(0, 61, (2, 17))
    with torch.no_grad():
        expected = run(decoder, ids)
    with torch.enable_grad():
        torch.testing.assert_close(run(decoder, ids), expected, atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_mask_hides_positions(decoder: Decoder) -> None:
    ids = torch.randint(0, 61, (1, 8))
    mask = torch.ones(8, 8, dtype=torch.bool).tril()[None, None]
    positions = torch.arange(8)[None]
    hidden = decoder(decoder.embed(ids), positions, mask)
    torch.testing.assert_close(decoder.logits(hidden), run(decoder, ids), atol=1e-5, rtol=1e-5)
    mask[..., 4:, :4] = False  # the second half sees itself alone
    alone = decoder(decoder.embed(ids[:, 4:]), positions[:, 4:])
    torch.testing.assert_close(decoder(decoder.embed(ids), positions, mask)[:, 4:], alone, atol=1e-5, rtol=1e-5)


def test_query_key_norm_makes_their_scale_irrelevant() -> None:
    torch.manual_seed(0)
    decoder = Decoder(DecoderConfig(**{**vars(CONFIG), "qk_norm": True, "norm_eps": 1e-12})).eval()
    ids = torch.randint(0, 61, (1, 8))
    before = run(decoder, ids)
    with torch.no_grad():
        decoder.layers[0].attention.wq.weight.mul_(7)
    torch.testing.assert_close(run(decoder, ids), before)


def test_checkpointed_layers_give_the_same_gradients(decoder: Decoder) -> None:
    ids = torch.randint(0, 61, (2, 9))
    decoder.train()
    gradients = []
    for decoder.checkpointing in CHECKPOINTING:
        decoder.zero_grad()
        run(decoder, ids).square().mean().backward()
        gradients.append([p.grad.clone() for p in decoder.parameters() if p.grad is not None])
    assert len(gradients[0]) == len(list(decoder.parameters()))
    for again in gradients[1:]:
        torch.testing.assert_close(gradients[0], again)


def test_initial_spread_and_tied_embeddings() -> None:
    torch.manual_seed(0)
    decoder = Decoder(DecoderConfig(**{**vars(CONFIG), "width": 240, "tie_embeddings": True}))
    layer = decoder.layers[0]
    assert layer.attention.wq.weight.std().item() == pytest.approx(240**-0.5, rel=0.05)
    ffn_width = layer.feed_forward.w2.weight.shape[1]
    assert layer.feed_forward.w2.weight.std().item() == pytest.approx((6 * ffn_width) ** -0.5, rel=0.05)
    assert "output.weight" not in decoder.state_dict()
    hidden = torch.randn(2, 240)
    torch.testing.assert_close(decoder.logits(hidden), hidden @ decoder.tok_embeddings.weight.T)


def test_full_cache_is_refused(decoder: Decoder) -> None:
    with pytest.raises(ValueError, match="4 positions cannot hold 5"):
        run(decoder, torch.zeros(1, 5, dtype=torch.long), KVCache(CONFIG.layers, 4))


def test_every_expert_gets_a_gradient_and_unevenness_is_what_switch_transformer_says() -> None:
    torch.manual_seed(0)
    config = DecoderConfig(**{**vars(CONFIG), **SPARSE})
    layer = SparseFeedForward(config)
    for parameter in layer.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    x = torch.randn(1, 1, 48)  # one token: two of the four experts have nothing to do
    out, unevenness = layer(x)
    (out.sum() + unevenness).backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in layer.parameters())
    probabilities = layer.gate(x).softmax(-1).flatten()
    expected = 4 * (0.5 * probabilities.topk(2).values).sum()
    torch.testing.assert_close(unevenness, expected)
    with torch.no_grad():
        layer.gate.weight.zero_()
    assert layer(torch.randn(2, 50, 48))[1].item() == pytest.approx(1.0)


def test_flops_count_the_chosen_experts() -> None:
    with torch.device("meta"):
        dense, sparse = (Decoder(DecoderConfig(**{**vars(CONFIG), **extra})) for extra in ({}, SPARSE))
    more = sparse.flops(10, 1, 1) - dense.flops(10, 1, 1)
    assert more == 10 * CONFIG.layers * 2 * (3 * CONFIG.width * CONFIG.ffn_width + 4 * CONFIG.width)


def test_experts_start_as_the_dense_layer_does() -> None:
    torch.manual_seed(0)
    sizes = {"vocab_size": 64, "width": 64, "layers": 2, "heads": 4, "kv_heads": 2, "ffn_width": 512}
    dense, sparse = (Decoder(DecoderConfig(**sizes, experts=experts)).layers[0].feed_forward for experts in (0, 4))
    for name in ("w1", "w2", "w3"):
        found, expected = getattr(sparse, name).std().item(), getattr(dense, name).weight.std().item()
        assert found == pytest.approx(expected, rel=0.05), name


def windowed() -> Decoder:
    torch.manual_seed(0)
    decoder = Decoder(DecoderConfig(**{**vars(CONFIG), "window": 4, "window_layers": [0, 2]})).eval()
    for parameter in decoder.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    return decoder


def test_a_window_counts_positions_within_a_packed_segment() -> None:
    """Questions that share a prefix lie one behind the other, and padding behind all."""
    decoder = windowed()
    prefix, questions, other = torch.randint(61, (6,)), torch.randint(61, (2, 5)), torch.randint(61, (7,))
    ids = torch.cat([prefix, questions[0], questions[1], other, torch.zeros(2, dtype=torch.long)])[None]
    positions = torch.cat([torch.arange(11), torch.arange(6, 11), torch.arange(7), torch.arange(2)])[None]
    segments = torch.tensor([[1] * 16 + [2] * 7 + [0] * 2])
    asked = torch.tensor([[0] * 6 + [1] * 5 + [2] * 5 + [0] * 9])
    packed = decoder.logits(decoder(decoder.embed(ids), positions, packed_mask(segments, asked)))[0]
    assert packed.isfinite().all()
    for number in (0, 1):
        alone = run(decoder, torch.cat([prefix, questions[number]])[None])[0]
        torch.testing.assert_close(packed[6 + 5 * number : 11 + 5 * number], alone[6:], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(packed[16:23], run(decoder, other[None])[0], atol=1e-5, rtol=1e-5)
    decoder.config.window = 0
    assert not torch.allclose(packed[16:23], run(decoder, other[None])[0], atol=1e-2)


@torch.no_grad()
def test_a_window_with_prompts_of_different_lengths_and_alternatives() -> None:
    model = Sphinx(SphinxConfig(decoder=CONFIG, vision=None)).eval()
    model.decoder = decoder = windowed()
    prompts = [torch.randint(61, (length,)) for length in (3, 9)]
    prefix = Prefix(model, [Prompt(ids.tolist()) for ids in prompts], 8)
    more = torch.randint(61, (2, 3))
    hidden = prefix.follow(more)
    choices = torch.randint(61, (2, 4))
    forked = prefix.fork(choices)
    prefix.cache.keep(torch.tensor([2, 0]), 4)
    last = prefix.follow(torch.tensor([[5], [6]]))
    for row, chosen in enumerate((2, 0)):
        begin = torch.cat([prompts[row], more[row]])
        whole = torch.cat([begin, choices[row, chosen : chosen + 1], torch.tensor([5 + row])])
        expected = decoder(decoder.embed(whole[None]), torch.arange(len(whole))[None])[0]
        length = len(begin)
        torch.testing.assert_close(hidden[row], expected[length - 3 : length], atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(forked[row, chosen], expected[length], atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(last[row, 0], expected[length + 1], atol=1e-5, rtol=1e-5)


def test_flops_count_the_heads_own_size_and_what_a_window_hides() -> None:
    with torch.device("meta"):
        plain, wide, short = (
            Decoder(DecoderConfig(**{**vars(CONFIG), **extra}))
            for extra in ({}, {"head_size": 16}, {"window": 4, "window_layers": [0, 2]})
        )
    assert wide.flops(0, 10, 0) == 2 * plain.flops(0, 10, 0)
    tokens, pairs = 100, 100 * 101 / 2
    hidden = plain.flops(tokens, pairs, 0) - short.flops(tokens, pairs, 0)
    assert hidden == 2 * 4 * (pairs - 4 * tokens) * CONFIG.width


def test_a_shallow_decoder_keeps_the_options_of_its_layers() -> None:
    config = DecoderConfig(**{**vars(CONFIG), "window": 4, "window_layers": [0, 2], "unrotated_layers": [1, 2]})
    shallow = config.shallow(2)
    assert (shallow.layers, shallow.window_layers, shallow.unrotated_layers) == (2, [0], [1])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"head_size": 7}, "head_size = 7 must be even"),
        ({"rotary_size": 9}, "rotary_size=9 must be even and at most the head's 8 channels"),
        ({"window": -1}, "window=-1 must not be negative"),
        ({"window_layers": [3]}, "there is no layer 3 of 3"),
        ({"norm_position": "behind"}, "norm_position='behind'"),
        ({"qk_norm_over": "heads"}, "qk_norm_over='heads': did you mean 'head'"),
        ({"rope_scaling": {"kind": "yarn"}}, r"rope_scaling\.original_positions=0 must be above 1"),
        ({"rope_scaling": {"kind": "ntk"}}, r"rope_scaling\.kind='ntk'"),
        ({"rope_scaling": {"kind": "longrope", "original_positions": 8}}, "short_factor has 0 numbers"),
    ],
)
def test_options_that_do_not_fit_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        SphinxConfig.from_dict({"decoder": {**vars(CONFIG), **options}})


def test_sizes_that_follow_from_others_are_not_kept() -> None:
    """A section that leaves them out gets its own, not those of the default decoder."""
    sizes = {"width": 48, "heads": 6, "kv_heads": 2}
    config = SphinxConfig.from_dict({"decoder": sizes}).decoder
    assert (config.head_dim, config.rotary_dim) == (8, 8)
    assert SphinxConfig.from_dict({"decoder": sizes | {"head_size": 8, "rotary_size": 8}}).decoder == config
    other = SphinxConfig.from_dict({"decoder": sizes | {"head_size": 12, "rotary_size": 6}}).decoder
    assert (other.head_dim, other.rotary_dim) == (12, 6)
