"""A Llama whose tokens see each other in both directions, and LLaDA's checkpoints as one.

LLaDA (arXiv 2502.09992) is this architecture under other names of its tensors: a Llama without the causal mask. Its own
repository asks for code of its own to be run; here its weights are renamed and no foreign code runs.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.dataclasses import strict
from safetensors import SafetensorError, safe_open
from transformers import LlamaConfig, LlamaForCausalLM

from loglik.errors import InputError

__all__ = ["BidirectionalLlama", "BidirectionalLlamaConfig", "llada_network"]


@strict
class BidirectionalLlamaConfig(LlamaConfig):  # type: ignore[no-untyped-call]
    """A `LlamaConfig` for masked prediction; `mask_token_id` is part of the vocabulary and never predicted."""

    model_type = "loglik_bidirectional_llama"

    mask_token_id: int | None = None
    is_causal: bool = False  # asks transformers for attention masks without an order


class BidirectionalLlama(LlamaForCausalLM):  # type: ignore[no-untyped-call]
    """Logits (B, T, V) of every token given all tokens of its row."""

    config_class = BidirectionalLlamaConfig

    def __init__(self, config: BidirectionalLlamaConfig) -> None:
        super().__init__(config)
        for layer in self.model.layers:
            layer.self_attn.is_causal = False  # what attention kernels go by where they are given no mask

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """As `LlamaForCausalLM`, without a cache: later tokens change earlier ones."""
        kwargs["use_cache"] = False
        return super().forward(*args, **kwargs)


_BLOCK = {
    "attn_norm": "input_layernorm",
    "q_proj": "self_attn.q_proj",
    "k_proj": "self_attn.k_proj",
    "v_proj": "self_attn.v_proj",
    "attn_out": "self_attn.o_proj",
    "ff_norm": "post_attention_layernorm",
    "ff_proj": "mlp.gate_proj",
    "up_proj": "mlp.up_proj",
    "ff_out": "mlp.down_proj",
}
_OUTSIDE = {"wte": "model.embed_tokens", "ln_f": "model.norm", "ff_out": "lm_head"}


def llada_network(where: Path, *, dtype: torch.dtype) -> BidirectionalLlama:
    """The network in a directory that holds a LLaDA checkpoint (config.json of ``model_type: llada``, safetensors).

    Raises:
        InputError: for an architecture that LLaDA's settings allow and its models do not use, or weights that are
            damaged or do not fit.
    """
    config = _llada_config(json.loads((where / "config.json").read_text(encoding="utf-8")), str(where))
    files = sorted(where.glob("*.safetensors"))
    if not files:
        raise InputError(f"directory {str(where)!r} has no weights (safetensors)")
    weights: dict[str, torch.Tensor] = {}
    for file in files:
        try:
            with safe_open(file, framework="pt") as opened:
                for name in opened.keys():  # noqa: SIM118 - a handle, no mapping
                    weights[_renamed(name)] = opened.get_tensor(name).to(dtype)
        except SafetensorError as error:
            raise InputError(f"the weights in {file} are damaged or truncated ({error}); copy them again") from None
    if config.tie_word_embeddings:
        weights.setdefault("lm_head.weight", weights.get("model.embed_tokens.weight", torch.empty(0)))
    network: Any = BidirectionalLlama(config)
    network = network.to(dtype)
    try:
        network.load_state_dict(weights, strict=True)
    except RuntimeError as error:
        reason = " ".join(str(error).split())[:200]
        raise InputError(f"the weights in {str(where)!r} do not fit its configuration ({reason})") from None
    loaded: BidirectionalLlama = network
    return loaded


def _llada_config(found: dict[str, Any], source: str) -> BidirectionalLlamaConfig:
    expected = {
        "block_type": ("llama",),
        "activation_type": ("silu", "swiglu"),
        "layer_norm_type": ("rms",),
        "rope": (True,),
        "alibi": (False,),
        "include_bias": (False,),
        "attention_layer_norm": (False,),
        "scale_logits": (False,),
        "input_emb_norm": (False,),
    }
    for name, allowed in expected.items():
        if name in found and found[name] not in allowed:
            raise InputError(f"{source!r} has {name} = {found[name]!r}, which LLaDA's released models do not use")
    width, heads = int(found["d_model"]), int(found["n_heads"])
    return BidirectionalLlamaConfig(
        vocab_size=int(found.get("embedding_size") or found["vocab_size"]),
        hidden_size=width,
        intermediate_size=int(found.get("mlp_hidden_size") or found.get("mlp_ratio", 4) * width),
        num_hidden_layers=int(found["n_layers"]),
        num_attention_heads=heads,
        num_key_value_heads=int(found.get("n_kv_heads") or heads),
        max_position_embeddings=int(found.get("max_sequence_length", 4096)),
        rope_parameters={"rope_type": "default", "rope_theta": float(found.get("rope_theta", 10000.0))},
        rms_norm_eps=float(found.get("rms_norm_eps", 1e-5)),
        attention_bias=bool(found.get("include_qkv_bias", False)),
        tie_word_embeddings=bool(found.get("weight_tying", False)),
        mask_token_id=found.get("mask_token_id"),
        bos_token_id=found.get("bos_token_id"),
        eos_token_id=found.get("eos_token_id"),
        pad_token_id=found.get("pad_token_id"),
    )


def _renamed(name: str) -> str:
    """LLaDA's name of a tensor in Llama's words; an unknown name stays, so that loading refuses it."""
    block = re.fullmatch(r"model\.transformer\.blocks\.(\d+)\.(\w+)\.(weight|bias)", name)
    if block is not None and block[2] in _BLOCK:
        return f"model.layers.{block[1]}.{_BLOCK[block[2]]}.{block[3]}"
    outside = re.fullmatch(r"model\.transformer\.(\w+)\.(weight|bias)", name)
    if outside is not None and outside[1] in _OUTSIDE:
        return f"{_OUTSIDE[outside[1]]}.{outside[2]}"
    return name
