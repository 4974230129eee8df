"""How fast a card could be: bytes over its bandwidth, operations over its rate.

Of a model are counted its matrix products, the K/V that attention reads, and attention's own
products; whatever else a step does has to hide behind those.
"""

from dataclasses import dataclass

from model.config import ModelConfig


@dataclass(frozen=True, slots=True, kw_only=True)
class CardRates:
    """What a card was measured to do, in bytes and operations a second."""

    bytes_per_s: float
    flops_per_s: float  # of products in the dtype of the weights that are not fp8
    fp8_flops_per_s: float | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """The least time that steps of one model in one precision can take on a card.

    The embedding counts as the head where the two are tied, and not at all where they are not:
    a step looks up a few of its rows.
    """

    config: ModelConfig
    rates: CardRates
    layer_bytes: float  # of one parameter in the layers
    head_bytes: float  # and in the head
    kv_bytes_per_token: int

    @property
    def _layers(self) -> int:
        """Parameters of the layers' products."""
        c = self.config
        attention = 2 * c.hidden_size * (c.num_heads + c.num_kv_heads) * c.head_dim
        return c.num_layers * (attention + 3 * c.hidden_size * c.intermediate_size)

    @property
    def _head(self) -> int:
        return self.config.hidden_size * self.config.vocab_size

    @property
    def _attention(self) -> int:
        """Operations of one query with one key, and of its weight with one value."""
        return 4 * self.config.num_layers * self.config.num_heads * self.config.head_dim

    @property
    def _weights_bytes(self) -> float:
        return self._layers * self.layer_bytes + self._head * self.head_bytes

    def _products_s(self, num_tokens: float, num_logits: float, num_pairs: float) -> float:
        """Return the time of the operations; pairs are of a query and a key."""
        rates = self.rates
        is_fp8 = self.layer_bytes == 1 and rates.fp8_flops_per_s is not None
        layer_rate = rates.fp8_flops_per_s if is_fp8 else rates.flops_per_s
        assert layer_rate is not None
        others = 2 * num_logits * self._head + num_pairs * self._attention
        return 2 * num_tokens * self._layers / layer_rate + others / rates.flops_per_s

    def decode_s(self, batch: int, context: float) -> float:
        """Return the time of a step of so many sequences with so many tokens each on average."""
        num_bytes = self._weights_bytes + batch * context * self.kv_bytes_per_token
        products_s = self._products_s(batch, batch, batch * context)
        return max(num_bytes / self.rates.bytes_per_s, products_s)

    def prefill_s(self, num_tokens: int, batch: int = 1) -> float:
        """Return the time of so many prompts of so many tokens, up to their first tokens."""
        products_s = batch * self._products_s(num_tokens, 1, num_tokens * (num_tokens + 1) / 2)
        num_bytes = self._weights_bytes + batch * num_tokens * self.kv_bytes_per_token
        return max(num_bytes / self.rates.bytes_per_s, products_s)

    def whole_s(self, batch: int, num_prompt: int, num_output: int) -> float:
        """Return the time from the first prompt to the last token, prefill before decode."""
        decode_s = self.decode_s(batch, num_prompt + num_output / 2)
        return self.prefill_s(num_prompt, batch) + (num_output - 1) * decode_s
