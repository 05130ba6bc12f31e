"""The whole paper in minutes on a laptop, on generated word problems.

    python -m gsm_verifier.main --config=configs/quickstart.py --workdir=runs/quickstart

`configs/quickstart.py:tiny` runs the same path in seconds and learns nothing; it is for tests.
"""

from ml_collections import ConfigDict

from gsm_verifier.config import default


def get_config(size: str = "") -> ConfigDict:
    config = default()
    config.data.update(source="synthetic", train_size=1000, heldout_fraction=0.05, test_size=300)
    config.text.vocab_size = 1023
    config.model.update(
        family="llama",
        layers=6,
        width=128,
        heads=4,
        kv_heads=1,
        head_size=32,
        mlp_width=384,
        max_length=384,
        tied=True,
    )
    config.pretrain.update(
        epochs=1.0,
        generated=30_000,
        learning_rate=3e-3,
        batch_tokens=8192,
        row_tokens=256,
        microbatch_rows=32,
        warmup_steps=50,
    )
    shared = dict(row_tokens=256, microbatch_rows=32, batch_tokens=4096, clip_norm=1.0)
    config.finetune.update(learning_rate=1e-3, warmup_steps=10, **shared)
    config.baseline.update(learning_rate=1e-3, warmup_steps=10, **shared)
    config.verify.update(learning_rate=1e-3, warmup_steps=20, branches=4, **shared)
    config.mesh.cpu_devices = 2
    config.sample.update(
        completions=20,
        heldout_completions=10,
        train_problems=600,
        max_tokens=160,
        prompts=32,
        slots=10,
    )
    config.score.update(row_tokens=256, rows=32)
    if size == "pretrain":
        config.data.train_size = 5000  # for the tokenizer only
        config.pretrain.update(generated=80_000, epochs=1.0)
    elif size == "tiny":
        config.data.update(train_size=24, heldout_fraction=0.25, test_size=8)
        config.text.vocab_size = 400
        config.model.update(
            layers=2, width=32, heads=2, kv_heads=1, head_size=16, mlp_width=64, max_length=768
        )
        config.pretrain.generated = 100
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
                row_tokens=512,
                microbatch_rows=4,
                batch_tokens=1024,
                eval_every=5,
                checkpoint_every=5,
            )
        config.score.row_tokens = 512
        config.records.shard_problems = 3
    elif size:
        raise ValueError(f"configs/quickstart.py:{size}: use no size, tiny or pretrain")
    return config
