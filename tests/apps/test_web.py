"""The web page: uploads, escaping, sessions, masks, and a real browser that drives it."""

from __future__ import annotations

import base64
import io
import json
import os
import re
import signal
import socket
import struct
import subprocess
import sys
import zlib
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any
from urllib.parse import quote, urlsplit

import httpx
import numpy as np
import pytest
import torch
from omegaconf import OmegaConf
from PIL import Image, ImageDraw

from sphinx_pl.apps.masks import MARGIN, Segmenter
from sphinx_pl.apps.web import app, rendering
from sphinx_pl.apps.web import page as web_page
from sphinx_pl.apps.web.page import Page, WebConfig, instructions
from sphinx_pl.apps.web.session import PREVIEW_SIDE, Exchange, Session, UploadedImage
from sphinx_pl.checkpoints.native import write_checkpoint
from sphinx_pl.cli import chat
from sphinx_pl.data.coordinates import Coordinates
from sphinx_pl.data.drawing import PALETTE
from sphinx_pl.data.processor import Processor
from sphinx_pl.data.sampling.collator import Collator
from sphinx_pl.data.schema import ImageRef, Record, Turn
from sphinx_pl.data.tasks import TASKS
from sphinx_pl.generation.assistant import Assistant, Dialog
from sphinx_pl.generation.generate import GenerationConfig
from sphinx_pl.models.config import SphinxConfig
from sphinx_pl.models.sphinx import Sphinx
from sphinx_pl.runtime.hydra_app import CONFIG_FOLDER
from sphinx_pl.utils.errors import UserError
from tests.conftest import REPOSITORY, tiny_model

ANSWER = "A <p>red square</p>[0.10,0.20,0.40,0.60] and a <p>blue circle</p>[0.50,0.30,0.90,0.70]."
HOSTILE = '<script>window.hacked=1</script> ![x](http://evil.example/x.png) ${1+1} {{1}} <img src=x onerror="hacked=1">'
SETTINGS = (8, 0.0, 1.0)


def encoded(image: Image.Image, kind: str = "PNG") -> bytes:
    out = io.BytesIO()
    image.save(out, format=kind)
    return out.getvalue()


def scene() -> Image.Image:
    image = Image.new("RGB", (120, 120), "#f0ece4")
    canvas = ImageDraw.Draw(image)
    canvas.rectangle((12, 24, 48, 72), fill="red")
    canvas.ellipse((60, 36, 108, 84), fill="blue")
    return image


