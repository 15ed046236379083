"""Sources: what the imagefolder convention says, and clear refusals of the rest."""

import json
import os
import stat
import zipfile
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from diffusion.data.images import BadPicture
from diffusion.data.sources import BadSource, Caption, Item, listing, open_source, places
from diffusion.data.sources.listing import Listing
from diffusion.recipe import digest_of
from tests.made_sources import fill, items, lines, picture, read, said, zipped


def test_embedded_emoji():
    source = open_source("embedded")
    assert len(source) == len(items(source)) == 1906
    assert len({item.label for item in items(source)}) == 9
    grinning = next(item for item in items(source) if item.name == "smileys-emotion/1f600.png")
    assert (grinning.label, grinning.captions) == ("smileys-emotion", (Caption("grinning face"),))
    assert grinning.extra == {"keywords": ["grinning"], "subcategory": "face-smiling"}
    assert read(source, grinning.name).startswith(b"\x89PNG")
    assert [item.name for item in items(source)] == sorted(item.name for item in items(source))


def test_folder_and_zip_of_the_same_files_are_the_same_source(tmp_path):
    files = {
        "b/2.PNG": picture(),
        "a/1.png": picture("#000000"),
        "notes.txt": "not looked at",
        ".hidden/3.png": "not looked at",
        "__MACOSX/a/1.png": "not looked at",
        "metadata.jsonl": lines({"file_name": "a/1.png", "text": "one", "label": "first", "x": 5}),
    }
    folder, archive = open_source(fill(tmp_path / "f", files)), open_source(zipped(tmp_path / "f.zip", files))
    assert said(folder) == said(archive)
    assert said(folder) == [("a/1.png", "first", (Caption("one"),), {"x": 5}), ("b/2.PNG", "b", (), {})]
    assert read(folder, "b/2.PNG") == read(archive, "b/2.PNG") == picture()


def test_the_nearest_folder_is_the_class_and_no_folder_is_one_class(tmp_path):
    deep = fill(tmp_path / "deep", {"train/cats/1.png": picture(), "train/dogs/2.jpg": picture()})
    assert [item.label for item in items(deep)] == ["cats", "dogs"]
    flat = fill(tmp_path / "flat", {"1.png": picture(), "2.png": picture()})
    assert {item.label for item in items(flat)} == {"picture"}


def test_metadata_is_relative_to_its_folder_csv_works_and_numbers_are_classes(tmp_path):
    source = open_source(
        fill(
            tmp_path,
            {
                "train/1.png": picture(),
                "train/2.bin": picture(),
                "train/metadata.csv": '\ufefffile_name,text,label\n1.png,"a, b",3\n2.bin,c,12\n',
                "test/metadata.jsonl": lines({"file_name": "x/1.png", "label": 7, "text": None}),
                "test/x/1.png": picture(),
            },
        )
    )
    assert said(source) == [
        ("test/x/1.png", "7", (), {}),
        ("train/1.png", "3", (Caption("a, b"),), {}),
        ("train/2.bin", "12", (Caption("c"),), {}),
    ]


def test_fingerprint_follows_the_files(tmp_path):
    folder = fill(tmp_path / "s", {"a/1.png": picture(), "metadata.jsonl": lines({"file_name": "a/1.png"})})
    first = open_source(folder).fingerprint
    assert open_source(folder).fingerprint == first
    fill(folder, {"a/1.png": picture("#000000") + b"longer"})
    second = open_source(folder).fingerprint
    fill(folder, {"metadata.jsonl": lines({"file_name": "a/1.png", "text": "new"})})
    assert len({first, second, open_source(folder).fingerprint}) == 3


