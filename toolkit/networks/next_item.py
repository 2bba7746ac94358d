"""The next item of a sequence: a causal Transformer over the items before it.

This is SASRec (Kang and McAuley 2018: Self-Attentive Sequential Recommendation) as GPT-2's blocks have it: norms in
front of attention and feed-forward layers, learnt positions, and scores by the items' own embeddings.
"""

from __future__ import annotations

from typing import Any

import torch
from transformers import GPT2Config, GPT2LMHeadModel
from transformers.modeling_outputs import CausalLMOutputWithCrossAttentions

from toolkit.config import NextItemNetworkConfig
from toolkit.errors import ConfigError
from toolkit.sharing import once_a_node


class NextItemConfig(GPT2Config):  # type: ignore[misc]
    """Sizes of the network; `vocab_size` is the number of items and one more, for item 0 is padding."""

    model_type = "next_item"


class GPT2ForNextItem(GPT2LMHeadModel):  # type: ignore[misc]
    """GPT-2 whose tokens are items."""

    config_class = NextItemConfig

    def forward(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        last: torch.Tensor | None = None,
        **options: Any,
    ) -> CausalLMOutputWithCrossAttentions:
        """The scores of all items (B, L, items) as the next at each place, or (B, items) at the `last` (B,) of each."""
        if last is None:
            return super().forward(input_ids=input_ids, attention_mask=attention_mask, **options)
        hidden = self.transformer(input_ids, attention_mask=attention_mask, **options).last_hidden_state
        rows = torch.arange(len(last), device=last.device)
        return CausalLMOutputWithCrossAttentions(logits=self.lm_head(hidden[rows, last]))


def next_item_network(config: NextItemNetworkConfig, items: int, max_length: int, *, seed: int) -> GPT2ForNextItem:
    """A new network in fp32 on the CPU, drawn from `seed`, so that all ranks hold the same.

    Args:
        config: its sizes.
        items: that there are.
        max_length: items that it looks back on.
        seed: of its weights.

    Raises:
        ConfigError: sizes that do not go together.
    """
    if config.hidden_size % config.heads:
        raise ConfigError(
            f"--model.hidden_size {config.hidden_size} cannot be shared by {config.heads} heads",
            "Use a multiple of them.",
        )
    sizes = NextItemConfig(
        vocab_size=items + 1,
        n_positions=max_length,
        n_embd=config.hidden_size,
        n_layer=config.layers,
        n_head=config.heads,
        resid_pdrop=config.dropout,
        embd_pdrop=config.dropout,
        attn_pdrop=config.dropout,
        pad_token_id=0,
        bos_token_id=None,
        eos_token_id=None,
        use_cache=False,
    )

    def draw() -> GPT2ForNextItem:
        torch.manual_seed(seed)
        return GPT2ForNextItem(sizes)

    return once_a_node(repr((sizes.to_dict(), seed)), draw)
