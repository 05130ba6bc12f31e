"""The one training loop: pretraining, finetuning and verifier training differ in their trees."""

import math
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from gsm_verifier import checkpoint, processes, sharding
from gsm_verifier.data.packing import PackedRows, Tree
from gsm_verifier.model import transformer
from gsm_verifier.model.config import ModelConfig
from gsm_verifier.model.transformer import Params, Transformer
from gsm_verifier.train import losses, optimizer
from gsm_verifier.train.batch import Batch
from gsm_verifier.train.losses import Objective

# By default XLA:CPU starts whatever it can: what only the backward pass needs is made, and kept, in
# the forward pass. With this SmolLM2-135M trains in 5,280 MiB instead of 6,020, in the same time.
CPU_OPTIONS = {"xla_cpu_scheduler_type": "CPU_SCHEDULER_TYPE_MEMORY_OPTIMIZED"}


class TrainState(NamedTuple):
    """Everything that changes in training, all on the mesh."""

    params: Params
    opt_state: Any
    step: jax.Array


class Plan(NamedTuple):
    """How a run is cut into steps.

    Attributes:
      rows: rows of a microbatch. accumulate: microbatches of a step. steps: of the whole run.
      batch: rows of a step that hold data, the same on any number of devices; the last of its
        rows * accumulate are empty where the devices don't divide them.
    """

    rows: int
    accumulate: int
    steps: int
    batch: int


def plan(source_rows: int, options: Any, devices: int) -> Plan:
    """Cut `source_rows` rows into steps of about `options.batch_tokens` tokens."""
    wanted = max(1, round(options.batch_tokens / options.row_tokens))
    rows = min(wanted, options.microbatch_rows)
    batch = rows * max(1, round(wanted / rows))
    rows = math.ceil(rows / devices) * devices
    return Plan(rows, math.ceil(batch / rows), math.ceil(source_rows / batch), batch)


def make_optimizer(options: Any, steps: int) -> optax.GradientTransformation:
    """The optimiser of a stage's training options, over `steps` steps."""
    return optimizer.make(
        options.learning_rate,
        steps,
        warmup=options.warmup_steps,
        beta1=options.adam_beta1,
        beta2=options.adam_beta2,
        epsilon=options.adam_epsilon,
        weight_decay=options.weight_decay,
        clip=options.clip_norm,
    )


def make_step(
    model: Transformer, objective: Objective, tx: optax.GradientTransformation, seed: int
) -> Callable[[TrainState, Batch], tuple[TrainState, dict[str, jax.Array]]]:
    """One optimiser step on a Batch of [A, B, T] arrays: A accumulated microbatches.

    The two losses are means over the whole step's weights, and what dropout drops of a row depends
    on its number among the step's, so that how a step is cut into microbatches doesn't change its
    gradient.
    """

    def step(state: TrainState, batch_ABT: Batch) -> tuple[TrainState, dict[str, jax.Array]]:
        key = jax.random.fold_in(jax.random.key(seed), state.step)

        def micro(params: Params, batch: Batch, index: jax.Array) -> tuple[jax.Array, Any]:
            B = batch.tokens_BT.shape[0]
            row_B = index * B + jnp.arange(B)
            key_B = jax.vmap(jax.random.fold_in, (None, 0))(key, row_B) if model.dropout else None
            sums = losses.loss_sums(model, params, batch, objective, key_B)
            means = losses.mean_losses(sums, batch_ABT)
            return means["lm"] + means["value"], means

        def accumulate(carry: Any, item: tuple[Batch, jax.Array]) -> tuple[Any, None]:
            got = jax.grad(micro, has_aux=True)(state.params, *item)
            return jax.tree.map(jnp.add, carry, got), None

        A = batch_ABT.tokens_BT.shape[0]
        if A == 1:
            first = jax.tree.map(lambda x: x[0], batch_ABT)
            grads, means = jax.grad(micro, has_aux=True)(state.params, first, jnp.zeros((), int))
        else:
            zero = (
                jax.tree.map(jnp.zeros_like, state.params),
                {"lm": jnp.zeros(()), "value": jnp.zeros(())},
            )
            (grads, means), _ = jax.lax.scan(accumulate, zero, (batch_ABT, jnp.arange(A)))
        updates, opt_state = tx.update(grads, state.opt_state, state.params)
        params = optax.apply_updates(state.params, updates)
        metrics = {
            "loss": means["lm"] + means["value"],
            "lm_loss": means["lm"],
            "value_loss": means["value"],
            "grad_norm": optax.tree.norm(grads),
            "tokens": (batch_ABT.end_BT > 0).sum(),
        }
        return TrainState(params, opt_state, state.step + 1), metrics

    return step


def jit_step(
    model: Transformer,
    objective: Objective,
    tx: optax.GradientTransformation,
    seed: int,
    where: TrainState,
) -> Any:
    """`make_step` compiled for a TrainState that lives on the shardings `where`, and is donated."""
    step = make_step(model, objective, tx, seed)
    on_cpu = sharding.platform(where.step.mesh) == "cpu"
    options = sharding.xla_options(**CPU_OPTIONS) if on_cpu else None
    return jax.jit(step, donate_argnums=0, out_shardings=(where, None), compiler_options=options)


def state_shardings(
    model: ModelConfig, tx: optax.GradientTransformation, mesh: jax.sharding.Mesh
) -> tuple[Any, Any]:
    """(shapes, shardings) of the TrainState: the moments live where their weights do."""
    params = transformer.shardings(model, mesh)
    shapes = transformer.shapes(model)
    opt_shapes = jax.eval_shape(tx.init, shapes)
    alone = sharding.named(mesh, ())
    opt = optax.tree_map_params(
        tx, lambda _, s: s, opt_shapes, params, transform_non_params=lambda _: alone
    )
    step = jax.ShapeDtypeStruct((), jnp.int32)
    return TrainState(shapes, opt_shapes, step), TrainState(params, opt, alone)


