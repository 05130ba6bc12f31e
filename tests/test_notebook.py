"""colab/quickstart.ipynb: a notebook of calls only, without outputs, of names that exist."""

import ast
import builtins
import json
import re
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

REPOSITORY = Path(__file__).resolve().parents[1]
NOTEBOOK = REPOSITORY / "colab" / "quickstart.ipynb"
CELLS = json.loads(NOTEBOOK.read_text(encoding="utf-8"))["cells"]
CODE = {
    cell["id"]: "".join(cell["source"]).split("\n") for cell in CELLS if cell["cell_type"] == "code"
}
PYTHON = {
    name: "\n".join(line for line in lines if not line.startswith("!"))
    for name, lines in CODE.items()
}
SHELL = [line[1:] for lines in CODE.values() for line in lines if line.startswith("!")]


def test_the_notebook_is_valid_and_holds_no_outputs() -> None:
    notebook = json.loads(NOTEBOOK.read_text(encoding="utf-8"))
    assert set(notebook) == {"cells", "metadata", "nbformat", "nbformat_minor"}
    assert (notebook["nbformat"], notebook["nbformat_minor"]) == (4, 5)
    assert notebook["metadata"]["kernelspec"]["name"] == "python3"
    ids = [cell["id"] for cell in CELLS]
    assert len(set(ids)) == len(ids)
    for cell in CELLS:
        assert re.fullmatch(r"[a-zA-Z0-9_-]{1,64}", cell["id"])
        assert all(line.endswith("\n") for line in cell["source"][:-1])
        wanted = {"cell_type", "id", "metadata", "source"}
        if cell["cell_type"] == "code":
            wanted |= {"execution_count", "outputs"}
            assert cell["execution_count"] is None
            assert cell["outputs"] == []
        assert set(cell) == wanted


@pytest.mark.parametrize("name", PYTHON)
def test_a_cell_compiles_and_defines_nothing(name: str) -> None:
    tree = ast.parse(PYTHON[name])
    definitions = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef, ast.Lambda)
    assert not [node for node in ast.walk(tree) if isinstance(node, definitions)]
    assert all(len(line) <= 100 for line in CODE[name])


def test_every_name_is_given_by_a_cell_before() -> None:
    known = set(dir(builtins))
    for source in PYTHON.values():
        names = [node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Name)]
        known |= {node.id for node in names if isinstance(node.ctx, ast.Store)}
        for node in ast.walk(ast.parse(source)):
            if isinstance(node, (ast.Import, ast.ImportFrom)):
                known |= {alias.asname or alias.name.split(".")[0] for alias in node.names}
        assert {node.id for node in names} <= known


def test_the_commands_run_what_the_parameters_name() -> None:
    given: dict[str, Any] = {}
    exec(compile(PYTHON["parameters"], "parameters", "exec"), given)  # constants only
    for line in SHELL:
        assert set(re.findall(r"\$(\w+)", line)) <= set(given), line
    run = next(line for line in SHELL if "gsm_verifier.main" in line)
    assert run == 'python -m gsm_verifier.main --config="$CONFIG" --workdir="$RUN"'
    assert (REPOSITORY / given["CONFIG"]).is_file()
    assert (NOTEBOOK.parent / given["REPOSITORY"]).resolve() == REPOSITORY


def test_the_last_cell_colours_every_token(monkeypatch: pytest.MonkeyPatch) -> None:
    shown: list[str] = []
    verifier = SimpleNamespace(
        values=lambda question, solutions: [([1, 2, 3], np.array([-0.5, 0.5, 2.0], np.float32))],
        tokenizer=SimpleNamespace(pieces=lambda tokens: ["<<", "4", "\n"]),
    )
    display = SimpleNamespace(HTML=shown.append)
    monkeypatch.setitem(sys.modules, "IPython", SimpleNamespace(display=display))
    monkeypatch.setitem(sys.modules, "IPython.display", display)
    imports = "from html import escape\nfrom IPython.display import HTML\n"
    world = {"verifier": verifier, "problem": SimpleNamespace(question="?"), "best": None}
    exec(compile(imports + PYTHON["colour"], "colour", "exec"), world)
    (html,) = shown
    hues = re.findall(r"hsl\((\d+) 80% 75%\)\">([^<]*)<", html)
    assert hues == [("0", "&lt;&lt;"), ("60", "4"), ("120", "\n")]
