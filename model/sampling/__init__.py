"""From logits to token ids: masks, bias, penalties, filters, one seeded draw, log-probabilities.

Knows rows of logits and what each row asks for; it does not know batches of requests, K/V or
text. Everything is arranged so that the result of a row is a function of that row alone, bit
for bit: sums over the vocabulary are taken over integers, which have no order, and ties are
broken by token id everywhere. `sampler.py` is the way in.
"""
