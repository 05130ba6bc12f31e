"""The configs of configs/paper: every point is valid, and differs from its recipe as it says."""

import re
import runpy
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from ml_collections import ConfigDict

from gsm_verifier import config as config_module
from gsm_verifier.config import leaves, validate
from gsm_verifier.data import documents
from gsm_verifier.model import config as model_config
from gsm_verifier.text.tokenizer import Tokenizer

REPOSITORY = Path(__file__).resolve().parents[1]
PAPER = REPOSITORY / "configs" / "paper"
LEAST = {"sample.completions", "sample.heldout_completions", "sample.test_completions"}
PRETRAIN = {"pretrain.epochs", "pretrain.dropout"}

# What a point of each figure may change.
VARIES = {
    "figure2": {"data.train_size", *LEAST},
    "figure3": {"finetune.epochs", "baseline.epochs"},
    "figure5": {"data.train_size"},
    "figure6a": {"verify.level"},
    "figure6b": {"verify.objective"},
    "figure6c": {"verify.run"},
    "figure7a": {"sample.test_completions"},
    "figure7b": {"rank.vote_k"},
    "figure8a": {*PRETRAIN, "finetune.dropout", "baseline.dropout"},
    "figure8b": {*PRETRAIN, "verify.dropout", "verify.level"},
    "figure8c": {*PRETRAIN, "verify.dropout", "verify.batch_tokens", "sample.completions"},
    "figure12": {"verify.init", "finetune.question_loss", "baseline.question_loss"},
}


@cache
def module(path: Path) -> dict[str, Any]:
    return runpy.run_path(str(path))


def recipe(name: str) -> ConfigDict:
    return module(PAPER / "common.py")["get_config"](name)


def point(figure: str, argument: str) -> ConfigDict:
    return module(PAPER / f"{figure}.py")["get_config"](argument)


def changes(config: ConfigDict, base: ConfigDict) -> dict[str, Any]:
    """What differs from the base, by dotted key."""
    given, known = leaves(config), leaves(base)
    assert given.keys() == known.keys()
    return {key: value for key, value in given.items() if value != known[key]}


POINTS = [(figure, name) for figure in VARIES for name in module(PAPER / f"{figure}.py")["POINTS"]]
RECIPES = ["quickstart", "quickstart-tiny", "small", "scale-6b"] + [
    f"gsm8k-{model}" for model in module(REPOSITORY / "configs" / "gsm8k.py")["MODELS"]
]


def test_every_figure_is_here() -> None:
    assert {path.stem for path in PAPER.glob("figure*.py")} == set(VARIES)


@pytest.mark.parametrize(("figure", "name"), POINTS)
def test_a_point_is_valid_and_changes_what_its_table_says_and_nothing_else(
    figure: str, name: str
) -> None:
    table = module(PAPER / f"{figure}.py")["POINTS"][name]
    assert set(table) <= VARIES[figure]
    for base in RECIPES:
        config = point(figure, f"{name},{base}")
        validate(config)
        before = leaves(recipe(base))
        wanted = {
            key: change(before[key]) if callable(change) else change
            for key, change in table.items()
        }
        differs = {key: value for key, value in wanted.items() if value != before[key]}
        assert changes(config, recipe(base)) == differs
    assert changes(point(figure, name), point(figure, f"{name},quickstart")) == {}


@pytest.mark.parametrize("figure", VARIES)
def test_the_points_of_a_figure_differ_and_together_vary_all_it_varies(figure: str) -> None:
    names = list(module(PAPER / f"{figure}.py")["POINTS"])
    configs = [point(figure, name) for name in names]
    assert len({str(leaves(config)) for config in configs}) == len(configs) > 1
    varied = {key for config in configs for key in changes(config, recipe("quickstart"))}
    assert varied == VARIES[figure]
    assert changes(module(PAPER / f"{figure}.py")["get_config"](), configs[0]) == {}


@pytest.mark.parametrize("figure", VARIES)
def test_the_header_gives_a_command_for_every_point(figure: str) -> None:
    text = (PAPER / f"{figure}.py").read_text()
    header = module(PAPER / f"{figure}.py")["__doc__"]
    given = re.findall(rf"--config=configs/paper/{figure}\.py:(?:<([^>]+)>|([\w.-]+))", header)
    named = [name for choice, word in given for name in (choice.split("|") if choice else [word])]
    assert set(named) == set(module(PAPER / f"{figure}.py")["POINTS"])
    assert "Varies " in header
    assert "The paper: " in header
    assert len(text.splitlines()) <= 40


def test_an_unknown_point_or_recipe_is_refused_by_name() -> None:
    with pytest.raises(ValueError, match="'sentence': use one of token, solution"):
        point("figure6a", "sentence")
    with pytest.raises(ValueError, match=r"'nothing-3': there is no nothing\.py"):
        point("figure6a", "token,nothing-3")


def test_a_figure_is_a_recipe_too() -> None:
    config = point("figure7b", "30,figure7a-3200")
    assert config.rank.vote_k == 30
    assert config.sample.test_completions == 3200


