from __future__ import annotations

import errno
import fcntl
import json
import os
import threading
import time
from collections.abc import Callable, Generator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from torch import Tensor

from sphinx_pl.checkpoints import tensors as checkpoint_tensors
from sphinx_pl.checkpoints import writer
from sphinx_pl.checkpoints.folder import INDEX
from sphinx_pl.checkpoints.output import (
    Entry,
    OutputFile,
    OutputFolder,
    SafetensorsOutput,
    TorchOutput,
    copies,
    safetensors_folder,
)
from sphinx_pl.checkpoints.tensors import TensorDict, TensorInfo, TensorReader, same_bits
from sphinx_pl.checkpoints.writer import CheckpointWriter
from sphinx_pl.utils.errors import UserError

TENSORS = {
    "a": torch.arange(12.0).view(3, 4),
    "b": torch.arange(5).to(torch.bfloat16),
    "c": torch.tensor(7.5, dtype=torch.float64),
    "d": torch.empty(0, 3),
    "e": torch.tensor([True, False]),
}


def entries(names: str = "abcde") -> dict[str, Entry]:
    return {name: Entry(TensorInfo(tuple(TENSORS[name].shape), TENSORS[name].dtype), name) for name in names}


class Recorded(TensorDict):
    """`TENSORS`, with a note of which were asked for; raises at the name `fails`."""

    def __init__(self, fails: str = "", error: BaseException | None = None) -> None:
        super().__init__(TENSORS)
        self.asked: list[str] = []
        self.fails, self.error = fails, error

    def stretches(self, key: str, dtype: torch.dtype) -> Generator[Tensor, None, None]:
        self.asked.append(key)
        if key == self.fails:
            assert self.error is not None
            raise self.error
        return super().stretches(key, dtype)


def write(out: Path, files: OutputFolder, reader: TensorReader | None = None, **options: Any) -> None:
    """Options are the writer's, and `finish`."""
    finish = options.pop("finish", lambda folder, facts: None)
    CheckpointWriter(out, files, **options).write(reader or TensorDict(TENSORS), "fact of {}".format, finish)


