"""A lease on a real S3 server: one at a time, a killed process's ends, and nothing needs writing on a condition."""

import signal

from diffusion.store.lease import leased
from diffusion.store.s3 import S3Prefix
from tests.s3_server import S3Server
from tests.test_lease import one_at_a_time, owner, there


def test_one_has_it_at_a_time(s3: S3Server):
    one_at_a_time(S3Prefix(f"{s3.bucket()}/site"), threads=3, turns=3)


def test_the_lease_of_a_killed_process_ends_at_once(s3: S3Server):
    storage = S3Prefix(s3.bucket())
    with owner(storage, 60) as process:
        process.send_signal(signal.SIGKILL)
        process.wait()
        with leased(storage, "work", patience_s=0):
            assert len(there(storage)) == 1
    assert there(storage) == []
