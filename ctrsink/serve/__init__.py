"""Scoring with an exported model; importing this makes the model known to transformers' auto classes."""

from ctrsink.serve.lines import score_file
from ctrsink.serve.requests import request_of
from ctrsink.serve.scorer import Scorer

__all__ = ["Scorer", "request_of", "score_file"]
