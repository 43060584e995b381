"""ctrsink: fine-tune decoder language models for click-through-rate prediction with sink tokens (arXiv 2508.03668)."""

__version__ = "0.1.0"

from ctrsink import auto_classes as _auto_classes

_auto_classes.announce()
