"""`load`: a name or directory becomes a model with a likelihood."""

from __future__ import annotations

import json
from importlib import resources
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Literal

import torch
from huggingface_hub import snapshot_download
from safetensors import SafetensorError
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    AutoModelForSeq2SeqLM,
    AutoTokenizer,
    PreTrainedConfig,
)
from transformers.models.auto import modeling_auto

from loglik.errors import InputError
from loglik.models.causal import CausalLM
from loglik.models.diffusion.estimators import Estimator
from loglik.models.diffusion.lm import MaskedDiffusionLM
from loglik.models.diffusion.network import BidirectionalLlama, BidirectionalLlamaConfig, llada_network
from loglik.models.masked import MaskedLM
from loglik.models.ngram import NGramLM
from loglik.models.protocol import TextModel
from loglik.models.seq2seq import Seq2SeqLM
from loglik.progress import quiet_transformers

__all__ = ["DTYPES", "EMBEDDED", "Family", "embedded_directory", "load", "load_tokenizer"]

Family = Literal["causal", "seq2seq", "masked", "diffusion"]
EMBEDDED = ("tiny", "tiny-diffusion")
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16, "float64": torch.float64}

_AUTO = {
    "causal": AutoModelForCausalLM,
    "seq2seq": AutoModelForSeq2SeqLM,
    "masked": AutoModelForMaskedLM,
    "diffusion": AutoModelForMaskedLM,
}
_MAPPINGS: dict[Family, str] = {
    "causal": "MODEL_FOR_CAUSAL_LM_MAPPING_NAMES",
    "masked": "MODEL_FOR_MASKED_LM_MAPPING_NAMES",
    "seq2seq": "MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES",
}


def load(
    name_or_dir: str | Path,
    *,
    family: Family | None = None,
    dtype: str | torch.dtype = "float32",
    device: str | torch.device | None = None,
    pll: Literal["original", "within_word_l2r"] = "original",
    revision: str | None = None,
    estimator: Estimator | str | None = None,
    points: int | None = None,
    num_samples: int | None = None,
    target_stderr: float | None = None,
    mask_token_id: int | None = None,
) -> TextModel:
    """Load a model and its tokenizer.

    Args:
        name_or_dir: ``"tiny"`` or ``"tiny-diffusion"`` (shipped with the package), a directory written by
            `save_pretrained` (of a model, or of a PEFT adapter that names its base model), or the name of a repository
            on the model hub, which is downloaded unless it is cached.
        family: ``causal``, ``seq2seq``, ``masked`` or ``diffusion`` (a masked language model as an absorbing diffusion
            model); read from the configuration if not given.
        dtype: of the weights. Log-softmax and sums are float32 or better in any case.
        device: ``"cpu"``, ``"cuda"``, ...; a GPU if there is one.
        pll: which pseudo-log-likelihood a masked language model gives.
        revision: of a hub repository.
        estimator: of a diffusion model's likelihood, by object or name (`loglik.models.diffusion`); ``count`` if None.
        points: evaluations that one draw of the estimator spreads.
        num_samples: draws of the estimator; 16 if None.
        target_stderr: nats; draw on until a row's standard error is at most this.
        mask_token_id: of a diffusion model whose files do not name it.

    Raises:
        InputError: one sentence for a name that is nowhere, missing, truncated, pickled or incomplete weights, or an
            architecture without a language-model head.
    """
    chosen_dtype = _dtype(dtype)
    where = Path(str(name_or_dir)) if str(name_or_dir) not in EMBEDDED else embedded_directory(str(name_or_dir))
    is_local = where.is_dir()
    if where.is_file():
        raise InputError(f"model {str(name_or_dir)!r} is a file; give the directory that holds it")
    given = {
        "estimator": estimator,
        "points": points,
        "num_samples": num_samples,
        "target_stderr": target_stderr,
        "mask_token_id": mask_token_id,
    }
    diffusion: dict[str, Any] = {name: value for name, value in given.items() if value is not None}
    if is_local and (where / "loglik_ngram.json").is_file():
        _only_diffusion(diffusion)
        ngram: TextModel = NGramLM.from_pretrained(where)
        return ngram
    if is_local and (where / "adapter_config.json").is_file() and not (where / "config.json").is_file():
        return _adapted(where, family=family, dtype=dtype, device=device, revision=revision, **diffusion)
    source = str(where) if is_local else str(name_or_dir)
    config = _config(source, is_local=is_local, revision=revision)
    kind = family or _family(config, source)
    if kind != "diffusion":
        _only_diffusion(diffusion)
    if config.model_type == "llada":
        if not is_local:
            source = snapshot_download(source, revision=revision, allow_patterns=["*.safetensors", "*.json", "*.model"])
        model: Any = llada_network(Path(source), dtype=chosen_dtype)
    else:
        model = _weights(kind, source, config, chosen_dtype, is_local=is_local, revision=revision)
    target = torch.device(device) if device is not None else _default_device()
    model = model.to(target).eval()
    tokenizer = load_tokenizer(source, is_local=is_local, revision=revision)
    if kind == "causal":
        return CausalLM(model, tokenizer)
    if kind == "seq2seq":
        return Seq2SeqLM(model, tokenizer)
    if kind == "diffusion":
        return MaskedDiffusionLM(model, tokenizer, **diffusion)
    return MaskedLM(model, tokenizer, variant=pll)


def _only_diffusion(options: dict[str, Any]) -> None:
    """Refuse options that mean nothing for other models."""
    for name in options:
        raise InputError(f"{name} is an option of diffusion models, and this is none: leave it out")


