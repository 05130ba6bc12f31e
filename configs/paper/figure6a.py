"""Figure 6a: a value after every token, or only after the whole solution.

    python -m gsm_verifier.main --config=configs/paper/figure6a.py:<token|solution> \
        --workdir=runs/figure6a-<point>

Varies verify.level.

The paper: token-level starts slower, ends higher and is still improving; solution-level overfits
early. Here: not measured.
"""

import runpy
from pathlib import Path

COMMON = runpy.run_path(str(Path(__file__).with_name("common.py")))
POINTS = {"token": {"verify.level": "token"}, "solution": {"verify.level": "solution"}}
get_config = COMMON["figure"](POINTS)
