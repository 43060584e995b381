"""After `import ctrsink`, transformers' auto classes know what `ctrsink export` wrote; nothing is imported before they are."""

import importlib
import sys
from collections.abc import Sequence
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder
from types import ModuleType
from typing import Any

AUTO = "transformers.models.auto.modeling_auto"
OURS = "ctrsink.families.hf"


def announce() -> None:
    """Have OURS imported right after AUTO: now where that is imported already, or else when it will be.

    Transformers has no entry points, and registering a class needs the class, which takes torch, and seconds, to import.
    """
    if AUTO in sys.modules:
        importlib.import_module(OURS)
    else:
        sys.meta_path.insert(0, _Afterwards())


class _Afterwards(MetaPathFinder):
    def find_spec(self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None) -> ModuleSpec | None:
        if fullname != AUTO:
            return None
        found = PathFinder.find_spec(fullname, path, target)
        if found is not None and found.loader is not None:
            loader: Any = found.loader
            execute = loader.exec_module

            def execute_both(module: ModuleType) -> None:
                if self in sys.meta_path:
                    sys.meta_path.remove(self)
                execute(module)
                importlib.import_module(OURS)

            loader.exec_module = execute_both
        return found
