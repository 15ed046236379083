import io

import numpy as np
import pytest
from PIL import Image

from diffusion.data.images import decode_png, encode_png
from diffusion.serving.receipt import headers, read_receipt, receipt_of, stamp
from diffusion.serving.request import GenerateRequest, resolve
from tests.random_bundle import CLASSES, random_spec, reading_spec

SPEC = random_spec("bf16", "4" * 64, 1)
PICTURE = np.random.default_rng(0).integers(0, 256, (16, 16, 3), dtype=np.uint8)


def receipt(image: int = 0):
    request = resolve(GenerateRequest(label=CLASSES[2], seed=7, n=3), SPEC)
    return receipt_of(PICTURE, image, request, SPEC, bundle_digest="5" * 64, model="tiny", version="2")


def test_round_trip_through_the_png():
    png = stamp(PICTURE, receipt(2))
    assert read_receipt(png) == receipt(2)
    assert np.array_equal(decode_png(png), PICTURE)


def test_same_picture_and_receipt_give_the_same_bytes():
    assert stamp(PICTURE, receipt()) == stamp(PICTURE.copy(), receipt())
    assert stamp(PICTURE, receipt(0)) != stamp(PICTURE, receipt(1))


def test_the_receipt_names_the_whole_lineage_and_request():
    r = receipt(1)
    assert (r.bundle_digest, r.run_digest, r.dataset_digest) == ("5" * 64, SPEC.run_digest, SPEC.dataset_digest)
    assert (r.model, r.version, r.label, r.seed, r.image) == ("tiny", "2", CLASSES[2], 7, 1)
    assert (r.sampler, r.steps, r.guidance) == ("heun", 5, 1.5)


def test_a_changed_pixel_is_found():
    changed = PICTURE.copy()
    changed[3, 4, 1] ^= 1
    with pytest.raises(ValueError, match="changed after"):
        read_receipt(stamp(changed, receipt()))


def test_a_png_without_a_receipt_says_so():
    with pytest.raises(ValueError, match="no text 'diffusion'"):
        read_receipt(encode_png(PICTURE))
    with pytest.raises(ValueError, match="not a receipt"):
        read_receipt(encode_png(PICTURE, {"diffusion": '{"format": 9}'}))
    with pytest.raises(ValueError, match="not a picture"):
        read_receipt(b"hello")


def test_headers_are_ascii_whatever_the_class_is_called():
    values = headers(receipt())
    assert values["X-Diffusion-Label"] == "Stra%C3%9Fe%20%26%20Co"
    assert values["X-Diffusion-Pixels-Sha256"] == receipt().pixels_sha256
    assert all(value.isascii() and value.isprintable() for value in values.values())


def test_a_receipt_states_the_prompt_and_one_without_is_as_it_always_was():
    request = resolve(GenerateRequest(prompt="a très red flag", seed=7), reading_spec())
    said = receipt_of(PICTURE, 0, request, reading_spec(), bundle_digest="6" * 64, model="tiny", version="2")
    assert (said.prompt, said.label) == ("a très red flag", None)
    assert read_receipt(stamp(PICTURE, said)) == said
    assert headers(said)["X-Diffusion-Prompt"] == "a%20tr%C3%A8s%20red%20flag"
    assert "prompt" not in receipt().model_dump()
    assert "X-Diffusion-Prompt" not in headers(receipt())


def test_other_programs_can_read_the_chunk():
    image = Image.open(io.BytesIO(stamp(PICTURE, receipt())))
    assert '"seed":7' in image.text["diffusion"]
