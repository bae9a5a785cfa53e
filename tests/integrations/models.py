"""A tiny model of each family, and what it says."""

from __future__ import annotations

from typing import Any

import attrs
import torch
import transformers
from torch import Tensor

PROMPT = torch.tensor([[5, 17, 3, 40]])
NEW_TOKENS = 8

_COMMON: dict[str, Any] = {
    "vocab_size": 48, "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 128, "intermediate_size": 96,
    "initializer_range": 0.2, "tie_word_embeddings": False,
    "bos_token_id": None, "eos_token_id": None, "pad_token_id": 0,
}  # fmt: skip

# Class names, options, seed. With these seeds, in bf16, the two best logits of every step stand
# three times as far apart as the largest error of a logit, and at least six tokens differ: a token
# that is not stock's is a fault, no tie.
_FAMILIES: dict[str, tuple[str, dict[str, Any], int]] = {
    "llama": ("Llama", {"attention_bias": True, "mlp_bias": True}, 0),
    "qwen2": ("Qwen2", {}, 19),
    "qwen3": ("Qwen3", {"head_dim": 16}, 14),
    "qwen3_moe": (
        "Qwen3Moe",
        {"head_dim": 16, "num_experts": 6, "num_experts_per_tok": 2, "moe_intermediate_size": 32,
         "mlp_only_layers": [0], "norm_topk_prob": True},
        5,
    ),
    "mixtral": (
        "Mixtral", {"num_local_experts": 4, "num_experts_per_tok": 2, "intermediate_size": 32}, 2
    ),
    "deepseek_v3": (
        "DeepseekV3",
        {"num_key_value_heads": 4, "q_lora_rank": 32, "kv_lora_rank": 32, "qk_rope_head_dim": 16,
         "qk_nope_head_dim": 16, "v_head_dim": 16, "n_routed_experts": 8, "n_group": 2,
         "topk_group": 1, "num_experts_per_tok": 2, "moe_intermediate_size": 32,
         "n_shared_experts": 1, "first_k_dense_replace": 1, "routed_scaling_factor": 2.5},
        36,
    ),
}  # fmt: skip
FAMILIES = tuple(_FAMILIES)


def config(family: str, **options: Any) -> Any:
    name, own, _ = _FAMILIES[family]
    return getattr(transformers, f"{name}Config")(**{**_COMMON, **own, **options})


def make(
    family: str, dtype: torch.dtype = torch.float32, device: str = "cpu", **options: Any
) -> Any:
    """The family's tiny model; norms and biases are random too, so that each one counts."""
    name, _, seed = _FAMILIES[family]
    torch.manual_seed(seed)
    model = getattr(transformers, f"{name}ForCausalLM")(config(family, **options)).eval()
    torch.manual_seed(seed + 1)
    for parameter_name, p in model.named_parameters():
        if p.dim() == 1:
            p.data.normal_(1 if "norm" in parameter_name else 0, 0.2)
    return model.to(device, dtype)


@attrs.frozen(eq=False)
class Said:
    """Tokens of a greedy generation `[1, length]`, and its logits `[steps, 1, V]`."""

    tokens: Tensor
    logits: Tensor

    def error(self, stock: Said) -> float:
        """The largest error of a logit, as a share of stock's largest."""
        return ((self.logits - stock.logits).abs().max() / stock.logits.abs().max()).item()

    @property
    def gap(self) -> float:
        """The least distance of the two best logits of a step, as a share of the largest."""
        best = self.logits.topk(2).values
        return ((best[..., 0] - best[..., 1]).min() / self.logits.abs().max()).item()


def say(model: Any, prompt: Tensor = PROMPT, new_tokens: int = NEW_TOKENS, **options: Any) -> Said:
    made = model.generate(
        prompt.to(model.device), max_new_tokens=new_tokens, do_sample=False,
        return_dict_in_generate=True, output_logits=True, **options,
    )  # fmt: skip
    return Said(made.sequences.cpu(), torch.stack(made.logits).cpu())
