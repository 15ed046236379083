"""Archives that are right: zips and tars by independent writers, samples by key, patterns."""

import gzip
import json
import os
import random
import struct
import tarfile
import zipfile

import pytest
import webdataset as wds
from hypothesis import given, settings
from hypothesis import strategies as st

from diffusion.data.images import BadPicture
from diffusion.data.sources import BadSource, Caption, describe, open_source, patterns, read_item
from tests.made_archives import FILES, tarred, webdataset_tar
from tests.made_sources import fill, items, picture, read, said, zipped


def test_one_set_of_files_in_any_container_is_the_same_source(tmp_path):
    folder = open_source(fill(tmp_path / "f", FILES))
    assert said(folder) == [
        ("a/1.png", "a", (Caption("beside"),), {}),
        ("b/2.PNG", "b", (Caption("one"), Caption("two", 0.5)), {"x": 5}),
        ("b/photo.2021.png", "b", (), {}),
        ("b/photo.2022.png", "b", (), {}),
    ]
    shuffled = dict(random.Random(1).sample(sorted(FILES.items()), len(FILES)))
    for archive in (
        zipped(tmp_path / "f.zip", shuffled),
        tarred(tmp_path / "gnu.tar", shuffled, format=tarfile.GNU_FORMAT),
        tarred(tmp_path / "pax.tar", {f"./{name}": data for name, data in shuffled.items()}, format=tarfile.PAX_FORMAT),
        tarred(tmp_path / "f.tar.gz", shuffled, "w:gz"),
        tarred(tmp_path / "f.tgz", shuffled, "w:gz"),
    ):
        source = open_source(archive)
        assert said(source) == said(folder)
        assert [read_item(source.uri, item.place) for item in items(source)] == [
            read_item(folder.uri, item.place) for item in items(folder)
        ]


@pytest.mark.parametrize("method", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA])
def test_every_method_of_zips_is_read_also_behind_other_bytes(tmp_path, method):
    with zipfile.ZipFile(tmp_path / "s.zip", "w", method) as archive:
        archive.writestr("a/1.png", picture() * 100)
        archive.comment = b"PK\5\6 is also how the end begins"[5:]
    assert read(open_source(tmp_path / "s.zip"), "a/1.png") == picture() * 100
    (tmp_path / "after.zip").write_bytes(b"#!/bin/sh\n" + (tmp_path / "s.zip").read_bytes())
    assert read(open_source(tmp_path / "after.zip"), "a/1.png") == picture() * 100


def test_an_entry_with_a_long_header_is_read(tmp_path):
    entry = zipfile.ZipInfo("a/1.png")
    entry.extra = struct.pack("<2H", 0x9999, 3_000) + bytes(3_000)
    zipped(tmp_path / "s.zip", {entry: picture()})
    assert read(open_source(tmp_path / "s.zip"), "a/1.png") == picture()


def test_an_archive_that_changes_after_it_was_listed_gives_no_wrong_bytes(tmp_path):
    for path, inside in (  # a byte of the picture
        (tarred(tmp_path / "s.tar", {"a/1.png": picture()}), 550),
        (zipped(tmp_path / "s.zip", {"a/1.png": picture()}), 60),
    ):
        source = open_source(path)
        place = items(source)[0].place
        for data in (path.read_bytes()[:inside], b""):
            path.write_bytes(data)
            with pytest.raises(BadPicture, match="unreadable: "):
                read_item(source.uri, place)


def test_a_tar_with_a_note_is_no_webdataset(tmp_path):
    files = {"a/photo.2021.png": picture(), "a/photo.2022.png": picture(), "README.txt": "hello", "LICENSE.json": "{}"}
    source = open_source(tarred(tmp_path / "s.tar", files))
    assert source.kind == ".tar, imagefolder"
    assert [(item.name, item.label) for item in items(source)] == [("a/photo.2021.png", "a"), ("a/photo.2022.png", "a")]


def test_zip64_is_read(tmp_path, monkeypatch):
    monkeypatch.setattr(
        zipfile, "ZIP_FILECOUNT_LIMIT", 2
    )  # the writer's: the directory ends as one of 65,536 files does
    monkeypatch.setattr(zipfile, "ZIP64_LIMIT", 50)  # likewise sizes and offsets
    with zipfile.ZipFile(tmp_path / "s.zip", "w") as archive:
        for number in range(5):
            archive.writestr(f"a/{number}.png", picture(f"#00000{number}"))
    assert b"PK\6\6" in (tmp_path / "s.zip").read_bytes()
    source = open_source(tmp_path / "s.zip")
    assert [read_item(source.uri, item.place) for item in items(source)] == [picture(f"#00000{n}") for n in range(5)]


