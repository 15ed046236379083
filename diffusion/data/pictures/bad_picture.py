"""Why a file cannot be used, in words to count by."""

import re
from collections.abc import Iterator
from contextlib import contextmanager

TOO_SMALL, TOO_ELONGATED, NEAR_DUPLICATE = "too small", "too elongated", "near duplicate"
POLICY = frozenset({TOO_SMALL, TOO_ELONGATED, NEAR_DUPLICATE})  # whole pictures that a recipe does not want
UNSAFE_NAME = "unsafe name"  # whatever the file is
UNREADABLE = "unreadable"  # its bytes could not be had; perhaps they can next time


class BadPicture(ValueError):
    """A file that cannot be used.  `kind` is one of a few words to count by, `detail` is for people.

    The kinds of `POLICY` are the recipe's choice, which people may overrule; all others are damage.
    """

    def __init__(self, kind: str, detail: str) -> None:
        # the decoder's messages may hold addresses of objects: the same file must give the same reason everywhere
        self.kind, self.detail = kind, re.sub(r"<[^<>]* at 0x[0-9a-f]+>", "the file", detail)
        super().__init__(f"{kind}: {self.detail}")

    def __reduce__(self) -> tuple:
        return type(self), (self.kind, self.detail)


@contextmanager
def named_damage(format: str) -> Iterator[None]:
    """Whatever a decoder raises in the block becomes a BadPicture: truncated or damaged."""
    try:
        yield
    except (BadPicture, MemoryError):
        raise
    except Exception as error:  # damaged files make the decoders raise nearly any type
        text = f"{format}: {type(error).__name__}: {error}"
        truncated = re.search(r"truncat|unexpected end|premature end|not enough|ran out", text, re.IGNORECASE)
        raise BadPicture("truncated" if truncated else "damaged", text) from error
