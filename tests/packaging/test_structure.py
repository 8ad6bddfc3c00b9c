"""The package's own picture of itself: arrows point one way, and nothing is too long to read."""

import ast
import inspect
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PACKAGE = ROOT / "python" / "keylock_diffusers"
NAME = "keylock_diffusers"
# From the ground up; a module may import what stands in its own line or below.
STOREYS = (
    ("checks", "files", "tensor_file", "pictures", "limits", "requests", "requests_schema", "masks", "ids", "places"),
    ("denoisers", "concepts", "loras"),
    ("processors",),
    ("routing",),
    ("encoding",),
    ("generation",),
    ("training", "testing"),
    ("embedded",),
    ("demo",),
    ("cli", "__init__"),
)
STOREY = {room: number for number, rooms in enumerate(STOREYS) for room in rooms}
# What users call with everything by name, and the signature that diffusers gives its processors.
WIDE = {"generate", "__call__"}


def modules():
    return {
        ".".join(path.relative_to(PACKAGE).with_suffix("").parts).removesuffix(".__init__"): path
        for path in sorted(PACKAGE.rglob("*.py"))
    }


MODULES = modules()


def imported(path):
    """The package's modules that a file imports, wherever in it and for whatever purpose."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[0] == NAME:
            inside = node.module.removeprefix(NAME).removeprefix(".")
            for name in node.names:
                whole = f"{inside}.{name.name}".removeprefix(".")
                found.add(whole if whole in MODULES else inside)
        elif isinstance(node, ast.Import):
            found |= {n.name.removeprefix(f"{NAME}.") for n in node.names if n.name.startswith(f"{NAME}.")}
    return {name for name in found if name in MODULES}


ARROWS = {name: imported(path) - {name} for name, path in MODULES.items()}


def test_every_room_has_its_storey():
    assert {name.split(".")[0] for name in MODULES} <= {*STOREY}


@pytest.mark.parametrize("name", [name for name in MODULES if name != "__init__" and name.split(".")[0] != "cli"])
def test_no_arrow_points_up(name):
    own = STOREY[name.split(".")[0]]
    up = sorted(other for other in ARROWS[name] if STOREY[other.split(".")[0]] > own)
    assert not up, f"{name} imports {', '.join(up)}, which stands above it"


def test_no_modules_import_each_other_in_a_circle():
    done, trail = set(), []

    def visit(name):
        if name in trail:
            pytest.fail(f"a circle: {' -> '.join([*trail[trail.index(name) :], name])}")
        if name in done:
            return
        trail.append(name)
        for other in sorted(ARROWS[name]):
            visit(other)
        trail.pop()
        done.add(name)

    for name in MODULES:
        if name != "__init__":
            visit(name)


def functions():
    for name, path in MODULES.items():
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                yield name, node


def test_no_function_is_longer_than_eighty_lines_without_its_docstring_and_signature():
    long = []
    for name, node in functions():
        body = node.body[1:] if ast.get_docstring(node) is not None else node.body
        lines = node.end_lineno - body[0].lineno + 1 if body else 0
        if lines > 80:
            long.append(f"{name}.{node.name}: {lines}")
    assert not long


def test_no_signature_is_wider_than_eight():
    wide = []
    for name, node in functions():
        given = node.args
        count = len([a for a in (*given.posonlyargs, *given.args, *given.kwonlyargs) if a.arg not in ("self", "cls")])
        if count > 8 and node.name not in WIDE and name.split(".")[0] != "cli":
            wide.append(f"{name}.{node.name}: {count}")
    assert not wide


def test_files_of_python_stay_readable():
    long = {name: text for name, path in MODULES.items() if (text := len(path.read_text().splitlines())) > 450}
    assert not long


def test_the_test_would_see_an_arrow_that_points_up(tmp_path):
    file = tmp_path / "low.py"
    file.write_text(
        inspect.cleandoc("""
        def late():
            from keylock_diffusers.generation import engine
    """)
    )
    assert imported(file) == {"generation.engine"}
