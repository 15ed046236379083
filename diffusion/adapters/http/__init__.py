"""The HTTP face of an engine: OpenAI's /v1/images/generations and /v1/images/edits, our own /v1/images/restorations and
/v1/images/variations, GET /v1/models, GET /healthz and a page for people at /."""

from diffusion.adapters.http.app import create_app
from diffusion.adapters.http.bodies import MAX_BODY_BYTES, MAX_UPLOAD_BYTES

__all__ = ["MAX_BODY_BYTES", "MAX_UPLOAD_BYTES", "create_app"]
