"""What a run needs, before anything is paid for: every stage's real programs, compiled, not run.

    python -m gsm_verifier.main --config=configs/paper/scale.py:6b --plan --topology=v5e:8x8

XLA's own compiler for the TPU, which `libtpu` brings to any machine, compiles the programs the
stages call, for a slice nobody needs to own: whether they fit is its word. What they compute is
counted in their jaxprs, what they move in their HLO. Times are best cases: the slowest of
computing, reading memory and sending to other chips, each at the chip's full rate and all at once.
"""

import math
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np
from ml_collections import ConfigDict

from gsm_verifier import checkpoint, hlo, score, sharding
from gsm_verifier.config import validate
from gsm_verifier.data.packing import FIELDS
from gsm_verifier.model import config as model_config
from gsm_verifier.model import hf, transformer
from gsm_verifier.model.config import ModelConfig
from gsm_verifier.model.transformer import Transformer
from gsm_verifier.sample import decode, engine
from gsm_verifier.train import loop
from gsm_verifier.train.batch import Batch
from gsm_verifier.train.losses import Objective

# GSM8K: problems, and their mean lengths in GPT-2's tokens.
TRAIN, TEST = 7473, 1319
QUESTION, SOLUTION = 56, 97  # with the end-of-text token
LONGEST_QUESTION = 256
DOCUMENT = 100


@dataclass(frozen=True)
class Chip:
    """What a chip does at best: bytes of memory, bfloat16 FLOP/s, bytes/s of memory and links."""

    name: str
    memory: float
    flops: float
    bandwidth: float
    links: float


GIB = 2**30
CHIPS = {  # by JAX's name; Cloud TPU's documentation
    "TPU v4": Chip("v4", 32 * GIB, 275e12, 1228e9, 300e9),
    "TPU v5 lite": Chip("v5e", 16 * GIB, 197e12, 819e9, 200e9),
    "TPU v5": Chip("v5p", 95 * GIB, 459e12, 2765e9, 600e9),
    "TPU v6 lite": Chip("v6e", 32 * GIB, 918e12, 1640e9, 448e9),
}


@dataclass(frozen=True)
class Program:
    """A jitted function of a stage and the shapes it is called with.

    Attributes:
      unit, serves: of what and how many one run works on.
      key: programs of one key are compiled once.
      useful: FLOPs of the model in one run: 2 a parameter and token, 6 with the backward pass.
    """

    what: str
    unit: str
    serves: int
    key: tuple[Any, ...]
    jitted: Any
    arguments: tuple[Any, ...]
    useful: float


@dataclass(frozen=True)
class Cost:
    """One run of a compiled program, on each of the devices.

    Attributes:
      memory: bytes it needs, arguments included. fits: whether the compiler found room for it.
      flops: multiplications and additions of matrix products. traffic: bytes moved.
    """

    memory: float
    fits: bool
    flops: float
    traffic: hlo.Traffic | None

    def seconds(self, chip: Chip) -> dict[str, float]:
        """Best-case times of what can limit it."""
        if self.traffic is None:
            return {"-": math.nan}
        return {
            "compute": self.flops / chip.flops,
            "memory": self.traffic.hbm / chip.bandwidth,
            "links": self.traffic.collectives.total() / chip.links,
        }


def devices_of(topology: str) -> list[Any]:
    """The devices of a TPU slice, such as "v5e:4x4"; none is needed.

    Raises:
      ValueError: libtpu isn't installed, or there is no such slice.
    """
    from jax.experimental import topologies

    os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")  # this machine is no TPU's host
    try:
        return topologies.get_topology_desc(platform="tpu", topology_name=topology).devices
    except (RuntimeError, ValueError, NotImplementedError) as error:
        if "INVALID_ARGUMENT" in str(error):
            known = "v4:2x2x2, v5e:4x4, v5p:4x4x8, v6e:8x8 and their like"
            told = str(error).splitlines()[0]
            raise ValueError(f"--topology={topology}: use {known} ({told})") from error
        raise ValueError(
            f"--topology={topology} needs libtpu: pip install 'gsm_verifier[tpu]'"
        ) from error


def flops(jaxpr: Any) -> float:
    """FLOPs of the matrix products of a jaxpr on all devices; a `while` body counts once."""
    total = 0.0
    for equation in jaxpr.eqns:
        if equation.primitive.name == "dot_general":
            ((contracted, _), _) = equation.params["dimension_numbers"]
            shape = equation.invars[0].aval.shape
            length = math.prod(shape[axis] for axis in contracted)
            total += 2 * length * equation.outvars[0].aval.size
            continue
        times = equation.params.get("length", 1) if equation.primitive.name == "scan" else 1
        if equation.primitive.name == "shard_map":
            times = equation.params["mesh"].size
        total += times * sum(map(flops, _inside(equation.params.values())))
    return total


def _inside(values: Any) -> Iterator[Any]:
    """The jaxprs among an equation's parameters."""
    for value in values:
        if isinstance(value, (tuple, list)):
            yield from _inside(value)
        elif hasattr(value, "eqns"):
            yield value
        elif hasattr(value, "jaxpr"):
            yield value.jaxpr


