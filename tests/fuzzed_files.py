"""Schemathesis' hooks.  The files that it puts into forms are strings, of which none is a picture: each becomes a word for
which the application under test is given one.  And what no schema can say is left out: `repeats` of many `steps`, a
`timeout` too short for this machine, and letters of a prompt that cannot be printed are refused."""

import schemathesis

MARK = "a picture"


@schemathesis.hook
def before_call(context, case, kwargs) -> None:
    body = case.body
    if not isinstance(body, dict):
        return
    for name in ("image", "mask"):
        if isinstance(body.get(name), str):
            body[name] = MARK
    for name in ("prompt", "from_prompt"):
        words = body.get(name)
        if isinstance(words, str) and words.strip(" \t\n\r\f\v") and len(words) <= 300:
            body[name] = "".join(letter if letter.isprintable() else "x" for letter in words)
    for name, most, kept in (("repeats", 100, 1), ("timeout", 3600, 600)):
        if isinstance(body.get(name), int | float) and 0 < body[name] <= most:
            body[name] = kept


@schemathesis.serializer("image/bmp", "image/tiff")
def as_text(context, value) -> bytes:
    return str(value).encode()