def bomb(width: int, height: int) -> bytes:
    """Return a PNG of a hundred bytes whose header promises many pixels."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"\0")) + chunk(b"IEND", b"")


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@pytest.fixture
def page(model_config: SphinxConfig, processor: Processor) -> Page:
    torch.manual_seed(0)
    model = Sphinx(model_config)
    # the initial weights would repeat one token
    for parameter in model.decoder.layers.parameters():
        if parameter.ndim > 1:
            torch.nn.init.normal_(parameter, std=0.3)
    config = WebConfig(port=free_port(), max_upload_mb=0.1, max_pixels=40_000)
    return Page(Assistant(model, processor), GenerationConfig(max_new_tokens=8), config)


@pytest.fixture
def session(page: Page) -> Session:
    session = Session()
    assert page.show(session, encoded(scene()), "scene.png") == ""
    return session


def asked(page: Page, session: Session, question: str) -> str:
    assert page.begin(session, question) == ""
    assert list(page.answer(session, *SETTINGS))[-1] == ""
    return session.exchanges[-1].answer


# Keys


def test_it_serves_this_machine_alone_by_default() -> None:
    assert OmegaConf.load(CONFIG_FOLDER / "chat.yaml").host == "127.0.0.1"
    assert chat.ChatConfig("model").host == WebConfig().host == "127.0.0.1"


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"ui": "webb"}, "ui=webb: did you mean 'web'"),
        ({"ui": "web", "port": "http"}, "port=http must be a whole number"),
        ({"ui": "web", "port": 0}, "port=0 must be 1 to 65535"),
        ({"ui": "web", "host": ""}, "host is empty"),
        ({"ui": "web", "host": "192.0.2.1"}, "host=192.0.2.1 cannot be used"),
        ({"ui": "web", "max_upload_mb": 0}, "max_upload_mb=0.0 must be positive"),
        ({"ui": "web", "max_pixels": -1}, "max_pixels=-1 must be positive"),
        ({"ui": "web", "generation": {"top_p": 0.0}}, "generation.top_p=0.0"),
    ],
)
def test_wrong_values_are_refused_before_a_model_is_loaded(values: dict[str, Any], message: str) -> None:
    shipped = OmegaConf.masked_copy(
        OmegaConf.load(CONFIG_FOLDER / "chat.yaml"),  # type: ignore[arg-type]
        list(chat.ChatConfig.__dataclass_fields__),
    )
    cfg = OmegaConf.merge(shipped, {"checkpoint": "no/such"}, values)
    with pytest.raises(UserError, match=re.escape(message)):
        chat.main.__wrapped__(cfg)  # type: ignore[attr-defined]


def test_a_port_in_use_is_refused() -> None:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        port = listener.getsockname()[1]
        with pytest.raises(UserError, match=f"port={port} of host=127.0.0.1 cannot be used"):
            app.check_address("127.0.0.1", port)


def test_without_gradio_the_message_says_what_to_install() -> None:
    code = "import sys; sys.modules['gradio'] = None\nimport sphinx_pl.apps.web.app"
    process = subprocess.run([sys.executable, "-c", code], cwd=REPOSITORY, capture_output=True, text=True, check=False)
    assert "UserError: ui=web needs gradio, which is not installed: pip install 'sphinx-pl[web]'" in process.stderr


# Uploads


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "not an image that can be read"),
        (b"hello, I am text", "not an image that can be read"),
        (b"<svg xmlns='http://www.w3.org/2000/svg'/>", "not an image that can be read"),
        (encoded(scene())[:-60], "its end is missing"),
        (encoded(scene().resize((300, 300))), "too many pixels: at most 40,000"),
        (bomb(100_000, 100_000), "too many pixels"),
        (encoded(Image.new("RGB", (1000, 5))), "x.png"),
        (bytes(100_001), "larger than 0.1 MB"),
    ],
)
def test_an_unusable_upload_is_reported_and_changes_nothing(
    page: Page, session: Session, data: bytes, message: str
) -> None:
    before = session.picture
    assert message in page.show(session, data, "x.png")
    assert session.picture is before


def test_another_image_begins_another_conversation(page: Page, session: Session) -> None:
    asked(page, session, "What is it?")
    assert page.show(session, encoded(scene(), "WEBP"), "again.webp") == ""
    assert session.exchanges == []


def test_the_model_sees_the_whole_image_and_the_page_a_small_one(page: Page) -> None:
    large = Image.effect_mandelbrot((2600, 1300), (-2, -1.5, 1, 1.5), 20).convert("RGB")
    picture = UploadedImage.make(large, "large", 32)
    assert picture.preview.size == (PREVIEW_SIDE, PREVIEW_SIDE // 2)
    assert picture.size == (2600, 1300)
    logits = [page.assistant.compute_logits(Dialog("What?", [image])) for image in (large, picture.square)]
    assert torch.equal(*logits)


# Untrusted text


def test_no_text_becomes_markup(page: Page, session: Session) -> None:
    phrase = f"<p>{HOSTILE}</p>[0.1,0.1,0.5,0.5]"
    assert session.picture is not None
    session.picture = UploadedImage(
        session.picture.square, session.picture.preview, session.picture.size, f'"{HOSTILE}'
    )
    session.exchanges = [Exchange(f"{HOSTILE} {phrase}", f"{HOSTILE} {phrase}")]
    for output in (
        rendering.render_talk(page.coordinates, session),
        rendering.render_picture(page.coordinates, session),
    ):
        tags = set(re.findall(r"<\s*/?\s*([a-z]+)", output))
        assert tags <= {"div", "span", "figure", "figcaption", "img", "svg", "g", "rect", "title"}
        assert output.count("<img") == output.count("<figure")
        assert "onerror=&#34;" in output
        assert "<script" not in output


def test_a_growing_answer_shows_no_half_of_its_markup(subtests: pytest.Subtests) -> None:
    for cut in range(0, len(ANSWER) + 1):
        with subtests.test(cut=cut):
            text = re.sub(r"<[^<>]*>", "", rendering.render_text(Coordinates(2), ANSWER[:cut], "a0-", growing=True))
            assert "<" not in text
            assert "&lt;" not in text
            assert "A red square[0.10,0.20,0.40,0.60] and".startswith(text[:37])


# Places


def test_phrases_and_places_share_a_key_and_a_colour(page: Page, session: Session) -> None:
    session.exchanges = [Exchange("Where?", ANSWER)]
    talk, svg = rendering.render_talk(page.coordinates, session), rendering.render_picture(page.coordinates, session)
    for number, phrase in enumerate(["red square", "blue circle"]):
        link = f'data-mark="a0-{number}" style="--mark:{PALETTE[number]}"'
        assert f"{link}>{phrase}</span>" in talk
        assert f'<g class="mark a" {link}>' in svg
    assert '<rect class="box" x="12.00" y="24.00" width="36.00" height="48.00"/>' in svg
    assert "[0.10,0.20,0.40,0.60]</span>" in talk


def test_places_are_in_the_frame_of_the_image_not_of_the_padded_square(page: Page) -> None:
    session = Session(UploadedImage.make(Image.new("RGB", (64, 32)), "x", 32))
    session.exchanges = [Exchange("?", "[0.25,0.1,0.75,0.75] [0.1,0.0,0.2,0.2] <p>nose</p>[0.5,0.5]")]
    svg = rendering.render_picture(page.coordinates, session)
    assert 'viewBox="0 0 64 32"' in svg
    # cut at the image's upper edge
    assert 'x="16.00" y="0.00" width="32.00" height="32.00"' in svg
    assert svg.count('class="box"') == 1  # a box inside the padding is not drawn
    assert 'x1="32.00" y1="16.00"' in svg


def test_each_person_has_a_colour_and_a_skeleton(page: Page, session: Session) -> None:
    person = "<p>nose</p>[0.5,0.1]<p>left shoulder</p>[0.6,0.3]<p>right shoulder</p>[0.4,0.3]"
    other = person.replace("0.3", "0.4").replace("0.1]", "0.2]")
    session.exchanges = [Exchange("?", f"{person} {other} <p>ball</p>[0.1,0.1,0.2,0.2] <p>nose</p>[0.5,0.1]")]
    marks = rendering.find_marks(page.coordinates.pieces(session.exchanges[0].answer), "a0-")
    assert [mark.colour for mark in marks] == [PALETTE[0]] * 3 + [PALETTE[1]] * 3 + [PALETTE[2]] + [PALETTE[0]]
    assert rendering.render_picture(page.coordinates, session).count('class="limb"') == 2


# Turns


def test_instructions_are_the_registrys_and_their_slots_must_be_filled(page: Page, session: Session) -> None:
    texts = instructions()
    assert {"caption", "rec", "detection", "ocr", "pose"} <= texts.keys()
    assert all(TASKS[name].templates[0] == text for name, text in texts.items())
    assert page.begin(session, page.fill(session, texts["rec"])) == "Replace {phrase} with your own words."
    assert (
        page.fill(session, texts["pose"]) == "Detect the key points of the person in the region [0.00,0.00,1.00,1.00]."
    )
    assert page.begin(session, "Is {x} a set?") == ""


def test_a_box_dragged_on_the_image_goes_into_the_question(page: Page, session: Session) -> None:
    box = [12.0, 60, 130, 24]
    assert page.point_out(session, "What is in {box}?", box) == "What is in [0.10,0.20,1.00,0.50]?"
    assert page.point_out(session, "In [0.1,0.2,0.3,0.4]?", box) == "In [0.10,0.20,1.00,0.50]?"
    assert page.point_out(session, "What is this:", box) == "What is this: [0.10,0.20,1.00,0.50]"
    for wrong in (None, "x", [1, 2], [1, 2, 3, "<script>"], [1, 2, 3, float("nan")], {"a": 1}):
        assert page.point_out(session, "What?", wrong) == "What?"


def test_an_answer_grows_in_order_to_what_generation_gives(
    page: Page, session: Session, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(web_page, "_INTERVAL", 0.0)
    page.begin(session, "What is it?")
    states = [(session.exchanges[0].answer, session.busy) for _ in page.answer(session, *SETTINGS)]
    texts = [text for text, _ in states]
    assert [len(text) for text in texts] == sorted(len(text) for text in texts)
    assert len(set(texts)) > 3
    assert [busy for _, busy in states] == [True] * (len(states) - 1) + [False]
    assert session.picture is not None
    config = GenerationConfig(max_new_tokens=8)
    assert texts[-1] == page.assistant.generate([Dialog("What is it?", [session.picture.square])], config)[0]
    second = asked(page, session, "And now?")
    dialog = Dialog("And now?", [session.picture.square], [Turn("What is it?", texts[-1])])
    assert second == page.assistant.generate([dialog], config)[0]


def test_stop_keeps_the_answer_so_far_and_new_forgets_it(
    page: Page, session: Session, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(web_page, "_INTERVAL", 0.0)
    page.begin(session, "What is it?")
    steps = page.answer(session, *SETTINGS)
    for _ in range(4):
        next(steps)
    half = session.exchanges[0].answer
    assert "still being written" in page.begin(session, "Another?")
    page.stop(session)
    assert list(steps) == [""]
    assert [turn.answer for turn in session.history] == [half]
    page.begin(session, "Another?")
    session.restart()
    assert list(page.answer(session, *SETTINGS)) == []
    assert session.exchanges == []


def test_stop_reaches_an_answer_that_waits_for_its_turn(page: Page, session: Session) -> None:
    page.begin(session, "What is it?")
    page.stop(session)
    assert list(page.answer(session, *SETTINGS)) == [""]
    assert session.exchanges[0].answer == ""
    assert asked(page, session, "And now?")


def test_an_internal_failure_is_reported_and_the_session_continues(
    page: Page, session: Session, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(page.assistant.model, "embed_images", None)
        page.begin(session, "What is it?")
        assert list(page.answer(session, *SETTINGS)) == ["The answer failed (TypeError): see the terminal for details."]
    assert session.exchanges == []
    assert asked(page, session, "What is it?")


def test_a_model_of_text_alone_has_no_upload(processor: Processor, tmp_path: Path) -> None:
    assistant = Assistant(Sphinx(tiny_model(vision=None)), processor)
    page = Page(assistant, GenerationConfig(max_new_tokens=8), WebConfig())
    assert page.show(Session(), encoded(scene()), "x.png") == "This model reads only text."
    with pytest.raises(UserError, match=r"image=x\.png: this model has no vision part"):
        page.start("x.png")
    blocks = app.build(page, Session(), tmp_path, "a model")
    hidden = [block for block in blocks.blocks.values() if getattr(block, "visible", True) is False]
    inside = {child.elem_id for block in hidden for child in getattr(block, "children", [])}
    assert {"picture", "upload"} <= inside


def test_a_tab_closed_in_the_middle_leaves_the_session_usable(page: Page, session: Session) -> None:
    page.begin(session, "What is it?")
    steps = page.answer(session, *SETTINGS)
    next(steps)
    steps.close()  # type: ignore[attr-defined]
    assert not session.busy


def test_a_refused_question_is_reported_and_not_kept(page: Page, session: Session) -> None:
    page.begin(session, "long " * 600)
    assert "leaves no room for an answer" in list(page.answer(session, *SETTINGS))[-1]
    assert session.exchanges == []
    page.begin(session, "What?")
    assert "generation.top_p" in list(page.answer(session, 8, 0.0, 7.0))[-1]
    assert asked(page, session, "What is it?") == session.history[0].answer


def test_a_turn_without_an_answer_does_not_spoil_the_next(page: Page, session: Session) -> None:
    session.exchanges = [Exchange("What?", "")]
    assert "no answer" in rendering.render_talk(page.coordinates, session)
    assert asked(page, session, "And now?")


# Masks


@pytest.fixture
def sam(tmp_path: Path) -> Path:
    from transformers import SamConfig, SamImageProcessor, SamModel, SamProcessor

    torch.manual_seed(0)
    vision = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "image_size": 64, "patch_size": 8}
    decoder = {"hidden_size": 16, "mlp_dim": 32, "num_attention_heads": 2, "iou_head_hidden_dim": 16}
    config = SamConfig(
        vision_config=vision | {"output_channels": 16, "mlp_dim": 32, "window_size": 0, "num_pos_feats": 8},
        prompt_encoder_config={"hidden_size": 16, "image_size": 64, "patch_size": 8, "mask_input_channels": 4},
        mask_decoder_config=decoder | {"num_hidden_layers": 1},
    )
    SamModel(config).save_pretrained(tmp_path / "sam")
    sizes = {"size": {"longest_edge": 64}, "pad_size": {"height": 64, "width": 64}}
    masks = {"mask_size": {"longest_edge": 16}, "mask_pad_size": {"height": 16, "width": 16}}
    SamProcessor(SamImageProcessor(**sizes, **masks)).save_pretrained(tmp_path / "sam")
    return tmp_path / "sam"


def test_masks_have_the_images_size_and_stay_near_their_boxes(sam: Path) -> None:
    segmenter = Segmenter.load(str(sam))
    picture = scene().resize((120, 80))
    boxes = [(10.0, 10.0, 60.0, 50.0), (-30.0, 40.0, 50.0, 200.0), (200.0, 200.0, 300.0, 300.0), (5.0, 5.0, 5.0, 9.0)]
    masks = segmenter.segment(picture, boxes)
    assert masks.shape == (4, 80, 120)
    assert masks.dtype == np.bool_
    assert masks[0].any()
    rows, columns = np.nonzero(masks[0])
    assert columns.min() >= 10 - MARGIN * 50
    assert columns.max() <= 60 + MARGIN * 50
    assert rows.max() <= 50 + MARGIN * 40
    assert not masks[2:].any()
    many = segmenter.segment(picture, boxes[:1] * 20)
    assert (many == masks[0]).all()
    assert segmenter.segment(picture, []).shape == (0, 80, 120)


def test_masks_are_drawn_in_the_colour_of_their_phrase(page: Page, session: Session, sam: Path) -> None:
    page.segmenter = Segmenter.load(str(sam))
    assert session.picture is not None
    exchange = Exchange("?", ANSWER)
    session.exchanges = [exchange]
    exchange.masks = page._masks(page.segmenter, session.picture, exchange, 0)
    assert exchange.masks.keys() == {"a0-0", "a0-1"}
    svg = rendering.render_picture(page.coordinates, session)
    assert svg.count('<image href="data:image/png;base64,') == 2
    mask = Image.open(io.BytesIO(base64.b64decode(exchange.masks["a0-0"].split(",")[1])))
    assert mask.size == (120, 120)
    assert set(np.unique(np.array(mask).reshape(-1, 4), axis=0)[-1]) == {0xE6, 0x00, 0x7E, 0x80}


def test_a_sam_that_is_not_there_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, sam: Path) -> None:
    import huggingface_hub

    def offline(*_: Any, **__: Any) -> None:
        raise httpx.ConnectError("Name or service not known")

    monkeypatch.setattr(huggingface_hub.HfApi, "model_info", offline)
    with pytest.raises(
        UserError, match=r"there is no folder some/sam, and the model some/sam is neither in .* get its"
    ):
        Segmenter.load("some/sam")
    with pytest.raises(UserError, match=r"is not a SAM model with config\.json"):
        Segmenter.load(str(tmp_path))
    (sam / "model.safetensors").unlink()
    torch.save({"x": torch.zeros(1)}, sam / "pytorch_model.bin")  # a pickle is not read
    with pytest.raises(UserError, match="is not a SAM model"):
        Segmenter.load(str(sam))


# Over HTTP


class Tab:
    """A browser's tab as the server sees it."""

    def __init__(self, url: str, blocks: Any, name: str) -> None:
        self.client = httpx.Client(base_url=url, timeout=60, trust_env=False)
        self.name = name
        self.events = {fn.fn.__name__: index for index, fn in blocks.fns.items() if hasattr(fn.fn, "__name__")}

    def call(self, event: str, *data: Any) -> list[dict[str, Any]]:
        """Return the messages that answer an event.

        The server holds the session's state, so it is None here.
        """
        body = {"data": data, "fn_index": self.events[event], "session_hash": self.name}
        self.client.post("/gradio_api/queue/join", json=body).raise_for_status()
        messages = []
        with self.client.stream("GET", "/gradio_api/queue/data", params={"session_hash": self.name}) as stream:
            for line in stream.iter_lines():
                if line.startswith("data: "):
                    messages.append(json.loads(line.removeprefix("data: ")))
                    if messages[-1]["msg"] in ("process_completed", "unexpected_error"):
                        break
        return messages

    def upload(self, data: bytes, name: str) -> httpx.Response:
        return self.client.post("/gradio_api/upload", files={"files": (name, data)})

    def show(self, path: str) -> dict[str, Any]:
        file = {"path": path, "meta": {"_type": "gradio.FileData"}, "orig_name": "x.png"}
        return self.call("on_upload", None, file)[-1]


