"""What of a decoder's `config.json` decides how much memory it takes, in training and in serving alike."""

from __future__ import annotations

from typing import Any, NamedTuple


class Shape(NamedTuple):
    """A decoder-only transformer: sizes in values, not bytes."""

    hidden: int
    intermediate: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    vocab: int
    tied: bool

    @classmethod
    def of(cls, config: dict[str, Any]) -> Shape:
        """Read a HF config (a multimodal one has its text model's under `text_config`)."""
        text = config.get("text_config", config)
        hidden, heads = text["hidden_size"], text["num_attention_heads"]
        return cls(
            hidden=hidden,
            intermediate=text.get("intermediate_size") or 4 * hidden,
            layers=text["num_hidden_layers"],
            heads=heads,
            kv_heads=text.get("num_key_value_heads") or heads,
            head_dim=text.get("head_dim") or hidden // heads,
            vocab=text["vocab_size"],
            tied=bool(text.get("tie_word_embeddings", config.get("tie_word_embeddings", False))),
        )

    @property
    def linear_parameters(self) -> int:
        """Parameters of the decoder's linear layers: what NF4 shrinks and LoRA adapts."""
        attention = self.hidden * self.head_dim * (2 * self.heads + 2 * self.kv_heads)
        return self.layers * (attention + 3 * self.hidden * self.intermediate)

    @property
    def embedding_parameters(self) -> int:
        """Parameters of the embedding and the LM head."""
        return self.vocab * self.hidden * (1 if self.tied else 2)

    def lora_parameters(self, rank: int) -> int:
        """Parameters of rank-`rank` adapters on all linear layers."""
        q, kv = self.heads * self.head_dim, self.kv_heads * self.head_dim
        sides = 2 * (self.hidden + q) + 2 * (self.hidden + kv) + 3 * (self.hidden + self.intermediate)
        return self.layers * rank * sides
