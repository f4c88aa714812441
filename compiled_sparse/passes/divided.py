"""Attention calls whose tokens are divided among processes: found, and given their exchanges.

Two ways lead here. A caller says so with `cs.metadata(mesh=...)`, of a model that knows nothing of
other processes: its calls attend to this rank's tokens and would be wrong if left alone. Or a model
brings its own Ulysses exchanges, which are recognised (`compiled_sparse.passes.ulysses`).
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import fx
from torch._subclasses.fake_tensor import FakeTensor

from compiled_sparse.config import Dense
from compiled_sparse.errors import DistributedError
from compiled_sparse.layout import Text
from compiled_sparse.metadata import LayoutMetadata
from compiled_sparse.passes.exchanges import can_travel_together
from compiled_sparse.passes.exchanges import put_around
from compiled_sparse.passes.fx import call
from compiled_sparse.passes.fx import hint
from compiled_sparse.passes.fx import same
from compiled_sparse.passes.layouts import Refusal
from compiled_sparse.passes.layouts import refuse_other_tokens
from compiled_sparse.passes.local_tokens import begins_at
from compiled_sparse.passes.local_tokens import is_of_split_tokens
from compiled_sparse.passes.local_tokens import shares_tokens
from compiled_sparse.passes.rings import Ring
from compiled_sparse.passes.rings import pretend
from compiled_sparse.passes.sites import Site
from compiled_sparse.passes.sites import find_sites
from compiled_sparse.passes.ulysses import replace_exchanges
from compiled_sparse.sharding import SequenceGroup
from compiled_sparse.sharding import run_length
from compiled_sparse.sharding import unpadded_runs


def divide(owner: fx.GraphModule, given: LayoutMetadata | None) -> list[fx.GraphModule]:
    """Put exchanges around the calls of a graph whose tokens are divided among processes.

    Args:
        owner: Graph module, edited; those nested in it, too.
        given: What `cs.metadata` says.

    Returns:
        The graph modules that changed and need recompiling.

    Raises:
        DistributedError: if tokens are said to be divided and a call that attends to this rank's
            alone cannot be given the others'.
    """
    edited = replace_exchanges(owner)
    if given is None or given.group is None or given.group.size == 1:
        return edited
    sites, others = find_sites(owner)
    run = run_length(given.num_video_tokens, given.group.size)
    for other in others:
        if other.self_length is not None and other.self_length >= run:
            raise _unproven(other.path, Refusal("other_attention", other.name))
    masks: dict[fx.Node, fx.Node] = {}
    for site in sites:
        if site.exchange is None and _is_divided(site, given, given.group):
            if given.group.is_ring:
                pretend(site.node, _ring(given, given.group))
            else:
                _divide(site, given, given.group, masks)
            edited.append(site.owner)
    return edited


def _is_divided(site: Site, given: LayoutMetadata, group: SequenceGroup) -> bool:
    """Whether a call attends among this rank's tokens.

    Raises:
        DistributedError: if it does in a form that no exchange can be put around, or there is no
            telling.
    """
    rows, keys = (hint(site.tensor(name).shape[-2]) for name in ("query", "key"))
    run, length = _local_lengths(given, group)
    if not site.is_self_length and shares_tokens(site, (run, length)):
        raise _unproven(site.path, Refusal("cross_attention", f"{keys} keys, {rows} queries"))
    if not site.is_self_length:
        return False
    if rows < run and is_of_split_tokens(site, run):
        raise _unproven(site.path, Refusal("partial_grid", f"{rows} of {run} tokens at a time"))
    if rows < run and rows - (length - run) not in unpadded_runs(given.num_video_tokens, group):
        return False  # of text
    # An exchange moves rows: which members of the batch attend to which is as the model has it.
    refusal = refuse_other_tokens(replace(site, has_one_batch=True))
    reason = None if refusal is None else refusal.reason
    if reason == "cross_attention" or (reason == "not_video" and rows != length):
        return False
    before = 0 if given.text is None else given.text.before
    if rows != length or not begins_at(site.query_track, run, before):
        raise _misfit(site, given, group, rows, run)
    obstacle = _obstacle(site) or refusal
    if obstacle is not None:
        raise _unproven(site.path, obstacle)
    if group.is_ring:
        _check_ring(site, given, group)
    return True


def _obstacle(site: Site) -> Refusal | None:
    """Return why no exchange can be put around a call, if none can."""
    tensors = [site.tensor(name) for name in ("query", "key", "value")]
    shapes = ", ".join(str(tuple(map(hint, each.shape))) for each in tensors)
    if not isinstance(tensors[0], FakeTensor) or tensors[0].dim() != 4:
        return Refusal("rank_unsupported", f"shapes {shapes}")
    if not can_travel_together(*(site.arguments[name] for name in ("query", "key", "value"))):
        return Refusal("head_dim_unsupported", f"shapes {shapes}")
    if not _is_key_mask(site):
        return Refusal("mask_unsupported", "a mask that differs between queries")
    return Refusal("causal", "is_causal=True") if site.arguments["is_causal"] else None


def _local_lengths(given: LayoutMetadata, group: SequenceGroup) -> tuple[int, int]:
    """This rank's tokens of the video, and of a sequence with its text."""
    run, text = run_length(given.num_video_tokens, group.size), given.text
    return run, run if text is None else text.before + run + text.after


