"""`diffusion schedule`: a deployment of the line on this machine, which fires by itself."""

import asyncio
import os
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from uuid import UUID

import httpx
from prefect.client.orchestration import get_client
from prefect.client.schemas.filters import DeploymentFilter, FlowRunFilter
from prefect.client.schemas.objects import ConcurrencyLimitConfig, ConcurrencyLimitStrategy, FlowRun
from prefect.client.schemas.schedules import CronSchedule
from prefect.client.schemas.sorting import FlowRunSort
from prefect.deployments.runner import EntrypointType, RunnerDeployment
from prefect.runner import Runner
from pydantic import ValidationError

from diffusion.recipe import Recipe
from diffusion.store.lease import leased
from diffusion.store.refs import DatasetRef
from diffusion.store.storage import StorageUnavailable, open_storage
from flows.console import say, seconds, warn
from flows.preflight import Until
from flows.site import Site

_POLL_S = 5.0  # of the runner for runs that are due
_END_S = 60.0  # runs in progress get 30 s to end from Prefect
_TAG = "diffusion"


def schedule_of(cron: str, timezone: str) -> CronSchedule:
    """When to fire.  Raises ValueError saying what a cron line is."""
    try:
        return CronSchedule(cron=cron, timezone=timezone)
    except (ValidationError, ValueError) as error:
        first = error.errors()[0] if isinstance(error, ValidationError) else {"loc": ("cron",), "msg": str(error)}
        if "timezone" in first["loc"]:
            raise ValueError(f"--timezone {timezone}: no such time zone; a name as Europe/Berlin, or UTC") from None
        raise ValueError(
            f"--cron {cron!r}: minute, hour, day of the month, month and day of the week, as '0 3 * * *', every night at"
            " three, or '30 */6 * * 1-5'"
        ) from None


def deployment_of(
    recipe: Recipe,
    source: str,
    until: Until,
    dataset: DatasetRef | None,
    init: str | None,
    warm: bool,
    schedule: CronSchedule,
) -> RunnerDeployment:
    """The line as a deployment: one run at a time, and one that comes due meanwhile is cancelled, for the next finds what it
    would have found."""
    from flows.pipeline import pipeline

    parameters = {
        "recipe": recipe.model_dump(mode="json"),
        "source": str(Path(source).resolve()) if Path(source).exists() else source,
        "until": until,
        "dataset": dataset and dataset.model_dump(mode="json"),
        "init": init,
        "warm": warm,
    }
    return pipeline.to_deployment(
        name=recipe.name,
        schedule=schedule,
        paused=False,
        parameters=parameters,
        concurrency_limit=ConcurrencyLimitConfig(limit=1, collision_strategy=ConcurrencyLimitStrategy.CANCEL_NEW),
        tags=[_TAG, recipe.name],
        description=f"The line of the model {recipe.name}",
        entrypoint_type=EntrypointType.MODULE_PATH,
    )


class Serving(threading.Thread):
    """Prefect's runner, in a thread: it takes no signal there, and has its own loop."""

    def __init__(self, deployment: RunnerDeployment, *, pause: bool) -> None:
        super().__init__(daemon=True, name="runner")
        self.deployment = deployment
        self.runner = Runner(name=deployment.name, limit=None, pause_on_shutdown=pause, query_seconds=_POLL_S)
        self.id: UUID | None = None
        self.error: BaseException | None = None
        self._loop: asyncio.AbstractEventLoop | None = None
        self._known = threading.Event()

    def run(self) -> None:
        try:
            asyncio.run(self._serve())
        except BaseException as error:
            self.error = error
        finally:
            self._known.set()

    async def _serve(self) -> None:
        self._loop = asyncio.get_running_loop()
        self.id = await self.runner.aadd_deployment(self.deployment)
        self._known.set()
        await self.runner.start()

    def check(self) -> None:
        """Raises what ended it."""
        if self.error is not None:
            raise RuntimeError(f"Prefect's runner ended: {self.error}") from self.error

    def known(self) -> UUID:
        """The deployment's id, once Prefect knows it."""
        self._known.wait()
        self.check()
        return self.id

    def stop(self) -> None:
        """End what runs, which is noted as cancelled, then the runner."""
        if self._loop is not None and self.is_alive() and self.runner.started:
            with suppress(Exception):
                asyncio.run_coroutine_threadsafe(self.runner.astop(), self._loop).result(_END_S)
        self.join(_END_S)


class Watching:
    """Says of each run when it ends, and of each that died that it has: of those of before, too."""

    def __init__(self, serving: Serving, site: Site) -> None:
        from flows.living import Graves

        self.serving, self._graves = serving, Graves(site)
        self._running: dict[UUID, str] = {}
        self._ended = {run.id for run in self._runs() if run.state and run.state.is_final()}

    def look(self) -> None:
        self.serving.check()
        with suppress(StorageUnavailable):  # at the next look
            self._graves.look()
        with suppress(httpx.HTTPError):
            self._tell()

    def _tell(self) -> None:
        for run in reversed(self._runs()):
            state = run.state
            if state is None or run.id in self._ended:
                continue
            if state.is_final():
                self._ended.add(run.id)
                took = seconds(run.total_run_time.total_seconds())
                word = f"{time.strftime('%H:%M')} {run.name}: {state.name.lower()} after {took}"
                if state.is_completed():
                    say(f"  {word}")
                else:
                    warn(f"{word}. {' '.join((state.message or '').split())[:300]}")
            elif state.is_running() and run.id not in self._running:
                self._running[run.id] = run.name
                say(f"  {time.strftime('%H:%M')} {run.name}: begins")

    def _runs(self) -> list[FlowRun]:
        with get_client(sync_client=True) as client:
            return client.read_flow_runs(
                deployment_filter=DeploymentFilter(id={"any_": [self.serving.known()]}),
                flow_run_filter=FlowRunFilter(state={"type": {"not_any_": ["SCHEDULED"]}}),
                sort=FlowRunSort.START_TIME_DESC,
                limit=20,
            )


@contextmanager
def serving(deployment: RunnerDeployment, site: Site, *, pause: bool) -> Iterator[Watching]:
    """Fire the deployment for the length of the block."""
    with ExitStack() as stack:
        thread = Serving(deployment, pause=pause)
        thread.start()
        stack.callback(thread.stop)
        thread.known()
        yield Watching(thread, site)


def run_now(deployment_id: UUID) -> None:
    """Have a run begin without waiting for the cron's hour."""
    with get_client(sync_client=True) as client:
        client.create_flow_run_from_deployment(deployment_id)


@contextmanager
def alone(site: Site) -> Iterator[None]:
    """One server of our own and its schedule in a home.  Raises ValueError where another has it."""
    try:
        with leased(open_storage(site.store), "schedule", patience_s=0):
            yield
    except TimeoutError as error:
        owner = str(error).partition(" does this work")[0]
        raise ValueError(
            f"{owner} schedules in {site.home} already. Several lines share a Prefect server: start one with `prefect server"
            " start`, and name it to each with PREFECT_API_URL"
        ) from None


def handed_on(site: Site) -> None:
    """What was given as options goes to the runs, which are processes of their own, in the environment."""
    os.environ["DIFFUSION_HOME"] = str(site.home)
    os.environ["DIFFUSION_PORT"] = str(site.port)
    if site.workers is not None:
        several = isinstance(site.workers, tuple)
        os.environ["DIFFUSION_WORKERS"] = ":".join(map(str, site.workers)) if several else str(site.workers)
