"""The endpoint on Ray Serve: replicas that each hold an engine and the HTTP application around it.

A deployment names one bundle by digest; no alias is looked up after that.  A new one is loaded beside the old, tests
itself, and takes over; one that cannot is refused and the old goes on.
"""

import json
import logging
import logging.handlers
import socket
import time
import urllib.request
from pathlib import Path

import ray
from fastapi import FastAPI
from pydantic import Field
from ray import serve
from ray.serve.config import HTTPOptions
from ray.serve.exceptions import RayServeException
from ray.serve.schema import ApplicationStatus, LoggingConfig

from diffusion.adapters.http import create_app, seen
from diffusion.adapters.ray_serve_replicas import FILL, Replicas, least, options
from diffusion.recipe import Frozen, ServeRecipe
from diffusion.serving.engine import Engine
from diffusion.serving.keys import Access
from diffusion.store.bundle import load_bundle
from diffusion.store.refs import ModelRef

APP = "diffusion"
_ANYBODY = Access()
_LOAD_TIMEOUT_S = 300
_QUIET = LoggingConfig(log_level="WARNING", enable_access_log=False)


class DeployFailed(RuntimeError):
    """The new model does not serve.  The message says why and what serves instead."""


class Deployed(Frozen):
    """What a deployment is made of.  Equal ones need no second deployment."""

    model: ModelRef
    limits: ServeRecipe
    replicas: Replicas
    cpus: float = Field(gt=0)
    gpus: float = Field(ge=0)
    idle_s: float = Field(60, ge=0)
    access: Access = Access()
    log: Path | None = Field(None, description="File that gets a line of JSON a request")


@serve.deployment(name="images", logging_config=_QUIET)
@serve.ingress()
class Images:
    """One replica: verifies and loads the pinned bundle, proves its batch sizes, tests itself, then serves."""

    def __init__(self, deployed: dict) -> None:
        self.deployed = Deployed.model_validate(deployed)
        model, limits = self.deployed.model, self.deployed.limits
        bundle = load_bundle(model.uri, "cuda" if self.deployed.gpus else "cpu", digest=model.digest)
        self.engine = Engine.serving(bundle, limits)
        self.self_test = self.engine.self_test()
        self.engine.start()
        if self.deployed.log is not None:
            _log_to(self.deployed.log)

    def __serve_build_asgi_app__(self) -> FastAPI:
        deployed = self.deployed
        return create_app(
            self.engine,
            deployed.model,
            deployed.limits,
            self_test=self.self_test,
            access=deployed.access,
            echoes=False,  # Serve's proxy makes ids and adds them
            replica=serve.get_replica_context().replica_id.unique_id,
        )

    def check_health(self) -> None:
        if not self.engine.alive():
            raise RuntimeError("the engine stopped or is stuck in a network call")

    def record_autoscaling_stats(self) -> dict[str, float]:
        """What Serve tells `ray_serve_replicas.enough`."""
        load = self.engine.load()
        return {FILL: (load["drawing"] + load["waiting"]) / load["slots"]}

    def describe(self) -> dict:
        """What this replica is made of, as plain values."""
        return self.deployed.model_dump(mode="json")

    def __del__(self) -> None:
        if hasattr(self, "engine"):
            self.engine.stop()


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
) -> str:
    """Serve this model and nothing else at http://host:port, in the Ray that is connected.  Returns that URL.

    replicas: so many, or the least and the most: then as many as the pictures that are drawn and wait fill, and one goes
    when fewer would have done for idle_s.  cpus, gpus: of each replica, also shares; a rolling change needs room for as many
    replicas again.  The same model with the same limits is left running.  access: who may ask; each replica reads the file
    of keys and counts what they use for itself.
    log: each replica appends a line a request to it.

    Raises ValueError for a port that cannot be had, DeployFailed when the model does not load or fails its self-test; then
    the model that served before serves on.
    """
    if not ray.is_initialized():
        raise ValueError("no Ray is connected: call this inside `with local_ray(...)` or after `ray.init(address=...)`")
    logging.getLogger("ray.serve").setLevel(logging.ERROR)
    wanted = Deployed(
        model=model, limits=limits, replicas=replicas, cpus=cpus, gpus=gpus, idle_s=idle_s, access=access, log=log
    )
    url, before, status = f"http://{host}:{port}", deployed(), _status()
    if before == wanted and status == ApplicationStatus.RUNNING:
        _check_address(url)
        return url
    if not serve.status().proxies:
        _start(host, port)
    try:
        _run(wanted)
        _check_address(url)
    except DeployFailed as error:
        outcome = "Nothing is served."
        if before is not None:
            # the old replicas still serve, but one that restarts would be of the new kind: make the old wanted again
            _run(before)
            outcome = f"Version {before.model.version} goes on."
        elif status is None:
            serve.delete(APP)
        raise DeployFailed(f"{model.name} version {model.version} does not serve: {error} {outcome}") from None
    return url


def _log_to(file: Path) -> None:
    """Requests leave their lines at the end of this file; one that is moved away is made anew."""
    file.parent.mkdir(parents=True, exist_ok=True)
    handler = logging.handlers.WatchedFileHandler(file, encoding="utf-8")
    handler.setFormatter(logging.Formatter("%(message)s"))
    seen.log.handlers, seen.log.propagate = [handler], False
    seen.log.setLevel(logging.INFO)


def deployed() -> Deployed | None:
    """What is served in the connected Ray now, if anything."""
    if _status() is None:
        return None
    try:
        return Deployed.model_validate(serve.get_app_handle(APP).describe.remote().result(timeout_s=30))
    except (RayServeException, TimeoutError):
        return None


def undeploy() -> None:
    """Stop serving: requests in flight are answered, then the replicas, Serve's own processes and the port are gone.

    Ray may print "Task ServeController... failed" twice, which is harmless.  Not needed before Ray itself is shut down.
    """
    if _status() is not None:
        serve.delete(APP)
    serve.shutdown()


def _start(host: str, port: int) -> None:
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError as error:
            raise ValueError(f"{host}:{port} cannot be bound ({error.strerror}): choose another port") from None
    # request_timeout_s stays None: it would cut answers off in the middle; the engine has its own deadline
    serve.start(proxy_location="HeadOnly", http_options=HTTPOptions(host=host, port=port), logging_config=_QUIET)


def _run(wanted: Deployed) -> None:
    """Make `wanted` the application and wait until all of its replicas serve.  Raises DeployFailed."""
    images = Images.options(**options(wanted.replicas, wanted.cpus, wanted.gpus, wanted.idle_s, wanted.limits))
    application = images.bind(wanted.model_dump(mode="json"))
    target = serve.RunTarget(application, name=APP, route_prefix="/", logging_config=_QUIET)
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


def _check_address(url: str) -> None:
    """That our application answers there: Serve keeps the address it was first started with."""
    try:
        with urllib.request.urlopen(f"{url}/healthz", timeout=30) as answer:
            json.load(answer)["bundle_digest"]
    except (OSError, ValueError, KeyError) as error:
        raise DeployFailed(
            f"nothing of ours answers at {url} ({error}). Serve keeps the address it was started with: run"
            f" `undeploy` before changing it."
        ) from None
