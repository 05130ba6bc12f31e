"""Hugging Face directories against transformers itself, and what is refused."""

import dataclasses
import functools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh
from safetensors.numpy import load_file, save_file

from gsm_verifier.checkpoint import by_name
from gsm_verifier.model import hf, transformer
from gsm_verifier.model.attention import Packed
from gsm_verifier.model.config import FAMILIES, ModelConfig
from gsm_verifier.model.formats import FORMATS
from gsm_verifier.model.transformer import Params, Transformer
from gsm_verifier.sample.decode import Sampling
from gsm_verifier.sample.engine import Engine, Request
from gsm_verifier.text.tokenizer import Tokenizer

oracle = pytest.mark.usefixtures("transformers")
TEXT_SIZE = 300
GREEDY = 64


@pytest.fixture(scope="session")
def transformers() -> Any:
    """The library every imported and exported folder is compared with."""
    pytest.importorskip("torch", reason="the oracle needs torch: pip install .[oracle]")
    return pytest.importorskip("transformers", reason="needs transformers: pip install .[test]")


@pytest.fixture(scope="session")
def tokenizer() -> Tokenizer:
    return Tokenizer.train(["Ann has 12 apples and 3 pears. 12+3=<<12+3=15>>15"] * 3, TEXT_SIZE)


SIZES: dict[str, Any] = dict(
    vocab_size=TEXT_SIZE,
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=3,
    num_attention_heads=4,
    max_position_embeddings=256,
    bos_token_id=1,
    eos_token_id=None,
    pad_token_id=None,
)
GROUPED = SIZES | dict(num_key_value_heads=2, head_dim=16)
GPT2 = dict(vocab_size=TEXT_SIZE, n_embd=32, n_layer=3, n_head=4, n_positions=256)
GPT2 |= dict(bos_token_id=1, eos_token_id=None)
LLAMA3 = dict(
    rope_type="llama3",
    rope_theta=500.0,
    factor=8.0,
    low_freq_factor=1.0,
    high_freq_factor=4.0,
    original_max_position_embeddings=64,
)
WINDOWS = ["sliding_attention", "full_attention", "sliding_attention"]

# Class of the config, its settings; by the name of the case.
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "gpt2": ("GPT2Config", GPT2),
    "gpt2-untied-wide": ("GPT2Config", GPT2 | dict(n_inner=80, tie_word_embeddings=False)),
    "cerebras": ("GPT2Config", GPT2 | dict(activation_function="gelu", n_inner=128)),
    "pythia": ("GPTNeoXConfig", SIZES | dict(rotary_pct=0.25)),
    "neox-serial": (
        "GPTNeoXConfig",
        SIZES | dict(rotary_pct=1.0, use_parallel_residual=False, tie_word_embeddings=True),
    ),
    "llama": ("LlamaConfig", GROUPED),
    "llama-tied": ("LlamaConfig", SIZES | dict(tie_word_embeddings=True, rms_norm_eps=1e-5)),
    "llama3": ("LlamaConfig", GROUPED | dict(rope_parameters=LLAMA3)),
    "llama-linear": (
        "LlamaConfig",
        GROUPED | dict(rope_parameters=dict(rope_type="linear", factor=4.0, rope_theta=1e4)),
    ),
    "qwen2": ("Qwen2Config", SIZES | dict(num_key_value_heads=2, tie_word_embeddings=True)),
    "qwen2-windows": (
        "Qwen2Config",
        SIZES
        | dict(
            num_key_value_heads=4,
            use_sliding_window=True,
            sliding_window=9,
            max_window_layers=1,
        ),
    ),
    "qwen3": ("Qwen3Config", GROUPED),
    "gemma2": (
        "Gemma2Config",
        GROUPED
        | dict(
            query_pre_attn_scalar=24,
            sliding_window=9,
            attn_logit_softcapping=2.0,
            final_logit_softcapping=3.0,
        ),
    ),
    "gemma2-all-see-all": ("Gemma2Config", GROUPED | dict(layer_types=["full_attention"] * 3)),
    "gemma3": (
        "Gemma3TextConfig",
        GROUPED
        | dict(
            query_pre_attn_scalar=24,
            sliding_window=9,
            layer_types=WINDOWS,
            rope_parameters=dict(
                full_attention=dict(rope_type="linear", factor=8.0, rope_theta=1e4),
                sliding_attention=dict(rope_type="default", rope_theta=100.0),
            ),
        ),
    ),
}


