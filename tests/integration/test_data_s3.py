"""Datasets in a bucket, looked at, checked, compared and mixed where they are."""

from diffusion.data.compare import difference
from diffusion.data.datasets import find, places, set_latest
from diffusion.data.lint import Finding, lint
from diffusion.data.mix import mix
from diffusion.data.preview import preview
from diffusion.data.reader import ShardReader
from diffusion.data.report import write_report
from diffusion.store.storage import open_storage
from flows.artifact import with_pictures
from tests.made_dataset import Made, published
from tests.s3_server import S3Server

PICTURES = [Made(n, ("cats", "dogs")[n % 2], "holdout" if n > 11 else "train", (f"number {n}",)) for n in range(14)]


def test_every_command_works_in_a_bucket(s3: S3Server) -> None:
    root = open_storage(f"{s3.bucket()}/data")
    a = published(root, PICTURES)
    b = published(root, [*PICTURES[2:], Made(50, "cats"), Made(51, "dogs", "holdout")])
    set_latest(root, b.digest)
    assert find(root, "latest") == find(root, b.uri) == find(root, b.digest[:6]) == b
    assert places(root) == sorted([a.uri, b.uri])
    assert lint(a) == lint(b) == []
    found = difference(a, b)
    assert (found.added, found.removed, found.moved, found.changed) == (2, 2, 0, 0)
    mixed = mix(root, [(a, 1), (b, 3)])
    assert lint(mixed) == []
    assert mixed.whole() == mixed.manifest.ref(mixed.uri)
    assert len(ShardReader(mixed.uri)) == mixed.manifest.images == 23
    write_report(mixed)
    assert "(data:image/jpeg;base64," in with_pictures(mixed.uri, "report.md")


def test_a_preview_reads_parts_of_tars_alone(s3: S3Server) -> None:
    root = open_storage(f"{s3.bucket()}/data")
    made = published(root, PICTURES)
    before = len(s3.requests())
    rows = preview(made, n=2)
    assert {label: len(row) for label, row in rows.items()} == {"cats": 2, "dogs": 2}
    tars = [request for request in s3.requests()[before:] if request.path.endswith(".tar")]
    assert len(tars) == 8
    assert {request.status for request in tars} == {206}


def test_damage_in_a_bucket_is_named(s3: S3Server) -> None:
    root = open_storage(f"{s3.bucket()}/data")
    made = published(root, PICTURES)
    first, second = made.manifest.shards[:2]
    root.remove(first.tar)
    root.put(second.index, root.read(second.index)[:-1] + b"x")
    assert lint(made) == [
        Finding(first.tar, "", "is missing"),
        Finding(second.index, "", "differs from the manifest's sha256"),
    ]
