"""The keys under which a walk keeps its results: digests of all that determines the result of each unit of work."""

import hashlib
from collections.abc import Mapping
from typing import Any

from any4_jax.methods.base import AnyMethod, scope_of
from any4_jax.methods.matrices import digest_arrays
from any4_jax.models.base import Decoder
from any4_jax.statistics import Gathered
from any4_jax.surgery import nnx_modules, trees
from any4_jax.walk.batches import Batch
from any4_jax.walk.records import block_unit, contents_of, site_units


def unit_keys(
    decoder: Decoder,
    assigned: Mapping[str, AnyMethod],
    batches: list[Batch],
    given: Mapping[str, Gathered],
    sequential: bool,
) -> dict[str, str]:
    """A key, a hex sha256, for each linear, site and block that is a unit of work under `assigned`.

    It is computed from all that determines the result: the calibration tokens or the statistics in hand, and the arrays
    and methods of the unit's block and of the blocks before, not of later ones. Statistics that a walk gathers are left
    out: they follow from the rest, and those of a block may be gigabytes.
    """
    digest = hashlib.sha256(repr((type(decoder).__name__, decoder.config, str(decoder.dtype), sequential)).encode())
    prefixes = [f"{decoder.block_path(index)}." for index in range(len(decoder.blocks))]
    outside = {
        name: leaf
        for name, leaf in trees.leaves(nnx_modules.contents(decoder)).items()
        if not name.startswith(tuple(prefixes))
    }
    digest.update(repr({path: tuple(gathered) for path, gathered in sorted(given.items())}).encode())
    digest_arrays(digest, (batches, dict(given), outside))
    keys: dict[str, str] = {}
    for index, (block, prefix) in enumerate(zip(decoder.blocks, prefixes, strict=True)):
        mine = {path.removeprefix(prefix): method for path, method in assigned.items() if path.startswith(prefix)}
        digest_arrays(digest, contents_of(block))
        digest.update(_described(mine))
        units = [path for path, method in mine.items() if scope_of(method) == "matrix"]
        units += [unit for site in decoder.sites(index) for unit in site_units(site, mine)]
        keys |= {f"{prefix}{unit}": _key(digest, unit) for unit in units}
        whole = {path: method for path, method in mine.items() if scope_of(method) == "block"}
        for method in dict.fromkeys(whole.values()):
            unit = block_unit(prefix.rstrip("."), [path for path in whole if whole[path] == method])
            keys[unit] = _key(digest, unit)
    for path, method in assigned.items():
        if path not in keys and not path.startswith(tuple(prefixes)):
            digest.update(_described({path: method}))
            keys[path] = _key(digest, path)
    return keys


def _described(methods: Mapping[str, Any]) -> bytes:
    return repr(sorted((path, method.name, repr(method)) for path, method in methods.items())).encode()


def _key(digest: Any, unit: str) -> str:
    own = digest.copy()
    own.update(unit.encode())
    return own.hexdigest()
