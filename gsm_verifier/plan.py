"""What a run needs, before anything is paid for: every stage's real programs, compiled, not run.

    python -m gsm_verifier.main --config=configs/paper/scale.py:6b --plan --topology=v5p:2x2x4

XLA's own compiler for the TPU, which `libtpu` brings to any machine, compiles the programs that
the stages call, for a slice nobody needs to own: whether they fit is its word. What they compute,
move and send is read off its result (`gsm_verifier.hlo`). Times are best cases: the slowest of
computing, reading memory and sending to other chips, each at the chip's full rate, all at once and
with every slot and row in use. `--topology=v5p`, without a shape, looks for the smallest slice and
the meshes on which all programs fit.
"""

import copy
import importlib.util
import math
import os
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh
from ml_collections import ConfigDict
from tqdm import tqdm

from gsm_verifier import checkpoint, hlo, processes, score, sharding
from gsm_verifier.config import WORDS, validate
from gsm_verifier.data.packing import FIELDS
from gsm_verifier.model import transformer
from gsm_verifier.model.config import ModelConfig
from gsm_verifier.model.transformer import Transformer
from gsm_verifier.sample import decode, engine
from gsm_verifier.stages import STAGES, Run, refuse_unknown, synthetic_sizes
from gsm_verifier.train import loop
from gsm_verifier.train.batch import Batch, verifier_trees
from gsm_verifier.train.losses import Objective

# GSM8K: its problems, and their lengths in GPT-2's tokens: the mean question and solution, each
# with the token that ends it, and the longest question. A generated document is taken for both.
# A slot that samples them has filled 57 positions in the mean: long ones take more of its steps.
TRAIN, TEST = 7473, 1319
QUESTION, SOLUTION, LONGEST, FILLED = 56, 96, 214, 57
GIB = 2**30


@dataclass(frozen=True)
class Chip:
    """A kind of chip, at best, and the slices it comes in, by growing size; a GPU in none.

    Attributes:
      memory: bytes. flops: of bfloat16 a second. bandwidth: bytes of memory a second.
      links: bytes it sends a second through all its links at once.
    """

    kind: str  # JAX's name
    memory: float
    flops: float
    bandwidth: float
    links: float
    slices: str = ""


_FLAT = "2x2 2x4 4x4 4x8 8x8 8x16 16x16"
_DEEP = "2x2x1 2x2x2 2x2x4 2x4x4 4x4x4 4x4x8 4x8x8 8x8x8 8x8x16 8x16x16"
CHIPS = {  # Cloud TPU's documentation, and the data sheets of NVIDIA's H100 and A100
    "v5e": Chip("TPU v5 lite", 16 * GIB, 197e12, 819e9, 200e9, _FLAT),
    "v5p": Chip("TPU v5", 95 * GIB, 459e12, 2765e9, 600e9, _DEEP),
    "v6e": Chip("TPU v6 lite", 32 * GIB, 918e12, 1640e9, 400e9, _FLAT),
    # Dense FLOPs, where the sheets tell those of sparse matrices too; NVLink in one direction.
    "h100": Chip("NVIDIA H100 80GB HBM3", 80e9, 989e12, 3350e9, 450e9),
    "a100-80gb": Chip("NVIDIA A100-SXM4-80GB", 80e9, 312e12, 2039e9, 300e9),
    "a100-40gb": Chip("NVIDIA A100-SXM4-40GB", 40e9, 312e12, 1555e9, 300e9),
}


PREFILL, DECODE = ("prefill",), ("decode",)  # keys of the programs that sample


@dataclass(frozen=True)
class Program:
    """A jitted function of a stage and the shapes it is called with.

    Attributes:
      serves: how many tokens, or prompts of a prefill, one run works on.
      key: programs of one key are compiled once.
      useful: FLOPs of the model in one run: 2 a parameter and token, 6 with the backward pass.
      mesh: of the devices it is compiled for. steps: of a loop that only its data end.
      moves: bytes a device reads and writes at least, however the program is compiled.
      loads: bytes a device holds while its parameters are loaded, before it runs.
    """

    what: str
    serves: int
    key: tuple[Any, ...]
    jitted: Any
    arguments: tuple[Any, ...]
    useful: float
    mesh: Mesh
    steps: int = 1
    moves: float = 0.0
    loads: float = 0.0

    def floor(self, chip: Chip) -> float:
        """Seconds it takes at least: to compute what is useful, or to move what must be moved."""
        return max(self.useful / (self.mesh.size * chip.flops), self.moves / chip.bandwidth)


