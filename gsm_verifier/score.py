"""The verifier's values: one after every token of every completion (section 4.2)."""

import itertools
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import jax
import numpy as np

from gsm_verifier import processes, sharding
from gsm_verifier.data.packing import Branch, PackedRows, Tree, split
from gsm_verifier.model import transformer
from gsm_verifier.model.attention import Packed
from gsm_verifier.model.config import ModelConfig
from gsm_verifier.model.transformer import Params, Transformer
from gsm_verifier.train import loop
from gsm_verifier.train.batch import Batch
from gsm_verifier.train.losses import squashed

AGGREGATES = {
    "last": lambda values: values[-1],
    "mean": np.mean,
    "min": np.min,
    "product": lambda values: np.prod(np.clip(values, 0.0, 1.0)),
}


def aggregate(values: Sequence[float], how: str) -> float:
    """One ranking score of the values after each token: last | mean | min | product.

    The paper leaves this open; the last value, after the whole solution, is the natural reading.
    """
    return float(AGGREGATES[how](np.asarray(values, np.float64)))


def program(config: ModelConfig, mesh: jax.sharding.Mesh, squash: str) -> Any:
    """(parameters, Batch of [1, B, T] arrays) to the value after every token [B, T], compiled."""
    model = Transformer(config)

    def values(params: Params, batch_ABT: Batch) -> jax.Array:
        batch = jax.tree.map(lambda x: x[0], batch_ABT)
        hidden_BTD, _ = model.apply(
            params, batch.tokens_BT, batch.position_BT, Packed(batch.end_BT)
        )
        return squashed(model.apply(params, hidden_BTD, method="value"), squash)

    return jax.jit(values, out_shardings=sharding.named(mesh, "BT"))


def prepared(
    config: ModelConfig, params: Params, mesh: jax.sharding.Mesh
) -> tuple[ModelConfig, Params]:
    """The same model as a `Scorer` computes it fastest.

    CPUs unroll the layers anyway, and would cast them to bfloat16 anew for every batch. The tables
    stay as they are: of one the value reads a row in float32.
    """
    if sharding.platform(mesh) != "cpu" or config.dtype == "float32":
        return config, params
    return transformer.unstack(config, params, cast="layers")


class Scorer:
    """Computes values with one verifier. Completions of a problem share what they begin with.

    Every process fills its own rows with completions of its own and reads their values only. They
    step together: one that has less goes on with empty rows.
    """

    def __init__(
        self,
        config: ModelConfig,
        params: Params,
        mesh: jax.sharding.Mesh,
        *,
        squash: str,
        row_tokens: int,
        rows: int,
    ):
        devices = sharding.row_devices(mesh)
        self._rows = len(sharding.share(mesh).rows(-(-rows // devices) * devices))
        self._params, self._mesh, self._row_tokens = params, mesh, row_tokens
        self._values = program(config, mesh, squash)

    def __call__(
        self,
        items: Iterable[tuple[Sequence[int], Sequence[Sequence[int]]]],
        termination: processes.Termination | None = None,
    ) -> Iterator[list[np.ndarray]]:
        """For each (question ids, completions' ids): each completion's values, float32 [tokens].

        Args:
          termination: looked at before every batch.

        Raises:
          ValueError: a question and completion longer than a row, naming the mend.
          Stopped: a process was asked to end; all do, before the same batch.
        """
        trees, orders = [], []
        for question, completions in items:
            ones = np.ones(max(map(len, completions), default=0), np.float32)
            branches = [Branch(c, value_weights=ones[: len(c)]) for c in completions]
            whole = Tree(question, branches)
            parts = split(whole, self._row_tokens)
            trees += parts
            orders.append([number for number, _ in whole.layout])
        packed = PackedRows(trees, self._row_tokens, 1, seed=0)
        found: dict[int, list[np.ndarray]] = {}
        with jax.set_mesh(self._mesh):
            (most,) = processes.largest(-(-len(packed) // self._rows))
            for index, fields in enumerate(packed.batches(self._rows, at_least=most)):
                if termination and termination.asked():
                    raise processes.Stopped(processes.SHARDS_KEPT)
                values_BT = self._values(self._params, loop.device_batch(self._mesh, fields, 1))
                values = sharding.to_host(values_BT).astype(np.float32)
                for b in range(self._rows):
                    for tree, start in packed.layout(index * self._rows + b):
                        # A part's branches are in the order of its layout.
                        places = (places_T for _, places_T in trees[tree].places())
                        found[tree] = [values[b, start + places_T[1:]] for places_T in places]
        each = itertools.chain.from_iterable(found[tree] for tree in range(len(trees)))
        for order in orders:
            of = dict(zip(order, each, strict=False))
            yield [of[number] for number in range(len(order))]
