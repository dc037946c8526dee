import gzip
import io
import json
import multiprocessing
import pickle
import tarfile

import pytest
from PIL import Image

from sphinx_pl.data.images import load_image
from sphinx_pl.data.readers import ImageTextReader, InstructionReader, TextReader, build_reader
from sphinx_pl.data.readers.instruction_json import to_entry
from sphinx_pl.data.schema import ImageRef, Region, Turn
from sphinx_pl.data.skip import SkipSample
from sphinx_pl.utils.errors import UserError


def jpeg(colour="red"):
    buffer = io.BytesIO()
    Image.new("RGB", (8, 6), colour).save(buffer, "JPEG")
    return buffer.getvalue()


def write_tar(path, members):
    with tarfile.open(path, "w") as tar:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return path


def sample(key, caption="a caption", **annotation):
    note = {"caption": caption, "width": 8, "height": 6, "uid": key, **annotation}
    return [(f"{key}.jpg", jpeg()), (f"{key}.txt", caption.encode()), (f"{key}.json", json.dumps(note).encode())]


def reason(source, index):
    with pytest.raises(SkipSample) as caught:
        source.record(index)
    return caught.value.reason


def write_json(path, entries):
    path.write_text(json.dumps(entries))
    return str(path)


# --- image_text


def test_image_text_reads_shards_as_img2dataset_writes_them(tmp_path):
    for shard in range(3):
        keys = [f"{shard:05d}{number:04d}" for number in range(4)]
        write_tar(tmp_path / f"{shard:05d}.tar", [m for key in keys for m in sample(key, f"caption {key}")])
    source = build_reader("image_text", "web", str(tmp_path / "{00000..00002}.tar"))
    assert len(source) == 12
    assert not source.skipped
    record = source.record(6)
    assert record.key == "00001.tar/000010002"
    assert record.task == "caption"
    assert record.answer == "caption 000010002"
    assert record.sizes == ((8, 6),)
    assert record.meta == {"uid": "000010002"}
    assert load_image(record.images[0], 8).shape == (3, 8, 8)
    assert len({source.record(index).key for index in range(12)}) == 12


def test_text_or_json_alone_is_enough_and_text_wins(tmp_path):
    members = [
        ("a.jpg", jpeg()), ("a.txt", b" only text "),
        ("b.json", b'{"caption": "only json", "width": 8, "height": 6}'), ("b.png", jpeg()),
        ("dir/c.JPG", jpeg()), ("dir/c.txt", b"text"), ("dir/c.json", b'{"caption": "json"}'),
    ]  # fmt: skip
    source = ImageTextReader("web", str(write_tar(tmp_path / "s.tar", members)))
    records = [source.record(index) for index in range(len(source))]
    assert [record.answer for record in records] == ["only text", "only json", "text"]
    assert [record.sizes for record in records] == [(), ((8, 6),), ()]
    assert records[2].key == "s.tar/dir/c"


def test_image_bytes_are_the_members(tmp_path):
    path = write_tar(tmp_path / "s.tar", sample("a") + sample("b"))
    with tarfile.open(path) as tar:
        expected = tar.extractfile("b.jpg").read()
    ref = ImageTextReader("web", str(path)).record(1).images[0]
    assert path.read_bytes()[ref.offset : ref.offset + ref.size] == expected


def test_incomplete_and_repeated_samples_are_counted(tmp_path):
    members = [
        *sample("a"), ("b.txt", b"no image"), ("c.jpg", jpeg()), *sample("d"), *sample("a", "again"),
        ("e.jpg", jpeg()), ("e.jpg", jpeg()), ("e.txt", b"twice"), ("f.cls", b"0"),
    ]  # fmt: skip
    source = ImageTextReader("web", str(write_tar(tmp_path / "s.tar", members)))
    assert [source.record(index).key for index in range(len(source))] == ["s.tar/a", "s.tar/d"]
    assert source.skipped == {"image_absent": 1, "caption_absent": 1, "duplicate_key": 2}


