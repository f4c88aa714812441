"""Which config a site gets, and why."""

from __future__ import annotations

import re

import pytest
import torch

import compiled_sparse as cs
from compiled_sparse.config import Auto
from compiled_sparse.config import MechanismConfig
from compiled_sparse.layout import BlockLayout
from compiled_sparse.layout import auto_tile
from compiled_sparse.pattern import effective_width
from compiled_sparse.pattern import sta_density
from compiled_sparse.reasons import REASONS
from compiled_sparse.selector import AUTO_MIN_GAIN
from compiled_sparse.selector import Chosen
from compiled_sparse.selector import PolicySources
from compiled_sparse.selector import Refused
from compiled_sparse.selector import SiteFacts
from compiled_sparse.selector import choose
from compiled_sparse.selector import needs_static_grid
from compiled_sparse.selector import requested
from compiled_sparse.selector import tensors_supported

WAN = (21, 30, 52)


def test_the_policy_is_asked_by_path_and_its_silence_means_dense() -> None:
    policy = cs.Policy({"blocks.*": cs.STA()})
    assert requested(policy, "blocks.3.attn1").config == cs.STA()
    assert requested(policy, "head").config == cs.Dense()


def test_force_outranks_environment_outranks_module_outranks_options_outranks_auto() -> None:
    named = {n: cs.Policy({"*": cs.STA(window_thw=(n, 1, 1))}) for n in (1, 3, 5, 7)}
    site = SiteFacts("blocks.0", module=named[3])
    ranked = [
        ("force", 7, PolicySources(named[1], forced=named[7], environment=named[5]), site),
        ("environment", 5, PolicySources(named[1], environment=named[5]), site),
        ("module", 3, PolicySources(named[1]), site),
        ("options", 1, PolicySources(named[1]), SiteFacts("blocks.0")),
    ]
    for origin, window, sources, facts in ranked:
        wanted = requested(sources, facts)
        assert (wanted.origin, wanted.policy) == (origin, named[window])
        assert wanted.config == cs.STA(window_thw=(window, 1, 1))
    assert requested(PolicySources(), SiteFacts("blocks.0")).origin == "auto"


def test_a_policy_that_outranks_others_and_has_no_rule_still_decides() -> None:
    sources = PolicySources(cs.Policy({"*": "sta"}), forced=cs.Policy({"head": "sta"}))
    wanted = requested(sources, SiteFacts("blocks.0"))
    assert (wanted.config, wanted.origin) == (cs.Dense(), "force")


@pytest.mark.parametrize("tiles", range(1, 12))
def test_the_exact_level_lists_every_block(tiles: int) -> None:
    (_, auto), *_ = cs.quality("exact").rules
    chosen = choose(auto, (tiles, 8 * tiles, 8), 3, 4, 2)
    assert isinstance(chosen, Chosen)
    assert chosen.density == 1.0


@pytest.mark.parametrize(("grid", "distinct"), [(WAN, 3), ((41, 90, 160), 4)], ids=str)
def test_the_levels_are_ever_sparser(grid: tuple[int, ...], distinct: int) -> None:
    densities = []
    for level in ("exact", "careful", "balanced", "fast"):
        chosen = choose(cs.quality(level).rules[0][1], grid, 0, 0, 12)
        assert isinstance(chosen, Chosen)
        densities.append(chosen.density)
    assert densities == sorted(densities, reverse=True)
    assert len(set(densities)) == distinct  # few tiles leave few windows to choose from


def test_a_named_mechanism_is_honoured_at_any_size() -> None:
    chosen = choose(cs.STA(), (2, 2, 2), 0, 0, 3)
    assert isinstance(chosen, Chosen)
    assert chosen.config == cs.STA()
    assert chosen.density == 1.0
    assert chosen.predicted_gain < 1.0


def test_a_choice_carries_the_counted_density_and_the_gain_that_follows() -> None:
    config = cs.STA(window_thw=(1, 3, 3), tile_thw=(7, 5, 13))
    chosen = choose(config, WAN, 3, 100, 12)
    assert isinstance(chosen, Chosen)
    assert chosen.tile == (7, 5, 13)
    assert chosen.density == sta_density(BlockLayout(WAN, (7, 5, 13), 3, 100), config.windows)
    assert chosen.predicted_gain == pytest.approx(0.8 / chosen.density)


