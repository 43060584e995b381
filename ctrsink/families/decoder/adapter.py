"""A decoder's LoRA in PEFT's own files, for the pretrained model that it was trained on."""

from pathlib import Path
from typing import Any

from huggingface_hub import snapshot_download
from huggingface_hub.errors import LocalEntryNotFoundError
from peft.tuners.lora import LoraLayer

from ctrsink.config.model import DecoderSpec
from ctrsink.errors import InputError
from ctrsink.families.decoder.build import lora_config
from ctrsink.families.decoder.export import portable_section, require_known
from ctrsink.families.decoder.model import CTRModel
from ctrsink.families.protocol import Adapter, CTRModule

_BACKBONE = "backbone."


def adapter(module: CTRModule, model: DecoderSpec) -> Adapter:
    """See Family.adapter.

    Raises:
        InputError: there is no LoRA, or the backbone began with random weights.
    """
    assert isinstance(module, CTRModel)
    source = model.backbone
    if model.lora is None:
        raise InputError("the run has no LoRA (model.lora is null), so it has no adapter: leave out --form adapter")
    if source.path is None:
        raise InputError(
            "the run's backbone began with random weights, which lie nowhere, so an adapter would have no base: "
            "leave out --form adapter"
        )
    base, weights, own = {}, {}, {}
    for name, value in module.state_dict().items():
        inner = name.removeprefix(_BACKBONE)
        if inner == name:
            own[name] = value
        elif ".lora_" in name:
            # As PEFT's get_peft_model_state_dict has it: below a PeftModel, and without the adapter's own name.
            weights[f"base_model.model.{inner.replace('.default', '')}"] = value
        else:
            base[name] = value
    config: Any = module.backbone.config
    require_known(config)
    revision = source.revision or getattr(config, "_commit_hash", None)
    adapted = (name.split(".")[-1] for name, layer in module.named_modules() if isinstance(layer, LoraLayer))
    targets = list(model.lora.targets or dict.fromkeys(adapted))
    peft = lora_config(model.lora, targets)
    peft.task_type, peft.inference_mode = "FEATURE_EXTRACTION", True  # a backbone without its vocabulary, AutoModel
    peft.base_model_name_or_path, peft.revision = source.path, revision
    plain = peft.to_dict()
    plain["target_modules"] = sorted(targets)  # a set, which JSON has not
    section = portable_section(model) | {"backbone": {"path": source.path, "revision": revision}}
    section["lora"] = model.lora.model_dump(mode="json") | {"targets": targets, "dropout": 0.0}
    where = source.path if revision is None else f"{source.path} at {revision}"
    return Adapter(base, weights, own, plain, section, where)


def on_base(model: DecoderSpec, path: str | None) -> DecoderSpec:
    """See Family.on_base: nothing is downloaded, so that a score does not depend on who answers.

    Raises:
        InputError: it is neither a folder nor in the cache of the Hugging Face hub.
    """
    source = model.backbone
    assert source.path is not None  # by `adapter`
    found = path or source.path
    if not Path(found).is_dir():
        revision = None if path else source.revision
        try:
            found = snapshot_download(found, revision=revision, local_files_only=True)
        except (LocalEntryNotFoundError, ValueError):
            named = f"hf download {found}" + (f" --revision {revision}" if revision else "")
            raise InputError(
                f"the adapter's base {found} is neither a folder nor in the Hugging Face cache: "
                f"get it with `{named}`, or say where it is with --base"
            ) from None
    return model.model_copy(update={"backbone": source.model_copy(update={"path": found, "revision": None})})
