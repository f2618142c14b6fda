"""A model small enough to decode in an interpreter.

2048 tokens are two blocks of the Gumbel sampling kernel, so that kernels meet more
than one block per row.
"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

SPECIAL_TOKENS = ("<pad>", "<s>", "</s>", "<unk>")
CHAT_TEMPLATE = (
    "{% for message in messages %}{{ message['role'] }}: {{ message['content'] }}\n"
    "{% endfor %}assistant:"
)


def write_model(
    path: str | Path,
    vocab_size: int = 2048,
    *,
    hidden_size: int = 64,
    layers: int = 2,
    heads: int = 2,
    kv_heads: int | Sequence[int] = 1,
    head_dim: int = 32,
    window: int | None = None,
    max_length: int = 2048,
    tokenizer: bool = False,
    weights: bool = False,
) -> Path:
    """Write a Qwen2-shaped model to ``path`` and return it.

    Args:
        path: A folder, made if it is not there.
        kv_heads: If they are not the same in each layer, its configuration has them as
            ``layer_kv_heads``, which no model of vLLM's asks for.
        window: Every layer but the first attends to so many tokens; the model is
            Llama-shaped then.
        weights: Add random weights under which a few tokens are likely. Without
            them load with ``load_format="dummy"``, where all tokens are equally
            likely to seven digits: enough to time a step, not to judge a sampler.
        tokenizer: Add one that has a token per byte, ids 4 to 259; what is left of
            the vocabulary are tokens that no text produces. Needed for text, bad
            words and structured outputs; otherwise pass ``skip_tokenizer_init``.
    """
    path = Path(path)
    path.mkdir(parents=True, exist_ok=True)
    layer_kv_heads = [kv_heads] * layers if isinstance(kv_heads, int) else [*kv_heads]
    config: dict[str, Any] = {
        "architectures": ["Qwen2ForCausalLM"],
        "model_type": "qwen2",
        "vocab_size": vocab_size,
        "hidden_size": hidden_size,
        "intermediate_size": 2 * hidden_size,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": max(layer_kv_heads),
        "head_dim": head_dim,
        "max_position_embeddings": max_length,
        "rms_norm_eps": 1e-6,
        "rope_theta": 10000.0,
        "hidden_act": "silu",
        "tie_word_embeddings": True,
        "torch_dtype": "bfloat16",
        "bos_token_id": 1,
        "eos_token_id": 2,
    }
    if len({*layer_kv_heads}) > 1:
        config["layer_kv_heads"] = layer_kv_heads
    if window is not None:
        config |= {
            **{"architectures": ["LlamaForCausalLM"], "model_type": "llama"},
            **{"attention_bias": False, "sliding_window": window},
            "layer_types": ["full_attention", *["sliding_attention"] * (layers - 1)],
        }
    (path / "config.json").write_text(json.dumps(config, indent=2))
    if tokenizer:
        _write_tokenizer(path, vocab_size)
    if weights:
        _write_weights(path, config, layer_kv_heads)
    return path


def _write_weights(
    path: Path, config: dict[str, Any], layer_kv_heads: Sequence[int]
) -> None:
    import numpy as np
    from safetensors.numpy import save_file

    random = np.random.default_rng(0)
    hidden, inner = config["hidden_size"], config["intermediate_size"]
    query = config["num_attention_heads"] * config["head_dim"]
    biases = config["model_type"] == "qwen2"

    def normal(rows: int, columns: int, gain: float = 1.0) -> Any:
        """Weights that keep the size of what they are multiplied with."""
        scale = gain / columns**0.5
        return random.normal(0, scale, (rows, columns)).astype(np.float32)

    # A gain of 2.4 is the standard deviation of the logits, also of the weight that
    # a token has in its own logit: small, or greedy decoding would repeat it forever.
    tensors = {"model.embed_tokens.weight": normal(config["vocab_size"], hidden, 2.4)}
    tensors["model.norm.weight"] = np.ones(hidden, np.float32)
    for index, kv_heads in enumerate(layer_kv_heads):
        key_value = kv_heads * config["head_dim"]
        layer = {
            "self_attn.q_proj.weight": normal(query, hidden),
            "self_attn.k_proj.weight": normal(key_value, hidden),
            "self_attn.v_proj.weight": normal(key_value, hidden),
            "self_attn.o_proj.weight": normal(hidden, query, 3.0),
            "mlp.gate_proj.weight": normal(inner, hidden),
            "mlp.up_proj.weight": normal(inner, hidden),
            "mlp.down_proj.weight": normal(hidden, inner, 3.0),
            "input_layernorm.weight": np.ones(hidden, np.float32),
            "post_attention_layernorm.weight": np.ones(hidden, np.float32),
        }
        if biases:
            for name, size in (("q", query), ("k", key_value), ("v", key_value)):
                layer[f"self_attn.{name}_proj.bias"] = np.zeros(size, np.float32)
        for name, tensor in layer.items():
            tensors[f"model.layers.{index}.{name}"] = tensor
    save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})


def _write_tokenizer(path: Path, vocab_size: int) -> None:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    tokens = [*SPECIAL_TOKENS, *sorted(pre_tokenizers.ByteLevel.alphabet())]
    tokens += [f"<unused{i}>" for i in range(vocab_size - len(tokens))]
    vocabulary = {token: i for i, token in enumerate(tokens)}
    byte_level = Tokenizer(
        models.BPE(vocab=vocabulary, merges=[], unk_token=SPECIAL_TOKENS[3])
    )
    byte_level.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    byte_level.decoder = decoders.ByteLevel()
    pad, bos, eos, unknown = SPECIAL_TOKENS
    fast: Any = PreTrainedTokenizerFast
    fast(
        tokenizer_object=byte_level,
        pad_token=pad,
        bos_token=bos,
        eos_token=eos,
        unk_token=unknown,
        chat_template=CHAT_TEMPLATE,
    ).save_pretrained(path)
