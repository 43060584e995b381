"""The CTR model: what is built from a seed, groups of parameters, readouts, precision, and what cannot carry sinks."""

import dataclasses
import math
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ctrsink.attention.kinds import PAD, SINK
from ctrsink.attention.packed import Packed
from ctrsink.config.model import BackboneSpec, BiasSpec, DecoderSpec, LoraSpec
from ctrsink.config.stages import Group, Objective, ReadoutSpec
from ctrsink.errors import InputError
from ctrsink.families.decoder.build import build_model
from ctrsink.families.decoder.embeddings import CategoryEmbedding, Table
from ctrsink.families.decoder.groups import group_of, trained_as
from ctrsink.families.decoder.model import CTRModel, decoder_layers
from ctrsink.families.decoder.readout import read
from ctrsink.families.parameters import load_parameters, set_trainable
from ctrsink.sequences.batch import Batch
from tests.builders import VOCABULARY, layout_of, random_batch, tiny_model, tiny_spec
from tests.padded import in_rows, of_targets, padded, states_of

ALL = Objective()
READOUTS = [ReadoutSpec(over=over, form=form) for over in ("sinks", "all") for form in ("attend", "pool")]
close = torch.testing.assert_close


def parameters(model: CTRModel) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def test_every_weight_comes_from_the_seed() -> None:
    """All ranks and all restarts build the same model, whatever random numbers were drawn before."""
    spec = tiny_spec(lora=LoraSpec(rank=2))
    torch.manual_seed(1)
    state = torch.get_rng_state()
    first = parameters(tiny_model(spec, seed=5))
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(2)
    again, other = parameters(tiny_model(spec, seed=5)), parameters(tiny_model(spec, seed=6))
    assert all(torch.equal(first[name], again[name]) for name in first)
    drawn = [n for n, v in first.items() if v.unique().numel() > 1]
    assert len(drawn) > 10
    assert not any(torch.equal(first[name], other[name]) for name in drawn)


@pytest.mark.parametrize("readout", READOUTS, ids=str)
def test_the_loss_is_the_sum_over_valid_targets(readout: ReadoutSpec) -> None:
    model, batch = tiny_model(tiny_spec()), random_batch(1, layout_of(), (6, 1, 3))
    with torch.no_grad():
        loss, logits, tallies = model(batch, Objective(readout=readout))
    assert logits.shape == batch.targets.labels.shape
    assert tallies is None
    losses = []
    for logit, label in zip(logits.tolist(), batch.targets.labels.tolist(), strict=True):
        probability = 1 / (1 + math.exp(-logit))
        losses.append(-math.log(probability if label else 1 - probability))
    assert float(loss) == pytest.approx(sum(losses), rel=1e-5)
    # A sequence that only fills the batch costs nothing.
    counted = batch.targets.users != 0
    filled = dataclasses.replace(batch, targets=dataclasses.replace(batch.targets, counted=counted))
    with torch.no_grad():
        loss, others, _ = model(filled, Objective(readout=readout))
    assert torch.equal(others, logits)
    assert float(loss) == pytest.approx(sum(one for one, valid in zip(losses, counted, strict=True) if valid), rel=1e-5)


@pytest.mark.parametrize("readout", READOUTS, ids=str)
@pytest.mark.parametrize("examples", ["per_user", "per_target"])
def test_readouts_equal_a_plain_loop(examples: str, readout: ReadoutSpec) -> None:
    batch = random_batch(2, layout_of(examples), (7, 1, 4))
    states, of = torch.randn(batch.tokens, 5), padded(batch)
    hidden, found = in_rows(batch, states), of_targets(batch, readout_of(states, batch, readout))
    for b, t in torch.nonzero(of.readout_valid).tolist():
        end = int(of.readout_positions[b, t])
        if readout.form == "attend":
            members = [end]
        elif readout.over == "sinks":
            members = [p for p in range(end) if of.kinds[b, p] == SINK] + [end]
        else:
            members = list(range(end + 1))
        close(found[b, t], torch.stack([hidden[b, p] for p in members]).mean(0), atol=1e-5, rtol=1e-5)


