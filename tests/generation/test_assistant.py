from __future__ import annotations

import dataclasses
import io
from pathlib import Path

import pytest
import torch
from PIL import Image

from sphinx_pl.checkpoints.native import write_checkpoint
from sphinx_pl.data.processor import Processor
from sphinx_pl.data.sampling.collator import Collator
from sphinx_pl.data.schema import ImageRef, Record, Turn
from sphinx_pl.evaluation.runner import evaluate
from sphinx_pl.generation.assistant import Assistant, BadDialog, Dialog, open_picture
from sphinx_pl.generation.generate import GenerationConfig
from sphinx_pl.models.config import SphinxConfig
from sphinx_pl.models.sphinx import Sphinx
from sphinx_pl.utils.errors import UserError
from tests.fuzzing import png_header

SHORT = GenerationConfig(max_new_tokens=12)


def saved(path: Path, model: Sphinx, processor: Processor) -> Path:
    tokenizer = Path(processor.tokenizer.path)
    return write_checkpoint(
        path, model.state_dict(), model.config.to_dict(), processor.to_dict(), tokenizer, {"stage": None}
    )


@pytest.fixture
def model(model_config: SphinxConfig) -> Sphinx:
    torch.manual_seed(0)
    model = Sphinx(model_config)
    # the initial weights would repeat one token
    for parameter in model.decoder.layers.parameters():
        if parameter.ndim > 1:
            torch.nn.init.normal_(parameter, std=0.3)
    return model


@pytest.fixture
def assistant(tmp_path: Path, model: Sphinx, processor: Processor) -> Assistant:
    return Assistant.load(saved(tmp_path / "model", model, processor), device="cpu")


@pytest.fixture
def picture() -> Image.Image:
    return Image.effect_mandelbrot((60, 40), (-2, -1.5, 1, 1.5), 20).convert("RGB")


def test_every_weight_and_buffer_is_loaded(assistant: Assistant, model: Sphinx) -> None:
    tensors = dict(assistant.model.named_parameters()) | dict(assistant.model.named_buffers())
    theirs = dict(model.named_parameters()) | dict(model.named_buffers())
    assert tensors.keys() == theirs.keys()
    for name, value in theirs.items():
        assert torch.equal(tensors[name], value), name


def test_a_batch_answers_as_each_alone(assistant: Assistant, picture: Image.Image) -> None:
    dialogs = [
        Dialog("What is it?", images=[picture]),
        Dialog("And this?"),
        Dialog("What colour?", images=[picture], history=[Turn("What is it?", "a fractal")]),
        Dialog("First <image> or second <image>?", images=[picture, picture]),
    ]
    answers = assistant.generate(dialogs, SHORT)
    assert [assistant.generate([dialog], SHORT)[0] for dialog in dialogs] == answers
    assert len(set(answers)) > 1


def test_streaming_ends_at_the_answer_and_leaves_gradients_on(assistant: Assistant, picture: Image.Image) -> None:
    dialog = Dialog("What is it?", images=[picture])
    texts = []
    for (text,) in assistant.stream([dialog], SHORT):
        assert torch.is_grad_enabled()
        texts.append(text)
    assert len(texts) > 3
    assert texts[-1] == assistant.generate([dialog], SHORT)[0]


def test_logits_are_those_of_generation(assistant: Assistant, picture: Image.Image) -> None:
    dialog = Dialog("What is it?", images=[picture])
    (prompt,) = assistant._prompts([dialog], None)
    logits = assistant.compute_logits(dialog)
    assert logits.shape == (len(prompt.ids), 512)
    tokenizer = assistant.processor.tokenizer
    first = assistant.generate([dialog], GenerationConfig(max_new_tokens=1))[0]
    assert first == tokenizer.decode([int(logits[-1].argmax())]).strip()
    longer = assistant.compute_logits(dialog, " a dog")
    torch.testing.assert_close(longer[: len(logits)], logits)


def test_an_image_may_be_a_path_bytes_or_a_picture(assistant: Assistant, picture: Image.Image, tmp_path: Path) -> None:
    encoded = io.BytesIO()
    picture.save(encoded, format="PNG")
    (tmp_path / "image.png").write_bytes(encoded.getvalue())
    pictures = [picture, encoded.getvalue(), tmp_path / "image.png", str(tmp_path / "image.png")]
    logits = [assistant.compute_logits(Dialog("What is it?", images=[one])) for one in pictures]
    assert all(torch.equal(other, logits[0]) for other in logits[1:])


@pytest.mark.parametrize(
    ("image", "message"),
    [("no/such.png", "image_missing"), (b"not one", "image_unreadable"), (b"", "image_unreadable")],
)
def test_other_files_are_refused_as_images(assistant: Assistant, image: str | bytes, message: str) -> None:
    with pytest.raises(UserError, match=message):
        assistant.generate([Dialog("What is it?", images=[image])])


def test_more_marks_than_images_are_refused(assistant: Assistant) -> None:
    with pytest.raises(UserError, match="cannot be asked"):
        assistant.generate([Dialog("<image> What is it?")])


def test_a_text_only_model_takes_no_image(tmp_path: Path, processor: Processor, picture: Image.Image) -> None:
    model = Sphinx(
        SphinxConfig.from_dict(
            {"decoder": {"vocab_size": 512, "width": 64, "layers": 1}, "vision": None}
            | {"decoder": {"vocab_size": 512, "width": 64, "layers": 1, "heads": 4, "kv_heads": 2, "ffn_width": 96}}
        )
    )
    assistant = Assistant.load(saved(tmp_path / "text", model, processor))
    assert isinstance(assistant.generate([Dialog("Hello")], SHORT)[0], str)
    with pytest.raises(UserError, match="no vision part"):
        assistant.generate([Dialog("What is it?", images=[picture])])