def read(file: Path) -> dict[str, Tensor]:
    if file.suffix == ".pth":
        content: Any = torch.load(file, weights_only=True)
        return dict(content.get("model", content))
    with safe_open(str(file), "pt") as opened:
        return {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118


def two_files() -> OutputFolder:
    return OutputFolder(
        [SafetensorsOutput("one.safetensors", entries("ab")), SafetensorsOutput("two.safetensors", entries("cde"))]
    )


@pytest.mark.parametrize("workers", [1, 4])
def test_files_hold_their_tensors(tmp_path: Path, workers: int) -> None:
    files = [
        SafetensorsOutput("one.safetensors", entries("ab")),
        TorchOutput("two.pth", entries("cde"), wrap="model"),
        TorchOutput("three.pth", entries()),
    ]
    write(tmp_path / "out", OutputFolder([*files]), TensorDict(TENSORS), workers=workers)
    for file in files:
        result = read(tmp_path / "out" / file.name)
        assert {name: same_bits(tensor, TENSORS[name]) for name, tensor in result.items()} == dict.fromkeys(
            file.entries, True
        )
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["one.safetensors", "three.pth", "two.pth"]


def test_entries_are_cast_and_made(tmp_path: Path) -> None:
    made = {
        "halved": Entry(TensorInfo((4, 3), torch.float16), "a", lambda whole: whole.T, (3, 4)),
        "new": Entry(TensorInfo((2,), torch.float32), None, lambda: torch.tensor([1.0, 2.0])),
        "cast": Entry(TensorInfo((3, 4), torch.bfloat16), "a"),
    }
    write(tmp_path / "out", OutputFolder([SafetensorsOutput("x.safetensors", made)]), TensorDict(TENSORS))
    result = read(tmp_path / "out" / "x.safetensors")
    assert same_bits(result["halved"], TENSORS["a"].T.half().contiguous())
    assert result["new"].tolist() == [1, 2]
    assert same_bits(result["cast"], TENSORS["a"].bfloat16())


def test_shards_have_an_index(tmp_path: Path) -> None:
    events: list[str] = []
    layout = safetensors_folder(entries("ab"), lambda folder: events.append(folder.name), max_bytes=48)
    write(tmp_path / "out", layout, TensorDict(TENSORS))
    index = json.loads((tmp_path / "out" / INDEX).read_text())
    assert index["weight_map"] == {"a": "model-00001-of-00002.safetensors", "b": "model-00002-of-00002.safetensors"}
    assert index["metadata"]["total_size"] == 58
    assert events == [".out.tmp"]


@pytest.mark.parametrize("error", [KeyboardInterrupt(), OSError(28, "No space left on device")])
def test_complete_files_are_taken_over(tmp_path: Path, error: BaseException) -> None:
    """After Ctrl-C and a full disk, as after a kill: nothing stands under the final name, and a rerun continues."""
    failing = Recorded("d", error)
    with pytest.raises((KeyboardInterrupt, UserError)):
        write(tmp_path / "out", two_files(), failing, fingerprint={"x": 1})
    assert not (tmp_path / "out").exists()
    repeat, facts = Recorded(), {}
    write(
        tmp_path / "out", two_files(), repeat, fingerprint={"x": 1}, finish=lambda folder, result: facts.update(result)
    )
    assert sorted(repeat.asked) == ["c", "d", "e"]
    assert facts == {name: f"fact of {name}" for name in "abcde"}
    assert all(same_bits(tensor, TENSORS[name]) for name, tensor in read(tmp_path / "out" / "one.safetensors").items())
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out"]


@pytest.mark.parametrize("error", [KeyboardInterrupt(), OSError(28, "No space left on device"), OSError(5, "Broken")])
def test_without_a_fingerprint_nothing_is_kept(tmp_path: Path, error: BaseException) -> None:
    with pytest.raises((KeyboardInterrupt, UserError)) as failure:
        write(tmp_path / "out", two_files(), Recorded("d", error))
    assert "continues" not in str(failure.value)
    assert list(tmp_path.iterdir()) == []


def test_whole_tensors_of_several_threads_have_a_bound(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two that are larger than it together are not in memory at once; smaller ones are."""
    monkeypatch.setattr(checkpoint_tensors, "AHEAD_BYTES", 4000)
    held = most = 0
    lock = threading.Lock()

    class Watched(TensorDict):
        def stretches(self, key: str, dtype: torch.dtype) -> Generator[Tensor, None, None]:
            nonlocal held, most
            for stretch in super().stretches(key, dtype):
                with lock:
                    held += stretch.nbytes
                    most = max(most, held)
                time.sleep(0.01)
                yield stretch
                with lock:
                    held -= stretch.nbytes

    tensors = Watched({f"t{i}": torch.zeros(size) for i, size in enumerate([300, 2000, 500, 300, 1500, 300, 400])})
    file = SafetensorsOutput("x.safetensors", copies(tensors))
    write(tmp_path / "out", OutputFolder([file]), tensors, workers=4)
    assert most == 8000


def test_a_file_system_without_locks_is_written_to(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def flock(descriptor: int, operation: int) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", flock)
    write(tmp_path / "out", two_files())
    assert read(tmp_path / "out" / "one.safetensors").keys() == set("ab")


def test_a_disk_without_room_for_the_next_file_keeps_what_was_begun(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    create = SafetensorsOutput.create

    def full(self: SafetensorsOutput, path: Path) -> dict[str, int]:
        if self.name == "two.safetensors":
            raise OSError(28, "No space left on device")
        return create(self, path)

    monkeypatch.setattr(SafetensorsOutput, "create", full)
    with pytest.raises(UserError, match="disk"):
        write(tmp_path / "out", two_files(), Recorded(), fingerprint={"x": 1})
    monkeypatch.setattr(SafetensorsOutput, "create", create)
    repeat = Recorded()
    write(tmp_path / "out", two_files(), repeat, fingerprint={"x": 1})
    assert sorted(repeat.asked) == ["c", "d", "e"]


def test_what_the_disk_does_not_take_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An error when pages are written back is told once, to whoever asks first."""

    def failing(descriptor: int) -> None:
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(os, "fdatasync", failing)
    with pytest.raises(UserError, match=r"out' is not finished \(.*Input/output error"):
        write(tmp_path / "out", two_files(), Recorded(), fingerprint={"x": 1})
    assert not (tmp_path / "out").exists()
    assert not (tmp_path / ".out.tmp" / "one.safetensors").exists()
    monkeypatch.undo()
    write(tmp_path / "out", two_files(), Recorded(), fingerprint={"x": 1})
    assert read(tmp_path / "out" / "two.safetensors").keys() == set("cde")


@pytest.mark.parametrize("error", [KeyboardInterrupt(), RuntimeError("can't start new thread")])
@pytest.mark.parametrize("moment", range(8))
def test_an_interruption_between_two_tensors_ends_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: BaseException, moment: int
) -> None:
    """Tensors and flushing are handed to other threads, one after the other: none is waited for in vain."""
    count = 0

    class Interrupted(ThreadPoolExecutor):
        def submit(self, *args: Any, **kwargs: Any) -> Future[Any]:
            nonlocal count
            count += 1
            if count > moment:
                raise error
            return super().submit(*args, **kwargs)

    monkeypatch.setattr(writer, "ThreadPoolExecutor", Interrupted)
    with pytest.raises(type(error)):
        write(tmp_path / "out", two_files(), Recorded(), fingerprint={"x": 1})
    monkeypatch.undo()
    write(tmp_path / "out", two_files(), Recorded(), fingerprint={"x": 1})
    assert read(tmp_path / "out" / "one.safetensors").keys() == set("ab")


def test_the_next_file_is_begun_while_one_thread_ends_the_last_tensor_of_a_file(tmp_path: Path) -> None:
    begun = threading.Event()
    waited: list[bool] = []

    class Slow(Recorded):
        def stretches(self, key: str, dtype: torch.dtype) -> Generator[Tensor, None, None]:
            if key in "ab":
                waited.append(begun.wait(20) if key == "b" else True)
            else:
                begun.set()
            return super().stretches(key, dtype)

    write(tmp_path / "out", two_files(), Slow(), workers=2)
    assert waited == [True, True]


def test_files_of_few_large_tensors_come_first(tmp_path: Path) -> None:
    """At the end no thread is left with a large one."""
    recorded = Recorded()
    files: list[OutputFile] = [SafetensorsOutput("small", entries("bce")), SafetensorsOutput("large", entries("a"))]
    write(tmp_path / "out", OutputFolder(files), recorded)
    assert recorded.asked == ["a", "b", "c", "e"]


@pytest.mark.parametrize("fingerprint", [{"x": 2}, None])
def test_files_of_another_run_are_not(tmp_path: Path, fingerprint: Any) -> None:
    with pytest.raises(KeyboardInterrupt):
        write(tmp_path / "out", two_files(), Recorded("d", KeyboardInterrupt()), fingerprint={"x": 1})
    repeat = Recorded()
    write(tmp_path / "out", two_files(), repeat, fingerprint=fingerprint)
    assert sorted(repeat.asked) == ["a", "b", "c", "d", "e"]


def test_an_error_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="NaN"):
        write(tmp_path / "out", two_files(), Recorded("c", UserError("NaN")), fingerprint={"x": 1})
    assert list(tmp_path.iterdir()) == []


