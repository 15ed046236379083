"""How fast shards are written, beside webdataset.ShardWriter: `python -m tests.benchmarks.bench_write`.

Raw: ready PNGs of 64 px with class, facts and caption into shards, one process; GNU tar over the same members as files is
the limit.  Work: photographs decoded, cropped, resized by the same Lanczos filter, encoded as PNG of 64 px and written, by
two processes or two threads; beside the same without writing, and beside Pillow and webdataset.ShardWriter in two
processes.  They are so many that a process's start, thousands of page faults, does not count.  Sides take turns; ratios are
of one turn's seconds, of the clock and of the processors, and medians count.  How far either side's resized pixels are from
the filter's values is printed, too.
The clock decides; where other programs share the cores, the processors' seconds say what it would have been.
"""

import argparse
import io
import multiprocessing
import os
import statistics
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import webdataset
from PIL import Image

from diffusion.data.pictures.decode import decode_all
from diffusion.data.pictures.encode import encode_png
from diffusion.data.pictures.fit import fit
from diffusion.data.shards import PackedSample, write_shard
from diffusion.recipe import canonical_json
from tests.photographs import photograph
from tests.test_fit import lanczos

RAW_LIMIT, WRITING_LIMIT, PEER_LIMIT = 4.0, 0.9, 2.5
RESOLUTION, SHARD = 64, 1_000


def facts_of(i: int) -> dict:
    return {"source": f"class-{i % 10}/{i:06d}.png", "label": f"class-{i % 10}", "captions": [[f"picture {i}", 1.0]]}


def packed(images: Iterable[bytes]) -> Iterator[PackedSample]:
    for i, image in enumerate(images):
        yield PackedSample(f"{i:032d}", i % 10, facts_of(i), image)


def write_ours(images: Iterable[bytes], folder: Path) -> None:
    write_shard(folder, "train", packed(images))


def write_webdataset(images: Iterable[bytes], folder: Path) -> None:
    """All members are bytes already, and nothing is left to its encoder to find out."""
    with webdataset.ShardWriter(f"{folder}/%06d.tar", maxcount=10**9, verbose=0, encoder=False) as writer:
        for i, image in enumerate(images):
            facts = facts_of(i)
            texts = {
                "cls": str(i % 10).encode(),
                "json": canonical_json(facts),
                "txt": facts["captions"][0][0].encode(),
            }
            writer.write({"__key__": f"{i:032d}", "png": image, **texts})


def nowhere(images: Iterable[bytes], folder: Path) -> None:
    for _ in images:
        pass


def square_ours(data: bytes) -> bytes:
    return encode_png(fit(decode_all(data), size=(RESOLUTION, RESOLUTION), background="#ffffff"))


def square_pillow(data: bytes) -> bytes:
    image = Image.open(io.BytesIO(data)).convert("RGB")
    side = min(image.size)
    left, top = (image.width - side) // 2, (image.height - side) // 2
    image = image.crop((left, top, left + side, top + side))
    if side != RESOLUTION:
        image = image.resize((RESOLUTION, RESOLUTION), Image.Resampling.LANCZOS)
    out = io.BytesIO()
    image.save(out, "PNG")
    return out.getvalue()


Seconds = dict[str, list[tuple[float, float]]]  # of each side and turn: by the clock, of the processors
Square, Write = Callable[[bytes], bytes], Callable[[Iterable[bytes], Path], None]


def in_processes(files: list[bytes], square: Square, write: Write, folder: Path) -> None:
    """Two processes with half of the files each; the shards of each are its own."""
    context = multiprocessing.get_context("fork")
    workers = [
        context.Process(target=_write_half, args=(files[half::2], square, write, folder / f"{half}")) for half in (0, 1)
    ]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
        assert worker.exitcode == 0


def _write_half(files: list[bytes], square: Square, write: Write, folder: Path) -> None:
    folder.mkdir()
    for start in range(0, len(files), SHARD):
        write(map(square, files[start : start + SHARD]), folder)


