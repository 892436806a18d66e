"""Models of transformers: gates in place, training with Trainer, export to what `from_pretrained` loads.

::

    model = AutoModelForSequenceClassification.from_pretrained(path)
    hf.gate(model)                                      # heads and units of the feed-forwards, in place
    print(hf.describe(model))
    optimizer = torch.optim.AdamW(l0.nn.parameter_groups(model, gate_lr=0.05), lr=2e-5)
    callback = hf.L0Callback(keep=0.5)
    Trainer(model, arguments, train_dataset=data, optimizers=(optimizer, None), callbacks=[callback]).train()
    small = hf.export(model, keep=0.5)
    small.save_pretrained(folder)
    small = hf.from_pretrained(folder)

Needs transformers and safetensors: ``pip install l0kernels[hf]``. Once this is imported, transformers' own
``AutoModel.from_pretrained`` loads what :func:`export` has made, too.
"""

try:
    import safetensors as _safetensors  # noqa: F401
    import transformers as _transformers  # noqa: F401
except ImportError as _error:
    raise ImportError(
        "l0kernels.hf needs transformers and safetensors: pip install l0kernels[hf]"
    ) from _error

from .callback import L0Callback
from .export import export, from_pretrained
from .files import load_gates, save_gates
from .gate import Description, describe, gate
from .known import register_known as _register_known

_register_known()

__all__ = [
    "Description",
    "L0Callback",
    "describe",
    "export",
    "from_pretrained",
    "gate",
    "load_gates",
    "save_gates",
]
