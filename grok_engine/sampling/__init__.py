"""From logits to tokens: parameters, the sampler, structured outputs."""
