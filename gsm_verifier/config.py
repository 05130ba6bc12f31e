"""Every key that exists, what it means, and where the paper speaks of it.

`default()` is the paper where the paper speaks; the files in `configs/` are short differences from
it. What the paper leaves open is a key too, said to be "open", with the natural reading as default.
"""

import math
from typing import Any

from ml_collections import ConfigDict

WORDS: dict[str, tuple[str, ...]] = {
    "data.source": ("synthetic", "gsm8k"),
    "model.family": ("gpt3", "llama"),
    "model.dtype": ("auto", "float32", "bfloat16"),
    "model.attention": ("auto", "jax"),
    "verify.level": ("token", "solution"),
    "verify.objective": ("joint", "verifier_only"),
    "verify.mix": ("weighted", "paper"),
    "mesh.sampling": ("same", "tensor"),
    "verify.init": ("generator", "pretrained"),
    "verify.loss": ("mse", "bce"),
    "verify.squash": ("none", "sigmoid"),
    "score.aggregate": ("last", "mean", "min", "product"),
}

# Smallest and largest sensible value of numbers that aren't simply "at least 0".
RANGES: dict[str, tuple[float, float]] = {
    "data.heldout_fraction": (0.0, 0.9),
    "data.difficulty": (1, 5),
    "data.trials": (0.0, 1.0),
    "text.vocab_size": (300, 1_000_000),
    "text.numbers": (10, 10_000),
    "mesh.data": (-1, 1_000_000),
    "mesh.fsdp": (-1, 1_000_000),
    "mesh.tensor": (-1, 1_000_000),
    "mesh.cpu_devices": (1, 4096),
    "sample.temperature": (1e-3, 100.0),
    "sample.top_p": (1e-6, 1.0),
    "sample.kept_share": (0.01, 1.0),
    "verify.initial_value": (0.01, 0.99),
}
RANGES |= {
    f"{stage}.{key}": (0.0, 0.9999)
    for stage in ("pretrain", "finetune", "baseline", "verify")
    for key in ("adam_beta1", "adam_beta2", "dropout")
}
AT_LEAST_ONE = (
    "model.width", "model.layers", "model.heads", "model.kv_heads", "model.head_size",
    "model.mlp_width", "model.max_length", "sample.completions", "sample.test_completions",
    "sample.max_tokens", "sample.prompts", "sample.slots", "sample.chunk_steps",
    "verify.branches", "score.row_tokens", "score.rows", "rank.subsets", "records.shard_problems",
)  # fmt: skip
AT_LEAST_ONE += tuple(
    f"{stage}.{key}"
    for stage in ("pretrain", "finetune", "baseline", "verify")
    for key in ("batch_tokens", "row_tokens", "microbatch_rows", "eval_every", "checkpoint_every")
)


def training(**changes: Any) -> ConfigDict:
    """Options of one training stage (table 1)."""
    options = ConfigDict(
        dict(
            epochs=1.0,  # passes over the stage's examples; 0 keeps the model it starts from
            learning_rate=1e-5,  # table 1: 1.6e-5 (3B) ... 6e-6 (175B); finetuning a tenth of it
            batch_tokens=32_000,  # of one optimiser step (table 1), computed ones
            row_tokens=1024,  # T: examples are packed into rows of this length
            microbatch_rows=8,  # rows computed at one time; a step accumulates as many as it needs
            warmup_steps=0,  # open
            adam_beta1=0.9,  # table 1
            adam_beta2=0.95,  # table 1
            adam_epsilon=1e-8,  # open
            weight_decay=0.0,  # open
            clip_norm=0.0,  # of the gradient's global norm, 0 for no clipping; open
            dropout=0.0,  # residual dropout (section 4.3: 0.2)
            eval_every=100,  # steps between held-out losses
            checkpoint_every=200,  # steps between checkpoints
        )
    )
    options.update(changes)
    return options