def _adapted(
    where: Path, *, family: Family | None, dtype: Any, device: Any, revision: str | None, **options: Any
) -> TextModel:
    """The base model that an adapter names, with the adapter on it."""
    from peft import PeftModel

    try:
        named = json.loads((where / "adapter_config.json").read_text(encoding="utf-8"))["base_model_name_or_path"]
    except (OSError, KeyError, TypeError, json.JSONDecodeError) as error:
        raise InputError(f"the adapter in {where} has no readable configuration ({_first(error)})") from None
    if not named:
        raise InputError(f"the adapter in {where} does not name its base model; write it into adapter_config.json")
    base: Any = load(named, family=family, dtype=dtype, device=device, revision=revision, **options)
    try:
        network = PeftModel.from_pretrained(base.model, str(where)).eval()
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        raise InputError(f"the adapter in {where} does not fit its base model {named!r} ({_first(error)})") from None
    adapted: TextModel = base.on(network) if hasattr(base, "on") else type(base)(network, base.tokenizer)
    return adapted


def _dtype(dtype: str | torch.dtype) -> torch.dtype:
    if isinstance(dtype, torch.dtype):
        return dtype
    if dtype not in DTYPES:
        raise InputError(f"dtype must be one of {', '.join(DTYPES)}, got {dtype!r}")
    return DTYPES[dtype]


def _default_device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def embedded_directory(name: str) -> Path:
    """Where an embedded model lies.

    Raises:
        InputError: if its weights are missing.
    """
    path = Path(str(resources.files("loglik") / "models" / "embedded" / name))
    if not (path / "model.safetensors").is_file():
        raise InputError(f"the embedded model {name!r} is missing from this installation; reinstall loglik")
    return path


def _config(source: str, *, is_local: bool, revision: str | None) -> Any:
    if is_local and not (Path(source) / "config.json").is_file():
        raise InputError(f"directory {source!r} has no config.json, so it holds no model; give one with weights")
    try:
        with quiet_transformers():
            found, _ = PreTrainedConfig.get_config_dict(source, revision=revision)
            if found.get("model_type") == "llada":
                return SimpleNamespace(model_type="llada")  # what else it says, `llada_network` reads
            if found.get("model_type") == BidirectionalLlamaConfig.model_type:
                return BidirectionalLlamaConfig.from_pretrained(source, revision=revision or "main")
            return AutoConfig.from_pretrained(source, revision=revision, trust_remote_code=False)
    except (OSError, ValueError, KeyError, json.JSONDecodeError) as error:
        if is_local:
            raise InputError(f"the configuration in {source!r} cannot be used: {_first(error)}") from None
        raise InputError(
            f"model {source!r} is no embedded model ({', '.join(EMBEDDED)}), no directory, and could not be fetched "
            "from the hub; check the name and the network, or give a directory"
        ) from None


def _family(config: Any, source: str) -> Family:
    if config.model_type in ("llada", BidirectionalLlamaConfig.model_type):
        return "diffusion"
    names = list(config.architectures or [])
    for family, mapping in _MAPPINGS.items():
        known: set[str] = set()
        for value in getattr(modeling_auto, mapping).values():
            known.update([value] if isinstance(value, str) else value)
        if known.intersection(names):
            return "seq2seq" if config.is_encoder_decoder else family
    raise InputError(
        f"{source!r} holds {names[0] if names else 'an unnamed architecture'}, which is not known to have a "
        "language-model head; pass family if it has one"
    )


def _weights(
    family: Family, source: str, config: Any, dtype: torch.dtype, *, is_local: bool, revision: str | None
) -> Any:
    if is_local and not any(Path(source).glob("*.safetensors")):
        if any(Path(source).glob("*.bin")):
            raise InputError(f"{source!r} has only pickled weights (.bin), which are not loaded; save as safetensors")
        raise InputError(f"directory {source!r} has no weights (model.safetensors)")
    try:
        with quiet_transformers():  # its report on missing weights becomes the sentence below
            auto: Any = BidirectionalLlama if isinstance(config, BidirectionalLlamaConfig) else _AUTO[family]
            model, info = auto.from_pretrained(
                source,
                config=config,
                dtype=dtype,
                use_safetensors=True,
                output_loading_info=True,
                revision=revision,
                trust_remote_code=False,
            )
    except SafetensorError as error:
        raise InputError(f"the weights in {source!r} are damaged or truncated ({error}); copy them again") from None
    except (OSError, ValueError, RuntimeError, KeyError) as error:
        raise InputError(f"the weights of {source!r} cannot be loaded: {_first(error)}") from None
    missing = sorted(info["missing_keys"])
    mismatched = sorted(str(key[0]) if isinstance(key, tuple) else str(key) for key in info["mismatched_keys"])
    if missing or mismatched:
        bad = (missing or mismatched)[0]
        raise InputError(
            f"the weights of {source!r} do not fit its configuration ({len(missing)} tensors missing, "
            f"{len(mismatched)} of another shape, first {bad!r}); it would run on random numbers"
        )
    return model


def load_tokenizer(source: str, *, is_local: bool, revision: str | None) -> Any:
    """The tokenizer of a directory or a hub name; None for a directory without one.

    Raises:
        InputError: for one that cannot be loaded.
    """
    files = ("tokenizer.json", "tokenizer_config.json", "vocab.json", "vocab.txt", "spiece.model", "tokenizer.model")
    if is_local and not any((Path(source) / name).is_file() for name in files):
        return None
    try:
        with quiet_transformers():
            return AutoTokenizer.from_pretrained(source, revision=revision, trust_remote_code=False)
    except (OSError, ValueError, KeyError, json.JSONDecodeError) as error:
        raise InputError(f"the tokenizer of {source!r} cannot be loaded: {_first(error)}") from None


def _first(error: BaseException) -> str:
    """The first sentence of another library's message, on one line."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return (lines[0] if lines else type(error).__name__).rstrip(".")