def readout_of(hidden: torch.Tensor, batch: Batch, readout: ReadoutSpec) -> torch.Tensor:
    return read(hidden, Packed.of(batch), batch.inputs["readout_positions"], batch.axes["targets"], readout)


def test_pooling_in_bfloat16_keeps_long_means() -> None:
    """Sums of hundreds of states: counted in bfloat16 they would stop growing at 256."""
    batch = random_batch(2, layout_of(history=200, targets=1), (190,))
    assert batch.tokens > 600
    hidden = torch.ones(batch.tokens, 3, dtype=torch.bfloat16) * 1.5
    found = readout_of(hidden, batch, ReadoutSpec(form="pool"))
    close(found.float(), torch.full_like(found, 1.5, dtype=torch.float32), atol=1e-3, rtol=0)


def test_sink_vectors_are_the_projected_sum_of_the_signals() -> None:
    module = CategoryEmbedding([Table(6, ids=False)] * 2, width=4, hidden_size=7, scale=0.02, id_dropout=0.0)
    signals = torch.tensor([[[0, 5], [3, 3]]])
    first, second = (module.get_parameter(f"tables.{i}.weight") for i in (0, 1))
    expected = torch.stack([module.projection(first[0] + second[5]), module.projection(first[3] + second[3])])[None]
    close(module(signals), expected)


def test_ids_are_hidden_at_random_in_training_alone() -> None:
    """One that is hidden is as unknown as that of somebody new: row 0. What is no id is never hidden."""
    module = CategoryEmbedding([Table(50, ids=True), Table(6, ids=False)], 4, 7, scale=0.02, id_dropout=0.3)
    assert {group_of(f"sinks.categories.{name}") for name, _ in module.named_parameters()} == {"ids", "sink"}
    signals = torch.stack([torch.randint(1, 50, (4000,)), torch.randint(0, 6, (4000,))], -1)
    known = module.eval()(signals)
    unknown = module(signals * torch.tensor([0, 1]))
    torch.manual_seed(0)
    trained = module.train()(signals)
    hidden = (trained - unknown).abs().amax(-1) < 1e-7
    close(trained[~hidden], known[~hidden])
    assert 0.25 < float(hidden.float().mean()) < 0.35


def test_sinks_replace_the_embedding_at_their_positions_only() -> None:
    model, batch = tiny_model(tiny_spec()), random_batch(3, layout_of(), (5, 2))
    of = padded(batch)
    vectors, tokens = in_rows(batch, model.embed(batch)), model.backbone.get_input_embeddings()(of.input_ids)  # pyright: ignore[reportCallIssue]
    other = (of.kinds != SINK) & (of.kinds != PAD)
    assert torch.equal(vectors[other], tokens[other])
    assert model.sinks is not None
    sinks = model.sinks(of.signals, of.sink_numbers)
    for b, k in torch.nonzero(of.sink_valid).tolist():
        close(vectors[b, of.sinks[b, k]], sinks[b, k])