def random_model(transformers: Any, case: str) -> Any:
    """A model of transformers in which every parameter matters: norms and biases too."""
    import torch

    kind, settings = CASES[case]
    torch.manual_seed(0)
    config = getattr(transformers, kind)(**settings)
    model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager")
    with torch.no_grad():
        for parameter in model.parameters():
            around = 1.0 if parameter.ndim == 1 and parameter.mean() > 0.5 else 0.0
            parameter.normal_(around, 0.2)
    return model.eval()


def their_logits(model: Any, ids: list[int]) -> np.ndarray:
    import torch

    with torch.no_grad():
        return model(torch.tensor([ids])).logits[0].float().numpy()


def our_logits(
    config: ModelConfig, params: Params, ids: list[int], mesh: Mesh, method: str = "logits"
) -> np.ndarray:
    """[T, text_size], or [T] values."""
    rows = mesh.size  # each device has at least one

    @jax.jit
    def run(params: Params) -> jax.Array:
        T = len(ids)
        tokens_BT = jnp.broadcast_to(jnp.array(ids), (rows, T))
        position_BT = jnp.broadcast_to(jnp.arange(T), (rows, T))
        hidden, _ = Transformer(config).apply(
            params, tokens_BT, position_BT, Packed.causal(rows, T)
        )
        return Transformer(config).apply(params, hidden, method=method)[0]

    with jax.set_mesh(mesh):
        found = np.asarray(run(params))
    return found[:, : config.text_size] if method == "logits" else found


def our_greedy(
    config: ModelConfig, params: Params, ids: list[int], mesh: Mesh, tokenizer: Tokenizer
) -> list[int]:
    sampling = Sampling(0.0, 0, 1.0, GREEDY, end=-1, seed=0, chunk=16, patience=1)
    engine = Engine(config, params, mesh, tokenizer, sampling, prompts=1, slots=1, calculator=False)
    return next(engine.run([Request("", ids, range(1))])).tokens


def ids_of(n: int, seed: int = 0) -> list[int]:
    return np.random.default_rng(seed).integers(0, TEXT_SIZE, n).tolist()


@oracle
@pytest.mark.parametrize("case", CASES)
def test_import_equals_transformers(
    case: str, transformers: Any, mesh: Mesh, tokenizer: Tokenizer, tmp_path: Path
) -> None:
    import torch

    theirs = random_model(transformers, case)
    theirs.save_pretrained(tmp_path, max_shard_size="20KB" if "llama" in case else "1GB")
    assert (tmp_path / hf.INDEX).exists() == ("llama" in case)
    config, params = hf.load(tmp_path, mesh)
    assert config.text_size == TEXT_SIZE
    ids = ids_of(40)
    expected = their_logits(theirs, ids)
    assert expected.std() > 0.1
    np.testing.assert_allclose(our_logits(config, params, ids, mesh), expected, atol=1e-4)
    greedy = theirs.generate(
        torch.tensor([ids]), max_new_tokens=GREEDY, do_sample=False, use_cache=False
    )[0, len(ids) :]
    assert our_greedy(config, params, ids, mesh, tokenizer) == greedy.tolist()


MEANT = """
vocab_size hidden_size n_embd n_layer n_head n_inner head_dim num_key_value_heads
num_hidden_layers intermediate_size hidden_act hidden_activation activation_function rope_parameters
layer_types rms_norm_eps layer_norm_eps layer_norm_epsilon tie_word_embeddings use_parallel_residual
query_pre_attn_scalar attn_logit_softcapping final_logit_softcapping attention_bias
"""


