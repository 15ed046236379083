"""That an engine still draws what it drew when it was loaded.

Memory fails, and a weight that was hit shows in no exception: pictures are finite, and others than they were.  So one known
picture is drawn again now and then, among those that are asked for, and held to its digest.  Pictures that others ask for
prove nothing, since nobody knows what they should be.
"""

import logging
import threading
import time
import weakref
from concurrent.futures import CancelledError
from typing import TYPE_CHECKING

from diffusion.serving.receipt import pixels_sha256
from diffusion.serving.request import GenerateRequest, resolve
from diffusion.serving.ticket import DrawingFailed, EngineStopped
from diffusion.store.bundle_spec import BundleSpec

if TYPE_CHECKING:
    from diffusion.serving.engine import Engine

_log = logging.getLogger(__name__)


def known(spec: BundleSpec) -> GenerateRequest:
    """The picture: one, in few steps."""
    prompt = "a picture" if spec.text else None
    return GenerateRequest(label=spec.classes[0], prompt=prompt, seed=0, steps=None if spec.lesson else 4)


class Proof:
    """Of one engine, which drew `sha256` a moment ago.  One that is found to draw another picture is stopped."""

    def __init__(self, engine: "Engine", sha256: str) -> None:
        self._engine = weakref.ref(engine)  # which has this: its memory is to go with its last picture
        self.sha256 = sha256
        self.at = time.monotonic()  # when it was last proved
        self.failure: str | None = None
        self._drawing = threading.Lock()  # held while the picture is on its way

    @classmethod
    def of(cls, engine: "Engine") -> "Proof":
        """Have the picture drawn alone and among others: it must be finite and the same.  Raises DrawingFailed."""
        spec, probe = engine.bundle.spec, known(engine.bundle.spec)
        # of different lengths and samplers; a student knows but one way
        steps = (None, None) if spec.lesson else (3, 2)
        other = GenerateRequest(seed=1, steps=steps[0], sampler="ddim")
        more = GenerateRequest(label=probe.label, n=2, steps=steps[1])
        alone = pixels_sha256(engine.generate([probe])[0][0])
        among = pixels_sha256(engine.generate([other, probe, more])[1][0])
        if alone != among:
            raise DrawingFailed(f"self-test: the same request gave {alone[:12]} alone and {among[:12]} among others")
        return cls(engine, alone)

    @property
    def age_s(self) -> float:
        """Seconds since it was proved."""
        return time.monotonic() - self.at

    def renew(self, every_s: float) -> None:
        """Have the picture drawn where the proof is as old as this.  Returns at once: it waits among the others, though no
        queue is too full for it."""
        engine = self._engine()
        if (
            engine is not None
            and self.failure is None
            and self.age_s >= every_s
            and self._drawing.acquire(blocking=False)
        ):
            threading.Thread(target=self._draw, args=(engine,), name="diffusion-proof", daemon=True).start()

    def _draw(self, engine: "Engine") -> None:
        spec = engine.bundle.spec
        try:
            (ticket,) = engine.draw([engine.job(resolve(known(spec), spec))])
            sha256 = pixels_sha256(ticket.future.result()[0])
            if sha256 == self.sha256:
                self.at = time.monotonic()
            else:
                self._fail(engine, f"it drew {sha256[:12]} where it had drawn {self.sha256[:12]} when it was loaded")
        except (CancelledError, EngineStopped):
            pass
        except Exception as error:  # of any kind: it could be drawn when it was loaded
            self._fail(engine, str(error))
        finally:
            self._drawing.release()

    def _fail(self, engine: "Engine", why: str) -> None:
        self.failure = why
        _log.error("the engine is stopped: %s", why)
        engine.stop()
