"""Models made of a configuration alone: the shapes that the engine benchmark runs.

Each is a folder with a ``config.json`` and nothing else, to be loaded with
``load_format="dummy"`` and ``skip_tokenizer_init``: vLLM fills in random weights,
always the same ones, so that the work of a step is that of the real model and nothing
has to be downloaded. The text is noise.
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

BYTES_PER_VALUE = 2  # bfloat16, of weights and KV cache alike


@dataclass(frozen=True)
class Model:
    """A model's shape.

    Attributes:
        name: What commands and results call it.
        source: Whose published configuration the values are.
        config: What its ``config.json`` holds.
    """

    name: str
    source: str
    config: dict[str, Any]

    @property
    def head_dim(self) -> int:
        """Width of an attention head."""
        heads: int = self.config["num_attention_heads"]
        width: int = self.config["hidden_size"]
        stated: int = self.config.get("head_dim", width // heads)
        return stated

    @property
    def kv_bytes_per_token(self) -> int:
        """Bytes of KV cache that a token takes, over all layers."""
        heads: int = self.config["num_key_value_heads"]
        layers: int = self.config["num_hidden_layers"]
        return 2 * layers * heads * self.head_dim * BYTES_PER_VALUE

    @property
    def parameters(self) -> int:
        """How many weights it has, input and output embedding counted once."""
        config = self.config
        width: int = config["hidden_size"]
        query = config["num_attention_heads"] * self.head_dim
        key_value = config["num_key_value_heads"] * self.head_dim
        attention = 2 * width * query + 2 * width * key_value
        if config["model_type"] == "qwen2":
            attention += query + 2 * key_value  # biases
        if config["model_type"] == "qwen3":
            attention += 2 * self.head_dim  # norms of query and key
        mlp = 3 * width * config["intermediate_size"]
        layer = attention + mlp + 2 * width
        total: int = (
            config["num_hidden_layers"] * layer + width + config["vocab_size"] * width
        )
        return total


def _qwen2(hidden: int, inner: int, layers: int, heads: int, kv: int) -> dict[str, Any]:
    return {
        "architectures": ["Qwen2ForCausalLM"],
        "model_type": "qwen2",
        "hidden_size": hidden,
        "intermediate_size": inner,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv,
        "vocab_size": 151936,
        "max_position_embeddings": 32768,
        "rope_theta": 1000000.0,
        "rms_norm_eps": 1e-6,
        "hidden_act": "silu",
        "attention_dropout": 0.0,
        "initializer_range": 0.02,
        "tie_word_embeddings": True,
        "use_sliding_window": False,
        "bos_token_id": 151643,
        "eos_token_id": 151645,
        "torch_dtype": "bfloat16",
    }


MODELS = {
    model.name: model
    for model in (
        Model(
            "tiny",
            "ours: small enough for an interpreter, of two blocks per row",
            _qwen2(64, 128, 2, 2, 1)
            | {
                **{"vocab_size": 2048, "head_dim": 32},
                **{"max_position_embeddings": 2048},
                **{"bos_token_id": 1, "eos_token_id": 2},
            },
        ),
        Model("qwen2.5-0.5b", "Qwen/Qwen2.5-0.5B", _qwen2(896, 4864, 24, 14, 2)),
        Model("qwen2.5-1.5b", "Qwen/Qwen2.5-1.5B", _qwen2(1536, 8960, 28, 12, 2)),
        Model(
            "qwen3-0.6b",
            "Qwen/Qwen3-0.6B",
            _qwen2(1024, 3072, 28, 16, 8)
            | {
                **{"architectures": ["Qwen3ForCausalLM"], "model_type": "qwen3"},
                **{"head_dim": 128, "attention_bias": False},
                **{"max_position_embeddings": 40960},
            },
        ),
        Model(
            "llama-3.2-1b",
            "meta-llama/Llama-3.2-1B",
            {
                "architectures": ["LlamaForCausalLM"],
                "model_type": "llama",
                "hidden_size": 2048,
                "intermediate_size": 8192,
                "num_hidden_layers": 16,
                "num_attention_heads": 32,
                "num_key_value_heads": 8,
                "head_dim": 64,
                "vocab_size": 128256,
                "max_position_embeddings": 131072,
                "rope_theta": 500000.0,
                "rope_scaling": {
                    **{"rope_type": "llama3", "factor": 32.0},
                    **{"low_freq_factor": 1.0, "high_freq_factor": 4.0},
                    "original_max_position_embeddings": 8192,
                },
                "rms_norm_eps": 1e-5,
                "hidden_act": "silu",
                "attention_bias": False,
                "mlp_bias": False,
                "initializer_range": 0.02,
                "tie_word_embeddings": True,
                "bos_token_id": 128000,
                "eos_token_id": 128001,
                "torch_dtype": "bfloat16",
            },
        ),
    )
}


def write(name: str, folder: Path) -> Path:
    """Write the model ``name`` below ``folder``, and return where it lies.

    Raises:
        KeyError: There is no such model.
    """
    path = folder / name
    path.mkdir(parents=True, exist_ok=True)
    text = json.dumps(MODELS[name].config, indent=1) + "\n"
    (path / "config.json").write_text(text)
    return path
