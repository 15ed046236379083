"""`diffusion verify` of a data root in a real bucket: what was spoilt or removed there is named, and nothing is written."""

from diffusion.lineage.looks_at_data import looks_at_data
from diffusion.lineage.verify import verify
from diffusion.store.storage import open_storage
from tests.made_dataset import Made, published
from tests.s3_server import S3Server


def test_damage_in_a_bucket_is_named(s3: S3Server) -> None:
    root = open_storage(f"{s3.bucket()}/data")
    dataset = published(root, [Made(look) for look in range(9)] + [Made(20, split="holdout")])

    def found() -> list[tuple[str, str]]:
        return [(f.kind, f.place) for f in verify(list(looks_at_data(root)), progress=lambda done, total: None)]

    assert found() == []
    before = {one.name: one.mark for one in root.walk()}
    first, second, *_ = dataset.manifest.shards
    tar = bytearray(root.read(first.tar))
    tar[700] ^= 1
    root.put(first.tar, bytes(tar))
    root.remove(second.index)
    assert found() == [("damaged", f"{root.uri}/{first.tar}"), ("missing", f"{root.uri}/{second.index}")]
    after = {one.name: one.mark for one in root.walk()}
    assert {name for name in before if before[name] != after.get(name)} == {first.tar, second.index}
