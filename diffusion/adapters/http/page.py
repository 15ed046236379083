"""The page at / and the files it loads, from diffusion/serving/playground."""

from importlib.resources import files

from fastapi import FastAPI
from fastapi.responses import Response
from starlette.exceptions import HTTPException

_KINDS = {"html": "text/html", "css": "text/css", "js": "text/javascript"}
FILES = {
    file.name: file.read_bytes()
    for file in files("diffusion.serving").joinpath("playground").iterdir()
    if file.name.rpartition(".")[2] in _KINDS
}
# Nothing but those files runs, and no text becomes markup: the scripts have no way to write HTML
POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src data:; connect-src 'self'; form-action 'none';"
    " base-uri 'none'; frame-ancestors 'none'; require-trusted-types-for 'script'; trusted-types 'none'"
)


def install(app: FastAPI) -> None:
    """Add its routes."""

    @app.head("/", include_in_schema=False)
    @app.get("/", include_in_schema=False)
    async def page() -> Response:
        return _answer("page.html")

    @app.get("/page/{name}", include_in_schema=False)
    async def part(name: str) -> Response:
        return _answer(name)


def _answer(name: str) -> Response:
    """Only what was read at the start can be asked for.  Raises HTTPException 404."""
    if name not in FILES:
        raise HTTPException(404)
    return Response(FILES[name], media_type=_KINDS[name.rpartition(".")[2]])
