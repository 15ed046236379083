"""Pictures as answers: JSON with base64, one bare picture, or a stream of events as OpenAI's clients read them."""

import asyncio
import base64
import json
import time
from collections.abc import AsyncGenerator

from fastapi.responses import JSONResponse, Response, StreamingResponse

from diffusion.adapters.http.errors import told
from diffusion.adapters.http.served import Served, Stamped, Work
from diffusion.serving.receipt import Format, encoded, headers
from diffusion.serving.ticket import Preview

_OF_ONE = ("-Image", "-Pixels-Sha256")  # headers of one picture


def one(stamped: list[Stamped], work: Work) -> Response:
    """The only picture, bare."""
    return Response(stamped[0].data, media_type=f"image/{work.format}", headers=headers(stamped[0].receipt))


def many(stamped: list[Stamped], work: Work, served: Served) -> Response:
    """All pictures, with their receipts."""
    shared = {name: value for name, value in headers(stamped[0].receipt).items() if not name.endswith(_OF_ONE)}
    about = {"model": served.model.name, "version": served.model.version, "seed": work.job.request.seed}
    if work.rework is not None and work.rework.notes:
        about["notes"] = list(work.rework.notes)
    about |= {"created": int(time.time()), "output_format": work.format, "data": [_datum(each) for each in stamped]}
    return JSONResponse(about, headers=shared)


def stream(
    events: AsyncGenerator[Preview | list[Stamped], None], kind: str, notes: tuple[str, ...], format: Format
) -> Response:
    """Server-sent events `kind`.partial_image and `kind`.completed.  kind: image_generation or image_edit.

    notes: for people, told with each picture where there are any; format: of the pictures, the previews among them.
    """
    about = {"notes": list(notes)} if notes else {}

    async def lines() -> AsyncGenerator[str, None]:
        try:
            async for event in events:
                if isinstance(event, Preview):
                    data = await asyncio.to_thread(encoded, event.picture, format)
                    shown = {"b64_json": _base64(data), "partial_image_index": event.number}
                    height, width = event.picture.shape[:2]
                    shown |= {"image": event.image, "size": f"{width}x{height}"}
                    yield _event(f"{kind}.partial_image", shown, format)
                    continue
                for stamped in event:
                    # OpenAI's clients expect a usage; there are no tokens here
                    usage = {"total_tokens": 0, "input_tokens": 0, "output_tokens": 0}
                    shown = _datum(stamped) | about | {"image": stamped.receipt.image, "usage": usage}
                    yield _event(f"{kind}.completed", shown, format)
        except Exception as error:  # the answer's status is sent already
            yield _event("error", told(error).body, format)

    return StreamingResponse(lines(), media_type="text/event-stream", headers={"X-Accel-Buffering": "no"})


def _datum(stamped: Stamped) -> dict:
    receipt = stamped.receipt.model_dump(mode="json")
    off = {} if stamped.off is None else {"consistency": float(f"{stamped.off:.3g}")}
    return {"b64_json": _base64(stamped.data), "receipt": receipt, **off}


def _base64(data: bytes) -> str:
    return base64.b64encode(data).decode()


def _event(kind: str, fields: dict, format: Format) -> str:
    about = {"created_at": int(time.time()), "output_format": format, "quality": "standard", "background": "opaque"}
    return f"event: {kind}\ndata: {json.dumps({'type': kind} | about | fields)}\n\n"