def device_batch(mesh: jax.sharding.Mesh, fields: dict[str, np.ndarray], accumulate: int) -> Batch:
    """The batch of all processes' accumulate * rows own rows, each array [A, B, T]."""
    return Batch.of(
        {
            name: sharding.to_global(
                mesh, "ABT", x.reshape(accumulate, x.shape[0] // accumulate, *x.shape[1:])
            )
            for name, x in fields.items()
        }
    )


def evaluate(
    evaluate_step: Callable[[Params, Batch], dict[str, jax.Array]],
    params: Params,
    batches: Sequence[Batch],
) -> dict[str, float]:
    """Mean losses over held-out batches, keys prefixed with "heldout_"."""
    sums: dict[str, float] = {}
    for batch in batches:
        for name, value in evaluate_step(params, batch).items():
            sums[name] = sums.get(name, 0.0) + float(value)
    return {
        f"heldout_{name}_loss": sums[name] / sums[f"{name}_weight"]
        for name in ("lm", "value")
        if sums.get(f"{name}_weight")
    }


def fit(
    *,
    model: ModelConfig,
    initial: Callable[[], Params],
    trees: Sequence[Tree],
    held_out: Sequence[Tree],
    options: Any,
    objective: Objective,
    folder: Path,
    mesh: jax.sharding.Mesh,
    seed: int,
    name: str,
    log: Any,
) -> Params:
    """Train parameters on `trees` and return them.

    Args:
      initial: makes those to start from, on the mesh; not called when `folder` holds a checkpoint.
        The first step takes their memory: nobody else may hold them.
      held_out: trees whose losses are measured every `options.eval_every` steps.
      options: a stage's training options, see `gsm_verifier.config`.
      folder: where checkpoints go; an interrupted run goes on from the newest, bit for bit.
      log: a `gsm_verifier.metrics.Metrics`.

    Raises:
      Stopped: SIGTERM came, to any of the processes; all saved the same step.
      FloatingPointError: the loss stopped being finite, naming the step.
    """
    rows = PackedRows(trees, options.row_tokens, options.epochs, seed)
    cut = plan(len(rows), options, sharding.row_devices(mesh))
    share = sharding.share(mesh)
    mine = [a * cut.rows + b for a in range(cut.accumulate) for b in share.rows(cut.rows)]
    tx = make_optimizer(options, cut.steps)
    shapes, where = state_shardings(model, tx, mesh)
    checkpoints = checkpoint.Checkpoints(folder)
    with jax.set_mesh(mesh):
        if checkpoints.latest is None:
            params = initial()
            opt_state = jax.jit(tx.init, out_shardings=where.opt_state)(params)
            state = TrainState(params, opt_state, jnp.zeros((), jnp.int32, device=where.step))
        else:
            state, _ = checkpoints.restore(checkpoint.abstract(shapes, where))
    with jax.set_mesh(mesh), processes.Termination() as termination:
        net = Transformer(model, dropout=options.dropout)
        step = jit_step(net, objective, tx, seed, where)

        def evaluate_step(params: Params, batch_ABT: Batch) -> dict[str, jax.Array]:
            batch = jax.tree.map(lambda x: x[0], batch_ABT)
            sums = losses.loss_sums(Transformer(model), params, batch, objective)
            weights = {
                "lm_weight": batch.lm_weight_BT.sum(),
                "value_weight": batch.value_weight_BT.sum(),
            }
            return sums | weights

        evaluate_step = jax.jit(evaluate_step)
        held_out_rows = PackedRows(held_out, options.row_tokens, 1, 0)
        held_out_batches = [
            device_batch(mesh, fields, 1)
            for fields in held_out_rows.batches(cut.rows, mine=share.rows(cut.rows))
        ]

        start = int(state.step)
        log.rewind(start)
        batches = rows.batches(cut.batch, start, mine=mine)
        rate = optimizer.schedule(options.learning_rate, cut.steps, options.warmup_steps)
        began, tokens = time.perf_counter(), 0
        bar = processes.bar(name, "step", cut.steps, start)
        for index in range(start, cut.steps):
            batch = device_batch(mesh, next(batches), cut.accumulate)
            state, metrics = step(state, batch)
            done = index + 1
            row = {key: float(value) for key, value in metrics.items()}
            if not math.isfinite(row["loss"]):
                raise FloatingPointError(
                    f"{name}: the loss is {row['loss']} at step {done}: lower {name}.learning_rate"
                    f" (now {options.learning_rate}) or set {name}.clip_norm"
                )
            tokens += int(row.pop("tokens"))
            if done % options.eval_every == 0 or done == cut.steps:
                row |= evaluate(evaluate_step, state.params, held_out_batches)
            seconds = time.perf_counter() - began
            log.write(done, row | {"lr": float(rate(index)), "tokens": tokens, "seconds": seconds})
            bar.set_postfix(
                loss=f"{row['loss']:.3f}", tokens_per_s=f"{tokens / seconds:,.0f}", refresh=False
            )
            bar.update()
            stop = termination.asked()
            if stop or (done % options.checkpoint_every == 0 and done < cut.steps):
                log.flush()
                checkpoints.save(done, state)
            if stop:
                bar.close()
                told = f"{name}: stopped and saved at step {done}; run again to go on"
                raise processes.Stopped(told)
        bar.close()
        checkpoints.close()
    return state.params
