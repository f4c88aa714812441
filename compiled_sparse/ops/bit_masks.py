"""Masks over the tokens of a sequence with one bit for a token."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from compiled_sparse.layout import ceil_div

WORD = 32
_OCTET = 8


def words_for(length: Any) -> Any:
    """Return how many words hold the bits of `length` tokens; it may be symbolic."""
    return ceil_div(length, WORD)


def pack_bits(mask: Tensor) -> Tensor:
    """Pack a mask [..., length] of bools into int32 [..., ceil(length / 32)].

    Bit i of word w is token 32 w + i; bits past the length are 0.
    """
    octets = F.pad(mask, (0, -mask.shape[-1] % WORD)).to(torch.uint8).unflatten(-1, (-1, _OCTET))
    places = torch.arange(_OCTET, device=mask.device, dtype=torch.uint8)
    # Eight bits at a time, and never wider: there are as many bits as pairs of query and chunk.
    octets = (octets << places).sum(-1, dtype=torch.uint8)
    words: Tensor = octets.contiguous().view(torch.int32)
    return words


def unpack_bits(words: Tensor, length: int) -> Tensor:
    """Return bools [..., length] of what `pack_bits` packed."""
    places = torch.arange(WORD, device=words.device, dtype=torch.int32)
    bits = ((words[..., None] >> places) & 1).flatten(-2)
    return bits.narrow(-1, 0, length).to(torch.bool)
