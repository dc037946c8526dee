"""The schedule's numbers, computed by hand, and the parameters that decay."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from sphinx_pl.models.sphinx import Sphinx
from sphinx_pl.stages.optim import OptimConfig, build_optimizer, decay_groups, warmup_cosine
from sphinx_pl.utils.config import build
from sphinx_pl.utils.errors import UserError
from tests.conftest import tiny_model


def test_warmup_cosine_and_floor() -> None:
    factor = warmup_cosine(OptimConfig(lr=1e-3, min_lr=1e-4, warmup=4), max_steps=12)
    # There are five rises to the peak at step 4, then 0.1 + 0.9 (1 + cos(pi k / 8)) / 2 for k = 0
    # .. 8.
    golden = {0: 0.2, 1: 0.4, 2: 0.6, 3: 0.8, 4: 1.0, 6: 0.868198, 8: 0.55, 10: 0.231802, 12: 0.1, 13: 0.1, 99: 0.1}
    assert {step: factor(step) for step in golden} == pytest.approx(golden, abs=1e-6)


def test_a_warmup_below_one_is_a_share_of_all_steps() -> None:
    share = warmup_cosine(OptimConfig(lr=1.0, warmup=0.03), max_steps=200)
    steps = warmup_cosine(OptimConfig(lr=1.0, warmup=6), max_steps=200)
    assert [share(step) for step in range(201)] == pytest.approx([steps(step) for step in range(201)])
    assert share(5) == pytest.approx(6 / 7)
    assert share(6) == 1.0
    assert share(103) == pytest.approx(0.5)  # half of the 194 steps after the warm-up
    assert share(200) == pytest.approx(0.0)


def test_without_warmup_the_first_step_has_the_peak() -> None:
    factor = warmup_cosine(OptimConfig(lr=2e-5), max_steps=4)
    assert [factor(step) for step in range(5)] == pytest.approx([1.0, 0.853553, 0.5, 0.146447, 0.0], abs=1e-6)


def test_a_run_that_is_all_warmup_reaches_the_peak_and_no_more() -> None:
    factor = warmup_cosine(OptimConfig(lr=1.0, warmup=4), max_steps=4)
    assert [factor(step) for step in range(5)] == pytest.approx([0.2, 0.4, 0.6, 0.8, 1.0])


def test_the_optimizer_steps_through_the_schedule() -> None:
    config = OptimConfig(lr=0.1, min_lr=0.01, warmup=1, weight_decay=0.0)
    optimizer = build_optimizer({"all": nn.Linear(1, 1).parameters()}, config)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, warmup_cosine(config, 3))
    rates = []
    for _ in range(4):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        schedule.step()
    assert rates == pytest.approx([0.05, 0.1, 0.055, 0.01])


def test_matrices_decay_and_vectors_do_not() -> None:
    module = nn.Sequential(nn.Embedding(3, 4), nn.Linear(4, 5), nn.LayerNorm(5), nn.Linear(5, 6))
    module[3].weight.requires_grad_(False)
    decayed, plain = decay_groups(module.parameters(), 0.1)
    assert decayed == {"params": [module[0].weight, module[1].weight], "weight_decay": 0.1}
    assert plain == {
        "params": [module[1].bias, module[2].weight, module[2].bias, module[3].bias],
        "weight_decay": 0.0,
    }
    assert [group["weight_decay"] for group in decay_groups(nn.LayerNorm(2).parameters(), 0.1)] == [0.0]


def test_the_models_norms_biases_and_image_marks_do_not_decay() -> None:
    model = Sphinx(tiny_model())
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    decayed, plain = (
        {names[id(parameter)] for parameter in group["params"]} for group in decay_groups(model.parameters(), 0.1)
    )
    assert decayed | plain == set(names.values())
    assert not decayed & plain
    layer = "decoder.layers.1"
    assert {f"{layer}.attention_norm.weight", f"{layer}.attention.q_norm.weight", "decoder.norm.weight"} <= plain
    assert {"mixer.start_img", "mixer.end_img", "mixer.visual_proj.0.bias", "mixer.visual_proj.1.weight"} <= plain
    assert {f"{layer}.attention.wq.weight", f"{layer}.feed_forward.w2.weight"} <= decayed
    assert {"decoder.tok_embeddings.weight", "mixer.visual_proj.0.weight", "mixer.qformer_proj.0.weight"} <= decayed


def test_one_step_of_decay_shrinks_matrices_only() -> None:
    module = nn.Linear(2, 2)
    before = {name: parameter.detach().clone() for name, parameter in module.named_parameters()}
    optimizer = build_optimizer(
        {"all": module.parameters()}, OptimConfig(lr=0.1, weight_decay=0.5, betas=(0.8, 0.95), eps=1e-6)
    )
    assert optimizer.defaults["betas"] == (0.8, 0.95)
    assert optimizer.defaults["eps"] == 1e-6
    for parameter in module.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    assert torch.allclose(module.weight, before["weight"] * (1 - 0.1 * 0.5))
    assert torch.equal(module.bias, before["bias"])


@pytest.mark.parametrize("values", [{"lr": 0.0}, {"lr": -1.0}, {"lr": 1e-4, "min_lr": 2e-4}, {"min_lr": -1e-9}])
def test_rates_that_make_no_sense_are_answered_in_one_line(values: dict[str, float]) -> None:
    with pytest.raises(UserError, match=r"stage\.optim\.(min_)?lr=.* must be"):
        build(OptimConfig, values, "stage.optim")


def test_parts_have_learning_rates_of_their_own() -> None:
    model = Sphinx(tiny_model())
    config = OptimConfig(lr=0.01, min_lr=0.001, warmup=1, lr_scale={"convnext": 4.0, "clip": 4.0})
    optimizer = build_optimizer(model.part_parameters(), config)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, warmup_cosine(config, 1))
    peak = [(group["lr"], group["lr_scale"], group["weight_decay"]) for group in optimizer.param_groups]
    assert peak == [(0.005, 1.0, 0.1), (0.005, 1.0, 0.0), (0.02, 4.0, 0.1), (0.02, 4.0, 0.0)]
    optimizer.step()
    schedule.step()
    assert [group["lr"] for group in optimizer.param_groups] == pytest.approx([0.01, 0.01, 0.04, 0.04])
    optimizer.step()
    schedule.step()
    assert [group["lr"] for group in optimizer.param_groups] == pytest.approx([0.001, 0.001, 0.004, 0.004])
    rates = {id(p): group["lr_scale"] for group in optimizer.param_groups for p in group["params"]}
    assert len(rates) == len(list(model.parameters()))
    for name, parameter in model.named_parameters():
        assert rates[id(parameter)] == (4.0 if name.startswith(("mixer.towers.convnext", "mixer.towers.clip")) else 1.0)


def test_a_learning_rate_of_zero_is_not_how_parts_are_frozen() -> None:
    with pytest.raises(UserError, match=r"stage\.optim\.lr_scale\.clip=0.*train_parts"):
        OptimConfig(lr_scale={"clip": 0})
