"""The parts of a model in PyTorch, sized by our configs: what `bench_torch` compares with.

Each function returns what is to be timed, by name. torch is imported inside, because only this
comparison needs it.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

from meteor_jax.models.eagle.model import MeteorConfig
from meteor_jax.models.encoders.convnext.model import ConvNextConfig
from meteor_jax.models.encoders.eva02.model import Eva02Config, rope_freqs

Steps = dict[str, Callable[[], Any]]
SDPA: dict[str, Any] = {"attn_implementation": "sdpa"}  # what no config of transformers declares


def encoder(model: MeteorConfig, name: str, *, dtype: str) -> Steps:
    """One encoder over a picture of its own size."""
    import torch

    torch.set_num_threads(os.cpu_count() or 1)
    config = model.encoder(name)
    make = {"clip": _clip, "convnext": _convnext, "eva02": _eva02, "pix2struct": _pix2struct}
    module, inputs = make[name](config)
    module = module.to(getattr(torch, dtype)).eval()
    inputs = {key: value.to(getattr(torch, dtype)) for key, value in inputs.items()}

    def run() -> None:
        with torch.inference_mode():
            module(**inputs)

    return {name: run}


def _clip(config: Any) -> tuple[Any, dict[str, Any]]:
    """transformers' tower, which has a CLS token beside the patches."""
    import torch
    from transformers import CLIPVisionConfig, CLIPVisionModel

    sizes = CLIPVisionConfig(
        hidden_size=config.width,
        intermediate_size=config.mlp_dim,
        num_hidden_layers=config.depth,
        num_attention_heads=config.num_heads,
        image_size=config.image_size,
        patch_size=config.patch_size,
        **SDPA,
    )
    return CLIPVisionModel(sizes), {"pixel_values": _pixels(torch, config.image_size)}


def _convnext(config: ConvNextConfig) -> tuple[Any, dict[str, Any]]:
    import torch
    from transformers import ConvNextConfig as Sizes
    from transformers import ConvNextModel

    sizes = Sizes(
        depths=list(config.depths), hidden_sizes=list(config.widths), num_stages=len(config.depths)
    )
    return ConvNextModel(sizes), {"pixel_values": _pixels(torch, config.image_size)}


def _pix2struct(config: Any) -> tuple[Any, dict[str, Any]]:
    """transformers' tower; its flattened patches begin with a row and a column."""
    import torch
    from transformers import Pix2StructVisionConfig, Pix2StructVisionModel

    sizes = Pix2StructVisionConfig(
        hidden_size=config.width,
        d_kv=config.width // config.num_heads,
        d_ff=config.mlp_dim,
        num_hidden_layers=config.depth,
        num_attention_heads=config.num_heads,
        patch_embed_hidden_size=3 * config.patch_size**2,
        seq_len=config.num_positions,
        dropout_rate=0.0,
        **SDPA,
    )
    places = torch.cartesian_prod(*(torch.arange(1.0, config.grid + 1),) * 2)
    patches = torch.randn(config.num_tokens, 3 * config.patch_size**2)
    return Pix2StructVisionModel(sizes), {
        "flattened_patches": torch.cat([places, patches], dim=-1)[None]
    }


def _pixels(torch: Any, size: int) -> Any:
    return torch.randn(1, 3, size, size)


