"""One video on several processes: each has a run of its tokens, the attention is sparse.

torchrun --nproc-per-node 2 examples/divided_video.py
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence

import torch
from moving_shapes._model import Block
from moving_shapes._processes import joined
from torch import Tensor
from torch import distributed
from torch import nn
from torch.distributed.device_mesh import init_device_mesh

import compiled_sparse as cs

GRID = (8, 12, 20)
DIM, HEADS = 96, 3


class Blocks(nn.Module):
    """Blocks of a video transformer, which know nothing of other processes."""

    def __init__(self, depth: int = 2) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Block(DIM, HEADS) for _ in range(depth))
        for block in self.blocks:
            nn.init.normal_(block.modulation.weight, std=0.1)

    def forward(self, tokens: Tensor, time: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """Return the tokens behind the last block, [batch, tokens, channels]."""
        for block in self.blocks:
            tokens = block(tokens, time, cos, sin)
        return tokens


def own_run(whole: Tensor, dim: int) -> Tensor:
    """Return this process's run of what belongs to tokens; the last one's is padded."""
    rank, size = distributed.get_rank(), distributed.get_world_size()
    run = -(-whole.shape[dim] // size)
    missing = run * size - whole.shape[dim]
    padding = whole.new_zeros([missing if i == dim else n for i, n in enumerate(whole.shape)])
    return torch.cat([whole, padding], dim).narrow(dim, rank * run, run)


def joined_runs(own: Tensor, length: int) -> Tensor:
    """Return the tokens of all processes."""
    runs = [torch.empty_like(own) for _ in range(distributed.get_world_size())]
    distributed.all_gather(runs, own.contiguous())
    return torch.cat(runs, 1)[:, :length]


def main(argv: Sequence[str] | None = None) -> float:
    """Compute on all processes and on one; return the relative error."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--policy", default="sta:window_thw=1x3x3,tile_thw=4x4x4")
    parser.add_argument("--ring", action="store_true", help="send keys round, divide no heads")
    parser.add_argument("--inner", default="inductor", help="who compiles; aot_eager starts sooner")
    arguments = parser.parse_args(argv)
    with joined() as device, torch.no_grad():
        torch.manual_seed(0)  # the same model and video everywhere
        model = Blocks().to(device)
        length = GRID[0] * GRID[1] * GRID[2]
        tokens, time = (torch.randn(1, n, DIM, device=device) for n in (length, 1))
        angles = torch.randn(length, DIM // HEADS // 2, device=device)
        name = "ring" if arguments.ring else "ulysses"
        size = distributed.get_world_size()
        mesh = init_device_mesh(device.type, (size,), mesh_dim_names=(name,))

        options = {"policy": arguments.policy, "inner": arguments.inner}
        compiled = torch.compile(model, backend="compiled_sparse", fullgraph=True, options=options)
        positions = (angles.cos(), angles.sin())
        with cs.metadata(grid_thw=GRID, mesh=mesh):
            own = [own_run(each, 0) for each in positions]
            run = compiled(own_run(tokens, 1), time[:, 0], *own)
        together = joined_runs(run, length)
        with cs.metadata(grid_thw=GRID):
            alone = compiled(tokens, time[:, 0], *positions)
            report = cs.explain(model, tokens, time[:, 0], *positions, policy=arguments.policy)
        error = ((together - alone).norm() / alone.norm()).item()
        if distributed.get_rank() == 0:
            print(f"{report.summary()}; {size} processes, relative error {error:.1e}")
    return error


if __name__ == "__main__":
    main()