def test_bad_captions(tmp_path):
    members = [
        ("a.jpg", jpeg()), ("a.txt", "café".encode("latin-1")),
        ("b.jpg", jpeg()), ("b.txt", b" \n"),
        ("c.jpg", jpeg()), ("c.txt", b"x" * 2001),
        ("d.jpg", jpeg()), ("d.json", b'{"caption": "cut'),
        ("e.jpg", jpeg()), ("e.json", b'{"caption": null}'),
        ("f.jpg", jpeg()), ("f.json", b'[1]'),
        ("g.jpg", jpeg()), ("g.json", b'{"caption": "g", "width": "8", "height": 6}'),
        ("h.jpg", jpeg()), ("h.txt", b"x" * 2000),
    ]  # fmt: skip
    source = ImageTextReader("web", str(write_tar(tmp_path / "s.tar", members)))
    assert [reason(source, index) for index in range(7)] == [
        "caption_not_utf8",
        "caption_empty",
        "caption_chars",
        "json_unreadable",
        "caption_empty",
        "entry_malformed",
        "size_malformed",
    ]
    assert len(source.record(7).answer) == 2000


def test_shard_cut_anywhere_keeps_the_samples_before_the_cut(tmp_path):
    path = write_tar(tmp_path / "s.tar", [m for key in "abcdef" for m in sample(key)])
    with tarfile.open(path) as tar:
        members = tar.getmembers()
    whole = path.read_bytes()
    ends = [
        members[3 * n + 1].offset_data + members[3 * n + 1].size for n in range(6)
    ]  # with its text, a sample counts
    last = members[-1].offset_data + members[-1].size
    for cut in {len(whole) // 2, ends[2], ends[2] - 1, members[9].offset + 100, members[9].offset_data, last}:
        (tmp_path / "cut.tar").write_bytes(whole[:cut])
        source = ImageTextReader("web", str(tmp_path / "cut.tar"))
        assert source.skipped["shard_truncated"] == 1, cut
        assert len(source) == sum(end <= cut for end in ends), cut
        assert source.record(len(source) - 1).answer == "a caption"


def test_shard_with_a_damaged_header_is_reported(tmp_path):
    path = write_tar(tmp_path / "s.tar", sample("a") + sample("b"))
    with tarfile.open(path) as tar:
        offset = tar.getmembers()[3].offset
    data = bytearray(path.read_bytes())
    data[offset : offset + 200] = b"\xff" * 200
    path.write_bytes(data)
    source = ImageTextReader("web", str(path))
    assert len(source) == 1
    assert source.skipped == {"shard_truncated": 1}


def test_a_file_that_is_no_tar_is_counted_and_fatal_only_if_alone(tmp_path):
    write_tar(tmp_path / "a.tar", sample("a"))
    (tmp_path / "b.tar").write_bytes(b"<html>" * 1000)
    (tmp_path / "c.tar").write_bytes(b"")
    source = ImageTextReader("web", str(tmp_path / "*.tar"))
    assert len(source) == 1
    assert source.skipped == {"shard_unreadable": 2}
    with pytest.raises(UserError, match=r"source 'web': no usable sample in .*b\.tar"):
        len(ImageTextReader("web", str(tmp_path / "b.tar")))


def _read(source, index):
    return source.record(index)


@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_works_in_worker_processes(tmp_path, method):
    source = ImageTextReader("web", str(write_tar(tmp_path / "s.tar", sample("a") + sample("b", "of b"))))
    expected = [source.record(index) for index in (0, 1)]  # opens the file here, before the workers start
    with multiprocessing.get_context(method).Pool(2) as pool:
        assert pool.starmap(_read, [(source, index) for index in (0, 1)] * 4) == expected * 4


def test_pickled_sources_read_the_same(tmp_path):
    texts = tmp_path / "t.jsonl"
    texts.write_text('{"text": "one"}\n')
    sources = [
        ImageTextReader("web", str(write_tar(tmp_path / "s.tar", sample("a")))),
        TextReader("text", str(texts)),
        InstructionReader("chat", write_json(tmp_path / "c.json", [{"question": "q", "answer": "a"}])),
    ]
    for source in sources:
        expected = source.record(0)
        assert pickle.loads(pickle.dumps(source)).record(0) == expected


# --- paths and options


def test_missing_files_are_named_with_the_way_out(tmp_path):
    for kind in ("image_text", "text", "instructions"):
        with pytest.raises(UserError, match=r"source 'x'.*no\.file.*python -m sphinx_pl\.cli\.sample"):
            build_reader(kind, "x", str(tmp_path / "no.file"))
    write_tar(tmp_path / "0.tar", sample("a"))
    with pytest.raises(UserError, match=r"1\.tar"):
        build_reader("image_text", "x", str(tmp_path / "{0..1}.tar"))
    with pytest.raises(UserError, match="empty list"):
        build_reader("image_text", "x", [])


def test_unknown_kind_and_option_are_answered_with_the_nearest(tmp_path):
    with pytest.raises(UserError, match="did you mean 'image_text'"):
        build_reader("image_txt", "x", "a")
    with pytest.raises(UserError, match="did you mean 'filters'"):
        build_reader("image_text", "x", "a", filter={})


def test_keys_do_not_clash_over_folders(tmp_path):
    for folder in ("a", "b"):
        (tmp_path / folder).mkdir()
        write_tar(tmp_path / folder / "0.tar", sample("k"))
    source = ImageTextReader("web", [str(tmp_path / "a" / "0.tar"), str(tmp_path / "b" / "*.tar")])
    assert [source.record(index).key for index in (0, 1)] == ["a/0.tar/k", "b/0.tar/k"]


# --- text


def test_text_documents(tmp_path):
    path = tmp_path / "t.jsonl"
    path.write_bytes(
        b'{"text": "one"}\n\n{"text": "two \\u00e9", "url": "x"}\nbroken\n{"text": ""}\n{"text": "\xff"}\n7'
    )
    source = TextReader("text", str(path))
    assert len(source) == 6
    record = source.record(1)
    assert (record.key, record.task, record.answer, record.images) == ("t.jsonl:1", "text", "two é", ())
    assert [reason(source, index) for index in (2, 3, 4, 5)] == [
        "json_unreadable",
        "text_empty",
        "json_not_utf8",
        "entry_malformed",
    ]


def test_gzipped_text_is_the_same_text(tmp_path, monkeypatch):
    monkeypatch.setenv("SPHINX_CACHE", str(tmp_path / "cache"))
    lines = [json.dumps({"text": f"document {number}"}) for number in range(2000)]
    path = tmp_path / "t.jsonl.gz"
    path.write_bytes(gzip.compress("\n".join(lines).encode()))
    source = TextReader("text", str(path))
    assert len(source) == 2000
    assert source.record(1234).answer == "document 1234"
    assert source.record(3).answer == "document 3"

    path.write_bytes(path.read_bytes()[:-2000])
    for _ in range(2):  # unpacked, then from the cache
        cut = TextReader("text", str(path))
        assert cut.skipped == {"shard_truncated": 1}
        assert 0 < len(cut) < 2000
        assert cut.record(0).answer == "document 0"


def test_empty_text_file(tmp_path):
    (tmp_path / "t.jsonl").write_text("\n")
    with pytest.raises(UserError, match=r"no usable sample in .*t\.jsonl \(nothing in it\)"):
        len(TextReader("text", str(tmp_path / "t.jsonl")))


# --- instructions

ENTRIES = [
    {
        "id": "x1",
        "image": "images/a.jpg",
        "conversations": [
            {"from": "human", "value": "<image>\nWhat?"},
            {"from": "gpt", "value": "A dog."},
            {"from": "human", "value": "Sure?"},
            {"from": "gpt", "value": "Yes."},
        ],
        "source": "elsewhere",
    },
    {
        "id": 7,
        "task": "pose",
        "image": ["a.jpg"],
        "question": "q",
        "answer": "a",
        "choices": ["a", "b"],
        "regions": [{"box": [1, 2, 3, 4], "label": "person", "keypoints": [[1, 2, 2]] * 17}],
        "width": 8,
        "height": 6,
        "meta": {"domain": "real"},
    },
    {"conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello"}]},
]