@pytest.fixture
def served(page: Page, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[str], Tab]]:
    folder = tmp_path / "uploads"
    folder.mkdir()
    monkeypatch.setenv("GRADIO_TEMP_DIR", "")  # the page sets it; it is restored after the test
    blocks = app.launch(page, app.build(page, Session(), folder, "a model"))
    try:
        yield lambda name: Tab(f"http://127.0.0.1:{page.config.port}", blocks, name)
    finally:
        blocks.close(verbose=False)


def test_uploads_over_http_are_bounded_and_the_disk_stays_closed(
    served: Callable[[str], Tab], page: Page, tmp_path: Path
) -> None:
    tab = served("one")
    secret = tmp_path / "secret.txt"
    secret.write_text("do not show")
    assert tab.client.get("/").status_code == 200
    for path in (
        "/etc/passwd",
        str(secret),
        str(REPOSITORY / "README.md"),
        "README.md",
        str(tmp_path / "uploads/../secret.txt"),
    ):
        assert tab.client.get(f"/gradio_api/file={quote(path)}").status_code in (403, 404), path
        answer = tab.show(path)
        assert not answer["success"], path
    assert secret.exists()
    assert tab.upload(bytes(100_001), "x.png").status_code == 413
    for data, message in ((b"text", "not an image that can be read"), (bomb(60_000, 60_000), "too many pixels")):
        [path] = tab.upload(data, "<img src=x>.png").json()
        output = tab.show(path)["output"]["data"]
        assert message in output[3]
        assert "<img" not in output[3]
    [path] = tab.upload(encoded(scene()), "scene.png").json()
    assert "data:image/png;base64," in tab.show(path)["output"]["data"][2]
    # gradio itself leaves an empty file.
    assert [file for file in (tmp_path / "uploads").rglob("*") if file.is_file() and file.stat().st_size] == []
    page.begin(Session(), "still there?")
    assert tab.client.get("/").status_code == 200


