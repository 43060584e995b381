"""No room outside of `families/` and `config/model/` knows a family by its name."""

import ast
from pathlib import Path

from ctrsink.families.protocol import Family
from ctrsink.families.registry import FAMILIES, family_of

# The registry lists them; a family's own folder and section speak of themselves.
KNOWS = ("families/registry.py", "config/model/__init__.py")


def named_in(file: Path) -> set[str]:
    """Families that a module names: as a text of its own, or by importing from one's folder."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Constant) and node.value in FAMILIES:
            found.add(str(node.value))
        if isinstance(node, ast.ImportFrom | ast.Import):
            modules = [node.module or ""] if isinstance(node, ast.ImportFrom) else [alias.name for alias in node.names]
            found |= {name for name in FAMILIES for module in modules if f"families.{name}" in module}
    return found


def test_a_family_is_named_in_its_own_folder_alone(repository: Path) -> None:
    package = repository / "ctrsink"
    wrong = {}
    for file in package.rglob("*.py"):
        place = str(file.relative_to(package))
        own = {name for name in FAMILIES if place.startswith((f"families/{name}/", f"config/model/{name}."))}
        if place not in KNOWS and (other := named_in(file) - own):
            wrong[place] = other
    assert wrong == {}
    assert named_in(package / "families/decoder/family.py") == {"decoder"}  # so that the search is known to find something


def test_every_family_has_the_functions_of_the_protocol() -> None:
    for name in FAMILIES:
        assert isinstance(family_of(name), Family)  # which has no object that lacks one of them
        assert family_of(name).target_numbers
