"""Nonsense in a config is refused before any work, in one line that names the key."""

import ast
import math
import re
import runpy
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from ml_collections import ConfigDict

from gsm_verifier import config as config_module
from gsm_verifier.config import default, leaves, validate

REPOSITORY = Path(__file__).resolve().parents[1]
CONFIGS = sorted((REPOSITORY / "configs").rglob("*.py"))
KEYS = leaves(default())


def changed(**values: Any) -> ConfigDict:
    """The default config with values at dotted keys (`__` for the dot)."""
    config = default()
    for key, value in values.items():
        set_key(config, key.replace("__", "."), value)
    return config


def set_key(config: ConfigDict, key: str, value: Any) -> None:
    *sections, name = key.split(".")
    for section in sections:
        config = config[section]
    with config.unlocked(), config.ignore_type():
        config[name] = value


def refusal(config: ConfigDict) -> str:
    with pytest.raises(ValueError, match=r"^config\.") as error:
        validate(config)
    message = str(error.value)
    assert "\n" not in message
    return message


def test_the_default_is_valid_and_fresh() -> None:
    first, second = default(), default()
    validate(first)
    first.sample.temperature = 3.0
    assert second.sample.temperature == 0.7


def test_the_default_is_the_papers_protocol() -> None:
    """Table 1 and sections 4.1, 4.2 and appendix C, where they speak."""
    paper = {
        "sample.completions": 100,
        "sample.test_completions": 100,
        "sample.temperature": 0.7,
        "sample.max_tokens": 400,
        "sample.calculator": True,
        "finetune.epochs": 2.0,
        "baseline.epochs": 20.0,
        "verify.epochs": 1.0,
        "verify.learning_rate": 1e-5,
        "verify.batch_tokens": 32_000,
        "verify.adam_beta1": 0.9,
        "verify.adam_beta2": 0.95,
        "verify.level": "token",
        "verify.objective": "joint",
        "verify.init": "generator",
        "verify.loss": "mse",
        "finetune.question_loss": True,
        "verify.dropout": 0.0,
        "score.aggregate": "last",
    }
    assert {key: KEYS[key] for key in paper} == paper


def test_every_word_range_and_bound_is_about_a_key_that_exists() -> None:
    named = [*config_module.WORDS, *config_module.RANGES, *config_module.AT_LEAST_ONE]
    assert set(named) <= set(KEYS)
    for key, words in config_module.WORDS.items():
        assert KEYS[key] in words


@pytest.mark.parametrize("key", sorted(KEYS))
def test_every_key_refuses_what_it_cannot_be(key: str) -> None:
    example = KEYS[key]
    nonsense: list[Any] = ["nonsense", math.nan, [1], {}]
    if isinstance(example, bool):
        nonsense += [1, 0.0, None, "True"]
    elif isinstance(example, int):
        nonsense += [math.inf, -math.inf, 1.5, True, None, "1", -2]
    elif isinstance(example, float):
        nonsense += [math.inf, -math.inf, None, "1.0", -1.0]  # a ConfigDict makes True 1.0
    elif isinstance(example, str):
        nonsense += [3, 0.5, True, None]
        nonsense = nonsense if key in config_module.WORDS else nonsense[1:]
    for value in nonsense:
        config = default()
        set_key(config, key, ConfigDict({"a": 1}) if value == {} else value)
        message = refusal(config)
        assert f"config.{key}" in message, value
    validate(default())


@pytest.mark.parametrize(
    ("key", "value"),
    [(key, 0) for key in config_module.AT_LEAST_ONE]
    + [
        (key, value)
        for key, (low, high) in config_module.RANGES.items()
        for value in (low - 1, high + 1)
    ],
)
def test_numbers_out_of_range_are_refused_with_the_range(key: str, value: float) -> None:
    config = default()
    set_key(config, key, value)
    message = refusal(config)
    assert message.startswith(f"config.{key}={value}: use a number ")


@pytest.mark.parametrize("key", sorted(config_module.WORDS))
def test_the_words_of_a_key_are_listed(key: str) -> None:
    config = default()
    set_key(config, key, "nonsense")
    message = refusal(config)
    assert message == f"config.{key}='nonsense': use one of {', '.join(config_module.WORDS[key])}"


def test_unknown_and_missing_keys_are_refused() -> None:
    assert "config.sample.temprature doesn't exist" in refusal(changed(sample__temprature=1.0))
    assert "config.extra doesn't exist" in refusal(changed(extra=1))
    config = default()
    config.unlock()
    del config.sample.temperature
    assert "config.sample.temperature is missing" in refusal(config)
    config = default()
    config.unlock()
    del config.sample
    assert "config.sample." in refusal(config)


