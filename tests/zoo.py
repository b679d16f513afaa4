"""Tiny random models of every family, and tokenizers made on the spot: nothing is fetched."""

from __future__ import annotations

import torch
import transformers as tf
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

SMALL = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
ROTARY = {**SMALL, "num_key_value_heads": 1, "max_position_embeddings": 64, "head_dim": 8}
IDS = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}

CAUSAL = {
    "gpt2": lambda v: tf.GPT2LMHeadModel(
        tf.GPT2Config(vocab_size=v, n_embd=16, n_layer=2, n_head=2, n_positions=64, **IDS)
    ),
    "gpt_neox": lambda v: tf.GPTNeoXForCausalLM(
        tf.GPTNeoXConfig(vocab_size=v, **SMALL, max_position_embeddings=64, **IDS)
    ),
    "opt": lambda v: tf.OPTForCausalLM(
        tf.OPTConfig(
            vocab_size=v,
            hidden_size=16,
            ffn_dim=24,
            num_hidden_layers=2,
            num_attention_heads=2,
            max_position_embeddings=64,
            word_embed_proj_dim=16,
            **IDS,
        )
    ),
    "llama": lambda v: tf.LlamaForCausalLM(tf.LlamaConfig(vocab_size=v, **ROTARY, **IDS)),
    "mistral": lambda v: tf.MistralForCausalLM(tf.MistralConfig(vocab_size=v, sliding_window=4, **ROTARY, **IDS)),
    "qwen2": lambda v: tf.Qwen2ForCausalLM(tf.Qwen2Config(vocab_size=v, **ROTARY, **IDS)),
    "qwen3": lambda v: tf.Qwen3ForCausalLM(tf.Qwen3Config(vocab_size=v, **ROTARY, **IDS)),
    "gemma2": lambda v: tf.Gemma2ForCausalLM(
        tf.Gemma2Config(vocab_size=v, sliding_window=4, final_logit_softcapping=3.0, **ROTARY, **IDS)
    ),
    "gemma3": lambda v: tf.Gemma3ForCausalLM(tf.Gemma3TextConfig(vocab_size=v, sliding_window=4, **ROTARY, **IDS)),
    "mamba": lambda v: tf.MambaForCausalLM(
        tf.MambaConfig(vocab_size=v, hidden_size=16, state_size=4, num_hidden_layers=2, **IDS)
    ),
}
# Architectures with a head or a way through the network of their own, apart so that the tables above keep their time.
MORE_CAUSAL = {
    "cohere": lambda v: tf.CohereForCausalLM(
        tf.CohereConfig(vocab_size=v, **SMALL, logit_scale=0.3, max_position_embeddings=64, **IDS)
    ),
    "granite": lambda v: tf.GraniteForCausalLM(
        tf.GraniteConfig(vocab_size=v, **SMALL, logits_scaling=3.0, max_position_embeddings=64, **IDS)
    ),
    "phi": lambda v: tf.PhiForCausalLM(tf.PhiConfig(vocab_size=v, **SMALL, max_position_embeddings=64, **IDS)),
    "bloom": lambda v: tf.BloomForCausalLM(tf.BloomConfig(vocab_size=v, hidden_size=16, n_layer=2, n_head=2, **IDS)),
    "gptj": lambda v: tf.GPTJForCausalLM(
        tf.GPTJConfig(vocab_size=v, n_embd=16, n_layer=2, n_head=2, n_positions=64, rotary_dim=4, **IDS)
    ),
    "falcon": lambda v: tf.FalconForCausalLM(
        tf.FalconConfig(vocab_size=v, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, **IDS)
    ),
    "qwen3_moe": lambda v: tf.Qwen3MoeForCausalLM(
        tf.Qwen3MoeConfig(vocab_size=v, **ROTARY, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=8, **IDS)
    ),
    # A sliding window that its attention is told by masks alone.
    "phimoe": lambda v: tf.PhimoeForCausalLM(
        tf.PhimoeConfig(
            vocab_size=v,
            **{k: x for k, x in ROTARY.items() if k != "head_dim"},
            sliding_window=16,
            num_local_experts=2,
            num_experts_per_tok=1,
            **IDS,
        )
    ),
    "llama4": lambda v: tf.Llama4ForCausalLM(
        tf.Llama4TextConfig(
            vocab_size=v, **ROTARY, intermediate_size_mlp=24, num_local_experts=2, attention_chunk_size=16, **IDS
        )
    ),
    "phi3_longrope": lambda v: tf.Phi3ForCausalLM(
        tf.Phi3Config(
            vocab_size=v,
            **{k: x for k, x in ROTARY.items() if k != "head_dim"},
            original_max_position_embeddings=8,
            rope_parameters={
                "rope_type": "longrope",
                "rope_theta": 1e4,
                "short_factor": [1.0] * 4,
                "long_factor": [2.0] * 4,
                "original_max_position_embeddings": 8,
            },
            **IDS,
        )
    ),
    # Convolution beside attention: neighbours in a packed row leak into one another.
    "lfm2": lambda v: tf.Lfm2ForCausalLM(
        tf.Lfm2Config(
            vocab_size=v,
            **SMALL,
            num_key_value_heads=1,
            layer_types=["conv", "full_attention"],
            conv_L_cache=3,
            max_position_embeddings=64,
            **IDS,
        )
    ),
}
SEQ2SEQ = {
    "t5": lambda v: tf.T5ForConditionalGeneration(
        tf.T5Config(
            vocab_size=v, d_model=16, d_kv=8, d_ff=24, num_layers=2, num_heads=2, decoder_start_token_id=0, **IDS
        )
    ),
    "bart": lambda v: tf.BartForConditionalGeneration(
        tf.BartConfig(
            vocab_size=v,
            d_model=16,
            encoder_layers=2,
            decoder_layers=2,
            encoder_attention_heads=2,
            decoder_attention_heads=2,
            encoder_ffn_dim=24,
            decoder_ffn_dim=24,
            max_position_embeddings=64,
            decoder_start_token_id=2,
            **IDS,
        )
    ),
}
MASKED = {
    "bert": lambda v: tf.BertForMaskedLM(tf.BertConfig(vocab_size=v, **SMALL, max_position_embeddings=64)),
    "roberta": lambda v: tf.RobertaForMaskedLM(
        tf.RobertaConfig(vocab_size=v, **SMALL, max_position_embeddings=66, pad_token_id=1, bos_token_id=0)
    ),
}


