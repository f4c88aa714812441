"""Small random configurations of real models, with inputs and the truth about their attention."""

from __future__ import annotations

from builders import cogvideox as cogvideox
from builders import flux as flux
from builders import frames as frames
from builders import hunyuan as hunyuan
from builders import image as image
from builders import ltx as ltx
from builders import packed as packed
from builders import twins as twins
from builders import volume as volume
from builders import wan as wan
from builders.base import BUILDERS as BUILDERS
