"""Weight shapes (N, K) of the linear layers of well-known models."""

from __future__ import annotations

from dataclasses import dataclass

GROUPS = (128, 32)
ROWS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 1024, 4096, 8192)


@dataclass(frozen=True)
class Shape:
    """One linear layer: ``N`` out features, ``K`` in features, and where it is from."""

    N: int
    K: int
    layer: str

    @property
    def name(self) -> str:
        """``"4096x14336"``, N by K."""
        return f"{self.N}x{self.K}"


CORE = (
    Shape(4096, 4096, "Llama 3.1 8B o_proj"),
    Shape(28672, 4096, "Llama 3.1 8B gate_up_proj"),
    Shape(4096, 14336, "Llama 3.1 8B down_proj"),
    Shape(21504, 5376, "Gemma 3 27B gate_proj or up_proj"),
    Shape(512, 2048, "Llama 3.2 1B k_proj"),
)
MODELS = (
    *CORE,
    Shape(6144, 4096, "Llama 3.1 8B qkv_proj"),
    Shape(16384, 2048, "Llama 3.2 1B gate_up_proj"),
    Shape(2048, 8192, "Llama 3.2 1B down_proj"),
    Shape(10240, 8192, "Llama 3.1 70B qkv_proj"),
    Shape(57344, 8192, "Llama 3.1 70B gate_up_proj"),
    Shape(8192, 28672, "Llama 3.1 70B down_proj"),
    Shape(5376, 21504, "Gemma 3 27B down_proj"),
    Shape(24576, 4096, "Qwen3 8B gate_up_proj"),
    Shape(4096, 12288, "Qwen3 8B down_proj"),
)
SETS = {"core": CORE, "models": MODELS}