def build(make, vocabulary: int = 50, seed: int = 0, gain: float = 4.0):
    """A random model in evaluation mode, with weights large enough that its predictions differ."""
    torch.manual_seed(seed)
    model = make(vocabulary).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() >= 2:
                parameter.mul_(gain)
    return model


CORPUS = ["hello world. The answer is 42, wer Answer é 漢字 yes yes, it is so. ñandú the then there"] * 20
END = "<|endoftext|>"


def byte_level_tokenizer(*, bos: bool = True, trim_offsets: bool = True, vocab_size: int = 330):
    """GPT-2-style byte-level BPE, with the offset trimming that hides straddled boundaries."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=trim_offsets)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    tokenizer.train_from_iterator(
        CORPUS,
        trainers.BpeTrainer(
            vocab_size=vocab_size, initial_alphabet=alphabet, special_tokens=[END], show_progress=False
        ),
    )
    special = {"bos_token": END, "eos_token": END} if bos else {"eos_token": END}
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special)


def llama_tokenizer():
    """SentencePiece-style BPE with byte fallback and a BOS that the tokenizer adds itself."""
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    special = ["<unk>", "<s>", "</s>", *(f"<0x{i:02X}>" for i in range(256))]
    tokenizer.train_from_iterator(
        CORPUS, trainers.BpeTrainer(vocab_size=330, special_tokens=special, show_progress=False)
    )
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", unk_token="<unk>", add_bos_token=True
    )


def t5_tokenizer():
    """Unigram with Metaspace and an end token after every text."""
    tokenizer = Tokenizer(models.Unigram())
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    special = ["<pad>", "</s>", "<unk>"]
    tokenizer.train_from_iterator(
        CORPUS,
        trainers.UnigramTrainer(vocab_size=80, special_tokens=special, unk_token="<unk>", show_progress=False),
    )
    tokenizer.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="</s>", pad_token="<pad>", unk_token="<unk>")


def bert_tokenizer():
    """WordPiece between [CLS] and [SEP]; white space belongs to no token."""
    tokenizer = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer()
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece()
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    tokenizer.train_from_iterator(
        CORPUS, trainers.WordPieceTrainer(vocab_size=70, special_tokens=special, show_progress=False)
    )
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        cls_token="[CLS]",
        sep_token="[SEP]",
        mask_token="[MASK]",
        pad_token="[PAD]",
        unk_token="[UNK]",
    )
