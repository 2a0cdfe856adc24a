"""The rooms of engine/ in the order of the data: a file imports from its own room and from those before it, and no
file imports itself by way of others. Imports within functions and under TYPE_CHECKING count: they are knowledge too."""

import ast
from pathlib import Path

ROOT = Path(__file__).parents[2]
ROOMS = (
    "kernels",
    "common",
    "data",
    "models",
    "slices",
    "scoring",
    "methods",
    "training",
    "export",
    "evaluation",
    "run",
)
ROOMS += ("analyses", "")
"""The last are the doors: the files of engine/ itself."""
FILES = {
    "slicetune." + ".".join(f.relative_to(ROOT).with_suffix("").parts): f
    for d in ("engine", "kernels")
    for f in (ROOT / d).rglob("*.py")
}
FILES = {name.removesuffix(".__init__"): file for name, file in FILES.items()}


def imports(name: str) -> set[str]:
    """Modules of ours that a module names, wherever in it."""
    file, found = FILES[name], set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.ImportFrom):
            parts = (
                name.split(".")[: len(name.split(".")) - node.level + (file.name == "__init__.py")]
                if node.level
                else []
            )
            base = ".".join([*parts, *([node.module] if node.module else [])])
            found |= {f"{base}.{a.name}" if f"{base}.{a.name}" in FILES else base for a in node.names}
    return {module for module in found if module in FILES} - {name}


def room(name: str) -> int:
    parts = name.split(".")[1:]
    return ROOMS.index(parts[0] if parts[0] == "kernels" else parts[1] if len(parts) > 1 and parts[1] in ROOMS else "")


def test_imports_go_down():
    up = [f"{name} → {other}" for name in FILES for other in imports(name) if room(other) > room(name)]
    assert not up, "\n".join(up)


def test_no_circle():
    left = {name: imports(name) for name in FILES}
    while free := [name for name, wants in left.items() if not wants & left.keys()]:
        for name in free:
            del left[name]
    assert not left, sorted(left)


def test_a_room_is_small():
    """A dozen files at most, so that one look tells what is there; the embedded corpus apart."""
    folders = {file.parent for file in FILES.values()} - {ROOT / "engine/data/tiny"}
    sizes = {folder: len([file for file in folder.glob("*.py") if file.stem != "__init__"]) for folder in folders}
    assert not {folder: size for folder, size in sizes.items() if size > 12}
