"""The feature table: what is served, refused or untried on each platform; README, docs and errors are made of it.

`model` says what a row is; `engine` holds what a user turns on, `families` the models, `cards` the devices, `versions`
the vLLM releases. Nothing else lists what is supported.
"""