def test_every_tab_has_its_own_conversation(served: Callable[[str], Tab], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(web_page, "_INTERVAL", 0.0)
    one, two = served("one"), served("two")
    [path] = one.upload(encoded(scene()), "scene.png").json()
    one.show(path)
    outputs = one.call("on_begin", None, "first question")[-1]["output"]["data"]
    assert "first question" in outputs[1]
    messages = one.call("on_answer", None, *SETTINGS)
    assert sum(message["msg"] == "process_generating" for message in messages) > 3
    other = two.call("on_begin", None, "second question")[-1]["output"]["data"]
    assert "second question" in other[1]
    assert "first question" not in other[1]
    assert "data:image" not in other[2]
    assert two.call("on_answer", None, *SETTINGS)[-1]["success"]
    assert "first question" in one.call("on_begin", None, "third question")[-1]["output"]["data"][1]


def test_the_model_answers_one_tab_at_a_time(
    served: Callable[[str], Tab], page: Page, monkeypatch: pytest.MonkeyPatch
) -> None:
    running: list[int] = [0]
    most: list[int] = []
    stream = page.assistant.stream

    def counted(*arguments: Any) -> Iterator[list[str]]:
        running[0] += 1
        most.append(running[0])
        yield from stream(*arguments)
        running[0] -= 1

    monkeypatch.setattr(page.assistant, "stream", counted)
    tabs = [served(name) for name in ("one", "two", "three")]
    for tab in tabs:
        tab.call("on_begin", None, "What is it?")
    with ThreadPoolExecutor() as pool:
        successes = list(pool.map(lambda tab: tab.call("on_answer", None, *SETTINGS)[-1]["success"], tabs))
    assert successes == [True] * 3
    assert most == [1] * 3


# In a browser

CHROMIUM = Path("/usr/bin/chromium")
FLAGS = ["--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking"]
FLAGS += ["--disable-component-update", "--disable-sync"]


LONG = f"{ANSWER} The <p>red square</p>[0.10,0.20,0.40,0.60] is on the left of the picture, the circle on its right."


def taught(folder: Path, processor: Processor, question: str) -> Path:
    """Return a checkpoint of a tiny model that learnt to give LONG to one question about
    `scene()`.
    """
    image = folder / "scene.png"
    scene().save(image)
    turns = (Turn(question, LONG),)
    record = Record("scene", "grounded_caption", (ImageRef(str(image)),), ((120, 120),), turns)
    batch = Collator(256, processor.image_size)([[processor.sample(record, "s")]])
    torch.manual_seed(0)
    model = Sphinx(tiny_model())
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, betas=(0.9, 0.95), weight_decay=0.0)
    for _ in range(300):
        losses = model.token_losses(batch)
        loss = losses.nll.mean() + losses.extra
        if float(losses.nll.detach().max()) < 0.05:
            break
        loss.backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
    path = folder / "model"
    tokenizer = Path(processor.tokenizer.path)
    write_checkpoint(path, model.state_dict(), model.config.to_dict(), processor.to_dict(), tokenizer, {"stage": None})
    answer = Assistant.load(path, "cpu").generate([Dialog(question, [image])], GenerationConfig(max_new_tokens=250))
    assert answer == [LONG]
    return path


