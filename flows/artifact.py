"""Pages for Prefect's artifacts: they lie in its database, so their pictures are inside and small."""

import base64
import re
from io import BytesIO

from PIL import Image

from diffusion.store.storage import open_storage

_PICTURE_PIXELS = 800  # longest side


def with_pictures(uri: str, name: str) -> str:
    """The Markdown page `name` in the folder or bucket `uri`, with its pictures inside: Prefect's page reads no files."""
    storage = open_storage(uri)
    return re.sub(
        r"\(([\w-]+\.png)\)", lambda found: f"({_inline(storage.read(found[1]))})", storage.read(name).decode()
    )


def _inline(data: bytes) -> str:
    picture = Image.open(BytesIO(data)).convert("RGB")
    picture.thumbnail((_PICTURE_PIXELS, _PICTURE_PIXELS))
    small = BytesIO()
    picture.save(small, "JPEG", quality=85)
    return f"data:image/jpeg;base64,{base64.b64encode(small.getvalue()).decode()}"
