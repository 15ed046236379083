"""What all stages share: finished work is not done twice, nor by two at a time, and says why it is not done again."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Generic, TypeVar

from prefect.runtime import flow_run

from diffusion.recipe import Frozen, digest_of
from diffusion.store.lease import Claim, leased
from diffusion.store.refs import DatasetRef, EvaluationRef, ModelRef, ReportRef, RunRef, SweepRef
from diffusion.store.storage import open_storage
from diffusion.store.works import recall, remember
from flows.console import say, seconds, ticked, warn
from flows.foreground import ending_soon
from flows.living import living
from flows.site import Site

Ref = TypeVar("Ref", DatasetRef, RunRef, SweepRef, EvaluationRef, ReportRef, ModelRef)


class Done(Frozen, Generic[Ref]):
    """A stage's reference, and whether it took any work; where not, why."""

    stage: str
    ref: Ref
    seconds: float
    reused: bool
    why: str = ""


def once(
    stage: str,
    key: str,
    kind: type[Ref],
    site: Site,
    make: Callable[[], Ref],
    *,
    now: Callable[[Ref], Ref | None] = lambda ref: ref,
    tell: Callable[[Ref], object] | None = None,
    same: str = "the same inputs, the same recipe",
    place: str | None = None,
) -> Done[Ref]:
    """The reference of the work `key`: recalled where it is finished, made and remembered where not.

    now: a recalled reference as it stands today, None where what it names is gone from outside the store.  tell: others of
    what was made, before the work is finished; where that fails the next try tells and makes nothing.  same: why it is not
    done again, for people.  place: folder or s3://bucket/prefix that all who might do this work share [the store].

    Of several processes that want the same work one does it and the others wait, then take its result: who asked for a
    model gets it, and need not come again.
    """
    started = time.monotonic()

    def known() -> Ref | None:
        ref = recall(site.store, key, kind)
        return ref and now(ref)

    with ending_soon():
        ref = known()  # what is finished needs no lease
        reused = ref is not None
        if ref is None:
            with living(site), _alone(stage, key, place or str(site.store)):
                ref = known()
                reused = ref is not None
                if ref is None:
                    ref = make() if tell is None else _made(key, kind, site, make)
                    if tell is not None:
                        tell(ref)
                    remember(site.store, key, ref)
    done = Done[kind](
        stage=stage, ref=ref, seconds=time.monotonic() - started, reused=reused, why=same if reused else ""
    )
    ticked(f"{stage:<9} " + (f"done before, not done again: {same}" if reused else seconds(done.seconds)))
    return done


def _made(key: str, kind: type[Ref], site: Site, make: Callable[[], Ref]) -> Ref:
    """What `make` gives, noted at once under a key of its own, or what that note says."""
    made = digest_of({"made": key})
    return recall(site.store, made, kind) or remember(site.store, made, make())


@contextmanager
def _alone(stage: str, key: str, place: str) -> Iterator[None]:
    def wait(owner: Claim) -> None:
        say(f"  {stage:<9} {owner.words} does this work already: waiting for it")

    with leased(open_storage(place), key, holds=str(flow_run.id or ""), wait=wait) as lease:
        yield
        if lease.lost:
            warn(
                f"{stage:<9} this process was halted meanwhile, and another may have done the same work: nothing is lost"
            )
