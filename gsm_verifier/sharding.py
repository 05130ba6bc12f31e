"""The alphabet of dimensions, and where each letter lives on the mesh.

The same letters name an array's axes everywhere: as the suffix of its name (`wq_DNH`), in einsum
strings, and here, as logical sharding axes.

| letter | dimension | | letter | dimension |
|---|---|---|---|---|
| B | rows of a batch | | L | layers |
| T | positions computed | | A | accumulated microbatches |
| S | positions attended to | | R | rows of a record shard (host) |
| D | width | | U | pools, one for each device of rows (sampler) |
| F | feed-forward width | | P | prompts in flight in a pool (sampler) |
| N | query heads | | C | completion slots of a pool (sampler) |
| K | key/value heads | | Z | pages of a pool (sampler) |
| G | query heads per key/value head | | J | pages of a branch (sampler) |
| H | head size | | W | positions of a page (sampler) |
| V | vocabulary | | E | queries that look over a prompt (sampler) |
| | | | M | completions of a problem (host) |

A mesh has the axes `data` (replicated parameters), `fsdp` (parameters sharded over their width) and
`tensor` (heads, feed-forward and vocabulary sharded). No other module names a mesh axis.
"""

import functools
import math
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from flax import linen as nn
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

AXES = ("data", "fsdp", "tensor")

RULES: dict[str, tuple[str, ...]] = {
    "B": ("data", "fsdp"),
    "U": ("data", "fsdp"),
    "D": ("fsdp",),
    "F": ("tensor",),
    "N": ("tensor",),
    "K": ("tensor",),
    "V": ("tensor",),
} | dict.fromkeys("ATSGHLPCWMZJE", ())


def configure(cpu_devices: int) -> None:
    """Before the first use of a device: how many a CPU shall be, and where programs are kept."""
    if jax.config.jax_platforms in (None, "", "cpu"):
        jax.config.update("jax_num_cpu_devices", cpu_devices)
    if not jax.config.jax_compilation_cache_dir:
        cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
        jax.config.update("jax_compilation_cache_dir", str(cache / "gsm_verifier" / "xla"))
        # All are: of the quickstart's 82 the 60 quickest take a second to compile again.
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)


def make_mesh(
    data: int, fsdp: int, tensor: int, devices: Sequence[jax.Device] | None = None
) -> Mesh:
    """The mesh over all devices of all processes, or others; one of the sizes may be -1: the rest.

    Raises:
      ValueError: the sizes don't multiply to the number of devices, or a TPU slice of three
        dimensions can't be cut so.
    """
    count = jax.device_count() if devices is None else len(devices)
    sizes = [data, fsdp, tensor]
    if sizes.count(-1) == 1 and 0 not in sizes:
        sizes[sizes.index(-1)] = count // -math.prod(sizes)
    if math.prod(sizes) != count or min(sizes) < 1:
        raise ValueError(
            f"mesh data={data} fsdp={fsdp} tensor={tensor} doesn't cover {count} devices: "
            "make the product of the sizes equal to it, or set one of them to -1; into how many a "
            "CPU is split is --config.mesh.cpu_devices"
        )
    # Explicit axes, the default, are not understood by linen.
    kinds = (AxisType.Auto,) * len(AXES)
    try:
        return jax.make_mesh(tuple(sizes), AXES, axis_types=kinds, devices=devices)
    except NotImplementedError as error:
        words = " ".join(f"{axis}={n}" for axis, n in zip(AXES, sizes, strict=True))
        raise ValueError(
            f"mesh {words}: the slice's own shape can't be cut so; make each size a product of "
            "some of the slice's dimensions"
        ) from error


def without_fsdp(mesh: Mesh, *sizes: int) -> Mesh:
    """A mesh's devices with those of `fsdp` on `tensor`, as far as that divides all sizes."""
    tensor = math.gcd(mesh.shape["fsdp"] * mesh.shape["tensor"], *sizes)
    return make_mesh(-1, 1, tensor, devices=list(mesh.devices.flat))


