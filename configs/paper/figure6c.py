"""Figure 6c: generator and verifier of different sizes.

    python -m gsm_verifier.main --config=configs/paper/figure6c.py:same \
        --workdir=runs/figure6c-large
    python -m gsm_verifier.main --config=configs/paper/figure6c.py:same,small \
        --workdir=runs/figure6c-small
    python -m gsm_verifier.main --config=configs/paper/figure6c.py:by_small \
        --workdir=runs/figure6c-large-by-small
    python -m gsm_verifier.main --config=configs/paper/figure6c.py:by_large,small \
        --workdir=runs/figure6c-small-by-large

Varies verify.run: the run whose model the verifier is made of. The recipe is the generator's: on
GSM8K take `gsm8k-<model>` for the large one and another, with the same tokenizer, for `small`. The
first two runs come first.

The paper: a large generator with a small verifier beats a small one with a large. Here: not
measured.
"""

import runpy
from pathlib import Path

COMMON = runpy.run_path(str(Path(__file__).with_name("common.py")))
POINTS = {
    "same": {"verify.run": ""},
    "by_small": {"verify.run": "runs/figure6c-small"},
    "by_large": {"verify.run": "runs/figure6c-large"},
}
get_config = COMMON["figure"](POINTS)