def compile_(program: Program, mesh: jax.sharding.Mesh) -> Cost:
    """Compile a program for the devices of a mesh."""
    with jax.set_mesh(mesh):
        traced = program.jitted.trace(*program.arguments)
        computed = flops(traced.jaxpr.jaxpr) / mesh.size
        try:
            compiled = traced.lower().compile()
        except jax.errors.JaxRuntimeError as error:
            used = re.search(r"Used ([\d.]+)([KMGT]) of [\d.]+[KMGT] hbm", str(error))
            if not used:
                raise
            size = float(used.group(1)) * 1024 ** " KMGT".index(used.group(2))
            return Cost(size, False, computed, None)
    m = compiled.memory_analysis()
    memory = m.argument_size_in_bytes + m.output_size_in_bytes - m.alias_size_in_bytes
    memory += m.temp_size_in_bytes + m.generated_code_size_in_bytes
    return Cost(memory, True, computed, hlo.traffic(compiled.as_text()))


class Programs:
    """The programs of a config's stages on a mesh."""

    def __init__(self, config: ConfigDict, mesh: jax.sharding.Mesh):
        self._config, self._mesh = config, mesh
        keys = config.model
        if keys.pretrained:
            found = hf.read_config(hf.resolve(keys.pretrained))
            self._model = found.with_(dtype=keys.dtype, remat=keys.remat)
        else:
            self._model = model_config.from_keys(keys, config.text.vocab_size)

    def _parameters(self, model: ModelConfig, cast: bool = False) -> Any:
        def one(x: Any) -> jax.ShapeDtypeStruct:
            dtype = model.dtype if cast and len(x.shape) > 1 else x.dtype
            return jax.ShapeDtypeStruct(x.shape, dtype)

        shapes = jax.tree.map(one, transformer.shapes(model))
        return checkpoint.abstract(shapes, transformer.shardings(model, self._mesh))

    def _batch(self, A: int, B: int, T: int) -> Batch:
        where = sharding.named(self._mesh, "ABT")
        fields = {
            name: jax.ShapeDtypeStruct((A, B, T), np.dtype(dtype), sharding=where)
            for name, dtype in FIELDS.items()
        }
        return Batch.of(fields)  # type: ignore[arg-type]

    def train(self, stage: str) -> Program:
        """The optimiser step of a training stage."""
        options, model = self._config[stage], self._model
        cut = loop.plan(10**9, options, sharding.row_devices(self._mesh))
        tx = loop.make_optimizer(options, cut.steps)
        shapes, where = loop.state_shardings(model, tx, self._mesh)
        net = Transformer(model, dropout=options.dropout)
        A, B, T = cut.accumulate, cut.rows, options.row_tokens
        return Program(
            what="step",
            unit="token",
            serves=A * B * T,
            key=("train", A, B, T, options.dropout > 0, options.clip_norm > 0),
            jitted=loop.jit_step(net, Objective(), tx, self._config.seed, where),
            arguments=(checkpoint.abstract(shapes, where), self._batch(A, B, T)),
            useful=6 * A * B * T * (model.parameters + model.vocab_size * model.width),
        )

    def sample(self) -> tuple[Program, Program]:
        """A prefill of some prompts, and one step of all slots."""
        options, mesh = self._config.sample, self._mesh
        model = self._model.with_(scan_layers=False)
        devices = sharding.row_devices(mesh)
        P, C = math.ceil(options.prompts / devices) * devices, options.slots
        S = math.ceil(LONGEST_QUESTION / engine.PROMPT_BUCKET) * engine.PROMPT_BUCKET
        B = engine.prefill_rows(P, mesh)
        sampling = engine.sampling_of(options, model.text_size - 1, self._config.seed, P * C)
        prefill, advance = engine.programs(model, mesh, sampling)
        params = self._parameters(model, cast=True)
        slots = decode.slot_shapes(model, mesh, P, C, S, options.max_tokens)

        def array(letters: str, *shape: int, dtype: Any = np.int32) -> jax.ShapeDtypeStruct:
            return jax.ShapeDtypeStruct(shape, dtype, sharding=sharding.named(mesh, letters))

        orders = jax.tree.map(
            lambda x: array("PC" + "S" * (x.ndim - 2), *x.shape, dtype=x.dtype),
            decode.no_orders(P, C),
        )
        grammar = jax.ShapeDtypeStruct(
            (model.vocab_size, engine.GRAMMAR), np.int32, sharding=sharding.named(mesh, ())
        )
        head = model.vocab_size * model.width
        return (
            Program(
                what="prefill",
                unit="prompt",
                serves=B,
                key=("prefill",),
                jitted=prefill,
                arguments=(params, slots, array("BT", B, S), array("B", B), array("B", B)),
                useful=2 * B * S * model.parameters,
            ),
            Program(
                what="decode",
                unit="token",
                serves=P * C,
                key=("decode",),
                jitted=advance,
                arguments=(params, slots, orders, grammar),
                useful=2 * P * C * (model.parameters + head),
            ),
        )

    def score(self) -> Program:
        """The values of a batch."""
        options, model = self._config.score, self._model
        devices = sharding.row_devices(self._mesh)
        B, T = math.ceil(options.rows / devices) * devices, options.row_tokens
        return Program(
            what="values",
            unit="token",
            serves=B * T,
            key=("score",),
            jitted=score.program(model, self._mesh, self._config.verify.squash),
            arguments=(self._parameters(model), self._batch(1, B, T)),
            useful=2 * B * T * model.parameters,
        )

    def work(self) -> list[tuple[str, Program, float]]:
        """(stage, program, how many of its units the stage has), of problems as long as GSM8K's."""
        config = self._config
        train, test = config.data.train_size or TRAIN, config.data.test_size or TEST
        n, m = config.sample.completions, config.sample.test_completions
        sampled = min(config.sample.train_problems or train, train)
        prefill, decoded = self.sample()
        trees = math.ceil(n / config.verify.branches)
        gold = SOLUTION if config.verify.objective == "joint" else 0
        judged = trees * (QUESTION + gold) + n * (SOLUTION + 1)
        found = [
            ("pretrain", "pretrain", config.pretrain.generated * DOCUMENT),
            ("finetune", "finetune", train * (QUESTION + SOLUTION)),
            ("finetune, baseline", "baseline", train * (QUESTION + SOLUTION)),
        ]
        work = [
            (name, self.train(key), config[key].epochs * tokens)
            for name, key, tokens in found
            if config[key].epochs
        ]
        work += [("sample", prefill, sampled), ("sample", decoded, sampled * n * SOLUTION)]
        work += [("verify", self.train("verify"), config.verify.epochs * sampled * judged)]
        work += [("score", prefill, 2 * test), ("score", decoded, test * (m + 1) * SOLUTION)]
        work += [("score", self.score(), test * (QUESTION + m * (SOLUTION + 1)))]
        return work


