"""Gates in models of transformers: equal to masked dense models, values and gradients; what is refused."""

import copy
import json

import fresh
import pytest
import torch
from hf_models import HEADLESS, MODELS, OTHERS, inputs_of, model_of, open_gates_, output_of
from torch import nn

import l0kernels as l0
from l0kernels import hf

pytestmark = pytest.mark.usefixtures("seeded")


def values_of(gates, mode):
    """z of each group, by its name."""
    found = {}
    for group in gates.groups:
        z = torch.rand(group.units, dtype=torch.float64) * 0.9 + 0.05
        if mode == "half":
            z[torch.rand(group.units) < 0.5] = 0
        elif mode == "one":
            z[torch.arange(group.units) != torch.randint(group.units, ())] = 0
        elif mode == "none":
            z[:] = 0
        else:
            z[:] = 1
        found[group.name] = z
    return found


def impose(gates, values):
    """Has each gate give the value of its group; returns them as leaves."""
    leaves = {name: z.clone().requires_grad_() for name, z in values.items()}
    for group, gate in zip(gates.groups, gates.gates, strict=True):
        gate.eval()
        z = leaves[group.name]
        gate.__dict__["eval_gates"] = lambda z=z: l0.Gates.from_z(z, full_grad=False)
    return leaves


def masked(dense, groups, leaves):
    """The handles of hooks that multiply what the layers of `dense` read by z."""
    handles = []
    for group in groups:
        for member in group.members:
            if member.role != "in":
                continue
            size = dense.get_parameter(member.name).shape[member.dim]

            def scale(_, args, at=member.index, z=leaves[group.name], size=size):
                spread = z.repeat_interleave(at.shape[1])
                return (args[0] * torch.ones(size).to(z).index_put((at.flatten(),), spread), *args[1:])

            module = dense.get_submodule(member.name.rpartition(".")[0])
            handles.append(module.register_forward_pre_hook(scale))
    return handles


# Of each model one attention, of each attention every second model; the others are long.
CASES = [(name, ("sdpa", "eager")[at % 2]) for at, name in enumerate(MODELS)]
OTHER = [(name, ("eager", "sdpa")[at % 2]) for at, name in enumerate(MODELS)]
CASES += [pytest.param(*case, marks=pytest.mark.long) for case in OTHER]
# OLMo 2 norms the queries of all heads together: of a gated model those of the open ones.
CASES += [(name, "its own") for name in OTHERS if name != "olmo2"]


@pytest.mark.parametrize(("name", "attention"), CASES)
def test_output_and_gradients_are_those_of_a_masked_model(name, attention):
    model = model_of(name, dtype=torch.float64, attention=attention)
    if name in OTHERS:
        model.eval()  # they have dropout
    dense, inputs = copy.deepcopy(model), inputs_of(model)
    heads = name not in HEADLESS
    assert hf.gate(model, heads=heads) is model
    gates = model.l0_units
    assert {group.kind for group in gates.groups} == {"units", *(["heads"] if heads else [])}
    for mode in ("half", "one", "none", "open") if name in MODELS else ("half",):
        values = values_of(gates, mode)
        ours, theirs = impose(gates, values), {name: z.clone().requires_grad_() for name, z in values.items()}
        handles = masked(dense, gates.groups, theirs)
        y, expected = output_of(model, inputs), output_of(dense, inputs)
        weight = torch.randn_like(y)
        for part in (y, expected):
            (part * weight).sum().backward()
        torch.testing.assert_close(y, expected, rtol=1e-9, atol=1e-9)
        for key, parameter in dense.named_parameters():
            grad, other = model.get_parameter(key).grad, parameter.grad
            zero = torch.zeros_like(parameter)
            torch.testing.assert_close(
                zero if grad is None else grad,
                zero if other is None else other,
                rtol=1e-8,
                atol=1e-6 if name == "gemma3" else 1e-9,  # whose norms are of float32
                msg=key,
            )
        for key, leaf in ours.items():
            expected_grad = torch.where((leaf > 0) & (leaf < 1), theirs[key].grad, 0)
            grad = torch.zeros_like(leaf) if leaf.grad is None else leaf.grad
            torch.testing.assert_close(grad, expected_grad, rtol=1e-8, atol=1e-9)
        if mode == "open":
            for handle in handles:
                handle.remove()
            assert torch.equal(y, output_of(dense, inputs))
        for handle in handles:
            handle.remove()
        model.zero_grad()
        dense.zero_grad()


