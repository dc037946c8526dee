"""A trained model for scripts: load once, then ask.

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
from sphinx_pl.data.prompt_format import END_OF_TURN, escaped, unescaped
from sphinx_pl.data.schema import PLACEHOLDER, ImageRef, Record, Turn
from sphinx_pl.data.skip import BadSample
from sphinx_pl.generation.generate import GenerationConfig, Prompt, generate, place_images, stream
from sphinx_pl.generation.likelihood import answer_logprobs
from sphinx_pl.models.sphinx import Sphinx
from sphinx_pl.runtime.device import autocast, check_precision, choose_device
from sphinx_pl.utils.errors import UserError

Picture = str | Path | bytes | Image.Image


class BadDialog(UserError):  # noqa: N818
    """One dialog that cannot be asked; others can."""


@dataclass(frozen=True)
class Dialog:
    """A question, the turns before it, and the images it is about (before the text, or where `<image>` stands)."""

    question: str
    images: Sequence[Picture] = ()
    history: Sequence[Turn] = field(default=())

    def answered(self, answer: str, question: str) -> Dialog:
        """This dialog with its answer, and the next question."""
        return replace(self, question=question, history=(*self.history, Turn(self.question, answer)))


def typed(text: str) -> str:
    """What a person typed or a model wrote, where the images are given: a mark for one is text like any other.

    Half characters, as bytes become that are no UTF-8, are question marks.
    """
    text = text.encode(errors="replace").decode()
    return text.replace(PLACEHOLDER, f"{PLACEHOLDER[:-1]} >")


class Assistant:
    """A model, its prompt format and where it runs."""

    def __init__(self, model: Sphinx, processor: Processor, precision: str = "fp32") -> None:
        self.model = model.eval()
        self.processor = processor
        self.precision = precision
        self.device = model.decoder.tok_embeddings.weight.device

    @classmethod
    def load(cls, path: str | Path, device: str = "auto", precision: str = "fp32") -> Assistant:
        """From a checkpoint of any layout, the original's folders included.

        Args:
            device: auto, cpu, cuda or cuda:N.
            precision: fp32 or bf16 (the weights' own dtype then, and autocast).

        Raises:
            UserError: no such checkpoint or device, or the checkpoint is damaged.
        """
        check_precision(precision)
        where = choose_device(device)
        checkpoint = open_checkpoint(path)
        processor = Processor.from_dict(checkpoint.processor, checkpoint.tokenizer_file, checkpoint.model_config)
        with torch.device("meta"):
            model = Sphinx(checkpoint.model_config)
        checkpoint.check(model)
        model = model.to(torch.bfloat16 if precision == "bf16" else torch.float32).to_empty(device=where)
        checkpoint.load_into(model)
        return cls(model, processor, precision)

    def generate(self, dialogs: Sequence[Dialog], config: GenerationConfig | None = None) -> list[str]:
        """The answers, generated in one batch. They end at the decoder's last position if not before.

        Raises:
            UserError: an image that cannot be read, or a dialog that leaves no room for an answer.
        """
        return self.answer(self._prompts(dialogs, config), config)

    def answer(self, prompts: Sequence[Prompt], config: GenerationConfig | None = None) -> list[str]:
        """The answers to what `prompt` made, generated in one batch."""
        with autocast(self.device, self.precision):
            return [self.processor.decode(ids) for ids in generate(self.model, prompts, self._end(config))]

    def likelihoods(self, prompts: Sequence[Prompt], answers: Sequence[str]) -> list[tuple[float, bool]]:
        """Of each answer to what `prompt` made, in one batch: the sum of its tokens' log-probabilities (nats), and
        whether it is the greedy one. The end of the answer is not part of it.

        Raises:
            UserError: an answer that is blank or longer than its prompt leaves room for.
        """
        with autocast(self.device, self.precision):
            return answer_logprobs(self.model, prompts, [self.encode_answer(answer) for answer in answers])

    def encode_answer(self, answer: str) -> list[int]:
        """An answer's tokens, those of training."""
        return self.processor.encode_answer(answer)

    def stream(self, dialogs: Sequence[Dialog], config: GenerationConfig | None = None) -> Iterator[list[str]]:
        """As `generate`, but yields what there is of every answer after each token; the last are the answers."""
        steps = stream(self.model, self._prompts(dialogs, config), self._end(config))
        ids: list[list[int]] = []
        shown: list[str] = []
        while True:
            with autocast(self.device, self.precision):  # not while the caller's code runs
                grown = next(steps, None)
            if grown is None:
                break
            ids, shown = grown, [_certain(self.processor.tokenizer.decode(answer)) for answer in grown]
            yield shown
        if (answers := [self.processor.decode(answer) for answer in ids]) != shown:  # what began was not an end
            yield answers

    @torch.no_grad()
    def compute_logits(self, dialog: Dialog, answer: str = "") -> Tensor:
        """Logits [T, vocab] in float32 at every position of the prompt and, if given, the answer behind it."""
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

    def _prompts(self, dialogs: Sequence[Dialog], config: GenerationConfig | None) -> list[Prompt]:
        limit = (config or GenerationConfig()).max_new_tokens
        return [self.prompt(dialog, limit) for dialog in dialogs]

    def prompt(self, dialog: Dialog, limit: int) -> Prompt:
        """What the model is given of a dialog, with room for an answer of at most `limit` tokens.

        Raises:
            BadDialog: an image that cannot be read, marks that do not agree with the images, or too long a dialog.
            UserError: an image for a model without vision.
        """
        if dialog.images and self.model.mixer is None:
            raise UserError("this model has no vision part (model.vision=null): ask it without an image")
        pictures = [open_picture(picture) for picture in dialog.images]
        # The records' images are only counted here: pixels are given beside them.
        refs = tuple(ImageRef(str(number)) for number in range(len(pictures)))
        turns = (*dialog.history, Turn(dialog.question, "-"))
        try:
            record = Record("dialog", "chat", refs, turns=turns)
            prompt = self.processor.prompt(record, [picture.size for picture in pictures])
        except BadSample as error:
            raise BadDialog(f"this dialog cannot be asked: {error}") from None
        pixels = [to_tensor(padded_resize(picture, self.processor.image_size)) for picture in pictures]
        room = self.model.config.decoder.max_positions - len(prompt.ids)
        if room < 1:
            raise BadDialog(
                f"this dialog has {len(prompt.ids)} tokens, which leaves no room for an answer in the decoder's "
                f"{self.model.config.decoder.max_positions} positions: begin a new one, or ask less"
            )
        return Prompt(prompt.ids, torch.stack(pixels) if pixels else None, min(limit, room), prompt.seen)


def open_picture(picture: Picture) -> Image.Image:
    """A path, encoded bytes or a picture -> an RGB picture.

    Raises:
        BadDialog: it cannot be read, or is too large.
    """
    try:
        if isinstance(picture, str | Path):
            return decode(read_bytes(ImageRef(str(picture))), str(picture))
        return decode(picture) if isinstance(picture, bytes) else upright_rgb(picture)
    except BadSample as error:
        hint = ": give a JPEG, PNG or WebP file" if error.reason == "image_unreadable" else ""
        raise BadDialog(f"image cannot be used ({error}){hint}") from None


def _certain(text: str) -> str:
    """What of a growing answer can be shown: not a character or an end of turn that has only begun."""
    text = text.split(END_OF_TURN)[0].rstrip("\ufffd")
    for mark in (END_OF_TURN, escaped(END_OF_TURN)):
        for length in range(len(mark) - 1, 0, -1):
            if text.endswith(mark[:length]):
                return unescaped(text[:-length]).strip()
    return unescaped(text).strip()
