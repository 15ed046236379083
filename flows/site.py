"""Where things run, from the environment and a file.  Nothing here changes a number, so nothing here is hashed."""

import os
import signal
import threading
from collections.abc import Iterator, MutableMapping
from contextlib import AbstractContextManager, ExitStack, contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING

from pydantic import Field, ValidationError, ValidationInfo, field_validator

from diffusion.adapters.ray_cluster import connected, local_ray, ray_environment
from diffusion.data.damage import MAX_DAMAGED
from diffusion.data.reading import Reading
from diffusion.recipe import Frozen, mistake
from diffusion.serving.keys import FILE as KEYS
from diffusion.serving.keys import Access, is_loopback
from diffusion.store.scrub import holds_password
from diffusion.store.storage import open_storage
from flows.console import waiting
from flows.site_file import DEFAULT, PREFIX, Setting, hidden, settings

if TYPE_CHECKING:
    from diffusion.adapters.mlflow_tracking import Tracking

JOBS = ("http://", "https://")  # how the address of a cluster that takes jobs begins
_INSTEAD = {  # of a password in an address
    "mlflow": "set MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD, or PGPASSWORD for a database",
    "prefect": "set PREFECT_API_AUTH_STRING",
    "ray": "set RAY_AUTH_MODE=token and RAY_AUTH_TOKEN_PATH",
}


