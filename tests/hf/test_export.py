"""Exported models of transformers: what they compute, how they are saved, and who loads them."""

import copy
import json
import logging
import pickle

import fresh
import pytest
import torch
import transformers as t
from hf_models import DECODERS, HEADLESS, MODELS, OTHERS, inputs_of, model_of, open_gates_, output_of

import l0kernels as l0
from l0kernels import hf
from l0kernels.hf.modeling_l0 import REFUSAL

pytestmark = pytest.mark.usefixtures("seeded")


# Of what others do alike, too, one case is enough for every commit.
ALIKE = ("roberta", "mistral", "qwen2", "electra", "gemma2", "olmo2")


def few(names):
    return [pytest.param(name, marks=pytest.mark.long) if name in ALIKE else name for name in names]


def gated(name, share=0.5, attention="sdpa", **options):
    return open_gates_(hf.gate(model_of(name, attention=attention).eval(), **options), share)


def auto_of(model):
    if isinstance(model, t.T5ForConditionalGeneration):
        return t.AutoModelForSeq2SeqLM
    return t.AutoModelForCausalLM if hasattr(model, "lm_head") else t.AutoModel


def close(a, b):
    torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


@pytest.mark.covering(1)
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("name", MODELS)
def test_exports_compute_the_same_saved_and_loaded(name, attention, tmp_path):
    for share in (0.5, 0.0) if attention == "eager" else (0.5,):
        model = gated(name, share, attention)
        inputs, folder = inputs_of(model), tmp_path / str(share)
        with torch.no_grad():
            expected = output_of(model, inputs)
            small = hf.export(model)
            assert isinstance(small, type(model))
            assert type(small).__name__ == f"L0{type(model).__name__}"
            assert sum(p.numel() for p in small.parameters()) < sum(p.numel() for p in model.parameters())
            assert not l0.nn.gate_modules(small)
            close(output_of(small, inputs), expected)
            small.save_pretrained(folder)
            assert (folder / "modeling_l0.py").is_file()
            for loaded in (
                hf.from_pretrained(folder, attn_implementation=attention),
                auto_of(model).from_pretrained(folder, attn_implementation=attention),
            ):
                assert type(loaded) is type(small)
                close(output_of(loaded.eval(), inputs), expected)
        linear = [m for m in loaded.modules() if isinstance(m, torch.nn.Linear)]
        assert all(m.weight.shape == (m.out_features, m.in_features) for m in linear)


@pytest.mark.filterwarnings("ignore:export has left the closed units:UserWarning")
@pytest.mark.parametrize("name", few(OTHERS))
def test_other_architectures_are_exported_and_loaded(name, tmp_path):
    heads = name not in HEADLESS
    model = gated(name, heads=heads)
    assert {group.kind for group in model.l0_units.groups} == {"units", *(["heads"] if heads else [])}
    inputs = inputs_of(model)
    small = hf.export(model)
    small.save_pretrained(tmp_path)
    with torch.no_grad():
        close(output_of(small, inputs), output_of(model, inputs))
        assert type(small).__name__.startswith("L0")
        close(output_of(hf.from_pretrained(tmp_path).eval(), inputs), output_of(model, inputs))
    assert type(t.AutoModel.from_pretrained(tmp_path)).__name__.startswith("L0")


def test_zero_heads_and_units_are_none_at_all(tmp_path):
    hf.export(gated("bert", 0.0)).save_pretrained(tmp_path)
    small = hf.from_pretrained(tmp_path)
    layer = small.encoder.layer[1]
    assert layer.attention.self.query.weight.shape == (0, 24)
    assert layer.output.dense.weight.shape == (24, 0)
    assert small.config.per_layer_config[1].num_attention_heads == 0
    small = hf.export(gated("gpt2", 0.0))  # its forward needs one
    assert small.transformer.h[0].attn.c_attn.weight.shape == (24, 3 * 6)


