"""Where pictures come from: one interface for folders, archives, buckets and tables.

    source = open_source("my-pictures/")      # its list is on the disk, not in memory; reads no picture
    for item in source.items(): ...           # name, place, mark, label, captions, extra
    data = read_item(source.uri, item.place)  # on any worker, which needs nothing else

To add a kind of container: a stream of `File` in `containers.py` and a way of reading in `places.py`.  To add a kind of
layout: a function that makes items of a listing's files, and its name in `layouts.items_of`.  Labels, captions, metadata,
names, refusals and fingerprints are the same for all and exist once, in `items.py` and `listing.py`.
"""

from diffusion.data.sources.items import (
    EXTENSIONS,
    MAX_FILE_BYTES,
    SINGLE_CLASS,
    BadSource,
    Caption,
    Item,
)
from diffusion.data.sources.opening import EMBEDDED, Source, describe, open_source
from diffusion.data.sources.places import original_of, read_item

__all__ = [
    "EMBEDDED",
    "EXTENSIONS",
    "MAX_FILE_BYTES",
    "SINGLE_CLASS",
    "BadSource",
    "Caption",
    "Item",
    "Source",
    "describe",
    "open_source",
    "original_of",
    "read_item",
]
