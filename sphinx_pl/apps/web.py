"""A local page for a trained model: upload, ask, read the answer as it grows, see what it names on the image.

What a model, a user or a file's name says is untrusted text. It reaches the page only through `html.escape`, and no
Markdown is rendered.
"""

from __future__ import annotations

import base64
import functools
import html
import io
import logging
import math
import os
import re
import signal
import socket
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, NoReturn

from PIL import Image

from sphinx_pl.apps.masks import Segmenter
from sphinx_pl.data.coordinates import COCO_KEYPOINTS, Geometry, Grounded, Piece, Size, point_to_pixels, to_pixels
from sphinx_pl.data.drawing import GIVEN, PALETTE, limbs
from sphinx_pl.data.images import decode, padded_resize
from sphinx_pl.data.schema import Turn
from sphinx_pl.data.skip import BadSample
from sphinx_pl.data.tasks import TASKS
from sphinx_pl.generation.assistant import Assistant, Dialog, open_picture, typed
from sphinx_pl.generation.generate import GenerationConfig
from sphinx_pl.utils.errors import UserError

# Read when gradio is imported, and by what it starts.
os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"
try:
    import gradio as gr
except ModuleNotFoundError as error:
    raise UserError(f"ui=web needs {error.name}, which is not installed: pip install 'sphinx-pl[web]'") from error

SHOWN_SIDE = 1280
"""Longest side in pixels of the picture that the page shows; the model sees the whole one."""

_SCRIPT = Path(__file__).with_name("web.js").read_text(encoding="utf-8")
_STYLE = Path(__file__).with_name("web.css").read_text(encoding="utf-8")
# What is to be replaced is selected, so that typing replaces it.
_SELECT_SLOT = """() => setTimeout(() => {
  const area = document.querySelector('#question textarea');
  const slot = area.value.match(/\\{\\w+\\}/);
  area.focus();
  if (slot) area.setSelectionRange(slot.index, slot.index + slot[0].length);
}, 50)"""
_INTERVAL = 0.03  # seconds between two states of a growing answer: faster than this is only work for the browser
_log = logging.getLogger(__name__)
_SESSIONS = 100  # the longest unused are forgotten first
_SLOT = re.compile(r"\{(\w+)\}")
_LABELS = {
    "description": "Describe",
    "caption": "Caption",
    "rec": "Find a phrase",
    "reg": "What is in the box",
    "grounded_caption": "Caption with boxes",
    "detection": "Detect",
    "ocr": "Read text",
    "pose": "Key points",
    "layout": "Page layout",
    "detection_all": "Detect all",
    "ocr_text": "Text only",
    "relation_detection": "Relation",
    "question_generation": "Ask a question",
}
_REFUSED = {
    "image_truncated": "the image is damaged, its end is missing.",
    "image_unreadable": "this is not an image that can be read: give a JPEG, PNG or WebP file.",
    "image_aspect": "the image is too thin.",
}


@dataclass
class WebConfig:
    """Where the page is served, and what it accepts.

    `max_upload_mb` is in units of 10^6 bytes, `max_pixels` bounds width times height.

    Raises:
        UserError: a port or limit that cannot be.
    """

    host: str = "127.0.0.1"
    port: int = 7860
    max_upload_mb: float = 20.0
    max_pixels: int = 64_000_000

    def __post_init__(self) -> None:
        if not self.host.strip():
            raise UserError("host is empty: 127.0.0.1 is this machine alone, 0.0.0.0 everyone who can reach it")
        if not 1 <= self.port <= 65535:
            raise UserError(f"port={self.port} must be 1 to 65535")
        if not 0 < self.max_upload_mb < math.inf:
            raise UserError(f"max_upload_mb={self.max_upload_mb} must be positive")
        if self.max_pixels < 1:
            raise UserError(f"max_pixels={self.max_pixels} must be positive")


def check_address(host: str, port: int) -> None:
    """Whether the page could be served there, asked before a model is loaded.

    Raises:
        UserError: the port is taken or not allowed, or the host is not this machine.
    """
    try:
        [(family, kind, _, _, address), *_] = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
        with socket.socket(family, kind) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # one that has just been closed is free
            probe.bind(address)
    except OSError as error:
        raise UserError(f"port={port} of host={host} cannot be used ({error.strerror}): give another") from None


