"""Figure 3: epochs of the generator, against one greedy answer and against coverage.

    python -m gsm_verifier.main --config=configs/paper/figure3.py:<2|1|3|5|10|20|50|100> \
        --workdir=runs/figure3-<point>

Varies finetune.epochs, and leaves out the longer trained baseline, so that the generator itself
answers greedily: test@1 is "greedy" of results.json, test@100 is "coverage" at N = 100. Each point
is a run with a decay of its own.

The paper: test@1 rises nearly monotonically though the test loss overfits; test@100 peaks in the
first epochs, then falls sharply: hence 2 epochs. Here: not measured.
"""

import runpy
from pathlib import Path

COMMON = runpy.run_path(str(Path(__file__).with_name("common.py")))
POINTS = {
    str(n): {"finetune.epochs": float(n), "baseline.epochs": 0.0}
    for n in (2, 1, 3, 5, 10, 20, 50, 100)
}
get_config = COMMON["figure"](POINTS)
