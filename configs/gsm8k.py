"""The paper's protocol on GSM8K, from an open pretrained model. Where its two files are:

    --config.data.path=<folder>    else they are looked for and fetched through TFDS

SmolLM2 needs no model hub, but 93 MB of a package registry, and two CPU cores with 16 GB. Its
preset takes 2 epochs over all of GSM8K and then a share of the paper's samples (see `smollm2`):
some 5 hours, by the speeds measured with less. What README tells of took 98 minutes, with
`--config.data.train_size=1200 --config.sample.completions=6`.

    pip install -e '.[hf]' && python -m gsm_verifier.model.gguf models/smollm2
    python -m gsm_verifier.main --config=configs/gsm8k.py:smollm2-135m \
        --config.data.path=<folder> --workdir=runs/smollm2-135m

The other models are downloaded from the Hugging Face hub once, by huggingface_hub (Llama asks for
a token of yours), and get all of the paper's 100 completions of every problem:

    python -m gsm_verifier.main --config=configs/gsm8k.py:<model> \
        --config.data.path=<folder> --workdir=<folder>

Hardware: TPU v5e chips (16 GB), at least as many as below; more of them, by their multiples, work
on other rows. Parameters, gradients and Adam's moments, 16 bytes a parameter, are split over the
chips and take half of their memory at most. On GPUs of 80 GB, `--config.mesh.fsdp=1` holds all but
the last two.

Expected time, computed and not measured: 105 million tokens are trained on (20 epochs of the
baseline, 2 of the generator, 1 of the verifier with 16 completions to a question), at 8 FLOPs a
parameter with recomputed activations; 86 million are sampled and 13 million scored, at 2. That is
about a billion FLOPs a parameter; hours are given for 40 % of the chips' 197 TFLOP/s, which
sampling, bound by memory, won't reach.

    model            parameters   chips   hours
    gpt2                 0.12 G       1     0.4
    pythia-410m          0.41 G       1     1.4
    qwen2.5-0.5b         0.49 G       1     1.7
    qwen3-0.6b           0.60 G       2     1.1
    llama-3.2-1b         1.24 G       4     1.1
    pythia-1.4b          1.41 G       4     1.2
    gpt2-xl              1.56 G       4     1.4
    qwen3-4b             4.02 G      16     0.9
    llama-3.1-8b         8.03 G      32     0.9

`tiny` takes all 7,473 + 1,319 problems through every stage with a model too small to solve any, as
a rehearsal on two CPU cores:

    python -m gsm_verifier.main --config=configs/gsm8k.py:tiny \
        --config.data.path=<folder> --workdir=runs/gsm8k-tiny
"""

from typing import NamedTuple

from ml_collections import ConfigDict

from gsm_verifier.config import default

TRAINED = ("pretrain", "finetune", "baseline", "verify")


class Preset(NamedTuple):
    """What differs from model to model.

    Attributes:
      start: hub id, and the revision that was its newest when this was written.
      learning_rate: falling with size, as in the paper's table 1; not tuned.
      chips: that share a model's parameters.
      prompts: in flight, with 16 completions each in the mean: what keys and values leave room for.
    """

    start: str
    learning_rate: float
    chips: int = 1
    prompts: int = 16