@settings(deadline=None, max_examples=40)
@given(st.permutations(range(4)), st.integers(0, 3), st.sampled_from(["mark", "label", "captions", "extra"]))
def test_the_fingerprint_is_a_sum_over_what_is_said_of_items(order, number, changed):
    """Against its closed form; and any one change changes it."""
    made = [Item(f"{n}.png", f"place {n}", f"{n}:5", "x", (Caption("a", 0.5),), {"n": n}) for n in range(4)]
    other = {"mark": "other", "label": "y", "captions": (Caption("a", 0.25),), "extra": {"n": None}}

    def fingerprint(items: list[Item]) -> str:
        listing = Listing("s")
        listing.add_items(items)
        return listing.fingerprint

    one = fingerprint(made)
    said = ([item.name, item.mark, item.label, [["a", 0.5]], item.extra] for item in made)
    assert int(one, 16) == sum(int(digest_of(values), 16) for values in said) % 2**256
    assert fingerprint([made[n] for n in order]) == one
    assert fingerprint([replace(item, place="elsewhere") for item in made]) == one
    made[number] = replace(made[number], **{changed: other[changed]})
    assert fingerprint(made) != one


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_one_file_that_may_not_be_read_is_set_aside(tmp_path):
    source = open_source(fill(tmp_path, {"a/1.png": picture(), "a/2.png": picture()}))
    (tmp_path / "a" / "1.png").chmod(0)
    with pytest.raises(BadPicture, match="unreadable: PermissionError"):
        read(source, "a/1.png")
    assert read(source, "a/2.png") == picture()


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({}, "holds no pictures"),
        ({"a.txt": "x"}, "holds no pictures"),
        ({"1.png": "x", "a/2.png": "x"}, r"1 of 2 pictures have no class \(first: 1.png\)"),
        ({"a/1.png": "x", "metadata.jsonl": lines({"file_name": "a/2.png"})}, r"names 1 files .*\(a/2.png\)"),
        ({"a/1.png": "x", "metadata.jsonl": '{"file_name": \n'}, "line 1 is not JSON"),
        ({"a/1.png": "x", "metadata.jsonl": "[]\n"}, "line 1 is not a JSON object"),
        ({"a/1.png": "x", "metadata.jsonl": lines({"text": "x"})}, "line 1: no file_name"),
        (
            {"a/1.png": "x", "metadata.jsonl": lines(*[{"file_name": "a/1.png"}] * 2)},
            "line 2: a/1.png has a line already",
        ),
        ({"a/1.png": "x", "metadata.jsonl": lines({"file_name": "../a/1.png"})}, "must be relative"),
        ({"a/1.png": "x", "metadata.jsonl": lines({"file_name": "/etc/passwd"})}, "must be relative"),
        (
            {"a/1.png": "x", "metadata.jsonl": lines({"file_name": "a/1.png", "text": ["x", 5]})},
            "line 1: text is .* must be a string",
        ),
        ({"a/1.png": "x", "metadata.jsonl": lines({"file_name": "a/1.png", "label": 1.5})}, "label is 1.5"),
        ({"a/1.png": "x", "metadata.jsonl": '{"file_name": "a/1.png", "w": NaN}\n'}, "line 1 is not JSON"),
        ({"a/1.png": "x", "metadata.jsonl": '{"file_name": "a/1.png", "text": "\\ud800"}\n'}, "line 1 is not JSON"),
        ({"a/1.png": "x", "metadata.jsonl": b"\xff\xfe"}, "not UTF-8"),
        ({"a/1.png": "x", "metadata.csv": "file_name\na/1.png,b\n"}, "line 2 has more fields"),
        ({"caf\u00e9/1.png": "x", "cafe\u0301/2.png": "x"}, r"classes .*'caf\\xe9'.* which look the same \(caf"),
    ],
)
def test_sources_that_cannot_be_read_are_refused_with_the_reason(tmp_path, files, message):
    (tmp_path / "s").mkdir()
    with pytest.raises(BadSource, match=message):
        open_source(fill(tmp_path / "s", files))
    with pytest.raises(BadSource, match=message):
        open_source(zipped(tmp_path / "s.zip", files))


def test_missing_paths_and_other_files_are_refused(tmp_path):
    with pytest.raises(BadSource, match=r"does not exist.*'embedded'"):
        open_source(tmp_path / "nowhere")
    with pytest.raises(BadSource, match="s3:// names no bucket"):
        open_source("s3://")
    with pytest.raises(BadSource, match=r"cannot be read: .*name too long"):
        open_source("x" * 5_000)
    with pytest.raises(BadSource, match=r"neither a folder nor a .zip"):
        open_source(fill(tmp_path, {"a.rar": "x"}) / "a.rar")
    whole = zipped(tmp_path / "whole.zip", {"a/1.png": picture()}).read_bytes()
    (tmp_path / "cut.zip").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(BadSource):
        open_source(tmp_path / "cut.zip")


@pytest.mark.parametrize("name", ["/abs.png", "../up.png", "a/../../up.png", "c:/x.png", "a\\..\\x.png"])
def test_archive_names_that_point_out_are_refused(tmp_path, name):
    with pytest.raises(BadSource, match="must be relative"):
        open_source(zipped(tmp_path / "s.zip", {"a/1.png": picture(), name: picture()}))