def in_threads(files: list[bytes], square: Square, write: Write, folder: Path) -> None:
    with ThreadPoolExecutor(2) as pool:
        for start in range(0, len(files), SHARD):
            write(pool.map(square, files[start : start + SHARD]), folder)


def turns(sides: dict[str, Callable[[Path], None]], rounds: int, place: str | None) -> Seconds:
    """Every side in each of `rounds` turns, each turn in another order."""
    seconds: Seconds = {name: [] for name in sides}
    names = list(sides)
    for turn in range(rounds):
        for name in names[turn % len(names) :] + names[: turn % len(names)]:
            with tempfile.TemporaryDirectory(dir=place) as folder:
                start, used = time.perf_counter(), sum(os.times()[:4])
                sides[name](Path(folder))
                seconds[name].append((time.perf_counter() - start, sum(os.times()[:4]) - used))
    return seconds


def ratio(seconds: Seconds, slow: str, fast: str, of: int = 0) -> float:
    """of: 0 the clock, 1 the processors."""
    return statistics.median(a[of] / b[of] for a, b in zip(seconds[slow], seconds[fast], strict=True))


def show(seconds: Seconds, pictures: int) -> None:
    for name, values in seconds.items():
        clock, used = (statistics.median(value[of] for value in values) for of in (0, 1))
        print(f"  {name:24s} {pictures / clock:8.0f} pictures/s {1e6 * used / pictures:8.0f} us of processor each")