@pytest.fixture
def site(tmp_path: Path, processor: Processor, sam: Path) -> Iterator[str]:
    """Return the address of `python chat.py ui=web` with a model that answers with boxes."""
    if not CHROMIUM.exists():
        pytest.fail(f"{CHROMIUM} is missing, which drives the page: apt-get install chromium")
    checkpoint = taught(tmp_path, processor, instructions()["grounded_caption"])
    port = free_port()
    keys = [f"checkpoint={checkpoint}", f"port={port}", f"sam={sam}", "max_upload_mb=0.1", "max_pixels=40000"]
    keys += ["ui=web", "device=cpu", f"hydra.run.dir={tmp_path / 'run'}"]
    environment = os.environ | {"TMPDIR": str(tmp_path), "OMP_NUM_THREADS": "1"}
    with (tmp_path / "server.log").open("w") as log:
        server = subprocess.Popen(
            [sys.executable, "chat.py", *keys], cwd=REPOSITORY, env=environment, stdout=log, stderr=subprocess.STDOUT
        )
    url = f"http://127.0.0.1:{port}"
    try:
        for _ in range(240):
            if url in (tmp_path / "server.log").read_text() or server.poll() is not None:
                break
            with pytest.raises(subprocess.TimeoutExpired):
                server.wait(0.5)
        assert server.poll() is None, (tmp_path / "server.log").read_text()
        yield url
        assert server.poll() is None, "the server died"
    finally:
        server.send_signal(signal.SIGTERM)
        server.wait(30)
    assert list(tmp_path.glob("sphinx-pl-web-*")) == []