def row_devices(mesh: Mesh) -> int:
    """Devices that work on different rows (B, or U in the sampler)."""
    return parts("B", mesh)


class Share(NamedTuple):
    """Which rows (B, or U in the sampler) are a process's own.

    The rows are cut into as many blocks as there are devices that work on different rows. Processes
    among which `tensor` splits a row share its block: they hold the same rows, and the first of
    them speaks for all.

    Attributes:
      index, count: which of the different parts of the rows this is, and how many there are.
      blocks, of: numbers of its blocks, and how many there are in all.
      speaks: is this process the first that holds it, and so the one that writes what is of it?
    """

    index: int
    count: int
    blocks: tuple[int, ...]
    of: int
    speaks: bool

    def rows(self, total: int) -> np.ndarray:
        """Which of `total` rows are its own, in order; `total` is a multiple of `of`."""
        return np.arange(total).reshape(self.of, -1)[list(self.blocks)].ravel()


@functools.cache
def share(mesh: Mesh) -> Share:
    """This process's share of the rows.

    Raises:
      ValueError: a mesh on which processes have some rows in common and others not.
    """
    of = row_devices(mesh)
    held: dict[int, set[int]] = {}
    for device, (rows,) in named(mesh, "B").devices_indices_map((of,)).items():
        held.setdefault(device.process_index, set()).add(rows.start or 0)
    blocks = {process: tuple(sorted(found)) for process, found in held.items()}
    parts = sorted(set(blocks.values()))
    if sum(map(len, parts)) != of or len(set(map(len, parts))) > 1:
        raise ValueError(
            f"mesh {dict(mesh.shape)} cuts rows across {len(blocks)} processes unevenly: make "
            "tensor divide the devices of a process, or be a multiple of them"
        )
    mine = blocks[jax.process_index()]
    speaks = min(p for p in blocks if blocks[p] == mine) == jax.process_index()
    return Share(parts.index(mine), len(parts), mine, of, speaks)


def spec(letters: Sequence[str | None]) -> PartitionSpec:
    """The PartitionSpec of dimensions named by letters. A mesh axis serves its first dimension."""
    used: set[str] = set()
    parts = []
    for letter in letters:
        axes = tuple(a for a in (RULES[letter] if letter else ()) if a not in used)
        used.update(axes)
        parts.append(axes if len(axes) > 1 else axes[0] if axes else None)
    return PartitionSpec(*parts)


def _axes(part: str | tuple[str, ...] | None) -> tuple[str, ...]:
    """The mesh axes that cut a dimension, by its part of a PartitionSpec."""
    return (part,) if isinstance(part, str) else part or ()


def named(mesh: Mesh, letters: Sequence[str | None]) -> NamedSharding:
    """Where on the mesh an array lives whose dimensions are named by letters."""
    return NamedSharding(mesh, spec(letters))


def parts(letter: str, mesh: Any = None) -> int:
    """Into how many parts a mesh, or the enclosing `jax.set_mesh`, cuts a dimension; none: 1."""
    mesh = mesh or jax.sharding.get_abstract_mesh()
    return math.prod(mesh.shape.get(axis, 1) for axis in RULES[letter])


@functools.cache
def xla_options(**options: str) -> dict[str, str]:
    """Options for `jax.jit`'s compiler, or {} where it doesn't know them: they come and go."""
    try:
        jax.jit(lambda: 0, compiler_options=options).lower().compile()
    except (jax.errors.JaxRuntimeError, ValueError):
        return {}
    return options


def platform(mesh: Mesh | None = None) -> str:
    """What a mesh, or the enclosing `jax.set_mesh`, computes on, if only in a plan.

    Without either: the default.
    """
    if mesh:
        return mesh.devices.flat[0].platform
    device = jax.sharding.get_abstract_mesh().abstract_device
    return device.platform if device else jax.default_backend()