def raw(pictures: int, rounds: int, place: str | None) -> float:
    images = [encode_png(photograph(RESOLUTION, seed)) for seed in range(64)] * (pictures // 64)
    with tempfile.TemporaryDirectory(dir=place) as members:
        for sample in packed(images):
            texts = (str(sample.label).encode(), canonical_json(sample.facts), sample.facts["captions"][0][0].encode())
            for extension, data in zip(("cls", "json", "txt", "png"), (*texts, sample.image), strict=True):
                (Path(members) / f"{sample.key}.{extension}").write_bytes(data)
        tar = ["tar", "--create", "--format=ustar", "--directory", members, "."]
        sides = {
            "ours": lambda folder: write_ours(images, folder),
            "webdataset": lambda folder: write_webdataset(images, folder),
            "GNU tar": lambda folder: subprocess.run([*tar, "--file", folder / "all.tar"], check=True),
        }
        seconds = turns(sides, rounds, place)
    print(f"\nraw copy of {len(images)} PNGs of 64 px, one process")
    show(seconds, len(images))
    found = ratio(seconds, "webdataset", "ours")
    print(
        f"  ours is {found:.2f} x webdataset (limit {RAW_LIMIT}; of the processors"
        f" {ratio(seconds, 'webdataset', 'ours', 1):.2f}), {ratio(seconds, 'GNU tar', 'ours'):.2f} x GNU tar"
    )
    return found / RAW_LIMIT


def work(name: str, files: list[bytes], rounds: int, place: str | None) -> float:
    sides: dict[str, Callable[[Path], None]] = {
        "Pillow + webdataset": lambda f: in_processes(files, square_pillow, write_webdataset, f)
    }
    for how, spread in (("processes", in_processes), ("threads", in_threads)):
        sides[f"ours, 2 {how}"] = lambda folder, spread=spread: spread(files, square_ours, write_ours, folder)
        sides[f"  unwritten, 2 {how}"] = lambda folder, spread=spread: spread(files, square_ours, nowhere, folder)
    seconds = turns(sides, rounds, place)
    print(f"\n{len(files)} {name} of {statistics.mean(map(len, files)) / 1024:.1f} KiB -> PNG of 64 px in shards")
    show(seconds, len(files))
    scores = []
    for how in ("processes", "threads"):
        writing = [ratio(seconds, f"  unwritten, 2 {how}", f"ours, 2 {how}", of) for of in (0, 1)]
        peer = [ratio(seconds, "Pillow + webdataset", f"ours, 2 {how}", of) for of in (0, 1)]
        most = ratio(seconds, "Pillow + webdataset", f"  unwritten, 2 {how}")
        print(
            f"  2 {how}: {peer[0]:.2f} x Pillow + webdataset (limit {PEER_LIMIT}; of the processors {peer[1]:.2f}; unwritten"
            f" {most:.2f}), {writing[0]:.1%} of the same unwritten (limit {WRITING_LIMIT:.0%}; of the processors"
            f" {writing[1]:.1%})"
        )
        scores.append(min(peer[0] / PEER_LIMIT, writing[0] / WRITING_LIMIT))
    return max(scores)


def stages(name: str, files: list[bytes]) -> None:
    """Microseconds a picture of each stage, one thread."""
    pictures = [decode_all(data) for data in files]
    squares = [fit(picture, size=(RESOLUTION, RESOLUTION), background="#ffffff") for picture in pictures]
    opened = [Image.open(io.BytesIO(data)).convert("RGB") for data in files]
    size = (RESOLUTION, RESOLUTION)
    rows = {
        "decode": (lambda i: decode_all(files[i]), lambda i: Image.open(io.BytesIO(files[i])).convert("RGB")),
        "resize": (
            lambda i: fit(pictures[i], size=(RESOLUTION, RESOLUTION), background="#ffffff"),
            lambda i: opened[i].resize(size, Image.Resampling.LANCZOS),
        ),
        "encode": (lambda i: encode_png(squares[i]), lambda i: Image.fromarray(squares[i]).save(io.BytesIO(), "PNG")),
    }
    print(f"\nmicroseconds of one of {name}: ours, Pillow")
    for stage, sides in rows.items():
        times = []
        for side in sides:
            best = []
            for _ in range(5):
                start = time.perf_counter()
                for i in range(len(files)):
                    side(i)
                best.append((time.perf_counter() - start) / len(files) * 1e6)
            times.append(min(best))
        print(f"  {stage:8s} {times[0]:8.0f} {times[1]:8.0f}")


def quality(files: list[bytes]) -> None:
    """How far resized pixels are from the filter's values, root mean square in levels of 255: rounding alone gives 0.289."""
    distances = {"ours": [], "Pillow": []}
    for data in files:
        picture = decode_all(data)
        filters = [lanczos(side, RESOLUTION) for side in picture.shape[:2]]
        exact = np.einsum("yi,xj,ijc->yxc", *filters, picture.astype(float), optimize=True).clip(0, 255)
        size = (RESOLUTION, RESOLUTION)
        resized = {
            "ours": fit(picture, size=size, background="#ffffff"),
            "Pillow": np.asarray(Image.fromarray(picture).resize(size, Image.Resampling.LANCZOS)),
        }
        for side, pixels in resized.items():
            distances[side].append(np.square(pixels - exact).mean())
    for side, squares in distances.items():
        print(f"  resize: {side} is {statistics.mean(squares) ** 0.5:.3f} levels from the filter's values")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pictures", type=int, default=4_000)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--folder", help="where to write; the default is the system's for temporary files")
    options = parser.parse_args()
    jpegs = []
    for seed in range(32):
        out = io.BytesIO()
        Image.fromarray(photograph(256, seed)).save(out, "JPEG", quality=85)
        jpegs.append(out.getvalue())
    pngs = []
    for seed in range(64):
        out = io.BytesIO()
        Image.fromarray(photograph(RESOLUTION, seed)).save(out, "PNG")
        pngs.append(out.getvalue())
    stages("JPEG of 256 px", jpegs)
    quality(jpegs)
    stages("PNG of 64 px", pngs)
    scores = [
        raw(2 * options.pictures, options.rounds, options.folder),
        work("JPEGs of 256 px", jpegs * (options.pictures // 32), options.rounds, options.folder),
        work("PNGs of 64 px", pngs * (2 * options.pictures // 64), options.rounds, options.folder),
    ]
    print(f"\nsmallest share of a limit {min(scores):.2f}: {'passed' if min(scores) >= 1 else 'FAILED'}")
    raise SystemExit(min(scores) < 1)


if __name__ == "__main__":
    main()
