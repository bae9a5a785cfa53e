"""Sizes of the layers of models, as their configurations publish them."""

from __future__ import annotations

import attrs


@attrs.frozen
class Model:
    """Sizes of one model.

    Attributes:
        hidden: hidden_size.
        intermediate: intermediate_size of the dense layers, or of one expert.
        heads, kv_heads, head_size, rot_dim: of what is rotated.
        vocab: vocab_size.
        experts, top_k: 0 where the model has no experts.
        linear: further or other weights than a plain attention layer has, `[N, K]`, by name.
    """

    hidden: int
    intermediate: int
    heads: int
    kv_heads: int
    head_size: int
    vocab: int
    rot_dim: int = 0
    experts: int = 0
    top_k: int = 0
    linear: dict[str, tuple[int, int]] | None = None

    def weights(self) -> dict[str, tuple[int, int]]:
        """N and K of the layers that fused_gemv runs; gate-up layers have SwiGLU."""
        if self.linear is not None:
            return self.linear
        wide = self.heads * self.head_size
        found = {
            "qkv": (wide + 2 * self.kv_heads * self.head_size, self.hidden),
            "o": (self.hidden, wide),
        }
        if not self.experts:
            found["gate-up"] = (2 * self.intermediate, self.hidden)
            found["down"] = (self.hidden, self.intermediate)
        return found


MODELS = {
    "llama-2-7b": Model(4096, 11008, 32, 32, 128, 32000),
    "llama-3-8b": Model(4096, 14336, 32, 8, 128, 128256),
    "llama-3-70b": Model(8192, 28672, 64, 8, 128, 128256),
    "gemma-3-27b": Model(
        hidden=5376,
        intermediate=21504,
        heads=32,
        kv_heads=16,
        head_size=128,
        vocab=262144,
        # Its gate has GELU where SwiGLU has SiLU, so the gate-up layer is left out.
        linear={"qkv": (8192, 5376), "o": (5376, 4096), "down": (5376, 21504)},
    ),
    "mixtral-8x7b": Model(4096, 14336, 32, 8, 128, 32000, experts=8, top_k=2),
    "qwen3-30b-a3b": Model(2048, 768, 32, 4, 128, 151936, experts=128, top_k=8),
    "qwen3.5-35b-a3b": Model(
        hidden=2048,
        intermediate=512,
        heads=16,
        kv_heads=2,
        head_size=256,
        vocab=248320,
        rot_dim=64,
        experts=256,
        top_k=8,
        # Three of four layers have linear attention; the shared expert is in all.
        linear={"o": (2048, 4096), "gate-up": (1024, 2048), "down": (2048, 512)},
    ),
    "deepseek-v3": Model(
        # Latent attention: 64 lanes of each query head and one shared key head are rotated.
        hidden=7168,
        intermediate=2048,
        heads=128,
        kv_heads=1,
        head_size=64,
        vocab=129280,
        experts=256,
        top_k=8,
        linear={
            "q-a": (1536, 7168),
            "q-b": (24576, 1536),
            "kv-a": (576, 7168),
            "o": (7168, 16384),
            "gate-up": (4096, 7168),  # the shared expert
            "down": (7168, 2048),
        },
    ),
}
