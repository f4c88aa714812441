"""The cost model of sequence parallelism against numbers computed by hand."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from benchmarks import sequence_parallelism
from compiled_sparse.distributed.cost import balance
from compiled_sparse.distributed.cost import least_sent_bytes
from compiled_sparse.distributed.cost import two_levels
from compiled_sparse.distributed.cost import ulysses
from compiled_sparse.distributed.cost_inputs import Cluster
from compiled_sparse.distributed.cost_inputs import Layer
from compiled_sparse.distributed.cost_inputs import layer_of
from compiled_sparse.presets import geometry

PAGE = Path(__file__).resolve().parents[2] / "docs" / "sequence_parallelism.md"

# One vector is 10 bytes. Rates are round: 1 TFLOP/s, 1000 bytes/s inside and 100 between.
LAYER = Layer(video_tokens=80, heads=4, key_heads=4, head_dim=5)
PAIR = Cluster(
    gpus=2,
    gpus_per_node=2,
    inside_bytes_per_s=1000.0,
    between_bytes_per_s=100.0,
    link_efficiency=0.5,
    collective_s=0.25,
    attention_tflops=1.0,
    product_tflops=1.0,
)
FOUR = replace(PAIR, gpus=4)


def test_two_ranks_send_what_has_to_be_sent() -> None:
    # q, k, v: 40 tokens x 2 heads x 3; output: 40 tokens x 2 heads. 320 vectors.
    cost = ulysses(LAYER, PAIR)
    assert cost.sent_bytes == 3200
    assert cost.least_bytes == 3200
    assert cost.exchange_s == pytest.approx(2400 / 500 + 0.25 + 800 / 500 + 0.25)
    # 80 x 80 pairs x 2 heads x 4 x 5 operations
    assert cost.attention_s == pytest.approx(256_000e-12)
    assert cost.communication_s == cost.exchange_s


def test_one_rank_sends_nothing() -> None:
    cost = ulysses(LAYER, replace(PAIR, gpus=1))
    assert (cost.sent_bytes, cost.least_bytes, cost.exchange_s) == (0, 0, 0.0)
    assert cost.communication_share == 0.0


def test_the_slower_kind_of_link_takes_the_time_of_an_exchange() -> None:
    # To each of 3 ranks: 20 tokens x 1 head x 3, and 20 back; 2 of the 3 are in the other node.
    cost = ulysses(LAYER, FOUR)
    assert cost.sent_bytes == 3 * (60 + 20) * 10
    assert cost.exchange_s == pytest.approx(2 * (600 + 200) / 50 + 2 * 0.25)
    fast = ulysses(LAYER, replace(FOUR, between_bytes_per_s=1e6))
    assert fast.exchange_s == pytest.approx((600 + 200) / 500 + 2 * 0.25)


def test_text_is_not_sent_but_its_output_goes_to_everyone() -> None:
    cost = ulysses(replace(LAYER, text_tokens=6), PAIR)
    assert cost.sent_bytes == 3200 + 6 * 2 * 10
    assert cost.least_bytes == 3200 + 6 * 2 * 10
    assert cost.attention_s == pytest.approx(86 * 86 * 2 * 20e-12)


def test_fewer_key_heads_send_less() -> None:
    # q 80, k and v of one head of two 40 each, output 80 vectors.
    cost = ulysses(replace(LAYER, key_heads=2), PAIR)
    assert cost.sent_bytes == 2400
    assert cost.least_bytes == 2400


def test_a_key_head_of_several_ranks_is_sent_to_each() -> None:
    layer = replace(LAYER, key_heads=1)
    cost = ulysses(layer, FOUR)
    assert cost.sent_bytes == 3 * (20 * 3 + 20) * 10  # as with a key head for every rank
    assert cost.least_bytes == cost.sent_bytes


def test_the_published_size_sends_what_the_formula_says() -> None:
    model = geometry("wan2.1-t2v-14b")
    layer = layer_of(model, model.grid_thw(81, 720, 1280))
    cost = ulysses(layer, Cluster(gpus=8))
    assert cost.sent_bytes == 4 * 75_600 * 40 * 128 * 2 * 7 // 64
    assert cost.least_bytes == cost.sent_bytes
    # 4 x 75600^2 x 5 heads x 128 at 643.11 TFLOP/s
    assert cost.attention_s == pytest.approx(0.022751, rel=1e-4)
    # 9450 tokens x (2 x (6 x 5120^2 + 2 x 5120 x 13824) + 4 x 512 x 5120) at 600 TFLOP/s
    assert cost.other_s == pytest.approx(0.0095787, rel=1e-4)


@pytest.mark.parametrize(
    ("heads", "key_heads", "ranks", "used"),
    [
        (40, 40, 8, 1.0),
        (40, 40, 16, 40 / 48),
        (40, 40, 64, 40 / 64),
        (24, 24, 32, 0.75),
        (12, 4, 3, 12 / 18),
    ],
)
def test_balance_is_of_the_busiest_rank(
    heads: int, key_heads: int, ranks: int, used: float
) -> None:
    layer = replace(LAYER, heads=heads, key_heads=key_heads)
    assert balance(layer, ranks) == pytest.approx(used)
    one, many = (ulysses(layer, replace(FOUR, gpus_per_node=n, gpus=n)) for n in (1, ranks))
    assert one.attention_s / many.attention_s == pytest.approx(ranks * used)


def test_more_ranks_than_heads_make_attention_no_faster() -> None:
    wide = [ulysses(LAYER, replace(FOUR, gpus=gpus)) for gpus in (4, 8)]
    assert wide[0].attention_s == wide[1].attention_s
    assert wide[1].other_s == pytest.approx(wide[0].other_s / 2)


@pytest.mark.parametrize("ranks", [2, 3, 5, 8, 40])
def test_nobody_sends_less_than_the_least_where_all_send_the_same(ranks: int) -> None:
    layer = replace(LAYER, heads=40, key_heads=40, video_tokens=ranks * 6, text_tokens=7)
    cost = ulysses(layer, replace(PAIR, gpus=ranks, gpus_per_node=ranks))
    least = least_sent_bytes(layer, ranks)
    assert cost.sent_bytes >= least - 1e-6
    if 40 % ranks == 0:
        assert cost.sent_bytes == pytest.approx(least)


def test_density_shortens_attention_and_not_what_is_sent() -> None:
    dense = ulysses(LAYER, PAIR)
    sparse = ulysses(replace(LAYER, density=0.1, sparse_efficiency=0.8), PAIR)
    assert sparse.attention_s == pytest.approx(dense.attention_s / 8)
    assert (sparse.sent_bytes, sparse.exchange_s) == (dense.sent_bytes, dense.exchange_s)
    assert sparse.communication_share > dense.communication_share


def test_a_ring_passes_keys_and_values_of_the_other_nodes() -> None:
    cost = two_levels(LAYER, FOUR)
    # 40 tokens of a node, two heads of a GPU, k and v, one turn to the other node.
    assert cost.passed_bytes == 40 * 2 * 2 * 10
    assert cost.passed_s == pytest.approx(1600 / 50 + 0.25)
    # Inside the node as two ranks with half of the tokens; attention as four of equal work.
    assert cost.sent_bytes == 1600
    assert cost.exchange_s == pytest.approx(1200 / 500 + 400 / 500 + 0.5)
    assert cost.attention_s == pytest.approx(40 * 80 * 2 * 20e-12)
    assert cost.communication_s == pytest.approx(cost.exchange_s + cost.passed_s - cost.attention_s)


def test_attention_hides_what_is_passed() -> None:
    slow = replace(FOUR, attention_tflops=1e-9)
    cost = two_levels(LAYER, slow)
    assert cost.attention_s > cost.passed_s
    assert cost.communication_s == cost.exchange_s


def test_a_window_passes_what_is_in_reach() -> None:
    eight_nodes = replace(FOUR, gpus=16)
    # 10 tokens of a node; reach of 3 on both sides, then of more than all there is.
    assert two_levels(LAYER, eight_nodes, reach_tokens=3).passed_bytes == 6 * 2 * 2 * 10
    everything = two_levels(LAYER, eight_nodes).passed_bytes
    assert everything == 70 * 2 * 2 * 10
    assert two_levels(LAYER, eight_nodes, reach_tokens=1000).passed_bytes == everything
    # With two nodes there is a neighbour on one side only.
    assert two_levels(LAYER, FOUR, reach_tokens=3).passed_bytes == 3 * 2 * 2 * 10


def test_one_node_needs_no_second_level() -> None:
    assert two_levels(LAYER, PAIR) == ulysses(LAYER, PAIR)


def test_text_and_tokens_of_a_model_are_told_apart() -> None:
    model = geometry("hunyuanvideo")
    layer = layer_of(model, model.grid_thw())
    assert (layer.video_tokens, layer.text_tokens) == (33 * 45 * 80, 256)
    assert layer.other_flops_per_token == 2 * model.block_parameters


def test_the_page_shows_the_table_that_the_model_gives() -> None:
    rows = [line.strip("| ").split(" | ") for line in PAGE.read_text("utf-8").splitlines()]
    shown = [tuple(row) for row in rows if len(row) == len(sequence_parallelism.TITLES)]
    assert shown[0] == sequence_parallelism.TITLES
    assert shown[2:] == sequence_parallelism.rows()


def test_the_benchmark_says_that_it_is_a_model(capsys: pytest.CaptureFixture[str]) -> None:
    sequence_parallelism.main()
    first, *_, last = capsys.readouterr().out.splitlines()
    assert "MODEL" in first
    assert "not measured" in first
    assert last == f"| {' | '.join(sequence_parallelism.rows()[-1])} |"