@pytest.mark.parametrize(("attention", "crossed"), [("sdpa", 2), ("eager", 1)])
def test_heads_of_cross_attention(attention, crossed):
    """ "eager" adds one tensor of zeros to the scores of all of them."""
    gates = hf.gate(model_of("t5", attention=attention)).l0_units
    heads = [group.name for group in gates.groups if group.kind == "heads"]
    assert len(heads) == 2 + crossed
    assert sum("EncDecAttention" in name for name in heads) == crossed


def checkpointing(model, *args):
    name = "activation_checkpointing_enable"  # gradient_... before 5.24
    (getattr(model, name, None) or model.gradient_checkpointing_enable)(*args)


@pytest.mark.parametrize("name", ["bert", "gpt2", "llama", "t5", "vit"])
def test_checkpoints_are_computed_again_with_the_draw_of_their_forward(name):
    model = hf.gate(model_of(name, dtype=torch.float64), droprate_init=0.5)
    inputs, grads = inputs_of(model), []
    for enabled in (False, True):
        if enabled:
            checkpointing(model)
        torch.manual_seed(3)
        (output_of(model, inputs) ** 2).sum().backward()
        grads.append([p.grad.clone() for p in model.parameters() if p.grad is not None])
        model.zero_grad(set_to_none=True)
    assert len(grads[0]) == len(grads[1])
    for ours, expected in zip(*grads, strict=True):
        torch.testing.assert_close(ours, expected, rtol=1e-9, atol=1e-9)
    checkpointing(model, {"use_reentrant": True})
    model.enable_input_require_grads()
    with pytest.raises(RuntimeError, match="use_reentrant=False"):
        output_of(model, inputs)


def test_gates_draw_in_training_and_rest_in_eval():
    model = hf.gate(model_of("bert"))
    inputs = inputs_of(model)
    assert not torch.equal(output_of(model, inputs), output_of(model, inputs))
    model.eval()
    assert torch.equal(output_of(model, inputs), output_of(model, inputs))
    z = torch.cat([gate.eval_gates().z for gate in model.l0_units.gates])
    assert z.min() > 0.9  # a pretrained model starts as it is
    model.train().bfloat16()
    assert output_of(model, inputs).dtype == torch.bfloat16
    assert all(gate.log_alpha.dtype == torch.float32 for gate in model.l0_units.gates)


def test_kinds_and_names_choose():
    assert {g.kind for g in hf.gate(model_of("llama"), units=False).l0_units.groups} == {"heads"}
    assert {g.kind for g in hf.gate(model_of("llama"), heads=False).l0_units.groups} == {"units"}
    width = hf.gate(model_of("llama"), heads=False, units=False, width=True)
    assert [(g.kind, g.units) for g in width.l0_units.groups] == [("width", 24)]
    last = hf.gate(model_of("bert"), exclude=r".*layer\.0\..*", eval_mode="median", lam=0.3, block=7)
    assert all("layer.1." in group.name for group in last.l0_units.groups)
    assert [gate.n for gate in last.l0_units.gates] == [4, 2]
    assert {(gate.eval_mode, gate.lam) for gate in last.l0_units.gates} == {("median", 0.3)}


