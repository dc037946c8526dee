"""The keys for the device and the precision of evaluation."""

from __future__ import annotations

import pytest
import torch

from sphinx_pl.runtime import device
from sphinx_pl.runtime.device import autocast, check_precision, choose_device
from sphinx_pl.utils.errors import UserError


def test_auto_takes_a_gpu_if_there_is_one() -> None:
    assert choose_device("auto").type == ("cuda" if torch.cuda.is_available() else "cpu")
    assert choose_device("cpu") == torch.device("cpu")


def test_the_threads_are_logged_once(caplog: pytest.LogCaptureFixture) -> None:
    device._log_once.cache_clear()
    caplog.set_level("INFO")
    for _ in range(3):
        choose_device("cpu")
    [line] = caplog.messages
    assert "CPU thread" in line


@pytest.mark.parametrize(("name", "answer"), [("gpu0", "is no device"), ("cuda:99", "finds")])
def test_a_device_that_is_not_here_is_answered_in_one_line(name: str, answer: str) -> None:
    with pytest.raises(UserError, match=f"device={name}.*{answer}"):
        choose_device(name)


def test_precision() -> None:
    x = torch.ones(2, 2)
    for precision, dtype in (("fp32", torch.float32), ("bf16", torch.bfloat16)):
        check_precision(precision)
        with autocast(torch.device("cpu"), precision):
            assert (x @ x).dtype is dtype
    with pytest.raises(UserError, match="precision='fp16'"):
        check_precision("fp16")