def test_an_automatic_tile_is_resolved_on_the_grid() -> None:
    chosen = choose(cs.STA(tile_thw="auto"), WAN, 0, 0, 12)
    assert isinstance(chosen, Chosen)
    assert chosen.tile == auto_tile(WAN)


@pytest.mark.parametrize(
    ("config", "grid", "heads", "reason"),
    [
        (cs.Dense(), WAN, 12, "policy_dense"),
        (cs.STA(), (30, 52), 12, "axes_mismatch"),
        (cs.STA(window_thw=((3, 3, 3),) * 2), WAN, 12, "heads_mismatch"),
        (Auto(), (5, 7, 3), 12, "too_short"),
        (Auto(), (2, 32, 32), 12, "no_gain"),
    ],
    ids=lambda value: value if isinstance(value, str) else None,
)
def test_a_call_that_cannot_take_the_config_is_refused(
    config: MechanismConfig, grid: tuple[int, ...], heads: int, reason: str
) -> None:
    refused = choose(config, grid, 0, 0, heads)
    assert isinstance(refused, Refused)
    assert refused.reason == reason
    assert reason in REASONS


def test_one_window_per_head_is_taken() -> None:
    assert isinstance(choose(cs.STA(window_thw=((3, 3, 3),) * 12), WAN, 0, 0, 12), Chosen)


@pytest.mark.parametrize("grid", [WAN, (13, 45, 80), (96, 96)], ids=str)
def test_automatic_mode_takes_odd_windows_and_promises_a_gain(grid: tuple[int, ...]) -> None:
    chosen = choose(Auto(), grid, 0, 0, 12)
    assert isinstance(chosen, Chosen)
    assert chosen.config.tile_thw == "auto"
    assert all(extent % 2 == 1 and extent >= 3 for extent in chosen.config.windows[0])
    assert chosen.predicted_gain >= AUTO_MIN_GAIN
    tiles = BlockLayout(grid, chosen.tile).tiles_per_axis
    widths = [effective_width(n, k) for n, k in zip(tiles, chosen.config.windows[0], strict=True)]
    assert widths != list(tiles)


def test_text_counts_towards_the_length_that_automatic_mode_wants() -> None:
    assert choose(Auto(), (10, 10, 10), 0, 0, 1) == Refused("too_short", "1000 tokens")
    refused = choose(Auto(), (10, 10, 10), 0, 1048, 1)
    assert isinstance(refused, Refused)
    assert refused.reason == "no_gain"
    assert re.fullmatch(r"predicted \d\.\d\dx, \d+\.\d\dx needed", refused.detail)


def test_only_what_depends_on_the_grid_needs_it_static() -> None:
    assert needs_static_grid(Auto())
    assert needs_static_grid(cs.STA(tile_thw="auto"))
    assert not needs_static_grid(cs.STA())
    assert not needs_static_grid(cs.Dense())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
def test_every_supported_dtype_passes(dtype: torch.dtype) -> None:
    q = torch.empty(1, 2, 30, 64, dtype=dtype)
    assert tensors_supported(q, q) is None


@pytest.mark.parametrize(
    ("query", "value", "reason"),
    [
        (torch.empty(2, 30, 64), torch.empty(2, 30, 64), "rank_unsupported"),
        (torch.empty(1, 2, 30, 64).int(), torch.empty(1, 2, 30, 64).int(), "dtype_unsupported"),
        (torch.empty(1, 2, 30, 513), torch.empty(1, 2, 30, 513), "head_dim_unsupported"),
        (torch.empty(1, 2, 30, 64), torch.empty(1, 2, 30, 32), "head_dim_unsupported"),
        (
            torch.empty(1, 2, 30, 64, device="meta"),
            torch.empty(1, 2, 30, 64, device="meta"),
            "device_unsupported",
        ),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_tensors_without_a_kernel_are_refused(
    query: torch.Tensor, value: torch.Tensor, reason: str
) -> None:
    refused = tensors_supported(query, value)
    assert isinstance(refused, Refused)
    assert refused.reason == reason
    assert reason in REASONS
