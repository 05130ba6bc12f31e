"""Write a trained stage as a Hugging Face folder, for transformers, vLLM, lm-eval and others.

    python -m gsm_verifier.export --run=runs/quickstart --model=generator --to=<folder>

Its generation_config.json says how the run samples; a baseline's, greedily. The calculator isn't in
the folder: other programs write the results of annotations themselves. `gsm_verifier.api` loads the
folder and samples with the calculator.

A verifier's folder also holds `verifier.json`, which says how its value is read from the logits.
Of a qwen2 with another tokenizer than Qwen's, read the tokenizer by PreTrainedTokenizerFast:
AutoTokenizer of transformers 5 takes Qwen's for every qwen2, whatever the folder says.
"""

import json
import sys
from pathlib import Path

from absl import app, flags, logging
from ml_collections import ConfigDict

from gsm_verifier import storage

_RUN = flags.DEFINE_string("run", None, "Work directory of a run.")
_MODEL = flags.DEFINE_enum(
    "model", "generator", ["pretrained", "generator", "baseline", "verifier"], "Which model."
)
_TO = flags.DEFINE_string("to", None, "Folder to write.")
_DTYPE = flags.DEFINE_enum(
    "dtype", "float32", ["float32", "bfloat16", "float16"], "Of the weights on disk."
)


def export(run_folder: Path, name: str, to: Path, dtype: str) -> None:
    """Write model `name` of a run's folder to `to`.

    Raises:
      ValueError: not a run's folder, a stage that hasn't run, or something is at `to` already.
    """
    from gsm_verifier.model import hf
    from gsm_verifier.stages import Run

    if storage.in_bucket(to):
        raise ValueError(f"{to}: write to a folder of this machine, and copy that to the bucket")
    path = run_folder / "config.json"
    if not path.is_file():
        raise ValueError(f"{run_folder} is no run's work directory: it has no config.json")
    if to.is_file() or (to.is_dir() and any(to.iterdir())):
        raise ValueError(f"{to} is there and isn't empty: write to another folder, or delete it")
    run = Run(ConfigDict(json.loads(path.read_bytes())), run_folder)
    sampling = {key: run.config.sample[key] for key in hf.SAMPLING}
    if name == "baseline":
        sampling["temperature"] = 0.0  # as it answers in the run
    hf.save(
        to,
        run.model_of(name),
        run.params(name),
        run.tokenizer,
        squash=run.config.verify.squash if name == "verifier" else None,
        aggregate=run.config.score.aggregate,
        sampling=None if name == "verifier" else sampling,
        dtype=dtype,
    )


def main(argv: list[str]) -> None:
    """The command; an expected error is one line."""
    if argv[1:]:
        raise app.UsageError(f"unknown argument {argv[1]}")
    logging.set_verbosity(logging.WARNING)
    try:
        export(storage.path(_RUN.value), _MODEL.value, storage.path(_TO.value), _DTYPE.value)
    except ValueError as error:
        sys.exit(f"gsm_verifier: {error}")
    print(f"wrote {_TO.value}")


if __name__ == "__main__":
    flags.mark_flags_as_required(["run", "to"])
    app.run(main)
