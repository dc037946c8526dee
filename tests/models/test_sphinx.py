"""The whole model: packed rows, gradients without images, freezing, FLOPs, the shipped configurations."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from sphinx_pl.data.schema import IGNORE, Batch
from sphinx_pl.models.sphinx import Sphinx, packed_mask
from sphinx_pl.planning.flops import TrainingFlops
from sphinx_pl.utils.errors import UserError
from tests.models.conftest import CONF, model_config

L = 27  # tokens per image of the sample model


def make_batch(rows: list[list[tuple[bool, int, list[int]]]], length: int, seed: int = 0) -> Batch:
    """Rows of samples (with image?, prefix text length, question lengths); random ids, every question id but its last
    position is supervised. Each sample's content depends on its description alone."""
    shape = (len(rows), length)
    ids, position = torch.zeros(shape, dtype=torch.long), torch.zeros(shape, dtype=torch.long)
    labels = torch.full(shape, IGNORE)
    segment, question = torch.zeros(shape, dtype=torch.int32), torch.zeros(shape, dtype=torch.int32)
    pixels, slots = [], []
    for b, row in enumerate(rows):
        t = 0
        for s, (image, text, questions) in enumerate(row):
            draw = torch.Generator().manual_seed(seed + 1000 * image + 100 * text + sum(questions))
            prefix = 1 + image * L + text
            first = t
            ids[b, t : t + prefix] = torch.randint(3, 512, (prefix,), generator=draw)
            if image:
                pixels.append(torch.randint(0, 256, (3, 64, 64), generator=draw, dtype=torch.uint8))
                slots += range(b * length + t + 1, b * length + t + 1 + L)
            position[b, t : t + prefix] = torch.arange(prefix)
            t += prefix
            for k, size in enumerate(questions, start=1):
                ids[b, t : t + size] = torch.randint(3, 512, (size,), generator=draw)
                labels[b, t : t + size - 1] = ids[b, t + 1 : t + size]
                position[b, t : t + size] = torch.arange(prefix, prefix + size)
                question[b, t : t + size] = k
                t += size
            segment[b, first:t] = s + 1
    return Batch(
        ids, labels, (labels != IGNORE).float(), segment, question, position, torch.zeros(shape, dtype=torch.int32),
        torch.stack(pixels) if pixels else torch.zeros(0, 3, 64, 64, dtype=torch.uint8),
        torch.tensor(slots, dtype=torch.long),
    )  # fmt: skip