@dataclass(frozen=True)
class Cost:
    """One run of a compiled program, on each of the devices.

    Attributes:
      memory: bytes it needs, with its arguments, or to load these if that is more.
      work: None where the compiler found no room; it needs at least so much.
    """

    memory: float
    work: hlo.Work | None

    def fits(self, chip: Chip) -> bool:
        return self.work is not None and self.memory <= chip.memory

    def limit(self, chip: Chip) -> tuple[str, float]:
        """What limits it, and the seconds that takes at best."""
        if not self.work:
            return "", math.nan
        seconds = {
            "compute": self.work.flops / chip.flops,
            "memory": self.work.hbm / chip.bandwidth,
            "links": self.work.sent.total() / chip.links,
        }
        return max(seconds.items(), key=lambda item: item[1])


def slice_devices(topology: str) -> list[Any]:
    """The devices of a TPU slice, such as "v5e:4x4", which nobody needs to own.

    Raises:
      ValueError: there is no such slice, or libtpu, which knows, isn't installed.
    """
    from jax.experimental import topologies

    kind, _, shape = topology.partition(":")
    tpus = [name for name, chip in CHIPS.items() if chip.slices]
    if kind not in tpus:
        raise ValueError(f"--topology={topology}: use {', '.join(tpus)}, or a slice, as v5e:4x4")
    known = CHIPS[kind].slices
    if not importlib.util.find_spec("libtpu"):
        raise ValueError("--topology needs libtpu: pip install -e '.[tpu]'")
    os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")  # this machine is no TPU's host
    os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")  # no TPU is touched
    try:
        if shape.count("x") != known.split()[0].count("x"):
            raise ValueError("another number of dimensions")
        return topologies.get_topology_desc(platform="tpu", topology_name=topology).devices
    except (RuntimeError, ValueError, NotImplementedError) as error:
        told = str(error).partition("\n")[0]
        raise ValueError(f"--topology={topology}: use one of {known} ({told})") from error


# How a TPU's compiler says that there isn't: of all that is needed, or of the temporaries.
NO_ROOM = re.compile(
    r"Used ([\d.]+)([KMGT]) of [\d.]+[KMGT] hbm|\(([\d.]+)([KMGT])\) exceeds available HBM"
)


def compile_(program: Program) -> Cost:
    """Compile a program for the devices of its mesh."""
    with jax.set_mesh(program.mesh):
        lowered = program.jitted.lower(*program.arguments)
        try:
            compiled = lowered.compile()
        except jax.errors.JaxRuntimeError as error:
            found = NO_ROOM.search(str(error))
            if not found:
                raise
            size, unit = (part for part in found.groups() if part)
            return Cost(float(size) * 1024 ** " KMGT".index(unit), None)
    m = compiled.memory_analysis()
    memory = m.argument_size_in_bytes + m.output_size_in_bytes - m.alias_size_in_bytes
    memory += m.temp_size_in_bytes + m.generated_code_size_in_bytes
    return Cost(max(memory, program.loads), hlo.work(compiled.as_text(), program.steps))


def _rows(mesh: Mesh, wanted: int) -> int:
    """`wanted` rows, or as many as make them equally many for every device."""
    devices = sharding.row_devices(mesh)
    return math.ceil(wanted / devices) * devices


def _array(
    mesh: Mesh, letters: Sequence[str | None], dtype: Any, *shape: int
) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, dtype, sharding=sharding.named(mesh, letters))


def _parameters(mesh: Mesh, model: ModelConfig, cast: bool = False) -> Any:
    def one(x: Any) -> jax.ShapeDtypeStruct:
        dtype = model.dtype if cast and len(x.shape) > 1 else x.dtype
        return jax.ShapeDtypeStruct(x.shape, dtype)

    shapes = jax.tree.map(one, transformer.shapes(model))
    return checkpoint.abstract(shapes, transformer.shardings(model, mesh))


def _held(mesh: Mesh, model: ModelConfig) -> int:
    """How many parameters a device holds."""
    arrays = jax.tree.leaves(_parameters(mesh, model))
    return sum(math.prod(x.sharding.shard_shape(x.shape)) for x in arrays)


def _split(mesh: Mesh) -> int:
    """Into how many parts a matrix is split."""
    return sharding.parts("D", mesh) * sharding.parts("F", mesh)


