"""A command of this program as a job of a Ray cluster: its driver runs there, so that this machine need not be a node."""

import asyncio
import shlex
import time
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING

from diffusion.adapters.ray_cluster import sent

if TYPE_CHECKING:
    from ray.job_submission import JobSubmissionClient

_PROGRAM = ("python", "-c", "from flows.cli import main; main()")
_PATIENCE_S = 60.0


def run_job(
    address: str, words: Sequence[str], variables: Mapping[str, str], *, ship: bool, tell: Callable[[str], None]
) -> int:
    """Run `diffusion WORDS` on the cluster whose jobs are taken at `address`, http://HOST:PORT.  Returns its exit code.

    variables: of the job's environment, beside the cluster's; whoever sees Ray's state can read them.  ship: send this
    program.  tell: gets the lines that the job says.  A KeyboardInterrupt stops the job.  Raises ConnectionError.
    """
    from ray.job_submission import JobSubmissionClient

    try:
        client = JobSubmissionClient(address)
        job = _submitted(
            client, shlex.join([*_PROGRAM, *words]), {"env_vars": dict(variables)} | (sent() if ship else {})
        )
    except (ConnectionError, RuntimeError) as error:
        why = " ".join(str(error).split())[:300]
        raise ConnectionError(
            f"the cluster at {address} takes no job ({why}): `diffusion doctor` says what to do"
        ) from error
    try:
        asyncio.run(_follow(client, job, tell))
        while not client.get_job_status(job).is_terminal():  # its last words come a moment before
            time.sleep(0.1)
    except KeyboardInterrupt:
        client.stop_job(job)
        raise
    code = client.get_job_info(job).driver_exit_code
    return 1 if code is None else code


def _submitted(client: "JobSubmissionClient", entrypoint: str, runtime_env: dict) -> str:
    """A cluster that has just started, or is busy, has nobody yet to take a job."""
    deadline = time.monotonic() + _PATIENCE_S
    while True:
        try:
            return client.submit_job(entrypoint=entrypoint, runtime_env=runtime_env)
        except RuntimeError as error:
            if "No available agent" not in str(error) or time.monotonic() > deadline:
                raise
        time.sleep(1)


async def _follow(client: "JobSubmissionClient", job: str, tell: Callable[[str], None]) -> None:
    rest = ""
    async for piece in client.tail_job_logs(job):
        *lines, rest = (rest + piece).split("\n")
        for line in lines:
            tell(line)
    if rest:
        tell(rest)