@pytest.mark.parametrize("name", ["bert", "gpt2", "t5"])
def test_layers_have_gates_of_their_own(name, tmp_path):
    model = hf.gate(model_of(name).eval(), layers=True)
    gates = model.l0_units
    assert gates.l0_layers.n == len(gates.groups)
    inputs = inputs_of(model)
    open_gates_(model, 0.7)
    gates.l0_layers.log_alpha.data[:] = 9.0
    before = output_of(model, inputs)
    gates.l0_layers.log_alpha.data[1] = -9.0
    now = output_of(model, inputs)
    assert not torch.equal(now, before)
    gates.gates[1].log_alpha.data[:] = -9.0
    assert torch.equal(output_of(model, inputs), now)
    hf.save_gates(model, tmp_path)
    other = hf.gate(model_of(name).eval(), config=tmp_path)
    assert torch.equal(output_of(other, inputs), now)
    with pytest.raises(ValueError, match="must have gates with layers=True"):
        hf.load_gates(hf.gate(model_of(name)), tmp_path)
    assert hf.describe(model).kinds["layers"][0] == len(gates.groups)


def test_layers_alone_have_all_else_open(tmp_path):
    model = hf.gate(model_of("bert").eval(), heads=False, units=False, layers=True)
    assert [gate.n for gate in l0.nn.gate_modules(model)] == [4]
    model.l0_units.l0_layers.log_alpha.data[:] = torch.tensor([9.0, -9.0, -9.0, 9.0])
    hf.save_gates(model, tmp_path)
    again = hf.gate(model_of("bert").eval(), config=tmp_path)
    assert [gate.n for gate in l0.nn.gate_modules(again)] == [4]
    expected = output_of(model, inputs_of(model))
    assert torch.equal(output_of(again, inputs_of(model)), expected)
    assert [row[-1] for row in hf.describe(model).kinds.values()] == [False, False, True]
    small = hf.export(again)
    assert [layer.intermediate_size for layer in small.config.per_layer_config] == [0, 14]
    assert [layer.num_attention_heads for layer in small.config.per_layer_config] == [4, 0]
    torch.testing.assert_close(output_of(small, inputs_of(model)), expected)
    stock = hf.export(again, uniform=True)  # nothing is gone, all is as it was
    assert type(stock).__name__ == "BertModel"
    torch.testing.assert_close(output_of(stock, inputs_of(model)), expected)


def test_what_cannot_be_gated_says_why():
    with pytest.raises(ValueError, match=r"(?s)must have width to gate.*output of the model") as error:
        hf.gate(model_of("bert"), width=True)
    assert "encoder.layer.0.attention.self.query" in str(error.value)  # what was found
    with pytest.raises(ValueError, match=r"heads, units, width or layers must be True"):
        hf.gate(model_of("bert"), heads=False, units=False)
    with pytest.raises(ValueError, match=r"must leave heads to gate.*'intermediate.dense'"):
        hf.gate(model_of("bert"), units=False, include=["intermediate.dense"])
    with pytest.raises(ValueError, match="include must name a layer"):
        hf.gate(model_of("bert"), include=["q_proj"])
    with pytest.raises(TypeError, match=r"PreTrainedModel.*Linear"):
        hf.gate(nn.Linear(2, 2))
    with pytest.raises(TypeError, match=r"options must be of .* got 'gate_lr'"):
        hf.gate(model_of("bert"), gate_lr=1.0)
    model = hf.gate(model_of("bert"))
    with pytest.raises(ValueError, match="must not be gated already"):
        hf.gate(model)
    with pytest.raises(ValueError, match="must be inputs that the model takes"):
        hf.gate(model_of("bert"), example={"input_ids": "words"})


@pytest.mark.parametrize("name", HEADLESS)
def test_heads_that_are_told_apart_are_not_gated(name):
    with pytest.raises(ValueError, match=r"(?s)must have heads to gate.*, with what has no units"):
        hf.gate(model_of(name))


def test_an_example_is_asked_for_where_the_config_does_not_say():
    import transformers as t

    torch.manual_seed(0)
    model = t.Wav2Vec2Model(
        t.Wav2Vec2Config(
            hidden_size=24,
            num_hidden_layers=1,
            num_attention_heads=2,
            intermediate_size=12,
            conv_dim=(8,),
            conv_kernel=(4,),
            conv_stride=(4,),
            num_conv_pos_embeddings=4,
            num_conv_pos_embedding_groups=2,
            vocab_size=8,
        )
    )
    with pytest.raises(ValueError, match=r"example must be given for Wav2Vec2Model.*input_values"):
        hf.gate(model)
    hf.gate(model, example={"input_values": torch.randn(1, 64)})
    assert {group.kind for group in model.l0_units.groups} >= {"heads"}


