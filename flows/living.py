"""Flow runs that died without a word.  Who lives says so beside the data; who comes next tells Prefect of those that do not.

Prefect learns of a run's end from the run itself, or from what started it.  Where both are killed, as with the machine, the
run would be `Running` for ever, and would keep the only place that its deployment has.
"""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from uuid import UUID

import httpx
from prefect.client.orchestration import SyncPrefectClient, get_client
from prefect.client.schemas.filters import FlowRunFilter
from prefect.client.schemas.objects import FlowRun
from prefect.exceptions import ObjectNotFound
from prefect.runtime import flow_run
from prefect.states import Cancelled, Crashed

from diffusion.store.lease import Claim, Watch, claimed, clear, machine
from diffusion.store.storage import Storage, open_storage
from flows.console import warn
from flows.notify import notify
from flows.site import Site

_KEY = "run"
_told: set[str] = set()  # flow runs that this process says of that they live


@contextmanager
def living(site: Site) -> Iterator[None]:
    """Say for the length of the block that this flow run lives, and tell Prefect of those that died.  Outside of a flow run,
    and within another such block, nothing is done."""
    run = flow_run.id
    if run is None or run in _told:
        yield
        return
    graves = Graves(site)
    graves.look(run)
    _told.add(run)
    try:
        with claimed(graves.storage, _KEY, holds=run):
            yield
            graves.settle(run)
    finally:
        _told.discard(run)


class Graves:
    """Looks for flow runs that died, and has them told to Prefect."""

    def __init__(self, site: Site) -> None:
        self.storage: Storage = open_storage(site.data_root)
        self._watch = Watch(self.storage, _KEY)
        self._claims: dict[str, Claim] = {}
        self._beats: dict[str, int] = {}  # where each was seen first

    def look(self, own: str | None = None) -> None:
        """Tell Prefect of those that are known to have died by now; not of a run that another process has begun anew, as one
        that was moved to another machine, nor of our own."""
        self._claims = self._watch.look()
        for name, claim in self._claims.items():
            self._beats.setdefault(name, claim.beat)
        gone = self._watch.gone()
        alive = {claim.holds for name, claim in self._claims.items() if name not in gone} | {own}
        for name in gone:
            claim = self._claims.pop(name, None)
            if claim is None or not claim.holds or claim.holds in alive or _buried(claim):
                clear(self.storage, name)

    def settle(self, but: str) -> None:
        """Of those on other machines wait until they have beaten, or are known to have died: a minute, and seldom at all,
        for a deployment has one run at a time.  but: not of this run."""
        while any(
            claim.machine != machine() and claim.beat == self._beats[name] and claim.holds != but
            for name, claim in self._claims.items()
        ):
            time.sleep(2)
            self.look()


def _buried(claim: Claim) -> bool:
    """Whether Prefect knows now that this run has ended."""
    try:
        with get_client(sync_client=True) as client:
            _bury(client, client.read_flow_run(UUID(claim.holds)), claim)
    except ObjectNotFound:  # it is another server's
        return False
    except httpx.HTTPError as error:
        warn(f"a run that died could not be told to Prefect ({error}): the next one tells it")
        return False
    return True


def _bury(client: SyncPrefectClient, run: FlowRun, claim: Claim) -> None:
    words = f"{claim.words} ended without a word"
    if run.state is None or not run.state.is_final():
        cancelled = run.state is not None and run.state.is_cancelling()
        client.set_flow_run_state(run.id, Cancelled(message=words) if cancelled else Crashed(message=words))
        warn(f"the run {run.name} died: {words}")
        if not cancelled:
            notify("failed", f"{run.name}: {words}", run=run.name, state="Crashed")
    for task in client.read_task_runs(flow_run_filter=FlowRunFilter(id={"any_": [run.id]})):
        if task.state is not None and not task.state.is_final():  # it is not under way any more, either
            client.set_task_run_state(task.id, Crashed(message=words), force=True)
