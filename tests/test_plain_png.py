"""What is unpacked by zlib alone is what OpenCV reads, and what OpenCV refuses is refused in its words."""

import struct
import tracemalloc
from zlib import Z_SYNC_FLUSH, adler32, compress, compressobj, crc32, decompressobj

import cv2
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from diffusion.data.pictures import decode, plain_png
from diffusion.data.pictures.decode import decode_rows
from diffusion.data.pictures.encode import encode_png
from diffusion.data.pictures.plain_png import decode_plain

HEIGHT, WIDTH = 5, 7
LINE = 3 * WIDTH + 1
STRATEGIES = (
    cv2.IMWRITE_PNG_STRATEGY_DEFAULT,
    cv2.IMWRITE_PNG_STRATEGY_FILTERED,
    cv2.IMWRITE_PNG_STRATEGY_HUFFMAN_ONLY,
    cv2.IMWRITE_PNG_STRATEGY_RLE,
    cv2.IMWRITE_PNG_STRATEGY_FIXED,
)
FILTERS = (
    cv2.IMWRITE_PNG_FILTER_NONE,
    cv2.IMWRITE_PNG_FILTER_SUB,
    cv2.IMWRITE_PNG_FILTER_UP,
    cv2.IMWRITE_PNG_FILTER_AVG,
    cv2.IMWRITE_PNG_FILTER_PAETH,
    cv2.IMWRITE_PNG_ALL_FILTERS,
)


def pixels_of(levels: int, seed: int, height: int = HEIGHT, width: int = WIDTH) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, levels, (height, width, 3), dtype=np.uint8)


def lines_of(pixels: np.ndarray) -> bytearray:
    """As they are packed: a filter, none, before each line."""
    return bytearray(np.pad(pixels.reshape(len(pixels), -1), ((0, 0), (1, 0))).tobytes())


def chunk(kind: bytes, body: bytes) -> bytes:
    return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", crc32(kind + body))


def flushed(lines: bytes) -> bytes:
    """As we pack them: one stream with what others pack, behind or before it."""
    packing = compressobj()
    return packing.compress(lines) + packing.flush(Z_SYNC_FLUSH) + packing.flush()


def png_of(*packed: bytes, interlaced: int = 0, before: bytes = b"", after: bytes = b"") -> bytes:
    header = struct.pack(">IIBBBBB", WIDTH, HEIGHT, 8, 2, 0, 0, interlaced)
    chunks = (chunk(b"IHDR", header), before, *(chunk(b"IDAT", part) for part in packed), after, chunk(b"IEND", b""))
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunks)


def read(pictures: list[bytes], height: int = HEIGHT, width: int = WIDTH) -> tuple[np.ndarray, dict[int, str]]:
    """Into every other row of a batch, from the end; of the bad ones, whose rows are undefined, what is said."""
    places = [2 * n for n in range(len(pictures))][::-1]
    out = np.full((2 * len(pictures), height, width, 3), 7, np.uint8)
    bad = {place: f"{error.kind}: {error}" for place, error in decode_rows(pictures, out, places).items()}
    out[list(bad)] = 0
    return out, bad


def same_by_opencv(
    pictures: list[bytes], height: int = HEIGHT, width: int = WIDTH
) -> tuple[np.ndarray, dict[int, str]]:
    """What is read, and that it is what OpenCV makes of all of them."""
    found, bad = read(pictures, height, width)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(decode, "decode_plain", lambda pictures, out, places, known: list(range(len(pictures))))
        expected, expected_bad = read(pictures, height, width)
    assert bad == expected_bad
    assert np.array_equal(found, expected)
    return found, bad


@given(
    size=st.tuples(st.integers(1, 40), st.integers(1, 40)),
    ways=st.lists(
        st.tuples(
            st.sampled_from(STRATEGIES), st.sampled_from(FILTERS), st.integers(0, 9), st.sampled_from([1, 2, 8, 256])
        ),
        min_size=1,
        max_size=6,
    ),
    seed=st.integers(0, 2**32 - 7),
)
@settings(max_examples=60, deadline=None)
def test_every_way_of_packing_gives_its_pixels(size, ways, seed):
    pictures = [pixels_of(levels, seed + n, *size) for n, (*_, levels) in enumerate(ways)]
    data = []
    for pixels, (strategy, filtered, level, _) in zip(pictures, ways, strict=True):
        flags = [
            cv2.IMWRITE_PNG_COMPRESSION,
            level,
            cv2.IMWRITE_PNG_STRATEGY,
            strategy,
            cv2.IMWRITE_PNG_FILTER,
            filtered,
        ]
        data.append(cv2.imencode(".png", pixels[..., ::-1], flags)[1].tobytes())
    found, bad = same_by_opencv(data + [encode_png(pixels) for pixels in pictures], *size)
    assert not bad
    assert np.array_equal(found[::2][::-1], pictures + pictures)
    assert (found[1::2] == 7).all()