def test_without_sinks_the_model_is_the_plain_backbone() -> None:
    model, batch = tiny_model(tiny_spec(sinks=False)), random_batch(3, layout_of(signals=()), (5, 2))
    assert {group_of(n) for n, _ in model.named_parameters()} == {"backbone", "norm", "head"}
    with torch.no_grad():
        mine = states_of(model, batch, ALL)
        model.backbone.set_attn_implementation("sdpa")  # pyright: ignore[reportCallIssue]
        of = padded(batch)
        mask = (of.kinds != PAD).long()
        plain = model.backbone(input_ids=of.input_ids, attention_mask=mask, use_cache=False).last_hidden_state
    close(mine[mask.bool()], plain[mask.bool()], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("kind", ["llama", "qwen2", "qwen3"])
def test_every_parameter_has_its_group(kind: str) -> None:
    model = tiny_model(tiny_spec(kind, lora=LoraSpec(rank=2)))
    groups: dict[Group, set[str]] = {g: set() for g in ("sink", "bias", "head", "lora", "norm", "backbone")}
    for name, _ in model.named_parameters():
        groups[group_of(name)].add(name)
    assert all(groups.values())
    assert groups["sink"] == {f"sinks.{n}" for n, _ in model.sinks.named_parameters()}  # pyright: ignore[reportOptionalMemberAccess]
    assert groups["bias"] == {f"biases.{n}" for n, _ in model.biases.named_parameters()}
    assert groups["head"] == {f"head.{n}" for n, _ in model.head.named_parameters()}
    assert all(n.startswith("backbone.") for n in groups["lora"] | groups["norm"] | groups["backbone"])
    norms = {f"backbone.{m}.weight" for m, module in model.backbone.named_modules() if "norm" in type(module).__name__.lower()}
    assert groups["norm"] == norms
    layers, targets = 2, 7
    assert len(groups["lora"]) == 2 * layers * targets


@given(st.sets(st.sampled_from(["sink", "bias", "head", "lora", "norm", "backbone"]), min_size=1))
@settings(max_examples=30)
def test_a_stage_trains_its_groups_and_nothing_else(trainable: set[Group]) -> None:
    model = MODEL
    set_trainable(model, tuple(trainable))
    for name, parameter in model.named_parameters():
        group = group_of(name)
        # `backbone` takes the norms along unless they are a group of their own.
        owner = "backbone" if group == "norm" and "norm" not in trainable else group
        assert parameter.requires_grad == (owner in trainable)
        assert trained_as(name, tuple(trainable)) == (owner if owner in trainable else None)


MODEL = tiny_model(tiny_spec(lora=LoraSpec(rank=2)))


def test_lora_leaves_the_model_as_it_is_at_the_start_and_covers_its_targets() -> None:
    plain, adapted = tiny_model(tiny_spec()), tiny_model(tiny_spec(lora=LoraSpec(rank=2, targets=("q_proj", "v_proj"))))
    names = [n for n, _ in adapted.named_parameters() if ".lora_" in n]
    assert len(names) == 2 * 2 * 2
    assert all("q_proj" in n or "v_proj" in n for n in names)
    renamed = {n.replace(".base_layer", ""): v for n, v in adapted.state_dict().items() if ".lora_" not in n}
    plain.load_state_dict(renamed)
    batch = random_batch(1, layout_of(), (5, 3))
    with torch.no_grad():
        close(adapted(batch, ALL).logits, plain(batch, ALL).logits)


@pytest.mark.parametrize(("share", "layers", "count"), [(0.5, 4, 2), (0.01, 4, 1), (1.0, 3, 3), (0.34, 3, 1)])
def test_the_bias_is_on_the_first_layers(share: float, layers: int, count: int) -> None:
    assert len(tiny_model(tiny_spec(layers=layers, bias=BiasSpec(layers=share))).biases) == count


@pytest.mark.parametrize("readout", READOUTS, ids=str)
@pytest.mark.parametrize(
    "trainable", [("sink", "bias", "head", "lora"), ("sink", "bias", "head", "backbone")], ids=["lora", "full"]
)
def test_bfloat16_trains_with_finite_fp32_results(trainable: tuple[Group, ...], readout: ReadoutSpec) -> None:
    model = tiny_model(tiny_spec(kv_heads=2, lora=LoraSpec(rank=2) if "lora" in trainable else None), precision="bf16")
    set_trainable(model, trainable)
    frozen = {p.dtype for p in model.parameters() if not p.requires_grad}
    assert frozen <= {torch.bfloat16}
    assert {p.dtype for p in model.parameters() if p.requires_grad} == {torch.float32}
    batch = random_batch(1, layout_of(), (7, 4, 1))
    with torch.autocast("cpu", torch.bfloat16):
        loss, logits, _ = model(batch, Objective(readout=readout))
    loss.backward()
    assert loss.dtype == logits.dtype == torch.float32
    assert all(torch.isfinite(p.grad).all() for p in model.parameters() if p.grad is not None)
    assert torch.isfinite(logits).all()
    exact = tiny_model(tiny_spec(kv_heads=2, lora=LoraSpec(rank=2) if "lora" in trainable else None))
    with torch.no_grad():
        close(logits.detach(), exact(batch, Objective(readout=readout)).logits, atol=0.1, rtol=0.1)
    # Rounded to bfloat16, two impressions in a thousand would have the same score and AUC would lose what they differ in.
    assert not torch.equal(logits, logits.bfloat16().float())


def refused(config: dict[str, object], **more: object) -> str:
    """The message for a backbone of these fields over the tiny Llama's."""
    spec = DecoderSpec.model_validate({"backbone": {"config": config}, **more})
    with pytest.raises(InputError) as caught:
        build_model(spec, VOCABULARY, 0)
    assert "\n" not in str(caught.value)
    return str(caught.value)


TINY = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}


