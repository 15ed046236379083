"""Tables by independent writers: of paths, and Parquet that holds the pictures in its rows."""

from pathlib import Path

import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from diffusion.data.images import BadPicture
from diffusion.data.sources import BadSource, Caption, describe, open_source, parquet, places, read_item
from diffusion.recipe import Columns
from tests.made_archives import tarred
from tests.made_sources import fill, items, lines, picture, read, said, zipped
from tests.made_tables import ROWS, parquet_of, write_table

SAID = [
    ("3.png", "cat", (Caption("three, with a comma"),), {"n": 3}),
    ("x/1.png", "cat", (Caption("one"),), {"n": 1}),
    ("x/2.png", "dog", (), {"n": 2}),
]


@pytest.fixture
def pictures(tmp_path) -> Path:
    return fill(tmp_path, {row["path"]: picture(f"#00000{row['n']}") for row in ROWS})


@pytest.mark.parametrize("ending", ["csv", "tsv", "jsonl", "parquet"])
def test_tables_of_paths(pictures, ending):
    source = open_source(write_table(pictures / f"table.{ending}", ROWS))
    texts = ending in ("csv", "tsv")  # which know no numbers
    assert said(source) == [(*facts, {"n": str(x["n"])} if texts else x) for *facts, x in SAID]
    assert read(source, "x/2.png") == picture("#000002")
    before = source.fingerprint
    assert open_source(pictures / f"table.{ending}").fingerprint == before
    write_table(pictures / f"table.{ending}", [{**ROWS[0], "caption": "other"}, *ROWS[1:]])
    assert open_source(pictures / f"table.{ending}").fingerprint != before


def test_columns_are_named_where_they_are_not_usual(pictures, tmp_path_factory):
    rows = [
        {"photo": row["path"], "a": "first", "wa": 2.0, "b": ["x", "y"], "wb": [1.0, 0.25], "kind": row["n"]}
        for row in ROWS
    ]
    table = write_table(tmp_path_factory.mktemp("elsewhere") / "t.parquet", rows)
    with pytest.raises(
        BadSource, match=r"no column of pictures under a usual name .* it has photo, a, wa, b, wb, kind"
    ):
        open_source(table)
    columns = Columns(image="photo", captions=("a", "b"), weights=("wa", "wb"), label="kind", root=str(pictures))
    source = open_source(table, columns=columns)
    captions = (Caption("first", 2.0), Caption("x", 1.0), Caption("y", 0.25))
    assert said(source) == [
        ("3.png", "3", captions, {}),
        ("x/1.png", "1", captions, {}),
        ("x/2.png", "2", captions, {}),
    ]
    assert read(source, "x/1.png") == picture("#000001")
    absolute = write_table(
        table.with_name("absolute.csv"), [{**row, "path": str(pictures / row["path"])} for row in ROWS]
    )
    assert {item.name for item in items(open_source(absolute, columns=Columns(root=str(pictures))))} == {
        row["path"] for row in ROWS
    }
    with pytest.raises(BadSource, match="no column wrong; it has "):
        open_source(table, columns=Columns(image="photo", label="wrong", root=str(pictures)))
    with pytest.raises(BadSource, match=r"paths are relative to .*; another folder is `root`"):
        open_source(table, columns=Columns(image="photo"))
    with pytest.raises(BadSource, match="is no table, so it has no columns"):
        open_source(pictures, columns=columns)
    with pytest.raises(ValueError, match="2 weights for 1 captions"):
        Columns(captions=("a",), weights=("x", "y"))


