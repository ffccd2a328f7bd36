"""Print the lowest version that pyproject.toml allows of each dependency, as constraints: what `make test-oldest` gets.

Dependencies without a lower bound are left to the installer: torchvision follows torch, and tools are the newest.
"""

import re
from pathlib import Path

try:
    import tomllib
except ModuleNotFoundError:  # Python 3.10
    from pip._vendor import tomli as tomllib


def lowest_versions(requirements: list[str]) -> dict[str, str]:
    """Name -> version of those that have a lower bound; the same bound must stand wherever a name is repeated."""
    found: dict[str, str] = {}
    for requirement in requirements:
        if match := re.match(r"([\w.-]+)(?:\[[^]]*\])?>=([\d.]+)", requirement):
            name, version = match.groups()
            if found.setdefault(name, version) != version:
                raise ValueError(f"{name} has two lower bounds, {found[name]} and {version}")
    return found


if __name__ == "__main__":
    project = tomllib.loads((Path(__file__).parents[1] / "pyproject.toml").read_text())["project"]
    requirements = sum(project["optional-dependencies"].values(), project["dependencies"])
    for name, version in sorted(lowest_versions(requirements).items()):
        print(f"{name}=={version}")
