"""The kernels beside other people's, on one registry of problems: `grok-engine bench kernels`.

`problems` says what there is to compute, `cases` makes the data of one, `contestants` holds who computes it, `device`
has the clock and the ceilings, and `harness` lets them race.
"""
