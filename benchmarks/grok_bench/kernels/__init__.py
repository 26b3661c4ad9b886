"""The kernels beside other people's, on one registry of problems: `grok-engine bench kernels`.

`problems` names what there is to compute, `cases` makes its data, `lineup` registers who computes it, `device` has the
clock and the ceilings, and `harness` times contestants in interleaved rounds.
"""
