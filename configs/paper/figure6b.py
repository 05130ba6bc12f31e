"""Figure 6b: the verifier trained as a language model too, or on values alone.

    python -m gsm_verifier.main --config=configs/paper/figure6b.py:<joint|verifier_only> \
        --workdir=runs/figure6b-<point>

Varies verify.objective.

The paper: the joint objective is a strict improvement. Here: not measured.
"""

import runpy
from pathlib import Path

COMMON = runpy.run_path(str(Path(__file__).with_name("common.py")))
POINTS = {
    "joint": {"verify.objective": "joint"},
    "verifier_only": {"verify.objective": "verifier_only"},
}
get_config = COMMON["figure"](POINTS)