@dataclass(frozen=True)
class Picture:
    """An uploaded image: as the model sees it, as the page shows it, and its own size (width, height)."""

    square: Image.Image
    shown: Image.Image
    size: Size
    name: str

    @classmethod
    def make(cls, image: Image.Image, name: str, side: int) -> Picture:
        """From an RGB image; `side` is the model's image size in pixels."""
        shown = image.copy()
        shown.thumbnail((SHOWN_SIDE, SHOWN_SIDE))
        return cls(padded_resize(image, side), shown, image.size, name)

    @functools.cached_property
    def source(self) -> str:
        """The shown picture as a data URI, so that no file has to be served."""
        return _data_uri(self.shown, "PNG" if max(self.shown.size) <= 256 else "JPEG")


@dataclass
class Exchange:
    """A question, what there is of its answer, and after it masks of its marks: data URIs by the mark's key.

    `ticket` is the session's when the question was taken: another one since then has ended the answer.
    """

    question: str
    answer: str = ""
    growing: bool = False
    ticket: int = 0
    masks: dict[str, str] = field(default_factory=dict)


@dataclass
class Session:
    """One tab's picture and conversation. `ticket` counts what ends an answer early: Stop, New, another image."""

    picture: Picture | None = None
    exchanges: list[Exchange] = field(default_factory=list)
    ticket: int = 0

    @property
    def busy(self) -> bool:
        """Whether an answer is awaited or growing."""
        return bool(self.exchanges) and self.exchanges[-1].growing

    @property
    def history(self) -> list[Turn]:
        """What the model is told of before; a turn without an answer is no turn."""
        return [
            Turn(typed(exchange.question), typed(exchange.answer))
            for exchange in self.exchanges
            if not exchange.growing and exchange.answer.strip()
        ]

    def restart(self) -> None:
        """An empty conversation about the same picture."""
        self.exchanges = []
        self.ticket += 1


@dataclass(frozen=True)
class Mark:
    """A piece of text that names places, with its key on the page and its colour."""

    key: str
    colour: str
    piece: Piece


def find_marks(pieces: list[Piece], prefix: str, colour: str | None = None) -> list[Mark]:
    """A mark for each piece that names places. A person's keypoints share a colour, and so does what is named again.

    Args:
        colour: of all of them; None takes the palette's in turn.
    """
    marks: list[Mark] = []
    known: dict[tuple[str, object], str] = {}
    turn = 0
    person: set[str] = set()
    for piece in pieces:
        if not piece.numbers:
            continue
        joint = piece.phrase in COCO_KEYPOINTS and bool(piece.points)
        thing = (piece.phrase, piece.boxes or piece.points)
        if not (joint and person and piece.phrase not in person) and thing not in known:
            person, turn = set(), turn + 1
        if joint:
            person.add(piece.phrase)
        else:
            person = set()
        of_turn = known.setdefault(thing, PALETTE[(turn - 1) % len(PALETTE)])
        marks.append(Mark(f"{prefix}{len(marks)}", colour or of_turn, piece))
    return marks


def render_text(geometry: Geometry, text: str, prefix: str, colour: str | None = None, growing: bool = False) -> str:
    """A question or an answer as HTML, its phrases linked to the places on the picture by their marks' keys."""
    pieces = geometry.pieces(text)
    marks = iter(find_marks(pieces, prefix, colour))
    parts = []
    for piece in pieces:
        if not piece.numbers:
            plain = piece.text
            if growing and piece is pieces[-1]:
                plain = re.sub(r"</?p?$", "", plain)
            # A phrase whose bracket has not come yet, or is malformed.
            parts.append(html.escape(re.sub(r"</?p>", "", plain)))
            continue
        mark = next(marks)
        numbers = html.escape(piece.numbers)
        link = f'tabindex="0" data-mark="{mark.key}" style="--mark:{mark.colour}"'
        if piece.phrase:
            parts.append(f'<span class="phrase" {link}>{html.escape(piece.phrase)}</span>')
            parts.append(f'<span class="numbers">{numbers}</span>')
        else:
            parts.append(f'<span class="phrase numbers" {link}>{numbers}</span>')
    return "".join(parts)


