"""Figure 7a: completions per test problem, from which the verifier chooses.

    python -m gsm_verifier.main --workdir=runs/figure7a-<point> \
        --config=configs/paper/figure7a.py:<3200|1600|800|400|200|100|50|25>

Varies sample.test_completions. One run draws the whole curve: results.json holds every smaller N,
as the expectation over all subsets. Smaller points are for smaller budgets.

The paper: rises to about 400, then falls: adversarial solutions fool the verifier. Here: not
measured.
"""

import runpy
from pathlib import Path

COMMON = runpy.run_path(str(Path(__file__).with_name("common.py")))
POINTS = {str(n): {"sample.test_completions": n} for n in (3200, 1600, 800, 400, 200, 100, 50, 25)}
get_config = COMMON["figure"](POINTS)
