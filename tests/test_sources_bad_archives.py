"""Archives that are damaged, or mean harm: each is refused, or what is wrong in it set aside."""

import gzip
import io
import os
import struct
import tarfile
import zipfile
from pathlib import Path

import pytest

from diffusion.data.images import BadPicture
from diffusion.data.sources import BadSource, containers, describe, open_source, original_of, places, read_item
from tests.made_archives import tarred
from tests.made_sources import fill, items, picture, read, zipped


@pytest.mark.parametrize("name", ["/abs.png", "../up.png", "a/../../up.png", "c:/x.png", "a\\..\\x.png"])
def test_tar_names_that_point_out_are_refused(tmp_path, name):
    with pytest.raises(BadSource, match="must be relative"):
        open_source(tarred(tmp_path / "s.tar", {"a/1.png": picture(), name: picture()}))


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        (tarfile.SYMTYPE, "holds the link 'a/2.png'"),
        (tarfile.LNKTYPE, "holds the link 'a/2.png'"),
        (tarfile.CHRTYPE, "no plain file"),
        (tarfile.BLKTYPE, "no plain file"),
        (tarfile.FIFOTYPE, "no plain file"),
    ],
)
def test_links_and_devices_in_tars_are_refused(tmp_path, kind, message):
    with tarfile.open(tarred(tmp_path / "s.tar", {"a/1.png": picture()}), "a") as archive:
        entry = tarfile.TarInfo("a/2.png")
        entry.type, entry.linkname = kind, "/etc/passwd"
        archive.addfile(entry)
    with pytest.raises(BadSource, match=message):
        open_source(tmp_path / "s.tar")


def test_doubles_in_tars_are_refused(tmp_path):
    with tarfile.open(tarred(tmp_path / "s.tar", {"a/1.png": b"1"}), "a") as archive:
        archive.addfile(tarfile.TarInfo("./a//1.png"))
    with pytest.raises(BadSource, match=r"s.tar holds 'a/1.png' twice"):
        open_source(tmp_path / "s.tar")


def test_an_archive_cut_off_anywhere_is_refused(tmp_path):
    files = {f"a/{number}.png": bytes([number]) * 700 for number in range(5)}
    for whole in (
        tarred(tmp_path / "s.tar", files, format=tarfile.GNU_FORMAT),
        tarred(tmp_path / "s.tar.gz", files, "w:gz"),
        zipped(tmp_path / "s.zip", files),
    ):
        data = whole.read_bytes()
        cut = tmp_path / f"cut{''.join(whole.suffixes)}"
        # of a tar the entries and one block of zeros are needed; writers add more of them
        needed = (5 * 3 + 1) * tarfile.BLOCKSIZE if whole.suffix == ".tar" else len(data)
        for length in [*range(0, needed, 97), needed - 1]:
            cut.write_bytes(data[:length])
            with pytest.raises(BadSource, match=r"is cut off|cannot be read as a"):
                open_source(cut)


