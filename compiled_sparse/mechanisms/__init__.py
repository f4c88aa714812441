"""The built-in mechanisms; importing registers them, as an installed package's would be."""

from __future__ import annotations

from compiled_sparse.mechanisms import sage_sla
from compiled_sparse.mechanisms import sla
from compiled_sparse.mechanisms import sta
from compiled_sparse.mechanisms import swba
from compiled_sparse.mechanisms import vmoba
from compiled_sparse.mechanisms import vsa
from compiled_sparse.registry import register

register(sage_sla.MECHANISM)
register(sla.MECHANISM)
register(sta.MECHANISM)
register(swba.MECHANISM)
register(vmoba.MECHANISM)
register(vsa.MECHANISM)