@pytest.mark.parametrize("kind", ["json", "jsonl"])
def test_instructions(tmp_path, kind):
    path = tmp_path / f"c.{kind}"
    path.write_text(json.dumps(ENTRIES) if kind == "json" else "\n".join(map(json.dumps, ENTRIES)))
    source = InstructionReader("chat", str(path))
    llava, ours, text = (source.record(index) for index in range(3))
    assert llava.key == f"c.{kind}:0:x1"
    assert llava.task == "chat"
    assert llava.images[0].path == str(tmp_path / "images" / "a.jpg")
    assert llava.turns == (Turn("<image>\nWhat?", "A dog."), Turn("Sure?", "Yes."))
    assert ours.key == f"c.{kind}:1:7"
    assert (ours.task, ours.question, ours.answer, ours.choices) == ("pose", "q", "a", ("a", "b"))
    assert ours.regions == (Region((1, 2, 3, 4), "person", ((1.0, 2.0, 2),) * 17),)
    assert ours.sizes == ((8, 6),)
    assert ours.meta == {"domain": "real"}
    assert text.images == ()


def record_of(tmp_path, entry, **options):
    return InstructionReader("chat", write_json(tmp_path / "c.json", [entry]), **options).record(0)


SAY = [{"from": "human", "value": "What?"}, {"from": "gpt", "value": "red"}]
ASK = [{"role": "user", "content": "What?"}, {"role": "assistant", "content": "red"}]
PARTS = [{"type": "image", "image": "a.jpg"}, {"type": "text", "text": "What?"}]