def _eva02(config: Eva02Config) -> tuple[Any, dict[str, Any]]:
    """EVA-02, which transformers lacks: windowed and global blocks, rotary positions, SwiGLU."""
    import numpy as np
    import torch
    from torch import nn
    from torch.nn import functional

    width, heads, grid, window = config.width, config.num_heads, config.grid, config.window
    across = grid // window
    tables = {name: torch.tensor(np.asarray(x)) for name, x in rope_freqs(config).items()}

    def to_windows(x: Any) -> Any:
        x = x.view(-1, across, window, across, window, width).transpose(2, 3)
        return x.reshape(-1, window * window, width)

    def from_windows(x: Any) -> Any:
        x = x.view(-1, across, across, window, window, width).transpose(2, 3)
        return x.reshape(-1, grid * grid, width)

    class Block(nn.Module):
        def __init__(self, kind: str) -> None:
            super().__init__()
            self.kind = kind
            self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
            self.q, self.k = nn.Linear(width, width), nn.Linear(width, width, bias=False)
            self.v, self.out = nn.Linear(width, width), nn.Linear(width, width)
            self.gate = nn.Linear(width, config.mlp_dim)
            self.up = nn.Linear(width, config.mlp_dim)
            self.mlp_norm = nn.LayerNorm(config.mlp_dim)
            self.down = nn.Linear(config.mlp_dim, width)
            self.register_buffer("cos", tables[f"{kind}_cos"])
            self.register_buffer("sin", tables[f"{kind}_sin"])

        def turn(self, x: Any) -> Any:
            cos, sin = self.get_buffer("cos"), self.get_buffer("sin")
            pairs = torch.stack([-x[..., 1::2], x[..., ::2]], dim=-1).flatten(-2)
            return x * cos + pairs * sin

        def attend(self, x: Any) -> Any:
            q, k, v = (
                layer(x).view(*x.shape[:2], heads, -1).transpose(1, 2)
                for layer in (self.q, self.k, self.v)
            )
            mixed = functional.scaled_dot_product_attention(self.turn(q), self.turn(k), v)
            return self.out(mixed.transpose(1, 2).reshape(x.shape))

        def forward(self, x: Any) -> Any:
            hidden = self.norm1(x)
            if self.kind == "window":
                x = x + from_windows(self.attend(to_windows(hidden)))
            else:
                x = x + self.attend(hidden)
            hidden = self.norm2(x)
            hidden = functional.silu(self.gate(hidden)) * self.up(hidden)
            return x + self.down(self.mlp_norm(hidden))

    class Tower(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.patches = nn.Conv2d(3, width, config.patch_size, stride=config.patch_size)
            self.positions = nn.Parameter(0.02 * torch.randn(grid * grid, width))
            self.blocks = nn.Sequential(
                *(
                    Block("global" if index in config.global_blocks else "window")
                    for index in range(config.depth)
                )
            )

        def forward(self, pixel_values: Any) -> Any:
            x = self.patches(pixel_values).flatten(2).transpose(1, 2)
            return self.blocks(x + self.positions)

    return Tower(), {"pixel_values": _pixels(torch, config.image_size)}


def projector(model: MeteorConfig, *, dtype: str) -> Steps:
    """Two layers over the joined channels of all encoders."""
    import torch
    from torch import nn

    width = sum(model.encoder(name).width for name in model.encoders)
    module = nn.Sequential(
        nn.Linear(width, model.llama.width),
        nn.GELU(),
        nn.Linear(model.llama.width, model.llama.width),
    ).to(getattr(torch, dtype))
    x = torch.randn(1, model.grid**2, width, dtype=getattr(torch, dtype))

    def run() -> None:
        with torch.inference_mode():
            module(x)

    return {"projector": run}


def llm(
    model: MeteorConfig, *, num_visual: int, text_tokens: int, new_tokens: int, dtype: str
) -> Steps:
    """Prefill up to the first token, then the other tokens one by one with the cache."""
    import torch
    from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM

    config = model.llama
    sizes = LlamaConfig(
        hidden_size=config.width,
        intermediate_size=config.mlp_dim,
        num_hidden_layers=config.depth,
        num_attention_heads=config.num_heads,
        num_key_value_heads=config.num_kv_heads,
        vocab_size=config.vocab_size,
        max_position_embeddings=config.max_positions,
        **SDPA,
    )
    module = LlamaForCausalLM(sizes).to(getattr(torch, dtype)).eval()
    visual = torch.randn(1, num_visual, config.width, dtype=getattr(torch, dtype))
    question = torch.randint(config.vocab_size, (1, text_tokens))
    made: dict[str, Any] = {}

    def next_token(cache: Any, **inputs: Any) -> Any:
        out = module(**inputs, past_key_values=cache, use_cache=True, logits_to_keep=1)
        return out.logits[:, -1].argmax(-1, keepdim=True)

    def prefill() -> None:
        with torch.inference_mode():
            text, middle = module.model.embed_tokens(question), text_tokens // 2
            x = torch.cat([text[:, :middle], visual, text[:, middle:]], dim=1)
            cache = DynamicCache()
            made["prompt"] = (cache, next_token(cache, inputs_embeds=x))

    def decode() -> None:
        cache, token = made.pop("prompt")
        with torch.inference_mode():
            for _ in range(new_tokens - 1):
                token = next_token(cache, input_ids=token)

    return {"llm prefill": prefill, f"llm decode, {new_tokens - 1} steps": decode}
