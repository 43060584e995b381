"""FLOPs that a training step needs, from the model's shapes and the sequences' tokens; a multiply-add counts as two."""

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from ctrsink.families.decoder.groups import group_of
from ctrsink.families.protocol import Flops
from ctrsink.sequences.batch import Batch

if TYPE_CHECKING:
    from ctrsink.families.decoder.model import CTRModel


def flop_count(model: "CTRModel", sinks_only: bool) -> Callable[[Batch], Flops]:
    """What a model needs per token and per visible pair of tokens, with what is trained now.

    Matrices: 2 per weight and token forward, 2 backward to the activations, and 2 to the weight's own gradient where it is
    trained: 4 N_frozen + 6 N_trained. Attention: forward two products (QK^T, PV) of 2 d per head and pair, backward four. Where
    nothing but the head is trained there is no way back: 2 N, and the two products. Embeddings, sinks, biases, norms, the head,
    and whatever is computed twice (checkpointed activations, the kernels' second QK^T), take time and count as nothing.

    Args:
        sinks_only: as in `ctrsink.attention.rule_dense.visible`.
    """
    backbone: Any = model.backbone
    config = backbone.config.get_text_config()
    embedding = backbone.get_input_embeddings().weight
    # What targets are told is trained with the head, but lies below the backbone.
    returns = any(p.requires_grad and not name.startswith("head.") for name, p in model.named_parameters())
    per_token = 0
    for name, parameter in model.named_parameters():
        # Under ZeRO-3 the parameter itself is empty; its shape is kept beside it.
        shape = getattr(parameter, "ds_shape", parameter.shape)
        if len(shape) == 2 and parameter is not embedding and group_of(name) in ("backbone", "lora"):
            per_token += shape.numel() * (6 if parameter.requires_grad else 4 if returns else 2)
    width = config.num_attention_heads * (getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads)
    per_pair = (12 if returns else 4) * width * config.num_hidden_layers
    # By chunks a target never sees more than sinks.
    pairs = "pairs_through_sinks" if sinks_only and model.sparse is None else "pairs"
    return lambda batch: Flops(per_token * batch.tokens, per_pair * batch.costs[pairs])