def test_keys_that_do_not_fit_together_are_refused() -> None:
    assert "kv_heads must divide" in refusal(changed(model__heads=6, model__kv_heads=4))
    assert "text.numbers" in refusal(changed(text__numbers=2000))
    validate(changed(text__numbers=1000))
    assert "verify.squash" in refusal(changed(verify__loss="bce"))
    validate(changed(verify__loss="bce", verify__squash="sigmoid"))


def test_whole_numbers_may_be_written_as_either_type() -> None:
    validate(changed(sample__temperature=1, pretrain__epochs=2, sample__prompts=4.0))


# The files of configs/


def load_config_file(path: Path, argument: str | None) -> ConfigDict:
    """As `--config=path:argument` does."""
    get_config = runpy.run_path(str(path))["get_config"]
    return get_config() if argument is None else get_config(argument)


def variants(path: Path) -> list[str | None]:
    """No argument, and those a docstring writes as `name.py:argument` or `name.py:<one|other>`."""
    text = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or ""
    found: list[str | None] = [None]
    for choice, word in re.findall(
        re.escape(path.name) + r":(?:<([^<>]*\|[^<>]*)>|([\w.-]+))", text
    ):
        found += choice.split("|") if choice else [word.rstrip(".")]
    return list(dict.fromkeys(found))


CASES = [(path, argument) for path in CONFIGS for argument in variants(path)]


@pytest.mark.parametrize(
    ("path", "argument"), CASES, ids=[f"{p.relative_to(REPOSITORY)}:{a}" for p, a in CASES]
)
def test_every_config_file_validates(path: Path, argument: str | None) -> None:
    validate(load_config_file(path, argument))


def test_the_quickstart_has_a_documented_tiny_variant_and_no_other() -> None:
    path = REPOSITORY / "configs" / "quickstart.py"
    assert "tiny" in variants(path)
    with pytest.raises(ValueError, match="huge"):
        load_config_file(path, "huge")


# The command line


def run_main(*flags: str, timeout: float = 60) -> SimpleNamespace:
    command = [sys.executable, "-m", "gsm_verifier.main", *flags]
    done = subprocess.run(command, capture_output=True, text=True, timeout=timeout, cwd=REPOSITORY)
    return SimpleNamespace(code=done.returncode, out=done.stdout, err=done.stderr)


@pytest.mark.parametrize(
    ("flags", "names"),
    [
        (["--config.sample.temperature=nan"], "config.sample.temperature=nan: use a number"),
        (["--config.sample.max_tokens=-3"], "config.sample.max_tokens=-3: use a number"),
        (["--config.verify.loss=hinge"], "config.verify.loss='hinge': use one of mse, bce"),
        (["--config.model.kv_heads=3"], "config.model.kv_heads must divide"),
        (["--stages=prepare,training"], "no stage 'training': use prepare, pretrain"),
        (["--stages=score"], "hasn't run: run it first"),
    ],
    ids=lambda x: x[0] if isinstance(x, list) else "",
)
def test_the_command_line_refuses_in_one_line_before_any_work(
    flags: list[str], names: str, tmp_path: Path
) -> None:
    folder = tmp_path / "run"
    done = run_main("--config=configs/quickstart.py:tiny", f"--workdir={folder}", *flags)
    assert done.code == 1
    assert names in done.err
    assert len(done.err.strip().splitlines()) == 1, done.err
    assert done.err.startswith("gsm_verifier: ")
    assert not folder.exists()


@pytest.mark.parametrize(
    ("flags", "names"),
    [
        (["--config=configs/quickstart.py:tiny", "--config.sample.temprature=1.0"], "temprature"),
        (["--config=configs/quickstart.py:tiny", "--config.smaple.slots=1"], "no key smaple. Did"),
        (["--config=configs/quickstart.py:tiny", "--config.sample.max_tokens=x"], "max_tokens"),
        (["--config=configs/quickstart.py:tiny", "--config.sample.slots=1.5"], "slots"),
        (["--config=configs/quickstart.py:tiny", "--verbose_please"], "verbose_please"),
        (["--config=configs/quickstart.py:tiny", "surplus"], "unknown argument surplus"),
        (["--config=configs/quickstart.py:enormous"], "enormous"),
        (["--config=configs/no_such_file.py"], "no_such_file.py"),
        ([], "--config=configs/quickstart.py --workdir=runs/quickstart"),
    ],
    ids=lambda x: x[-1] if isinstance(x, list) and x else "",
)
def test_misspelt_flags_are_refused_by_name(flags: list[str], names: str, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    done = run_main(f"--workdir={folder}", *flags)
    assert done.code != 0
    assert names in done.err + done.out
    assert not folder.exists()


def test_a_missing_workdir_is_named() -> None:
    done = run_main("--config=configs/quickstart.py:tiny")
    assert done.code != 0
    assert "--workdir" in done.err + done.out


def test_help_lists_the_stages() -> None:
    done = run_main("--help")
    assert "prepare, pretrain, finetune" in " ".join((done.out + done.err).split())
