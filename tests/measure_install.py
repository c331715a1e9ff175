"""How large an installation is: the packages of each extra of setup.py and the size of their files.

    python tests/measure_install.py          in an environment with the extras installed

Follows the requirements of the installed packages. An extra counts what it adds to the base. "missing" names packages that
are not installed and so not counted. One JSON object per line.
"""

import importlib.metadata
import json
import pathlib
import runpy
from collections.abc import Collection, Sequence
from unittest import mock

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

INSTALLED = {canonicalize_name(d.metadata["Name"]): d for d in importlib.metadata.distributions()}


def closure(requirements: Sequence[str]) -> tuple[set[str], set[str]]:
    """Everything that the requirements need -> (installed, missing) names."""
    installed, missing, seen = set(), set(), set()
    waiting = [Requirement(text) for text in requirements]
    while waiting:
        requirement = waiting.pop()
        name = canonicalize_name(requirement.name)
        if (name, *sorted(requirement.extras)) in seen:
            continue
        seen.add((name, *sorted(requirement.extras)))
        if name not in INSTALLED:
            missing.add(name)
            continue
        installed.add(name)
        for needed in map(Requirement, INSTALLED[name].requires or ()):
            extras = ["", *requirement.extras]
            if needed.marker is None or any(needed.marker.evaluate({"extra": extra}) for extra in extras):
                waiting.append(needed)
    return installed, missing


def size(name: str) -> int:
    paths = (file.locate() for file in INSTALLED[name].files or ())
    return sum(path.stat().st_size for path in paths if path.is_file())


def main() -> None:
    with mock.patch("setuptools.setup"):
        setup = runpy.run_path(str(pathlib.Path(__file__).parents[1] / "setup.py"))
    required, extras = setup["REQUIRED"], setup["EXTRAS"]
    base, _ = closure(required)
    _report("jax, flax, optax, orbax", required[:4])
    _report("base", required)
    for name, requirements in (extras | {"demo,eval": extras["demo"] + extras["eval"]}).items():
        _report(name, requirements, without=base)


def _report(what: str, requirements: Sequence[str], without: Collection[str] = ()) -> None:
    installed, missing = closure(requirements)
    installed -= set(without)
    total = sum(map(size, installed))
    print(json.dumps({"what": what, "packages": len(installed), "mb": round(total / 1e6), "missing": sorted(missing)}))


if __name__ == "__main__":
    main()
