"""Figure 8b: residual dropout in solution-level verifiers.

    python -m gsm_verifier.main --config=configs/paper/figure8b.py:<none|control|dropout> \
        --workdir=runs/figure8b-<point>

Varies dropout, 0.2, in the additional pretraining and in the verifier, as figure 8a does. All
points are solution-level.

The paper: a large gain. Here: not measured.
"""

import runpy
from pathlib import Path

COMMON = runpy.run_path(str(Path(__file__).with_name("common.py")))
LEVEL = {"verify.level": "solution"}
MORE = LEVEL | {"pretrain.epochs": 1.0}
DROPOUT = COMMON["dropout"]("pretrain", "verify")
POINTS = {"none": LEVEL, "control": MORE, "dropout": MORE | DROPOUT}
get_config = COMMON["figure"](POINTS)
