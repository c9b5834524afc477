"""The trainer's side: Hugging Face models with the sampler's bits."""
