"""The paper's protocol on GSM8K. Where its files train.jsonl and test.jsonl are:

    --config.data.path=<folder>    else they are looked for and fetched through TFDS

`configs/gsm8k.py:tiny` takes all 7,473 + 1,319 problems through every stage with a model too small
to solve any, as a rehearsal:

    python -m gsm_verifier.main --config=configs/gsm8k.py:tiny \
        --config.data.path=<folder> --workdir=runs/gsm8k-tiny
"""

from ml_collections import ConfigDict

from gsm_verifier.config import default


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
    shared = dict(row_tokens=768, microbatch_rows=16, batch_tokens=12_288)
    shared |= dict(learning_rate=3e-3, warmup_steps=10, clip_norm=1.0, eval_every=50)
    config.finetune.update(epochs=1.0, **shared)
    config.baseline.update(epochs=1.0, **shared)
    config.verify.update(branches=4, **shared)
    config.sample.update(
        completions=2, heldout_completions=1, test_completions=4, max_tokens=96, prompts=64, slots=4
    )
    config.score.update(row_tokens=768, rows=16)
    config.records.shard_problems = 500


MODELS = {"tiny": tiny}


def get_config(model: str = "tiny") -> ConfigDict:
    config = default()
    if model not in MODELS:
        raise ValueError(f"configs/gsm8k.py:{model}: use one of {', '.join(MODELS)}")
    MODELS[model](config)
    return config
