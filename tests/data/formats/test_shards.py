"""WebDataset: any sample is reached by its number, pictures stay bytes, and what is wrong is
named."""

import contextlib
import io
import json
import pickle
import random
import shutil
import subprocess
import tarfile

import pytest
from torch.utils.data import DataLoader

from chats import messages, png, turns
from owlfuse.core.errors import DataError
from owlfuse.data.formats.webdataset import WebDataset
from owlfuse.data.loading import GlobalBatchSampler, MixtureDataset
from owlfuse.data.mixture.mixture import Mixture
from owlfuse.data.readers import tars


def write_tar(path, members, **options):
    with tarfile.open(path, "w", **options) as tar:
        for name, content in members:
            info = tarfile.TarInfo(name)
            content = content if isinstance(content, bytes) else json.dumps(content).encode()
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))


@pytest.fixture
def shards(tmp_path):
    """Three shards of two samples each."""
    for shard in range(3):
        members = []
        for k in range(2):
            number = 2 * shard + k
            members += [
                (f"./{number:04d}.png", png(number)),
                (f"./{number:04d}.json", {"conversations": turns(number), "k": k}),
            ]
        write_tar(tmp_path / f"s-{shard:02d}.tar", members)
    return tmp_path


@pytest.mark.parametrize("pattern", ["s-{00..02}.tar", "s-*.tar", "s-{00,01,02}.tar"])
def test_samples_of_shards_have_their_pictures_as_bytes_in_any_order(shards, pattern):
    source = WebDataset(str(shards / pattern))
    source.name = "w"
    assert len(source) == 6
    for number in (5, 0, 3, 3, 1):
        sample = source[number]
        assert (sample.id, sample.images, sample.metadata) == (
            f"w:{number:04d}",
            [png(number)],
            {"k": number % 2},
        )
        assert sample.messages == messages(number)
    assert pickle.loads(pickle.dumps(source))[4] == source[4]
    assert len(pickle.dumps(source)) < 1000
    with pytest.raises(IndexError):
        source[6]


def test_a_sample_is_read_by_its_offset_and_nothing_before_it(shards):
    source = WebDataset(str(shards / "s-*.tar"))
    assert len(source) == 6
    (shards / "s-00.tar").unlink()
    with (shards / "s-02.tar").open("r+b") as file:
        file.write(b"?" * int(source.records.starts[5]))
    assert source[5].images == [png(5)]
    with pytest.raises(DataError, match="s-00.tar: no such file"):
        source[0]