@pytest.mark.parametrize(
    ("entry", "turns", "images"),
    [
        ({"images": ["a.jpg"], "conversations": SAY}, (Turn("What?", "red"),), ["a.jpg"]),
        ({"images": "a.jpg", "image": None, "messages": ASK}, (Turn("What?", "red"),), ["a.jpg"]),
        ({"image": "file:///b/a.jpg", "conversations": ASK}, (Turn("What?", "red"),), ["/b/a.jpg"]),
        ({"messages": [ASK[0] | {"content": PARTS}, ASK[1]]}, (Turn("<image>\nWhat?", "red"),), ["a.jpg"]),
        (
            {"messages": [ASK[0] | {"content": [{"type": "image"}, "What?"]}, ASK[1]], "images": ["a.jpg"]},
            (Turn("<image>\nWhat?", "red"),),
            ["a.jpg"],
        ),
        (
            {"messages": [ASK[0] | {"content": [{"type": "image_url", "image_url": {"url": "a.jpg"}}]}, ASK[1]]},
            (Turn("<image>", "red"),),
            ["a.jpg"],
        ),
        (
            {"images": ["a.jpg", "b.jpg"], "conversations": [SAY[0] | {"value": "<image_1> or <image 2>?"}, SAY[1]]},
            (Turn("<image> or <image>?", "red"),),
            ["a.jpg", "b.jpg"],
        ),
        (
            {"id": 1, "source": "x", "license": "MIT", "score": 0.5, "video": None, "tools": "", "conversations": SAY},
            (Turn("What?", "red"),),
            [],
        ),
        ({"messages": [{"role": "system", "content": ""}, *ASK]}, (Turn("What?", "red"),), []),
        ({"images": [{"path": "a.jpg", "bytes": None}], "messages": ASK}, (Turn("What?", "red"),), ["a.jpg"]),
        (
            {"image": "a.jpg", "image_id": 7, "url": "https://x.org/a.jpg", "messages": ASK},
            (Turn("What?", "red"),),
            ["a.jpg"],
        ),
        ({"url": "https://x.org/page.html", "messages": ASK}, (Turn("What?", "red"),), []),
        # Words about markup, where there is no image.
        (
            {"messages": [ASK[0] | {"content": "What does <img> do?"}, ASK[1]]},
            (Turn("What does <img> do?", "red"),),
            [],
        ),
    ],
)
def test_what_other_projects_write_is_read(tmp_path, entry, turns, images):
    record = record_of(tmp_path, entry)
    assert record.turns == turns
    assert [image.path for image in record.images] == [str(tmp_path / name) for name in images]


