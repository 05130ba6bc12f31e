"""Attention, draws, and in tiles products on CPU in C++ (cpu_kernels.cc), if there is a compiler.

It is compiled at first use, in 15 seconds, into the user's cache folder. At installation,
pip's isolated build would have to download a second jaxlib for its headers, and who installs may
have another processor than who runs. Without a compiler, or if anything goes wrong with it, there
is what JAX makes of them, whose numbers are the same but for rounding.

Why the sampler's attention is fast, by SmolLM2-135M with 400 slots of 128 tokens on two cores with
AVX-512, where JAX's way made 790 tokens/s: only what a slot sees is read (XLA multiplies with all
that is kept and hides most), 1,150 tokens/s; a slot's key is written in place, where XLA's scatter
and its copies took 48 of 340 ms a step; keys lie like values, position by position, so that a young
slot's are one piece (with positions last a step's calls took 76 ms of the processors, 52 so); and
caches are kept in bfloat16, as the model computes, half the memory and bytes (94 and 75 ms). 1,435
tokens/s in all. A slot's pages lie anywhere in memory. Those of the next slot are
asked for with each key and value of this one, into the second cache: the first is too small for
both. Processors with instructions for bfloat16 multiply pairs of numbers, as below. A layer's step,
of 400 slots at age 56, takes 1.3 ms, where it took 2.0 by floats and with the first cache, 1.7 by
pairs alone (1.8 without asking at all); at age 120 2.2, 3.4 and 2.9. What is left is memory's: a
thread reads blocks of 7 KB at 10 GB/s here. Lost: to ask for all of the next slot at once, or for
the slot after it; adding up the exponentials of the logits as a product with ones, 4 % faster, as a
row's sum then depended on its place among the rows, and a completion on its slot.

Why draws are: a slot's logits come from main memory once, where XLA runs over those of all slots
for the text's mask, the largest, two sums of exponentials and the blocks of `inverse_cdf`. 160
slots of 49,152 ids take 6 ms of the processors (AVX-512), in JAX 46.

Why attention of whole rows is: 16 queries at a time look at the vectors of keys that one of them
sees, where blocks of queries looked at all keys before their end. A layer of SmolLM2-135M on two
rows of 1,024 positions, problems of 190, takes 18 ms of the processors (AVX2) and 63 with its
gradient, in JAX 134 and 334; and rows may be as long as they like. Processors with instructions for
bfloat16 multiply pairs of numbers, and weights are rounded to it, as accelerators do: with AVX-512
such a layer takes 6.2 ms and 20 with its gradient, 9.5 and 31 by floats before. By the clock pairs
alone took that with its gradient from 16.2 ms to 13.2, and to 10.5 that loops became vectors which
GCC makes none of unless told: masks, rounding in pairs, transposes. One row's heads are too few for
two threads to share evenly: queries are cut then. That and pairs took scoring's attention, a row of
3,328 positions, from 18.6 to 13.6 ms, the loops to 9.8. A mask of it, 11 MB, took 2 more, read for
each head: what sees a position is a number now, and 6.5 ms are left, half of them products.

Processors with tiles (AMX) multiply 16 rows by 16 columns of 16 pairs with one instruction. On two
cores that have them, of a machine whose speed varies, such a row takes 7.8 to 8.7 ms where pairs
take 13 to 19, and 25 to 33 for 48 to 60 with its gradient (medians of three turns of each); two
rows of 1,024 positions, problems of 190, 7.5 to 8.3 for 20 to 23 with it. The gradients of keys and
values are computed transposed for it, [H, T], so that the weights, as they lie, are the tiles'
right sides; by pairs without tiles that takes as long as before, by floats up to a tenth longer.
Later weights became factors in the pass that computes them, where they were written as floats and
read twice; backwards 32 queries are worked on at a time, as most of the tiles' time went to read
and write the gradients of all that they see (with pairs 16 are better); and matrices are transposed
16 numbers by 16. In turns with the code before, forwards 1.06 times as fast, with the gradient
1.21.

Why products of many positions are fast in tiles: XLA writes floats, 41 MB of 3,328 positions and
gate and in, and rounds them after, where they are rounded here as they leave the caches. What of
the right side 32 columns need lies together, 288 pairs deep at a time so that it stays in the
nearest cache, while 288 rows of the left pass it from the second one, as a stream (`tileloaddt1`),
or they would drive it out: tiles that read the same 32 rows from the nearest cache again and again
are slower. What isn't a tile's work is done a bit at a time while tiles multiply: rounding and
writing the last 64 columns, the activation between gate and in, packing the next 32 columns.
Results go to memory past the caches, 128 bytes of a row at once. Two threads write 44 GB/s so, of
results that aren't in a cache; single lines of 64 bytes, each read before it is written, 9 to 18.

A weight is packed once for all rows, into memory; of few positions that isn't worth it. Where the
inner dimension is positions or the vocabulary, so in gradients of weights and the loss's, both
sides are packed as they are needed, part by part, into what stays in a thread's caches: packed
first, as they were, they were written to memory and read again for each 144 rows: by arithmetic 90
MB of the gradient of 576 by 1,536 weights by 4,096 positions, where 39 are read now.

In turns with the code before, which did all that between products, in slow minutes: six layers'
products of 3,328 positions 1.21 times as fast (medians of 31 pairs), a chain of gradients 1.39;
1,536 columns 4.5 ms for 7.2, gate and in 14 for 18, 12 for 16 where both are kept; gradients of 576
by 1,536 weights by 4,096 positions 9.8 for 14.4, of as many the other way round 10.8 for 14.7, the
loss's 98 for 123 and 85 for 122.

Lost: to ask for the left side's next tile, or for the right side's next columns, which come in
time; tiles' sizes set once for a thread (attention 2 % faster); parts of 144, 96 or 48 pairs; left
sides packed first in forward products; results that stay in caches (as fast in products forwards,
gradients 6 % slower).

Cross-entropy never writes logits: it multiplies once for the logarithm of their sum, and again for
their gradient, rounded to bfloat16 as the products with it need it. Seven programs of XLA's ran
over 512 positions' logits each, the table was cast for every such piece, and added to the table's
gradient, 113 MB, as often. In profiles of a step of finetuning all that had to do with logits took
34 % of the time, and takes 20, of which 17 are these products and the loss.
"""