def test_half_precision_and_other_heads_of_the_same_base(tmp_path):
    torch.manual_seed(0)
    config = t.BertConfig(
        hidden_size=24,
        num_attention_heads=4,
        intermediate_size=14,
        num_hidden_layers=2,
        vocab_size=40,
        id2label={0: "a", 1: "b", 2: "c"},
        label2id={"a": 0, "b": 1, "c": 2},
    )
    model = t.BertForSequenceClassification(config).eval()
    names = ("attention.self.query", "intermediate.dense", "pooler.dense")
    open_gates_(hf.gate(model, include=names))
    inputs = inputs_of(model)
    small = hf.export(model)
    small.save_pretrained(tmp_path)
    loaded = t.AutoModelForSequenceClassification.from_pretrained(tmp_path)
    assert loaded.config.id2label == {0: "a", 1: "b", 2: "c"}
    close(output_of(loaded.eval(), inputs), output_of(model, inputs))
    base = t.AutoModel.from_pretrained(tmp_path)
    assert type(base).__name__ == "L0BertModel"
    assert small.classifier.in_features < 24
    close(output_of(base.eval(), inputs), small.bert(**inputs).last_hidden_state)
    tokens = t.AutoModelForTokenClassification.from_pretrained(
        tmp_path, dtype=torch.bfloat16, num_labels=5, ignore_mismatched_sizes=True
    )
    assert tokens(**inputs).logits.shape == (3, 7, 5)
    assert tokens.dtype == torch.bfloat16
    base.save_pretrained(tmp_path / "base")
    again = t.AutoModelForSequenceClassification.from_pretrained(tmp_path / "base")
    close(output_of(again.bert.eval(), inputs), small.bert(**inputs).last_hidden_state)
    stock = hf.export(
        open_gates_(hf.gate(t.BertForSequenceClassification(config), heads=False)), uniform=True
    )
    assert type(stock) is t.BertForSequenceClassification  # a pooler is gated only where it is named
    fresh_weights = type(small)(small.config)  # without a checkpoint
    assert all(p.isfinite().all() for p in fresh_weights.parameters())


def test_an_export_is_gated_and_exported_again(tmp_path):
    small = hf.export(gated("llama", 0.7))
    model = open_gates_(hf.gate(small), 0.5, seed=1)
    smaller = hf.export(model)
    assert type(smaller) is type(small)
    assert sum(p.numel() for p in smaller.parameters()) < sum(p.numel() for p in small.parameters())
    inputs = inputs_of(model)
    copied = pickle.loads(pickle.dumps(smaller))
    assert type(copied) is type(smaller)
    close(output_of(copied, inputs), output_of(model, inputs))
    smaller.save_pretrained(tmp_path)
    close(output_of(hf.from_pretrained(tmp_path).eval(), inputs), output_of(model, inputs))


def test_an_export_without_a_closed_gate_is_of_the_model_s_own_class(tmp_path):
    model = gated("qwen3", 1.0)
    small = hf.export(model)
    assert type(small) is t.Qwen3ForCausalLM
    assert type(small.config) is t.Qwen3Config
    small.save_pretrained(tmp_path)
    close(
        output_of(hf.from_pretrained(tmp_path).eval(), inputs_of(model)), output_of(model, inputs_of(model))
    )


def test_config_says_the_sizes_of_each_layer():
    model = gated("llama")
    small = hf.export(model)
    for layer, of in zip(small.model.layers, small.config.per_layer_config, strict=True):
        assert of.num_attention_heads * of.head_dim == layer.self_attn.q_proj.out_features
        assert of.num_key_value_heads * of.head_dim == layer.self_attn.k_proj.out_features
        assert of.intermediate_size == layer.mlp.down_proj.in_features
    assert small.config.num_attention_heads == 4  # of all layers, which are built with it
    assert copy.deepcopy(small.config).l0 == small.config.l0


@pytest.mark.covering(1)
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("name", few(DECODERS))
def test_generation_is_the_same_with_every_cache(name, attention):
    model = gated(name, 0.5, attention)
    for gate, group in zip(model.l0_units.gates, model.l0_units.groups, strict=True):
        if group.kind == "heads" and name != "t5" and "1." in group.name:  # a layer without heads
            gate.log_alpha.data.fill_(-9)
    small = hf.export(model)
    ids = inputs_of(model)["input_ids"][:2]
    found = []
    for one, options in ((m, o) for m in (model, small) for o in ({"use_cache": False}, {}, STATIC)):
        one.generation_config.eos_token_id = None
        one.generation_config.pad_token_id = 0
        found.append(one.generate(ids, max_new_tokens=6, do_sample=False, **options))
    assert all(torch.equal(found[0], other) for other in found[1:])


CLASSIFIERS = {
    "bert": t.BertForSequenceClassification,
    "roberta": t.RobertaForSequenceClassification,
    "distilbert": t.DistilBertForSequenceClassification,
    "vit": t.ViTForImageClassification,
}


