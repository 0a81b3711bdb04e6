"""Runs a Python program without a network and with limits on its memory, time and files, in place of this process.

    python -I confined.py SECONDS BYTES PROGRAM

This file is a script of its own: it ends as PROGRAM does, or with REFUSED if the system allows no process without a
network. PROGRAM has this user's rights to read files.
"""

import ctypes
import os
import resource
import sys

REFUSED = 113
_NEW_USER, _NEW_NETWORK = 0x10000000, 0x40000000
_FILE_BYTES = 2**20


def main(seconds: str, size: str, program: str) -> None:
    """Gives up the network, sets the limits, and becomes the program."""
    try:
        alone = ctypes.CDLL(None).unshare(_NEW_USER | _NEW_NETWORK) == 0
    except AttributeError:  # a system other than Linux
        alone = False
    if not alone:
        sys.exit(REFUSED)
    limits = {
        resource.RLIMIT_CPU: int(seconds),
        resource.RLIMIT_AS: int(size),
        resource.RLIMIT_FSIZE: _FILE_BYTES,
        resource.RLIMIT_CORE: 0,
        resource.RLIMIT_NPROC: 0,  # no further process
    }
    for limit, most in limits.items():
        resource.setrlimit(limit, (most, most))
    os.execve(sys.executable, [sys.executable, "-I", program], {})


if __name__ == "__main__":
    main(*sys.argv[1:])
