"""The models of the demo, the tests and the benchmarks: made once from a recipe, and cached."""