def default() -> ConfigDict:
    """The paper's protocol on GSM8K, with a small model trained from scratch."""
    config = ConfigDict()
    config.seed = 0  # of everything: data order, initial weights, dropout, samples, intervals

    config.data = ConfigDict(
        dict(
            source="gsm8k",  # "gsm8k" | "synthetic" (generated word problems, needs no file)
            path="",  # gsm8k: folder with train.jsonl and test.jsonl; "": through TFDS
            train_size=0,  # problems to train on, 0 for all (figures 2 and 5)
            heldout_fraction=0.02,  # of train, by a hash of the id: for held-out losses only
            test_size=0,  # test problems, 0 for all
            difficulty=2,  # synthetic: 1 (2-3 steps) ... 5 (4-8 steps, many distractors)
            trials=0.5,  # synthetic: the share of problems with a hidden number, which fits or not
            seed=0,  # synthetic: of the generated problems; GSM8K: of the subset of train_size
        )
    )
    config.text = ConfigDict(
        dict(
            tokenizer="",  # path of a tokenizer.json; "": a BPE trained on the prepared text
            vocab_size=2048,  # of that BPE
            numbers=10,  # smaller whole numbers are one token in it; 10: every digit is
        )
    )
    config.model = ConfigDict(
        dict(
            pretrained="",  # "": initial weights are random; "quickstart": the model in the package
            family="gpt3",
            layers=6,
            width=256,
            heads=4,
            kv_heads=4,
            head_size=64,
            mlp_width=1024,
            max_length=1024,
            rope_theta=10_000.0,  # families with rotary positions
            tied=None,  # True | False; None: the family's way
            dtype="float32",  # of the computation; parameters are float32; "auto": by the devices
            attention="auto",  # on CPU in C++ where there is a compiler, else in JAX | "jax"
            remat=False,  # recompute activations in the backward pass
        )
    )
    config.mesh = ConfigDict(
        dict(
            data=-1,  # devices with the same parameters; -1: all that are left
            fsdp=1,  # devices that share the parameters' width
            tensor=1,  # devices that share heads, feed-forward and vocabulary
            # Where to sample: "same" | "tensor", which fsdp's devices then are on as far as that
            # divides heads, feed-forward and vocabulary; else every step gathers all weights. Each
            # device then holds all weights over tensor.
            sampling="same",
            cpu_devices=1,  # without an accelerator: devices the CPU is split into
        )
    )
    # Language-model training before finetuning; with dropout, the paper's additional pretraining.
    config.pretrain = training(
        epochs=0.0,
        learning_rate=1e-3,
        documents="",  # .txt | .jsonl ("text") of documents; "": generated text
        generated=20_000,  # generated documents
        clip_norm=1.0,
    )
    # The generator that is sampled (section 4.2: 2 epochs, before coverage falls; figure 3); with 0
    # epochs the pretrained model itself.
    config.finetune = training(
        epochs=2.0,
        question_loss=True,  # section 4.1: the loss is over all tokens
    )
    # The baseline that answers with one sample at temperature 0 (section 4.1: 20 epochs); with 0
    # epochs the generator is its own.
    config.baseline = training(epochs=20.0, question_loss=True)
    config.sample = ConfigDict(
        dict(
            completions=100,  # for each problem (section 4.2)
            heldout_completions=20,  # for each held-out problem, for the verifier's held-out loss
            test_completions=100,  # for each test problem (figure 7a: up to 3200)
            train_problems=0,  # train problems to sample, 0 for all
            imported="",  # .jsonl of completions sampled elsewhere (see data/imported.py)
            temperature=0.7,
            top_k=0,  # 0: all tokens; open
            top_p=1.0,  # 1: all tokens; open
            max_tokens=400,  # of a completion, the question not counted
            calculator=True,  # appendix C
            prompts=16,  # problems in flight
            slots=16,  # completions of each in flight, in the mean
            chunk_steps=16,  # most steps between two looks of the host
            kept_share=1.0,  # room for completions in flight, of what all at max_tokens would need
        )
    )
    config.verify = training(
        epochs=1.0,
        level="token",  # "token" | "solution" (figure 6a)
        objective="joint",  # "joint" with the language model | "verifier_only" (figure 6b)
        mix="weighted",  # language data: "paper", copies of gold | "weighted", the same for less
        run="",  # work directory of the run whose model it starts from (figure 6c); "": this one
        init="generator",  # "generator" | "pretrained" (appendix E)
        loss="mse",  # "mse" | "bce"
        squash="none",  # of the head's output: "none" | "sigmoid"; open
        initial_value=0.5,  # what the untrained head says; open
        completions=0,  # of each problem to train on, 0 for all that were sampled
        branches=16,  # most completions of a tree: they share beginnings; 1: the paper's batch
    )
    config.score = ConfigDict(
        dict(
            imported="",  # as in sample, for the test problems
            aggregate="last",  # of the values after each token: last | mean | min | product; open
            row_tokens=1024,
            rows=8,  # rows computed at one time
        )
    )
    config.rank = ConfigDict(
        dict(
            vote_k=0,  # top-ranked completions that vote, 0: a fixed rule (figure 7b: 3-5 of 100)
            subsets=200,  # random subsets of N completions for votes without a closed form
        )
    )
    config.report = ConfigDict(
        dict(
            problems=40,  # in the browser of problems
            completions=12,  # of each
        )
    )
    config.records = ConfigDict(dict(shard_problems=50))  # problems a parquet shard holds
    return config


