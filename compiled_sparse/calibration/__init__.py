"""Which windows, which sparsity: measured layer by layer on the user's own calls.

    from compiled_sparse import calibration

`measure` and `recording` compare candidates with dense attention inside the compiled model, `fit`
makes a policy of what was measured, and the functions for strategies of sliding tile attention read
and write the published files. See docs/calibration.md.
"""

from __future__ import annotations

from compiled_sparse.calibration.by_density import ErrorsByDensity
from compiled_sparse.calibration.by_density import errors_by_density
from compiled_sparse.calibration.captured import capture
from compiled_sparse.calibration.captured import measure_captured
from compiled_sparse.calibration.fit import Fit
from compiled_sparse.calibration.fit import fit
from compiled_sparse.calibration.mask_search import MaskSearch
from compiled_sparse.calibration.mask_search import average
from compiled_sparse.calibration.mask_search import read_mask_searches
from compiled_sparse.calibration.measurements import CallKey
from compiled_sparse.calibration.measurements import Measurements
from compiled_sparse.calibration.measurements import SiteErrors
from compiled_sparse.calibration.results import load_measurements
from compiled_sparse.calibration.results import save_measurements
from compiled_sparse.calibration.run import Call
from compiled_sparse.calibration.run import Recording
from compiled_sparse.calibration.run import measure
from compiled_sparse.calibration.run import recording
from compiled_sparse.calibration.search import full_window_of
from compiled_sparse.calibration.search import mask_searches
from compiled_sparse.calibration.strategy import Strategy
from compiled_sparse.calibration.tuning import parse_candidates
from compiled_sparse.calibration.tuning import select_windows
from compiled_sparse.calibration.tuning import tune
from compiled_sparse.calibration.tuning import tune_cfg

__all__ = [
    "Call",
    "CallKey",
    "ErrorsByDensity",
    "Fit",
    "MaskSearch",
    "Measurements",
    "Recording",
    "SiteErrors",
    "Strategy",
    "average",
    "capture",
    "errors_by_density",
    "fit",
    "full_window_of",
    "load_measurements",
    "mask_searches",
    "measure",
    "measure_captured",
    "parse_candidates",
    "read_mask_searches",
    "recording",
    "save_measurements",
    "select_windows",
    "tune",
    "tune_cfg",
]
