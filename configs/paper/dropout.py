"""Section 4.3's protocol in one word: additional pretraining with dropout, and then all with it.

    python -m gsm_verifier.main --config=configs/paper/dropout.py:gsm8k-<model> \
        --config.pretrain.documents=<file> --config.data.path=<folder> --workdir=<folder>

Residual dropout of 0.2 in every stage that trains. The models were pretrained without, so they
first read more documents with it: a .txt, .jsonl or .parquet file, or tfds:<name>. Which, and how
many, the paper leaves open: one epoch of what is given, generated text for the quickstart. Before
any recipe: `figure2.py:500,dropout-gsm8k-<model>`. Figure 8 has the stages one by one.

The paper: a large gain in finetuning and in solution-level verifiers. Here: not measured.
"""

import runpy
from pathlib import Path

COMMON = runpy.run_path(str(Path(__file__).with_name("common.py")))
CHANGES = {"pretrain.epochs": 1.0} | COMMON["dropout"]("pretrain", "finetune", "baseline", "verify")
get_config = COMMON["word"](CHANGES)
