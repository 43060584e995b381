"""What `serving_load` compares with: a FastAPI route that runs a transformers forward for each candidate, one request at a time.

`python -m benchmarks.serving_plain MODEL --port N`; the text of history and candidate is that of the exported model, its backbone
has random weights, and nothing is batched, cached or bounded.
"""

import argparse
from typing import Any

import torch
import uvicorn
from fastapi import FastAPI
from transformers import AutoConfig, AutoModel

from ctrsink.attention.kinds import SINK
from ctrsink.serve import Scorer


def app_of(folder: str) -> FastAPI:
    """The application."""
    scorer = Scorer.load(folder)
    model: Any = scorer.model.ctr
    plain = model.backbone.config.to_dict()
    config = AutoConfig.for_model(**{name: value for name, value in plain.items() if not name.startswith("_attn")})
    backbone = AutoModel.from_config(config, attn_implementation="sdpa").eval()
    app = FastAPI()

    @app.post("/v1/score")
    def score(request: dict[str, Any]) -> dict[str, list[float]]:
        found = []
        for candidate in request["candidates"]:
            parsed = scorer.parse(request | {"candidates": [candidate]}, "request")
            columns = scorer.encode(parsed, "request").sequences.columns
            ids = torch.from_numpy(columns["input_ids"][columns["kinds"] != SINK])[None]
            with torch.inference_mode():
                found.append(float(backbone(input_ids=ids, use_cache=False).last_hidden_state[0, -1, 0].sigmoid()))
        return {"probabilities": found}

    return app


if __name__ == "__main__":
    parser = argparse.ArgumentParser("python -m benchmarks.serving_plain", description=__doc__)
    parser.add_argument("model", metavar="MODEL")
    parser.add_argument("--port", type=int, required=True)
    args = parser.parse_args()
    uvicorn.run(app_of(args.model), host="127.0.0.1", port=args.port, log_level="warning")
