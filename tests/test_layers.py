"""The rule of docs/architecture.md: imports point down only, and heavy libraries stay in their layers."""

import ast
from pathlib import Path

import pytest

SRC = Path(__file__).parents[1] / "src" / "consistency"

LAYERS = {
    "io": 0,
    "ops": 0,
    "noise": 1,
    "models": 2,
    "sampling": 3,
    "methods": 4,
    "data": 4,
    "evaluation": 4,
    "training": 5,
    "checkpoints": 5,
    "config": 6,
    "api": 6,
    "commands": 7,
    "report": 8,
    "sweeps": 8,
    "app": 8,
    "cli": 9,
}
# Library -> layers that may import it at all.
HEAVY = {"hydra": {6, 7, 8, 9}, "omegaconf": {6, 7, 8, 9}, "lightning": {4, 5, 7}}
# Never at module level: they cost seconds, or are optional.
LAZY_ONLY = {
    "optuna",
    "wandb",
    "torch_fidelity",
    "lpips",
    "diffusers",
    "sklearn",
    "matplotlib",
    "torchvision",
    "safetensors",
    "rich",
    "gradio",
}
FILES = sorted(path for path in SRC.rglob("*.py") if path != SRC / "__init__.py")


def room(module: str) -> str:
    return module.split(".")[1]


def imports(path: Path, module_level_only: bool = False) -> list[str]:
    tree = ast.parse(path.read_text())
    nodes = tree.body if module_level_only else list(ast.walk(tree))
    found = []
    for node in nodes:
        if isinstance(node, ast.Import):
            found += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            found.append(node.module or "")
    return found


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(SRC)))
def test_imports_point_down(path):
    own = room("consistency." + ".".join(path.relative_to(SRC).with_suffix("").parts))
    for module in imports(path):
        if not module.startswith("consistency."):
            continue
        other = room(module)
        assert other == own or LAYERS[other] < LAYERS[own], f"{own} (layer {LAYERS[own]}) imports {module}"


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(SRC)))
def test_heavy_libraries_stay_in_their_layers(path):
    own = room("consistency." + ".".join(path.relative_to(SRC).with_suffix("").parts))
    for module in imports(path):
        library = module.split(".")[0]
        assert LAYERS[own] in HEAVY.get(library, set(range(10))), f"{own} imports {library}"
    for module in imports(path, module_level_only=True):
        assert module.split(".")[0] not in LAZY_ONLY, f"{path.name} imports {module} at module level"


def test_every_room_has_a_layer():
    rooms = {path.relative_to(SRC).parts[0].removesuffix(".py") for path in FILES}
    assert rooms == set(LAYERS)