def fast_dtype(platform: str) -> str:
    """What a platform multiplies fastest in: bfloat16, but on a CPU without units for it.

    Two cores with AVX2 alone value 350 tokens/s by SmolLM2-135M in float32, 252 in bfloat16.
    """
    if platform != "cpu":
        return "bfloat16"
    told = Path("/proc/cpuinfo")
    flags = told.read_text().split() if told.exists() else ()
    return "bfloat16" if {"amx_bf16", "avx512_bf16"} & set(flags) else "float32"


def constrain(x: jax.Array, letters: Sequence[str | None]) -> jax.Array:
    """Pin a traced array to the mesh of the enclosing `jax.set_mesh`; no mesh, no constraint."""
    if jax.sharding.get_abstract_mesh().empty:
        return x
    return jax.lax.with_sharding_constraint(x, spec(letters))


def local(
    function: Callable[..., Any], letters: Sequence[str], out: Any, *arrays: jax.Array
) -> Any:
    """`function` of each device's part of the arrays, whose dimensions are `letters`.

    Its result is an array of dimensions `out`, or where that is a tuple, several.

    For work that is separate along every sharded dimension, such as a loop over rows, which the
    partitioner would otherwise gather. Arrays the mesh can't divide are worked on whole.
    """
    mesh = jax.sharding.get_abstract_mesh()
    specs = tuple(spec(names) for names in letters)
    whole = mesh.empty or any(
        size % math.prod(mesh.shape[axis] for axis in _axes(part))
        for x, cut in zip(arrays, specs, strict=True)
        for size, part in zip(x.shape, cut, strict=True)
    )
    if whole:
        return function(*arrays)
    return jax.shard_map(function, in_specs=specs, out_specs=jax.tree.map(spec, out))(*arrays)


def _is_box(x: Any) -> bool:
    return isinstance(x, nn.LogicallyPartitioned)


def tree_shardings(mesh: Mesh, boxed: Any) -> Any:
    """Shardings of a tree of linen boxes, as `jax.eval_shape(model.init, ...)` makes it.

    Raises:
      ValueError: a dimension that its mesh axes don't divide, named with its parameter.
    """

    def one(path: Any, box: nn.LogicallyPartitioned) -> NamedSharding:
        sharding = named(mesh, box.names)
        for size, letter, part in zip(box.value.shape, box.names, sharding.spec, strict=True):
            axes = _axes(part)
            parts = math.prod(mesh.shape[a] for a in axes)
            if size % parts:
                raise ValueError(
                    f"{jax.tree_util.keystr(path)}: dimension {letter} of size {size} can't be "
                    f"split over mesh axes {'x'.join(axes)} = {parts}: change the mesh or the size"
                )
        return sharding

    return jax.tree.map_with_path(one, boxed, is_leaf=_is_box)


def to_global(mesh: Mesh, letters: Sequence[str | None], host: np.ndarray) -> jax.Array:
    """The global array of host arrays: of B or U every process gives its own rows, in order.

    Other dimensions every process holds whole; so does one process with all of its rows.
    """
    parts = share(mesh).count
    shape = [n * parts if x in ("B", "U") else n for n, x in zip(host.shape, letters, strict=True)]
    return jax.make_array_from_process_local_data(named(mesh, letters), host, tuple(shape))


def to_host(x: jax.Array) -> np.ndarray:
    """Of a global array what this process's devices hold: the inverse of `to_global`."""
    if x.is_fully_addressable or x.is_fully_replicated:
        return np.asarray(x)
    shards = x.addressable_shards
    size = shards[0].data.shape
    starts = [sorted({s.index[axis].start or 0 for s in shards}) for axis in range(x.ndim)]
    host = np.empty([len(found) * n for found, n in zip(starts, size, strict=True)], x.dtype)
    for shard in shards:
        at = [f.index(i.start or 0) for f, i in zip(starts, shard.index, strict=True)]
        host[tuple(slice(a * n, (a + 1) * n) for a, n in zip(at, size, strict=True))] = shard.data
    return host