@settings(deadline=None, max_examples=40)
@given(
    st.dictionaries(
        st.text(
            st.characters(exclude_categories=("Cs", "Cc"), exclude_characters="\\/:"), min_size=1, max_size=40
        ).filter(lambda name: not name.startswith(".") and name != "__MACOSX"),
        st.binary(max_size=600),
        min_size=1,
        max_size=8,
    ),
    st.sampled_from(["zip", "gnu", "pax"]),
)
def test_names_and_bytes_survive_any_archive(tmp_path_factory, files, how):
    path = tmp_path_factory.mktemp("any") / ("s.zip" if how == "zip" else "s.tar")
    inside = {f"class/{name}.png": data for name, data in files.items()}
    if how == "zip":
        zipped(path, inside)
    else:
        tarred(path, inside, format=tarfile.GNU_FORMAT if how == "gnu" else tarfile.PAX_FORMAT)
    source = open_source(path)
    assert {item.name: read_item(source.uri, item.place) for item in items(source)} == inside


def test_webdataset_samples(tmp_path):
    samples = [
        {"__key__": "x/0001", "png": picture(), "cls": 3, "txt": "from txt", "json": {"size": 4, "label": "named"}},
        {"__key__": "x/0002", "jpg": picture(), "cls": 3, "json": {"caption": ["a", "b"], "weights": [1, 3]}},
        {"__key__": "x/0003", "seg.png": picture("#ffffff"), "png": picture(), "cls": 4, "caption": b"two words\n"},
        {"__key__": "x/0004", "webp": picture(), "pyd": {"never": "read"}, "pth": b"never read"},
    ]
    source = open_source(webdataset_tar(tmp_path / "s.tar", samples))
    assert said(source) == [
        ("x/0001.png", "named", (Caption("from txt"),), {"size": 4}),
        ("x/0002.jpg", "3", (Caption("a", 1.0), Caption("b", 3.0)), {}),
        ("x/0003.png", "4", (Caption("two words"),), {}),
        ("x/0004.webp", "x", (), {}),
    ]
    assert read(source, "x/0003.png") == picture()
    facts = describe(source)
    assert facts["kind"] == ".tar, WebDataset"
    assert facts["classes"] == {"3": 1, "4": 1, "named": 1, "x": 1}
    assert (facts["captioned"], facts["with several captions"], facts["captions"]) == (3, 1, 4)
    assert facts["other files"] == {".caption": 1, ".cls": 3, ".json": 2, ".pth": 1, ".pyd": 1, ".txt": 1}
    webdataset_reads = wds.WebDataset(str(tmp_path / "s.tar"), shardshuffle=False)
    assert [row["__key__"] for row in webdataset_reads] == [item.name.partition(".")[0] for item in items(source)]


def test_files_of_one_key_are_one_sample_whatever_stands_between_them(tmp_path):
    """By name, `a.d/1.png` lies between `a.cls` and `a.png`; in the tar, anything may."""
    names = ["a.png", "b.cls", "a.d/1.png", "a.cls", "a.d/1.cls", "b.png"]
    files = {name: "7" if name == "a.cls" else "8" if name.endswith("cls") else picture() for name in names}
    assert [(name, label) for name, label, _, _ in said(tarred(tmp_path / "s.tar", files))] == [
        ("a.d/1.png", "8"),
        ("a.png", "7"),
        ("b.png", "8"),
    ]


def test_webdataset_samples_without_one_picture(tmp_path):
    whole = {"__key__": "1", "png": picture(), "cls": 0}
    source = open_source(webdataset_tar(tmp_path / "s.tar", [whole, {"__key__": "2", "cls": 0}]))
    with pytest.raises(BadPicture, match="no picture: the sample has only: cls"):
        read(source, "2.cls")
    both = {"__key__": "2", "jpg": picture(), "png": picture(), "cls": 0}
    with pytest.raises(BadSource, match=r"2.jpg: the sample has 2 pictures \(jpg png\)"):
        open_source(webdataset_tar(tmp_path / "s.tar", [whole, both]))