@oracle
@pytest.mark.parametrize("case", CASES)
def test_import_and_export_give_back_every_bit(
    case: str, transformers: Any, mesh: Mesh, tokenizer: Tokenizer, tmp_path: Path
) -> None:
    random_model(transformers, case).save_pretrained(tmp_path / "theirs")
    config, params = hf.load(tmp_path / "theirs", mesh)
    hf.save(tmp_path / "ours", config, params, tokenizer)
    theirs, ours = (load_file(tmp_path / who / hf.WEIGHTS) for who in ("theirs", "ours"))
    assert ours.keys() == theirs.keys()
    for name, value in theirs.items():
        np.testing.assert_array_equal(ours[name], value, name)
    assert hf.read_config(tmp_path / "ours") == config
    # And as transformers reads what we write, in which a mistake of our reader can't hide.
    read = [transformers.AutoConfig.from_pretrained(tmp_path / who) for who in ("theirs", "ours")]
    for key in MEANT.split():
        was, now = (getattr(each, key, None) for each in read)
        assert was is None or now == was, key  # None: what others say by default


@oracle
def test_base_models_without_prefix_and_with_buffers(
    transformers: Any, mesh: Mesh, tmp_path: Path
) -> None:
    """GPT-2's own checkpoint: no `transformer.` before the names, and stored masks; Pythia's are of
    bytes."""
    theirs = random_model(transformers, "gpt2")
    theirs.transformer.save_pretrained(tmp_path)
    tensors = load_file(tmp_path / hf.WEIGHTS)
    assert "wte.weight" in tensors
    tensors["h.0.attn.bias"] = np.ones((1, 1, 256, 256), np.float32)
    tensors["h.1.attn.bias"] = np.ones((1, 1, 256, 256), np.uint8)
    save_file(tensors, tmp_path / hf.WEIGHTS)
    config, params = hf.load(tmp_path, mesh)
    ids = ids_of(10)
    np.testing.assert_allclose(
        our_logits(config, params, ids, mesh), their_logits(theirs, ids), atol=1e-4
    )


OWN: dict[str, Any] = dict(
    text_size=TEXT_SIZE, width=32, layers=2, heads=4, kv_heads=4, head_size=8, mlp_width=48
)


@functools.cache
def own_model(family: str, mesh: Mesh, **changes: Any) -> tuple[ModelConfig, Params]:
    """A model as training from scratch makes it, with every parameter moved."""
    config = ModelConfig(**{**OWN, "max_length": 128, **FAMILIES[family], **changes})
    key = jax.random.key(0)
    params = jax.tree.map(
        lambda x: x + 0.2 * jax.random.normal(key, x.shape), transformer.init(config, key, mesh)
    )
    return config, params


EXPORTED = {"gpt3": "gpt2", "gpt_neox": "gpt_neox", "llama": "llama", "gemma3": "gemma3_text"}


@oracle
@pytest.mark.parametrize(("family", "kind"), EXPORTED.items())
def test_a_model_from_scratch_exports(
    family: str, kind: str, transformers: Any, mesh: Mesh, tokenizer: Tokenizer, tmp_path: Path
) -> None:
    config, params = own_model(family, mesh)
    hf.save(tmp_path, config.with_(attention="jax"), params, tokenizer)  # no matter of the folder
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    assert theirs.config.model_type == kind
    assert theirs.config.eos_token_id == theirs.generation_config.eos_token_id == tokenizer.end
    ids = ids_of(40)
    expected = our_logits(config, params, ids, mesh)
    np.testing.assert_allclose(their_logits(theirs, ids), expected, atol=1e-4)
    text = "Ann has 12 apples.\n"
    read = transformers.AutoTokenizer.from_pretrained(tmp_path)
    assert read(text).input_ids == tokenizer.encode(text)
    assert read.eos_token_id == tokenizer.end