def render_talk(geometry: Geometry, session: Session) -> str:
    """The conversation as HTML."""
    if not session.exchanges:
        hint = "Ask anything" if session.picture is None else "Ask about the image"
        return f'<div class="talk empty">{hint}, or start from one of the instructions below.</div>'
    parts = []
    for number, exchange in enumerate(session.exchanges):
        question = render_text(geometry, exchange.question, f"q{number}-", GIVEN)
        answer = render_text(geometry, exchange.answer, f"a{number}-", growing=exchange.growing)
        state = "answer growing" if exchange.growing else "answer"
        if not exchange.answer:
            answer = "" if exchange.growing else '<span class="none">no answer</span>'
        parts.append(f'<div class="question" data-turn="{number}">{question}</div>')
        parts.append(f'<div class="{state}" data-turn="{number}">{answer}</div>')
    return f'<div class="talk">{"".join(parts)}</div>'


def render_picture(geometry: Geometry, session: Session) -> str:
    """The picture with every turn's places over it, of which the page shows the last turn's, as HTML and SVG."""
    picture = session.picture
    if picture is None:
        return '<div class="drop"><b>Drop an image here</b><span>or click to choose one, or paste</span></div>'
    width, height = picture.size
    groups = []
    tags = []
    last = len(session.exchanges) - 1
    for number, exchange in enumerate(session.exchanges):
        drawn = []
        for text, prefix, colour in ((exchange.question, "q", GIVEN), (exchange.answer, "a", None)):
            marks = find_marks(geometry.pieces(text), f"{prefix}{number}-", colour)
            drawn.append(_limbs_svg(marks, picture.size))
            drawn += [_mark_svg(mark, picture.size, exchange.masks.get(mark.key, ""), prefix) for mark in marks]
            tags += [_tag(mark, picture.size, number, number == last) for mark in marks]
        shown = " shown" if number == last else ""
        groups.append(f'<g class="turn{shown}" data-turn="{number}">{"".join(drawn)}</g>')
    title = html.escape(f"{picture.name}, {width} x {height} pixels")
    return (
        f'<figure class="picture" style="--ratio:{width / height:.5f}"><div class="frame" data-width="{width}" '
        f'data-height="{height}"><img src="{picture.source}" alt="{title}" draggable="false">'
        f'<svg viewBox="0 0 {width} {height}" preserveAspectRatio="none">{"".join(groups)}</svg>{"".join(tags)}</div>'
        f"<figcaption>{title}. Drag on it to put a box into the question.</figcaption></figure>"
    )


def _corners(mark: Mark, size: Size) -> list[tuple[float, float, float, float]]:
    """The mark's boxes in pixels of the image, cut at its edges; those in the padding alone are left out."""
    width, height = size
    found = []
    for box in mark.piece.boxes:
        x1, y1, x2, y2 = to_pixels(box, size)
        x1, y1, x2, y2 = max(x1, 0.0), max(y1, 0.0), min(x2, width), min(y2, height)
        if x1 < x2 and y1 < y2:
            found.append((x1, y1, x2, y2))
    return found


def _mark_svg(mark: Mark, size: Size, mask: str, kind: str) -> str:
    width, height = size
    parts = [f'<image href="{mask}" x="0" y="0" width="{width}" height="{height}"/>'] if mask else []
    for x1, y1, x2, y2 in _corners(mark, size):
        shape = f'x="{x1:.2f}" y="{y1:.2f}" width="{x2 - x1:.2f}" height="{y2 - y1:.2f}"'
        parts.append(f'<rect class="rim" {shape}/><rect class="box" {shape}/>')
    for point in mark.piece.points:
        x, y = point_to_pixels(point, size)
        # A line of no length with round ends: a dot of the same size on the screen whatever the picture's size.
        shape = f'x1="{x:.2f}" y1="{y:.2f}" x2="{x:.2f}" y2="{y:.2f}"'
        parts.append(f'<line class="dot rim" {shape}/><line class="dot" {shape}/>')
    title = f"<title>{html.escape(mark.piece.phrase or mark.piece.numbers)}</title>"
    return f'<g class="mark {kind}" data-mark="{mark.key}" style="--mark:{mark.colour}">{title}{"".join(parts)}</g>'