PRESETS = {
    "gpt2": Preset("openai-community/gpt2@607a30d783dfa663caf39e06633721c8d4cfcd7e", 5e-5),
    "gpt2-xl": Preset(
        "openai-community/gpt2-xl@15ea56dee5df4983c59b2538573817e1667135e2", 2e-5, 4, 8
    ),
    "pythia-410m": Preset(
        "EleutherAI/pythia-410m@9879c9b5f8bea9051dcb0e68dff21493d67e9d4f", 5e-5, 1, 8
    ),
    "pythia-1.4b": Preset(
        "EleutherAI/pythia-1.4b@fedc38a16eea3bd36a96b906d78d11d2ce18ed79", 2e-5, 4
    ),
    "qwen2.5-0.5b": Preset("Qwen/Qwen2.5-0.5B@060db6499f32faf8b98477b0a26969ef7d8b9987", 2e-5),
    "qwen3-0.6b": Preset("Qwen/Qwen3-0.6B-Base@da87bfb608c14b7cf20ba1ce41287e8de496c0cd", 2e-5, 2),
    "qwen3-4b": Preset("Qwen/Qwen3-4B-Base@906bfd4b4dc7f14ee4320094d8b41684abff8539", 1e-5, 16),
    "llama-3.2-1b": Preset(
        "meta-llama/Llama-3.2-1B@4e20de362430cd3b72f300e6b0f18e50e7166e08", 2e-5, 4
    ),
    "llama-3.1-8b": Preset(
        "meta-llama/Llama-3.1-8B@d04e592bb4f6aa9cfee91e2e20afa771667e1d4b", 1e-5, 32, 32
    ),
}


def real(config: ConfigDict, preset: Preset) -> None:
    config.model.update(pretrained=preset.start, dtype="auto", remat=True)
    config.mesh.update(fsdp=preset.chips, sampling="tensor")
    # A row holds any question with a completion of 400 tokens; 32 rows are the paper's batch.
    for stage in TRAINED:
        config[stage].update(row_tokens=1024, microbatch_rows=max(8, preset.chips))
        config[stage].update(learning_rate=preset.learning_rate, clip_norm=1.0)
    config.score.update(row_tokens=1024, rows=max(8, preset.chips))
    config.sample.update(prompts=preset.prompts, kept_share=0.4)  # of solutions like GSM8K's
    config.pretrain.documents = "documents.jsonl"  # yours, where the pretraining is asked for


def smollm2(config: ConfigDict) -> None:
    real(config, Preset("models/smollm2", 1e-4))
    config.mesh.cpu_devices = 2
    config.model.remat = False
    # By its tokenizer a problem has 540 tokens at most, a question 224.
    for stage in TRAINED:
        config[stage].update(row_tokens=576, microbatch_rows=2, batch_tokens=5760)
        config[stage].update(warmup_steps=10, eval_every=50, checkpoint_every=25)
    config.score.update(row_tokens=576, rows=2)
    config.baseline.epochs = 0.0
    config.data.update(test_size=200)
    config.sample.update(train_problems=300, completions=20, heldout_completions=0)
    # Fewer slots than completions: one that is done early makes room for the next.
    config.sample.update(test_completions=20, max_tokens=240, prompts=48, slots=4, kept_share=1.0)
    config.records.shard_problems = 25


def tiny(config: ConfigDict) -> None:
    config.text.vocab_size = 2047
    config.model.update(
        family="llama",
        layers=2,
        width=64,
        heads=2,
        kv_heads=1,
        head_size=32,
        mlp_width=192,
        max_length=768,
        tied=True,
    )
    config.mesh.cpu_devices = 2
    shared = dict(row_tokens=768, microbatch_rows=2, batch_tokens=12_288)
    shared |= dict(learning_rate=3e-3, warmup_steps=10, clip_norm=1.0, eval_every=50)
    config.finetune.update(epochs=1.0, **shared)
    config.baseline.update(epochs=1.0, **shared)
    config.verify.update(branches=4, **shared)
    config.sample.update(
        completions=2, heldout_completions=1, test_completions=4, max_tokens=96, prompts=64, slots=4
    )
    config.score.update(row_tokens=768, rows=16)
    config.records.shard_problems = 500


MODELS = {"tiny": tiny, "smollm2-135m": smollm2} | {
    name: lambda config, preset=preset: real(config, preset) for name, preset in PRESETS.items()
}


def get_config(model: str = "tiny") -> ConfigDict:
    config = default()
    if model not in MODELS:
        raise ValueError(f"configs/gsm8k.py:{model}: use one of {', '.join(MODELS)}")
    MODELS[model](config)
    return config
