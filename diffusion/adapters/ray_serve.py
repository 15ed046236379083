"""The endpoint on Ray Serve: replicas that each hold an engine and the HTTP application around it.

A deployment names bundles by digest; no alias is looked up after that.  What is offered is Serve's `user_config`, which a
replica that comes later gets as well.  A new one is made ready by each replica beside the old, tests itself, and takes over;
one that cannot is refused and the old goes on.  New replicas take over only where limits or the place change.
"""

import asyncio
import json
import logging
import socket
import time
import urllib.request
from collections.abc import Sequence
from pathlib import Path

import ray
from fastapi import FastAPI
from pydantic import Field
from ray import serve
from ray.exceptions import RayError
from ray.serve import Application
from ray.serve.config import HTTPOptions
from ray.serve.exceptions import RayServeException
from ray.serve.schema import ApplicationStatus, LoggingConfig

from diffusion.adapters.http import create_app, seen
from diffusion.adapters.ray_serve_replicas import FILL, PROVED_EVERY_S, Replicas, least, options
from diffusion.recipe import Frozen, ServeRecipe, digest_of
from diffusion.serving.held import Bundles
from diffusion.serving.keys import Access
from diffusion.serving.lineup import Canary, Lineup
from diffusion.serving.shelf import MIB, Shelf
from diffusion.store.refs import ModelRef

APP = "diffusion"
_ANYBODY = Access()
_LOAD_TIMEOUT_S = 300
_QUIET = LoggingConfig(log_level="WARNING", enable_access_log=False)


class DeployFailed(RuntimeError):
    """The new model does not serve.  The message says why and what serves instead."""


class Deployed(Frozen):
    """What a deployment is made of.  Equal ones need no second deployment."""

    lineup: Lineup
    limits: ServeRecipe
    replicas: Replicas
    cpus: float = Field(1, gt=0)
    gpus: float = Field(ge=0)
    idle_s: float = Field(60, ge=0)
    access: Access = Access()
    log: Path | None = Field(None, description="File that gets a line of JSON a request")
    models_mib: int = Field(4_096, ge=1, description="MiB of weights that a replica may hold")
    notes: Path | None = Field(None, description="Folder of what self-tests drew")

    @property
    def model(self) -> ModelRef:
        """The one that is meant where none is named."""
        return self.lineup.present

    @property
    def place(self) -> dict:
        """What a replica has to end for, to be another, as plain values."""
        return self.model_dump(mode="json", exclude={"lineup", "replicas", "idle_s"})


@serve.deployment(name="images", logging_config=_QUIET)
@serve.ingress()
class Images:
    """One replica: holds the models that are offered, each verified, its batch sizes proven, tested, before it serves."""

    def __init__(self, deployed: dict) -> None:
        self.deployed = Deployed.model_validate(deployed)  # of when the replica was made, but for `reconfigure`
        source = Bundles(self.deployed.limits, "cuda" if self.deployed.gpus else "cpu")
        self.shelf = Shelf(source, room=self.deployed.models_mib * MIB, notes=self.deployed.notes)
        if self.deployed.log is not None:
            seen.write_to(self.deployed.log)

    async def reconfigure(self, deployed: dict) -> None:
        """Offer the lineup of this.  The first is waited for, and where it is refused the replica ends.  Later ones are made
        ready in a thread: Serve sends a replica no requests before this has returned, and ends one where it raises."""
        self.deployed = Deployed.model_validate(deployed)
        if self.shelf.lineup is None:
            await asyncio.to_thread(self.shelf.change, self.deployed.lineup)
        else:
            self.shelf.change_soon(self.deployed.lineup)

    def __serve_build_asgi_app__(self) -> FastAPI:
        deployed = self.deployed
        return create_app(
            self.shelf,
            deployed.limits,
            access=deployed.access,
            echoes=False,  # Serve's proxy makes ids and adds them
            replica=serve.get_replica_context().replica_id.unique_id,
        )

    def check_health(self) -> None:
        for held in self.shelf.held():
            if (proof := held.engine.proof) is not None:
                proof.renew(PROVED_EVERY_S)
                if proof.failure is not None:
                    raise RuntimeError(
                        f"the engine of {held.model.name} {held.model.version} is stopped: {proof.failure}"
                    )
        if not self.shelf.alive():
            raise RuntimeError("the engine stopped or is stuck in a network call")

    def record_autoscaling_stats(self) -> dict[str, float]:
        """What Serve tells `ray_serve_replicas.enough`."""
        load = self.shelf.load()
        return {FILL: (load["drawing"] + load["waiting"]) / load["slots"]}

    def describe(self) -> dict:
        """What this replica is made of, as plain values."""
        return self.deployed.model_dump(mode="json") | {"lineup": self.shelf.state()["lineup"]}

    def refused(self) -> dict | None:
        """The lineup that was refused last, and why, if that is not served since."""
        return self.shelf.state()["refused"]

    def __del__(self) -> None:
        if hasattr(self, "shelf"):
            self.shelf.close()


