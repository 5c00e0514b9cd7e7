"""A small Llama with a byte-level tokenizer as a GGUF file, written as llama.cpp's converter
writes one."""

import gguf
import torch
from tokenizers import pre_tokenizers

from helpers import llm_fields
from owlfuse.model.llm import load_llm

CONTROL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<jupyter_start>"]
MERGES = ["Ġ Ġ", "Ċ Ċ"]
TOKENS = [
    *CONTROL,
    *sorted(pre_tokenizers.ByteLevel.alphabet()),
    *(merge.replace(" ", "") for merge in MERGES),
]
TEMPLATE = (
    "{% for m in messages %}{{'<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>' "
    "+ '\n'}}{% endfor %}"
)
NAMES = {
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    **{f"self_attn.{letter}_proj": f"attn_{letter}" for letter in "qkv"},
    "self_attn.o_proj": "attn_output",
    **{f"mlp.{name}_proj": f"ffn_{name}" for name in ("gate", "up", "down")},
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
}


def tiny_llm():
    """The model that the file holds."""
    return load_llm(
        len(TOKENS), config=llm_fields(tie_word_embeddings=True, max_position_embeddings=64)
    )


def write_gguf(path, llm, pre="smollm", leave_out=()):
    """Writes the model, its queries and keys in the order of llama.cpp's rotary embedding, and
    the tokenizer."""
    config = llm.config
    writer = gguf.GGUFWriter(str(path), "llama")
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(10000.0)
    writer.add_vocab_size(len(TOKENS))
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(pre)
    writer.add_token_list(TOKENS)
    writer.add_token_types([3] * len(CONTROL) + [1] * (len(TOKENS) - len(CONTROL)))
    writer.add_token_merges(MERGES)
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_unk_token_id(0)
    writer.add_pad_token_id(2)
    writer.add_chat_template(TEMPLATE)
    for name, tensor in llm.named_parameters():
        heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}.get(
            name.split(".")[-2]
        )
        if heads:
            tensor = (
                tensor.view(heads, 2, -1, tensor.shape[1]).transpose(1, 2).reshape(tensor.shape)
            )
        short = name.removesuffix(".weight")
        layer = short.split(".")[2] if short.startswith("model.layers.") else None
        short = NAMES[short.split(".", 3)[3] if layer else short]
        written = f"blk.{layer}.{short}.weight" if layer else f"{short}.weight"
        if written not in leave_out:
            writer.add_tensor(written, tensor.detach().to(torch.float32).contiguous().numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path
