"""`diffusion replay`: pictures as the program and the engine draw them, drawn again; and files that only claim to be."""

import json
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch

from diffusion.data.images import decode_png, encode_png
from diffusion.recipe import canonical_json
from diffusion.serving.engine import Engine
from diffusion.serving.receipt import CHUNK, MAX_TEXT, Receipt, opened, pixels_sha256, receipt_of, stamp
from diffusion.serving.request import GenerateRequest, resolve
from diffusion.store.bundle import load_bundle
from flows.sample import draw
from flows.site import Site
from tests.commands import command, on
from tests.random_bundle import CLASSES, guided_bundle, published_model, reading_bundle, shaped_bundle
from tests.words import install

NAME = "cat-5-001.png"


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A home whose store has models of several kinds, and a picture of the first."""
    home = tmp_path_factory.mktemp("home")
    published_model(home / "store")
    published_model(home / "store", bundle=guided_bundle(), seed=1)
    published_model(home / "store", bundle=reading_bundle("fp32"), seed=2)
    published_model(home / "store", bundle=shaped_bundle(), seed=3)
    return home


MARKS = ('"guide"', '"text":', '"sizes"')


def bundle_with(home: Path, mark: str | None) -> Path:
    """The folder of the model that has this mark; None: that has none of them."""
    texts = {folder: (folder / "bundle.json").read_text() for folder in (home / "store" / "bundles").iterdir()}
    (found,) = (folder for folder, text in texts.items() if [m for m in MARKS if m in text] == ([mark] if mark else []))
    return found


@pytest.fixture
def diffusion(monkeypatch: pytest.MonkeyPatch, home: Path):
    """Runs a command here; its ValueError is the answer.  Returns exit code and what it said."""
    on(Site(home=home, gpu=False), monkeypatch, "cli_pictures")
    on(Site(home=home, gpu=False), monkeypatch, "cli_lineage", guards=("reading",))
    install(monkeypatch)
    return command


@pytest.fixture(scope="module")
def drawn(home: Path) -> dict[str, bytes]:
    """PNGs of a request for three pictures, drawn together with others."""
    engine = Engine(load_bundle(bundle_with(home, None)), slots=8)
    requests = [GenerateRequest(label=CLASSES[0], seed=5, n=3), GenerateRequest(seed=6, sampler="ddim", steps=7, n=2)]
    spec, digest = engine.bundle.spec, engine.bundle.digest
    made_by = {"bundle_digest": digest, "model": "tiny", "version": "1", "device": engine.device}
    return {
        f"{request.label or 'none'}-{request.seed}-{i:03d}.png": stamp(
            picture, receipt_of(picture, i, resolve(request, spec), spec, **made_by)
        )
        for request, pictures in zip(requests, engine.generate(requests), strict=True)
        for i, picture in enumerate(pictures)
    }


def test_a_webp_that_the_command_wrote_comes_back(home: Path, tmp_path: Path, diffusion) -> None:
    asked = {"labels": [CLASSES[0]], "prompts": [], "options": {"n": 1, "seed": 5}}
    made = draw(
        Site(home=home), "tiny", "1", bundle=bundle_with(home, None), out=tmp_path / "out", **asked, format="webp"
    )
    code, told = diffusion("replay", made / f"{CLASSES[0]}-5-000.webp", "--out", tmp_path / "again.webp")
    assert (code, "the same bytes" in told) == (0, True)
    assert (tmp_path / "again.webp").read_bytes() == (made / f"{CLASSES[0]}-5-000.webp").read_bytes()
    with pytest.raises(ValueError, match="png or webp"):
        draw(Site(home=home), "tiny", "1", bundle=bundle_with(home, None), out=None, **asked, format="jpeg")


@pytest.mark.parametrize("name", [NAME, "none-6-001.png"])
def test_a_picture_that_was_drawn_among_others_comes_back_alone(name: str, drawn, tmp_path: Path, diffusion) -> None:
    (tmp_path / name).write_bytes(drawn[name])
    code, told = diffusion("replay", tmp_path / name, "--out", tmp_path / "again.png")
    assert code == 0
    assert "the same bytes" in told
    assert (tmp_path / "again.png").read_bytes() == drawn[name]
    with pytest.raises(ValueError, match="there is such a file"):
        diffusion("replay", tmp_path / name, "--out", tmp_path / "again.png")
    with pytest.raises(ValueError, match="cannot be written"):  # said before anything is drawn
        diffusion("replay", tmp_path / name, "--out", tmp_path / name / "again.png")


def test_whatever_sample_draws_is_replayed(home: Path, tmp_path: Path, diffusion) -> None:
    """Of models with a guide, with words, of several sizes; with every option that a picture depends on."""
    asked = {
        '"guide"': ["--guidance-kind", "autoguidance", "--guidance", "2", "--label", CLASSES[1], "--sampler", "ddpm"],
        '"text":': ["--prompt", "a red flag", "--sampler", "heun_churn", "--guidance", "3"],
        '"sizes"': ["--size", "24x8", "--label", CLASSES[2]],
    }
    for mark, options in asked.items():
        bundle = bundle_with(home, mark)
        out = tmp_path / mark.strip('":')
        diffusion("sample", "--bundle", bundle, "--seed", 3, "--n", 2, "--steps", 3, "--out", out, *options)
        (picture,) = out.glob("*-3-001.png")
        code, told = diffusion("replay", picture)
        assert (code, "the same bytes" in told) == (0, True), told


def test_a_changed_picture_is_told_from_one_that_comes_out_otherwise(drawn, tmp_path: Path, diffusion) -> None:
    found = opened(drawn[NAME])
    pixels = found.picture.copy()
    pixels[3, 4, 1] ^= 4

    def told(pixels: np.ndarray, *options: object, **changed: object) -> tuple[int, str]:
        path = tmp_path / "p.png"
        path.write_bytes(stamp(pixels, found.receipt.model_copy(update=changed)))
        return diffusion("replay", path, *options)

    code, words = told(pixels)
    assert code == 1
    assert "the pixels of the file were changed after that" in words
    code, words = told(pixels[:8])
    assert code == 1
    assert "changed after that" in words
    # as one that was drawn on another device, whose receipt is of those pixels
    elsewhere = {"pixels_sha256": pixels_sha256(pixels), "torch": "1.0", "device": "abacus"}
    code, words = told(pixels, **elsewhere)
    assert code == 1
    assert "by 4 of 255 at most (torch was 1.0, is" in words
    assert "device was abacus" in words
    assert told(pixels, "--tolerance", 3, **elsewhere)[0] == 1
    code, words = told(pixels, "--tolerance", 4, **elsewhere)
    assert code == 0
    assert "within --tolerance 4" in words
    assert "the program has changed" in told(pixels, pixels_sha256=pixels_sha256(pixels))[1]


def test_the_same_pixels_in_another_file_are_said_to_be_that(drawn, tmp_path: Path, diffusion) -> None:
    data = drawn[NAME]
    first, rest = data[:33], data[33:]
    (tmp_path / "p.png").write_bytes(first + chunk(b"tEXt", b"Software\0another") + rest)
    code, told = diffusion("replay", tmp_path / "p.png")
    assert code == 0
    assert "the same pixels, in a file" in told


def test_a_model_that_is_nowhere_is_named_with_where_it_was_looked_for(drawn, tmp_path: Path, diffusion, home) -> None:
    found = opened(drawn[NAME])
    (tmp_path / "p.png").write_bytes(stamp(found.picture, found.receipt.model_copy(update={"bundle_digest": "e" * 64})))
    with pytest.raises(ValueError, match=f"{'e' * 16} is neither in {home}/store nor in the registry sqlite"):
        diffusion("replay", tmp_path / "p.png")


def test_a_receipt_of_a_picture_that_the_model_cannot_draw_is_refused(drawn, tmp_path: Path, diffusion) -> None:
    found = opened(drawn[NAME])
    for changed in ({"label": "zebra"}, {"prompt": "a zebra"}, {"guidance": 21.0}):
        (tmp_path / "p.png").write_bytes(stamp(found.picture, found.receipt.model_copy(update=changed)))
        with pytest.raises(ValueError, match="not of a picture that this model draws"):
            diffusion("replay", tmp_path / "p.png")


def chunk(kind: bytes, body: bytes) -> bytes:
    return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))


def with_chunks(*chunks: bytes) -> bytes:
    data = encode_png(np.zeros((8, 8, 3), np.uint8))
    return data[:33] + b"".join(chunks) + data[33:]


def said(value: object) -> bytes:
    """A PNG with this for a receipt."""
    text = value if isinstance(value, bytes) else json.dumps(value).encode()
    return with_chunks(chunk(b"iTXt", CHUNK.encode() + b"\0\0\0\0\0" + text))


GOOD = Receipt(
    model="m", version="1", bundle_digest="1" * 64, run_digest="2" * 64, dataset_digest="3" * 64, label=None, seed=1,
    image=0, sampler="heun", steps=5, guidance=1.0, pixels_sha256="4" * 64,
).model_dump(mode="json")  # fmt: skip
REWORK = GOOD | {
    "command": "restore", "given_sha256": "5" * 64, "mask_sha256": None, "prompt": None, "torch": "2", "device": "cpu",
    "guidance_kind": "classifier_free",
}  # fmt: skip
BOMB = zlib.compress(bytes(50_000_000), 9)
HOSTILE = {
    "deep": (said(b"[" * 60_000), "nested too deeply"),
    "deep objects": (said(b'{"a":' * 10_000), "nested too deeply"),
    "long": (said(b'"' + b"x" * MAX_TEXT + b'"'), "characters: no receipt has"),
    "huge": (said(b" " * 2**21), "longer than a picture's facts"),
    "bomb": (with_chunks(chunk(b"zTXt", CHUNK.encode() + b"\0\0" + BOMB)), "too long unpacked"),
    "many": (with_chunks(*[chunk(b"tEXt", b"k%d\0" % i + bytes(60_000)) for i in range(30)]), "longer than a picture"),
    "two receipts": (with_chunks(*2 * [chunk(b"tEXt", CHUNK.encode() + b"\0{}")]), "two texts have the key"),
    "no end of key": (with_chunks(chunk(b"tEXt", b"diffusion")), "is no text"),
    "no flags": (with_chunks(chunk(b"iTXt", b"diffusion\0")), "is no text"),
    "not UTF-8": (said(b"\xff\xfe"), "is no text"),
    "a list": (said([]), "is not a receipt"),
    "not JSON": (said(b"{"), "is not a receipt"),
    "a number of a million digits": (said(b"1" * 60_000), "is not a receipt"),
    "a name twice": (said(canonical_json(GOOD)[:-1] + b',"seed":2}'), "given twice"),
    "text for a number": (said(GOOD | {"seed": "1"}), "seed: it is no whole number"),
    "a truth for a number": (said(GOOD | {"image": True}), "image: it is no whole number"),
    "not finite": (said(canonical_json(GOOD).replace(b'"guidance":1.0', b'"guidance":NaN')), "guidance"),
    "too many steps": (said(GOOD | {"steps": 10**9}), "steps: it must be at most"),
    "two kinds of receipts": (
        with_chunks(*[chunk(b"tEXt", key + b"\0{}") for key in (b"diffusion", b"diffusion-edit")]), "several receipts"),
    "a restoration without a task": (
        with_chunks(chunk(b"tEXt", b"diffusion-restore\0" + canonical_json(REWORK))), "task is missing"),
    "an edit that says it is a restoration": (
        with_chunks(chunk(b"tEXt", b"diffusion-edit\0" + canonical_json(REWORK | {"task": "inpainting", "way": "trained"}))),
        "it is of the command restore"),
    "a path for a digest": (said(GOOD | {"bundle_digest": "../" * 21 + "x"}), "bundle_digest: it must match"),
    "unknown": (said(GOOD | {"follow": "/etc/passwd"}), "follow: it is not known"),
    "millions of pixels": (
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", struct.pack(">IIBBBBB", 2**30, 2**30, 8, 2, 0, 0, 0))
        + said(GOOD)[33:], "too many pixels"),
}  # fmt: skip


@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_file_is_refused_in_words(name: str, tmp_path: Path, diffusion) -> None:
    data, words = HOSTILE[name]
    (tmp_path / "p.png").write_bytes(data)
    with pytest.raises(ValueError, match=words) as refused:
        diffusion("replay", tmp_path / "p.png")
    assert str(tmp_path / "p.png") in str(refused.value)
    assert len(str(refused.value)) < 1_000


def test_the_good_one_beside_them_is_read() -> None:
    assert opened(said(GOOD)).receipt == Receipt(**GOOD)


def test_half_a_file_and_none_are_said(tmp_path: Path, drawn, diffusion) -> None:
    (tmp_path / "half.png").write_bytes(drawn[NAME][:-30])
    with pytest.raises(ValueError, match="truncated"):
        diffusion("replay", tmp_path / "half.png")
    with pytest.raises(ValueError, match="is no file"):
        diffusion("replay", tmp_path / "none.png")
    (tmp_path / "empty.png").touch()
    with pytest.raises(ValueError, match="it is empty"):
        diffusion("replay", tmp_path / "empty.png")
    (tmp_path / "bare.png").write_bytes(encode_png(decode_png(drawn[NAME])))
    with pytest.raises(ValueError, match="no text 'diffusion'"):
        diffusion("replay", tmp_path / "bare.png")


def test_a_receipt_notes_what_the_last_bits_may_depend_on(drawn) -> None:
    receipt = opened(drawn[NAME]).receipt
    assert receipt.torch == torch.__version__
    assert receipt.device == f"cpu {torch.backends.cpu.get_cpu_capability()}"
