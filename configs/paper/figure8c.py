"""Figure 8c: residual dropout in token-level verifiers.

    python -m gsm_verifier.main --config=configs/paper/figure8c.py:<none|control|dropout> \
        --workdir=runs/figure8c-<point>

Varies dropout, 0.2, in the additional pretraining and in the verifier, as figure 8a does. All
points have the paper's four times larger batch and three times the completions (300 for its 100).

The paper: a slight gain. Here: not measured.
"""

import runpy
from pathlib import Path

COMMON = runpy.run_path(str(Path(__file__).with_name("common.py")))
LARGER = {
    "verify.batch_tokens": lambda tokens: 4 * tokens,
    "sample.completions": lambda completions: 3 * completions,
}
MORE = LARGER | {"pretrain.epochs": 1.0}
DROPOUT = COMMON["dropout"]("pretrain", "verify")
POINTS = {"none": LARGER, "control": MORE, "dropout": MORE | DROPOUT}
get_config = COMMON["figure"](POINTS)