def deploy(
    model: ModelRef,
    limits: ServeRecipe,
    *,
    host: str = "127.0.0.1",
    port: int,
    replicas: Replicas = 1,
    cpus: float = 1,
    gpus: float = 0,
    idle_s: float = 60,
    access: Access = _ANYBODY,
    log: Path | None = None,
    beside: Sequence[ModelRef] = (),
    canaries: Sequence[Canary] = (),
    models_mib: int = 4_096,
    notes: Path | None = None,
) -> str:
    """Serve this model at http://host:port, in the Ray that is connected.  Returns that URL, where all replicas do.

    beside: others that can be asked for.  canaries: of them versions that get a share of the requests.  models_mib: of
    weights that each replica may hold.  notes: folder of what self-tests drew, to which they are held.

    replicas: so many, or the least and the most: then as many as the pictures that are drawn and wait fill, and one goes
    when fewer would have done for idle_s.  Where only models change the replicas stay, and change them under load.  cpus,
    gpus: of each replica, also shares; a change of these, or of limits, is a rolling one, which needs room for as many
    replicas again.  The same is left running.  access: who may ask; each replica reads the file of keys and counts what
    they use for itself.  log: each replica appends a line a request to it.

    Raises ValueError for a port that cannot be had, DeployFailed when the model does not load or fails its self-test; then
    the model that served before serves on.
    """
    if not ray.is_initialized():
        raise ValueError("no Ray is connected: call this inside `with local_ray(...)` or after `ray.init(address=...)`")
    logging.getLogger("ray.serve").setLevel(logging.ERROR)
    wanted = Deployed(
        lineup=Lineup(models=(model, *beside), canaries=tuple(canaries)),
        limits=limits,
        replicas=replicas,
        cpus=cpus,
        gpus=gpus,
        idle_s=idle_s,
        access=access,
        log=log,
        models_mib=models_mib,
        notes=notes,
    )
    url, before, status = f"http://{host}:{port}", deployed(), _status()
    if before == wanted and status == ApplicationStatus.RUNNING:
        _health(url)
        return url
    if not serve.status().proxies:
        _start(host, port)
    try:
        _run(wanted)
        _health(url)
    except DeployFailed as error:
        outcome = "Nothing is served."
        if before is not None:
            # the old replicas still serve, but one that restarts would be of the new kind: make the old wanted again
            try:
                _run(before)
                outcome = f"Version {before.model.version} goes on."
            except DeployFailed as worse:
                outcome = f"Nor is version {before.model.version} whole again: {worse}"
        elif status is None:
            serve.delete(APP)
        raise DeployFailed(f"{model.name} version {model.version} does not serve: {error} {outcome}") from None
    return url


def deployed() -> Deployed | None:
    """What is served in the connected Ray now, if anything."""
    if _status() is None:
        return None
    try:
        return Deployed.model_validate(serve.get_app_handle(APP).describe.remote().result(timeout_s=30))
    except (RayServeException, TimeoutError):
        return None


def slots(url: str) -> int:
    """How many pictures of the present model a replica there draws at once: each has measured it for itself.  Raises
    DeployFailed where none answers."""
    return _health(url)["slots"]


def undeploy() -> None:
    """Stop serving: requests in flight are answered, then the replicas, Serve's own processes and the port are gone.

    Ray may print "Task ServeController... failed" twice, which is harmless.  Not needed before Ray itself is shut down.
    """
    if _status() is not None:
        serve.delete(APP)
    serve.shutdown()