@pytest.mark.parametrize("name", few(["gpt2", "llama", "mistral", "qwen2", "qwen3", *CLASSIFIERS]))
def test_width_goes_through_the_whole_model(name, tmp_path):
    model = model_of(name).eval()
    if name in CLASSIFIERS:
        with pytest.raises(ValueError, match="must have width to gate"):
            hf.gate(model, width=True)
        model = CLASSIFIERS[name](model.config).eval()
    open_gates_(hf.gate(model, width=True), 0.6)
    for fractional in (False, True):
        if fractional:  # z is another factor for each of two tied embeddings
            for gate in model.l0_units.gates:
                gate.log_alpha.data.clamp_(max=1)
        small, inputs = hf.export(model), inputs_of(model)
        assert small.num_parameters() < model.num_parameters() * 0.7
        close(output_of(small, inputs), output_of(model, inputs))
        small.save_pretrained(tmp_path)
        close(output_of(hf.from_pretrained(tmp_path).eval(), inputs), output_of(model, inputs))


STATIC = {"cache_implementation": "static"}


UNIFORM = ("llama", "mistral", "qwen2", "qwen3", "t5", "vit")


@pytest.mark.parametrize("name", few(MODELS))
def test_uniform_exports_are_stock_models(name, tmp_path):
    model = gated(name, 0.5, heads=name in UNIFORM)
    gates = dict(zip([g.name for g in model.l0_units.groups], model.l0_units.gates, strict=True))
    for group in model.l0_units.groups:
        if group.kind == "heads":  # one less in each layer, another one
            closed = int(torch.randint(group.units, ()))
            gates[group.name].log_alpha.data.fill_(9)[closed] = -9
    inputs = inputs_of(model)
    small = hf.export(model, uniform=True)
    assert type(small) is type(model)
    assert sum(p.numel() for p in small.parameters()) < sum(p.numel() for p in model.parameters())
    small.save_pretrained(tmp_path)
    loaded = type(model).from_pretrained(tmp_path)
    assert type(loaded.config) is type(model.config)
    close(output_of(loaded.eval(), inputs), output_of(model, inputs))
    widths = {
        n.shape[0] for key, n in small.named_parameters() if key.endswith(("fc1.weight", "up_proj.weight"))
    }
    assert len(widths) <= 1


@pytest.mark.parametrize("name", ["bert", "roberta", "distilbert", "gpt2"])
def test_uniform_refuses_heads_that_a_config_cannot_say(name):
    model = hf.gate(model_of(name).eval(), units=False)
    for gate in model.l0_units.gates:
        gate.log_alpha.data.fill_(9)[0] = -9
    with pytest.raises(
        ValueError, match=r"uniform must leave sizes that \w+Config can say, got \w+=3: .* heads=False"
    ):
        hf.export(model, uniform=True)
    open_gates_(model, 1.0)
    model.l0_units.gates[0].log_alpha.data[1] = -9  # the other layer keeps all: one of zeros stays here
    small = hf.export(model, uniform=True)
    close(output_of(small, inputs_of(model)), output_of(model, inputs_of(model)))


def test_uniform_refuses_what_the_config_refuses():
    torch.manual_seed(0)
    config = t.LlamaConfig(
        hidden_size=48,
        num_attention_heads=6,
        num_key_value_heads=6,
        intermediate_size=14,
        num_hidden_layers=1,
        vocab_size=40,
    )
    model = hf.gate(t.LlamaForCausalLM(config).eval(), units=False)
    model.l0_units.gates[0].log_alpha.data[0] = -9
    with pytest.raises(
        ValueError, match=r"(?s)got num_attention_heads=5, num_key_value_heads=5: .*multiple of"
    ):
        hf.export(model, uniform=True)


def test_keep_is_met():
    model = hf.gate(model_of("bert").eval(), droprate_init=0.5)
    whole = l0.nn.expected_l0(open_gates_(copy.deepcopy(model), 1.0))
    small = hf.export(model, keep=0.7)
    assert 0.6 < sum(p.numel() for p in small.parameters()) / whole <= 0.7
    by_kind = hf.export(model, keep={"heads": 0.5, "units": 0.3})
    assert by_kind.encoder.layer[0].attention.self.query.out_features in (0, 6, 12, 18, 24)
    even = hf.export(
        hf.gate(model_of("vit").eval()), keep={"heads": 0.5, "units": 0.5}, uniform=True, multiple_of=7
    )
    assert {layer.mlp.fc1.out_features for layer in even.layers} == {7}
    assert {layer.attention.q_proj.out_features for layer in even.layers} == {12}
    flops = hf.export(model, keep=0.6, cost="flops", input_shape=inputs_of(model))
    assert sum(p.numel() for p in flops.parameters()) < whole


