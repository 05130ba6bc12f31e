"""The whole house: who imports whom, what nobody may import, and that what is public is told."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

PACKAGE = Path(__file__).resolve().parents[1] / "gsm_verifier"
FILES = sorted(PACKAGE.rglob("*.py"))

# From the ground up. A room imports itself and rooms on lower floors.
FLOORS: list[set[str]] = [
    {"storage"},
    {"records", "text", "config", "statistics", "metrics", "provenance", "processes"},
    {"data", "sharding", "rank"},
    {"checkpoint"},
    {"model"},
    {"train", "sample", "report", "hlo"},
    {"score"},  # values are computed on training's Batch
    {"stages"},
    {"pipeline", "plan"},
    {"main", "api", "export", "compare"},
]
FLOOR = {room: floor for floor, rooms in enumerate(FLOORS) for room in rooms}
STRANGERS = {("score", "sample"), ("score", "report")}  # though on different floors

WITHOUT_JAX = {
    "storage",
    "text",
    "data",
    "rank",
    "statistics",
    "records",
    "report",
    "config",
    "metrics",
}
JAX = {"jax", "jaxlib", "flax", "optax", "orbax", "chex"}
FRAMEWORKS = {"tensorflow", "torch", "tf_keras", "keras", "tensorflow_text"}
CODE_FROM_DATA = {"pickle", "cPickle", "dill", "cloudpickle", "marshal", "shelve", "joblib"}


def module_of(path: Path) -> str:
    parts = path.relative_to(PACKAGE.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def room_of(module: str) -> str:
    """The file or folder of the package a module belongs to; "" for the package itself."""
    return [*module.split("."), ""][1]


def parse(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"), str(path))


def imported(path: Path) -> Iterator[str]:
    """Every module a file imports, also within functions; `from a import b` gives a and a.b."""
    package = module_of(path).split(".")[: -1 if path.name != "__init__.py" else None]
    for node in ast.walk(parse(path)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            name = ".".join([*base, *([node.module] if node.module else [])])
            yield name
            yield from (f"{name}.{alias.name}" for alias in node.names)


MODULES = {module_of(path): path for path in FILES}


def rooms_imported(path: Path) -> set[str]:
    return {room_of(name) for name in imported(path) if name.split(".")[0] == "gsm_verifier"} - {""}


def test_the_test_sees_the_package() -> None:
    assert {"gsm_verifier.records", "gsm_verifier.text.tokenizer"} <= set(MODULES)
    assert "gsm_verifier.model.config" in set(imported(PACKAGE / "model" / "transformer.py"))
    assert "jax.numpy" in set(imported(PACKAGE / "model" / "transformer.py"))


@pytest.mark.parametrize("module", MODULES)
def test_imports_go_strictly_downward(module: str) -> None:
    room = room_of(module)
    if not room:
        assert not rooms_imported(MODULES[module])
        return
    assert room in FLOOR, f"{module}: which floor is it on?"
    for other in rooms_imported(MODULES[module]) - {room}:
        assert other in FLOOR, f"{module} imports {other}: which floor is it on?"
        assert FLOOR[other] < FLOOR[room], f"{module} imports {other}, which isn't below it"
        assert (room, other) not in STRANGERS, f"{module} imports {other}"


@pytest.mark.parametrize("module", MODULES)
def test_nothing_imports_what_it_must_not(module: str) -> None:
    names = {name.split(".")[0] for name in imported(MODULES[module])}
    assert not names & FRAMEWORKS
    assert not names & CODE_FROM_DATA
    if room_of(module) in WITHOUT_JAX:
        assert not names & JAX


@pytest.mark.parametrize("module", MODULES)
def test_no_text_is_run_as_code(module: str) -> None:
    for node in ast.walk(parse(MODULES[module])):
        if isinstance(node, ast.Name):
            assert node.id not in {"eval", "exec", "__import__"}, f"{module}:{node.lineno}"
        if isinstance(node, ast.keyword) and node.arg in {"shell", "allow_pickle"}:
            assert isinstance(node.value, ast.Constant), f"{module}:{node.value.lineno}"
            assert node.value.value is False, f"{module}:{node.value.lineno}"


@pytest.mark.parametrize("module", MODULES)
def test_what_is_public_has_a_docstring(module: str) -> None:
    """Modules, and functions and classes of a module's top level, overloads left out."""
    tree = parse(MODULES[module])
    assert ast.get_docstring(tree) or not tree.body, f"{module} has no docstring"
    untold = [
        node.name
        for node in tree.body
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef))
        and not node.name.startswith("_")
        and not ast.get_docstring(node)
    ]
    assert not untold, f"{module}: {', '.join(untold)} without a docstring"


def test_main_is_short() -> None:
    assert len((PACKAGE / "main.py").read_text().splitlines()) <= 90


IMPORT_ALL = """
import importlib, sys

def refuse(event, arguments):
    if event in ("socket.connect", "socket.getaddrinfo", "socket.gethostbyname", "urllib.Request"):
        raise SystemExit(f"network at import: {event} {arguments}")

sys.addaudithook(refuse)
for module in sys.argv[1:]:
    importlib.import_module(module)
print(" ".join(sorted(name for name in sys.modules if "." not in name)))
"""


def loaded_by(modules: list[str]) -> set[str]:
    """The top-level modules a fresh interpreter holds after importing some."""
    command = [sys.executable, "-c", IMPORT_ALL, *modules]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return set(done.stdout.split())


def test_importing_everything_uses_no_network_and_no_other_framework() -> None:
    modules = [name for name in MODULES if name != "gsm_verifier.main"]  # which defines flags
    loaded = loaded_by([*modules, "gsm_verifier.main"])
    assert "jax" in loaded
    assert not loaded & FRAMEWORKS


def test_the_rooms_without_jax_load_without_it() -> None:
    """All but `packing`, since grain imports JAX itself."""
    modules = [name for name in MODULES if room_of(name) in WITHOUT_JAX]
    modules.remove("gsm_verifier.data.packing")
    assert len(modules) > len(WITHOUT_JAX)
    assert not loaded_by(modules) & JAX
