"""The models of configs/gsm8k.py: their published settings are understood, and they fit."""

import json
import math
import re
import runpy
from pathlib import Path
from typing import Any

import jax
import pytest

from gsm_verifier.config import default, leaves, validate
from gsm_verifier.model import hf, transformer
from gsm_verifier.model.config import ModelConfig

REPOSITORY = Path(__file__).resolve().parents[1]
GSM8K = runpy.run_path(str(REPOSITORY / "configs" / "gsm8k.py"))
HEADER = GSM8K["__doc__"]
PRESETS = GSM8K["PRESETS"]

# What their config.json files say, as published, and how many parameters they are said to have.
_GPT2 = dict(
    activation_function="gelu_new",
    architectures=["GPT2LMHeadModel"],
    attn_pdrop=0.1,
    bos_token_id=50256,
    embd_pdrop=0.1,
    eos_token_id=50256,
    initializer_range=0.02,
    layer_norm_epsilon=1e-05,
    model_type="gpt2",
    n_ctx=1024,
    n_positions=1024,
    resid_pdrop=0.1,
    summary_activation=None,
    summary_first_dropout=0.1,
    summary_proj_to_labels=True,
    summary_type="cls_index",
    summary_use_proj=True,
    task_specific_params={"text-generation": {"do_sample": True, "max_length": 50}},
    vocab_size=50257,
)
_PYTHIA = dict(
    architectures=["GPTNeoXForCausalLM"],
    bos_token_id=0,
    eos_token_id=0,
    hidden_act="gelu",
    initializer_range=0.02,
    layer_norm_eps=1e-05,
    max_position_embeddings=2048,
    model_type="gpt_neox",
    num_attention_heads=16,
    num_hidden_layers=24,
    rotary_emb_base=10000,
    rotary_pct=0.25,
    tie_word_embeddings=False,
    torch_dtype="float16",
    transformers_version="4.24.0",
    use_cache=True,
    use_parallel_residual=True,
    vocab_size=50304,
)
_QWEN = dict(
    attention_dropout=0.0,
    bos_token_id=151643,
    eos_token_id=151643,
    hidden_act="silu",
    initializer_range=0.02,
    max_position_embeddings=32768,
    rms_norm_eps=1e-06,
    rope_theta=1000000,
    tie_word_embeddings=True,
    torch_dtype="bfloat16",
    use_cache=True,
    use_sliding_window=False,
    vocab_size=151936,
)
_QWEN3 = _QWEN | dict(
    architectures=["Qwen3ForCausalLM"],
    attention_bias=False,
    head_dim=128,
    model_type="qwen3",
    num_key_value_heads=8,
    rope_scaling=None,
    sliding_window=None,
)
_LLAMA = dict(
    architectures=["LlamaForCausalLM"],
    attention_bias=False,
    attention_dropout=0.0,
    bos_token_id=128000,
    eos_token_id=128001,
    hidden_act="silu",
    initializer_range=0.02,
    max_position_embeddings=131072,
    mlp_bias=False,
    model_type="llama",
    num_attention_heads=32,
    num_key_value_heads=8,
    pretraining_tp=1,
    rms_norm_eps=1e-05,
    rope_theta=500000.0,
    torch_dtype="bfloat16",
    use_cache=True,
    vocab_size=128256,
)
_ROPE = dict(
    high_freq_factor=4.0,
    low_freq_factor=1.0,
    original_max_position_embeddings=8192,
    rope_type="llama3",
)
PUBLISHED: dict[str, tuple[int, dict[str, Any]]] = {
    "gpt2": (124_439_808, dict(n_embd=768, n_head=12, n_layer=12) | _GPT2),
    "gpt2-xl": (1_557_611_200, dict(n_embd=1600, n_head=25, n_layer=48, output_past=True) | _GPT2),
    "pythia-410m": (405_334_016, dict(hidden_size=1024, intermediate_size=4096) | _PYTHIA),
    "pythia-1.4b": (1_414_647_808, dict(hidden_size=2048, intermediate_size=8192) | _PYTHIA),
    "qwen2.5-0.5b": (
        494_032_768,
        dict(
            architectures=["Qwen2ForCausalLM"],
            hidden_size=896,
            intermediate_size=4864,
            max_window_layers=24,
            model_type="qwen2",
            num_attention_heads=14,
            num_hidden_layers=24,
            num_key_value_heads=2,
            sliding_window=32768,
            use_mrope=False,
        )
        | _QWEN,
    ),
    "qwen3-0.6b": (
        596_049_920,
        dict(
            hidden_size=1024,
            intermediate_size=3072,
            max_window_layers=28,
            num_attention_heads=16,
            num_hidden_layers=28,
        )
        | _QWEN3,
    ),
    "qwen3-4b": (
        4_022_468_096,
        dict(
            hidden_size=2560,
            intermediate_size=9728,
            max_window_layers=36,
            num_attention_heads=32,
            num_hidden_layers=36,
        )
        | _QWEN3,
    ),
    "llama-3.2-1b": (
        1_235_814_400,
        dict(
            head_dim=64,
            hidden_size=2048,
            intermediate_size=8192,
            num_hidden_layers=16,
            rope_scaling=_ROPE | {"factor": 32.0},
            tie_word_embeddings=True,
        )
        | _LLAMA,
    ),
    "llama-3.1-8b": (
        8_030_261_248,
        dict(
            hidden_size=4096,
            intermediate_size=14336,
            num_hidden_layers=32,
            rope_scaling=_ROPE | {"factor": 8.0},
            tie_word_embeddings=False,
        )
        | _LLAMA,
    ),
}


