"""GPUs that a plan can be made for: what they reach at most, and in dense attention.

Nothing here was measured by this package. Peaks are those of data sheets: dense products of
bfloat16, summed in float32. The share of it that dense attention reaches is published or assumed.
"""

from __future__ import annotations

from dataclasses import dataclass

from compiled_sparse.errors import UnknownModelError


@dataclass(frozen=True, kw_only=True)
class Chip:
    """A GPU.

    Args:
        name: Its name here.
        peak_tflops: Dense bfloat16 products, in TFLOP/s, by the data sheet.
        attention_share: What dense attention of head size 128 reaches of it.
        source: Where the share is from.
        assumed: Whether the share is an assumption; else it is published for this chip.
    """

    name: str
    peak_tflops: float
    attention_share: float
    source: str
    assumed: bool

    @property
    def attention_tflops(self) -> float:
        """What dense attention reaches, in TFLOP/s."""
        return self.peak_tflops * self.attention_share

    def describe(self) -> str:
        """Return the chip in a line of text."""
        kind = "assumed" if self.assumed else "published"
        return (
            f"{self.name}: {self.peak_tflops:g} TFLOP/s by the data sheet, of which dense "
            f"attention reaches {self.attention_share:g} ({kind}: {self.source})"
        )


_CHIPS = (
    Chip(
        name="a100",
        peak_tflops=312.0,
        attention_share=0.6,
        source="a round figure for FlashAttention-2 on Ampere",
        assumed=True,
    ),
    Chip(
        name="rtx4090",
        peak_tflops=165.2,
        attention_share=0.9,
        source="below the 164 TFLOP/s that SpargeAttention's authors show for FlashAttention",
        assumed=True,
    ),
    Chip(
        name="l40s",
        peak_tflops=362.0,
        attention_share=0.6,
        source="as on the A100",
        assumed=True,
    ),
    Chip(
        name="h100",
        peak_tflops=989.4,
        attention_share=0.65,
        source="FlashAttention-3, forward, 638 to 648 TFLOP/s at 8k to 16k tokens",
        assumed=False,
    ),
    Chip(
        name="h200",
        peak_tflops=989.4,
        attention_share=0.65,
        source="the H100's, which has the same matrix units",
        assumed=True,
    ),
    Chip(
        name="b200",
        peak_tflops=2250.0,
        attention_share=0.7,
        source="FlashAttention-4's share on a chip of this class",
        assumed=True,
    ),
)

CHIPS: dict[str, Chip] = {each.name: each for each in _CHIPS}
"""The known chips by name."""


def chip(name: str) -> Chip:
    """Return a chip.

    Args:
        name: One of `CHIPS`, in any case.

    Raises:
        UnknownModelError: if the chip is not known.
    """
    found = CHIPS.get(name.strip().lower())
    if found is None:
        raise UnknownModelError(
            "this chip is not known",
            got=repr(name),
            expected="one of " + ", ".join(CHIPS),
            next_step="correct the name, or say what dense attention reaches in TFLOP/s",
        )
    return found