@oracle
@pytest.mark.parametrize("temperature", [0.7, 0.0])
def test_transformers_samples_as_the_folder_says(
    temperature: float, transformers: Any, mesh: Mesh, tokenizer: Tokenizer, tmp_path: Path
) -> None:
    sampling = {"temperature": temperature, "top_k": 0, "top_p": 0.9, "max_tokens": 7}
    hf.save(tmp_path, *own_model("llama", mesh), tokenizer, sampling=sampling)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    read = theirs.generation_config
    assert read.do_sample == bool(temperature)
    assert (read.eos_token_id, read.max_new_tokens) == (tokenizer.end, 7)
    if temperature:
        assert (read.temperature, read.top_k, read.top_p) == (temperature, 0, 0.9)
        assert hf.read_sampling(tmp_path) == sampling
    else:
        assert hf.read_sampling(tmp_path) == {"max_tokens": 7}
    torch = pytest.importorskip("torch")
    ids = torch.tensor([ids_of(5)])
    assert 5 < theirs.generate(ids, attention_mask=torch.ones_like(ids)).shape[1] <= 12


@oracle
@pytest.mark.parametrize("squash", ["none", "sigmoid"])
@pytest.mark.parametrize("family", ["gpt3", "llama"])
def test_a_verifier_is_read_in_transformers_as_its_file_says(
    family: str, squash: str, transformers: Any, mesh: Mesh, tokenizer: Tokenizer, tmp_path: Path
) -> None:
    config, params = own_model(family, mesh)
    hf.save(tmp_path, config, params, tokenizer, squash=squash)
    ids = ids_of(30)
    value = our_logits(config, params, ids, mesh, "value")
    expected = 1 / (1 + np.exp(-value)) if squash == "sigmoid" else value
    head = json.loads((tmp_path / hf.VERIFIER).read_bytes())
    assert hf.read_head(tmp_path)["aggregate"] == "last"
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    logits = their_logits(theirs, ids)
    read = head["gain"] * logits[:, head["token_id"]] + head["bias"]
    read = 1 / (1 + np.exp(-read)) if head["squash"] == "sigmoid" else read
    np.testing.assert_allclose(read, expected, atol=1e-4)
    np.testing.assert_allclose(
        logits[:, : config.text_size], our_logits(config, params, ids, mesh), atol=1e-4
    )


@pytest.mark.parametrize("squash", [None, "none"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("family", FAMILIES)
def test_what_is_saved_is_loaded_on_any_mesh(
    family: str,
    dtype: str,
    squash: str | None,
    make_mesh: Callable[..., Mesh],
    mesh: Mesh,
    tokenizer: Tokenizer,
    tmp_path: Path,
) -> None:
    config, params = own_model(family, mesh)
    hf.save(tmp_path, config, params, tokenizer, squash=squash, dtype=dtype)
    split = make_mesh(1, 2, 4)
    loaded, found = hf.load(tmp_path, split, dtype)
    assert loaded == config
    where = by_name(transformer.shardings(config, split))
    rows = config.text_size + (squash is not None)
    for name, leaf in by_name(found).items():
        expected = np.asarray(by_name(params)[name])
        if name.removeprefix("params.") in hf.HEAD:
            expected = expected if squash else np.float32(name.endswith("gain"))
        else:
            expected = expected.astype(dtype)
            assert leaf.sharding == where[name]
        if name.endswith("VD"):
            expected[rows:] = 0
        np.testing.assert_array_equal(np.asarray(leaf), expected, name)
        assert leaf.dtype == expected.dtype


def test_a_folder_without_a_model_is_told_what_it_lacks(tmp_path: Path) -> None:
    for read in (hf.read_config, hf.read_tokenizer):
        with pytest.raises(ValueError, match="give a Hugging Face folder") as error:
            read(tmp_path)
        assert str(error.value).startswith(f"{tmp_path / hf.CONFIG} isn't there")
    assert hf.read_sampling(tmp_path) == {}


@pytest.fixture
def folder(mesh: Mesh, tokenizer: Tokenizer, tmp_path: Path) -> Path:
    """A good checkpoint, to be spoilt."""
    hf.save(tmp_path, *own_model("llama", mesh), tokenizer)
    return tmp_path


def settings(folder: Path, **changes: Any) -> None:
    content = json.loads((folder / hf.CONFIG).read_bytes()) | changes
    content = {k: v for k, v in content.items() if v is not KeyError}
    (folder / hf.CONFIG).write_text(json.dumps(content))


NORM = "model.layers.1.input_layernorm.weight"
EMBED = "model.embed_tokens.weight"


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda t: t.pop(NORM), rf"tensor {NORM} is missing"),
        (lambda t: t.update(extra=t[NORM]), "tensor extra would be left unused"),
        (lambda t: t.update({NORM: t[NORM][:5]}), rf"{NORM} has shape \[5\].*makes it \[32\]"),
        (lambda t: t.update({NORM: t[NORM].astype(np.float64)}), f"{NORM} is F64.*quantised"),
        (lambda t: t.update({EMBED: t[EMBED][:-1]}), r"\[299, 32\].*\[300, 32\]"),
    ],
)
def test_tensors_that_do_not_fit_are_named(
    change: Callable[[Any], Any], says: str, folder: Path, mesh: Mesh
) -> None:
    tensors = load_file(folder / hf.WEIGHTS)
    change(tensors)
    save_file(tensors, folder / hf.WEIGHTS)
    with pytest.raises(ValueError, match=says):
        hf.load(folder, mesh)