def test_drawings_as_we_write_them_need_no_opencv_and_photographs_do():
    drawings = [np.repeat(pixels_of(8, n, 16, 4), 4, 1) for n in range(200)]  # a few runs of what is copied at once
    out = np.empty((200, 16, 16, 3), np.uint8)
    assert decode_plain([memoryview(encode_png(pixels)) for pixels in drawings], out, range(200)) == []
    assert np.array_equal(out, drawings)
    mixed = [encode_png(pixels) for pixels in (drawings[0], pixels_of(256, 0, 16, 16), drawings[1])]
    assert decode_plain(mixed, out, [0, 1, 2]) == [1]
    large = np.repeat(pixels_of(8, 0, 200, 40), 5, 1)  # more than deflate remembers
    assert decode_plain([encode_png(large)] * 2, one_and_other := np.empty((2, 200, 200, 3), np.uint8), [1, 0]) == []
    assert (one_and_other == large).all()


def test_of_bytes_whose_sum_was_compared_the_chunks_own_is_not_looked_at_and_the_pixels_sum_is():
    pixels, out = np.repeat(pixels_of(8, 0, 16, 4), 4, 1), np.empty((1, 16, 16, 3), np.uint8)
    data = encode_png(pixels)
    for place, taken in ((-13, True), (-17, False)):  # in the chunk's sum, in that of what is packed
        other = bytearray(data)
        other[place] ^= 1
        assert decode_plain([bytes(other)], out, [0]) == [0]
        assert decode_plain([bytes(other)], out, [0], known=True) == ([] if taken else [0])
    assert np.array_equal(out[0], pixels)


def test_drawings_as_we_write_them_are_unpacked_together_and_others_one_by_one(monkeypatch):
    calls = []
    monkeypatch.setattr(plain_png, "decompressobj", lambda bits: calls.append(bits) or decompressobj(bits))
    ours = [encode_png(np.repeat(pixels_of(8, n, HEIGHT, 1), WIDTH, 1)) for n in range(50)]
    same_by_opencv(ours)
    assert len(calls) == 1
    plain = odd_pictures()["not flushed"]
    same_by_opencv([plain] * 50)
    assert len(calls) == 51