def published(name: str, folder: Path) -> ModelConfig:
    """The model of the published settings, as a folder's config.json is read."""
    (folder / "config.json").write_text(json.dumps(PUBLISHED[name][1]))
    return hf.read_config(folder)


def parameters(model: ModelConfig) -> int:
    """Without the verifier's head and the rows that fill the vocabulary up."""
    shapes = jax.tree.leaves(transformer.shapes(model))
    tables = 1 if model.tied else 2
    filling = tables * model.width * (model.vocab_size - model.text_size)
    return sum(math.prod(x.shape) for x in shapes) - filling - 2


def test_every_model_has_its_published_settings_here() -> None:
    assert PUBLISHED.keys() == PRESETS.keys()
    assert {*PRESETS, "tiny", "smollm2-135m"} == GSM8K["MODELS"].keys()


@pytest.mark.parametrize("name", PRESETS)
def test_published_settings_give_the_published_number_of_parameters(
    name: str, tmp_path: Path
) -> None:
    assert parameters(published(name, tmp_path)) == PUBLISHED[name][0]


@pytest.mark.parametrize("name", PRESETS)
def test_a_model_fits_its_chips_and_their_rows(name: str, tmp_path: Path) -> None:
    config, model = GSM8K["get_config"](name), published(name, tmp_path)
    chips = config.mesh.fsdp
    memory = 16e9  # of a v5e
    assert 16 * PUBLISHED[name][0] / chips <= memory / 2
    options = config.sample
    cached = options.prompts * options.slots * options.max_tokens  # tokens, in bfloat16
    values = 2 * model.layers * model.kv_heads * model.head_size
    assert 2 * values * cached / chips <= memory / 2.5
    # In sampling they are cut by heads alone; the float32 ones are there until they are cast.
    cut = math.gcd(chips, model.kv_heads)
    assert 6 * PUBLISHED[name][0] / cut + 2 * values * cached / chips <= memory * 0.9
    assert model.width % chips == options.prompts % chips == 0
    for stage in ("finetune", "baseline", "verify"):
        assert config[stage].microbatch_rows % chips == 0
        assert 224 + options.max_tokens <= config[stage].row_tokens <= model.max_length
    assert config.score.rows % chips == 0


@pytest.mark.parametrize("name", PRESETS)
def test_a_model_is_pinned_and_follows_the_papers_protocol(name: str) -> None:
    config = GSM8K["get_config"](name)
    validate(config)
    assert re.fullmatch(r"[\w.-]+/[\w.-]+@[0-9a-f]{40}", config.model.pretrained)
    assert config.model.dtype == "auto"
    given, known = leaves(config), leaves(default())
    differs = {key for key, value in given.items() if value != known[key]}
    sizes = {"row_tokens", "microbatch_rows", "rows", "prompts", "learning_rate", "clip_norm"}
    more = {"model.pretrained", "model.dtype", "model.remat", "mesh.fsdp"}
    more |= {"sample.kept_share", "mesh.sampling", "pretrain.documents"}
    assert {key for key in differs if key.split(".")[1] not in sizes} <= more


def test_the_expected_times_follow_from_the_protocol() -> None:
    """Tokens of GPT-2's tokenizer: 56 of a question and 96 of a solution, on average."""
    config = default()
    completions = 7473 * config.sample.completions
    epochs = config.finetune.epochs + config.baseline.epochs
    trained = epochs * 7473 * (56 + 96)
    trained += completions * (96 + (56 + 96) / config.verify.branches)
    tested = 1319 * config.sample.test_completions * 96
    sampled = completions * 96 + tested
    said = re.search(r"(\d+) million tokens\n?\s*are trained on", HEADER)
    assert int(said.group(1)) == pytest.approx(trained / 1e6, rel=0.03)
    said = re.search(r"(\d+) million are sampled and (\d+) million scored", HEADER)
    assert int(said.group(1)) == pytest.approx(sampled / 1e6, rel=0.03)
    assert int(said.group(2)) == pytest.approx(tested / 1e6, rel=0.03)
    assert 8 * trained + 2 * (sampled + tested) == pytest.approx(1e9, rel=0.1)
    rows = re.findall(r"^ +(\S+) +([\d.]+) G +(\d+) +([\d.]+)$", HEADER, re.M)
    assert [name for name, *_ in rows] == sorted(PRESETS, key=lambda name: PUBLISHED[name][0])
    for name, billions, chips, hours in rows:
        count = PUBLISHED[name][0]
        assert float(billions) == pytest.approx(count / 1e9, abs=0.005)
        assert int(chips) == PRESETS[name].chips
        seconds = 1e9 * count / (int(chips) * 0.4 * 197e12)
        assert float(hours) == pytest.approx(seconds / 3600, abs=0.06)


def test_smollm2_starts_from_the_folder_its_command_writes() -> None:
    config = GSM8K["get_config"]("smollm2-135m")
    validate(config)
    assert f"gsm_verifier.model.gguf {config.model.pretrained}\n" in HEADER
    assert config.finetune.epochs == 2
    assert config.data.train_size == 0
    assert (config.model.dtype, config.mesh.cpu_devices) == ("auto", 2)
