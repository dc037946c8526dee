"""A trained model for scripts: load it once, then ask it questions.

assistant = Assistant.load("outputs/demo/finetune/model")
assistant.generate([Dialog("What is in the image?", images=["docs/shapes.jpg"])])
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor

from sphinx_pl.checkpoints.format import open_checkpoint
from sphinx_pl.data.images import decode, padded_resize, read_bytes, to_tensor, upright_rgb
from sphinx_pl.data.processor import Processor
from sphinx_pl.data.schema import PLACEHOLDER, ImageRef, Record, Turn
from sphinx_pl.data.skip import SkipSample
from sphinx_pl.generation.generate import GenerationConfig, Prompt, generate, place_images, stream
from sphinx_pl.generation.loglikelihood import answer_loglikelihoods
from sphinx_pl.models.sphinx import Sphinx
from sphinx_pl.runtime.device import autocast, check_precision, choose_device
from sphinx_pl.utils.errors import UserError

Picture = str | Path | bytes | Image.Image


class BadDialog(UserError):  # noqa: N818
    """One dialog cannot be asked. Other dialogs can."""


@dataclass(frozen=True)
class Dialog:
    """A question, the turns before it, and its images (before the text, or where `<image>`
    stands).
    """

    question: str
    images: Sequence[Picture] = ()
    history: Sequence[Turn] = field(default=())

    def answered(self, answer: str, question: str) -> Dialog:
        """Return this dialog with its answer, and the next question."""
        return replace(self, question=question, history=(*self.history, Turn(self.question, answer)))


def typed(text: str) -> str:
    """Return text of a person or a model in which the mark of an image is ordinary text.

    Lone surrogates, which stand for bytes that are not UTF-8, become question marks.
    """
    text = text.encode(errors="replace").decode()
    return text.replace(PLACEHOLDER, f"{PLACEHOLDER[:-1]} >")


class Assistant:
    """A model, its prompt format and its device."""

    def __init__(self, model: Sphinx, processor: Processor, precision: str = "fp32") -> None:
        self.model = model.eval()
        self.processor = processor
        self.precision = precision
        self.device = model.decoder.tok_embeddings.weight.device

    @classmethod
    def load(cls, path: str | Path, device: str = "auto", precision: str = "fp32") -> Assistant:
        """Load a checkpoint of any layout, including the folders of the original.

        Args:
            device: auto, cpu, cuda or cuda:N.
            precision: fp32 or bf16 (bf16 weights, and autocast).

        Raises:
            UserError: there is no such checkpoint or device, or the checkpoint is damaged.
        """
        check_precision(precision)
        target = choose_device(device)
        checkpoint = open_checkpoint(path)
        processor = Processor.from_dict(checkpoint.processor, checkpoint.tokenizer_file, checkpoint.model_config)
        with torch.device("meta"):
            model = Sphinx(checkpoint.model_config)
        checkpoint.check(model)
        model = model.to(torch.bfloat16 if precision == "bf16" else torch.float32).to_empty(device=target)
        checkpoint.load_into(model)
        return cls(model, processor, precision)

    def generate(self, dialogs: Sequence[Dialog], config: GenerationConfig | None = None) -> list[str]:
        """Return the answers, generated in one batch.

        They end at the decoder's last position at the latest.

        Raises:
            UserError: an image cannot be read, or a dialog leaves no room for an answer.
        """
        return self.answer(self._prompts(dialogs, config), config)

    def answer(self, prompts: Sequence[Prompt], config: GenerationConfig | None = None) -> list[str]:
        """Return the answers to prompts of `prompt`, generated in one batch."""
        with autocast(self.device, self.precision):
            return [self.processor.decode(ids) for ids in generate(self.model, prompts, self._end(config))]

    def likelihoods(self, prompts: Sequence[Prompt], answers: Sequence[str]) -> list[tuple[float, bool]]:
        """Return the log-probability of each answer (nats), and whether it is the greedy answer.

        All prompts, made by `prompt`, are read in one batch. The sum does not include the end of
        the answer.

        Raises:
            UserError: an answer is blank, or longer than its prompt leaves room for.
        """
        with autocast(self.device, self.precision):
            return answer_loglikelihoods(self.model, prompts, [self.encode_answer(answer) for answer in answers])

    def encode_answer(self, answer: str) -> list[int]:
        """Return an answer's tokens as in training."""
        return self.processor.encode_answer(answer)

    def stream(self, dialogs: Sequence[Dialog], config: GenerationConfig | None = None) -> Iterator[list[str]]:
        """Yield every answer so far after each token. The last texts are those of `generate`."""
        steps = stream(self.model, self._prompts(dialogs, config), self._end(config))
        ids: list[list[int]] = []
        texts: list[str] = []
        while True:
            # only while this code runs, not the caller's
            with autocast(self.device, self.precision):
                next_ids = next(steps, None)
            if next_ids is None:
                break
            ids, texts = next_ids, [self._certain(self.processor.tokenizer.decode(answer)) for answer in next_ids]
            yield texts
        # an apparent end was none
        if (answers := [self.processor.decode(answer) for answer in ids]) != texts:
            yield answers

    @torch.no_grad()
    def compute_logits(self, dialog: Dialog, answer: str = "") -> Tensor:
        """Return float32 logits [T, vocab] at every position of the prompt and of the answer, if
        one is given.
        """
        (prompt,) = self._prompts([dialog], None)
        if answer:
            prompt.ids = prompt.ids + self.encode_answer(answer)
        ids = torch.tensor(prompt.ids, device=self.device)[None]
        with autocast(self.device, self.precision):
            x = place_images(self.model, self.model.decoder.embed(ids.clamp(min=0)), ids, [prompt])
            hidden = self.model.decoder(x, torch.arange(ids.shape[1], device=self.device)[None])
            return self.model.decoder.logits(hidden)[0].float()

    def _end(self, config: GenerationConfig | None) -> GenerationConfig:
        stop = self.processor.stop_sequences
        return replace(config or GenerationConfig(), eos_id=self.processor.tokenizer.eos_id, stop=stop)

    def _certain(self, text: str) -> str:
        """Return the part of a growing answer that is certain, without an incomplete character or
        end of turn.
        """
        prompt_format = self.processor.format
        if not prompt_format.ends_in_text:
            return prompt_format.unescape(text.rstrip("\ufffd")).strip()
        text = text.split(prompt_format.end)[0].rstrip("\ufffd")
        for mark in (prompt_format.end, prompt_format.escape(prompt_format.end)):
            for length in range(len(mark) - 1, 0, -1):
                if text.endswith(mark[:length]):
                    return prompt_format.unescape(text[:-length]).strip()
        return prompt_format.unescape(text).strip()

    def _prompts(self, dialogs: Sequence[Dialog], config: GenerationConfig | None) -> list[Prompt]:
        limit = (config or GenerationConfig()).max_new_tokens
        return [self.prompt(dialog, limit) for dialog in dialogs]

    def prompt(self, dialog: Dialog, limit: int) -> Prompt:
        """Return the model's input for a dialog, with room for an answer of at most `limit` tokens.

        Raises:
            BadDialog: an image cannot be read, marks do not match the images, or the dialog is too
                long.
            UserError: the dialog has an image, but the model has no vision part.
        """
        if dialog.images and self.model.mixer is None:
            raise UserError("this model has no vision part (model.vision=null): ask it without an image")
        pictures = [open_picture(picture) for picture in dialog.images]
        # The record's images are only counted; the pixels are given beside them.
        refs = tuple(ImageRef(str(number)) for number in range(len(pictures)))
        turns = (*dialog.history, Turn(dialog.question, "-"))
        try:
            record = Record("dialog", "chat", refs, turns=turns)
            prompt = self.processor.prompt(record, [picture.size for picture in pictures])
        except SkipSample as error:
            raise BadDialog(f"this dialog cannot be asked: {error}") from None
        pixels = [to_tensor(padded_resize(picture, self.processor.image_size)) for picture in pictures]
        room = self.model.config.decoder.max_positions - len(prompt.ids)
        if room < 1:
            raise BadDialog(
                f"this dialog has {len(prompt.ids)} tokens, which leaves no room for an answer in the decoder's "
                f"{self.model.config.decoder.max_positions} positions: begin a new dialog, or ask a shorter question"
            )
        return Prompt(prompt.ids, torch.stack(pixels) if pixels else None, min(limit, room), prompt.kept_views)


def open_picture(picture: Picture) -> Image.Image:
    """Return an RGB picture of a path, encoded bytes or a picture.

    Raises:
        BadDialog: it cannot be read, or is too large.
    """
    try:
        if isinstance(picture, str | Path):
            return decode(read_bytes(ImageRef(str(picture))), str(picture))
        return decode(picture) if isinstance(picture, bytes) else upright_rgb(picture)
    except SkipSample as error:
        hint = ": give a JPEG, PNG or WebP file" if error.reason == "image_unreadable" else ""
        raise BadDialog(f"image cannot be used ({error}){hint}") from None
