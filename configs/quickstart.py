"""The whole paper in minutes on two CPU cores, on generated word problems.

    python -m gsm_verifier.main --config=configs/quickstart.py --workdir=runs/quickstart

It starts, as the paper does, from a pretrained language model: one of 1.5 million parameters that
comes with the package and has read short texts of the same world, some of them stories of its train
split worked to their answer, never a question with its solution. These commands made it, in
seventeen minutes on two cores:

    python -m gsm_verifier.main --config=configs/quickstart.py:pretrain --workdir=runs/pretrain \
        --stages=prepare,pretrain
    python -m gsm_verifier.export --run=runs/pretrain --model=pretrained --dtype=float16 \
        --to=gsm_verifier/pretrained/quickstart

Sizes, rates, the share of trials and `score.aggregate` were chosen on other problems than those of
any seed reported, `--config.data.seed=100`.

`configs/quickstart.py:tiny` runs the same path from scratch in seconds, for tests, and learns
nothing.
"""

from ml_collections import ConfigDict

from gsm_verifier.config import default


def get_config(size: str = "") -> ConfigDict:
    config = default()
    config.data.update(
        source="synthetic",
        difficulty=1,
        trials=0.8,
        train_size=350,
        heldout_fraction=0.1,
        test_size=300,
    )
    config.model.pretrained = "quickstart"
    config.mesh.cpu_devices = 2
    shared = dict(row_tokens=256, microbatch_rows=4, clip_norm=1.0, warmup_steps=10)
    config.finetune.update(learning_rate=4e-4, batch_tokens=1024, **shared)
    config.baseline.update(learning_rate=3e-4, batch_tokens=2048, **shared)
    config.verify.update(learning_rate=1e-3, batch_tokens=1024, branches=20, **shared)
    config.verify.eval_every = 100
    config.sample.update(
        completions=20,
        heldout_completions=20,
        max_tokens=112,
        prompts=32,
        slots=10,
    )
    config.score.update(row_tokens=256, rows=16, aggregate="min")
    if size == "pretrain":
        _pretrain(config)
    elif size == "tiny":
        _tiny(config)
    elif size:
        raise ValueError(f"configs/quickstart.py:{size}: use no size, pretrain or tiny")
    return config


def _from_scratch(config: ConfigDict, **sizes: int) -> None:
    config.model.update(pretrained="", family="llama", tied=True, **sizes)


def _pretrain(config: ConfigDict) -> None:
    config.data.train_size = 5000  # for the tokenizer
    config.text.update(vocab_size=2047, numbers=1000)
    _from_scratch(
        config,
        layers=6,
        width=128,
        heads=4,
        kv_heads=2,
        head_size=32,
        mlp_width=416,
        max_length=384,
    )
    config.pretrain.update(
        epochs=1.0,
        generated=65_000,
        learning_rate=3e-3,
        batch_tokens=2048,
        row_tokens=256,
        microbatch_rows=4,
        warmup_steps=100,
    )


def _tiny(config: ConfigDict) -> None:
    config.data.update(train_size=24, heldout_fraction=0.25, test_size=8)
    config.text.vocab_size = 400
    _from_scratch(
        config, layers=2, width=32, heads=2, kv_heads=1, head_size=16, mlp_width=64, max_length=768
    )
    config.mesh.cpu_devices = 1
    config.pretrain.update(epochs=1.0, generated=100)
    config.baseline.epochs = 3.0
    config.sample.update(
        completions=4,
        heldout_completions=2,
        test_completions=10,
        train_problems=8,
        max_tokens=48,
        prompts=4,
        slots=4,
    )
    for stage in ("pretrain", "finetune", "baseline", "verify"):
        config[stage].update(
            row_tokens=512, microbatch_rows=4, batch_tokens=1024, eval_every=5, checkpoint_every=5
        )
    config.score.row_tokens = 512
    config.records.shard_problems = 3