import ctypes
import functools
import hashlib
import math
import os
import re
import subprocess
import tempfile
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import jaxlib.version
import numpy as np

from gsm_verifier import sharding

SOURCE = Path(__file__).with_suffix(".cc")
TARGET = "gsm_verifier_cpu"
DTYPES = ("float32", "bfloat16")
WORKS = ("decode", "forwards", "backwards")  # of attention
OPTIONS = ("-std=c++17", "-O3", "-march=native")


def _compiler(*arguments: str) -> str:
    """The output of a call of the C++ compiler."""
    command = [os.environ.get("CXX", "c++"), *OPTIONS, *arguments]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=True)
    return done.stdout


def library() -> Path:
    """The compiled kernel, of this source, compiler, processor and jaxlib.

    Raises:
      OSError, subprocess.SubprocessError: there is no compiler, or no place for what it compiles.
    """
    macros = _compiler("-dM", "-E", "-x", "c++", os.devnull)  # name compiler and processor
    made_of = (SOURCE.read_text(), macros, *OPTIONS, jaxlib.version.__version__)
    key = hashlib.sha256("\n".join(made_of).encode())
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "gsm_verifier"
    compiled = cache / f"{SOURCE.stem}-{key.hexdigest()[:16]}.so"
    if not compiled.exists():
        cache.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=cache) as folder:
            built = Path(folder) / compiled.name
            headers = f"-I{jax.ffi.include_dir()}"
            _compiler("-fPIC", "-shared", headers, str(SOURCE), "-o", str(built))
            built.replace(compiled)  # whole or not at all, for processes that start together
    return compiled


@functools.cache
def loaded() -> ctypes.CDLL | None:
    """The kernel. Asked for the first time, it is compiled and made known to XLA.

    If it can't be, there is none, and a warning says why.
    """
    try:
        compiled = ctypes.CDLL(str(library()))
        names = [f"{work}_{dtype}" for work in WORKS for dtype in DTYPES] + ["draw_float32"]
        if compiled.has_tiles():
            names += [f"{work}_bfloat16" for work in ("product", "gated", "cross_entropy")]
        handlers = {name: jax.ffi.pycapsule(getattr(compiled, name)) for name in names}
    except (OSError, RuntimeError, AttributeError, subprocess.SubprocessError) as error:
        told = (getattr(error, "stderr", None) or str(error)).strip() or type(error).__name__
        lines = told.splitlines()
        reason = next((line for line in lines if "error" in line), lines[0])  # not where it stands
        warnings.warn(
            "attention and draws on CPU are computed in JAX, several times slower than in C++, "
            f"which can't be compiled (by c++, or what CXX names) or loaded: {reason}",
            stacklevel=1,
        )
        return None
    for name, handler in handlers.items():
        jax.ffi.register_ffi_target(f"{TARGET}_{name}", handler, platform="cpu")
    return compiled