def _limbs_svg(marks: list[Mark], size: Size) -> str:
    lines = []
    for colour in dict.fromkeys(mark.colour for mark in marks):
        items = [Grounded(m.piece.phrase, m.piece.boxes, m.piece.points) for m in marks if m.colour == colour]
        for limb in limbs(items):
            (x1, y1), (x2, y2) = (point_to_pixels(point, size) for point in limb)
            shape = f'x1="{x1:.2f}" y1="{y1:.2f}" x2="{x2:.2f}" y2="{y2:.2f}"'
            lines.append(f'<line class="limb" style="--mark:{colour}" {shape}/>')
    return "".join(lines)


def _tag(mark: Mark, size: Size, number: int, shown: bool) -> str:
    """The phrase at its first box's upper left corner; keypoints have theirs as a tooltip only, for want of room."""
    corners = _corners(mark, size)
    if not corners or not mark.piece.phrase:
        return ""
    left, top = 100 * corners[0][0] / size[0], 100 * corners[0][1] / size[1]
    below = " below" if top < 6 else ""
    return (
        f'<span class="tag{below}{" shown" if shown else ""}" data-turn="{number}" data-mark="{mark.key}" '
        f'style="--mark:{mark.colour};left:{left:.2f}%;top:{top:.2f}%">{html.escape(mark.piece.phrase)}</span>'
    )


def _data_uri(image: Image.Image, kind: str) -> str:
    encoded = io.BytesIO()
    image.save(encoded, format=kind)
    return f"data:image/{kind.lower()};base64,{base64.b64encode(encoded.getvalue()).decode()}"


def instructions() -> dict[str, str]:
    """The evaluation wording of every task that can be asked about any image, by the task's name.

    Slots such as `{phrase}` stand in it as in the registry.
    """
    return {
        name: task.templates[0]
        for name, task in TASKS.items()
        if task.needs_image and "{question}" not in task.templates[0]
    }


