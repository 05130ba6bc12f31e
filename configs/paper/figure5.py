"""Figure 5: finetuning against verification, by the size of the training set.

    python -m gsm_verifier.main --config=configs/paper/figure5.py:<all|125|250|500|1000|2000|4000> \
        --workdir=runs/figure5-<point>

Varies data.train_size; a run holds both curves, "greedy" and "verifier" of results.json.

The paper: verification loses on little data and wins clearly on the full set. Here: not measured.
"""

import runpy
from pathlib import Path

COMMON = runpy.run_path(str(Path(__file__).with_name("common.py")))
POINTS = {name: {"data.train_size": size} for name, size in COMMON["SIZES"].items()}
get_config = COMMON["figure"](POINTS)
