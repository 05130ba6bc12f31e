"""Figure 12 (appendix E): what a verifier starts from, and what the generator's loss covers.

    python -m gsm_verifier.main --config=configs/paper/figure12.py:<default|pretrained|masked> \
        --workdir=runs/figure12-<point>

Varies verify.init ("pretrained": from the language model the generator came from), and
question_loss of finetuning ("masked": the loss of generator and baseline leaves the question out).

The paper: starting from the generator is slightly better. Here: not measured.
"""

import runpy
from pathlib import Path

COMMON = runpy.run_path(str(Path(__file__).with_name("common.py")))
POINTS = {
    "default": {},
    "pretrained": {"verify.init": "pretrained"},
    "masked": {"finetune.question_loss": False, "baseline.question_loss": False},
}
get_config = COMMON["figure"](POINTS)
