"""The ops inside models of Hugging Face transformers (extra `e2e`, transformers >= 5.17, < 6).

from kernelhub.integrations.transformers import Sampler, accelerate

with accelerate(model) as accelerated:  # Llama, Qwen2, Qwen3, Qwen3-MoE, Mixtral, DeepSeek-V3
    model.generate(ids, logits_processor=[Sampler(top_k=40, top_p=0.9, seed=7)])
print(accelerated)                      # which layers run through which op, and which do not

quantize(model, "int4"); save_quantized(model, folder); model = load_quantized(folder)
"""

try:
    import transformers as _transformers
except ModuleNotFoundError as _error:
    if _error.name != "transformers":
        raise
    raise ImportError(
        "kernelhub.integrations.transformers needs transformers >= 5.17, < 6: "
        "pip install 'kernelhub[e2e]'"
    ) from _error

_version = tuple(int(part) for part in _transformers.__version__.split(".")[:2])
if not (5, 17) <= _version < (6, 0):
    raise ImportError(
        f"kernelhub.integrations.transformers needs transformers >= 5.17, < 6, "
        f"found {_transformers.__version__}"
    )

from kernelhub.integrations.census import Census, Row  # noqa: E402
from kernelhub.integrations.transformers.accelerate import Accelerated, accelerate  # noqa: E402
from kernelhub.integrations.transformers.families import Layer  # noqa: E402
from kernelhub.integrations.transformers.quantized import (  # noqa: E402
    Quantized,
    load_quantized,
    quantize,
    save_quantized,
)
from kernelhub.integrations.transformers.sampler import Sampler  # noqa: E402

__all__ = [
    "Accelerated",
    "Census",
    "Layer",
    "Quantized",
    "Row",
    "Sampler",
    "accelerate",
    "load_quantized",
    "quantize",
    "save_quantized",
]
