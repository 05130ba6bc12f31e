"""A trained model in three lines.

    from gsm_verifier import api
    for completion in api.load("runs/quickstart/generator").sample("Ann has 2 apples ...", n=3):
        print(completion.text)

    verifier = api.load("runs/quickstart/verifier")
    verifier.score("Ann has 2 apples ...", ["She has 2+3=<<2+3=5>>5.\\n#### 5"])    # [0.93]

A path is a run's stage, a run (its generator is meant), or a Hugging Face folder or hub id, which
is a verifier if it holds a `verifier.json`.
"""

import functools
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from gsm_verifier import sharding, storage
from gsm_verifier.config import default, validate
from gsm_verifier.model import hf
from gsm_verifier.model.attention import Packed
from gsm_verifier.model.config import ModelConfig
from gsm_verifier.model.transformer import Params, Transformer
from gsm_verifier.records import Completion
from gsm_verifier.sample.engine import Engine, Request, sampling_of
from gsm_verifier.score import Scorer, aggregate, prepared
from gsm_verifier.stages import Run
from gsm_verifier.text.tokenizer import Tokenizer

STAGES = ("generator", "verifier", "baseline", "pretrained")
LENGTH_BUCKET = 64  # sequences are padded to a multiple of it, to compile few shapes


def _bucket(length: int) -> int:
    return -(-length // LENGTH_BUCKET) * LENGTH_BUCKET


# What XLA:CPU is told for logits as exact as others'. With its YNN kernels, SmolLM2's logits on 16
# questions were up to 8e-4 away from transformers', without them 9e-5, on a CPU with AVX2, in the
# same time.
EXACT = {"xla_cpu_experimental_ynn_fusion_type": ""}


@dataclass(frozen=True, eq=False)
class Model:
    """A language model, its tokenizer, and the config of the run it comes from.

    Attributes:
      config: sizes and family. params: on the devices of `mesh`.
      options: the run's config; the defaults for a Hugging Face folder, but for what its
        generation_config.json says of sampling.
    """

    config: ModelConfig
    params: Params
    mesh: jax.sharding.Mesh
    tokenizer: Tokenizer
    options: ConfigDict

    def logits(self, token_ids: Sequence[int]) -> np.ndarray:
        """Logits of the next token after each token, float32 [T, V], of the ids that are text.

        Raises:
          ValueError: no ids, ids that aren't text, or more than the model's longest sequence.
        """
        ids = self._checked(token_ids)
        padded_T = np.zeros(_bucket(len(ids)), np.int32)
        padded_T[: len(ids)] = ids
        with jax.set_mesh(self.mesh):
            logits_TV = self._forward(self.params, padded_T)
        return sharding.to_host(logits_TV)[: len(ids), : self.config.text_size]

    @functools.cached_property
    def _forward(self) -> Any:
        model = Transformer(self.config)
        B = sharding.row_devices(self.mesh)  # a row for each, or a mesh couldn't divide them

        @functools.partial(jax.jit, compiler_options=sharding.xla_options(**EXACT))
        def forward(params: Params, tokens_T: jax.Array) -> jax.Array:
            T = len(tokens_T)
            tokens_BT = jnp.broadcast_to(tokens_T, (B, T))
            position_BT = jnp.broadcast_to(jnp.arange(T), (B, T))
            hidden_BTD, _ = model.apply(params, tokens_BT, position_BT, Packed.causal(B, T))
            return model.apply(params, hidden_BTD, method="logits")[0]

        return forward

    def _checked(self, token_ids: Sequence[int]) -> list[int]:
        ids, size, longest = list(token_ids), self.config.text_size, self.config.max_length
        if not ids or len(ids) > longest:
            raise ValueError(f"{len(ids)} token ids: give from 1 to {longest} of them")
        if wrong := [i for i in ids if not 0 <= i < size]:
            raise ValueError(f"{wrong[0]} is no token id: they are from 0 to {size - 1}")
        return ids


class Generator(Model):
    """A model that writes solutions."""

    def sample(
        self,
        question: str,
        n: int = 1,
        *,
        seed: int = 0,
        calculator: bool | None = None,
        **sampling: Any,
    ) -> list[Completion]:
        """n solutions of a question; the same ones for the same seed.

        Args:
          calculator: force the results of annotations; None: as the run did.
          sampling: temperature (0: the likeliest token), top_k, top_p and max_tokens; where left
            out, those of `options`. Other keys of `sample.decode.Sampling` can be given too.

        Raises:
          ValueError: a word the command line would refuse; question and max_tokens are longer than
            the model's longest sequence.
        """
        self._validate(sampling)
        if n < 1:
            return []
        if calculator is None:
            calculator = self.options.sample.calculator
        prompts = min(n, sharding.row_devices(self.mesh))
        slots = min(-(-n // prompts), self.options.sample.slots)
        engine = self._engine(prompts, slots, seed, calculator, tuple(sorted(sampling.items())))
        # The draws are keyed by question and number: shares can be sampled side by side.
        prompt = self.tokenizer.question(question)
        shares = [range(i, n, prompts) for i in range(prompts)]
        found = engine.run(Request(question, prompt, share) for share in shares)
        return sorted(found, key=lambda completion: completion.sample)

    def _validate(self, sampling: dict[str, Any]) -> None:
        """Refuse what the config would, but the temperature 0."""
        options = self.options.copy_and_resolve_references()
        for key, value in sampling.items():
            if key in options.sample and (key, value) != ("temperature", 0):
                with options.ignore_type():
                    options.sample[key] = value
        validate(options)

    @functools.cached_property
    def _engine(self) -> Callable[..., Engine]:
        """Engines are kept, being compiled; few: each has a copy of the parameters."""
        return functools.lru_cache(maxsize=2)(self._new_engine)

    def _new_engine(
        self, prompts: int, slots: int, seed: int, calculator: bool, sampling: tuple[Any, ...]
    ) -> Engine:
        return Engine(
            self.config,
            self.params,
            self.mesh,
            self.tokenizer,
            sampling_of(
                self.options.sample, self.tokenizer.end, seed, prompts * slots, **dict(sampling)
            ),
            prompts=prompts,
            slots=slots,
            calculator=calculator,
        )


class Verifier(Model):
    """A model that values solutions."""

    def values(
        self, question: str, solutions: Sequence[str | Completion]
    ) -> list[tuple[list[int], np.ndarray]]:
        """For each solution its token ids, and the value after each of them, float32.

        A text is read as a whole solution, with the end-of-text token after it; a completion by
        the tokens it was sampled with.

        Raises:
          ValueError: a question and solution longer than the model's longest sequence; a text where
            several are asked for.
        """
        if isinstance(solutions, str):
            raise ValueError("solutions is one text: give a list, [solution]")
        prompt = self.tokenizer.question(question)
        ids = [
            solution.tokens
            if isinstance(solution, Completion)
            else self.tokenizer.solution(solution)
            for solution in solutions
        ]
        if not ids:
            return []
        for each in ids:
            self._checked([*prompt, *each])
        longest = len(prompt) + max(map(len, ids))
        found = next(self._scorer(_bucket(longest))([(prompt, ids)]))
        return list(zip(ids, found, strict=True))

    def score(self, question: str, solutions: Sequence[str | Completion]) -> list[float]:
        """The value of each solution, as the run ranks by it: `config.score.aggregate`."""
        how = self.options.score.aggregate
        return [aggregate(values, how) for _, values in self.values(question, solutions)]

    @functools.cached_property
    def _scorer(self) -> Callable[[int], Scorer]:
        """A scorer for each length, compiled once."""
        return functools.cache(self._new_scorer)

    @functools.cached_property
    def _prepared(self) -> tuple[ModelConfig, Params]:
        return prepared(self.config, self.params, self.mesh)

    def _new_scorer(self, row_tokens: int) -> Scorer:
        return Scorer(
            *self._prepared,
            self.mesh,
            squash=self.options.verify.squash,
            row_tokens=row_tokens,
            rows=self.options.score.rows,
        )


def load(
    path: str | Path, *, data: int = -1, fsdp: int = 1, tensor: int = 1
) -> Generator | Verifier:
    """The model at a path (see above), on a mesh over all devices.

    Args:
      data, fsdp, tensor: sizes of the mesh; -1: what is left. A model larger than a device wants
        its parameters split: by fsdp or tensor.

    Raises:
      ValueError: nothing of the kind is there, or it can't be read.
    """
    mesh = {"data": data, "fsdp": fsdp, "tensor": tensor}
    folder = storage.path(path)
    keys = _keys(folder)
    if keys and "model_type" not in keys and (folder / "generator").is_dir():
        return _of_run(folder, "generator", keys, mesh)
    beside = _keys(folder.parent)
    if not keys and beside and "model_type" not in beside and folder.name in STAGES:
        return _of_run(folder.parent, folder.name, beside, mesh)
    if folder.is_dir() and "model_type" not in keys:
        raise ValueError(
            f"{folder} is neither a run's {', '.join(STAGES)} nor a Hugging Face folder"
        )
    return _of_folder(hf.resolve(path), mesh)


def _keys(folder: Path) -> dict[str, Any]:
    """A folder's config.json; {} without one."""
    try:
        found = json.loads((folder / "config.json").read_bytes())
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def _of_run(
    folder: Path, stage: str, keys: dict[str, Any], mesh: dict[str, int]
) -> Generator | Verifier:
    options = default()
    with options.unlocked(), options.ignore_type():
        options.update(keys)  # a run of before a key existed is one with its default
    options.mesh.update(mesh)  # of this machine, not of the one that trained it
    run = Run(options, folder)
    kind = Verifier if stage == "verifier" else Generator
    return kind(run.model_of(stage), run.params(stage), run.mesh, run.tokenizer, options)


def _of_folder(folder: Path, mesh: dict[str, int]) -> Generator | Verifier:
    devices = sharding.make_mesh(**mesh)
    config, params = hf.load(folder, devices)
    options, head = default(), hf.read_head(folder)
    try:
        options.sample.update(hf.read_sampling(folder))
        validate(options)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{folder / hf.GENERATION}: {error}") from error
    if head:
        options.verify.squash, options.score.aggregate = head["squash"], head["aggregate"]
    kind = Verifier if head else Generator
    return kind(config, params, devices, hf.read_tokenizer(folder), options)