def test_a_tied_model_may_store_its_table_twice_but_not_another(
    mesh: Mesh, tokenizer: Tokenizer, tmp_path: Path
) -> None:
    hf.save(tmp_path, *own_model("llama", mesh, tied=True), tokenizer)
    tensors = load_file(tmp_path / hf.WEIGHTS)
    save_file(tensors | {"lm_head.weight": tensors[EMBED]}, tmp_path / hf.WEIGHTS)
    hf.load(tmp_path, mesh)
    save_file(tensors | {"lm_head.weight": tensors[EMBED] + 1}, tmp_path / hf.WEIGHTS)
    with pytest.raises(ValueError, match=r"tensor lm_head\.weight would be left unused"):
        hf.load(tmp_path, mesh)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (dict(model_type="mamba"), "model_type 'mamba' isn't supported: use one of gpt2"),
        (dict(new_trick=3), "new_trick=3 isn't supported"),
        (dict(attention_bias=True), "attention_bias=True isn't supported, only False"),
        (dict(hidden_act="relu"), "hidden_act='relu' isn't supported: 'silu'"),
        (dict(rope_scaling=dict(type="yarn", factor=2)), "rope_type 'yarn' isn't supported"),
        (
            dict(rope_scaling=dict(rope_type="llama3", factor=2)),
            "must have positive numbers for factor",
        ),
        (dict(hidden_size=KeyError), "hidden_size is missing"),
        (dict(num_hidden_layers=-1), "num_hidden_layers=-1 makes no sense"),
        (dict(num_attention_heads=0), "num_attention_heads=0 makes no sense"),
        (dict(hidden_size="32"), "hidden_size='32' makes no sense"),
        (dict(num_key_value_heads=3), "3 key/value heads, 4 heads and width 32 don't"),
        (dict(quantization_config=dict(bits=4)), "quantization_config"),
        (dict(rms_norm_eps=float("nan")), "rms_norm_eps=nan makes no sense"),
        (dict(hidden_act=["silu"]), "wrong type"),
        (dict(rope_parameters="default"), "wrong type"),
        (dict(is_causal=False), "is_causal=False isn't supported, only True"),
        (dict(model_type="gemma3"), "save its language model"),
        (dict(rope_scaling=dict(type="linear", rope_type="dynamic", factor=2)), "isn't its rope"),
        (
            dict(rope_scaling=dict(type="linear", factor=2.0), rope_theta=KeyError),
            "give one, or rope_theta too",
        ),
        (dict(rope_theta="x", rope_parameters=None), "rope_theta='x' makes no sense"),
        (dict(rope_theta=-1, rope_parameters=None), "rope_theta=-1 makes no sense"),
        (dict(rope_theta=None, rope_parameters=None), "rope_theta=None makes no sense"),
        (dict(rope_theta=5.0), r"rope_theta=5\.0, but RoPE's own says 10000"),
        (dict(rope_scaling=dict(type="linear", factor=0)), "must have positive numbers for factor"),
        (
            dict(rope_scaling=dict(type="linear", factor=float("nan"))),
            "must have positive numbers for factor",
        ),
        (dict(partial_rotary_factor=0.5, rope_parameters=None), "partial_rotary_factor"),
        (dict(tie_word_embeddings=None), "tie_word_embeddings=None makes no sense"),
    ],
)
def test_settings_that_do_not_fit_are_named(
    change: dict[str, Any], says: str, folder: Path
) -> None:
    settings(folder, **change)
    with pytest.raises(ValueError, match=says) as raised:
        hf.read_config(folder)
    assert "\n" not in str(raised.value)
    assert str(folder / hf.CONFIG) in str(raised.value)