def test_a_system_text_is_read_in_both_places_and_written_again(tmp_path):
    for entry in (
        {"system": "Be brief.", "messages": ASK},
        {"messages": [{"role": "system", "content": "Be brief."}, *ASK]},
    ):
        record = record_of(tmp_path, entry)
        assert (record.system, record.turns) == ("Be brief.", (Turn("What?", "red"),))
        assert record_of(tmp_path, to_entry(record)).system == "Be brief."


@pytest.mark.parametrize(
    ("change", "reason", "words"),
    [
        ({"img": "a.jpg"}, "key_unknown", "'img': did you mean 'image'?"),
        ({"image_path": "a.jpg"}, "key_unknown", "'image_path': did you mean 'image'?"),
        ({"image_file": "a.jpg"}, "key_unknown", "image_file"),
        ({"regionss": [{"box": [1, 2, 3, 4]}]}, "key_unknown", "did you mean 'regions'?"),
        ({"conversation": SAY}, "key_unknown", "did you mean 'conversations'?"),
        ({"instruction": "What?", "input": "", "output": "red"}, "key_unknown", "'instruction'"),
        ({"query": "What?", "response": "red", "history": []}, "key_unknown", "'query'"),
        ({"chosen": "red", "rejected": "blue"}, "key_unknown", "'chosen'"),
        ({"rejected_response": "blue"}, "key_unknown", "rejected_response"),
        ({"tools": [{"name": "search"}]}, "key_unknown", "'tools'"),
        ({"objects": {"ref": [], "bbox": [[1, 2, 3, 4]]}}, "key_unknown", "'objects'"),
        ({"bbox": [1, 2, 3, 4]}, "key_unknown", "'bbox'"),
        ({"video": "a.mp4"}, "media_unsupported", "'video'"),
        ({"videos": ["a.mp4"]}, "media_unsupported", "'videos'"),
        ({"audio": "a.wav"}, "media_unsupported", "'audio'"),
        ({"images": ["a.jpg"], "image": "b.jpg"}, "entry_malformed", "both 'image' and 'images'"),
        ({"messages": ASK}, "entry_malformed", "both 'conversations' and 'messages'"),
        ({"image": "https://a.b/c.jpg"}, "image_remote", "download it"),
        ({"image": "data:image/png;base64,AAAA"}, "image_remote", "download it"),
        ({"regions": [{"box": [1, 2, 3, 4], "text": "a"}]}, "key_unknown", "'text'"),
        ({"conversations": [SAY[0] | {"loss": False}, SAY[1] | {"weight": 0}]}, "key_unknown", "'loss'"),
        (
            {"conversations": [SAY[0] | {"value": "<video>\nWhat?"}, SAY[1]]},
            "media_unsupported",
            "<video> in a question",
        ),
        ({"conversations": [SAY[0] | {"value": "<ImageHere> What?"}, SAY[1]]}, "image_mark_unknown", "<ImageHere>"),
        ({"conversations": [SAY[0] | {"value": "<img>a.jpg</img> What?"}, SAY[1]]}, "image_mark_unknown", "<img>"),
        ({"conversations": [SAY[0] | {"value": "<image 2> or <image 1>?"}, SAY[1]]}, "image_marks", "order"),
        ({"conversations": [SAY[0], {"from": "gpt", "value": PARTS}]}, "image_in_answer", "an answer shows an image"),
        (
            {"conversations": [{"from": "human", "value": [{"type": "video", "video": "a.mp4"}]}, SAY[1]]},
            "media_unsupported",
            "a part of type 'video'",
        ),
        ({"conversations": [*SAY, {"from": "system", "value": "x"}, SAY[1]]}, "conversation_malformed", "system"),
        (
            {"conversations": [SAY[0], {"from": "tool", "value": "x"}]},
            "conversation_malformed",
            "it must go human, gpt",
        ),
        ({"system": "a", "conversations": [{"from": "system", "value": "b"}, *SAY]}, "entry_malformed", "system"),
        ({"image_id": 458752}, "image_absent", "'image_id' names a picture (458752) and there is no 'image'"),
        ({"source": "coco/train2017/1.jpg"}, "image_absent", "'source' names a picture"),
        ({"url": ["https://x.org/1.PNG"]}, "image_absent", "ignore_keys=[url] passes over it"),
        ({"image": 0}, "entry_malformed", "0 should be text"),
        ({"images": [" "]}, "image_absent", "blank"),
        ({"images": [{"bytes": "iVBOR", "path": "a.png"}]}, "key_unknown", "'bytes'"),
        ({"conversations": [SAY[0] | {"content": "Who?"}, SAY[1]]}, "entry_malformed", "both 'value' and 'content'"),
        ({"conversations": [SAY[0] | {"role": "system"}, SAY[1]]}, "entry_malformed", "both 'from' and 'role'"),
        ({"regions": [{"box": [1, 2, 3, 4], "keypoints": [[1, 2, 0.9]]}]}, "visibility_malformed", "0, 1 or 2"),
    ],
)
def test_what_is_not_understood_is_refused_by_name(tmp_path, change, reason, words):
    with pytest.raises(SkipSample) as caught:
        record_of(tmp_path, {"conversations": SAY} | change)
    assert caught.value.reason == reason
    assert words in caught.value.detail
    assert "\n" not in str(caught.value)


