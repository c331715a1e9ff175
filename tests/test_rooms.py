"""The rooms of the package: the map in the README lists them in import order, and no import goes against it."""

import ast
import pathlib
import re

import pytest

import voxcpm2_jax

pytestmark = pytest.mark.fast

PACKAGE = pathlib.Path(voxcpm2_jax.__file__).parent
MOST_LINES = 460
APART = ("models", "vae", "data")  # rooms that never import each other


def modules():
    """Every module of the package by its dotted name, without the package's own."""
    for path in sorted(PACKAGE.rglob("*.py")):
        name = ".".join(path.relative_to(PACKAGE).with_suffix("").parts)
        yield name.removesuffix(".__init__"), path


def imports(path):
    """Modules of the package that a file imports, at its top or inside a function."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[0] == "voxcpm2_jax":
            for alias in node.names:
                parts = [*node.module.split(".")[1:], alias.name]
                is_module = PACKAGE.joinpath(*parts).with_suffix(".py").exists() or PACKAGE.joinpath(*parts).is_dir()
                yield ".".join(parts if is_module else parts[:-1])


@pytest.fixture(scope="module")
def order():
    """The rooms in the order of the map."""
    readme = (PACKAGE.parent / "README.md").read_text(encoding="utf-8")
    table = readme[readme.index("## Map") :]
    cells = [line.split("|")[1] for line in table[: table.index("\n## ", 1)].splitlines() if line.startswith("| `")]
    rooms = [re.sub(r"/$|\.py$", "", room) for cell in cells for room in re.findall(r"`([^`]+)`", cell)]
    return [room for room in rooms if (PACKAGE / room).is_dir() or (PACKAGE / f"{room}.py").exists()]


def test_the_map_names_every_room(order):
    rooms = {name.split(".")[0] for name, _ in modules()} - {"__init__", "__main__"}
    assert sorted(order) == sorted(rooms)


def test_a_room_imports_only_rooms_above_it(order):
    wrong = []
    for name, path in modules():
        own = name.split(".")[0]
        if own in ("__init__", "__main__"):
            continue
        for room in {imported.split(".")[0] for imported in imports(path)} - {own, ""}:
            if order.index(room) > order.index(own) or {own, room} <= set(APART):
                wrong.append(f"{name} imports {room}")
    assert not wrong


def test_no_imports_form_a_circle():
    graph = {name: set(imports(path)) for name, path in modules()}
    done: set[str] = set()

    def visit(name, trail):
        assert name not in trail, " -> ".join([*trail, name])
        if name not in done:
            for imported in sorted(graph.get(name, ())):
                visit(imported, [*trail, name])
            done.add(name)

    for name in graph:
        visit(name, [])


def test_no_file_is_long():
    lengths = {name: len(path.read_text(encoding="utf-8").splitlines()) for name, path in modules()}
    assert {name: n for name, n in lengths.items() if n > MOST_LINES} == {}
