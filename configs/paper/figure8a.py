"""Figure 8a: residual dropout in finetuning.

    python -m gsm_verifier.main --config=configs/paper/figure8a.py:<none|control|dropout> \
        --workdir=runs/figure8a-<point>

Varies dropout, 0.2, in the additional pretraining that must come before it and in finetuning;
"control" has the additional pretraining without dropout. Its documents are generated text:
`--config.pretrain.documents=<file>` for a real model. Read "greedy" of results.json.

The paper: a large gain. Here: not measured.
"""

import runpy
from pathlib import Path

COMMON = runpy.run_path(str(Path(__file__).with_name("common.py")))
MORE = {"pretrain.epochs": 1.0}
DROPOUT = COMMON["dropout"]("pretrain", "finetune", "baseline")
POINTS = {"none": {}, "control": MORE, "dropout": MORE | DROPOUT}
get_config = COMMON["figure"](POINTS)