@pytest.mark.parametrize(
    ("text", "shown"),
    [(" a cat", "a cat"), ("a cat\n", "a cat"), ("a cat\n##", "a cat"), ("a cat\n###", "a cat"), ("a\nb", "a\nb"),
     ("caf\ufffd", "caf"), ("a #", "a #"), ("", ""), ("a\n ##", "a"), ("a\n ### b", "a\n### b")],
)  # fmt: skip
def test_an_answer_that_grows_shows_only_what_is_certain(assistant: Assistant, text: str, shown: str) -> None:
    assert assistant._certain(text) == shown


@pytest.fixture
def skipping(model_config: SphinxConfig) -> Sphinx:
    """Return a model with 3 x 3 sub-images that skips sub-images of padding."""
    assert model_config.vision is not None
    size = 3 * model_config.vision.image_size
    vision = dataclasses.replace(model_config.vision, image_size=size, grid=3, skip_padding=True)
    torch.manual_seed(0)
    return Sphinx(dataclasses.replace(model_config, vision=vision))


def test_padding_is_skipped_in_training_and_in_answers(
    tmp_path: Path, skipping: Sphinx, processor: Processor, picture: Image.Image
) -> None:
    wide, square = tmp_path / "wide.png", tmp_path / "square.png"
    picture.resize((900, 100)).save(wide)
    picture.resize((99, 99)).save(square)
    vision = skipping.config.vision
    assert vision is not None
    processor = Processor.from_dict(processor.to_dict(), Path(processor.tokenizer.path), skipping.config)
    records = [
        Record(path.stem, "chat", (ImageRef(str(path)),), turns=(Turn("What is it?", "a fractal"),))
        for path in (wide, square)
    ]
    samples = [processor.sample(record, "test") for record in records]
    assert samples[1].length - samples[0].length == 6 * (vision.view_tokens[1] - 1)

    collate = Collator(max(sample.length for sample in samples), vision.image_size)
    for subset, moves in ((samples, True), (samples[1:], False)):
        skipping.zero_grad()
        losses = skipping.token_losses(collate([[sample] for sample in subset]))
        (losses.nll.mean() + losses.extra).backward()
        assert losses.nll.isfinite().all()
        # there in any case, so that all ranks reduce the same
        gradient = skipping.mixer.skip_token.grad
        assert bool(gradient.any()) == moves
    together = skipping.token_losses(collate([[sample] for sample in samples])).nll
    alone = [skipping.token_losses(collate([[sample]])).nll for sample in samples]
    torch.testing.assert_close(together, torch.cat(alone), atol=1e-5, rtol=1e-5)

    assistant = Assistant.load(saved(tmp_path / "skipping", skipping, processor), device="cpu")
    dialogs = [Dialog("What is it?", images=[path]) for path in (wide, square)]
    assert assistant.generate(dialogs, SHORT) == [assistant.generate([dialog], SHORT)[0] for dialog in dialogs]
    prompt = processor.prompt(records[0])
    assert len(assistant.compute_logits(dialogs[0])) == len(prompt.ids)
    (other,) = evaluate(assistant.model, processor, records[:1], images={"wide": records[1].images}, progress=False)
    assert other.images == records[1].images


def test_a_picture_is_what_its_file_is(tmp_path: Path) -> None:
    clear, turned = tmp_path / "clear.png", tmp_path / "turned.jpg"
    Image.new("RGBA", (4, 8), (0, 0, 0, 0)).save(clear)
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.new("RGB", (4, 8), "red").save(turned, exif=exif)
    for path in (clear, turned):
        from_file = open_picture(path)
        with Image.open(path) as image:
            assert open_picture(image).size == from_file.size
            assert open_picture(image).tobytes() == from_file.tobytes()


def test_the_problem_of_a_picture_is_named(tmp_path: Path) -> None:
    huge, page = tmp_path / "huge.png", tmp_path / "page.jpg"
    huge.write_bytes(png_header(9000, 9000))
    page.write_bytes(b"<html>404</html>")
    with pytest.raises(BadDialog, match="9000x9000, at most 64,000,000 pixels") as large:
        open_picture(huge)
    assert "WebP" not in str(large.value)
    with pytest.raises(BadDialog, match=r"web page.*give a JPEG, PNG or WebP file"):
        open_picture(page)


def test_a_long_answer_ends_with_the_positions(assistant: Assistant) -> None:
    room = assistant.model.config.decoder.max_positions
    assistant.generate([Dialog("What is it?")], GenerationConfig(max_new_tokens=10 * room))
    with pytest.raises(UserError, match="leaves no room for an answer"):
        assistant.generate([Dialog("what " * room)])


def test_the_answers_tokens_are_those_of_training(assistant: Assistant, processor: Processor) -> None:
    record = Record("a", "chat", turns=(Turn("What is it?", "a red circle"),))
    (question,) = processor.sample(record, "test").questions
    for answer in ("a red circle", " a red circle"):
        logits = assistant.compute_logits(Dialog("What is it?"), answer)
        ids = torch.tensor(question.ids[: len(logits)])[None]
        decoder = assistant.model.decoder
        expected = decoder.logits(decoder(decoder.embed(ids), torch.arange(len(logits))[None]))[0]
        assert "".join(assistant.processor.tokenizer.decode(ids[0].tolist())).endswith("a red circle")
        torch.testing.assert_close(logits, expected)
