"""What /openapi.json says of the bodies, which the routes read themselves."""

from collections.abc import Iterable

from diffusion.recipe import Frozen


def described(model: type[Frozen], files: Iterable[str] = ()) -> dict:
    """The operation's body: JSON, or with files a form."""
    schema = model.model_json_schema()
    kind = "application/json"
    if files := tuple(files):
        kind = "multipart/form-data"
        schema["properties"] |= {name: {"type": "string", "format": "binary"} for name in files}
        schema["required"] = [*schema.get("required", []), files[0]]
    return {"requestBody": {"required": True, "content": {kind: {"schema": schema}}}}