COLUMNS = (
    "stage", "program", "HBM, GiB a chip", "TFLOP a chip", "GB of HBM", "GB sent", "best ms",
    "limit", "useful", "runs", "chip-hours",
)  # fmt: skip


def table(config: ConfigDict, topology: str | None) -> str:
    """The plan as a Markdown table.

    Args:
      topology: a TPU slice, such as "v5e:4x4"; None: the devices at hand.

    Raises:
      ValueError: a nonsensical config, topology or mesh, or devices whose rates aren't known.
    """
    validate(config)
    devices = devices_of(topology) if topology else jax.devices()
    chip = CHIPS.get(devices[0].device_kind)
    mesh = sharding.make_mesh(*(config.mesh[axis] for axis in sharding.AXES), devices=devices)
    costs: dict[tuple[Any, ...], Cost] = {}
    rows = []
    total = 0.0
    for stage, program, amount in Programs(config, mesh).work():
        if program.key not in costs:
            costs[program.key] = compile_(program, mesh)
        row, hours = _row(stage, program, amount, costs[program.key], chip, len(devices))
        rows.append(row)
        total += hours
    sizes = " ".join(f"{axis}={size}" for axis, size in mesh.shape.items())
    kind = f"{topology}, {len(devices)} chips" if topology else f"{len(devices)} devices at hand"
    lines = [f"{kind}: {sizes}", ""]
    lines += ["| " + " | ".join(x) + " |" for x in (COLUMNS, ["---"] * len(COLUMNS), *rows)]
    return "\n".join([*lines, "", f"chip-hours in all, at best: {_number(total)}"])


def _row(
    stage: str, program: Program, amount: float, cost: Cost, chip: Chip | None, chips: int
) -> tuple[list[str], float]:
    runs = math.ceil(amount / program.serves)
    memory = f"{cost.memory / GIB:.1f}"
    if chip:
        memory += f" of {chip.memory / GIB:.0f}" + ("" if cost.fits else ": TOO MUCH")
    moved = ["", ""]
    if cost.traffic:
        kinds = [f"{kind} {_number(n / 1e9)}" for kind, n in cost.traffic.collectives.items() if n]
        moved = [_number(cost.traffic.hbm / 1e9), ", ".join(kinds) or "0"]
    timed, hours = ["", "", ""], math.nan
    if chip:
        limit, seconds = max(cost.seconds(chip).items(), key=lambda item: item[1])
        hours = runs * seconds * chips / 3600
        useful = program.useful / (seconds * chips * chip.flops)
        timed = [_number(1e3 * seconds), limit, f"{useful:.0%}"]
    row = [stage, program.what, memory, _number(cost.flops / 1e12), *moved, *timed]
    return [*row, f"{runs:,}", _number(hours)], hours


def _number(x: float) -> str:
    """Three digits."""
    return "" if math.isnan(x) else f"{x:,.0f}" if x >= 100 else f"{x:.3g}"
