"""Takes the schemas of CycloneDX 1.6 from a checkout of github.com/CycloneDX/specification (Apache-2.0).

    python -m tests.schemas.renew_cyclonedx CHECKOUT

cyclonedx.json.xz is {address: schema}, without what is for readers.
"""

import json
import lzma
import sys
from pathlib import Path

from tests.schemas.renew import undescribed

FILES = ("bom-1.6.schema.json", "spdx.schema.json", "jsf-0.82.schema.json")
READERS = ("$comment", "title", "examples", "meta:enum")


def main(checkout: str) -> None:
    schemas = [json.loads(Path(checkout, "schema", name).read_text()) for name in FILES]
    made = json.dumps({schema["$id"]: plain(undescribed(schema)) for schema in schemas}, sort_keys=True)
    Path(__file__).with_name("cyclonedx.json.xz").write_bytes(lzma.compress(made.encode()))


def plain(schema: object) -> object:
    """Without the other words for readers; a property may have such a name, and is a schema then."""
    if isinstance(schema, dict):
        return {
            key: plain(value)
            for key, value in schema.items()
            if key not in READERS or (key != "meta:enum" and isinstance(value, dict))
        }
    return [plain(each) for each in schema] if isinstance(schema, list) else schema


if __name__ == "__main__":
    main(*sys.argv[1:])
