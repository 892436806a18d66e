"""Small models of transformers with random weights, and inputs for them; nothing is downloaded."""

import os

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")

import torch
import transformers as t

t.logging.disable_progress_bar()

VOCAB = 40
_TEXT = {"vocab_size": VOCAB, "max_position_embeddings": 24, "pad_token_id": 0}
_NAMED = {"bos_token_id": 1, "eos_token_id": 2}
_BERT = {"hidden_size": 24, "num_attention_heads": 4, "intermediate_size": 14, "num_hidden_layers": 2}
_NO_DROPOUT = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
_LLAMA = _BERT | _TEXT | _NAMED | {"num_key_value_heads": 2}


def _distilbert():
    return t.DistilBertModel(
        t.DistilBertConfig(
            dim=24, n_heads=4, hidden_dim=14, n_layers=2, dropout=0.0, attention_dropout=0.0, **_TEXT
        )
    )


def _gpt2():
    sizes = {"n_embd": 24, "n_head": 4, "n_layer": 2, "n_positions": 24, "n_inner": 14}
    dropout = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
    return t.GPT2LMHeadModel(t.GPT2Config(vocab_size=VOCAB, pad_token_id=0, **sizes, **dropout, **_NAMED))


def _t5():
    return t.T5ForConditionalGeneration(
        t.T5Config(
            vocab_size=VOCAB,
            d_model=24,
            num_heads=4,
            d_kv=6,
            d_ff=14,
            num_layers=2,
            dropout_rate=0.0,
            decoder_start_token_id=0,
        )
    )


MODELS = {
    "bert": lambda: t.BertModel(t.BertConfig(**_BERT, **_TEXT, **_NO_DROPOUT)),
    "roberta": lambda: t.RobertaModel(t.RobertaConfig(**_BERT, **_TEXT, **_NO_DROPOUT, **_NAMED)),
    "distilbert": _distilbert,
    "gpt2": _gpt2,
    "llama": lambda: t.LlamaForCausalLM(t.LlamaConfig(**_LLAMA)),
    "mistral": lambda: t.MistralForCausalLM(t.MistralConfig(**_LLAMA)),
    "qwen2": lambda: t.Qwen2ForCausalLM(t.Qwen2Config(**_LLAMA)),
    "qwen3": lambda: t.Qwen3ForCausalLM(t.Qwen3Config(head_dim=6, **_LLAMA)),
    "vit": lambda: t.ViTModel(t.ViTConfig(image_size=8, patch_size=4, **_BERT, **_NO_DROPOUT)),
    "t5": _t5,
}
"""One of each architecture that is tested in depth."""
_GEMMA = _LLAMA | {"head_dim": 6}
_MODERNBERT = _BERT | _TEXT | _NAMED | {"cls_token_id": 1, "sep_token_id": 2}
_OPT = {"ffn_dim": 14, "word_embed_proj_dim": 24, "hidden_size": 24, "num_attention_heads": 4}
_BART = {"d_model": 24, "encoder_layers": 2, "decoder_layers": 2, "dropout": 0.0, "encoder_ffn_dim": 14}
_BART |= {"decoder_ffn_dim": 14, "encoder_attention_heads": 4, "decoder_attention_heads": 4}
OTHERS = {
    "albert": lambda: t.AlbertForMaskedLM(t.AlbertConfig(embedding_size=24, **_BERT, **_TEXT)),
    "bart": lambda: t.BartForConditionalGeneration(
        t.BartConfig(vocab_size=VOCAB, max_position_embeddings=24, **_BART)
    ),
    "bloom": lambda: t.BloomForCausalLM(
        t.BloomConfig(vocab_size=VOCAB, hidden_size=24, n_layer=2, n_head=4, pad_token_id=0)
    ),
    "deberta-v2": lambda: t.DebertaV2Model(t.DebertaV2Config(**_BERT, **_TEXT, **_NO_DROPOUT)),
    "dinov2": lambda: t.Dinov2Model(
        t.Dinov2Config(
            image_size=8,
            patch_size=4,
            hidden_size=24,
            num_attention_heads=4,
            mlp_ratio=1,
            num_hidden_layers=2,
        )
    ),
    "electra": lambda: t.ElectraModel(t.ElectraConfig(embedding_size=24, **_BERT, **_TEXT)),
    "falcon": lambda: t.FalconForCausalLM(
        t.FalconConfig(
            new_decoder_architecture=True,
            num_kv_heads=2,
            ffn_hidden_size=14,
            **_TEXT,
            **{name: value for name, value in _BERT.items() if name != "intermediate_size"},
        )
    ),
    "gemma2": lambda: t.Gemma2ForCausalLM(t.Gemma2Config(**_GEMMA)),
    "gemma3": lambda: t.Gemma3ForCausalLM(t.Gemma3TextConfig(**_GEMMA)),
    "gpt_neox": lambda: t.GPTNeoXForCausalLM(t.GPTNeoXConfig(**_BERT, **_TEXT, **_NAMED)),
    "modernbert": lambda: t.ModernBertModel(t.ModernBertConfig(**_MODERNBERT)),
    "olmo2": lambda: t.Olmo2ForCausalLM(t.Olmo2Config(**_LLAMA)),
    "opt": lambda: t.OPTForCausalLM(t.OPTConfig(num_hidden_layers=2, **_OPT, **_TEXT)),
    "phi3": lambda: t.Phi3ForCausalLM(t.Phi3Config(**_LLAMA)),
}
"""One of each that is only exported and loaded."""
HEADLESS = ("bloom",)
"""Whose heads are told apart, by the slopes of ALiBi, and are pinned."""
DECODERS = ("gpt2", "llama", "mistral", "qwen2", "qwen3", "t5")


def model_of(name, seed=0, dtype=torch.float32, attention="sdpa"):
    """In train(), weights large enough for attention to look somewhere."""
    torch.manual_seed(seed)
    model = (MODELS | OTHERS)[name]().to(dtype).train()
    if attention != model.config._attn_implementation and name in MODELS:
        model.set_attn_implementation(attention)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.mul_(4)
            else:
                parameter.add_(torch.randn_like(parameter) / 4)
    return model


def inputs_of(model, seed=1):
    """By name; the last rows end in padding."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        if model.main_input_name == "pixel_values":
            return {"pixel_values": torch.randn(3, 3, 8, 8, dtype=model.dtype)}
        ids = torch.randint(3, VOCAB, (3, 7))
        mask = torch.ones_like(ids)
        mask[1, 5:] = 0
        mask[2, 2:] = 0
        found = {"input_ids": ids, "attention_mask": mask}
        if model.config.is_encoder_decoder:
            found["decoder_input_ids"] = torch.randint(3, VOCAB, (3, 4))
        return found


def output_of(model, inputs):
    """Logits, or the last hidden state."""
    found = model(**inputs)
    return found.logits if hasattr(found, "logits") else found.last_hidden_state


def open_gates_(model, share=0.5, seed=0):
    """Decides the gates of a gated model: a random share of each vector is open; 1 and 0: all and none."""
    generator = torch.Generator().manual_seed(seed)
    for gate in model.l0_units.gates:
        is_open = torch.rand(gate.n, generator=generator) < share
        with torch.no_grad():
            gate.log_alpha.copy_(torch.where(is_open, 9.0, -9.0) + torch.rand(gate.n, generator=generator))
    return model
