"""The trainer's side of on-policy reinforcement learning: logprobs with the sampler's bits, and their gradients."""