@pytest.mark.parametrize("form", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_long_names_folders_and_foreign_members_do_not_disturb(tmp_path, form):
    key = "folder/" + ("d" * 60 + "/") * 2 + "é1"
    members = [
        ("README", b"x"),
        ("._1.png", b"x"),
        (f"{key}.JPG", png(1)),
        (f"{key}.cls", b"3"),
        (f"{key}.txt", "é".encode()),
    ]
    write_tar(tmp_path / "a.tar", members, format=form)
    source = WebDataset(str(tmp_path / "a.tar"))
    assert len(source) == 1
    assert (source[0].id, source[0].images) == (f"a:{key}", [png(1)])


@pytest.mark.skipif(shutil.which("tar") is None, reason="no tar")
@pytest.mark.parametrize("form", ["gnu", "oldgnu", "pax", "ustar", "v7"])
def test_shards_by_tar_itself_give_each_sample_once(tmp_path, form):
    wanted = {}
    for key, extensions in {
        "0": ["JPG", "json", "seg.png"],
        "v1.0/1": ["a.b.jpg", "txt"],
        "é ü\n": ["txt"],
    }.items():
        for number, extension in enumerate(extensions):
            file = tmp_path / "in" / f"{key}.{extension}"
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_bytes(b"x" * (511 + number))
            wanted.setdefault(key, {"id": key})[extension.lower()] = file.read_bytes()
    folder = ["-C", str(tmp_path / "in"), "."]
    for name, options in {"20.tar": [], "1.tar": ["--blocking-factor=1"]}.items():
        command = [
            "tar",
            f"--format={form}",
            "--sort=name",
            *options,
            "-cf",
            str(tmp_path / name),
            *folder,
        ]
        subprocess.run(command, check=True)
    samples = tars.TarSamples([tmp_path / "20.tar", tmp_path / "1.tar"])
    assert sorted(sample["id"] for sample in samples) == sorted([*wanted, *wanted])
    assert all(sample == wanted[sample["id"]] for sample in samples)


@pytest.mark.parametrize("kind", [tarfile.LNKTYPE, tarfile.SYMTYPE])
def test_a_member_that_is_a_link_is_told_and_not_lost(tmp_path, kind):
    with tarfile.open(tmp_path / "t.tar", "w") as tar:
        tar.addfile(tarfile.TarInfo("a.txt"))
        link = tarfile.TarInfo("b.txt")
        link.type, link.linkname = kind, "a.txt"
        tar.addfile(link)
    with pytest.raises(DataError, match="t.tar: b.txt is a link: pack it anew"):
        tars.TarSamples([tmp_path / "t.tar"])


def test_a_folder_with_a_size_hides_no_sample(tmp_path):
    """Some writers give one, as a hint; nothing of that size follows."""
    members = []
    for name, kind, size in (
        ("d.x/", tarfile.DIRTYPE, 1024),
        ("a.txt", tarfile.REGTYPE, 3),
        ("b.txt", tarfile.REGTYPE, 3),
    ):
        info = tarfile.TarInfo(name)
        info.type, info.size = kind, size
        members.append(
            info.tobuf(tarfile.USTAR_FORMAT) + (b"abc" + bytes(509) if size == 3 else b"")
        )
    (tmp_path / "t.tar").write_bytes(b"".join(members) + bytes(1024))
    assert [sample["id"] for sample in tars.TarSamples([tmp_path / "t.tar"])] == ["a", "b"]


@pytest.mark.parametrize(("ranks", "workers"), [(1, 0), (3, 2), (5, 1)])
def test_ranks_and_workers_read_each_sample_of_the_shards_once_an_epoch(shards, ranks, workers):
    source = WebDataset(str(shards / "s-*.tar"))
    source.name = "w"
    data = MixtureDataset(Mixture({"w": 6}, {"w": 1}), {"w": source}, lambda sample, _: sample.id)
    steps = 12  # twice as many epochs as there are ranks
    read = {}
    for rank in range(ranks):
        sampler = GlobalBatchSampler(ranks, 1, rank, ranks, steps)
        loader = DataLoader(data, batch_sampler=sampler, num_workers=workers, collate_fn=list)
        read[rank] = [batch[0] for batch in loader]
    together = [read[rank][step] for step in range(steps) for rank in range(ranks)]
    for start in range(0, len(together), 6):
        assert sorted(together[start : start + 6]) == [f"w:{k:04d}" for k in range(6)]


def test_a_shard_cut_anywhere_or_with_a_bit_turned_loses_no_sample_silently(shards):
    raw, rng = (shards / "s-00.tar").read_bytes(), random.Random(0)
    whole = len(tars.TarSamples([shards / "s-00.tar"]))
    for number in range(300):
        place = rng.randrange(1, len(raw))
        damaged = (
            raw[:place]
            if number % 2
            else raw[:place] + bytes([raw[place] ^ 1 << rng.randrange(8)]) + raw[place + 1 :]
        )
        (shards / "t.tar").write_bytes(damaged)
        with contextlib.suppress(DataError):
            assert len(tars.TarSamples([shards / "t.tar"])) == whole


def test_a_kept_index_spares_the_headers_until_a_shard_changes(shards, monkeypatch):
    def ids():
        source = WebDataset(str(shards / "s-*.tar"), index_dir=str(shards / "index"))
        return [source[k].id.split(":")[1] for k in range(len(source))]

    first = ids()
    find = tars.index_samples
    monkeypatch.setattr(tars, "index_samples", lambda files: pytest.fail("headers read again"))
    assert ids() == first == [f"{k:04d}" for k in range(6)]
    monkeypatch.setattr(tars, "index_samples", find)
    write_tar(shards / "s-01.tar", [("x.png", png(1)), ("x.txt", b"x")])
    assert ids() == ["0000", "0001", "x", "0004", "0005"]
    for kept in (shards / "index").iterdir():
        kept.write_bytes(kept.read_bytes()[:50])
    assert ids() == ["0000", "0001", "x", "0004", "0005"]
    assert len(list((shards / "index").iterdir())) == 2


@pytest.mark.parametrize("kind", [tarfile.GNUTYPE_LONGNAME, tarfile.XHDTYPE])
def test_a_long_name_of_gigabytes_is_refused_unread(tmp_path, kind):
    info = tarfile.TarInfo("a.txt")
    info.type, info.size = kind, 2**32
    with (tmp_path / "t.tar").open("wb") as file:
        file.write(info.tobuf(tarfile.GNU_FORMAT))
        file.truncate(2**33)  # sparse: it takes no place on the disk
    with pytest.raises(DataError, match="a header says 4,294,967,296 bytes"):
        tars.TarSamples([tmp_path / "t.tar"])


def test_captions_come_from_txt_or_from_json_and_may_have_an_instruction(tmp_path):
    members = [("0.jpg", png(0)), ("0.txt", b"A cat.\n"), ("0.json", {"caption": "no", "url": "u"})]
    members += [("1.webp", png(1)), ("1.json", {"caption": "A dog."})]
    write_tar(tmp_path / "a.tar", members)
    source = WebDataset(str(tmp_path / "a.tar"), instructions=["Say."])
    said = [
        [part.get("text") for message in source[k].messages for part in message["content"]]
        for k in range(2)
    ]
    assert said == [[None, "\nSay.", "A cat."], [None, "\nSay.", "A dog."]]
    assert [source[k].metadata for k in range(2)] == [{"url": "u"}, {}]


def test_a_member_id_is_told_and_changes_no_key(tmp_path):
    write_tar(tmp_path / "t.tar", [("a.png", png(0)), ("a.txt", b"A cat."), ("a.id", b"17")])
    sample = WebDataset(str(tmp_path / "t.tar"))[0]
    assert sample.id == "t:a"
    assert [note.text for note in sample.notes] == ["a member .ID"]


def test_a_mark_that_is_a_word_is_one_in_the_system_text_of_a_caption_too(tmp_path):
    fields = {"caption": "A cat.", "system": "\\<image> is a tag."}
    write_tar(tmp_path / "t.tar", [("a.png", png(0)), ("a.json", fields)])
    system = WebDataset(str(tmp_path / "t.tar"))[0].messages[0]
    assert system["content"] == [{"type": "text", "text": "<image> is a tag."}]


@pytest.mark.parametrize("fields", ["messages", "caption"])
def test_a_path_beside_the_member_that_it_names_is_noted(tmp_path, fields):
    record = CHAT if fields == "messages" else {"caption": "A cat."}
    members = [("a.png", png(0)), ("a.json", {**record, "image_path": "coco/a.png"})]
    write_tar(tmp_path / "t.tar", members)
    sample = WebDataset(str(tmp_path / "t.tar"))[0]
    assert sample.images == [png(0)]
    assert "a record's 'image_path'" in [note.text for note in sample.notes]


def test_several_pictures_of_a_sample_come_in_the_order_of_their_numbers(tmp_path):
    order = [10, 2, 0, 1]
    chat = [{"role": "user", "content": "<image>" * 4}, {"role": "assistant", "content": "Four."}]
    write_tar(
        tmp_path / "a.tar",
        [*((f"x.{k}.png", png(k)) for k in order), ("x.json", {"messages": chat})],
    )
    assert WebDataset(str(tmp_path / "a.tar"))[0].images == [png(k) for k in sorted(order)]


def test_pictures_come_in_the_order_in_which_the_json_names_them(tmp_path):
    chat = [{"role": "user", "content": "<image><image>"}, {"role": "assistant", "content": "."}]
    members = [("x.left.png", png(1)), ("x.right.png", png(2))]
    for number, (images, expected) in enumerate(
        (
            (["x.right.png", "x.left.png"], [2, 1]),
            (["right.png", "left.png"], [2, 1]),
            (["train/x.left.png", "train/x.right.png"], [1, 2]),
        )
    ):
        tar = tmp_path / f"{number}.tar"
        write_tar(tar, [*members, ("x.json", {"messages": chat, "images": images})])
        assert WebDataset(str(tar))[0].images == [png(k) for k in expected]
    record = {"messages": chat, "images": ["a.png", "b.png"]}
    write_tar(tmp_path / "other.tar", [*members, ("x.json", record)])
    with pytest.raises(DataError, match="whose order its .json's 'images' does not tell"):
        WebDataset(str(tmp_path / "other.tar"))[0]
    numbered = [("x.0.png", png(1)), ("x.1.png", png(2)), ("x.json", record)]
    write_tar(tmp_path / "numbered.tar", numbered)
    assert WebDataset(str(tmp_path / "numbered.tar"))[0].images == [png(1), png(2)]


def test_numbers_inside_of_names_count_as_numbers(tmp_path):
    chat = [{"role": "user", "content": "<image>" * 3}, {"role": "assistant", "content": "."}]
    members = [(f"x.img{k}.png", png(k)) for k in (1, 10, 2)]
    write_tar(tmp_path / "t.tar", [*members, ("x.json", {"messages": chat})])
    assert WebDataset(str(tmp_path / "t.tar"))[0].images == [png(k) for k in (1, 2, 10)]


CHAT = {
    "messages": [{"role": "user", "content": "What?"}, {"role": "assistant", "content": "A dog."}]
}


def asked(text):
    return {"messages": [{"role": "user", "content": text}, CHAT["messages"][1]]}


@pytest.mark.parametrize(
    ("members", "kinds", "images", "videos", "unused"),
    [
        ([("a.png", b"p"), ("a.json", CHAT)], ["image", "text"], [b"p"], [], []),
        ([("a.mp4", b"v"), ("a.json", asked("<video>\nWhat?"))], ["video", "text"], [], [b"v"], []),
        ([("a.mp4", b"v"), ("a.json", asked("<image>\nWhat?"))], ["video", "text"], [], [b"v"], []),
        ([("a.webm", b"v"), ("a.json", CHAT)], ["video", "text"], [], [b"v"], []),
        (
            [("a.mp4", b"v"), ("a.png", b"p"), ("a.json", asked("<image><video>"))],
            ["image", "video"],
            [b"p"],
            [b"v"],
            [],
        ),
        ([("a.mov", b"v"), ("a.txt", b"A dog.")], ["video"], [], [b"v"], []),
        *(
            ([(f"a.{kind}", b"p"), ("a.json", asked("What?"))], ["image", "text"], [b"p"], [], [])
            for kind in ("bmp", "tif", "TIFF", "avif")
        ),
        (
            [("a.png", b"p"), ("a.json", CHAT), ("a.cls", b"3")],
            ["image", "text"],
            [b"p"],
            [],
            ["a member .cls"],
        ),
        (
            [("a.png", b"p"), ("a.json", CHAT), ("a.txt", b"A cat.")],
            ["image", "text"],
            [b"p"],
            [],
            ["a member .txt beside a chat"],
        ),
        (
            [("a.png", b"p"), ("a.json", {**asked("<image>\nWhat?"), "image": "coco/a.png"})],
            ["image", "text"],
            [b"p"],
            [],
            ["a .json's 'image' beside the members that it names"],
        ),
        (
            [("a.json", {**asked("<image>\nWhat?"), "image": "coco/a.png"})],
            ["image", "text"],
            ["coco/a.png"],
            [],
            [],
        ),
        (
            [("a.0.png", b"p"), ("a.1.png", b"q"), ("a.txt", b"A dog.")],
            ["image", "image"],
            [b"p", b"q"],
            [],
            [],
        ),
    ],
)
def test_members_of_a_sample_are_shown_or_told(tmp_path, members, kinds, images, videos, unused):
    write_tar(tmp_path / "t.tar", members)
    sample = WebDataset(str(tmp_path / "t.tar"))[0]
    assert [part["type"] for part in sample.messages[0]["content"]] == kinds
    assert (sample.images, sample.videos) == (images, videos)
    assert [note.text for note in sample.notes if note.kind == "unused"] == unused
    assert sample.messages[-1]["content"] == [{"type": "text", "text": "A dog."}]


@pytest.mark.parametrize(
    ("members", "message"),
    [
        *(
            ([(f"a.{kind}", b"x"), ("a.json", CHAT)], f"has .{kind}, sound, which")
            for kind in ("wav", "mp3", "flac", "ogg")
        ),
        *(
            ([(f"a.{kind}", b"x"), ("a.json", asked("What?"))], f"has .{kind}, a picture that is")
            for kind in ("heic", "psd", "jxl")
        ),
        ([("a.mp4", b""), ("a.json", CHAT)], "sample t:a has a video of 0 bytes"),
        (
            [("a.0.txt", b"x"), ("a.1.txt", b"x"), ("a.png", b"x")],
            "sample t:a has .0.txt, .1.txt, expected one .txt",
        ),
        (
            [("a.0.json", CHAT), ("a.json", CHAT)],
            "sample t:a has .json, .0.json, expected one .json",
        ),
        (
            [("a.png", b"x"), ("a.seg.png", b"x"), ("a.txt", b"x")],
            "has the pictures .png, .seg.png, of which nothing tells the order",
        ),
        (
            [("a.png", b"x"), ("a.jpg", b"x"), ("a.txt", b"x")],
            "has the pictures .jpg, .png, of which nothing tells the order",
        ),
        (
            [("a.png", b"x"), ("a.json", {**CHAT, "images": ["b", "c"]})],
            "has the pictures .png, and its .json names 2 in 'images'",
        ),
        (
            [("a.png", b"x"), ("a.json", {"caption": "x", "question": "?"})],
            "its .json has 'question' and no answer",
        ),
        ([("a.json", asked("<video>\nWhat?"))], "1 <video> placeholders and 0 videos"),
        (
            [("a.png", b"x"), ("a.json", asked("<video>\nWhat?"))],
            "1 <video> placeholders and 0 videos",
        ),
        (
            [("a.png", b"x"), ("a.json", {**CHAT, "rejected": "A cat."})],
            "'rejected': A cat., an answer",
        ),
    ],
)
def test_members_that_a_sample_cannot_show_are_refused(tmp_path, members, message):
    write_tar(tmp_path / "t.tar", members)
    with pytest.raises(DataError, match=message):
        WebDataset(str(tmp_path / "t.tar"))[0]


@pytest.mark.parametrize(
    ("members", "message"),
    [
        ([("a.txt", b"x")], r"sample t:a has .txt, expected a picture"),
        ([("a.png", b"x")], r"sample t:a has .png, expected a picture .* with .txt, or .json"),
        ([("a.png", b"x"), ("a.json", {"url": 1})], r"sample t:a has .png, .json, expected"),
        ([("a.png", b""), ("a.txt", b"x")], "sample t:a has a picture of 0 bytes"),
        ([("a.png", b"x"), ("a.json", b"{")], "sample t:a: its .json: not JSON"),
        (
            [("a.png", b"x"), ("a.json", [1])],
            "sample t:a: its .json holds a list, expected an object",
        ),
        (
            [("a.png", b"x"), ("a.json", {"messages": "x"})],
            "sample t:a: 'messages' is a str, expected list",
        ),
        (
            [("a.png", b"x"), ("a.json", {"caption": 3})],
            "sample t:a: the caption is 3, expected a text",
        ),
        ([("a.png", b"x"), ("a.txt", b"\xff")], "sample t:a: its .txt: not UTF-8"),
        ([("a.png", b"x"), ("a.json", b"\xff")], "sample t:a: its .json: not UTF-8"),
        ([("a.png", b"x"), ("a.png", b"y")], "t.tar: a has two members .png"),
        (
            [("a.png", b"x"), ("b.png", b"x"), ("a.txt", b"x"), ("b.txt", b"x")],
            r"one sample do not follow .*2 names come 4 times",
        ),
        ([], "t.tar: holds no record"),
        ([("README", b"x")], "t.tar: holds no record"),
    ],
)
def test_a_wrong_sample_of_a_shard_is_named(tmp_path, members, message):
    write_tar(tmp_path / "t.tar", members)
    with pytest.raises(DataError, match=message):
        WebDataset(str(tmp_path / "t.tar"))[0]


def test_a_wrong_sample_of_a_shard_spares_the_others(tmp_path):
    write_tar(tmp_path / "t.tar", [("a.png", b"x"), ("b.png", png(0)), ("b.txt", b"B.")])
    source = WebDataset(str(tmp_path / "t.tar"))
    assert [len(source), source[1].images] == [2, [png(0)]]


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda raw: b"", "not an uncompressed tar: empty file"),
        (lambda raw: b"text" * 1000, "not an uncompressed tar"),
        (lambda raw: raw[:700], "cut short: a member ends at byte 1024, the file at 700"),
        (lambda raw: raw[:1024], "damaged or cut short at byte 1024"),
        (lambda raw: raw[:1024] + b"\xff" * 512 + raw[1536:], "damaged or cut short at byte 1024"),
        (lambda raw: raw + raw, "goes on after its end mark at byte 2048"),
        (lambda raw: __import__("gzip").compress(raw), "not an uncompressed tar"),
    ],
)
def test_a_damaged_shard_is_told_and_loses_no_sample_silently(tmp_path, damage, message):
    write_tar(tmp_path / "t.tar", [("a.png", b"x"), ("a.txt", b"x")])
    (tmp_path / "t.tar").write_bytes(damage((tmp_path / "t.tar").read_bytes()))
    with pytest.raises(DataError, match=f"t.tar: {message}"):
        len(WebDataset(str(tmp_path / "t.tar")))


