"""Training checkpoints: pieces of any number of ranks, read in any stretch; damage is answered in one line."""

from __future__ import annotations

import itertools
import json
import os
import pickle
import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from sphinx_pl.checkpoints import training
from sphinx_pl.checkpoints.format import open_checkpoint
from sphinx_pl.checkpoints.tensors import Read, SafetensorsFile, same_bits
from sphinx_pl.checkpoints.training import (
    INDEX,
    STATE,
    WEIGHT,
    TensorShard,
    TrainingCheckpoint,
    TrainingShards,
    describe,
    file_name,
    write_rest,
    write_shards,
)
from sphinx_pl.utils.errors import UserError
from sphinx_pl.utils.files import hash_file
from tests.checkpoints.conftest import PROCESSOR, random_tensors, small_config
from tests.fuzzing import damaged

STATES = {"step": 3, "random": [1, 2.5, None, "x"], "tensor": torch.arange(3)}


def only_line(error: pytest.ExceptionInfo[UserError]) -> str:
    text = str(error.value)
    assert "\n" not in text
    return text


def cuts(numel: int, ranks: int, rng: random.Random | None) -> list[tuple[int, int]]:
    """Where each rank's piece begins and ends: equal ones, or of any size, nothing too."""
    if rng is None:
        size = -(-numel // ranks)
        return [(min(rank * size, numel), min((rank + 1) * size, numel)) for rank in range(ranks)]
    edges = [0, *sorted(rng.randint(0, numel) for _ in range(ranks - 1)), numel]
    return list(itertools.pairwise(edges))


def write(folder: Path, tensors: dict[str, Tensor], ranks: int = 2, rng: random.Random | None = None) -> Path:
    """A whole training checkpoint; each floating tensor has a state of another dtype."""
    folder.mkdir()
    of_rank: list[list[TensorShard]] = [[] for _ in range(ranks)]
    for name, tensor in tensors.items():
        kinds = {WEIGHT: tensor} | ({"exp_avg": state_of(tensor)} if tensor.is_floating_point() else {})
        for rank, (start, stop) in enumerate(cuts(tensor.numel(), ranks, rng)):
            if stop > start or rng is not None:  # engines leave empty pieces out, but they may be there
                of_rank[rank] += [
                    TensorShard(kind, name, start, value.flatten()[start:stop]) for kind, value in kinds.items()
                ]
    for rank, pieces in enumerate(of_rank):
        write_shards(folder, rank, ranks, pieces)
    write_rest(folder, ranks, {name: tensor.shape for name, tensor in tensors.items()}, STATES)
    (folder.parent / "tokenizer").write_bytes(b"pieces")
    describe(folder, small_config().to_dict(), PROCESSOR, folder.parent / "tokenizer", {"stage": "test"})
    return folder


def state_of(tensor: Tensor) -> Tensor:
    return (tensor.double() * 2).to(torch.float64 if tensor.dtype == torch.float32 else torch.float32)


# --- reading what was written


@pytest.mark.parametrize("uneven", [False, True])
@pytest.mark.parametrize("ranks", [1, 2, 3, 8])
def test_any_stretch_is_read_back_whatever_the_ranks(ranks: int, uneven: bool, tmp_path: Path) -> None:
    rng = random.Random(ranks)
    tensors = random_tensors(0)  # float32, bf16, half, int64, and one without dimensions
    tensors["decoder.a"][0, :3] = torch.tensor([-0.0, float("nan"), 1e-45])
    pieces = TrainingShards(write(tmp_path / "c", tensors, ranks, rng if uneven else None))
    assert pieces.kinds() == ["exp_avg"]
    for name, tensor in tensors.items():
        assert pieces.dtype(name) == tensor.dtype
        assert pieces.has(name, "exp_avg") == tensor.is_floating_point()
        kinds = [WEIGHT, "exp_avg"] if tensor.is_floating_point() else [WEIGHT]
        for kind in kinds:
            whole = (tensor if kind == WEIGHT else state_of(tensor)).flatten()
            assert same_bits(pieces.read(name, kind=kind), whole), name
            for _ in range(30):
                start, stop = sorted(rng.randint(0, tensor.numel()) for _ in range(2))
                assert same_bits(pieces.read(name, start, stop, kind), whole[start:stop]), (name, start, stop)
    state = pieces.state()
    assert torch.equal(state.pop("tensor"), torch.arange(3))
    assert state == {key: value for key, value in STATES.items() if key != "tensor"}


def test_it_is_a_checkpoint_like_any_other(tmp_path: Path) -> None:
    tensors = random_tensors(1)
    checkpoint = open_checkpoint(write(tmp_path / "c", tensors, 3))
    assert isinstance(checkpoint, TrainingCheckpoint)
    assert set(checkpoint) == set(tensors)
    for name, tensor in tensors.items():
        assert same_bits(checkpoint.tensor(name), tensor)
        assert checkpoint.info(name).shape == tuple(tensor.shape)
        assert checkpoint.info(name).dtype == tensor.dtype
    assert checkpoint.model_config == small_config()
    assert checkpoint.processor == PROCESSOR
    assert checkpoint.provenance == {"stage": "test"}
    assert {file.name for file in checkpoint.files()} >= {INDEX, STATE, file_name(2, 3)}
    other = open_checkpoint(write(tmp_path / "d", random_tensors(2), 3))
    assert checkpoint.identity()["sha256"] != other.identity()["sha256"]


@pytest.fixture
def opened(monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[str, int]]:
    """File -> elements that were read from it."""
    values: dict[str, int] = {}

    class Counting(SafetensorsFile):
        def __init__(self, path: Path) -> None:
            super().__init__(path)
            values[path.name] = 0

        @contextmanager
        def open(self, name: str) -> Iterator[Read]:
            def counted(out: Tensor, start: int) -> None:
                values[self.path.name] += len(out)
                read(out, start)

            with super().open(name) as read:
                yield counted

        def tensor(self, name: str) -> Tensor:
            raise AssertionError("more than a stretch was read")

    monkeypatch.setattr(training, "SafetensorsFile", Counting)
    return values


def test_a_rank_that_goes_on_opens_its_own_file_only(opened: dict[str, int], tmp_path: Path) -> None:
    tensors = {"a": torch.randn(40, 25), "b": torch.randn(801)}
    folder = write(tmp_path / "c", tensors, 4)
    for rank in range(4):
        opened.clear()
        pieces = TrainingShards(folder)
        for name, tensor in tensors.items():
            start, stop = cuts(tensor.numel(), 4, None)[rank]
            for kind in (WEIGHT, "exp_avg"):
                pieces.read(name, start, stop, kind)
        assert list(opened) == [file_name(rank, 4)]
    opened.clear()
    TrainingShards(folder).read("a", 240, 260)  # the end of one piece and the beginning of the next
    assert opened == {file_name(0, 4): 10, file_name(1, 4): 10}


def test_of_what_all_ranks_hold_one_piece_is_enough(opened: dict[str, int], tmp_path: Path) -> None:
    """FSDP2's frozen parts: the first rank writes them, and all read them from there."""
    folder = tmp_path / "c"
    folder.mkdir()
    frozen, rows = torch.randn(50), torch.randn(60)
    write_shards(folder, 0, 2, [TensorShard(WEIGHT, "frozen", 0, frozen), TensorShard(WEIGHT, "rows", 0, rows[:30])])
    write_shards(folder, 1, 2, [TensorShard(WEIGHT, "rows", 30, rows[30:])])
    write_rest(folder, 2, {"frozen": [50], "rows": [60]}, {})
    pieces = TrainingShards(folder)
    assert torch.equal(pieces.read("frozen"), frozen)
    assert list(opened) == [file_name(0, 2)]
    assert torch.equal(pieces.read("rows"), rows)


# --- damage


def edit(folder: Path, **values: Any) -> None:
    path = folder / INDEX
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def edit_files(folder: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    files = json.loads((folder / INDEX).read_text())["files"]
    change(files)
    edit(folder, files=files)


def rewrite(folder: Path, rank: int, *pieces: TensorShard) -> None:
    """One rank's file anew, with its size in the index."""
    write_shards(folder, rank, 2, pieces)
    name = file_name(rank, 2)
    edit_files(folder, lambda files: files.update({name: (folder / name).stat().st_size}))


def use(folder: Path) -> dict[str, Tensor]:
    """All that resuming and loading read."""
    checkpoint = TrainingCheckpoint(folder)
    pieces = checkpoint.shards
    values = {name: checkpoint.tensor(name).clone() for name in checkpoint}
    for kind in pieces.kinds():
        values |= {f"{kind} {name}": pieces.read(name, kind=kind) for name in checkpoint if pieces.has(name, kind)}
    pieces.state()
    checkpoint.model_config  # noqa: B018 - validated when it is asked for
    return values


SECOND = file_name(1, 2)
DAMAGE: dict[str, tuple[Callable[[Path], object], list[str]]] = {
    "a rank's file is missing": (lambda p: (p / SECOND).unlink(), [SECOND, "is missing"]),
    "state.pt is missing": (lambda p: (p / STATE).unlink(), [STATE, "is missing"]),
    "the index is missing": (lambda p: (p / INDEX).unlink(), [INDEX, "is missing"]),
    "no tokenizer": (lambda p: (p / "tokenizer.model").unlink(), ["tokenizer.model", "is missing"]),
    "no provenance": (lambda p: (p / "provenance.json").unlink(), ["provenance.json", "is missing"]),
    "a file is cut": (
        lambda p: (p / SECOND).write_bytes((p / SECOND).read_bytes()[:-10]),
        [SECOND, "bytes instead of"],
    ),
    "a file has grown": (lambda p: (p / STATE).open("ab").write(b"x"), [STATE, "bytes instead of"]),
    "another size": (lambda p: edit_files(p, lambda f: f.update({SECOND: 7})), [SECOND, "instead of 7"]),
    "a size that is none": (lambda p: edit_files(p, lambda f: f.update({SECOND: "7"})), [INDEX, "damaged"]),
    "an endless size": (lambda p: edit_files(p, lambda f: f.update({SECOND: float("inf")})), [INDEX, "damaged"]),
    "a file elsewhere": (lambda p: edit_files(p, lambda f: f.update({"../tokenizer": 6})), [INDEX, "../tokenizer"]),
    "an absolute path": (lambda p: edit_files(p, lambda f: f.update({"/etc/passwd": 6})), [INDEX, "/etc/passwd"]),
    "a path with a zero": (lambda p: edit_files(p, lambda f: f.update({"a\0b": 6})), [INDEX, "damaged"]),
    "a file of no rank": (lambda p: edit_files(p, lambda f: f.update({file_name(2, 2): 6})), [INDEX, "damaged"]),
    "a rank's file left out": (lambda p: edit_files(p, lambda f: f.pop(SECOND)), [str, "lacks a part of weight"]),
    "no files": (lambda p: edit(p, files={}), [INDEX, "damaged"]),
    "a list of files": (lambda p: edit(p, files=[STATE]), [INDEX, "damaged"]),
    "more ranks": (lambda p: edit(p, ranks=10**9), [INDEX, "damaged"]),
    "no ranks": (lambda p: edit(p, ranks=None), [INDEX, "damaged"]),
    "a newer format": (lambda p: edit(p, format=7), [INDEX, "format 7", "reads 1", "stage.init_from"]),
    "no model": (lambda p: edit(p, model=None), [INDEX, "'model'"]),
    "an interpolation": (lambda p: edit(p, model={"name": "${oc.env:HOME}"}), [INDEX, "interpolation"]),
    "no shapes": (lambda p: edit(p, shapes=3), [INDEX, "damaged"]),
    "a shape that is none": (lambda p: edit(p, shapes={"decoder.a": "57"}), [INDEX, "damaged"]),
    "a negative shape": (lambda p: edit(p, shapes={"decoder.a": [-5, 7]}), [INDEX, "damaged"]),
    "an endless shape": (lambda p: edit(p, shapes={"decoder.a": [10**40]}), [INDEX, "damaged"]),
    "a huge shape": (lambda p: edit(p, shapes={"decoder.a": [2**30, 2**30]}), [INDEX, "damaged"]),
    "a large shape": (lambda p: edit(p, shapes={"decoder.a": [2**29, 2**29]}), ["damaged"]),
    "a smaller shape": (lambda p: edit(p, shapes={"decoder.a": [5, 6]}), ["damaged"]),
    "no JSON": (lambda p: (p / INDEX).write_text("{"), [INDEX, "cannot be read"]),
    "deep JSON": (lambda p: (p / INDEX).write_text("[" * 100_000), [INDEX, "cannot be read"]),
    "no safetensors": (
        lambda p: (p / SECOND).write_bytes(b"\xff" * (p / SECOND).stat().st_size),
        [SECOND, "damaged"],
    ),
    "another state.pt": (
        lambda p: (p / STATE).write_bytes(bytes((p / STATE).stat().st_size)),
        [STATE, "damaged", "SHA-256"],
    ),
    "a missing piece": (lambda p: rewrite(p, 1), ["lacks a part of weight of"]),
    "an overlap": (lambda p: rewrite(p, 1, *halves(1, back=1)), [SECOND, "two files"]),
    "a gap": (lambda p: rewrite(p, 1, *halves(1, back=-1)), ["lacks a part of weight of"]),
    "another dtype": (lambda p: rewrite(p, 1, *halves(1, dtype=torch.int32)), [SECOND, "torch.int32"]),
    "a piece of nothing": (
        lambda p: rewrite(p, 1, *halves(1), TensorShard(WEIGHT, "?", 0, torch.ones(1))),
        [SECOND, "?"],
    ),
    "a piece with two dimensions": (
        lambda p: rewrite(p, 1, TensorShard(WEIGHT, "decoder.a", 18, torch.ones(17, 1))),
        [SECOND, "damaged"],
    ),
}


def halves(rank: int, back: int = 0, dtype: torch.dtype | None = None) -> Iterator[TensorShard]:
    """A rank's half of all tensors, beginning so many elements earlier."""
    for name, tensor in random_tensors(0).items():
        start, stop = cuts(tensor.numel(), 2, None)[rank]
        start = min(max(start - back, 0), stop)
        values = tensor.flatten()[start:stop]
        yield TensorShard(WEIGHT, name, start, values if dtype is None else values.to(dtype))


@pytest.mark.parametrize("case", DAMAGE)
def test_a_damaged_one_is_answered_in_one_line(case: str, tmp_path: Path) -> None:
    folder = write(tmp_path / "c", random_tensors(0))
    use(folder)
    damage, reason = DAMAGE[case]
    damage(folder)
    with pytest.raises(UserError) as error:
        use(folder)
    message = only_line(error)
    assert str(folder) in message
    assert all(str(folder) if needle is str else needle in message for needle in reason), message


class Hostile:
    def __init__(self, victim: Path) -> None:
        self.victim = victim

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.victim),)