def test_archives_that_explode_are_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(places, "_FREE", 2**20)
    zeros = {f"a/{number}.bmp": bytes(2**18) for number in range(8)}
    with zipfile.ZipFile(tmp_path / "s.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        for name, data in zeros.items():
            archive.writestr(name, data)
    with pytest.raises(BadSource, match=r"s.zip explodes: [\d,]+ bytes claim to unpack to more than"):
        open_source(tmp_path / "s.zip")
    with pytest.raises(BadSource, match=r"s.tar.gz explodes"):
        open_source(tarred(tmp_path / "s.tar.gz", zeros, "w:gz"))
    monkeypatch.setattr(places, "_RATIO", 10_000)  # what is refused is the ratio
    assert len(open_source(tmp_path / "s.zip")) == len(open_source(tmp_path / "s.tar.gz")) == 8


def test_what_a_zip_claims_is_not_believed(tmp_path, monkeypatch):
    """An entry that says it is small and is not; one with a password; one of an unknown method; a directory that lies."""
    monkeypatch.setattr(places, "MAX_FILE_BYTES", 10_000)
    with zipfile.ZipFile(tmp_path / "s.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        for name in ("bomb", "fine", "locked", "odd", "moved"):
            archive.writestr(f"a/{name}.png", bytes(100_000 if name == "bomb" else 100))
    data = bytearray((tmp_path / "s.zip").read_bytes())
    at = {name: data.rfind(f"a/{name}.png".encode()) - 46 for name in ("bomb", "locked", "odd", "moved")}
    struct.pack_into("<L", data, at["bomb"] + 24, 100)  # unpacked size
    struct.pack_into("<H", data, at["locked"] + 8, 1)  # flags
    struct.pack_into("<H", data, at["odd"] + 10, 97)  # method
    struct.pack_into("<L", data, at["moved"] + 42, 7)  # where the entry begins
    (tmp_path / "s.zip").write_bytes(data)
    source = open_source(tmp_path / "s.zip")
    assert read(source, "a/fine.png") == bytes(100)
    for name, message in (
        ("bomb", "unreadable: BadZipFile: Bad CRC|too large"),
        ("locked", "encrypted"),
        ("odd", "unknown compression: That compression method is not supported: pack"),
        ("moved", "no entry begins where"),
    ):
        with pytest.raises(BadPicture, match=message):
            read(source, f"a/{name}.png")


def test_a_directory_that_says_it_is_short_and_is_not_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(containers, "MAX_ENTRIES", 3)
    data = bytearray(zipped(tmp_path / "s.zip", {f"a/{number}.png": b"" for number in range(4)}).read_bytes())
    struct.pack_into("<HH", data, len(data) - 22 + 8, 1, 1)
    (tmp_path / "s.zip").write_bytes(data)
    with pytest.raises(BadSource, match="more than 3 entries"):
        open_source(tmp_path / "s.zip")


def test_ten_million_entries_are_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(containers, "MAX_ENTRIES", 3)
    files = {f"a/{number}.png": b"" for number in range(4)}
    for archive in (zipped(tmp_path / "s.zip", files), tarred(tmp_path / "s.tar", files)):
        with pytest.raises(BadSource, match=r"entries|more than 3"):
            open_source(archive)


def test_names_that_cannot_be_written_down_are_set_aside_with_their_reason(tmp_path):
    names = ["a/line\nfeed.png", "a/\x1b[31mred.png", "a/" + "long" * 300 + ".png", "a/half\udce9.png"]
    with tarfile.open(tmp_path / "s.tar", "w", format=tarfile.GNU_FORMAT, errors="surrogateescape") as archive:
        for name in ["a/good.png", *names]:
            entry = tarfile.TarInfo(name)
            entry.size = len(picture())
            archive.addfile(entry, io.BytesIO(picture()))
    folder = fill(tmp_path / "f", {"a/good.png": picture(), names[0]: picture(), "a/back\\slash.png": picture()})
    (folder / names[3]).write_bytes(picture())
    (tmp_path / "t.tar.gz").write_bytes(gzip.compress((tmp_path / "s.tar").read_bytes()))
    packed = zipped(tmp_path / "s.zip", {name: picture() for name in ("a/good.png", "a/halfé.png", "a/line\nfeed.png")})
    packed.write_bytes(packed.read_bytes().replace("halfé".encode(), b"half\xe9\xe9"))  # said to be UTF-8
    in_tars = {"control character '\\n'", "control character '\\x1b'", "1,206 bytes", "not UTF-8"}
    for source, reasons in (
        (tmp_path / "s.tar", in_tars),
        (tmp_path / "t.tar.gz", in_tars),
        (folder, {"control character '\\n'", "backslash", "not UTF-8"}),
        (packed, {"control character '\\n'", "not UTF-8"}),
    ):
        source = open_source(source)
        found = set()
        for item in items(source):
            item.name.encode()
            assert "\n" not in item.name
            if item.name != "a/good.png":
                with pytest.raises(BadPicture, match=r"^unsafe name: ") as refused:
                    read_item(source.uri, item.place)
                assert read_item(source.uri, original_of(item.place)) == picture()
                found |= {reason for reason in reasons if reason in str(refused.value)}
        assert found == reasons
        assert len(source) == len(reasons) + 1
        assert describe(source)["classes"] == {"a": 1}


def test_a_folder_whose_name_cannot_be_written_down_sets_aside_what_it_holds(tmp_path):
    source = fill(tmp_path / "s", {"a/1.png": picture(), "b\nc/2.png": picture()})
    os.makedirs(os.fsencode(source) + b"/cl\xff")
    Path(os.fsdecode(os.fsencode(source) + b"/cl\xff/3.png")).write_bytes(picture())
    source = open_source(source)
    assert describe(source)["classes"] == {"a": 1}
    for item in items(source)[1:]:
        with pytest.raises(BadPicture, match=r"^unsafe name: "):
            read_item(source.uri, item.place)
    source = fill(tmp_path / "t", {"a/1.png": picture(), "b\u2028c/2.png": picture()})
    with pytest.raises(BadSource, match=r"has the label 'b\\u2028c': .* printable .*Rename its folder"):
        open_source(source)


def test_nested_archives_are_not_opened(tmp_path):
    inner = zipped(tmp_path / "inner.zip", {"b/2.png": picture()}).read_bytes()
    source = open_source(zipped(tmp_path / "s.zip", {"a/1.png": picture(), "a/inner.zip": inner}))
    assert [item.name for item in items(source)] == ["a/1.png"]
    assert describe(source)["other files"] == {".zip": 1}


def test_damaged_tars_are_refused(tmp_path):
    sparse = tarfile.TarInfo("a/1.png")
    sparse.type = tarfile.GNUTYPE_SPARSE
    beyond, back = tarfile.TarInfo("a/2.png"), tarfile.TarInfo("a/2.png")
    beyond.size, back.size = 2**40, -(2**11)  # back to the first entry, for ever
    first = tarfile.TarInfo("a/1.png").tobuf(tarfile.GNU_FORMAT) * 3
    for header, message in (
        (sparse.tobuf(tarfile.GNU_FORMAT), "holds 'a/1.png', which is no plain file"),
        (first + beyond.tobuf(tarfile.GNU_FORMAT), "is cut off or damaged"),
        (first + back.tobuf(tarfile.GNU_FORMAT), "is cut off or damaged"),
        (b"x" * 512, "cannot be read as a tar"),
    ):
        (tmp_path / "s.tar").write_bytes(header + bytes(2**11))
        with pytest.raises(BadSource, match=f"s.tar {message}"):
            open_source(tmp_path / "s.tar")
    names = tarfile.TarInfo("././@LongLink")
    names.type, names.size = tarfile.GNUTYPE_LONGNAME, 2**33
    (tmp_path / "s.tar").write_bytes(names.tobuf(tarfile.GNU_FORMAT) + bytes(2**11))
    with pytest.raises(BadSource, match=r"a header of 8,589,934,592 bytes"):
        open_source(tmp_path / "s.tar")
