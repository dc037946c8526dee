"""The class that lmms-eval instantiates. `answers.Answers` does its work."""

from __future__ import annotations

import os
from collections.abc import Sequence
from datetime import timedelta
from typing import Any

import torch
from accelerate import Accelerator, InitProcessGroupKwargs
from lmms_eval.api.instance import GenerationResult, Instance, unwrap_generation_output
from lmms_eval.api.model import lmms
from lmms_eval.utils import simple_parse_args_string
from loguru import logger

from sphinx_pl.evaluation.lmms.answers import Answers
from sphinx_pl.generation.assistant import Assistant
from sphinx_pl.runtime.device import choose_device
from sphinx_pl.utils.errors import UserError, suggest

AUTO_BATCH = 16


class SphinxPL(lmms):
    """A checkpoint of any layout.

    `--model_args checkpoint=FOLDER,precision=bf16,batch_size=16,device=auto,prompts=sphinx`. With
    several processes each has the whole model on a GPU of its own and answers its share.
    `prompts=benchmark` leaves lmms-eval's wordings as they are.
    """

    # Not the chat interface, whose tasks cannot ask for likelihoods.
    is_simple = True

    def __init__(
        self,
        checkpoint: str | None = None,
        precision: str = "fp32",
        batch_size: int | str = 1,
        device: str | None = None,
        prompts: str = "sphinx",
        max_batch_size: int | str | None = None,
        **unknown: Any,
    ) -> None:
        super().__init__()
        for name in unknown:
            names = ("checkpoint", "precision", "batch_size", "device", "prompts")
            raise UserError(f"--model_args has no '{name}': {suggest(name, names)}")
        if checkpoint is None:
            raise UserError("which checkpoint? Give --model_args checkpoint=FOLDER, such as one that train.py wrote")
        where = choose_device(own_device(device))
        if int(os.environ.get("WORLD_SIZE", "1")) > 1:
            # Ranks wait for the slowest one at the end of each kind of request.
            waiting = InitProcessGroupKwargs(timeout=timedelta(days=7))
            self.accelerator = Accelerator(cpu=where.type == "cpu", kwargs_handlers=[waiting])
            self._rank = self.accelerator.process_index
            self._world_size = self.accelerator.num_processes
        self._device = where
        assistant = Assistant.load(checkpoint, str(where), precision)
        size = AUTO_BATCH if str(batch_size).startswith("auto") else int(batch_size)
        self._answers: Answers | None = Answers(assistant, self.task_dict, size, prompts, progress=self._rank == 0)

    @classmethod
    def create_from_arg_string(cls, arg_string: str, additional_config: dict[str, Any] | None = None) -> SphinxPL:
        """As lmms-eval's, but `--model_args` take precedence over the command line's options.

        One of these, `--batch_size`, is always set.
        """
        given = {name: value for name, value in (additional_config or {}).items() if value is not None}
        return cls(**(given | simple_parse_args_string(arg_string)))

    @property
    def device(self) -> torch.device:
        return self._device

    def generate_until(self, requests: Sequence[Instance]) -> list[str]:
        texts = self._open().generate_until([request.args for request in requests])
        self._report()
        return texts

    def generate_until_multi_round(self, requests: Sequence[Instance]) -> list[list[str]]:
        texts = self._open().generate_until_multi_round([request.args for request in requests])
        self._report()
        return texts

    def loglikelihood(self, requests: Sequence[Instance]) -> list[Any]:
        losses = self._open().loglikelihood([request.args for request in requests])
        self._report()
        return [survives(loss) for loss in losses]

    def clean(self) -> None:
        """Free the model's memory, which a judge may need."""
        self._answers = None
        super().clean()

    def _open(self) -> Answers:
        if self._answers is None:
            raise UserError("the model has been freed (clean): make a new one")
        return self._answers

    def _report(self) -> None:
        lost = self._open().lost
        for task, count in sorted(lost.items()):
            logger.warning(f"{task}: {count} requests could not be asked (too long, or an unreadable image): no answer")
        lost.clear()


def survives(result: Any) -> Any:
    """The result in a form that lmms-eval passes to its tasks unchanged.

    Version 0.7.3 turns every bare pair of numbers into a text, which its tasks then cannot read.
    """
    return result if unwrap_generation_output(result)[0] == result else GenerationResult(result)


def own_device(device: str | None) -> str:
    """The device of this process: its own GPU if several processes share any GPU."""
    if device not in (None, "auto", "cuda"):
        return str(device)
    if torch.cuda.is_available():
        return f"cuda:{os.environ.get('LOCAL_RANK', '0')}"
    return device or "auto"
