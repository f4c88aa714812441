"""Which windows, which sparsity: measured layer by layer on the user's own calls.

    from compiled_sparse import calibration

`measure` and `recording` compare candidates with dense attention inside the compiled model, `fit`
makes a policy of what was measured, and the functions for strategies of sliding tile attention read
and write the published files. See docs/calibration.md.
"""
