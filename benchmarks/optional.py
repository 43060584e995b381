"""The libraries that ours is compared with: loaded only where they are installed and wanted."""

import importlib
import importlib.util
import sys
import types
from typing import Any

INSTALL = {
    "mosaicml-streaming": "pip install --no-deps mosaicml-streaming==0.13.0",
    "datasets": "pip install -e '.[bench]'",
}
_MODULES = {"mosaicml-streaming": "streaming", "datasets": "datasets"}


def installed(package: str) -> bool:
    """Whether the package, one of INSTALL, can be imported here."""
    return importlib.util.find_spec(_MODULES[package]) is not None


def mosaic() -> Any:
    """The module `streaming`.

    Its folders of ready-made data sets ask for torchvision and for an older transformers than ours. Nothing here uses them,
    so empty modules stand in their place.
    """
    for name in ("multimodal", "text", "vision"):
        sys.modules.setdefault(f"streaming.{name}", types.ModuleType(f"streaming.{name}"))
    return importlib.import_module("streaming")


def huggingface() -> Any:
    """The module `datasets`."""
    return importlib.import_module("datasets")