def losses_and_gradients(model: Sphinx, batches: list[Batch]) -> tuple[Tensor, dict[str, Tensor]]:
    model.zero_grad()
    nll = []
    for batch in batches:
        losses = model.token_losses(batch)
        (losses.nll.sum() + losses.extra).backward()
        nll.append(losses.nll.detach())
    return torch.cat(nll), {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def test_packed_rows_equal_samples_alone(sample: Sphinx) -> None:
    one, two, three = (True, 3, [6, 4]), (False, 5, [9]), (True, 2, [5])
    packed = make_batch([[one, two], [three]], length=80)
    # Every question on its own: the same prefix and ids, cut out of the packed row.
    alone = [make_batch([[x]], length=1 + x[0] * L + x[1] + sum(x[2])) for x in (one, two, three)]
    nll, gradients = losses_and_gradients(sample, [packed])
    expected, expected_gradients = losses_and_gradients(sample, alone)
    assert len(nll) == 5 + 3 + 8 + 4
    torch.testing.assert_close(nll, expected, atol=1e-5, rtol=1e-5)
    assert gradients.keys() == expected_gradients.keys()
    # Some are zero but for rounding (the bias of attention's keys): those are measured by the others' size.
    largest = max(gradient.abs().max().item() for gradient in expected_gradients.values())
    for name, gradient in gradients.items():
        scale = max(expected_gradients[name].abs().max().item(), 1e-3 * largest)
        torch.testing.assert_close(gradient, expected_gradients[name], atol=1e-4 * scale, rtol=1e-4)


def test_questions_do_not_see_each_other(sample: Sphinx) -> None:
    batch = make_batch([[(True, 3, [6, 4])]], length=41)
    both = sample.token_losses(batch).nll
    first = 1 + L + 3
    columns = [*range(first), *range(first + 6, first + 10)]
    only_second = Batch(
        batch.input_ids[:, columns], batch.labels[:, columns], batch.weights[:, columns],
        batch.segment_ids[:, columns], batch.question_ids[:, columns],
        batch.position_ids[:, columns], batch.task_ids[:, columns], batch.pixels, batch.image_slots,
    )  # fmt: skip
    torch.testing.assert_close(sample.token_losses(only_second).nll, both[5:], atol=1e-5, rtol=1e-5)


def test_mask_of_a_row_by_hand() -> None:
    segment = torch.tensor([[1, 1, 1, 1, 2, 0, 0]])
    question = torch.tensor([[0, 1, 1, 2, 0, 0, 0]])
    expected = [
        [1, 0, 0, 0, 0, 0, 0], [1, 1, 0, 0, 0, 0, 0], [1, 1, 1, 0, 0, 0, 0], [1, 0, 0, 1, 0, 0, 0],
        [0, 0, 0, 0, 1, 0, 0], [0, 0, 0, 0, 0, 1, 0], [0, 0, 0, 0, 0, 0, 1],
    ]  # fmt: skip
    assert packed_mask(segment, question)[0, 0].int().tolist() == expected


def test_losses_are_cross_entropy_at_supervised_positions(sample: Sphinx) -> None:
    batch = make_batch([[(True, 3, [6, 4])], [(False, 4, [7])]], length=50)
    losses = sample.token_losses(batch)
    x = sample.decoder.embed(batch.input_ids)
    x[0, 1 : 1 + L] = sample.embed_images(batch.pixels)[0]
    mask = packed_mask(batch.segment_ids, batch.question_ids)
    logits = sample.decoder.logits(sample.decoder(x, batch.position_ids, mask))
    expected = -logits.log_softmax(-1).gather(-1, batch.labels.clamp(min=0)[..., None]).flatten()
    torch.testing.assert_close(losses.nll, expected[losses.index], atol=1e-5, rtol=1e-5)
    assert losses.index.tolist() == [*range(31, 36), *range(37, 40), *range(55, 61)]
    assert losses.nll.isfinite().all()
    assert losses.extra == 0


@pytest.mark.parametrize("supervised", [True, False])
def test_without_images_or_targets_every_parameter_has_a_gradient(sample: Sphinx, supervised: bool) -> None:
    batch = make_batch([[(False, 4, [7])]], length=20)
    if not supervised:
        batch.labels.fill_(IGNORE)
    losses = sample.token_losses(batch)
    assert len(losses.nll) == (6 if supervised else 0)
    (losses.nll.sum() + losses.extra).backward()
    assert sample.mixer is not None
    assert [name for name, p in sample.named_parameters() if p.grad is None] == []
    assert all(p.grad is not None and not p.grad.any() for p in sample.mixer.parameters())


def test_text_only_model(sample: Sphinx) -> None:
    model = Sphinx(model_config("sphinx_sample", "vision=null")).eval()
    model.decoder.load_state_dict(sample.decoder.state_dict())
    batch = make_batch([[(False, 4, [7])]], length=20)
    torch.testing.assert_close(model.token_losses(batch).nll, sample.token_losses(batch).nll)
    assert list(model.parts()) == ["decoder"]
    with pytest.raises(UserError, match="no vision part"):
        model.token_losses(make_batch([[(True, 4, [7])]], length=50))


def test_frozen_parts_stay_in_eval_without_gradients(sample: Sphinx) -> None:
    sample.freeze(["clip", "qformer"])
    sample.train()
    assert sample.mixer is not None
    assert not any(module.training for module in sample.mixer.towers["qformer"].modules())
    assert sample.mixer.towers["dinov2"].training
    assert sample.decoder.training
    losses = sample.token_losses(make_batch([[(True, 3, [6])]], length=40))
    losses.nll.sum().backward()
    names = {name for name, p in sample.named_parameters() if p.grad is None}
    assert names == {
        n for n, _ in sample.named_parameters() if n.startswith(("mixer.towers.clip", "mixer.towers.qformer"))
    }
    table = {name: (trainable, frozen) for name, trainable, frozen in sample.trainable_table()}
    assert table["clip"] == (0, 248832)
    assert table["decoder"] == (1722304, 0)
    with pytest.raises(UserError, match="did you mean 'clip'"):
        sample.freeze(["clipp"])


def test_parts_hold_every_parameter_once(sample: Sphinx) -> None:
    assert sum(a + b for _, a, b in sample.trainable_table()) == sum(p.numel() for p in sample.parameters())


def test_flops_agree_with_the_counter(sample: Sphinx) -> None:
    batch = make_batch([[(True, 40, [60, 20])], [(True, 90, [30])]], length=256)
    training = TrainingFlops(sample)
    sample.requires_grad_(False)
    with FlopCounterMode(display=False) as counter:
        sample.token_losses(batch)
    # Torch counts all pairs of a row's positions, of which the mask hides most.
    flops = training.of(2 * 256, 2 * 256**2, int((batch.labels != IGNORE).sum()), 2) / 3
    assert flops == pytest.approx(counter.get_total_flops(), rel=0.03)


# The decoders' parameters as their publishers count them, and the image words of the original's classes.
LLAMA_7B, LLAMA_13B, TINY = 6_738_415_616, 13_015_864_320, 1_100_048_384
INTERN2, MIXTRAL = 7_737_708_544, 46_702_792_704
REAL_SIZES = {
    "sphinx_7b": (LLAMA_7B, 291),
    "sphinx_13b": (LLAMA_13B, 291),
    "sphinx_1k_13b": (LLAMA_13B, 1455),
    "sphinx_v2_1k_13b": (LLAMA_13B, 1455),
    "sphinx_2k_13b": (LLAMA_13B, 2910),
    "sphinx_pooled_13b": (LLAMA_13B, 687),
    "sphinx_tiny": (TINY, 259),
    "sphinx_tiny_1k": (TINY, 1295),
    "sphinx_plus": (LLAMA_13B, 1295),
    "sphinx_intern2": (INTERN2, 1295),
    "sphinx_moe": (MIXTRAL, 291),
    "sphinx_moe_1k": (MIXTRAL, 1455),
}


def test_no_real_size_is_forgotten() -> None:
    others = {"sphinx_siglip2_dinov2", "auto", "real"}
    assert {path.stem for path in CONF.glob("*.yaml") if "sample" not in path.stem} == REAL_SIZES.keys() | others


def test_siglip2_and_dinov2_together() -> None:
    """SigLIP 2 is that of so400m without its pooling, DINOv2 that of ViT-L with registers."""
    with torch.device("meta"):
        model = Sphinx(model_config("sphinx_siglip2_dinov2"))
    counts = {part: trainable for part, trainable, _ in model.trainable_table()}
    width, joined = 4096, 1024 + 1152
    projections = (joined + 1) * width + (width + 1) * width + 2 * width
    assert counts == {"decoder": LLAMA_7B, "projections": projections, "dino": 303230976, "siglip": 412649712}
    assert model.config.tokens_per_image == 259


@pytest.mark.parametrize("name", REAL_SIZES)
def test_real_sizes(name: str) -> None:
    with torch.device("meta"):
        model = Sphinx(model_config(name))
    counts = {part: trainable for part, trainable, _ in model.trainable_table()}
    decoder, tokens = REAL_SIZES[name]
    assert counts.pop("decoder") == decoder
    assert model.config.tokens_per_image == tokens
    width, light = model.config.decoder.width, "qformer" not in counts
    inputs, projections = (4608, 1) if light else (5632 + 768, 2)
    assert counts.pop("projections") == (inputs + 3 * projections + 2) * width
    encoders = {"clip": 303, "convnext": 843, "dinov2": 1136, "qformer": 1091}
    absent = ("clip", "qformer") if light else ()
    assert {part: round(count / 1e6) for part, count in counts.items()} == {
        part: count for part, count in encoders.items() if part not in absent
    }
    assert model.config.name == name