def available() -> bool:
    """Is the kernel there?"""
    return loaded() is not None


def has_tiles() -> bool:
    """And does the processor have tiles (AMX), which the process may use?"""
    kernel = loaded()
    return kernel is not None and bool(kernel.has_tiles())


Q, KV = "BTKGH", "BTKH"  # the dimensions of queries, and of keys and values
SEEN = ("BT", "BT", "")  # of the ends and places of positions, and of the window
TOTAL = "BTKG"  # of the logarithm of the sum of a query's weights
PROMPTS, PAGES = "UPKSH", "UZKWH"  # keys and values of prompts, and of pages of branches
NEW = ("UTKGH", "UTKH", "UTKH")  # queries, keys and values of slots
PACKED = "S"  # of what a product packs: a letter that no mesh cuts
SLOTS = ("UP", "UT", "UT", "UTJ")  # lengths of prompts; of slots the prompt, age and pages


def _call(
    work: str,
    letters: Sequence[str],
    out: Sequence[str],
    results: Callable[..., Sequence[Any]],
    flops: Callable[..., int],
    *arrays: jax.Array,
    dtype: Any,
    aliases: dict[int, int] | None = None,
    **words: Any,
) -> tuple[jax.Array, ...]:
    """A work in C++ on each device's part of the arrays, whose dimensions are `letters`.

    Args:
      out: dimensions of the results. results: arrays like them, of the parts.
      flops: the most it computes, of the parts, which is told to the plan.
      dtype: one of `DTYPES`. aliases: of arguments that become results.
    """

    def call(*parts: jax.Array) -> tuple[jax.Array, ...]:
        like = tuple(jax.ShapeDtypeStruct(x.shape, x.dtype) for x in results(*parts))
        target = f"{TARGET}_{work}_{dtype}"
        kernel = jax.ffi.ffi_call(target, like, input_output_aliases=aliases)
        return tuple(kernel(*parts, flops=np.int64(flops(*parts)), **words))

    return sharding.local(call, letters, tuple(out), *arrays)


def _decode_flops(*parts: Any) -> int:
    """Of all slots with all of a prompt, and of all pages."""
    q_UTKGH, prompt_UPKSH, pages_UZKWH = parts[0], parts[3], parts[5]
    return 4 * (q_UTKGH.size * prompt_UPKSH.shape[3] + q_UTKGH.shape[3] * pages_UZKWH.size)


def decode_attention(
    q_UTKGH: jax.Array,
    k_UTKH: jax.Array,
    v_UTKH: jax.Array,
    prompt_k_UPKSH: jax.Array,
    prompt_v_UPKSH: jax.Array,
    own_k_UZKWH: jax.Array,
    own_v_UZKWH: jax.Array,
    prompt_length_UP: jax.Array,
    prompt_UT: jax.Array,
    age_UT: jax.Array,
    table_UTJ: jax.Array,
    window: jax.Array,
    scale: float,
) -> tuple[jax.Array, ...]:
    """What each slot, whose own positions are 0 to its age, sees in its prompt and its branch.

    Args:
      q_UTKGH: of one of `DTYPES`, which all keys and values, and the result, have too.
      k_UTKH, v_UTKH: the key and value at a slot's age, which aren't in its branch yet.
      prompt_UT: which of its pool's prompts a slot has.
      table_UTJ: a slot's pages in its pool. Without all of them up to its age, or with a prompt
        that there isn't, it is left out, and gets 0.
      window: int32, how many positions back a slot sees, its last included; 0 for all.
      scale: of the logits.

    Returns:
      That, [U, T, K, G, H], and the pages with the new keys and values, the same arrays.
    """
    slots = (prompt_length_UP, prompt_UT, age_UT, table_UTJ)
    return _call(
        "decode",
        (*NEW, PROMPTS, PROMPTS, PAGES, PAGES, *SLOTS, ""),
        (NEW[0], PAGES, PAGES),
        lambda *parts: (parts[0], parts[5], parts[6]),
        _decode_flops,
        *(q_UTKGH, k_UTKH, v_UTKH, prompt_k_UPKSH, prompt_v_UPKSH, own_k_UZKWH, own_v_UZKWH),
        *(x.astype(jnp.int32) for x in slots),
        window,
        dtype=own_k_UZKWH.dtype,
        aliases={5: 1, 6: 2},
        scale=np.float32(scale),
    )