def _with_logits(model: ModelConfig) -> int:
    """Parameters that a token is multiplied with on its way to logits."""
    return model.parameters + model.vocab_size * model.width


def _batch(mesh: Mesh, A: int, B: int, T: int) -> Batch:
    fields = {name: _array(mesh, "ABT", dtype, A, B, T) for name, dtype in FIELDS.items()}
    return Batch.of(fields)  # type: ignore[arg-type]


class Programs:
    """The programs of a config's stages on a mesh, and where it samples on another, there.

    Raises:
      ValueError: a mesh that a run refuses.
    """

    def __init__(self, config: ConfigDict, mesh: Mesh, stages: Sequence[str] = tuple(STAGES)):
        self._config, self._mesh, self._stages = config, mesh, stages
        self._model = model_of(config, sharding.platform(mesh))
        self.sampling_mesh = engine.mesh_of(self._model, mesh, config.mesh.sampling)
        transformer.shardings(self._model, mesh)
        for each in (mesh, self.sampling_mesh):
            sharding.share(each)

    def train(self, stage: str) -> Program:
        """The optimiser step of a training stage."""
        options, model = self._config[stage], self._model
        cut = loop.plan(10**9, options, sharding.row_devices(self._mesh))
        tx = loop.make_optimizer(options, cut.steps)
        shapes, where = loop.state_shardings(model, tx, self._mesh)
        net = Transformer(model, dropout=options.dropout)
        A, B, T = cut.accumulate, cut.rows, options.row_tokens
        tokens = cut.batch * T  # rows that only fill the devices serve none
        held = _held(self._mesh, model)
        return Program(
            what=f"step of {tokens:,} tokens",
            serves=tokens,
            key=("train", A, B, T, options.dropout > 0, options.clip_norm > 0),
            jitted=loop.jit_step(net, Objective(), tx, self._config.seed, where),
            arguments=(checkpoint.abstract(shapes, where), _batch(self._mesh, A, B, T)),
            useful=6 * tokens * _with_logits(model),
            mesh=self._mesh,
            moves=2 * 3 * 4 * held,  # Adam's moments too
        )

    def sample(self) -> tuple[Program, Program]:
        """A prefill of some prompts, and a chunk of steps of all slots."""
        options, mesh = self._config.sample, self.sampling_mesh
        model = self._model.with_(scan_layers=False)
        each = min(options.slots, options.completions)  # as `stages._engine` has it
        U = sharding.row_devices(mesh)
        P, C = engine.pool_sizes(mesh, options.prompts * options.slots // each, each)
        S = math.ceil(LONGEST / engine.PROMPT_BUCKET) * engine.PROMPT_BUCKET
        sampling = engine.sampling_of(options, model.text_size - 1, self._config.seed, U * C)
        prefill, advance = engine.programs(model, mesh, sampling)
        params = _parameters(mesh, model, cast=True)
        pages = sampling.pages(mesh, C)
        slots = decode.slot_shapes(model, mesh, P, C, S, pages)
        rows = decode.Orders.rows(U, C, pages.J)
        orders = _array(mesh, ("U", "C", None), rows.dtype, *rows.shape)
        prompts = (("BT", U, S), ("B", U), ("B", U))
        prompts = tuple(_array(mesh, letters, np.int32, *shape) for letters, *shape in prompts)
        grammar = _array(mesh, "", np.int32, model.vocab_size, engine.GRAMMAR)
        size = np.dtype(model.dtype).itemsize
        loads = (4 + size) * _held(mesh, self._model)  # in float32, and cast beside that
        # Of a prompt's last layer only keys and values are wanted.
        own = 2 * model.width * model.kv_heads * model.head_size
        prompt = model.parameters * (model.layers - 1) // model.layers + own
        weights = size * _with_logits(model) / _split(mesh)
        filled = (P * QUESTION + C * FILLED) * U / mesh.size
        kv = 2 * model.layers * model.kv_heads * model.head_size * filled
        kv *= slots.caches[0].prompt_k_UPKSH.dtype.itemsize
        return (
            Program(
                what=f"prefill of {U} prompts",
                serves=U,
                key=PREFILL,
                jitted=prefill,
                arguments=(params, slots, *prompts),
                useful=2 * U * S * prompt,
                mesh=mesh,
                moves=size * prompt / _split(mesh),
                loads=loads,
            ),
            Program(
                what=f"{sampling.chunk} steps of {U * C} slots",
                serves=U * C * sampling.chunk,
                key=DECODE,
                jitted=advance,
                arguments=(params, slots, orders, grammar),
                useful=U * C * sampling.chunk * 2 * _with_logits(model),
                mesh=mesh,
                steps=sampling.chunk,
                moves=sampling.chunk * (weights + kv),
                loads=loads,
            ),
        )

    def score(self) -> Program:
        """The values of a batch."""
        B, T = _rows(self._mesh, self._config.score.rows), self._config.score.row_tokens
        return Program(
            what=f"values of {B} rows",
            serves=B * T,
            key=("score",),
            jitted=score.program(self._model, self._mesh, self._config.verify.squash),
            arguments=(_parameters(self._mesh, self._model), _batch(self._mesh, 1, B, T)),
            useful=2 * B * T * self._model.parameters,
            mesh=self._mesh,
            moves=4 * self._model.parameters / _split(self._mesh),
        )

    def work(self) -> list[tuple[str, Program, float]]:
        """(stage, program, how much of what it serves it has), of GSM8K's problems or as many.

        Not counted: held-out losses, checkpoints, and what the host does. A verifier of another
        run's size is counted as one of this run's.
        """
        config, sizes = self._config, _sizes(self._config)
        options, verify = config.sample, config.verify
        train, test = sizes["train"], sizes["test"]
        n, m, h = options.completions, options.test_completions, options.heldout_completions
        sampled = min(options.train_problems or train, train)
        heldout = sizes["heldout"] if h else 0
        prefill, decoded = self.sample()
        one = QUESTION + SOLUTION
        question, solution = [0] * QUESTION, [0] * SOLUTION
        # No two completions begin alike.
        judged = [[1 + i] * SOLUTION for i in range(min(n, verify.completions or n))]
        trees = verifier_trees(
            question,
            solution,
            judged,
            [True] * len(judged),
            level=verify.level,
            objective=verify.objective,
            mix=verify.mix,
            branches=verify.branches,
            capacity=max(verify.row_tokens, one + 1),
        )

        def trained(stage: str, tokens: int) -> list[tuple[str, Program, float]]:
            epochs = config[stage].epochs
            return [(stage, self.train(stage), epochs * tokens)] if epochs else []

        sample = [
            ("sample", prefill, sampled + heldout),
            ("sample", decoded, (sampled * n + heldout * h) * SOLUTION),
        ]
        found = [
            *trained("pretrain", config.pretrain.generated * one),
            *trained("finetune", train * one),
            *trained("baseline", train * one),
            *([] if options.imported else sample),
            *trained("verify", sampled * sum(tree.length for tree in trees)),
            ("score", prefill, 2 * test),  # the greedy answers' too
            ("score", decoded, test * (m + 1) * SOLUTION),
            ("score", self.score(), test * (QUESTION + m * SOLUTION)),
        ]
        return [each for each in found if each[0] in _sections(self._stages)]


def _sections(stages: Sequence[str]) -> set[str]:
    """The sections of the config that speak of what these stages compute."""
    return {*stages, *(["baseline"] if "finetune" in stages else [])}


def model_of(config: ConfigDict, platform: str) -> ModelConfig:
    """The model of a config; where it has no tokenizer yet, of as many tokens as are wanted."""
    return Run(config, Path()).wanted_model(config.text.vocab_size, platform)


def _sizes(config: ConfigDict) -> dict[str, int]:
    """Problems of every split, as `stages.prepare` makes them."""
    data = config.data
    if data.source == "synthetic":
        return synthetic_sizes(data)
    heldout = round(TRAIN * data.heldout_fraction)
    train = min(data.train_size or TRAIN, TRAIN - heldout)
    return {"train": train, "heldout": heldout, "test": data.test_size or TEST}


COLUMNS = (
    "stage", "program", "GiB a chip", "TFLOP", "GB moved", "GB sent", "ms at best",
    "limited by", "x floor", "MFU", "runs", "chip-hours",
)  # fmt: skip


def lines(
    config: ConfigDict, topology: str | None, stages: Sequence[str] = tuple(STAGES)
) -> Iterator[str]:
    """The plan as a Markdown table, line by line as its programs are compiled.

    Args:
      topology: a TPU slice, such as "v5e:4x4"; a kind, such as "v5e", for the smallest of its
        slices that fits; None: the devices at hand.
      stages: to plan; others are left out.

    Raises:
      ValueError: an unknown stage, a nonsensical config, topology or mesh, or no slice that fits.
    """
    refuse_unknown(stages)
    validate(config)
    config = copy.deepcopy(config)  # a search sets its word of `mesh.sampling`
    if topology:
        if not jax.config.jax_platforms:
            jax.config.update("jax_platforms", "cpu")  # this machine needn't have what is planned
        # A program for devices that aren't there is written to the cache, but can't be read back.
        jax.config.update("jax_enable_compilation_cache", False)
    searched = topology in CHIPS and bool(CHIPS[topology].slices)
    with processes.bar("plan", "program", total=1) as bar:
        if searched:
            topology, mesh, config.mesh.sampling, costs = _smallest(config, topology, stages, bar)
        else:
            devices = slice_devices(topology) if topology else jax.devices()
            sizes = [config.mesh[axis] for axis in sharding.AXES]
            mesh, costs = sharding.make_mesh(*sizes, devices=devices), {}
        device = mesh.devices.flat[0]
        known, chip = _chip(device, at_hand=not topology)
        place = (
            f"{topology}, {mesh.size} chips" if topology else f"{mesh.size} x {device.device_kind}"
        )
        programs = Programs(config, mesh, stages)
        work = programs.work()
        bar.total = bar.n + len({program.key for _, program, _ in work} - costs.keys())
        sampling = f"mesh.sampling={config.mesh.sampling}: {_axes(programs.sampling_mesh)}"
        bar.clear()
        yield f"{place}: {_axes(mesh)}; {sampling}"
        yield ""
        yield from (f"| {' | '.join(x)} |" for x in (COLUMNS, ["---"] * len(COLUMNS)))
        hours: dict[str, float] = {}
        for stage, program, amount in work:
            if program.key not in costs:
                costs[program.key] = _compile(bar, stage, program)
            row, spent = _row(stage, program, amount, costs[program.key], chip)
            hours[stage] = hours.get(stage, 0) + spent
            bar.clear()
            yield f"| {' | '.join(row)} |"
    yield ""
    if not chip:
        yield f"No times: the rates of a {device.device_kind} aren't known."
        return
    each = ", ".join(f"{stage} {_number(spent)}" for stage, spent in hours.items())
    yield f"Chip-hours at best: {each or 'none'}; in all {_number(sum(hours.values()))}."
    fits = all(cost.fits(chip) for cost in costs.values())
    verdict = "It fits." if fits else "It doesn't fit."
    if searched or not chip.slices:
        yield verdict
    else:
        yield f"{verdict} {_hint(config, known, stages)}"


def _axes(mesh: Mesh) -> str:
    return " ".join(f"{axis}={size}" for axis, size in mesh.shape.items())


def _chip(device: Any, at_hand: bool) -> tuple[str, Chip | None]:
    """A device's kind, by our name and as it is; one at hand has what JAX may take of its memory.

    Of a GPU's that is three quarters, unless XLA_PYTHON_CLIENT_MEM_FRACTION says otherwise.
    """
    found = ((name, chip) for name, chip in CHIPS.items() if chip.kind == device.device_kind)
    name, chip = next(found, ("", None))
    stats = at_hand and device.memory_stats()
    if chip and stats and "bytes_limit" in stats:
        chip = replace(chip, memory=stats["bytes_limit"])
    return name, chip


Costs = dict[tuple[Any, ...], Cost]  # by the programs' keys


def _compile(bar: tqdm, stage: str, program: Program) -> Cost:
    """`compile_`, which can take minutes, and say so."""
    bar.set_postfix_str(f"compiling {stage}: {program.what}")
    cost = compile_(program)
    bar.set_postfix_str("", refresh=False)
    bar.update()
    return cost


def _sizes_of(config: ConfigDict, kind: str, stages: Sequence[str]) -> Iterator[tuple[str, int]]:
    """A kind's slices, and their chips, that hold at least what stays of a model in training."""
    chip, model = CHIPS[kind], model_of(config, "tpu")
    trains = any(name in config and config[name].get("epochs") for name in _sections(stages))
    # Parameters, Adam's moments and the gradient; or parameters cast to sample with.
    state = (4 * 4 if trains else np.dtype(model.dtype).itemsize) * _with_logits(model)
    for shape in chip.slices.split():
        size = math.prod(map(int, shape.split("x")))
        if state / size <= chip.memory:
            yield shape, size


def _hint(config: ConfigDict, kind: str, stages: Sequence[str]) -> str:
    """The smallest slice that may do, without compiling for it."""
    what = "Its weights, and Adam's moments where it trains, need"
    for shape, size in _sizes_of(config, kind, stages):
        return (
            f"{what} at least {kind}:{shape}, with mesh.fsdp={size}; --topology={kind} compiles to "
            "find the smallest slice that fits."
        )
    return f"{what} more than any slice of {kind}."


def _smallest(
    config: ConfigDict, kind: str, stages: Sequence[str], bar: tqdm
) -> tuple[str, Mesh, str, Costs]:
    """The smallest slice, its mesh that needs `tensor` least, the word of `mesh.sampling` that
    decodes fastest, and the costs of the programs there.

    Raises:
      ValueError: no slice of this kind is large enough.
    """
    chip, given = CHIPS[kind], config.mesh.sampling
    for shape, size in _sizes_of(config, kind, stages):
        devices = slice_devices(f"{kind}:{shape}")
        for tensor in (t for t in (1, 2, 4, 8, 16) if size % t == 0):
            bar.set_description(f"plan {kind}:{shape}, tensor={tensor}")
            config.mesh.sampling = given
            try:
                mesh = sharding.make_mesh(1, size // tensor, tensor, devices=devices)
            except ValueError:
                continue
            costs = _fitting(config, mesh, chip, stages, bar, sampling=False)
            if costs is None:
                continue
            decoding: dict[float, tuple[str, Costs]] = {}
            for where in sorted(WORDS["mesh.sampling"], key=lambda word: word != given):
                config.mesh.sampling = where
                sampled = _fitting(config, mesh, chip, stages, bar, sampling=True)
                if sampled is not None:
                    seconds = sampled[DECODE].limit(chip)[1] if sampled else float(where != given)
                    decoding.setdefault(seconds, (where, sampled))
            if decoding:
                fastest, sampled = decoding[min(decoding)]
                return f"{kind}:{shape}", mesh, fastest, costs | sampled
    raise ValueError(f"--topology={kind}: not even its largest slice is large enough")


def _fitting(
    config: ConfigDict,
    mesh: Mesh,
    chip: Chip,
    stages: Sequence[str],
    bar: tqdm,
    sampling: bool,
) -> Costs | None:
    """The costs of the programs that sample, or of all others, if they fit the chip.

    A mesh that a run refuses doesn't.
    """
    costs: Costs = {}
    try:
        work = Programs(config, mesh, stages).work()
    except ValueError:
        return None
    wanted = {p.key: (s, p) for s, p, _ in work[::-1] if (p.key in (PREFILL, DECODE)) == sampling}
    bar.total = bar.n + len(wanted)
    for key, (stage, program) in reversed(wanted.items()):
        costs[key] = _compile(bar, stage, program)
        if not costs[key].fits(chip):
            return None
    return costs


def _row(
    stage: str, program: Program, amount: float, cost: Cost, chip: Chip | None
) -> tuple[list[str], float]:
    """The cells of a program, and the chip-hours of its runs."""
    runs = math.ceil(amount / program.serves)
    memory = f"{cost.memory / GIB:.1f}"
    if chip:
        memory += f" of {chip.memory / GIB:.0f}: {'fits' if cost.fits(chip) else 'TOO MUCH'}"
    done = [""] * 3
    if cost.work:
        kinds = sorted(cost.work.sent.items(), key=lambda item: -item[1])
        sent = ", ".join(f"{kind} {_number(n / 1e9)}" for kind, n in kinds if n)
        done = [_number(cost.work.flops / 1e12), _number(cost.work.hbm / 1e9), sent or "0"]
    timed, hours = [""] * 4, math.nan
    if chip and cost.work:
        limit, seconds = cost.limit(chip)
        spent = seconds * program.mesh.size
        hours, useful = runs * spent / 3600, program.useful / (spent * chip.flops)
        over = f"{seconds / program.floor(chip):.2f}"
        timed = [_number(1e3 * seconds), limit, over, f"{useful:.0%}"]
    row = [stage, program.what, memory, *done, *timed, f"{runs:,}", _number(hours)]
    return row, hours


def _number(x: float) -> str:
    """Three digits."""
    return "-" if math.isnan(x) else f"{x:,.0f}" if x >= 100 else f"{x:.3g}"
