"""What the figures share: a figure is a short difference from a recipe.

    --config=configs/paper/figure6a.py:solution               that point, on configs/quickstart.py
    --config=configs/paper/figure6a.py:solution,gsm8k-tiny    the same point on gsm8k.py:tiny
    --config=configs/paper/common.py:gsm8k-tiny               the recipe alone

A recipe is the name of a file beside this one or in configs/ and, after a dash, its argument. A
figure can be a recipe too: `figure7b.py:30,figure7a-3200` is figure 7b on what figure 7a samples.
So can a word, which changes the recipe after it: `figure6a.py:solution,dropout-gsm8k-gpt2`.
"""

import runpy
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

HERE = Path(__file__).parent
# Of training sets. 0 is all there is: GSM8K's, less those held out, or 2,000 generated problems.
SIZES = {"all": 0} | {str(n): n for n in (125, 250, 500, 1000, 2000, 4000)}


def get_config(recipe: str = "quickstart") -> ConfigDict:
    name, _, argument = recipe.partition("-")
    for file in (HERE.parent / f"{name}.py", HERE / f"{name}.py"):
        if file.is_file():
            return runpy.run_path(str(file))["get_config"](*[argument] if argument else [])
    raise ValueError(f"no recipe {recipe!r}: there is no {name}.py in configs/ or configs/paper/")


def dropout(*stages: str) -> dict[str, float]:
    """Section 4.3's residual dropout in some stages."""
    return {f"{stage}.dropout": 0.2 for stage in stages}


def word(changes: Mapping[str, Any]) -> Callable[[str], ConfigDict]:
    """The `get_config` of a word: a recipe with changes of keys.

    A change that is a function is applied to the recipe's value.
    """

    def get_changed(recipe: str = "quickstart") -> ConfigDict:
        config = get_config(recipe)
        for key, change in changes.items():
            section, name = key.split(".")
            old = config[section][name]
            config[section][name] = change(old) if callable(change) else change
        return config

    return get_changed


def figure(points: Mapping[str, Mapping[str, Any]]) -> Callable[[str], ConfigDict]:
    """The `get_config` of a figure: its points are words, the first one the default."""

    def get_figure(argument: str = "") -> ConfigDict:
        point, _, recipe = argument.partition(",")
        if point and point not in points:
            raise ValueError(f"no point {point!r}: use one of {', '.join(points)}")
        return word(points[point or next(iter(points))])(recipe or "quickstart")

    return get_figure