@functools.partial(jax.custom_vjp, nondiff_argnums=(6,))
def whole_attention(
    q_BTKGH: jax.Array,
    k_BTKH: jax.Array,
    v_BTKH: jax.Array,
    end_BT: jax.Array,
    position_BT: jax.Array,
    window: jax.Array,
    scale: float,
) -> jax.Array:
    """Softmax attention of rows that see themselves, [B, T, K, G, H], all of one of `DTYPES`.

    Args:
      end_BT: a position is seen by itself and by those after it that are before its end.
      position_BT, window: and of these by those whose position is less than a window, int32, above
        its own; 0: by all.
      scale: of the logits.
    """
    return _forwards(q_BTKGH, k_BTKH, v_BTKH, end_BT, position_BT, window, scale)[0]


def _forwards(
    q: jax.Array, k: jax.Array, v: jax.Array, end: Any, position: Any, window: Any, scale: float
) -> Any:
    """Its result, and what the gradient is computed from."""
    given = (q, k, v, *(x.astype(jnp.int32) for x in (end, position, window)))
    out, log_total = _call(
        "forwards",
        (Q, KV, KV, *SEEN),
        (Q, TOTAL),
        lambda q, *_: (q, jax.ShapeDtypeStruct(q.shape[:-1], jnp.float32)),
        lambda q, *_: 4 * q.size * q.shape[1],
        *given,
        dtype=q.dtype,
        scale=np.float32(scale),
    )
    return out, (*given, out, log_total)


def _backwards(scale: float, kept: tuple[jax.Array, ...], d_out: jax.Array) -> tuple[Any, ...]:
    """Its gradients; the weights are computed anew."""
    gradients = _call(
        "backwards",
        (Q, KV, KV, *SEEN, Q, TOTAL, Q),
        (Q, KV, KV),
        lambda q, k, v, *_: (q, k, v),
        lambda q, *_: 10 * q.size * q.shape[1],
        *(*kept, d_out),
        dtype=d_out.dtype,
        scale=np.float32(scale),
    )
    return (*gradients, None, None, None)


whole_attention.defvjp(_forwards, _backwards)


def draw(logits_UCV: jax.Array, uniform_UC: jax.Array, temperature: float, text_size: int) -> Any:
    """(tokens drawn, [U, C]; logarithm of the sum of the exponentials of the logits, [U, C]).

    Args:
      logits_UCV: float32; each device must have its slots' whole vocabulary.
      uniform_UC: from 0 to 1, float32. temperature: 0 takes the likeliest.
      text_size: of the vocabulary; what lies beyond isn't looked at.
    """
    return _call(
        "draw",
        ("UCV", "UC"),
        ("UC", "UC"),
        lambda _, uniform: (jax.ShapeDtypeStruct(uniform.shape, jnp.int32), uniform),
        lambda logits, _: 4 * logits.size,
        logits_UCV,
        uniform_UC,
        dtype=jnp.dtype(jnp.float32),
        coldness=np.float32(1 / temperature if temperature else 0),
        text_size=np.int64(text_size),
    )


LEAST = 1024  # positions, of fewer XLA's products are as fast
PANEL = 32  # columns, or numbers of an inner dimension, that are packed together
DEEP = 2048  # numbers of an inner dimension, of more a row's don't stay in a cache