@pytest.mark.parametrize("how", ["torch.save", "pickle"])
def test_a_hostile_state_is_refused_and_nothing_in_it_runs(how: str, tmp_path: Path) -> None:
    folder = write(tmp_path / "c", random_tensors(0))
    state = {"step": Hostile(tmp_path / "it ran")}
    if how == "torch.save":
        torch.save(state, folder / STATE)
    else:
        (folder / STATE).write_bytes(pickle.dumps(state))
    edit_files(folder, lambda files: files.update({STATE: (folder / STATE).stat().st_size}))
    edit(folder, state=hash_file(folder / STATE))
    with pytest.raises(UserError, match=r"state\.pt' cannot be read"):
        TrainingShards(folder).state()
    assert not (tmp_path / "it ran").exists()


def test_a_state_that_is_no_mapping_is_refused(tmp_path: Path) -> None:
    folder = write(tmp_path / "c", random_tensors(0))
    torch.save([1, 2], folder / STATE)
    edit_files(folder, lambda files: files.update({STATE: (folder / STATE).stat().st_size}))
    edit(folder, state=hash_file(folder / STATE))
    with pytest.raises(UserError, match="it holds a list"):
        TrainingShards(folder).state()


def same_or_refused(folder: Path, whole: dict[str, Tensor]) -> bool:
    """Whether it was refused."""
    try:
        result = use(folder)
    except UserError:
        return True
    assert result.keys() == whole.keys()
    assert all(same_bits(result[name], value) for name, value in whole.items())
    return False


