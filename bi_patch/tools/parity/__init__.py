"""`bi-patch parity`: compares a trainer with its sampler, bit by bit, and shows where they part.

plan: what is sampled and trained. worker, child: one process that holds the sampler and the trainer. session, lines,
grpo: what is compared there. first: the first operation that differs. faults: planted faults. run, report: the result.
"""