MARKS = (
    *("<Image>", "<IMAGE>", "<IMG_CONTEXT>", "<image_soft_token>", "<start_of_image>", "<|image_1|>", "<|media|>"),
    *("<image></image>", "<im_start>", "<fake_token_around_image>", "<image-1>", "<image:a.jpg>", "[IMG]", "{image}"),
)


@pytest.mark.parametrize("mark", MARKS)
def test_a_mark_of_another_project_is_never_trained_as_words(tmp_path, mark):
    entry = {"image": "a.jpg", "conversations": [SAY[0] | {"value": f"{mark} What?"}, SAY[1]]}
    with pytest.raises(SkipSample) as caught:
        record_of(tmp_path, entry)
    assert caught.value.reason == "image_mark_unknown"


def test_entries_about_the_same_image_are_together_however_they_name_it(tmp_path):
    part = {"type": "image", "image": "file://a.jpg"}
    entries = [
        {"image": "a.jpg", "conversations": SAY},
        {"images": ["./a.jpg"], "conversations": SAY},
        {"image": [{"path": "a.jpg"}], "conversations": SAY},
        {"messages": [ASK[0] | {"content": [part, {"type": "text", "text": "What?"}]}, ASK[1]]},
        {"image": ["a.jpg", "b.jpg"], "conversations": SAY},
        {"conversations": SAY},
        7,
    ]
    shard = InstructionReader("chat", write_json(tmp_path / "c.json", entries)).open(0)
    images = [shard.images(index) for index in range(len(entries))]
    assert len(set(images[:4])) == 1
    assert images[4] not in (images[0], None)
    assert images[5:] == [None, None]


