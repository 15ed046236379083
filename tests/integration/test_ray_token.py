"""A Ray of our own lets in who has its token, which lies in the home for its owner alone, and nobody else."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

PROGRAM = (
    "import sys; from ray._raylet import GcsClient; print(len(GcsClient(address=sys.argv[1]).get_all_node_info()))"
)


@pytest.mark.parametrize(
    ("sent", "let_in"),
    [
        ({}, True),
        ({"RAY_AUTH_MODE": "disabled"}, False),
        ({"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": "0" * 64}, False),
    ],
)
def test_ray_wants_its_token(ray_local: None, sent: dict[str, str], let_in: bool) -> None:
    import ray

    assert os.environ["RAY_AUTH_MODE"] == "token"
    token = Path(os.environ["RAY_AUTH_TOKEN_PATH"])
    assert token.stat().st_mode & 0o777 == 0o600
    assert len(token.read_text()) == 64
    address = ray.get_runtime_context().gcs_address
    asked = subprocess.run(
        [sys.executable, "-c", PROGRAM, address], env=os.environ | sent, capture_output=True, text=True, timeout=120
    )
    assert (asked.returncode == 0) == let_in, asked.stderr
    assert asked.stdout.strip() == ("1" if let_in else "")
    assert let_in or "Unauthenticated" in asked.stderr or "AuthenticationError" in asked.stderr
