"""The bidirectional network, LLaDA's checkpoints and other masked predictors."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import save_file
from torch.nn.functional import linear, scaled_dot_product_attention, silu
from transformers import BertConfig, BertForMaskedLM

from diffusion_beds import random_network, whole
from loglik import InputError, Kind, load
from loglik.models.diffusion import BidirectionalLlama, MaskedDiffusionLM
from loglik.models.diffusion.network import llada_network


def test_every_token_sees_every_other():
    network = random_network().float()
    ids = torch.tensor([[0, 1, 2, 3, 1]])
    base = network(ids).logits
    for column in range(5):
        changed = ids.clone()
        changed[0, column] = (changed[0, column] + 1) % 4
        moved = (network(changed).logits - base).abs().amax(-1)[0]
        assert bool((moved > 1e-5).all()), column
    padded = torch.tensor([[0, 1, 2, 3, 1, 2, 2]])
    real = torch.tensor([[1, 1, 1, 1, 1, 0, 0]])
    assert torch.allclose(network(padded, attention_mask=real).logits[:, :5], base, atol=1e-4)


def test_attention_without_a_kernel_agrees():
    network = random_network().float()
    eager = BidirectionalLlama(network.config)
    eager.load_state_dict(network.state_dict())
    eager.set_attn_implementation("eager")
    ids = torch.tensor([[0, 1, 2, 3, 1]])
    assert torch.allclose(network(ids).logits, eager.eval()(ids).logits, atol=1e-3)


def test_a_saved_network_loads(tmp_path):
    network = random_network().float()
    network.save_pretrained(tmp_path)
    lm = load(tmp_path, device="cpu")
    assert isinstance(lm, MaskedDiffusionLM)
    assert lm.mask_token_id == 4
    assert lm.kind is Kind.LOWER_BOUND
    x = whole([[0, 1, 2]], prompt=1)
    assert torch.allclose(lm.log_prob(x).value, MaskedDiffusionLM(network).log_prob(x).value, atol=1e-6)
    assert load(tmp_path, device="cpu", estimator="left_to_right").kind is Kind.EXACT


# ---------------------------------------------------------------- LLaDA
SETTINGS = {
    "model_type": "llada",
    "architectures": ["LLaDAModelLM"],
    "d_model": 32,
    "n_heads": 4,
    "n_kv_heads": 2,
    "n_layers": 2,
    "mlp_hidden_size": 48,
    "vocab_size": 11,
    "embedding_size": 12,
    "mask_token_id": 10,
    "max_sequence_length": 64,
    "rope_theta": 500000.0,
    "rms_norm_eps": 1e-5,
    "weight_tying": False,
    "include_bias": False,
    "include_qkv_bias": False,
    "block_type": "llama",
    "activation_type": "silu",
    "layer_norm_type": "rms",
    "rope": True,
    "alibi": False,
}


def llada_weights(seed: int = 0) -> dict[str, torch.Tensor]:
    """Random tensors under LLaDA's names."""
    generator = torch.Generator().manual_seed(seed)

    def rand(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator) * 0.3

    out = {"model.transformer.wte.weight": rand(12, 32), "model.transformer.ff_out.weight": rand(12, 32)}
    out["model.transformer.ln_f.weight"] = 1 + rand(32)
    for n in range(2):
        block = f"model.transformer.blocks.{n}"
        for name, shape in (
            ("q_proj", (32, 32)),
            ("k_proj", (16, 32)),
            ("v_proj", (16, 32)),
            ("attn_out", (32, 32)),
            ("ff_proj", (48, 32)),
            ("up_proj", (48, 32)),
            ("ff_out", (32, 48)),
        ):
            out[f"{block}.{name}.weight"] = rand(*shape)
        for name in ("attn_norm", "ff_norm"):
            out[f"{block}.{name}.weight"] = 1 + rand(32)
    return out