@pytest.mark.long
def test_a_browser_uploads_asks_and_sees_boxes(site: str, tmp_path: Path) -> None:
    from playwright.sync_api import expect, sync_playwright

    expect.set_options(timeout=30_000)
    (tmp_path / "text.png").write_text("This is text.")
    (tmp_path / "wide.png").write_bytes(bomb(60_000, 60_000))
    (tmp_path / "large.png").write_bytes(encoded(scene()) + bytes(200_000))
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=str(CHROMIUM), args=FLAGS)
        page = browser.new_page(viewport={"width": 1280, "height": 800})
        hosts: set[str] = set()
        failures: list[str] = []
        page.on("request", lambda request: hosts.add(urlsplit(request.url).netloc))
        page.on("pageerror", lambda error: failures.append(str(error)))
        page.goto(site)
        page.wait_for_selector("#picture .drop")

        for file, message in (("text.png", "not an image"), ("wide.png", "too many pixels")):
            page.set_input_files("input[type=file]", tmp_path / file)
            expect(page.locator("#notice")).to_contain_text(message)
            expect(page.locator("#picture .drop")).to_be_visible()
        page.set_input_files("input[type=file]", tmp_path / "large.png")
        expect(page.get_by_text(re.compile("exceeds|too large|maximum", re.I)).first).to_be_visible()
        expect(page.locator("#picture .drop")).to_be_visible()

        page.set_input_files("input[type=file]", tmp_path / "scene.png")
        expect(page.locator("#picture img")).to_be_visible()
        page.click("text=Caption with boxes")
        expect(page.locator("#question textarea")).to_have_value(instructions()["grounded_caption"])
        page.evaluate(
            """() => { window.states = []; new MutationObserver(() => {
              const answer = document.querySelector('#talk .answer');
              if (answer && answer.textContent !== states.at(-1)) states.push(answer.textContent);
            }).observe(document.querySelector('#talk'), {childList: true, subtree: true, characterData: true}); }"""
        )
        page.press("#question textarea", "Enter")
        plain = re.sub("</?p>", "", LONG)
        expect(page.locator("#talk .answer:not(.growing)")).to_have_text(plain, timeout=60_000)
        states = [state for state in page.evaluate("states") if state]
        assert all(plain.startswith(state) for state in states)
        assert len(set(states) - {plain}) >= 2, states

        boxes = page.locator("#picture .turn.shown .mark.a rect.box")
        expect(boxes).to_have_count(3)
        expect(page.locator("#picture image")).to_have_count(3)  # masks
        edges, frame = boxes.first.bounding_box(), page.locator("#picture .frame").bounding_box()
        assert edges is not None
        assert frame is not None
        assert (edges["x"] - frame["x"]) / frame["width"] == pytest.approx(0.1, abs=0.02)
        assert (edges["y"] - frame["y"]) / frame["height"] == pytest.approx(0.2, abs=0.02)
        page.screenshot(path=tmp_path / "answer.png")

        page.locator("#talk .phrase", has_text="red square").first.hover()
        expect(page.locator("#picture .mark.lit")).to_have_attribute("data-mark", "a0-0")
        expect(page.locator("#picture .frame.dim")).to_be_visible()
        page.screenshot(path=tmp_path / "highlighted.png")

        page.click("text=What is in the box")
        page.mouse.move(frame["x"] + 0.25 * frame["width"], frame["y"] + 0.25 * frame["height"])
        page.mouse.down()
        page.mouse.move(frame["x"] + 0.75 * frame["width"], frame["y"] + 0.5 * frame["height"], steps=4)
        page.mouse.up()
        expect(page.locator("#question textarea")).to_have_value(re.compile(r"\[0\.25,0\.25,0\.75,0\.50\]"))

        page.fill("#question textarea", HOSTILE)
        page.press("#question textarea", "Enter")
        expect(page.locator("#talk .question").nth(1)).to_have_text(HOSTILE)
        expect(page.locator("#talk .answer:not(.growing)")).to_have_count(2, timeout=60_000)
        assert page.evaluate("window.hacked") is None

        other = browser.new_page()
        other.goto(site)
        expect(other.locator("#picture .drop")).to_be_visible()
        expect(other.locator("#talk .question")).to_have_count(0)

        page.click("#new")
        expect(page.locator("#talk .question")).to_have_count(0)
        expect(page.locator("#picture img")).to_be_visible()

        # The small model may finish before Stop arrives. Another test shows that Stop ends an
        # answer.
        page.fill("#question textarea", instructions()["grounded_caption"])
        page.evaluate(
            """() => { const wait = setInterval(() => {
              if (!document.querySelector('#talk .answer')?.textContent) return;
              clearInterval(wait);
              document.querySelector('#stop')?.click();
            }, 5); }"""
        )
        page.press("#question textarea", "Enter")
        expect(page.locator("#talk .answer:not(.growing)")).to_have_count(1)
        assert plain.startswith(page.locator("#talk .answer").inner_text())
        expect(page.locator("#send")).to_be_visible()

        page.evaluate(
            """async () => {
              const blob = await new Promise(done => { const canvas = document.createElement('canvas');
                canvas.width = 40; canvas.height = 20; canvas.toBlob(done); });
              const data = new DataTransfer();
              data.items.add(new File([blob], 'dropped.png', {type: 'image/png'}));
              const event = new DragEvent('drop', {dataTransfer: data, bubbles: true, cancelable: true});
              document.querySelector('#picture .picture').dispatchEvent(event); }"""
        )
        expect(page.locator("#picture figcaption")).to_contain_text("dropped.png, 40 x 20 pixels")
        expect(page.locator("#talk .answer")).to_have_count(0)
        assert hosts <= {urlsplit(site).netloc, ""}, "nothing may be fetched from elsewhere"
        assert failures == []
        browser.close()