def drain(timeout_s: float) -> bool:
    """Take no more requests and answer those that are in flight.  Returns whether all were within this time."""
    if _status() is None:
        return True
    serve.delete(APP, _blocking=False)
    deadline = time.monotonic() + timeout_s
    while _status() is not None:
        if time.monotonic() > deadline:
            return False
        time.sleep(0.1)
    return True


def _start(host: str, port: int) -> None:
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError as error:
            raise ValueError(f"{host}:{port} cannot be bound ({error.strerror}): choose another port") from None
    # request_timeout_s stays None: it would cut answers off in the middle; the engine has its own deadline
    serve.start(proxy_location="HeadOnly", http_options=HTTPOptions(host=host, port=port), logging_config=_QUIET)


def application(wanted: Deployed) -> Application:
    """What Serve runs of this."""
    images = Images.options(**options(wanted.replicas, wanted.cpus, wanted.gpus, wanted.idle_s, wanted.limits))
    images = images.options(user_config=wanted.model_dump(mode="json"))
    # Serve keeps replicas of an equal version, and gives each a new number otherwise; it has no public name for it
    images._version = digest_of(wanted.place)
    return images.bind(wanted.model_dump(mode="json"))


def _run(wanted: Deployed) -> None:
    """Make `wanted` the application and wait until all of its replicas serve.  Raises DeployFailed."""
    target = serve.RunTarget(application(wanted), name=APP, route_prefix="/", logging_config=_QUIET)
    serve.run_many([target], wait_for_applications_running=False)
    deadline = time.monotonic() + _LOAD_TIMEOUT_S
    while (status := _status()) != ApplicationStatus.RUNNING:
        if status == ApplicationStatus.DEPLOY_FAILED:
            raise DeployFailed(_reason())
        if time.monotonic() > deadline:
            raise DeployFailed(
                f"it was not ready after {_LOAD_TIMEOUT_S} s. {_reason()} Does the cluster have {wanted.cpus:g} CPUs and"
                f" {wanted.gpus:g} GPUs free for each of {least(wanted.replicas)} new replicas beside the old?"
            )
        time.sleep(0.2)
    _wait_for(wanted.lineup, deadline)


def _wait_for(lineup: Lineup, deadline: float) -> None:
    """Until all replicas offer it.  Raises DeployFailed where one refuses it."""
    images, said = serve.get_app_handle(APP), lineup.model_dump(mode="json")
    while True:
        try:
            refused = [each for each in images.broadcast("refused").results(timeout_s=30) if each is not None]
            offered = [each["lineup"] for each in images.broadcast("describe").results(timeout_s=30)]
        except (RayServeException, RayError, TimeoutError):  # of a replica that ends meanwhile; another takes its place
            refused, offered = [], []
        if reasons := [each["reason"] for each in refused if each["lineup"] == said]:
            raise DeployFailed(reasons[0])
        if offered and all(each == said for each in offered):
            return
        if time.monotonic() > deadline:
            raise DeployFailed(f"not all replicas had loaded it after {_LOAD_TIMEOUT_S} s")
        time.sleep(0.1)


def _status() -> ApplicationStatus | None:
    application = serve.status().applications.get(APP)
    return None if application is None else application.status


def _reason() -> str:
    """Serve's last word on why the deployment fails: the last line of the replica's traceback, or its message."""
    application = serve.status().applications.get(APP)
    if application is None:
        return ""
    messages = [*(deployment.message for deployment in application.deployments.values()), application.message]
    return next((message.strip().splitlines()[-1] for message in messages if message.strip()), "")


def _health(url: str) -> dict:
    """What our application says there.  Raises DeployFailed: Serve keeps the address it was first started with."""
    try:
        with urllib.request.urlopen(f"{url}/healthz", timeout=30) as answer:
            health = json.load(answer)
        return {name: health[name] for name in ("bundle_digest", "slots")}
    except (OSError, ValueError, KeyError) as error:
        raise DeployFailed(
            f"nothing of ours answers at {url} ({error}). Serve keeps the address it was started with: run"
            f" `undeploy` before changing it."
        ) from None
