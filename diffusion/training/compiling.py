"""torch.compile of a network in training."""

import os
import shutil
import sys


def check_compiler() -> None:
    """Raises ValueError where nothing compiles what torch.compile writes: C++ on a CPU, and on a GPU what starts kernels."""
    compiler = os.environ.get("CXX") or ("clang++" if sys.platform == "darwin" else "g++")
    if shutil.which(compiler) is None:
        raise ValueError(
            f"DIFFUSION_COMPILE has the network compiled by {compiler}, which is not here: install it (Debian: `apt-get"
            " install g++`), name another one in CXX, or leave DIFFUSION_COMPILE out"
        )
