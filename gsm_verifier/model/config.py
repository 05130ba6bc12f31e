"""Model families and sizes as data: one transformer reads these words, no family has code."""

import json
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from gsm_verifier import records


@dataclass(frozen=True)
class ModelConfig:
    """Everything that decides the shape and the mathematics of the transformer.

    Attributes:
      text_size: ids below it are text. Id text_size is the reserved token of the verifier's head;
        the ids after it only fill the vocabulary up to V.
      width: D. layers: L. heads: N. kv_heads: K (divides N). head_size: H. mlp_width: F.
      max_length: longest sequence; the number of learned positions.
      positions: "learned" | "rope".
      norm: "layer" | "rms" | "rms_offset" (its scale is stored less 1). norm_eps: its epsilon.
      mlp: "gelu" (by tanh) | "gelu_exact" | "swiglu" | "geglu".
      biases: on every projection and norm (GPT-3 style) or on none (Llama style).
      tied: the unembedding is the embedding.
      qkv_biases: on the projections to queries, keys and values, where the others have none.
      qk_norm: queries and keys are normalised over H.
      residual: "serial" | "parallel" (attention and MLP read the same residual stream).
      post_norms: what a sublayer adds is normalised too.
      scaled_embedding: embeddings are multiplied by sqrt(D).
      query_scale: of the attention logits; 0 for 1 / sqrt(H).
      attention_cap, logit_cap: soft cap of the logits of attention and of the vocabulary; 0: none.
      windows: how many positions back each layer sees, itself included, 0 for all; (): all do.
      rope_theta: base of the rotary frequencies.
      window_theta: the base in layers with a window, unscaled; 0: they are like the others.
      rope_fraction: of the head that rotates.
      rope_linear: positions are divided by it.
      rope_llama3: Llama 3's scaling: factor, low and high frequency factor, original length.
      dtype: of the computation, "float32" | "bfloat16"; parameters are always float32.
      attention: "auto", on CPU in C++ where there is a compiler, else in JAX; or "jax".
      scan_layers: one set of stacked layers under lax.scan (compiles in the time of one layer,
        but on CPU, where the loop is unrolled)
        or one set of parameters per layer (decodes faster: no slice of the stack is copied).
      remat: recompute a layer's activations in the backward pass.
    """

    text_size: int
    width: int
    layers: int
    heads: int
    kv_heads: int
    head_size: int
    mlp_width: int
    max_length: int
    positions: str
    norm: str
    mlp: str
    biases: bool
    tied: bool
    rope_theta: float = 10_000.0
    norm_eps: float = 1e-5
    qkv_biases: bool = False
    qk_norm: bool = False
    residual: str = "serial"
    post_norms: bool = False
    scaled_embedding: bool = False
    query_scale: float = 0.0
    attention_cap: float = 0.0
    logit_cap: float = 0.0
    windows: tuple[int, ...] = ()
    window_theta: float = 0.0
    rope_fraction: float = 1.0
    rope_linear: float = 1.0
    rope_llama3: tuple[float, ...] = ()
    dtype: str = "float32"
    attention: str = "auto"
    scan_layers: bool = True
    remat: bool = False

    @property
    def reserved_token(self) -> int:
        return self.text_size

    @property
    def vocab_size(self) -> int:
        """V: a multiple of 64, so that the tables divide over devices and fill the vector units."""
        return -(-(self.text_size + 1) // 64) * 64

    @property
    def parameters(self) -> int:
        """Parameters without the embeddings: the N of scaling laws, and of FLOP counts."""
        attention = self.width * self.head_size * 2 * (self.heads + self.kv_heads)
        mlp = self.width * self.mlp_width * (3 if self.gated else 2)
        return self.layers * (attention + mlp)

    @property
    def init_scale(self) -> float:
        """Standard deviation of initial weights: what keeps a product's size. GPT-2's 0.02 is this
        at a width of 2,500. At 128, numbers in solutions cost 1.13 nats with 0.09 and 1.41 with
        0.02 after 0.8 million tokens of pretraining."""
        return self.width**-0.5

    @property
    def gated(self) -> bool:
        return self.mlp in ("swiglu", "geglu")

    def with_(self, **changes: Any) -> "ModelConfig":
        return replace(self, **changes)


# A family is the set of words its sizes share.
_GPT = dict(norm="layer", biases=True)
_LLAMA = dict(positions="rope", norm="rms", mlp="swiglu", biases=False, tied=False)
_GEMMA = dict(
    positions="rope",
    norm="rms_offset",
    mlp="geglu",
    biases=False,
    tied=True,
    post_norms=True,
    scaled_embedding=True,
)
FAMILIES: dict[str, dict[str, Any]] = {
    "gpt3": dict(**_GPT, positions="learned", mlp="gelu", tied=True),
    "gpt_neox": dict(
        **_GPT,
        positions="rope",
        rope_fraction=0.25,
        residual="parallel",
        mlp="gelu_exact",
        tied=False,
    ),
    "llama": _LLAMA,
    "qwen2": dict(**_LLAMA, qkv_biases=True),
    "qwen3": dict(**_LLAMA, qk_norm=True),
    "gemma2": dict(**_GEMMA, attention_cap=50.0, logit_cap=30.0),
    "gemma3": dict(**_GEMMA, qk_norm=True, window_theta=10_000.0),
}


def from_keys(model: Any, text_size: int) -> ModelConfig:
    """The ModelConfig of a `config.model` (see `gsm_verifier.config`) and a tokenizer's size.

    Keys left at None take the family's word. Its dtype is decided, not "auto".

    Raises:
      ValueError: unknown family, or sizes that don't fit together.
    """
    if model.family not in FAMILIES:
        raise ValueError(f"model.family={model.family!r}: use one of {', '.join(FAMILIES)}")
    words = dict(FAMILIES[model.family])
    if model.tied is not None:
        words["tied"] = model.tied
    if model.heads % model.kv_heads:
        raise ValueError(f"model.kv_heads={model.kv_heads} must divide model.heads={model.heads}")
    return ModelConfig(
        text_size=text_size,
        width=model.width,
        layers=model.layers,
        heads=model.heads,
        kv_heads=model.kv_heads,
        head_size=model.head_size,
        mlp_width=model.mlp_width,
        max_length=model.max_length,
        rope_theta=model.rope_theta,
        dtype=model.dtype,
        attention=model.attention,
        remat=model.remat,
        **words,
    )


def write(path: Path, model: ModelConfig) -> None:
    """Write a model's words and sizes as JSON."""
    records.write_atomically(path, json.dumps(asdict(model), indent=1).encode())


def read(path: Path) -> ModelConfig:
    """The model of a file that `write` wrote.

    Raises:
      ValueError: no such file, or a damaged one.
    """
    try:
        words = json.loads(path.read_bytes())
        return ModelConfig(**{k: tuple(v) if type(v) is list else v for k, v in words.items()})
    except (OSError, ValueError, TypeError, AttributeError) as error:
        raise ValueError(f"{path} can't be read ({error}): run stage prepare again") from error
