"""The GGUF container: the metadata and tensors of one file. Nothing here depends on the model.

The layout is that of the GGUF specification (ggml, docs/gguf.md), versions 2 and 3, little-endian: magic, version,
counts, key-value pairs, tensor infos, then the bytes of each tensor at multiples of the alignment.
"""

import math
import struct
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

_MAGIC = b"GGUF"
_VERSIONS = (2, 3)
_SCALARS = dict(zip((0, 1, 2, 3, 4, 5, 6, 7, 10, 11, 12), "BbHhIif?Qqd", strict=True))
_STRING, _ARRAY = 8, 9
# Types that are stored as they are used; the gguf package decodes the others.
_PLAIN = {"F32": np.dtype(np.float32), "F16": np.dtype(np.float16), "BF16": np.dtype(jnp.bfloat16)}
_QUANTIZED = ("Q8_0", "Q4_0", "Q4_1")


class _Info(NamedTuple):
    shape: tuple[int, ...]
    kind: int
    offset: int


class GGUFFile(Mapping[str, np.ndarray]):
    """Name -> array, under the file's own names; each access reads and dequantizes the tensor.

    F32, F16 and BF16 keep their dtype; Q8_0, Q4_0 and Q4_1 become float32. Shapes are row-major: linears are [N, K].
    The reader in the `gguf` package creates several objects for each token of the vocabulary, which takes seconds and
    more memory than a small model; this one keeps lists of plain values.

    Attributes:
        path: the file.
        metadata: key -> number, bool, string, or a list of these.
    """

    def __init__(self, path: Path) -> None:
        """Read the header, and check that the file is long enough for every tensor that it lists.

        Raises:
            FileNotFoundError: there is no such file.
            ValueError: it is not a GGUF file, is damaged or truncated, or holds tensors of an unsupported type.
        """
        self.path = path
        with open(path, "rb") as file:
            if file.read(4) != _MAGIC:
                raise ValueError(f"{path} doesn't begin as a GGUF file does; give a .gguf file")
            try:
                self._read_header(file)
            except (
                struct.error,
                EOFError,
                UnicodeDecodeError,
                MemoryError,
                OverflowError,
                KeyError,
            ) as error:
                raise ValueError(f"{path} is damaged or truncated in its header; fetch it again") from error
        self._check_tensors()

    @property
    def architecture(self) -> Any:
        """The kind of model, with which the keys of its metadata begin; None if the file doesn't name it."""
        return self.metadata.get("general.architecture")

    def number(self, key: str, default: Any = None) -> Any:
        """The metadata of "<architecture>.<key>". If it is a list with one entry per layer, the value of all entries.

        Raises:
            ValueError: it is missing and there is no default, or the layers have different values.
        """
        full = f"{self.architecture}.{key}"
        value = self.metadata.get(full, default)
        if value is None:
            raise ValueError(f"{self.path} lacks {full}; convert the model again")
        if isinstance(value, list):
            if len(set(value)) != 1:
                raise ValueError(
                    f"{full} of {self.path} differs from layer to layer, and one value is needed; use another model"
                )
            value = value[0]
        return value

    def _read_header(self, file: Any) -> None:
        version, count, pairs = _unpack(file, "IQQ")
        if version not in _VERSIONS:
            raise ValueError(
                f"{self.path} is of GGUF version {version}, and 2 or 3 (little-endian) is needed; convert it"
            )
        self.metadata: dict[str, Any] = {}
        for _ in range(pairs):
            key = _string(file)
            self.metadata[key] = _value(file, *_unpack(file, "I"))
        self._infos: dict[str, _Info] = {}
        for _ in range(count):
            name = _string(file)
            (dimensions,) = _unpack(file, "I")
            shape = _unpack(file, "Q" * dimensions)[::-1]
            kind, offset = _unpack(file, "IQ")
            if name in self._infos:
                raise ValueError(f"{self.path} holds tensor {name} twice; convert the model again")
            self._infos[name] = _Info(shape, kind, offset)
        alignment = int(self.metadata.get("general.alignment", 32))
        self._start = -(-file.tell() // alignment) * alignment

    def _check_tensors(self) -> None:
        length = self.path.stat().st_size
        for name, info in self._infos.items():
            kind = _kind_name(info.kind)
            if kind not in _PLAIN and kind not in _QUANTIZED:
                supported = ", ".join((*_PLAIN, *_QUANTIZED))
                raise ValueError(
                    f"tensor {name} of {self.path} is {kind}, and {supported} are supported; convert it to one of them"
                )
            end = self._start + info.offset + math.prod(_stored_shape(info))
            if end > length:
                raise ValueError(
                    f"{self.path} has {length} bytes, and its tensor {name} ends at {end}; it is truncated, "
                    "fetch it again"
                )

    def __getitem__(self, name: str) -> np.ndarray:
        info = self._infos[name]
        stored = _stored_shape(info)
        # Read, not mapped: mapped pages would count as resident memory beside the arrays that are made from them.
        raw = np.fromfile(self.path, np.uint8, math.prod(stored), offset=self._start + info.offset)
        kind = _kind_name(info.kind)
        if kind in _PLAIN:
            return raw.view(_PLAIN[kind]).reshape(info.shape)
        import gguf

        return gguf.quants.dequantize(raw.reshape(stored), gguf.GGMLQuantizationType(info.kind))

    def __iter__(self) -> Iterator[str]:
        return iter(self._infos)

    def __len__(self) -> int:
        return len(self._infos)


def _kind_name(kind: int) -> str:
    import gguf

    try:
        return gguf.GGMLQuantizationType(kind).name
    except ValueError:
        return f"of the unknown type {kind}"


def _stored_shape(info: _Info) -> tuple[int, ...]:
    """The shape in bytes: the last axis holds the bytes of the blocks."""
    import gguf

    block, size = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType(info.kind)]
    return (*info.shape[:-1], info.shape[-1] // block * size)


def _unpack(file: Any, letters: str) -> tuple[Any, ...]:
    size = struct.calcsize("<" + letters)
    return struct.unpack("<" + letters, file.read(size))


def _string(file: Any) -> str:
    (length,) = _unpack(file, "Q")
    content = file.read(length)
    if len(content) != length:
        raise EOFError
    return str(content, "utf-8")


def _value(file: Any, kind: int) -> Any:
    if kind == _STRING:
        return _string(file)
    if kind == _ARRAY:
        element, count = _unpack(file, "IQ")
        if element in _SCALARS:
            return list(_unpack(file, f"{count}{_SCALARS[element]}"))
        return [_value(file, element) for _ in range(count)]
    (scalar,) = _unpack(file, _SCALARS[kind])
    # 1e-5 is stored as a float32; the shortest decimal for that float32 is the number that was written.
    return float(str(np.float32(scalar))) if _SCALARS[kind] == "f" else scalar
