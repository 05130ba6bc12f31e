"""A smaller model for the quickstart's problems, with its tokenizer: the small one of figure 6c.

    python -m gsm_verifier.main --config=configs/paper/small.py --workdir=runs/small

A sixth of the quickstart's parameters. It pretrains on generated text first, as that one did.
"""

import runpy
from pathlib import Path

from ml_collections import ConfigDict

QUICKSTART = Path(__file__).parents[1] / "quickstart.py"


def get_config() -> ConfigDict:
    get = runpy.run_path(str(QUICKSTART))["get_config"]
    config, made = get(), get("pretrain")
    config.text.tokenizer = f"gsm_verifier/pretrained/{config.model.pretrained}/tokenizer.json"
    config.model.update(made.model)
    config.model.update(layers=3, width=64, heads=2, kv_heads=2, head_size=32, mlp_width=192)
    config.pretrain.update(made.pretrain)
    return config
