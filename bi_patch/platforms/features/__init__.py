"""The feature table: what bi_patch serves and refuses on each platform, and what nobody tried.

README, docs and error texts come from this table. No other list says what bi_patch supports. `model` defines a row.
`engine` lists features that a user turns on, `families` lists models, `cards` devices, and `versions` vLLM releases.
"""