@pytest.mark.parametrize(
    ("family", "change", "says"),
    [
        ("gemma2", dict(sliding_window_pattern=3), "sliding_window_pattern=3 isn't supported"),
        ("gemma2", dict(sliding_window_size=3), "sliding_window_size=3, but sliding_window"),
        *(
            ("gemma3", dict(rope_parameters=dict(sliding_attention=local)), "only default")
            for local in (dict(type="linear", factor=8.0), dict(partial_rotary_factor=0.5))
        ),
        ("gemma2", dict(query_pre_attn_scalar="x"), "query_pre_attn_scalar='x' makes no sense"),
        ("gemma2", dict(sliding_window=None, layer_types=None), "with a sliding_window"),
        (
            "gemma3",
            dict(rope_parameters=dict(rope_type="default", rope_theta=1e4)),
            "must have full_attention and sliding_attention",
        ),
        (
            "gemma3",
            dict(sliding_window_pattern=0, layer_types=None),
            "sliding_window_pattern=0 makes no sense",
        ),
        (
            "qwen2",
            dict(use_sliding_window=True, max_window_layers="2", layer_types=None),
            "max_window_layers='2' makes no sense",
        ),
        ("gpt_neox", dict(rotary_pct=2.0, rope_parameters=None), "rotary_pct=2.0 makes no sense"),
        ("gpt_neox", dict(rope_theta=5.0, rope_parameters=None), "rotary_emb_base is 10000"),
    ],
)
def test_settings_of_a_family_that_do_not_fit_are_named(
    family: str, change: dict[str, Any], says: str, mesh: Mesh, tokenizer: Tokenizer, tmp_path: Path
) -> None:
    hf.save(tmp_path, *own_model(family, mesh), tokenizer)
    settings(tmp_path, **change)
    with pytest.raises(ValueError, match=says):
        hf.read_config(tmp_path)


ABSENT: dict[str, list[dict[str, Any]]] = {
    "qwen2": [{}, dict(use_sliding_window=True), dict(use_sliding_window=True, sliding_window=9)],
    "qwen3": [dict(use_sliding_window=True), dict(use_sliding_window=True, max_window_layers=1)],
    "gemma2": [{}, dict(sliding_window=7, sliding_window_size=7)],
    "gemma3_text": [{}, dict(sliding_window_pattern=2)],
    "gpt_neox": [{}, dict(rotary_pct=0.5, partial_rotary_factor=0.5)],
    "llama": [{}, dict(partial_rotary_factor=1.0), dict(_num_labels=1, hidden_act="swish")],
}