def test_description_counts_all_parameters():
    model = model_of("llama")
    total = sum(p.numel() for p in model.parameters())
    before = hf.describe(model)
    assert not any(is_gated for *_, is_gated in before.kinds.values())
    hf.gate(model, units=False)
    found = hf.describe(model)
    assert found.parameters == total
    assert {kind: row[:2] for kind, row in found.kinds.items()} == {
        "heads": (2, 4),
        "units": (2, 28),
        "width": (1, 24),
        "layers": (4, 4),
    }
    assert found.kinds["heads"][3] + sum(row.parameters for row in found.dense) == total
    assert found.kinds["heads"][4]
    assert not found.kinds["units"][4]
    text = str(found)
    assert "model.layers.*.mlp.gate_proj" in text
    assert "not asked for" in text
    assert "output of the model" in str(hf.describe(model_of("bert")))


def test_gates_are_saved_and_come_back(tmp_path):
    model = open_gates_(hf.gate(model_of("bert"), units=False, eval_mode="median", lam=0.4))
    model.l0_units.gates[0].lam = 0.7
    hf.save_gates(model, tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["l0_config.json", "l0_gates.safetensors"]
    other = hf.gate(model_of("bert"), config=tmp_path)
    assert [group.name for group in other.l0_units.groups] == [group.name for group in model.l0_units.groups]
    for ours, expected in zip(other.l0_units.gates, model.l0_units.gates, strict=True):
        assert torch.equal(ours.log_alpha, expected.log_alpha)
        assert (ours.lam, ours.eval_mode) == (expected.lam, expected.eval_mode)
    third = hf.load_gates(hf.gate(model_of("bert"), units=False), tmp_path)
    assert torch.equal(third.l0_units.gates[0].log_alpha, model.l0_units.gates[0].log_alpha)


def test_nothing_of_transformers_is_imported_before_it_is_asked_for(tmp_path):
    program = """
import sys
import l0kernels.nn
assert not {name.partition(".")[0] for name in sys.modules} & {"transformers", "safetensors", "accelerate"}
sys.modules["transformers"] = None
try:
    import l0kernels.hf
except ImportError as error:
    print(error)
"""
    found = fresh.run(program, tmp_path)
    assert found.returncode == 0, found.stderr
    assert "pip install l0kernels[hf]" in found.stdout


def test_gates_of_another_model_are_refused(tmp_path):
    hf.save_gates(hf.gate(model_of("bert"), units=False), tmp_path)
    with pytest.raises(ValueError, match=r"must have the heads 'encoder.layer.0.*model type 'bert'"):
        hf.gate(model_of("llama"), config=tmp_path)
    with pytest.raises(ValueError, match=r"no gates but .* got those of \['encoder.layer.0.intermediate"):
        hf.load_gates(hf.gate(model_of("bert")), tmp_path)
    with pytest.raises(ValueError, match=r"must be gated by l0kernels.hf.gate"):
        hf.load_gates(model_of("bert"), tmp_path)
    with pytest.raises(ValueError, match="config must come alone"):
        hf.gate(model_of("bert"), units=False, config=tmp_path)
    with pytest.raises(ValueError, match=r"folder must hold l0_config.json"):
        hf.gate(model_of("bert"), config=tmp_path / "none")
    file = tmp_path / "l0_config.json"
    saved = json.loads(file.read_text())
    first = next(iter(saved["groups"]))
    saved["groups"][first]["units"] = 5
    file.write_text(json.dumps(saved))
    with pytest.raises(ValueError, match=rf"must have 5 heads in '{first}', got 4 heads"):
        hf.gate(model_of("bert"), config=tmp_path)
    file.write_text(json.dumps({**saved, "format": 9}))
    with pytest.raises(ValueError, match="format 1, got 9"):
        hf.gate(model_of("bert"), config=tmp_path)
