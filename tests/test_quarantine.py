"""Quarantine: every file set aside is listed with its reason, and the budget stops with something to type."""

import json

import pytest

from diffusion.data import quarantine
from diffusion.data.images import BadPicture
from diffusion.data.manifest import DUPLICATE
from diffusion.data.quarantine import SetAside, TooManyRejected, check_budget, count_by_kind, write_quarantine

FILES = [
    SetAside(name="b/2.png", kind="truncated", detail="cut"),
    SetAside(name="a/1.png", kind="empty", detail="nothing"),
    SetAside(name="c/2.png", kind="truncated", detail="cut, too"),
    SetAside(name="d/9.png", kind=DUPLICATE, detail="the same picture as a/0.png"),
]


def read(name: str) -> bytes:
    if name == "a/1.png":
        raise BadPicture("unreadable", "gone")
    return name.encode()


def test_reasons_and_originals(tmp_path):
    write_quarantine(tmp_path, FILES, read)
    rows = [json.loads(line) for line in (tmp_path / "reasons.jsonl").read_text().splitlines()]
    assert [row["name"] for row in rows] == ["a/1.png", "b/2.png", "c/2.png", "d/9.png"]
    assert [row["kind"] for row in rows] == ["empty", "truncated", "truncated", "duplicate"]
    originals = {row["name"]: row["original"] for row in rows}
    assert originals["a/1.png"] is None
    assert originals["d/9.png"] is None  # a duplicate's picture is in the shards
    for name in ("b/2.png", "c/2.png"):  # equal names in different folders do not collide
        assert (tmp_path / originals[name]).read_bytes() == name.encode()
    assert len(list((tmp_path / "originals").iterdir())) == 2


def test_originals_are_kept_up_to_a_size_and_all_are_listed(tmp_path, monkeypatch):
    monkeypatch.setattr(quarantine, "MAX_ORIGINALS_BYTES", 10)  # one of seven bytes fits
    write_quarantine(tmp_path, FILES, read)
    assert len(list((tmp_path / "originals").iterdir())) == 1
    assert len((tmp_path / "reasons.jsonl").read_text().splitlines()) == 4


def test_long_and_odd_names_are_kept(tmp_path):
    names = ["x/" + "ü" * 120 + ".png", "x/a\nb.png", "x/ .png"]
    write_quarantine(tmp_path, [SetAside(name=name, kind="empty", detail="") for name in names], lambda _: b"data")
    rows = [json.loads(line) for line in (tmp_path / "reasons.jsonl").read_text().split("\n") if line]
    assert sorted(row["name"] for row in rows) == sorted(names)
    assert all((tmp_path / row["original"]).read_bytes() == b"data" for row in rows)


def test_the_budget_counts_damage_but_not_duplicates(tmp_path):
    check_budget(FILES, 30, 0.1, tmp_path)  # three damaged of 30
    with pytest.raises(TooManyRejected) as error:
        check_budget(FILES, 29, 0.1, tmp_path)
    message = str(error.value)
    assert "3 of 29 files cannot be used (1 empty, 2 truncated)" in message
    assert "a/1.png: empty (nothing)" in message
    assert "d/9.png" not in message
    assert str(tmp_path) in message
    assert "--set shard.max_rejected=0.11" in message
    check_budget(FILES, 29, 0.11, tmp_path)  # what it says to type is enough


def test_counts_are_sorted_by_kind():
    assert list(count_by_kind(FILES).items()) == [("duplicate", 1), ("empty", 1), ("truncated", 2)]