@oracle
@pytest.mark.parametrize(("kind", "given"), [(k, g) for k, each in ABSENT.items() for g in each])
def test_what_a_file_leaves_out_means_what_it_means_to_transformers(
    kind: str, given: dict[str, Any], transformers: Any, tmp_path: Path
) -> None:
    given = (
        SIZES | dict(num_key_value_heads=4, num_hidden_layers=30, tie_word_embeddings=True) | given
    )
    if kind != "gpt_neox":
        given |= dict(rms_norm_eps=1e-6)
    else:
        del given["num_key_value_heads"]
    (tmp_path / hf.CONFIG).write_text(json.dumps(given | {"model_type": kind}))
    theirs = transformers.AutoConfig.from_pretrained(tmp_path)
    ours = hf.read_config(tmp_path)
    kinds = getattr(theirs, "layer_types", None) or ["full_attention"] * 30
    windows = [theirs.sliding_window if k == "sliding_attention" else 0 for k in kinds]
    assert list(ours.windows or (0,) * 30) == windows
    head = getattr(theirs, "head_dim", None) or theirs.hidden_size // theirs.num_attention_heads
    assert ours.head_size == head
    rope = theirs.rope_parameters
    local = rope.get("sliding_attention")
    rope = rope.get("full_attention", rope)
    assert ours.rope_theta == rope["rope_theta"]
    assert ours.rope_fraction == rope.get("partial_rotary_factor", 1.0)
    if local:
        assert ours.window_theta == local["rope_theta"]


def test_what_is_switched_off_or_inert_is_let_pass(folder: Path) -> None:
    before = hf.read_config(folder)
    settings(folder, rope_interleaved=False, new_trick=None, use_cache=True, _name_or_path="x")
    assert hf.read_config(folder) == before


def test_damaged_folders_are_refused(folder: Path, mesh: Mesh, tmp_path: Path) -> None:
    weights = (folder / hf.WEIGHTS).read_bytes()
    (folder / hf.WEIGHTS).write_bytes(weights[:-10])
    with pytest.raises(ValueError, match=r"model\.safetensors is damaged"):
        hf.load(folder, mesh)
    (folder / hf.WEIGHTS).unlink()
    with pytest.raises(ValueError, match=r"no model\.safetensors"):
        hf.load(folder, mesh)
    (folder / hf.INDEX).write_text(json.dumps({"weight_map": {NORM: "../secret.safetensors"}}))
    with pytest.raises(ValueError, match=r"names .*secret.* which isn't there"):
        hf.load(folder, mesh)
    (folder / hf.INDEX).unlink()
    (folder / "pytorch_model.bin").write_bytes(b"\x80")
    with pytest.raises(ValueError, match=r"pytorch_model\.bin, a pickle.*save_pretrained"):
        hf.load(folder, mesh)
    (folder / hf.CONFIG).write_text("[")
    with pytest.raises(ValueError, match="isn't JSON"):
        hf.read_config(folder)
    (folder / hf.CONFIG).unlink()
    with pytest.raises(ValueError, match=r"config\.json isn't there: give a Hugging Face folder"):
        hf.read_config(folder)


def test_models_no_family_has_are_not_exported(
    mesh: Mesh, tokenizer: Tokenizer, tmp_path: Path
) -> None:
    config, params = own_model("gpt3", mesh, head_size=16)
    with pytest.raises(ValueError, match="gpt2 has no head_size=16"):
        hf.save(tmp_path, config, params, tokenizer)
    config, params = own_model("gpt3", mesh, text_size=10)
    with pytest.raises(ValueError, match="the tokenizer has"):
        hf.save(tmp_path, config, params, tokenizer)
    assert not list(tmp_path.iterdir())


def test_names_are_pinned(tmp_path: Path) -> None:
    assert hf.resolve(tmp_path) == tmp_path
    with pytest.raises(ValueError, match="40 hex digits of a revision"):
        hf.resolve("owner/name")
    with pytest.raises(ValueError, match="40 hex digits of a revision"):
        hf.resolve("owner/name@main")
    with pytest.raises(ValueError, match="no such folder"):
        hf.resolve("/no/such/folder")


@pytest.mark.parametrize("kind", FORMATS)
def test_tables_name_what_exists(kind: str) -> None:
    """A misspelt word in a table would only be met by the first checkpoint that needs it."""
    form = FORMATS[kind]
    fields = {field.name for field in dataclasses.fields(ModelConfig)}
    assert set(form.keys) | {ours for ours, _ in form.words.values()} <= fields
    assert set(form.keys.values()) | set(form.words) | set(form.fixed) <= set(form.defaults)
    assert set(FAMILIES[form.family]) <= fields