def test_figure_8_compares_the_same_pretraining_with_and_without_dropout() -> None:
    for figure in ("figure8a", "figure8b", "figure8c"):
        differs = changes(point(figure, "dropout"), point(figure, "control"))
        assert set(differs.values()) == {0.2}
        assert all(key.endswith(".dropout") for key in differs)
    config, base = point("figure8c", "none"), recipe("quickstart")
    assert config.verify.batch_tokens == 4 * base.verify.batch_tokens
    assert point("figure8c", "none,scale-6b").sample.completions == 300


def test_figure_6c_names_the_folders_its_commands_write() -> None:
    header = module(PAPER / "figure6c.py")["__doc__"]
    for name in ("by_small", "by_large"):
        assert f"--workdir={point('figure6c', name).verify.run}\n" in header


def test_the_small_model_shares_the_quickstarts_tokenizer() -> None:
    small, quickstart = recipe("small"), recipe("quickstart")
    packaged = REPOSITORY / "gsm_verifier" / "pretrained" / quickstart.model.pretrained
    assert (REPOSITORY / small.text.tokenizer).samefile(packaged / "tokenizer.json")
    assert not small.model.pretrained
    size = Tokenizer.load(REPOSITORY / small.text.tokenizer).size
    assert 0 < model_config.from_keys(small.model, size).parameters < 1_132_000 / 7
    assert {key.split(".")[0] for key in changes(small, quickstart)} == {
        "text",
        "model",
        "pretrain",
    }


# Words before a recipe


def test_dropout_is_in_every_stage_that_trains_after_additional_pretraining() -> None:
    stages = ("pretrain", "finetune", "baseline", "verify")
    wanted = {f"{stage}.dropout": 0.2 for stage in stages}
    for base in RECIPES:
        config = recipe(f"dropout-{base}")
        validate(config)
        epochs = {} if recipe(base).pretrain.epochs else {"pretrain.epochs": 1.0}
        assert changes(config, recipe(base)) == wanted | epochs


def test_a_real_model_asks_for_the_documents_of_its_pretraining(tmp_path: Path) -> None:
    source = recipe("dropout-gsm8k-gpt2").pretrain.documents
    with pytest.raises(ValueError, match=r"documents\.jsonl: no such file of documents"):
        documents.read(str(tmp_path / source))


def test_zeroshot_trains_nothing_after_pretraining() -> None:
    sizes = {"train_problems", "completions", "heldout_completions", "kept_share"}
    for base in RECIPES:
        config = recipe(f"zeroshot-{base}")
        validate(config)
        assert {config[stage].epochs for stage in ("finetune", "baseline", "verify")} == {0.0}
        keys = {key for key in changes(config, recipe(base)) if ".epochs" not in key}
        assert keys <= {f"sample.{size}" for size in sizes}


def test_words_stand_before_recipes_and_after_points() -> None:
    config = point("figure6a", "solution,dropout-gsm8k-gpt2")
    assert changes(config, recipe("gsm8k-gpt2")) == {
        "verify.level": "solution",
        **changes(recipe("dropout-gsm8k-gpt2"), recipe("gsm8k-gpt2")),
    }


# The paper's own sizes


@pytest.mark.parametrize(
    ("size", "billions", "alpha"),
    [("3b", 2.7, 1.6e-5), ("6b", 6.7, 1.2e-5), ("12b", 13.0, 1.0e-5), ("175b", 175.0, 6e-6)],
)
def test_a_scale_config_has_the_papers_size_and_rates(
    size: str, billions: float, alpha: float
) -> None:
    config = recipe(f"scale-{size}")
    validate(config)
    model = model_config.from_keys(config.model, config.text.vocab_size)
    # GPT-3's counts hold the tables, which are 5 % of the smallest.
    tables = model.width * (model.vocab_size + model.max_length)
    assert model.parameters + tables == pytest.approx(billions * 1e9, rel=0.05)
    assert model.positions == "learned"
    assert model.tied
    assert config.finetune.learning_rate == config.baseline.learning_rate
    assert config.finetune.learning_rate == pytest.approx(alpha / 10)
    assert config.verify.learning_rate == 1e-5
    assert (config.model.dtype, config.model.remat) == ("bfloat16", True)
    assert config.sample.max_tokens == 400
    for stage in ("pretrain", "finetune", "baseline", "verify"):
        options = config[stage]
        assert options.batch_tokens == 32_000
        assert options.dropout == 0
        assert options.row_tokens * options.microbatch_rows == pytest.approx(32_000, rel=0.05)


@pytest.mark.parametrize("size", ["3b", "6b", "12b", "175b"])
def test_a_scale_configs_mesh_divides_the_model_and_the_batch(size: str) -> None:
    config = recipe(f"scale-{size}")
    model = model_config.from_keys(config.model, config.text.vocab_size)
    fsdp, tensor = config.mesh.fsdp, config.mesh.tensor
    assert model.width % fsdp == 0
    for split in (model.heads, model.kv_heads, model.mlp_width, model.vocab_size):
        assert split % tensor == 0
    assert config.finetune.microbatch_rows % fsdp == 0
    # Parameters, moments and gradients in float32 leave room on a v5e (16 GB) or, 175B, v5p (95).
    room = 95e9 if size == "175b" else 16e9
    assert 16 * model.parameters / (fsdp * tensor) < 0.5 * room


def test_default_is_not_touched_by_the_figures() -> None:
    before = leaves(config_module.default())
    point("figure8c", "dropout,scale-175b")
    assert leaves(config_module.default()) == before