def test_a_table_reaches_nothing_through_links_out_of_its_folder(pictures, tmp_path_factory):
    outside = fill(tmp_path_factory.mktemp("outside"), {"secret.png": picture()})
    (pictures / "out").symlink_to(outside)
    (pictures / "y").symlink_to("x")
    (pictures / "link.png").symlink_to(outside / "secret.png")
    (pictures / "within.png").symlink_to("x/1.png")
    source = open_source(write_table(pictures / "t.csv", [{"path": "y/1.png"}, {"path": "within.png", "label": "x"}]))
    places = [item.place for item in source.items()]
    assert [read_item(source.uri, place) for place in places] == [(pictures / "x/1.png").read_bytes()] * 2
    moved = (pictures / "x/1.png").rename(pictures / "x/moved.png")
    (pictures / "x/1.png").symlink_to(outside / "secret.png")  # after the listing
    for place in places:
        with pytest.raises(BadPicture, match="it has become a link since it was listed"):
            read_item(source.uri, place)
    moved.rename(pictures / "x/1.png")
    for name, message in (("out/secret.png", "a link there leads out"), ("link.png", "is a link out of the source")):
        with pytest.raises(BadSource, match=message):
            open_source(write_table(pictures / "t.csv", [{"path": name}]))
    (linked := outside.parent / "linked").symlink_to(pictures)
    table = write_table(outside / "t.csv", [{"path": str(linked / "x/1.png")}])
    assert said(open_source(table, columns=Columns(root=str(linked)))) == [("x/1.png", "x", (), {})]


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([{"path": "nowhere.png"}], r"the table names 1 files that are not there \(nowhere.png\)"),
        ([{"path": "../up.png"}], "t.jsonl line 1: path .* must be relative"),
        ([{"path": "/etc/passwd"}], "must be relative"),
        ([{"path": "3.png"}, {"path": "x/../3.png"}], "must be relative"),
        ([{"path": "3.png"}, {"path": "./3.png"}], "t.jsonl line 2: 3.png has a line already"),
        ([{"path": None}], "line 1: path is None"),
        ([{"url": "http://x/1.png"}], "web addresses alone, and nothing is downloaded"),
        ([{"path": "http://x/1.png"}], "web address, and nothing is downloaded"),
        ([{"path": "3.png", "caption": ["a", "b"], "weights": [1]}], "line 1: caption has 2 texts and 1 weights"),
        ([{"path": "3.png", "caption": {"text": "a", "wieght": 1}}], "caption has the key 'wieght'"),
        *(
            (
                [{"path": "3.png", "caption": "a", "weight": weight}],
                "line 1: caption has the weight .* from 1e-09 to 1e",
            )
            for weight in (0, -1, True, "heavy", {}, "inf", "nan", 1e308, 5e-324)
        ),
        ([{"path": "3.png", "label": "a"}, {"path": "x/1.png", "label": 1.5}], "line 2: label is 1.5"),
    ],
)
def test_rows_that_cannot_be_understood_are_refused_by_line(pictures, rows, message):
    (pictures / "t.jsonl").write_text(lines(*rows))
    with pytest.raises(BadSource, match=message):
        open_source(pictures / "t.jsonl")


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        (
            "t.csv",
            'path,text\n3.png,a\n\n3.png,"open\nx/1.png,b\n',
            "row that begins in line 4 cannot .* line 5 .*closed",
        ),
        ("t.csv", 'path,text\n3.png,"a "b" c"\n', "begins in line 2 .* beyond line 2 .*written twice"),
        ("t.csv", f"path,text\n3.png,a\nx/1.png,{'a' * 200_000}\n", "begins in line 3 .* beyond line 3 .*131,072"),
        ("t.csv", 'path,text\n3.png,"a\nb"\nx/1.png,b,c\n', "line 4 has more fields"),
        ("t.csv", "path,label,label\n3.png,a,b\n", "t.csv has the column 'label' twice"),
        ("t.csv", "path, label\n3.png, a\n", "t.csv has the column ' label', with blanks at an end"),
        ("t.csv", "path;text\n3.png;a\n", "one column, 'path;text': is it separated by ';'"),
        ("t.tsv", "path,text\n3.png,a\n", "one column, 'path,text': is it separated by ','"),
        ("t.csv", "path,text\n", "t.csv has no rows"),
        ("t.csv", "", "t.csv has no rows"),
        ("t.jsonl", "", "t.jsonl has no rows"),
        ("t.jsonl", '{"path": "3.png", "label": "a", "label": "b"}\n', "line 1 .*the key 'label' stands there twice"),
    ],
)
def test_tables_that_would_be_misread_are_refused(pictures, name, text, message):
    (pictures / name).write_text(text)
    with pytest.raises(BadSource, match=message):
        open_source(pictures / name)