def test_a_source_can_be_told_to_pass_over_keys(tmp_path):
    entry = {"conversations": SAY, "img": "a.jpg", "objects": [1]}
    assert record_of(tmp_path, entry, ignore_keys=["img", "objects"]).images == ()
    assert record_of(tmp_path, {"conversations": SAY, "image_id": 7}, ignore_keys=["image_id"]).images == ()
    nested = {
        "messages": [ASK[0] | {"content": [{"type": "text", "text": "What?", "x": 1}], "loss": 1}, ASK[1]],
        "regions": [{"box": [1, 2, 3, 4], "area": 4}],
    }
    assert record_of(tmp_path, nested, ignore_keys=["x", "loss", "area"]).turns == (Turn("What?", "red"),)
    with pytest.raises(SkipSample, match="'objects'"):
        record_of(tmp_path, entry, ignore_keys=["img"])


def test_root_of_the_images(tmp_path):
    path = write_json(tmp_path / "c.json", ENTRIES)
    record = InstructionReader("chat", path, root=str(tmp_path / "other")).record(0)
    assert record.images[0].path == str(tmp_path / "other" / "images" / "a.jpg")


@pytest.mark.parametrize(
    ("entry", "expected"),
    [
        (7, "entry_malformed"),
        ({"task": "no such task"}, "task_unknown"),
        ({"task": ["pose"]}, "entry_malformed"),
        ({"image": 3}, "entry_malformed"),
        ({"image": [None]}, "entry_malformed"),
        ({"answer": 3}, "entry_malformed"),
        ({"choices": [1, 2]}, "entry_malformed"),
        ({"meta": 3}, "entry_malformed"),
        ({"regions": [{"label": "x"}]}, "entry_malformed"),
        ({"regions": [{"box": [1, 2, 3]}]}, "entry_malformed"),
        ({"regions": [{"box": ["a", 2, 3, 4]}]}, "entry_malformed"),
        ({"regions": [7]}, "entry_malformed"),
        ({"regions": [{"box": [1, 2, 3, 4], "keypoints": [1, 2, 2]}]}, "entry_malformed"),
        ({"conversations": [{"from": "human"}]}, "conversation_malformed"),
        ({"conversations": [{"from": "gpt", "value": "x"}, {"from": "human", "value": "x"}]}, "conversation_malformed"),
        ({"conversations": [{"from": "human"}, {"from": "gpt"}]}, "entry_malformed"),
        ({"conversations": "hello"}, "entry_malformed"),
        ({"conversations": 3}, "entry_malformed"),
        ({"width": 0, "height": 5}, "size_malformed"),
        ({"width": 10**310, "height": 5}, "size_malformed"),
        ({"regions": [{"box": [10**310, 2, 3, 4]}]}, "entry_malformed"),
        ({"regions": [{"box": [1, 2, 3, 4], "keypoints": [[1, 1, float("inf")]]}]}, "entry_malformed"),
        ({"question": "half a character \ud83d"}, "entry_malformed"),
    ],
)
def test_broken_entries_are_bad_samples(tmp_path, entry, expected):
    source = InstructionReader("chat", write_json(tmp_path / "c.json", [entry]))
    assert reason(source, 0) == expected


def test_half_characters_and_impossible_names(tmp_path):
    lines = tmp_path / "t.jsonl"
    lines.write_text(json.dumps({"text": "cut \ud83d"}) + "\n")
    assert reason(TextReader("text", str(lines)), 0) == "text_not_utf8"
    path = write_tar(tmp_path / "a.tar", [sample("0")[0], ("0.json", b'{"caption": "cut \\ud83d"}')])
    assert reason(ImageTextReader("pairs", str(path)), 0) == "caption_not_utf8"
    for name in ("a\0b.jpg", "a\udcff\ud83d.jpg"):
        with pytest.raises(SkipSample, match="image_missing"):
            load_image(ImageRef(name), 8)