def test_what_is_there_is_replaced_only_at_the_end(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "old").touch()
    with pytest.raises(UserError):
        write(tmp_path / "out", two_files(), Recorded("c", UserError("no")), overwrite=True)
    with pytest.raises(UserError, match="exists"):
        write(tmp_path / "out", two_files(), Recorded())
    assert (tmp_path / "out" / "old").exists()
    write(tmp_path / "out", two_files(), Recorded(), overwrite=True)
    assert not (tmp_path / "out" / "old").exists()


def test_who_comes_when_the_other_is_done_finds_what_it_made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Between the folder's opening and its lock, the process that had it finishes."""
    real, met = fcntl.flock, list[int]()

    def flock(descriptor: int, operation: int) -> None:
        if not met:
            met.append(descriptor)
            (tmp_path / ".out.tmp").rename(tmp_path / "out")
        real(descriptor, operation)

    monkeypatch.setattr(fcntl, "flock", flock)
    with pytest.raises(UserError, match="exists"):
        write(tmp_path / "out", two_files(), Recorded())
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_a_file_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    def finish(folder: Path) -> None:
        raise PermissionError(13, "Permission denied", str(tmp_path / "secret.json"))

    with pytest.raises(UserError, match=r"secret.json' cannot be read \(Permission denied\): repair it"):
        write(tmp_path / "out", OutputFolder(two_files().files, finish), Recorded())


def test_a_disk_that_is_too_small_is_said_before_anything_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Usage:
        free = 10

    monkeypatch.setattr("shutil.disk_usage", lambda path: Usage)
    values = Recorded()
    with pytest.raises(UserError, match="free some space"):
        write(tmp_path / "out", two_files(), values)
    assert values.asked == []
    assert list(tmp_path.iterdir()) == []


def test_one_process_at_a_time_writes_a_folder(tmp_path: Path) -> None:
    inside, go_on = threading.Event(), threading.Event()

    class Waiting(Recorded):
        def stretches(self, key: str, dtype: torch.dtype) -> Generator[Tensor, None, None]:
            inside.set()
            go_on.wait(30)
            return super().stretches(key, dtype)

    first = threading.Thread(target=write, args=(tmp_path / "out", two_files(), Waiting()))
    first.start()
    inside.wait(30)
    with pytest.raises(UserError, match="another process is writing"):
        write(tmp_path / "out", two_files(), Recorded())
    go_on.set()
    first.join()
    assert len(read(tmp_path / "out" / "two.safetensors")) == 3


def test_progress_is_told_every_byte(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[int] = []

    class Bar:
        def __enter__(self) -> Callable[[int], None]:
            return told.append

        def __exit__(self, *error: object) -> None: ...

    monkeypatch.setattr(writer, "progress_bar", lambda *arguments: Bar())
    write(tmp_path / "out", two_files(), Recorded())
    assert sum(told) == two_files().nbytes