class _Matrices(NamedTuple):
    """Sizes of a product [rows, inner] by [inner, columns], and which factor lies transposed."""

    rows: int
    inner: int
    columns: int
    x_turned: bool
    m_turned: bool

    @property
    def room(self) -> int:
        """For how many numbers there must be room: m's, if they are packed first, not as needed."""
        if self.x_turned or self.inner % PANEL or self.inner > DEEP:
            return 0
        return -(-self.columns // PANEL) * PANEL * self.inner


def _matrices(formula: str, x: jax.Array, m: jax.Array) -> _Matrices | None:
    """What a formula of einsum multiplies, if that is two matrices, as they lie or transposed."""
    of_x, of_m, of_y = re.split(",|->", formula)
    rows, columns = ("".join(a for a in letters if a in of_y) for letters in (of_x, of_m))
    inner = "".join(a for a in of_x if a not in of_y)
    x_turned, m_turned = not of_x.endswith(inner), of_m.endswith(inner)
    lying = (
        inner + rows if x_turned else rows + inner,
        columns + inner if m_turned else inner + columns,
    )
    if (*lying, rows + columns) != (of_x, of_m, of_y):
        return None
    sizes = dict(zip(of_x + of_m, x.shape + m.shape, strict=True))
    size = (math.prod(sizes[a] for a in letters) for letters in (rows, inner, columns))
    return _Matrices(*size, x_turned, m_turned)


def in_tiles(formula: str, x: jax.Array, m: jax.Array) -> bool:
    """Can `product`, `gated` or `cross_entropy` make it? On one device that has tiles."""
    mesh = jax.sharding.get_abstract_mesh()
    if x.dtype != jnp.bfloat16 or mesh.size > 1:
        return False
    found = _matrices(formula, x, m)
    return bool(found and found.inner % 2 == 0 and has_tiles())


def multiplies(formula: str, x: jax.Array, m: jax.Array) -> bool:
    """And is that faster than what XLA makes? Of enough positions."""
    positions = math.prod(n for a, n in zip(formula, x.shape, strict=False) if a in "BT")
    return positions >= LEAST and in_tiles(formula, x, m)


def _multiplied(
    work: str,
    formula: str,
    x: jax.Array,
    ms: Sequence[jax.Array],
    results: Sequence[tuple[str, Any]],
    *others: jax.Array,
    passes: int = 1,
    **words: Any,
) -> tuple[jax.Array, ...]:
    """What a work makes of the products of x and each of one or two m's.

    Args:
      passes: how often it multiplies.
      results: letters and dtype of each; without a dtype there is nothing of it.
      others: arrays that it needs besides, whose only letter is B.
    """
    of_x, of_m, _ = re.split(",|->", formula)
    sizes = dict(zip(of_x + of_m, x.shape + ms[0].shape, strict=True))
    rows, *sizes_and_turns = matrices = _matrices(formula, x, ms[0])
    like = [
        jax.ShapeDtypeStruct([sizes[a] for a in letters] if dtype else [0], dtype or x.dtype)
        for letters, dtype in results
    ]
    room = jax.ShapeDtypeStruct([len(ms) * matrices.room], x.dtype)
    return _call(
        work,
        (of_x, *[of_m] * len(ms), *["B"] * len(others)),
        (*(letters if dtype else PACKED for letters, dtype in results), PACKED),
        lambda *_: (*like, room),
        lambda *_: 2 * rows * matrices.inner * matrices.columns * len(ms) * passes,
        x,
        *ms,
        *others,
        dtype=x.dtype,
        **dict(zip(matrices._fields[1:], sizes_and_turns, strict=True)),
        **words,
    )[:-1]


def product(formula: str, x: jax.Array, m: jax.Array, dtype: Any) -> jax.Array:
    """einsum(formula, x, m) of bfloat16, accumulated in float32, rounded to a dtype of `DTYPES`.

    Args:
      formula: of two matrices, whose rows, columns and inner dimensions may be several letters;
        `in_tiles` must say yes to it, as to those of `gated` and `cross_entropy`.
      m: of bfloat16 too.
    """
    return _multiplied("product", formula, x, [m], [(formula.split(">")[1], dtype)])[0]


def gated(
    formula: str, x: jax.Array, gate: jax.Array, value: jax.Array, gelu: bool, keep: bool
) -> tuple[jax.Array, ...]:
    """silu(x gate) * (x value), or with `gelu` GELU by its tanh; the products are `product`'s.

    Args:
      keep: the two products too, from which its gradient is computed; else there is nothing in
        their place.
    """
    of_y = formula.split(">")[1]
    results = [(of_y, x.dtype)] + [(of_y, x.dtype if keep else None)] * 2
    return _multiplied("gated", formula, x, [gate, value], results, gelu=np.bool_(gelu))


def cross_entropy(
    formula: str,
    x_BD: jax.Array,
    table: jax.Array,
    target_B: jax.Array,
    weight_B: jax.Array,
    text_size: int,
    gradient: bool,
) -> tuple[jax.Array, jax.Array]:
    """Each row's cross-entropy times its weight, float32 [B], and its gradient by logits, [B, V].

    Logits are accumulated in float32; their gradient is rounded to bfloat16, as the products it
    goes into need it.

    Args:
      formula: of the logits, BD,VD->BV or BD,DV->BV.
      text_size: of the vocabulary; what lies beyond has no logits.
      gradient: without, there is nothing in its place.
    """
    return _multiplied(
        "cross_entropy",
        formula,
        x_BD,
        [table],
        [("B", jnp.dtype(jnp.float32)), ("BV", x_BD.dtype if gradient else None)],
        target_B.astype(jnp.int32),
        weight_B,
        passes=1 + gradient,
        text_size=np.int64(text_size),
    )
