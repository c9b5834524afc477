"""The feature table: what bi_patch serves and refuses on each platform, and what nobody tried.

README, docs and error texts come from this table. No other list says what bi_patch supports. `model` defines a row, and
`table` joins all rows:

- `engine`: features that a user turns on, with the rows of `trainers`, `distributed`, `speculation`, `caches` and
  `model_kinds`; what these share is in `questions`;
- `pairs`, `beside`, `matrix`: features together (`beside`: images; `matrix`: what requests ask for);
- `quantization`: schemes (`quantized_*`: their cells, experts and ranks; `scheme_kinds`); `recurrent`, `images`,
  `families`: models; `cards`: devices; `versions`: vLLM releases;
- `configs`, `parallel`, `variables`: options and variables of vLLM that somebody has examined.
"""
