"""The application: its routes, each from a body to pictures."""

import asyncio
import math
from collections.abc import Callable, Sequence
from dataclasses import replace

from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, Response

from diffusion.adapters.http import answers, errors, page
from diffusion.adapters.http.account import Account
from diffusion.adapters.http.asked import EditBody, GenerationBody, RestorationBody, Wanted, manner_of
from diffusion.adapters.http.bodies import Form, form, json_object, picture, typed
from diffusion.adapters.http.card import cards
from diffusion.adapters.http.guard import Guard
from diffusion.adapters.http.headers import SecureHeaders
from diffusion.adapters.http.metrics import CONTENT_TYPE, Metrics
from diffusion.adapters.http.schema import document
from diffusion.adapters.http.seen import Seen
from diffusion.adapters.http.served import Served, Work, begun, chosen, drawn
from diffusion.adapters.http.tracing import tracing
from diffusion.recipe import ServeRecipe
from diffusion.serving.editing import EditRequest, edit
from diffusion.serving.keys import Access, Keyring
from diffusion.serving.lineup import seeded
from diffusion.serving.request import Asked, GenerateRequest, RequestError, parse, resolve
from diffusion.serving.restoring import RestoreRequest, restoration
from diffusion.serving.rework import Rework
from diffusion.serving.shelf import Shelf

_FILES = ("image", "mask")
_ANYBODY = Access()


def create_app(
    shelf: Shelf,
    limits: ServeRecipe,
    *,
    access: Access = _ANYBODY,
    echoes: bool = True,
    replica: str = "",
) -> FastAPI:
    """The application around the models that `shelf` offers, now and later.

    access: who may ask.  Raises ValueError where its file of keys is damaged.
    echoes: answers carry the request's id; not where a server before this adds it anyway, as Ray Serve's does.
    replica: its name where there may be several; the metrics have it.
    """
    # the interactive documentation would fetch scripts from a foreign host
    app = FastAPI(title="diffusion", version="1", docs_url=None, redoc_url=None, redirect_slashes=False)
    metrics = Metrics(shelf, replica)
    ring = Keyring(access)
    app.add_middleware(Guard, ring=ring)
    ended = [metrics.ended, *filter(None, [tracing()])]
    app.add_middleware(Seen, routes=lambda: {route.path for route in app.routes}, ended=ended, echoes=echoes)
    app.add_middleware(SecureHeaders)
    errors.install(app)
    page.install(app)
    app.openapi = lambda: document(cards(shelf, limits), ring.wanted)

    async def _form(request: Request, body: type[Wanted], files: Sequence[str]) -> tuple[Form, Served]:
        """Of a form its typed fields, a seed among them, and its files; and the model for it."""
        found = await form(request, files)
        found = Form(seeded(typed(body, found.fields)), found.files)
        return found, await chosen(request, shelf, limits, found.fields, found.files)

    @app.post("/v1/images/generations")
    async def generations(request: Request) -> Response:
        fields = seeded(await json_object(request))
        served = await chosen(request, shelf, limits, fields, {})
        body = parse(GenerationBody, _plain(fields, served), limits)
        asked = _only(GenerateRequest, body)
        work = Work(served.engine.job(resolve(asked, served.engine.bundle.spec, limits)))
        return await _answered(request, body, work, served, "image_generation")

    @app.post("/v1/images/restorations")
    async def restorations(request: Request) -> Response:
        found, served = await _form(request, RestorationBody, _FILES)
        body = parse(RestorationBody, _plain(found.fields, served), limits)
        asked = _only(RestoreRequest, body)

        def made() -> Rework:
            mask = picture(found, "mask") if "mask" in found.files else None
            return restoration(asked, picture(found, "image"), mask, served.engine.bundle, served.engine.device, limits)

        return await _reworked(request, body, made, served)

    @app.post("/v1/images/edits")
    async def edits(request: Request) -> Response:
        found, served = await _form(request, EditBody, _FILES)
        body = parse(EditBody, _plain(found.fields, served), limits)
        return await _reworked(request, body, lambda: _edited(body, found, served), served)

    @app.post("/v1/images/variations")
    async def variations(request: Request) -> Response:
        found, served = await _form(request, EditBody, _FILES[:1])
        body = parse(EditBody, _plain(found.fields, served), limits)
        return await _reworked(request, body, lambda: _edited(body, found, served), served)

    @app.get("/v1/models")
    async def models() -> dict:
        return {"object": "list", "data": cards(shelf, limits)}

    @app.get("/metrics", include_in_schema=False)
    async def numbers() -> Response:
        return Response(metrics.text(), media_type=CONTENT_TYPE)

    @app.head("/healthz", include_in_schema=False)
    @app.get("/healthz")
    async def health() -> Response:
        alive, about = shelf.alive(), shelf.state()
        state = {"status": "ok" if alive else "engine stopped or stuck"}
        for held in shelf.held()[:1]:  # the present one; the others stand in "loaded"
            ladder = held.engine.ladder
            state |= held.facts() | {"batch_sizes": ladder.sizes}
            state["batch_seconds"] = {size: round(s, 5) for size, s in ladder.seconds.items()}
        told = {name: about[name] for name in ("loaded", "loading", "failed")} | {"refused": None}
        if refused := about["refused"]:
            present = refused["lineup"]["models"][0]
            told["refused"] = {"model": present["name"], "version": present["version"], "reason": refused["reason"]}
        return JSONResponse(state | told, 200 if alive else 503)

    return app