class Page:
    """What the page's controls do. A session belongs to one tab; the model is everyone's, one answer at a time."""

    def __init__(
        self, assistant: Assistant, generation: GenerationConfig, config: WebConfig, segmenter: Segmenter | None = None
    ) -> None:
        self.assistant = assistant
        self.generation = generation
        self.config = config
        self.segmenter = segmenter
        self.geometry = assistant.processor.geometry

    @property
    def sees(self) -> bool:
        """Whether the model has a vision part."""
        return self.assistant.model.mixer is not None

    def show(self, session: Session, data: bytes, name: str) -> str:
        """Talk about this uploaded image from now on. Returns what is wrong with it, "" if nothing.

        Args:
            data: the file as it came.
            name: what the page calls it.
        """
        if not self.sees:
            return "This model reads text alone."
        if len(data) > self.config.max_upload_mb * 1e6:
            return f"{name} is larger than {self.config.max_upload_mb:g} MB."
        try:
            image = decode(data, name, self.config.max_pixels)
        except BadSample as error:
            if error.reason == "image_too_large":
                return f"{name} has too many pixels: at most {self.config.max_pixels:,} are accepted."
            return f"{name}: {_REFUSED.get(error.reason, str(error))}"
        self._take(session, image, name)
        return ""

    def _take(self, session: Session, image: Image.Image, name: str) -> None:
        session.picture = Picture.make(image, name, self.assistant.processor.image_size)
        session.restart()

    def start(self, image: str | None) -> Session:
        """A new session, about an image file if one is given.

        Raises:
            UserError: it cannot be used.
        """
        session = Session()
        if image is not None:
            if not self.sees:
                raise UserError(f"image={image}: this model has no vision part (model.vision=null)")
            self._take(session, open_picture(image), Path(image).name)
        return session

    def begin(self, session: Session, question: str) -> str:
        """Take a question to be answered. Returns why not, "" if it is taken."""
        question = question.strip()
        if session.busy:
            return "An answer is still being written: stop it first."
        if not question:
            return "Write a question first."
        known = [
            slot for slot in _SLOT.findall(question) if any(f"{{{slot}}}" in text for text in instructions().values())
        ]
        if known:
            return f"Replace {{{known[0]}}} by what you mean."
        session.exchanges.append(Exchange(question, growing=True, ticket=session.ticket))
        return ""

    def answer(self, session: Session, max_new_tokens: float, temperature: float, top_p: float) -> Iterator[str]:
        """Let the last question's answer grow in the session. Yields after each step what went wrong, "" if nothing."""
        if not session.busy:
            return
        exchange, number = session.exchanges[-1], len(session.exchanges) - 1
        images = [session.picture.square] if session.picture is not None else []
        problem = ""
        try:
            config = replace(
                self.generation,
                max_new_tokens=int(max_new_tokens),
                temperature=float(temperature),
                top_p=float(top_p),
            )
            steps = self.assistant.stream([Dialog(typed(exchange.question), images, session.history)], config)
            last = 0.0
            # It may have been stopped while it waited for its turn.
            while session.ticket == exchange.ticket and (texts := next(steps, None)) is not None:
                (exchange.answer,) = texts
                if time.monotonic() - last >= _INTERVAL:
                    yield ""
                    last = time.monotonic()
        except UserError as error:
            problem = str(error)
        except Exception as error:  # out of memory, for one: the others' conversations go on
            _log.exception("The answer failed")
            problem = f"The answer failed ({type(error).__name__}): the terminal says where."
        finally:  # also when the tab is closed in the middle
            exchange.growing = False
        if problem:
            session.exchanges = [other for other in session.exchanges if other is not exchange]
        yield problem
        if self.segmenter is None or session.picture is None or problem or session.ticket != exchange.ticket:
            return
        try:
            exchange.masks = self._masks(self.segmenter, session.picture, exchange, number)
            yield ""
        except Exception as error:
            _log.exception("The masks failed")
            yield f"The masks failed ({type(error).__name__}): the terminal says where."

    def _masks(self, segmenter: Segmenter, picture: Picture, exchange: Exchange, number: int) -> dict[str, str]:
        marks = find_marks(self.geometry.pieces(exchange.answer), f"a{number}-")
        boxes = [(mark, to_pixels(box, picture.shown.size)) for mark in marks for box in mark.piece.boxes]
        if not boxes:
            return {}
        overlays: dict[str, Image.Image] = {}
        for (mark, _), mask in zip(boxes, segmenter.segment(picture.shown, [box for _, box in boxes]), strict=True):
            overlay = overlays.setdefault(mark.key, Image.new("RGBA", picture.shown.size))
            overlay.paste(f"{mark.colour}80", (0, 0), Image.fromarray(mask))
        return {key: _data_uri(overlay, "PNG") for key, overlay in overlays.items()}

    def stop(self, session: Session) -> None:
        """End the answer that is growing, as far as it has come."""
        session.ticket += 1

    def fill(self, session: Session, template: str) -> str:
        """An instruction for the question box, its `{box}` replaced by the whole image's."""
        if session.picture is None:
            return template
        width, height = session.picture.size
        return template.replace("{box}", self.geometry.box((0, 0, width, height), session.picture.size))

    def point_out(self, session: Session, question: str, box_px: Any) -> str:
        """The question with a box that was dragged on the picture, in place of the last one in it if there is one.

        Args:
            box_px: as the browser sent it: four pixels of the image are expected, anything else changes nothing.
        """
        if session.picture is None or not isinstance(box_px, list) or len(box_px) != 4:
            return question
        if not all(isinstance(value, int | float) and math.isfinite(value) for value in box_px):
            return question
        width, height = session.picture.size
        x1, x2 = sorted(min(max(value, 0), width) for value in box_px[0::2])
        y1, y2 = sorted(min(max(value, 0), height) for value in box_px[1::2])
        box = self.geometry.box((x1, y1, x2, y2), session.picture.size)
        if "{box}" in question:
            return question.replace("{box}", box)
        named = [piece for piece in self.geometry.pieces(question) if piece.boxes]
        if named:
            before, _, after = question.rpartition(named[-1].numbers)
            return before + box + after
        return f"{question.rstrip()} {box}".lstrip()