def test_windowed_attention_is_refused() -> None:
    message = refused(TINY | {"model_type": "mistral", "sliding_window": 16})
    assert "mistral uses sliding_attention" in message
    layers = ["full_attention", "sliding_attention"]
    message = refused(TINY | {"model_type": "qwen2", "use_sliding_window": True, "sliding_window": 8, "layer_types": layers})
    assert "qwen2 uses sliding_attention" in message
    spec = DecoderSpec(backbone=BackboneSpec(config=TINY | {"model_type": "mistral", "sliding_window": None}))
    assert build_model(spec, VOCABULARY, 0).biases


@pytest.mark.parametrize("bias", [None, {}], ids=["no-bias", "bias"])
@pytest.mark.parametrize("kind", ["bert", "vit"])
def test_an_encoder_is_refused(kind: str, bias: dict[str, object] | None) -> None:
    """Without a causal mask the history would see the target."""
    assert "take a decoder such as llama" in refused(TINY | {"model_type": kind}, bias=bias)


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("num_hidden_layer", 2, "llama has no field num_hidden_layer, did you mean num_hidden_layers?"),
        ("vocab_size", 10, "vocab_size comes from the tokenizer"),
        ("hidden_size", "wide", "hidden_size"),
        ("num_attention_heads", 5, "not a multiple of the number of attention heads"),
        ("model_type", "lama", "lama"),
    ],
)
def test_a_wrong_field_of_the_backbone_is_named(field: str, value: object, message: str) -> None:
    found = refused(TINY | {"model_type": "llama"} | {field: value})
    assert found.startswith("model.backbone.config: ")
    assert message in found


def test_lora_targets_that_do_not_exist_are_named() -> None:
    assert "model.lora.targets ['w_q']" in refused(TINY | {"model_type": "llama"}, lora={"targets": ["w_q"]})


def test_a_folder_gives_its_weights_and_its_vocabulary_is_checked(tmp_path: Path) -> None:
    made = tiny_model(tiny_spec("qwen3"))
    made.backbone.save_pretrained(tmp_path)  # pyright: ignore[reportCallIssue]
    spec = tiny_spec("qwen3").model_copy(update={"backbone": BackboneSpec(path=str(tmp_path))})
    loaded = tiny_model(spec)
    assert all(torch.equal(v, loaded.backbone.state_dict()[k]) for k, v in made.backbone.state_dict().items())
    load_parameters(loaded, parameters(made))
    batch = random_batch(1, layout_of(), (5, 3))
    with torch.no_grad():
        close(loaded(batch, ALL).logits, made(batch, ALL).logits)
    with pytest.raises(InputError, match=f"has {VOCABULARY} token embeddings, the data set's tokenizer {VOCABULARY + 1}"):
        build_model(spec, VOCABULARY + 1, 0)


def test_a_folder_without_a_model_is_named(tmp_path: Path) -> None:
    spec = tiny_spec().model_copy(update={"backbone": BackboneSpec(path=str(tmp_path / "none"))})
    with pytest.raises(InputError, match=r"model\.backbone\.path .*none") as caught:
        build_model(spec, VOCABULARY, 0)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_precision_holds_where_the_caller_switched_autocast_off(precision: str) -> None:
    """DeepSpeed runs the model in a context like this one; matrix products follow the run's precision all the same."""
    model = tiny_model(tiny_spec(), precision=precision)
    set_trainable(model, ("sink", "bias", "head", "backbone"))
    seen: set[torch.dtype] = set()
    for layer in decoder_layers(model.backbone):
        layer.self_attn.q_proj.register_forward_hook(lambda module, args, out: seen.add(out.dtype))
    with torch.autocast("cpu", enabled=False):
        loss, logits, _ = model(random_batch(0, layout_of(), (6, 4)), Objective())
    loss.backward()
    assert seen == {torch.float32 if precision == "fp32" else torch.bfloat16}
    assert logits.dtype == torch.float32