def test_links_out_of_the_source_are_refused_and_links_within_are_read(tmp_path):
    folder = fill(tmp_path / "s", {"a/1.png": picture()})
    (folder / "a" / "2.png").symlink_to("1.png")
    assert len(open_source(folder)) == 2
    (tmp_path / "link").symlink_to(folder)
    assert len(open_source(tmp_path / "link")) == 2
    zipped(folder / "a.zip", {"1.png": picture()})
    (folder / "b.zip").symlink_to("a.zip")
    assert len(open_source(f"{tmp_path}/link/*.zip")) == 2
    for name in ("a.zip", "b.zip"):
        (folder / name).unlink()
    (folder / "a" / "3.png").symlink_to("/etc/hostname")
    with pytest.raises(BadSource, match=r"3.png is a link out of the source"):
        open_source(folder)
    (folder / "a" / "3.png").unlink()
    (folder / "b").symlink_to(tmp_path)
    with pytest.raises(BadSource, match="link to a folder"):
        open_source(folder)
    (folder / "b").unlink()
    os.mkfifo(folder / "pipe.png")
    with pytest.raises(BadSource, match="not a regular file"):
        open_source(folder)


@pytest.mark.parametrize("swapped", ["file", "folder"])
def test_a_link_that_comes_after_the_listing_is_not_followed(tmp_path, swapped):
    folder = fill(tmp_path / "s", {"a/1.png": b"mine", "c/1.png": b"other"})
    secret = fill(tmp_path / "secret", {"1.png": b"secret"})
    for link in ("a/2.png", "c/3.png"):
        (folder / link).symlink_to(folder / "a" / "1.png")
    source = open_source(folder)
    assert {item.name: read(source, item.name) for item in source.items()} == {
        "a/1.png": b"mine",
        "a/2.png": b"mine",
        "c/1.png": b"other",
        "c/3.png": b"mine",
    }
    if swapped == "file":
        (folder / "a" / "1.png").unlink()
        (folder / "a" / "1.png").symlink_to(secret / "1.png")
    else:
        (folder / "a").rename(tmp_path / "elsewhere")
        (folder / "a").symlink_to(secret)
    for name in ("a/1.png", "a/2.png", "c/3.png"):
        with pytest.raises(BadPicture, match="it has become a link since it was listed"):
            read(source, name)
    assert read(source, "c/1.png") == b"other"


def test_links_and_doubles_in_archives_are_refused(tmp_path):
    with zipfile.ZipFile(tmp_path / "link.zip", "w") as archive:
        entry = zipfile.ZipInfo("a/1.png")
        entry.external_attr = (stat.S_IFLNK | 0o777) << 16
        archive.writestr(entry, "/etc/passwd")
    with pytest.raises(BadSource, match="holds the link"):
        open_source(tmp_path / "link.zip")
    with zipfile.ZipFile(tmp_path / "twice.zip", "w") as archive:
        archive.writestr("a/1.png", b"1")
        with pytest.warns(UserWarning, match="Duplicate"):
            archive.writestr("a/1.png", b"2")
    with pytest.raises(BadSource, match="twice"):
        open_source(tmp_path / "twice.zip")


def test_files_that_cannot_be_read_are_bad_pictures(tmp_path, monkeypatch):
    folder = open_source(fill(tmp_path / "s", {"a/1.png": picture(), "a/2.png": picture()}))
    (tmp_path / "s" / "a" / "1.png").unlink()
    with pytest.raises(BadPicture, match="unreadable: FileNotFoundError: No such file"):
        read(folder, "a/1.png")
    os.mkfifo(tmp_path / "s" / "a" / "1.png")  # nobody writes into it
    with pytest.raises(BadPicture, match="unreadable: FileNotFoundError: it is no plain file"):
        read(folder, "a/1.png")
    archive = zipped(tmp_path / "s.zip", {"a/1.png": b"A" * 1000, "a/2.png": picture()})
    archive.write_bytes(archive.read_bytes().replace(b"A" * 1000, b"A" * 999 + b"B"))
    with pytest.raises(BadPicture, match="unreadable: BadZipFile: Bad CRC"):
        read(open_source(archive), "a/1.png")
    assert read(open_source(archive), "a/2.png") == picture()
    monkeypatch.setattr(places, "MAX_FILE_BYTES", 10)
    for source in (folder, open_source(archive)):
        with pytest.raises(BadPicture, match="too large: more than 10 bytes"):
            read(source, "a/2.png")


def test_too_many_labels_are_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(listing, "MAX_LABELS", 2)
    with pytest.raises(BadSource, match="more than 2 different labels"):
        open_source(fill(tmp_path, {f"{label}/1.png": b"" for label in "abc"}))


@pytest.mark.parametrize("label", ["../../evil", "a/b", "a\\b", "two\nlines", "x" * 201, " cat", " "])
def test_a_class_name_that_could_lead_elsewhere_or_be_mistaken_is_refused(tmp_path: Path, label: str):
    (tmp_path / "a.png").write_bytes(b"")
    (tmp_path / "metadata.jsonl").write_text(json.dumps({"file_name": "a.png", "label": label}))
    with pytest.raises(BadSource, match="a class name is up to 200 printable characters without slashes"):
        open_source(tmp_path)