@pytest.mark.parametrize("every", [11, pytest.param(1, marks=pytest.mark.long)])
def test_every_byte_that_says_where_a_value_lies_is_checked(every: int, tmp_path: Path) -> None:
    """Each in turn becomes another: refused, or the same values (white space, a description)."""
    tensors = {"decoder.a": torch.randn(4, 3), "decoder.b": torch.randn(6).bfloat16(), "c": torch.randn(7)}
    folder = write(tmp_path / "c", tensors)
    whole = use(folder)
    rng = random.Random(0)
    refused = tried = 0
    for path in (folder / INDEX, folder / file_name(0, 2), folder / SECOND):
        content = path.read_bytes()
        end = len(content) if path.name == INDEX else 8 + int.from_bytes(content[:8], "little")
        for at in range(0, end, every):
            others = {*b'0123456789 ,:[]{}"aF\xff', content[at] ^ 1} - {content[at]}
            other = rng.choice(sorted(others))
            path.write_bytes(content[:at] + bytes([other]) + content[at + 1 :])
            try:
                refused += same_or_refused(folder, whole)
            except BaseException as error:
                error.add_note(f"{path.name}, byte {at}: {content[at : at + 1]!r} -> {bytes([other])!r}")
                raise
            tried += 1
        path.write_bytes(content)
    assert tried > 1500 // every
    assert refused > 0.8 * tried


@pytest.mark.parametrize("rounds", [15, pytest.param(1000, marks=pytest.mark.long)])
def test_damage_of_any_kind_is_refused_or_harmless(rounds: int, tmp_path: Path) -> None:
    folder = write(tmp_path / "c", random_tensors(0), 3)
    whole = use(folder)
    originals = {path: path.read_bytes() for path in folder.iterdir()}
    refused = 0
    for path, content in originals.items():
        # The values, which are not checked, stay as they are.
        end = 8 + int.from_bytes(content[:8], "little") if path.suffix == ".safetensors" else len(content)
        for seed in range(rounds):
            path.write_bytes(damaged(content[:end], random.Random(f"{path.name} {seed}")) + content[end:])
            try:
                refused += same_or_refused(folder, whole)
            except BaseException as error:
                error.add_note(f"{path.name}, seed {seed}")
                raise
        path.write_bytes(content)
    assert refused > rounds
