"""OpenCV, which decodes, encodes and converts without Python's lock, so that threads scale."""

import os
from functools import cache
from types import ModuleType


@cache
def opencv() -> ModuleType:
    """cv2, without what its import does to the process: it would extend LD_LIBRARY_PATH for every child process, start
    as many threads as there are cores for one picture, and write what it thinks of damaged files to stderr.
    """
    path = os.environ.get("LD_LIBRARY_PATH")
    import cv2

    if path is None:
        os.environ.pop("LD_LIBRARY_PATH", None)
    else:
        os.environ["LD_LIBRARY_PATH"] = path
    cv2.setNumThreads(1)
    cv2.utils.logging.setLogLevel(cv2.utils.logging.LOG_LEVEL_SILENT)
    return cv2