def llada_by_hand(w: dict[str, torch.Tensor], ids: torch.Tensor) -> torch.Tensor:
    """LLaDA's forward pass in its own words: pre-norm blocks, rotary halves, SwiGLU, no causal mask."""

    def norm(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-5) * weight

    def rotated(x: torch.Tensor) -> torch.Tensor:
        steps = torch.arange(0, 8, 2) / 8
        angle = torch.arange(x.shape[2])[:, None] / 500000.0**steps
        angle = torch.cat([angle, angle], -1)
        half = torch.cat([-x[..., 4:], x[..., :4]], -1)
        return x * angle.cos() + half * angle.sin()

    def heads(x: torch.Tensor, count: int) -> torch.Tensor:
        return x.view(*x.shape[:2], count, 8).transpose(1, 2)

    x = w["model.transformer.wte.weight"][ids]
    for n in range(2):
        part = {k.split(".")[4]: v for k, v in w.items() if f".blocks.{n}." in k}
        y = norm(x, part["attn_norm"])
        q, k, v = (heads(linear(y, part[f"{c}_proj"]), h) for c, h in (("q", 4), ("k", 2), ("v", 2)))
        k, v = (t.repeat_interleave(2, 1) for t in (rotated(k), v))
        y = scaled_dot_product_attention(rotated(q), k, v)
        x = x + linear(y.transpose(1, 2).reshape(x.shape), part["attn_out"])
        y = norm(x, part["ff_norm"])
        x = x + linear(silu(linear(y, part["ff_proj"])) * linear(y, part["up_proj"]), part["ff_out"])
    return linear(norm(x, w["model.transformer.ln_f.weight"]), w["model.transformer.ff_out.weight"])


def save_llada(where, weights, **changes):
    where.mkdir(exist_ok=True)
    (where / "config.json").write_text(json.dumps(SETTINGS | changes))
    names = sorted(weights)
    for number, part in enumerate((names[: len(names) // 2], names[len(names) // 2 :])):
        save_file({name: weights[name] for name in part}, where / f"model-{number + 1:05d}-of-00002.safetensors")


def test_a_llada_checkpoint_gives_lladas_logits(tmp_path):
    weights = llada_weights()
    save_llada(tmp_path, weights)
    ids = torch.tensor([[1, 5, 10, 3, 10, 7]])
    network = llada_network(tmp_path, dtype=torch.float32).eval()
    assert torch.allclose(network(ids).logits, llada_by_hand(weights, ids), atol=1e-4)
    lm = load(tmp_path, device="cpu")
    assert isinstance(lm, MaskedDiffusionLM)
    assert lm.mask_token_id == 10
    assert lm.max_length == 64


def test_damaged_llada_checkpoints_are_refused(tmp_path):
    weights = llada_weights()
    lost = dict(list(weights.items())[1:])
    save_llada(tmp_path / "lost", lost)
    with pytest.raises(InputError, match="do not fit its configuration"):
        load(tmp_path / "lost")
    save_llada(tmp_path / "alibi", weights, alibi=True)
    with pytest.raises(InputError, match="alibi = True"):
        load(tmp_path / "alibi")
    save_llada(tmp_path / "cut", weights)
    whole_file = sorted((tmp_path / "cut").glob("*.safetensors"))[0]
    whole_file.write_bytes(whole_file.read_bytes()[:200])
    with pytest.raises(InputError, match="damaged or truncated"):
        load(tmp_path / "cut")


# ---------------------------------------------------------------- any masked language model
def test_a_bert_is_a_diffusion_model(tmp_path):
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=9,
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=32,
        max_position_embeddings=16,
    )
    network = BertForMaskedLM(config).double().eval()
    lm = MaskedDiffusionLM(network, mask_token_id=8)
    x = whole([[1, 2, 3, 4], [5, 6, 7]], prompt=1)
    assert lm.passes.trunk is not None
    got = lm.log_prob(x)
    bare = MaskedDiffusionLM(network, mask_token_id=8)
    bare.passes.trunk = None  # by all logits
    assert torch.allclose(got.value, bare.log_prob(x).value, atol=1e-10)
    network.float().save_pretrained(tmp_path)
    loaded = load(tmp_path, family="diffusion", mask_token_id=8, device="cpu", num_samples=3)
    assert loaded.num_samples == 3
    assert loaded.log_prob(x).stderr is not None
    with pytest.raises(InputError, match="needs a mask token"):
        load(tmp_path, family="diffusion", device="cpu")
    with pytest.raises(InputError, match="num_samples is an option of diffusion models"):
        load(tmp_path, num_samples=3, mask_token_id=8)
