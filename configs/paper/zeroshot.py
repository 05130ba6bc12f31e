"""A recipe without its finetuning: what the pretrained model itself can do.

    python -m gsm_verifier.main --config=configs/paper/zeroshot.py:gsm8k-<model> \
        --config.data.path=<folder> --workdir=<folder>

No epoch of finetuning: the pretrained model answers the test problems, greedily and in samples. The
verifier's stages run on the least they can, one completion, and the verifier says the same of all,
which ranks as one sample does. A model that was never shown `#### 42` rarely ends so, and what
doesn't is wrong, as in the paper. Read "greedy" and "coverage" of results.json.

The paper doesn't say; finetuning is compared with it. Here: not measured.
"""

import runpy
from pathlib import Path

COMMON = runpy.run_path(str(Path(__file__).with_name("common.py")))
CHANGES = {f"{stage}.epochs": 0.0 for stage in ("finetune", "baseline", "verify")} | {
    "sample.train_problems": 1,
    "sample.completions": 1,
    "sample.heldout_completions": 0,
    "sample.kept_share": 1.0,  # few end before max_tokens
}
get_config = COMMON["word"](CHANGES)
