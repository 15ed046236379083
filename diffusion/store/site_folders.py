"""Weights that do not come with this program lie in folders that a site names in environment variables."""

import os
from collections.abc import Mapping
from pathlib import Path


def site_folder(folders: Mapping[str, str], name: str, holds: str) -> Path:
    """The folder that the environment variable `folders[name]` names.  holds: what belongs in it, for people.

    Raises ValueError where it is not set, or is no folder.
    """
    if not (folder := os.environ.get(folders[name])):
        raise ValueError(
            f"the weights of {name} do not come with this program: set {folders[name]} to a folder with {holds}"
        )
    if not Path(folder).is_dir():
        raise ValueError(f"{folders[name]}={folder} is no folder: set it to one with {holds}")
    return Path(folder)
