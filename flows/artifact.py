"""Pages for Prefect's artifacts: they lie in its database, so their pictures are inside and small."""

import base64
import re
import time
from contextlib import suppress
from io import BytesIO

import httpx
from PIL import Image
from prefect.artifacts import create_progress_artifact, update_progress_artifact

from diffusion.store.storage import open_storage

_PICTURE_PIXELS = 800  # longest side
_PROGRESS_EVERY_S = 15.0  # each is a request to Prefect's server


def with_pictures(uri: str, name: str = "", page: str | None = None) -> str:
    """The Markdown page `name`, in the folder or bucket `uri`, with its pictures inside: Prefect's page reads no files.
    page: its text, where it does not lie there."""
    storage = open_storage(uri)
    text = storage.read(name).decode() if page is None else page
    return re.sub(r"\(([\w-]+\.png)\)", lambda found: f"({_inline(storage.read(found[1]))})", text)


class Progress:
    """How far a stage is, as a bar among Prefect's artifacts.  It is made with the first report.  Where Prefect does not
    answer it stands still: no work is lost for it."""

    def __init__(self, key: str, description: str) -> None:
        self.key, self.description = key, description
        self._made = None
        self._told = 0.0

    def __call__(self, done: int, total: int) -> None:
        now = time.monotonic()
        if self._made is not None and done < total and now - self._told < _PROGRESS_EVERY_S:
            return
        self._told, percent = now, 100 * done / max(total, 1)
        with suppress(httpx.HTTPError, RuntimeError):  # a RuntimeError: its client cannot start
            if self._made is None:
                self._made = create_progress_artifact(percent, key=self.key, description=self.description)
            else:
                update_progress_artifact(self._made, progress=percent, description=self.description)


def _inline(data: bytes) -> str:
    picture = Image.open(BytesIO(data)).convert("RGB")
    picture.thumbnail((_PICTURE_PIXELS, _PICTURE_PIXELS))
    small = BytesIO()
    picture.save(small, "JPEG", quality=85)
    return f"data:image/jpeg;base64,{base64.b64encode(small.getvalue()).decode()}"