def _is_key_mask(site: Site) -> bool:
    """Whether there is no mask, or one that is the same for all heads and queries."""
    if site.arguments["attn_mask"] is None:
        return True
    shape = site.tensor("attn_mask").shape
    is_whole = same(shape[-1], site.tensor("key").shape[2])
    return is_whole and all(same(size, 1) for size in shape[-3:-1])


def _misfit(
    site: Site, given: LayoutMetadata, group: SequenceGroup, rows: int, run: int
) -> DistributedError:
    whole, text = given.num_video_tokens, given.text or Text()
    if rows - text.before - text.after in unpadded_runs(whole, group):
        advice = "pad the tokens at the end to a multiple of the ranks, then divide them"
    elif rows >= whole:
        advice = "divide the tokens before the model, or leave out mesh="
    else:
        advice = (
            "say in cs.metadata(text=cs.Text(...)) how many text tokens each rank has, and where"
        )
    parts = " + ".join(str(hint(part.size)) for part in site.query_track)
    return DistributedError(
        f"cs.metadata says that tokens are divided, and {site.path or 'a call'} has others",
        got=f"{parts} tokens in the call, {given.text or 'no text'} given",
        expected=f"{run} tokens of the video ({whole} on {group.size} ranks), and the text's",
        next_step=advice,
    )


def _unproven(path: str, refusal: Refusal) -> DistributedError:
    return DistributedError(
        f"{path or 'a call'} attends to this rank's tokens only, and nothing can be put around it",
        got=f"{refusal.reason}: {refusal.detail}",
        expected="scaled_dot_product_attention [batch, heads, length, head_dim] among the tokens "
        "of one sequence, with a mask [batch, 1, 1, length] at most",
        next_step="leave out mesh= and divide the attention in the model, with "
        "compiled_sparse.distributed.DistributedAttention",
    )


def _divide(
    site: Site, given: LayoutMetadata, group: SequenceGroup, masks: dict[fx.Node, fx.Node]
) -> None:
    """Put exchanges around a call; `masks` has what was gathered for those before it."""
    query, key, value = (site.arguments[name] for name in ("query", "key", "value"))
    text = given.text
    around = (0, 0) if text is None else (text.before, text.after)
    users = list(site.node.users)
    mask = site.arguments["attn_mask"]
    if mask is not None:
        if mask not in masks:
            with site.node.graph.inserting_before(site.node):
                numbers = (group.name, group.size, given.num_video_tokens, *around)
                gather = torch.ops.compiled_sparse.gather_mask.default
                masks[mask] = call(gather, mask, *numbers)
        site.node.replace_input_with(mask, masks[mask])
    local = (query, key, value)
    out = put_around(site.node, local, group, given.num_video_tokens, around, grid=given.grid_thw)
    for user in users:
        user.replace_input_with(site.node, out)


def _check_ring(site: Site, given: LayoutMetadata, group: SequenceGroup) -> None:
    """Check that at least dense attention can go round."""
    if site.arguments["attn_mask"] is not None:
        raise _unproven(site.path, Refusal("mask_unsupported", "a mask, in a ring"))
    if site.arguments["dropout_p"] != 0.0:
        raise _unproven(site.path, Refusal("dropout", "dropout, in a ring"))
    refusal = _ring(given, group).refusal(Dense())
    if refusal is not None:
        raise _unproven(site.path, Refusal("ring_unsupported", refusal))


def _ring(given: LayoutMetadata, group: SequenceGroup) -> Ring:
    return Ring(group, given.grid_thw, given.text or Text())