def test_a_quoted_field_may_hold_lines_and_quotes_and_a_row_may_be_short(pictures):
    (pictures / "t.csv").write_text('\npath,label,text,,\n3.png,a,"one\n""two"", three"\n\nx/1.png,a\n')
    captions = {item.name: item.captions for item in items(open_source(pictures / "t.csv"))}
    assert captions == {"3.png": (Caption('one\n"two", three'),), "x/1.png": ()}


@settings(deadline=None, max_examples=25)
@given(
    st.lists(
        st.tuples(st.text(st.characters(exclude_categories=("Cs",)), min_size=1, max_size=9), st.floats(1e-9, 1e9)),
        max_size=4,
    )
)
def test_captions_survive_metadata_however_they_are_written(tmp_path_factory, captions):
    folder = fill(tmp_path_factory.mktemp("c"), {"a/1.png": b""})
    expected = [("a/1.png", "a", tuple(Caption(*caption) for caption in captions), {})]
    texts, weights = [text for text, _ in captions], [weight for _, weight in captions]
    for row in (
        {"text": [{"text": text, "weight": weight} for text, weight in captions]},
        {"text": texts, "weights": weights},
        {"captions": texts, "weight": weights},
    ):
        fill(folder, {"metadata.jsonl": lines({"file_name": "a/1.png", **row})})
        assert said(folder) == expected


def test_parquet_that_holds_pictures_in_rows(tmp_path):
    data = [picture(f"#00000{number}") for number in range(5)]
    held = pa.array([{"bytes": one, "path": f"{n}.png"} for n, one in enumerate(data)])
    for number, columns in enumerate(
        ({"image": held, "label": [0, 1, 0, 1, 0]}, {"png": data, "label": [0, 1, 0, 1, 0]})
    ):
        folder = tmp_path / str(number)
        folder.mkdir()
        whole = open_source(parquet_of(folder / "train-0.parquet", columns, row_group_size=2))
        assert [item.label for item in items(whole)] == ["0", "1", "0", "1", "0"]
        assert [read_item(whole.uri, item.place) for item in reversed(items(whole))] == data[::-1]
        parquet_of(
            folder / "train-1.parquet", {"image" if number == 0 else "png": columns["image" if number == 0 else "png"]}
        )
    with pytest.raises(BadSource, match="5 of 10 pictures have no class"):
        open_source(folder)
    (folder / "train-0.parquet").unlink()
    alone = open_source(folder)  # a table with nothing but pictures
    assert [(item.name, item.label, item.size) for item in items(alone)][:2] == [
        ("train-1.parquet/000000000", "picture", None),
        ("train-1.parquet/000000001", "picture", None),
    ]
    assert describe(alone)["bytes"] is None


@pytest.mark.parametrize("kind", ["zip", "tar", "tar.gz", "parquet"])
@pytest.mark.parametrize("swapped", ["file", "folder"])
def test_an_archive_or_table_that_becomes_a_link_after_the_listing_is_not_read(tmp_path, kind, swapped):
    folders = [tmp_path / name / "a" for name in ("source", "secret")]
    for folder, colour in zip(folders, ("#111111", "#222222"), strict=True):
        folder.mkdir(parents=True)
        if kind == "zip":
            zipped(folder / "x.zip", {"1.png": picture(colour)})
        elif kind == "parquet":
            parquet_of(folder / "x.parquet", {"image": [{"bytes": picture(colour), "path": "1.png"}]})
        else:
            tarred(folder / f"x.{kind}", {"1.png": picture(colour)}, "w" if kind == "tar" else "w:gz")
    source = open_source(tmp_path / "source")
    (item,) = source.items()
    mine, secret = ((folder / f"x.{kind}") if swapped == "file" else folder for folder in folders)
    mine.rename(tmp_path / "moved")
    mine.symlink_to(secret)
    places.unpacked.cache_clear()  # as in another process
    with pytest.raises(BadPicture, match="it has become a link since it was listed"):
        read_item(source.uri, item.place)
    mine.unlink()
    (tmp_path / "moved").rename(mine)
    assert read_item(source.uri, item.place) == picture("#111111")