def _edited(body: EditBody, found: Form, served: Served) -> Rework:
    """With a mask and nothing said of how much is to change, what it shows is drawn anew; else the picture is edited."""
    engine, limits = served.engine, served.limits
    image, mask = picture(found, "image"), picture(found, "mask").as_hole() if "mask" in found.files else None
    how = ("strength", "from_label", "from_prompt", "coarse")
    if mask is not None and all(getattr(body, name) is None for name in how):
        said = body.model_dump(include=set(Asked.model_fields), exclude_none=True)
        return restoration(RestoreRequest(task="inpainting", **said), image, mask, engine.bundle, engine.device, limits)
    asked = EditRequest(**body.model_dump(include=set(EditRequest.model_fields), exclude_none=True))
    return edit(asked, image, mask, engine.bundle, engine.device, limits)


def _plain(fields: dict[str, object], served: Served) -> dict[str, object]:
    """OpenAI's way to say what is said otherwise here: a prompt, which they must give, that is the name of a class for a
    model that reads no prompts."""
    said = dict(fields)
    spec, prompt = served.engine.bundle.spec, said.get("prompt")
    if spec.text is None and isinstance(prompt, str) and not {"label", "class"} & said.keys():
        named = [name for name in spec.classes if name.casefold() == prompt.strip().casefold()]
        if not named:
            raise RequestError(
                f"prompt={prompt[:80]!r}: this model reads no prompts, since it was trained without captions; give one of"
                f" its classes, as prompt or as label: {', '.join(spec.classes)}",
                param="prompt",
                allowed=list(spec.classes),
            )
        del said["prompt"]
        said["label"] = named[0]
    return said


def _only(kind: type[Asked], body: Asked) -> Asked:
    """What a body says of the pictures."""
    return kind(**body.model_dump(include=set(kind.model_fields)))


async def _reworked(request: Request, body: Wanted, made: Callable[[], Rework], served: Served) -> Response:
    rework = await asyncio.to_thread(made)  # decodes pictures
    return await _answered(request, body, Work(rework.job, rework), served, "image_edit")


async def _answered(request: Request, body: Wanted, work: Work, served: Served, kind: str) -> Response:
    account = Account.of(request.scope)
    account.task, account.n, account.steps = work.task, work.job.request.n, work.job.request.steps
    body.check()
    work = replace(work, priority=body.urgency(account.priority), timeout_s=body.timeout or math.inf)
    format, alone = (body.output_format or "png", False) if body.stream else manner_of(body, account.n, request)
    work = replace(work, format=format)
    if body.stream:
        notes = work.rework.notes if work.rework else ()
        events = begun(request, work, served, body.partial_images or 0)
        return answers.stream(events, kind, notes, work.format)
    stamped = await drawn(request, work, served)
    return answers.one(stamped, work) if alone else answers.many(stamped, work, served)
