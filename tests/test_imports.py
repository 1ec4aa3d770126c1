"""The sources against the one table of imports, in docs/architecture.md."""

from __future__ import annotations

import ast
import re
from pathlib import Path

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "vmmblk"
EXTENSIONS = {"_core", "_vfu"}


def table() -> dict[str, set[str]]:
    """Module -> what it may import, in the order of the document."""
    text = (ROOT / "docs" / "architecture.md").read_text()
    rows = re.findall(r"^\| (\S+) \| ([^|]+) \| [^|]+ \|$", text.replace("\\", ""), re.MULTILINE)
    return {module: set(imports.split(", ")) - {"-"} for module, imports in rows if module != "module"}


def sources() -> dict[str, set[str]]:
    """Module or package -> what of vmmblk its sources import, itself left out."""
    found: dict[str, set[str]] = {}
    for path in PACKAGE.rglob("*.py"):
        relative = path.relative_to(PACKAGE)
        module = relative.parts[0].removesuffix(".py")
        found.setdefault(module, set()).update(imported(ast.parse(path.read_text()), path) - {module})
    return {module: imports for module, imports in found.items() if module != "__pycache__"}


def imported(tree: ast.AST, path: Path) -> set[str]:
    """The modules directly under vmmblk that a source names in import statements, wherever they stand."""
    names: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path} uses a relative import"
            assert node.module is not None
            names.update(f"{node.module}.{alias.name}" for alias in node.names)
    return {name.split(".")[1] for name in names if name.startswith("vmmblk.")}


def test_each_module_imports_what_the_table_says() -> None:
    """No more, or the order is broken; and no less, or the table is out of date."""
    assert sources() == table()


def test_the_table_is_in_order() -> None:
    """Every module imports only what stands above it."""
    above = set(EXTENSIONS)
    for module, imports in table().items():
        assert imports <= above, f"{module} imports {imports - above} from below"
        above.add(module)


def test_the_extensions_have_no_other_importers() -> None:
    """The native core and libvfio-user are reached through their typed faces only."""
    importers = {
        extension: {
            path.relative_to(PACKAGE).parts[0].removesuffix(".py")
            for path in PACKAGE.rglob("*.py")
            if extension in imported(ast.parse(path.read_text()), path)
        }
        for extension in EXTENSIONS
    }
    assert importers == {"_core": {"memory", "ring", "engine", "client"}, "_vfu": {"vfio_user"}}