def test_parquet_values_that_json_lacks(tmp_path):
    columns = {
        "image": [picture(), None],
        "text": pa.array(["a", None]),
        "x": [float("nan"), 1.0],
        "raw": [b"left out", b""],
        "when": pd.to_datetime(["2020-01-01", "2021-01-01"]),
        "tags": [["a"], None],
        "s": [{"y": float("inf")}, None],
    }
    source = open_source(parquet_of(tmp_path / "t.parquet", columns))
    first, second = said(source)
    assert first[2:] == ((Caption("a"),), {"x": None, "tags": ["a"], "s": {"y": None}})
    assert second[2:] == ((), {"x": 1.0, "tags": None, "s": None})
    with pytest.raises(BadPicture, match="empty: the table has no picture in this row"):
        read(source, second[0])


@pytest.mark.parametrize("pack", [lambda folder, files: fill(folder, files), zipped])
def test_metadata_may_be_parquet(tmp_path, pack):
    rows = {"file_name": ["1.png", "x/2.png"], "text": [["a", "b"], None], "label": ["cat", "dog"], "n": [1, 2]}
    metadata = parquet_of(tmp_path / "t.parquet", rows).read_bytes()
    files = {"train/1.png": picture(), "train/x/2.png": picture("#000001"), "train/metadata.parquet": metadata}
    assert said(pack(tmp_path / "s.zip", files)) == [
        ("train/1.png", "cat", (Caption("a"), Caption("b")), {"n": 1}),
        ("train/x/2.png", "dog", (), {"n": 2}),
    ]
    files["train/metadata.parquet"] = metadata[:-9]
    with pytest.raises(BadSource, match=r"train/metadata.parquet cannot be read as Parquet"):
        open_source(pack(tmp_path / "damaged.zip", files))


def test_parquet_that_is_damaged_or_unwieldy_is_refused(tmp_path, monkeypatch):
    whole = parquet_of(tmp_path / "t.parquet", {"image": [picture()] * 4}).read_bytes()
    source = open_source(tmp_path / "t.parquet")
    place = items(source)[0].place
    for data in (b"", whole[:-20], whole[:4] + bytes(len(whole) - 12) + whole[-8:]):
        (tmp_path / "t.parquet").write_bytes(data)
        places._column.cache_clear()
        with pytest.raises(BadSource, match=r"t.parquet cannot be read as Parquet"):
            open_source(tmp_path / "t.parquet")
        with pytest.raises(BadPicture, match="unreadable"):
            read_item(source.uri, place)
    (tmp_path / "t.parquet").write_bytes(whole)
    monkeypatch.setattr(parquet, "_MAX_GROUP_BYTES", 10)
    with pytest.raises(BadSource, match=r"in one row group, .* row_group_size=1000"):
        open_source(tmp_path / "t.parquet")


def test_parquet_whose_texts_cannot_be_used_is_refused(tmp_path):
    path, image = tmp_path / "t.parquet", pa.array([picture()])
    not_utf8 = pa.StringArray.from_buffers(1, pa.array([0, 2], pa.int32()).buffers()[1], pa.py_buffer(b"a\xff"))
    twice = pa.Table.from_arrays([image, pa.array(["a"]), pa.array(["b"])], names=["image", "text", "text"])
    for table, message in (
        (pa.table({"image": image, "text": not_utf8}), r"t.parquet holds the text b'a\\xff', which is not UTF-8"),
        (twice, "t.parquet has the column 'text' twice"),
        (pa.table({"image": image, "text": [b"bytes"]}), "t.parquet: the column 'text' is of type binary"),
        (pa.table({"image": image, "label": pd.to_datetime(["2020-01-01"])}), "column 'label' is of type timestamp"),
    ):
        pq.write_table(table, path)
        with pytest.raises(BadSource, match=message):
            open_source(path)