def test_nothing_is_unpacked_beyond_the_pixels():
    """What a hostile shard may hold: 16 MiB in 16 KiB."""
    data = png_of(flushed(bytes(lines_of(pixels_of(4, 0))) + bytes(2**24)))
    tracemalloc.start()
    try:
        same_by_opencv([data, data])
        assert tracemalloc.get_traced_memory()[1] < 2**20
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("window", [256, 2**15])
def test_a_way_back_farther_than_the_window_that_is_told_is_opencvs_to_judge(window):
    height = 40
    lines = bytes(lines_of(np.concatenate([pixels_of(256, 1, height // 2)] * 2)))  # the way back: half a picture
    packed = bytearray(compress(lines, 6))
    packed[0] = 0x08 | (window.bit_length() - 9) << 4
    packed[1] = 0x80 + (-(packed[0] * 256 + 0x80)) % 31
    header = struct.pack(">IIBBBBB", WIDTH, height, 8, 2, 0, 0, 0)
    chunks = chunk(b"IHDR", header), chunk(b"IDAT", bytes(packed)), chunk(b"IEND", b"")
    data = b"\x89PNG\r\n\x1a\n" + b"".join(chunks)
    same_by_opencv([data], height)
    out = np.empty((1, height, WIDTH, 3), np.uint8)
    assert decode_plain([data], out, [0]) == ([0] if window < len(lines) else [])


def odd_pictures() -> dict[str, bytes]:
    """Nearly plain, each in one thing not; all would be unpacked but for it."""
    lines = lines_of(pixels_of(4, 0))
    packed = flushed(bytes(lines))
    some_filtered, all_filtered, unknown = bytearray(lines), bytearray(lines), bytearray(lines)
    some_filtered[3 * LINE] = 2
    all_filtered[::LINE] = b"\4" * HEIGHT
    unknown[LINE] = 9
    text = chunk(b"tEXt", b"key\0value")
    raw = compressobj(wbits=-15)
    plain_blocks = raw.compress(bytes(lines)) + raw.flush()
    more = compressobj()
    more_flushed = more.compress(bytes(lines)) + more.flush(Z_SYNC_FLUSH) + more.compress(b"more") + more.flush()
    whole = png_of(packed)
    return {
        "plain": whole,
        "not flushed": png_of(compress(bytes(lines))),
        "flushed, and then more": png_of(more_flushed),
        "flushed behind the last block": png_of(packed[:-6] + b"\3\0" + b"\0\0\0\xff\xff" + packed[-6:]),
        "some lines filtered": png_of(flushed(bytes(some_filtered))),
        "all lines filtered": png_of(flushed(bytes(all_filtered))),
        "an unknown filter": png_of(flushed(bytes(unknown))),
        "in two chunks": png_of(packed[:20], packed[20:]),
        "text before": png_of(packed, before=text),
        "text after": png_of(packed, after=text),
        "transparent": png_of(packed, before=chunk(b"tRNS", bytes(6))),
        "interlaced, it says": png_of(packed, interlaced=1),
        "more behind the pixels": png_of(packed + b"more"),
        "a line too many": png_of(flushed(bytes(lines + bytes(LINE)))),
        "a line too many, not summed": png_of(flushed(bytes(lines + bytes(LINE)))[:-4] + packed[-4:]),
        "a line too few": png_of(flushed(bytes(lines[:-LINE]))),
        "a byte too few": png_of(flushed(bytes(lines[:-1]))),
        "another sum of the pixels": png_of(packed[:-4] + struct.pack(">I", adler32(b"other"))),
        "no sum of the pixels": png_of(packed[:-4]),
        "no header of zlib": png_of(plain_blocks),
        "a small window": png_of(bytes([0x08, 0x9D - (0x089D % 31)]) + packed[2:]),
        "no pixels": png_of(b""),
        "not even a chunk of them": png_of(),
        "two bytes of pixels": png_of(b"\x78\x9c"),
        "another sum of the chunk": whole[:-16] + bytes(4) + whole[-12:],
        "another sum of the header": whole[:29] + bytes(4) + whole[33:],
        "another sum of the end": whole[:-4] + bytes(4),
        "another kind of chunk": whole[:37] + b"IDAT"[::-1] + whole[41:],
        "something behind the end": whole + b"something",
        "no end": whole[:-12],
        "a chunk longer than the file": whole[:33] + struct.pack(">I", len(whole)) + whole[37:],
        "a chunk shorter than the file says": whole[:33] + struct.pack(">I", len(packed) - 3) + whole[37:],
    }


@pytest.mark.parametrize("name", odd_pictures())
def test_what_is_nearly_plain_means_what_it_means_to_opencv(name):
    data, plain = odd_pictures()[name], odd_pictures()["plain"]
    found, bad = same_by_opencv([data, plain, data])
    assert np.array_equal(found[2], pixels_of(4, 0))  # its neighbour has what is its own
    assert bad.keys() in (set(), {0, 4})
    out = np.empty((2, HEIGHT, WIDTH, 3), np.uint8)
    alone, first, last = (decode_plain(pictures, out, [0, 1]) for pictures in ([data], [data, plain], [plain, data]))
    assert alone == first == [number - 1 for number in last]  # whether it is plain is its own, too


def test_a_picture_has_nothing_of_its_neighbours():
    """One that packs a byte too much is not completed by one that packs too little, and none reaches back into another."""
    lines, others = bytes(lines_of(pixels_of(4, 0))), bytes(lines_of(pixels_of(256, 1)))
    much, little = png_of(flushed(lines + b"\0")), png_of(flushed(others[1:]))
    whole = {name: png_of(flushed(own)) for name, own in (("lines", lines), ("others", others))}
    reaching = compressobj(wbits=-15, zdict=others)
    body = reaching.compress(others) + reaching.flush(Z_SYNC_FLUSH) + reaching.flush()
    assert len(body) < 30  # a way back
    reaching = png_of(b"\x78\x9c" + body + struct.pack(">I", adler32(lines)))
    found, bad = same_by_opencv([much, little, whole["others"], reaching, whole["lines"]])
    assert bad.keys() - {8} == {2, 6}  # OpenCV passes over what is too much
    for place, own in ((4, others), (0, lines)):
        assert bytes(lines_of(found[place])) == own


@given(
    st.sampled_from([encode_png(np.repeat(pixels_of(8, 1, HEIGHT, 1), WIDTH, 1)), odd_pictures()["plain"]]), st.data()
)
@settings(max_examples=100, deadline=None)
def test_damage_is_told_as_opencv_tells_it(data, draw):
    cut = data[: draw.draw(st.integers(0, len(data)))]
    changed = bytearray(data)
    # OpenCV makes room for what a chunk says of its length before it looks: of IDAT's first byte, for up to 4 GiB
    place = draw.draw(st.integers(0, len(data) - 1).filter(lambda place: place != 33))
    changed[place] ^= draw.draw(st.integers(1, 255))
    mended = bytearray(changed)  # its chunk's checksum made right again
    mended[-16:-12] = struct.pack(">I", crc32(mended[37:-16]))
    same_by_opencv([cut, bytes(changed), data, bytes(mended), data])