@pytest.mark.parametrize("options", [{}, {"ignore_mismatched_sizes": True}, {"num_labels": 4}])
def test_classes_of_transformers_refuse_the_folder_in_our_words(options, tmp_path):
    hf.export(gated("bert")).save_pretrained(tmp_path)
    for stock in (t.BertModel, t.BertForSequenceClassification, t.RobertaModel):
        with pytest.raises(ValueError, match=REFUSAL[:60]):
            stock.from_pretrained(tmp_path, **options)
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["model_type"] == "l0_bert"
    assert config["per_layer_config"]


PROGRAM = """
import os, sys
os.environ["HF_HUB_OFFLINE"] = "1"
sys.modules["l0kernels"] = None
import torch, transformers
torch.set_num_threads(1)
for folder, auto in {folders!r}:
    auto, saved = getattr(transformers, auto), torch.load(folder + "/io.pt")
    try:
        auto.from_pretrained(folder)
    except ValueError as error:
        assert "trust_remote_code=True" in str(error), error
    else:
        raise AssertionError("loaded without being trusted")
    model = auto.from_pretrained(folder, trust_remote_code=True).eval()
    with torch.no_grad():
        out = model(**saved["inputs"])
    out = out.logits if hasattr(out, "logits") else out.last_hidden_state
    torch.testing.assert_close(out, saved["output"], rtol=1e-4, atol=1e-5)
    model.save_pretrained(folder + "/again")
    again = auto.from_pretrained(folder + "/again", trust_remote_code=True)
    assert type(again).__name__ == type(model).__name__
    print(type(model).__name__)
del sys.modules["l0kernels"]
import l0kernels.hf
for folder, auto in {folders!r}:
    model = getattr(transformers, auto).from_pretrained(folder)
    assert type(model).__module__ == "l0kernels.hf.modeling_l0"
    print(type(model).__name__)
"""


LOADED = [
    ("bert", "L0BertModel"),
    ("qwen2", "L0Qwen2ForCausalLM"),
    ("t5", "L0T5ForConditionalGeneration"),
    ("gpt2", "L0GPT2LMHeadModel"),
    ("vit", "L0ViTModel"),
]


@pytest.mark.parametrize("classes", [LOADED[:3], pytest.param(LOADED[3:], marks=pytest.mark.long)])
def test_a_fresh_process_loads_without_l0kernels_and_with(classes, tmp_path, monkeypatch):
    folders = []
    for name, _ in classes:
        model = gated(name)
        small, folder = hf.export(model), tmp_path / name
        small.save_pretrained(folder)
        with torch.no_grad():
            saved = {"inputs": inputs_of(model), "output": output_of(model, inputs_of(model))}
        torch.save(saved, folder / "io.pt")
        folders.append((str(folder), auto_of(model).__name__))
    monkeypatch.setenv("HF_MODULES_CACHE", str(tmp_path / "modules"))
    found = fresh.run(PROGRAM.format(folders=folders), tmp_path)
    assert found.returncode == 0, found.stderr
    assert [word for word in found.stdout.split() if word.startswith("L0")] == [
        loaded for _, loaded in classes
    ] * 2


def test_what_is_no_model_of_transformers_is_refused():
    class Mine(t.BertModel):
        pass

    model = Mine(model_of("bert").config)
    with pytest.raises(ValueError, match=r"must be gated by l0kernels.hf.gate"):
        hf.export(model)
    hf.gate(model)
    with pytest.raises(ValueError, match="must be of a class of transformers, got Mine"):
        hf.export(model)


def test_from_pretrained_names_a_config_without_a_class(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "bert"}))
    with pytest.raises(ValueError, match="must name a class of transformers in architectures, got None"):
        hf.from_pretrained(tmp_path)


def test_loading_warns_of_nothing(tmp_path, caplog):
    hf.export(gated("gpt2")).save_pretrained(tmp_path)
    t.logging.set_verbosity_warning()
    try:
        with caplog.at_level(logging.WARNING):
            t.AutoModelForCausalLM.from_pretrained(tmp_path)
    finally:
        t.logging.set_verbosity_error()
    assert not caplog.records
