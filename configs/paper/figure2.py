"""Figure 2: finetuning alone, by the size of the training set and of the model.

    python -m gsm_verifier.main --config=configs/paper/figure2.py:<all|125|250|500|1000|2000|4000> \
        --workdir=runs/figure2-<point>

Varies data.train_size. The model is the recipe's: `figure2.py:500,gsm8k-<model>`. The figure shows
mean and standard deviation of three runs: `--config.seed=1`, `--config.data.seed=1` and so on. Read
"greedy" of results.json. The stages of the verifier run too, on the least they can: one completion.

The paper: accuracy grows with both. Here: not measured.
"""

import runpy
from pathlib import Path

COMMON = runpy.run_path(str(Path(__file__).with_name("common.py")))
LEAST = {"sample.completions": 1, "sample.heldout_completions": 0, "sample.test_completions": 1}
POINTS = {name: {"data.train_size": size} | LEAST for name, size in COMMON["SIZES"].items()}
get_config = COMMON["figure"](POINTS)
