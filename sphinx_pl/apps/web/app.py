"""The page in gradio: its layout, its events and its server."""

from __future__ import annotations

import functools
import logging
import os
import signal
import socket
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NoReturn

from markupsafe import Markup

from sphinx_pl.apps.web.page import Page, instructions
from sphinx_pl.apps.web.rendering import render_picture, render_talk
from sphinx_pl.apps.web.session import Session
from sphinx_pl.utils.errors import UserError

# gradio and the programs that it starts read this when gradio is imported.
os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"
try:
    import gradio as gr
except ModuleNotFoundError as error:
    raise UserError(f"ui=web needs {error.name}, which is not installed: pip install 'sphinx-pl[web]'") from error

_SCRIPT = Path(__file__).with_name("web.js").read_text(encoding="utf-8")
_STYLE = Path(__file__).with_name("web.css").read_text(encoding="utf-8")
# The slot is selected, so that typing replaces it.
_SELECT_SLOT = """() => setTimeout(() => {
  const area = document.querySelector('#question textarea');
  const slot = area.value.match(/\\{\\w+\\}/);
  area.focus();
  if (slot) area.setSelectionRange(slot.index, slot.index + slot[0].length);
}, 50)"""
_SESSIONS = 100  # The server forgets the sessions that were unused longest.
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


def check_address(host: str, port: int) -> None:
    """Check that the page can be served at this address, before a model is loaded.

    Raises:
        UserError: the port is used or not allowed, or the host is not this machine.
    """
    try:
        [(family, kind, _, _, address), *_] = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
        with socket.socket(family, kind) as probe:
            # a port that was just closed is free
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind(address)
    except OSError as error:
        raise UserError(f"port={port} of host={host} cannot be used ({error.strerror}): give another") from None


def build(page: Page, initial: Session, folder: Path, title: str, question: str = "") -> gr.Blocks:
    """Return the page.

    Args:
        initial: the session that every tab begins with.
        folder: the folder that uploads come through.
        title: the name of the model.
        question: the text of the question box.
    """
    os.environ["GRADIO_TEMP_DIR"] = str(folder)  # gradio's components and server use it
    coordinates = page.coordinates
    room = page.assistant.model.config.decoder.max_positions

    def views(session: Session, problem: str = "") -> tuple[Any, Any, Any]:
        notice = Markup('<div class="notice" role="alert">{}</div>').format(problem) if problem else ""
        return render_talk(coordinates, session), render_picture(coordinates, session), notice

    def buttons(busy: bool) -> tuple[Any, Any]:
        return gr.update(visible=not busy), gr.update(visible=busy)

    with gr.Blocks(title="SPHINX-PL", analytics_enabled=False, fill_width=True, delete_cache=(600, 600)) as blocks:
        state = gr.State(initial)
        gr.HTML(Markup('<header><b>SPHINX-PL</b><span title="checkpoint">{}</span></header>').format(title))
        notice = gr.HTML(elem_id="notice")
        with gr.Row(equal_height=False):
            with gr.Column(scale=5, min_width=360, visible=page.sees):
                picture = gr.HTML(render_picture(coordinates, initial), elem_id="picture", js_on_load=_SCRIPT)
                upload = gr.UploadButton("Choose an image", elem_id="upload", file_types=["image"], size="sm")
            with gr.Column(scale=6, min_width=360):
                talk = gr.HTML(render_talk(coordinates, initial), elem_id="talk", autoscroll=True)
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
            # gradio refuses other paths itself. This file is deleted below, so its path is checked
            # again.
            if folder.resolve() not in path.parents:
                raise gr.Error("This is not an upload.")
            try:
                problem = page.show(session, path.read_bytes(), path.name)
            finally:
                path.unlink(missing_ok=True)
            return session, *views(session, problem), gr.update(label="Choose another image", value=None)

        def on_begin(session: Session, text: str) -> tuple[Any, ...]:
            problem = page.begin(session, text)
            return session, *views(session, problem), text if problem else "", *buttons(session.busy)

        def on_answer(session: Session, *settings: float) -> Iterator[tuple[Any, ...]]:
            exchange = session.exchanges[-1] if session.busy else None
            picture = render_picture(coordinates, session)  # as on_begin sent it
            for problem in page.answer(session, *settings):
                texts, places, notices = views(session, problem)
                # The picture is large, so it is sent only if it changed.
                update = gr.skip() if places == picture else places
                picture = places
                question: Any = gr.skip()
                if problem and exchange is not None and not any(other is exchange for other in session.exchanges):
                    question = exchange.question
                yield texts, update, notices, question, *buttons(session.busy)

        def on_stop(session: Session) -> None:
            page.stop(session)

        def on_new(session: Session) -> tuple[Any, ...]:
            session.restart()
            return session, *views(session), *buttons(False)

        def on_select(session: Session, text: str, event: gr.EventData) -> str:
            return page.point_out(session, text, (event._data or {}).get("box"))

        outputs = [talk, picture, notice]
        upload.upload(on_upload, [state, upload], [state, *outputs, upload], **hidden)
        # Accepting the question is not queued. It appears at once, however many users wait for the
        # model.
        accepted = gr.on(
            [send.click, box.submit], on_begin, [state, box], [state, *outputs, box, send, halt], queue=False, **hidden
        )
        accepted.then(
            on_answer, [state, length, temperature, top_p], [*outputs, box, send, halt],
            concurrency_limit=1, concurrency_id="model", **hidden,
        )  # fmt: skip
        halt.click(on_stop, state, None, queue=False, **hidden)
        new.click(on_new, state, [state, *outputs, send, halt], queue=False, **hidden)
        picture.select(on_select, [state, box], box, queue=False, **hidden)
        for button, template in tasks:
            button.click(
                functools.partial(page.fill, template=template), state, box, queue=False, **hidden
            ).then(None, js=_SELECT_SLOT)  # fmt: skip
    return blocks


def serve(page: Page, initial: Session, title: str, question: str = "") -> None:
    """Serve the page until the process is interrupted. Its working files are in a temporary folder.

    Raises:
        UserError: the address cannot be used.
    """
    check_address(page.config.host, page.config.port)
    with tempfile.TemporaryDirectory(prefix="sphinx-pl-web-") as folder:
        blocks = launch(page, build(page, initial, Path(folder), title, question))
        print(f"http://{page.config.host}:{page.config.port}", flush=True)
        if page.config.host not in ("127.0.0.1", "localhost", "::1"):
            print("The page asks for no password: everyone who can reach this address can use it.", flush=True)
        signal.signal(signal.SIGTERM, _leave)  # so that a kill removes the folder too
        try:
            blocks.block_thread()
        finally:
            blocks.close(verbose=False)


def _leave(number: int, frame: object) -> NoReturn:
    raise SystemExit(0)


def launch(page: Page, blocks: gr.Blocks) -> gr.Blocks:
    """Start serving in a thread. Only gradio's own files and uploads can be fetched.

    Raises:
        UserError: the address cannot be used.
    """
    logging.getLogger("httpx").setLevel(logging.WARNING)  # gradio polls its own server
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
                # The theme's own fonts would come from the network.
                font=["system-ui", "sans-serif"],
                font_mono=["ui-monospace", "monospace"],
            ),
            css=_STYLE,
        )
    except OSError as error:
        raise UserError(f"port={page.config.port} of host={page.config.host} cannot be used ({error})") from None
    return blocks