def build(page: Page, initial: Session, folder: Path, title: str, question: str = "") -> gr.Blocks:
    """The page. `initial` is what every tab begins with, uploads come through `folder`, `title` names the model."""
    os.environ["GRADIO_TEMP_DIR"] = str(folder)  # gradio's components and its server ask there
    geometry = page.geometry
    room = page.assistant.model.config.decoder.max_positions

    def views(session: Session, problem: str = "") -> tuple[Any, Any, Any]:
        notice = f'<div class="notice" role="alert">{html.escape(problem)}</div>' if problem else ""
        return render_talk(geometry, session), render_picture(geometry, session), notice

    def buttons(busy: bool) -> tuple[Any, Any]:
        return gr.update(visible=not busy), gr.update(visible=busy)

    with gr.Blocks(title="SPHINX-PL", analytics_enabled=False, fill_width=True, delete_cache=(600, 600)) as blocks:
        state = gr.State(initial)
        gr.HTML(f'<header><b>SPHINX-PL</b><span title="checkpoint">{html.escape(title)}</span></header>')
        notice = gr.HTML(elem_id="notice")
        with gr.Row(equal_height=False):
            with gr.Column(scale=5, min_width=360, visible=page.sees):
                picture = gr.HTML(render_picture(geometry, initial), elem_id="picture", js_on_load=_SCRIPT)
                upload = gr.UploadButton("Choose an image", elem_id="upload", file_types=["image"], size="sm")
            with gr.Column(scale=6, min_width=360):
                talk = gr.HTML(render_talk(geometry, initial), elem_id="talk", autoscroll=True)
                with gr.Row(elem_id="tasks", visible=page.sees):
                    tasks = [
                        (gr.Button(_LABELS.get(name, name), size="sm", min_width=40), template)
                        for name, template in instructions().items()
                    ]
                box = gr.Textbox(
                    question,
                    lines=1,
                    max_lines=4,
                    elem_id="question",
                    show_label=False,
                    container=False,
                    autofocus=True,
                    placeholder="Ask a question. Enter sends it.",
                )
                with gr.Row(elem_id="controls"):
                    send = gr.Button("Ask", variant="primary", elem_id="send", min_width=80)
                    halt = gr.Button("Stop", variant="stop", elem_id="stop", min_width=80, visible=False)
                    new = gr.Button("New conversation", elem_id="new", min_width=80)
                with gr.Accordion("Generation", open=False, elem_id="generation"), gr.Row():
                    length = gr.Slider(
                        1, room, min(page.generation.max_new_tokens, room // 2), step=1, label="New tokens"
                    )
                    temperature = gr.Slider(
                        0,
                        max(2.0, page.generation.temperature),
                        page.generation.temperature,
                        label="Temperature",
                    )
                    top_p = gr.Slider(0.01, 1, page.generation.top_p, label="Top p")

        hidden: dict[str, Any] = {"api_visibility": "private", "show_progress": "hidden"}

        def on_upload(session: Session, file: str) -> tuple[Any, ...]:
            path = Path(file).resolve()
            # gradio refuses other paths itself; what is deleted here is worth a second look.
            if folder.resolve() not in path.parents:
                raise gr.Error("This is no upload.")
            try:
                problem = page.show(session, path.read_bytes(), path.name)
            finally:
                path.unlink(missing_ok=True)
            return session, *views(session, problem), gr.update(label="Choose another image", value=None)

        def on_begin(session: Session, asked: str) -> tuple[Any, ...]:
            problem = page.begin(session, asked)
            return session, *views(session, problem), asked if problem else "", *buttons(session.busy)

        def on_answer(session: Session, *settings: float) -> Iterator[tuple[Any, ...]]:
            taken = session.exchanges[-1] if session.busy else None
            drawn = render_picture(geometry, session)  # as on_begin has sent it
            for problem in page.answer(session, *settings):
                texts, places, notices = views(session, problem)
                # The picture is large: sent again only when something new is on it.
                changed = gr.skip() if places == drawn else places
                drawn = places
                again: Any = gr.skip()
                if problem and taken is not None and not any(other is taken for other in session.exchanges):
                    again = taken.question
                yield texts, changed, notices, again, *buttons(session.busy)

        def on_stop(session: Session) -> None:
            page.stop(session)

        def on_new(session: Session) -> tuple[Any, ...]:
            session.restart()
            return session, *views(session), *buttons(False)

        def on_select(session: Session, asked: str, event: gr.EventData) -> str:
            return page.point_out(session, asked, (event._data or {}).get("box"))

        shown = [talk, picture, notice]
        upload.upload(on_upload, [state, upload], [state, *shown, upload], **hidden)
        # Taking the question is not queued: it appears at once, however many wait for the model.
        asked = gr.on(
            [send.click, box.submit], on_begin, [state, box], [state, *shown, box, send, halt], queue=False, **hidden
        )
        asked.then(
            on_answer, [state, length, temperature, top_p], [*shown, box, send, halt],
            concurrency_limit=1, concurrency_id="model", **hidden,
        )  # fmt: skip
        halt.click(on_stop, state, None, queue=False, **hidden)
        new.click(on_new, state, [state, *shown, send, halt], queue=False, **hidden)
        picture.select(on_select, [state, box], box, queue=False, **hidden)
        for button, template in tasks:
            button.click(
                functools.partial(page.fill, template=template), state, box, queue=False, **hidden
            ).then(None, js=_SELECT_SLOT)  # fmt: skip
    return blocks


def serve(page: Page, initial: Session, title: str, question: str = "") -> None:
    """Serve the page until the process is interrupted. Its working files are in a folder that is removed then.

    Raises:
        UserError: the address cannot be used.
    """
    check_address(page.config.host, page.config.port)
    with tempfile.TemporaryDirectory(prefix="sphinx-pl-web-") as folder:
        blocks = launch(page, build(page, initial, Path(folder), title, question))
        print(f"http://{page.config.host}:{page.config.port}", flush=True)
        if page.config.host not in ("127.0.0.1", "localhost", "::1"):
            print("It asks for no password: whoever can reach this address can use it.", flush=True)
        signal.signal(signal.SIGTERM, _leave)  # so that a kill removes the folder too
        try:
            blocks.block_thread()
        finally:
            blocks.close(verbose=False)


def _leave(number: int, frame: object) -> NoReturn:
    raise SystemExit(0)


def launch(page: Page, blocks: gr.Blocks) -> gr.Blocks:
    """Start serving in a thread. No file can be fetched but gradio's own and uploads.

    Raises:
        UserError: the address cannot be used.
    """
    logging.getLogger("httpx").setLevel(logging.WARNING)  # gradio asks its own server whether it is up
    blocks.queue(default_concurrency_limit=4, max_size=50)
    try:
        blocks.launch(
            server_name=page.config.host,
            server_port=page.config.port,
            max_file_size=int(page.config.max_upload_mb * 1e6),
            allowed_paths=[],
            share=False,
            inbrowser=False,
            quiet=True,
            prevent_thread_lock=True,
            ssr_mode=False,
            mcp_server=False,
            pwa=False,
            run_history=False,
            enable_monitoring=False,
            footer_links=[],
            state_session_capacity=_SESSIONS,
            theme=gr.themes.Base(
                primary_hue="blue",
                neutral_hue="slate",
                radius_size="md",
                # Fonts of the system: the theme's own come from the network.
                font=["system-ui", "sans-serif"],
                font_mono=["ui-monospace", "monospace"],
            ),
            css=_STYLE,
        )
    except OSError as error:
        raise UserError(f"port={page.config.port} of host={page.config.host} cannot be used ({error})") from None
    return blocks