def test_a_filter_meets_tasks_that_are_no_names(tmp_path):
    entries = [{"task": task, "answer": "a"} for task in ([], {}, 3, "rec")]
    source = InstructionReader("chat", write_json(tmp_path / "c.json", entries), tasks=["rec"])
    assert len(source) == 1
    assert source.skipped == {"entry_malformed": 3}


@pytest.mark.timeout(20)
@pytest.mark.parametrize("size", [-512, -1, 1 << 62])
def test_a_tar_with_an_impossible_size_ends(tmp_path, size):
    path = write_tar(tmp_path / "a.tar", [*sample("0"), *sample("1")])
    data = bytearray(path.read_bytes())
    start = data.index(b"1.jpg")
    number = size.to_bytes(11, "big", signed=True)
    data[start + 124 : start + 136] = (b"\xff" if size < 0 else b"\x80") + number
    data[start + 148 : start + 156] = b" " * 8
    data[start + 148 : start + 156] = b"%06o\0 " % sum(data[start : start + 512])
    path.write_bytes(data)
    source = ImageTextReader("pairs", str(path))
    assert len(source) == 1
    assert source.skipped == {"shard_truncated": 1}


def test_filters(tmp_path):
    entries = [
        {"id": f"{task}-{domain}", "task": task, "question": "q", "answer": "a", "meta": {"domain": domain, "n": 1}}
        for task in ("rec", "reg")
        for domain in ("real", "synthetic")
    ]
    path = write_json(tmp_path / "c.json", [*entries, {"id": "plain"}, 7])

    def keys(**options):
        source = InstructionReader("chat", path, **options)
        return [source.record(index).key.split(":")[1:] for index in range(len(source))]

    assert keys(tasks=["rec"]) == [["0", "rec-real"], ["1", "rec-synthetic"]]
    assert keys(where={"domain": "real", "n": 1}) == [["0", "rec-real"], ["2", "reg-real"]]
    assert keys(tasks=["chat"]) == [["4", "plain"]]
    assert InstructionReader("chat", path, tasks=["rec"]).skipped == {"entry_malformed": 1}
    with pytest.raises(UserError, match=r"no usable sample in .*c\.json with where=\{'domain': 'other'\}"):
        keys(where={"domain": "other"})
    with pytest.raises(UserError, match="unknown task 'recc': did you mean 'rec'"):
        keys(tasks=["recc"])


def test_files_that_are_no_instructions(tmp_path):
    (tmp_path / "cut.json").write_text(json.dumps(ENTRIES)[:-20])
    with pytest.raises(UserError, match=r"o\.json is not a JSON list"):
        len(InstructionReader("chat", write_json(tmp_path / "o.json", {"a": 1})))
    (tmp_path / "cut.json").write_text("[")
    with pytest.raises(UserError, match=r"no usable sample in .*cut\.json .*shard_truncated"):
        len(InstructionReader("chat", str(tmp_path / "cut.json")))


def test_a_list_that_is_cut_off_keeps_the_entries_before_the_cut(tmp_path):
    (tmp_path / "cut.json").write_text(json.dumps(ENTRIES)[:-20])
    source = InstructionReader("chat", str(tmp_path / "cut.json"))
    assert len(source) == len(ENTRIES) - 1
    assert source.skipped == {"shard_truncated": 1}


def test_several_instruction_files(tmp_path):
    paths = [write_json(tmp_path / f"{name}.json", [{"id": f"{name}{n}"} for n in range(2)]) for name in "ab"]
    source = InstructionReader("chat", paths)
    assert [source.record(index).key for index in range(4)] == [
        "a.json:0:a0",
        "a.json:1:a1",
        "b.json:0:b0",
        "b.json:1:b1",
    ]
