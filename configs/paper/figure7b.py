"""Figure 7b: how many of the top-ranked completions vote.

    python -m gsm_verifier.main --config=configs/paper/figure7b.py:<1|2|3|5|10|20|30|50|100> \
        --workdir=runs/figure7b

Varies rank.vote_k, which decides "verifier_vote" of results.json. Every run also holds the whole
curve, "vote_size", so one is enough; for another k in the same folder, delete its rank.done and
report.done. With 3200 completions: `figure7b.py:30,figure7a-3200`.

The paper: 3-5 of 100 completions are best, about 30 of 3200. Here: not measured.
"""

import runpy
from pathlib import Path

COMMON = runpy.run_path(str(Path(__file__).with_name("common.py")))
POINTS = {str(k): {"rank.vote_k": k} for k in (1, 2, 3, 5, 10, 20, 30, 50, 100)}
get_config = COMMON["figure"](POINTS)