def test_a_folder_of_tars_and_a_pattern_are_all_of_them(tmp_path):
    for shard in range(12):
        sample = {"__key__": "same", "png": picture(f"#0000{shard:02x}"), "cls": shard % 2}
        webdataset_tar(tmp_path / f"{shard:03d}.tar", [sample])
    folder = open_source(tmp_path)
    assert [item.name for item in items(folder)] == [f"{shard:03d}/same.png" for shard in range(12)]
    assert [item.label for item in items(folder)] == ["0", "1"] * 6
    for pattern in ("{000..011}.tar", "0*.tar", "{00{0,1,2,3,4,5,6,7,8,9},01?}.tar"):
        source = open_source(tmp_path / pattern)
        assert said(source) == said(folder)
        assert source.fingerprint == folder.fingerprint
        assert read(source, "007/same.png") == picture("#000007")
    assert len(open_source(tmp_path / "{002..004}.tar")) == 3
    with pytest.raises(BadSource, match=r"no file is there for 2 of 14 names \(012.tar, 013.tar\)"):
        open_source(tmp_path / "{000..013}.tar")
    with pytest.raises(BadSource, match="no file is there for 1 of 1 names"):
        open_source(tmp_path / "1*.tar")
    fill(tmp_path, {"a/1.png": picture()})
    with pytest.raises(BadSource, match=r"holds 1 pictures and 12 archives: .* pattern"):
        open_source(tmp_path)
    assert len(open_source(tmp_path / "*.tar")) == 12


@settings(deadline=None)
@given(st.integers(0, 50), st.integers(0, 60), st.integers(1, 4))
def test_a_range_in_braces_counts_with_zeros(first, count, width):
    expanded = list(patterns.braces(f"x/{{{first:0{width}d}..{first + count}}}.tar"))
    assert expanded == [f"x/{number:0{width}d}.tar" for number in range(first, first + count + 1)]


@pytest.mark.parametrize("pattern", ["{a}.tar", "{a..c}.tar", "{3..1}.tar", "{0..999999}.tar", "{a,b.tar"])
def test_braces_that_mean_nothing_are_refused(tmp_path, pattern):
    with pytest.raises(BadSource, match=r"braces are|is no range"):
        open_source(tmp_path / pattern)


def test_a_gz_in_several_pieces_with_zeros_at_its_end_is_read(tmp_path):
    plain = tarred(tmp_path / "s.tar", {"a/1.png": picture()}).read_bytes()
    (tmp_path / "s.tar.gz").write_bytes(gzip.compress(plain[:700]) + gzip.compress(plain[700:]) + bytes(100))
    assert read(open_source(tmp_path / "s.tar.gz"), "a/1.png") == picture()
    broken = bytearray(gzip.compress(plain))
    broken[len(broken) // 2] ^= 255
    (tmp_path / "s.tar.gz").write_bytes(broken)
    with pytest.raises(BadSource, match=r"s.tar.gz is (damaged|cut off)"):
        open_source(tmp_path / "s.tar.gz")


def test_a_changed_archive_has_another_fingerprint(tmp_path):
    def fingerprint(first: bytes, second: bytes) -> str:
        return open_source(zipped(tmp_path / "s.zip", {"a/1.png": first, "a/2.png": second})).fingerprint

    one, two = b"one", b"two"
    assert fingerprint(one, two) == fingerprint(one, two)
    assert len({fingerprint(one, two), fingerprint(two, one), fingerprint(one, one)}) == 3


def test_a_tar_that_was_written_again_marks_all_its_files(tmp_path):
    """Its headers hold no checksum of the files, so that they differ cannot be excluded."""
    found = []
    for second in range(2):
        tarred(tmp_path / "s.tar", {"a/1.png": b"one" if second else b"two", "a/2.png": b"two"})
        os.utime(tmp_path / "s.tar", (second, second))
        found.append(open_source(tmp_path / "s.tar"))
    marks = [{item.mark for item in items(source)} for source in found]
    assert len(marks[0] | marks[1]) == 4
    assert found[0].fingerprint != found[1].fingerprint


def test_json_of_samples_may_say_nan_and_must_be_json(tmp_path):
    sample = {"__key__": "1", "png": picture(), "json": b'{"punsafe": NaN, "label": "x"}'}
    assert said(open_source(webdataset_tar(tmp_path / "s.tar", [sample]))) == [("1.png", "x", (), {"punsafe": None})]
    for data, message in ((b"{", "1.json is not JSON"), (b"[]", "1.json is not a JSON object"), (b"\xff", "not UTF-8")):
        with pytest.raises(BadSource, match=message):
            open_source(webdataset_tar(tmp_path / "s.tar", [{**sample, "json": data}]))
    assert json.loads(json.dumps(describe(open_source(zipped(tmp_path / "s.zip", {"a/1.png": picture()})))))
