"""Tasks for actors of Ray Data that each hold something costly: a model, an encoder."""

from collections.abc import Callable, Iterator

from diffusion.adapters.ray_data import failure, fault, quiet

Work = Callable[[str], dict]  # a task -> plain values, in the same columns for every task

_CPUS = 0.5  # that an actor claims: actors that claim every CPU leave none to the tasks that feed them, and all wait
_WAVE = 1_024  # tasks given to Ray at once; the next ones get new actors


def on_actors(
    make: Callable[[str], Work], setup: str, tasks: list[str], nothing: dict, *, actors: int, gpus: int, what: str
) -> Iterator[dict]:
    """`map(make(setup), tasks)` on up to `actors` actors of one thread, or `gpus` GPUs, each; results as they are done.

    make: called once in each actor.  nothing: a result's columns without values.  what: the tasks, for people.
    Raises a `failure` where a task or `make` raises.
    """
    import ray

    for start in range(0, len(tasks), _WAVE):
        wave = tasks[start : start + _WAVE]
        with quiet():
            rows = ray.data.from_items([{"task": task} for task in wave], override_num_blocks=len(wave))
            done = rows.map(
                _Actor,
                fn_constructor_args=(make, setup, nothing),
                compute=ray.data.ActorPoolStrategy(size=min(actors, len(wave)), max_tasks_in_flight_per_actor=2),
                num_cpus=_CPUS,
                num_gpus=gpus,
            )
            for row in done.iter_rows():
                if row["error"]:
                    raise failure(row, f"{what} task failed in an actor")
                yield row


class _Actor:
    """Work behind rows of plain values: arrays of many shapes share no column."""

    def __init__(self, make: Callable[[str], Work], setup: str, nothing: dict) -> None:
        self.make, self.setup, self.nothing = make, setup, nothing
        self.work: Work | None = None  # made by the first task, whose row can carry an error; a constructor cannot

    def __call__(self, row: dict) -> dict:
        try:
            if self.work is None:
                self.work = self.make(self.setup)
            return self.work(row["task"]) | {"error": "", "traceback": ""}
        except Exception as error:  # Ray would wrap it in pages of its own and lose the cause
            return self.nothing | fault(error)