class Site(Frozen):
    """Folders, addresses and sizes of one installation.  Each field is the variable DIFFUSION_<FIELD> in capitals, and a key
    of the file `site.toml`, see `flows.site_file`.  It holds no secret: Prefect shows it to whoever sees a run."""

    home: Path = Field(Path(".diffusion"), validate_default=True, description="The only folder that is written to")
    data: str | None = Field(
        None, description="Folder or s3://bucket/prefix that datasets are published to; none: in the home"
    )
    runs: str | None = Field(
        None,
        description="Folder or s3://bucket/prefix that checkpoints are copied to as well; none: they are in the home",
    )
    bundles: str | None = Field(
        None,
        description="Folder or s3://bucket/prefix that registered weights are put to, past MLflow; none: in MLflow",
    )
    keep_last: int | None = Field(None, ge=2, description="Newest checkpoints of a run that stay; none: all stay")
    keep_images: int | None = Field(None, ge=1, description="With keep_last: one in so many images stays, too")
    validation: bool | None = Field(
        None,
        description="Measure checkpoints beside training, on the CPU; none: where it trains on GPUs, or for keep_best",
    )
    keep_best: int | None = Field(
        None, ge=1, description="With keep_last: so many stay, too, whose Frechet distance beside training was lowest"
    )
    workers: int | tuple[int, int] | None = Field(
        None, description="Training workers, or LEAST:MOST of them; none: one per GPU, or 2 on a CPU"
    )
    gpu: bool | None = Field(None, description="Train and serve on GPUs; none: where there are any")
    recompute: bool = Field(False, description="Train in less memory and a third more time, to the same bits")
    shard_weights: bool = Field(
        False, description="Divide weights, gradients, optimizer and averages over the training workers (FSDP2)"
    )
    host: str = Field("127.0.0.1", description="Address the endpoint listens on; beyond loopback it wants keys")
    open: bool = Field(False, description="Let anybody ask an endpoint beyond loopback where there are no keys")
    port: int = Field(7777, ge=1, le=65_535, description="Port of the endpoint")
    replicas: int | tuple[int, int] = Field(
        1, description="Replicas of the endpoint, or LEAST:MOST of them, as many as the pictures that wait need"
    )
    replica_gpus: float = Field(1, gt=0, description="GPUs of each replica that serves on them; 0.5: two share one")
    idle_s: float = Field(60, ge=0, description="Seconds that fewer replicas would do until one goes")
    models_mib: int = Field(4_096, ge=1, description="MiB of weights that a replica holds, of more models than one")
    mlflow: str | None = Field(None, description="MLflow tracking URI; none: an SQLite file in the home")
    ray: str | None = Field(None, description="Address of a Ray cluster; none: one of our own, for as long as needed")
    ray_ship: bool = Field(False, description="Send this program to the cluster's nodes, where they do not have it")
    prefect: str | None = Field(
        None, description="Address of a Prefect server, with /api; none: a temporary one for each command"
    )

    shard_copies_mib: int = Field(20_480, ge=1, description="MiB of local copies of shards whose dataset is on S3")
    max_damaged: float = Field(
        MAX_DAMAGED, ge=0, lt=1, description="Share of the training pictures that may be damaged before a run stops"
    )

    @field_validator("home")
    @classmethod
    def _absolute(cls, home: Path) -> Path:
        return home.expanduser().absolute()

    @field_validator("data", "runs", "bundles")
    @classmethod
    def _whole(cls, place: str | None) -> str | None:
        return place and open_storage(place).uri

    @field_validator("mlflow", "prefect", "ray")
    @classmethod
    def _without_password(cls, address: str | None, info: ValidationInfo) -> str | None:
        if address and holds_password(address):
            instead = _INSTEAD[info.field_name]
            raise ValueError(f"a site holds no password, for Prefect shows it: leave it out, and {instead}")
        return address or None

    @field_validator("workers", "replicas", mode="before")
    @classmethod
    def _least_and_most(cls, number: object, info: ValidationInfo) -> object:
        if isinstance(number, str):
            parts = number.split(":")
            if len(parts) > 2 or not all(part.isascii() and part.isdigit() for part in parts):
                raise ValueError("neither a number, as 4, nor a least and a most, as 2:8")
            number = int(parts[0]) if len(parts) == 1 else tuple(map(int, parts))
        bounds = number if isinstance(number, list | tuple) else [number]
        if number is not None and not (1 <= bounds[0] <= bounds[-1]):
            does = "train" if info.field_name == "workers" else "serve"
            raise ValueError(f"at least one must {does}, and the most come after the least")
        return number

    @field_validator("replica_gpus")
    @classmethod
    def _share_or_whole(cls, gpus: float) -> float:
        if gpus > 1 and gpus != int(gpus):
            raise ValueError("a share of one GPU, as 0.5, or a whole number of them")
        return gpus

    @field_validator("keep_images", "keep_best")
    @classmethod
    def _beside_the_last(cls, number: int | None, info: ValidationInfo) -> int | None:
        if number is not None and info.data.get("keep_last") is None:
            raise ValueError("all checkpoints stay without DIFFUSION_KEEP_LAST: say how many of the newest do")
        return number

    @field_validator("keep_best")
    @classmethod
    def _judged(cls, best: int | None, info: ValidationInfo) -> int | None:
        if best is not None and info.data.get("validation") is False:
            raise ValueError("none is judged with DIFFUSION_VALIDATION=false: leave that out, or this")
        return best

    @classmethod
    def from_environment(cls, environment: MutableMapping[str, str] = os.environ, **given: object) -> "Site":
        """The site that `given` values, DIFFUSION_* variables and the site's file describe, the first of them that says
        something.  The variables of libraries that the file names are set in `environment`, where they are not set.

        Raises ValueError naming the setting, where it was written, and what it may be.
        """
        said, file = settings(cls.model_fields, environment, given, cls.model_fields["home"].default)
        try:
            site = cls.model_validate({field: setting.value for field, setting in said.items()})
        except ValidationError as error:
            first = error.errors()[0]
            field, what = str(first["loc"][0]), mistake(first)
            written = said.get(field, Setting(None, DEFAULT))
            where = f"{field} in {file.path}" if written.source == str(file.path) else f"{PREFIX}{field.upper()}"
            raise ValueError(
                f"{field}={hidden(field, written.value)}: {what}. It is: {cls.model_fields[field].description} ({where})"
            ) from None
        for name, value in file.environment.items():
            environment.setdefault(name, value)
        return site

    @property
    def store(self) -> Path:
        return self.home / "store"

    @property
    def data_root(self) -> str:
        """Where datasets are published."""
        return self.data or str(self.store)

    @property
    def access(self) -> Access:
        """Who may ask the endpoint."""
        needed = not is_loopback(self.host) and not self.open
        return Access(keys=self.home / KEYS, needed=needed, by_any_name=self.open)

    @property
    def logs(self) -> Path:
        return self.home / "logs"

    @property
    def mlflow_uri(self) -> str:
        return self.mlflow or f"sqlite:///{self.home / 'mlflow.db'}"

    @property
    def use_gpu(self) -> bool:
        if self.gpu is not None:
            return self.gpu
        import torch

        return torch.cuda.is_available()

    @property
    def validates(self) -> bool:
        """Whether checkpoints are measured while training.  On a CPU the workers have all cores; beside GPUs cores wait."""
        if self.validation is None:
            return self.keep_best is not None or self.use_gpu
        return self.validation

    @property
    def train_workers(self) -> int | tuple[int, int]:
        """How many train, or the least and the most."""
        if self.workers is not None:
            return self.workers
        if not self.use_gpu:
            return 2
        import torch

        return torch.cuda.device_count()

    @property
    def most_workers(self) -> int:
        """How many train at most; as many work on what else can be divided."""
        workers = self.train_workers
        return workers[-1] if isinstance(workers, tuple) else workers

    @property
    def reading(self) -> Reading:
        """How datasets are read here."""
        copies = str(self.home / "cache" / "shards")
        return Reading(copies=copies, copies_mib=self.shard_copies_mib, max_damaged=self.max_damaged)

    @property
    def threads(self) -> int:
        """CPU threads of a training worker: the cores are divided.  Part of what makes a run on a CPU bit-reproducible."""
        return max(1, (os.cpu_count() or 1) // self.most_workers)

    def tracking(self, name: str) -> "Tracking":
        """Where the MLflow runs and versions of the model `name` are."""
        from diffusion.adapters.mlflow_tracking import Tracking

        artifacts = None if self.mlflow else str(self.home / "mlflow-artifacts")
        return Tracking(uri=self.mlflow_uri, artifacts=artifacts, experiment=name, bundles=self.bundles)

    def variables(self) -> dict[str, str]:
        """The DIFFUSION_* variables that describe this site."""
        said = self.model_dump(mode="json", exclude_none=True)
        pairs = {name: ":".join(map(str, value)) for name, value in said.items() if isinstance(value, list)}
        return {f"{PREFIX}{name.upper()}": str(pairs.get(name, value)) for name, value in said.items()}

    def environment(self) -> dict[str, str]:
        """Variables that keep every library's files inside `home` and its telemetry off."""
        cache, server = self.home / "cache", {"PREFECT_API_URL": self.prefect} if self.prefect else {}
        ray = ray_environment(self.home / "ray")
        if self.ray:
            del ray["RAY_AUTH_TOKEN_PATH"]  # the cluster has a token of its own, or none
        return {
            **server,
            "PREFECT_HOME": str(self.home / "prefect"),
            "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
            "PREFECT_SERVER_EPHEMERAL_STARTUP_TIMEOUT_SECONDS": "120",  # the first start on a busy machine takes 20 s
            "DO_NOT_TRACK": "1",
            "MPLCONFIGDIR": str(cache / "matplotlib"),
            "TORCHINDUCTOR_CACHE_DIR": str(cache / "inductor"),
            "TRITON_CACHE_DIR": str(cache / "triton"),
            "CUDA_CACHE_PATH": str(cache / "cuda"),
            **ray,
        }

    def prepare(self) -> None:
        """Make `home` and set the variables above that the user has not set.  Before Prefect, Ray or MLflow is imported.

        Raises ValueError for a server of Prefect's whose address holds a password: logs and errors would show it.
        """
        if holds_password(os.environ.get("PREFECT_API_URL", "")):
            instead = _INSTEAD["prefect"]
            raise ValueError(f"PREFECT_API_URL holds a password, which logs would show: leave it out, and {instead}")
        self.store.mkdir(parents=True, exist_ok=True)
        self.logs.mkdir(exist_ok=True)
        for key, value in self.environment().items():
            os.environ.setdefault(key, value)


_kept: ExitStack | None = None


@contextmanager
def keeping_ray() -> Iterator[None]:
    """What a stage in this block starts on Ray stays up until the block ends, instead of until the stage ends."""
    global _kept
    if _kept is not None:
        yield
        return
    try:
        with ExitStack() as _kept:
            yield
    finally:
        _kept = None


def ray_is_kept() -> bool:
    return _kept is not None


@contextmanager
def ray_running(site: Site) -> Iterator[None]:
    """Ray for the length of the block, or of the `keeping_ray` block around it.  It is started when first needed."""
    if _kept is None:
        with _ray(site):
            yield
        return
    import ray

    if not ray.is_initialized():
        with waiting("starting Ray"):
            _kept.enter_context(_ray(site))
    yield


@contextmanager
def _ray(site: Site) -> Iterator[None]:
    ours = signal.getsignal(signal.SIGTERM)
    with ExitStack() as running:
        try:
            running.enter_context(_cluster(site) if site.ray else _local(site))
        except SystemExit:  # of a SIGTERM while it starts: Ray's handler takes the place of ours
            with suppress(SystemExit):
                if callable(ours):
                    ours(
                        signal.SIGTERM, None
                    )  # Prefect's, which knows whether the run is cancelled; or Ray's of before
            raise KeyboardInterrupt from None
        if threading.current_thread() is threading.main_thread():
            # Ray puts its own in its place, which ends the process at once and its children never
            signal.signal(signal.SIGTERM, ours)
        yield


def _local(site: Site) -> AbstractContextManager[None]:
    cores = os.cpu_count() or 1
    # training takes its workers' threads, the rest is for what reads and writes beside them
    return local_ray(site.home / "ray", cpus=max(4, cores, site.most_workers * site.threads + 2))


@contextmanager
def _cluster(site: Site) -> Iterator[None]:
    import ray

    if site.ray.startswith(JOBS):
        raise ValueError(
            f"ray={site.ray} takes jobs: write `diffusion submit` before the command, as in `diffusion submit run`, or give"
            " the address of a head, as HOST:6379, on a machine that is one of its nodes"
        )
    if ray.is_initialized():
        yield
        return
    with connected(site.ray, ship=site.ray_ship):
        yield