def leaves(config: ConfigDict, prefix: str = "") -> dict[str, Any]:
    """The config's values by their dotted keys."""
    flat: dict[str, Any] = {}
    for key, value in config.items():
        name = f"{prefix}{key}"
        flat |= leaves(value, f"{name}.") if isinstance(value, ConfigDict) else {name: value}
    return flat


def validate(config: ConfigDict) -> None:
    """Refuse nonsense before any work.

    Raises:
      ValueError: the first key that is unknown, of another type, or out of range; one line.
    """
    known, given = leaves(default()), leaves(config)
    for key in {**known, **given}:
        if key not in known:
            raise ValueError(f"config.{key} doesn't exist: see gsm_verifier/config.py for the keys")
        if key not in given:
            raise ValueError(f"config.{key} is missing: start from gsm_verifier.config.default()")
        _validate_one(key, given[key], known[key])
    if config.model.heads % config.model.kv_heads:
        raise ValueError("config.model.kv_heads must divide config.model.heads")
    if config.text.vocab_size - config.text.numbers < 290:
        raise ValueError("config.text.vocab_size must leave 290 ids beside config.text.numbers")
    if config.verify.loss == "bce" and config.verify.squash != "sigmoid":
        raise ValueError('config.verify.loss="bce" needs config.verify.squash="sigmoid"')


def _validate_one(key: str, value: Any, example: Any) -> None:
    if key in WORDS:
        if value not in WORDS[key]:
            raise ValueError(f"config.{key}={value!r}: use one of {', '.join(WORDS[key])}")
        return
    if example is None:
        if value not in (None, True, False):
            raise ValueError(f"config.{key}={value!r}: use True, False or None")
        return
    if isinstance(example, (bool, str)) or isinstance(value, (bool, str)):
        if type(value) is not type(example):
            raise ValueError(f"config.{key}={value!r}: use a {type(example).__name__}")
        return
    whole = isinstance(example, int)
    if not isinstance(value, (int, float)) or (whole and value % 1):  # also nan and inf: nan % 1
        raise ValueError(f"config.{key}={value!r}: use a {type(example).__name__}")
    low, high = RANGES.get(key, (int(key in AT_LEAST_ONE), math.inf))
    if not (low <= value <= high) or value in (math.inf, -math.inf):
        bound = f"at least {low:g}" if high == math.inf else f"from {low:g} to {high:g}"
        raise ValueError(f"config.{key}={value}: use a number {bound}")