@pytest.mark.parametrize(
    ("names", "shown"),
    [
        (["before.jpg", "after.jpg"], False),
        (["jpg", "mask.png"], False),
        (["0.jpg", "mask.jpg"], False),
        (["0.jpg", "1.png", "10.jpg"], True),
        (["page2.jpg", "page10.jpg"], True),
    ],
    ids=str,
)
def test_several_pictures_of_a_chat_are_shown_only_in_an_order_that_is_told(tmp_path, names, shown):
    marks = "<image>" * len(names)
    members = [(f"a.{name}", name.encode()) for name in names]
    write_tar(tmp_path / "t.tar", [*members, ("a.json", asked(f"{marks} What changed?"))])
    source = WebDataset(str(tmp_path / "t.tar"))
    if shown:
        assert source[0].images == [name.encode() for name in names]
    else:
        with pytest.raises(DataError, match="of which nothing tells the order, or whether all"):
            source[0]


def test_a_number_of_thousands_of_digits_in_a_member_is_no_error(tmp_path):
    write_tar(
        tmp_path / "t.tar",
        [(f"a.{'9' * 5000}.jpg", b"x"), ("a.json", asked("<image> What?"))],
        format=tarfile.PAX_FORMAT,
    )
    assert WebDataset(str(tmp_path / "t.tar"))[0].images == [b"x"]
