"""Model families and sizes as data: one transformer reads these words, no family has code."""

from dataclasses import dataclass, replace
from typing import Any


@dataclass(frozen=True)
class ModelConfig:
    """Everything that decides the shape and the mathematics of the transformer.

    Attributes:
      text_size: ids below it are text. Id text_size is the reserved token of the verifier's head;
        the ids after it only fill the vocabulary up to V.
      width: D. layers: L. heads: N. kv_heads: K (divides N). head_size: H. mlp_width: F.
      max_length: longest sequence; the number of learned positions.
      positions: "learned" | "rope".
      rope_theta: base of the rotary frequencies.
      norm: "layer" | "rms". norm_eps: its epsilon.
      mlp: "gelu" | "swiglu".
      biases: on every projection and norm (GPT-3 style) or on none (Llama style).
      tied: the unembedding is the embedding.
      dtype: of the computation, "float32" | "bfloat16"; parameters are always float32.
      scan_layers: one set of stacked layers under lax.scan (compiles in the time of one layer)
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
    dtype: str = "float32"
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
        mlp = self.width * self.mlp_width * (3 if self.mlp == "swiglu" else 2)
        return self.layers * (attention + mlp)

    def with_(self, **changes: Any) -> "ModelConfig":
        return replace(self, **changes)


# A family is the set of words its sizes share.
FAMILIES: dict[str, dict[str, Any]] = {
    "gpt3": dict(positions="learned", norm="layer", mlp="gelu", biases=True, tied=True),
    "llama": dict(positions="rope", norm="rms", mlp="swiglu", biases=False, tied=False),
}


def from_keys(model: Any, text_size: int) -> ModelConfig:
    """The ModelConfig of a `config.model` (see `gsm_verifier.config`) and a tokenizer's size.

    Keys left at None take the family's word.

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
        remat=model.remat,
        **words,
    )
