"""Checkpoints copied to a real S3 server through a faulty network, and brought back to an empty folder."""

import pytest

from diffusion.store.storage import StorageRefused, open_storage
from diffusion.training.copies import bring_newest, copies_in, remove, send, send_missing
from flows.preflight import check
from flows.site import Site
from tests.faulty_proxy import FLIPPED, FaultyProxy
from tests.test_checkpoint import runs, trained  # noqa: F401  (fixtures: two checkpoints, at 12 and 24)
from tests.test_copies import SECOND, files
from tests.test_step import emoji  # noqa: F401

pytestmark = pytest.mark.usefixtures("one_thread")
FAULTS = ("reset", "reset after", "500", "503", "truncated")


def test_a_faulty_network_changes_no_byte(s3, runs, tmp_path_factory, monkeypatch):  # noqa: F811
    copies = open_storage(f"{s3.bucket()}/models/checkpoints")
    with FaultyProxy(s3.url, seed=3, rate=0.4, kinds=FAULTS) as proxy:
        monkeypatch.setenv("AWS_ENDPOINT_URL", proxy.url)
        send_missing(runs, copies)
        sent = sum(proxy.injected.values())
        assert sent >= 3
        proxy.kinds, proxy.in_a_row = (*FAULTS, FLIPPED), 1
        for name in ("once", "again"):
            folder = tmp_path_factory.mktemp(name)
            bring_newest(folder, copies, lambda event: None)
            assert files(folder / SECOND) == files(runs / SECOND)
        assert proxy.injected[FLIPPED]
        send(runs / SECOND, copies)  # in place of what is there
        remove({SECOND}, copies)
        assert len(copies_in(copies)) == 1


def test_a_bucket_that_is_not_there_is_refused_before_anything_is_made(s3, tiny_recipe, tmp_path):
    site = Site(home=tmp_path, runs="s3://no-such-bucket/models")
    with pytest.raises(StorageRefused, match="no-such-bucket"):
        check(tiny_recipe, "embedded", "register", site)
