"""What one training step moves, computes, launches and holds, counted on the meta device: no GPU, no weights.

    traffic   what each Triton kernel reads and writes, argument by argument: one table, ours and those we compare with
    recorder  books every operator and every launch while a step runs
    pretend   meta tensors pass for those of one chip, where code asks
    step      the model of a configuration, built as training builds it, and one step of it
    floor     what no implementation can avoid, from the dimensions alone
    ranks     one rank of several
    kept      the audit of a plan, and its place in the cache

torch is imported by the functions that run a step: ``floor`` and ``kept`` read and show without it.
"""
