"""Attention masks that provably say which keys are padding, and what becomes of them."""

from __future__ import annotations

import operator
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx
from torch._subclasses.fake_tensor import FakeTensor

from compiled_sparse.passes.fx import example_value
from compiled_sparse.passes.fx import hint
from compiled_sparse.passes.fx import op_name
from compiled_sparse.passes.fx import same
from compiled_sparse.passes.fx import shape_of
from compiled_sparse.passes.layouts import Refusal
from compiled_sparse.passes.mask_analysis import RULES
from compiled_sparse.passes.mask_forms import KEY
from compiled_sparse.passes.mask_forms import QUERY
from compiled_sparse.passes.mask_forms import MaskForm
from compiled_sparse.passes.mask_forms import find_form
from compiled_sparse.passes.mask_nodes import NodeWriter
from compiled_sparse.passes.mask_nodes import can_be_written
from compiled_sparse.passes.mask_nodes import write_content
from compiled_sparse.passes.sites import Site
from compiled_sparse.passes.writes import is_trusted


@dataclass(frozen=True)
class KeyMask:
    """A proven mask as nodes in front of its site.

    Args:
        keys: bool [batch, key length], True where a key is attended; None where all are.
        queries: bool [batch or 1, query length], False where the output is zero; None where
            no query is left out.
    """

    keys: fx.Node | None = None
    queries: fx.Node | None = None


def key_mask_of(site: Site) -> MaskForm | Refusal | None:
    """Prove that a site's mask is key padding, perhaps with padded queries.

    Args:
        site: The call.

    Returns:
        The form, the refusal, or None where the call has no mask.
    """
    if site.arguments["attn_mask"] is None:
        return None
    mask = site.tensor("attn_mask")
    seen = f"{mask.dtype} mask of shape {tuple(hint(size) for size in mask.shape)}"
    if mask.requires_grad:
        return Refusal("mask_unsupported", f"{seen}: it is learned")
    query, key = site.tensor("query"), site.tensor("key")
    if not isinstance(query, FakeTensor):
        return Refusal("mask_unsupported", f"{seen}: inside a function transform")
    if query.dim() != 4 or key.dim() != 4 or not same(query.shape[0], key.shape[0]):
        return Refusal("mask_unsupported", f"{seen}: batches of queries and keys differ")
    full = (key.shape[0], query.shape[1], query.shape[2], key.shape[2])
    form = find_form(site.mask, mask.dtype, mask.shape, full)
    return form if isinstance(form, MaskForm) else Refusal("mask_unsupported", f"{seen}: {form}")


def insert_key_mask(site: Site, form: MaskForm | None) -> KeyMask:
    """Insert the nodes for a proven mask in front of a site.

    The tensors the mask was made of are read where the graph has them, so that the mask itself,
    which may be as large as the scores, is not needed any more.

    Args:
        site: The call.
        form: What `key_mask_of` says.

    Returns:
        The nodes.
    """
    if form is None or form.hides_nothing:
        return KeyMask()
    writer = _writer(site)
    contents = [content for content in (form.keys, form.queries) if content is not None]
    if all(can_be_written(content, site.node.graph) for content in contents):
        keys, queries = (
            None if content is None else write_content(writer, content, dim)
            for content, dim in ((form.keys, KEY), (form.queries, QUERY))
        )
    else:
        keys, queries = _read_from_mask(writer, site.arguments["attn_mask"], form)
    if keys is not None and form.keeps_empty:
        some = writer.call(torch.any, keys, -1, True)
        keys = writer.call(operator.or_, keys, writer.call(torch.logical_not, some))
    if keys is not None:
        keys = writer.expanded(keys, site.arguments["key"], (0, 2))
    return KeyMask(keys, queries)


def blank_padded_queries(site: Site, mask: KeyMask, out: fx.Node) -> fx.Node:
    """Give queries the mask leaves without a key the zeros dense attention gives them.

    Args:
        site: The call.
        mask: Its mask.
        out: [batch, heads, length, head_dim], computed with the key mask alone.

    Returns:
        The output: `out` itself, or a node inserted in front of the site.
    """
    if mask.queries is None:
        return out
    writer = _writer(site)
    index = (slice(None), None, slice(None), None)
    condition = writer.call(operator.getitem, mask.queries, index)
    return writer.call(torch.where, condition, out, 0.0)


def slim_dense_mask(site: Site) -> None:
    """Drop or shrink the mask of a call that stays dense, where the result is provably the same.

    Args:
        site: The call; its arguments are edited.
    """
    form = key_mask_of(site)
    if not isinstance(form, MaskForm) or site.arguments["dropout_p"] != 0.0:
        return
    if form.hides_nothing:
        _set_mask(site, None)
        return
    mask = site.tensor("attn_mask")
    if all(same(size, 1) for size in mask.shape[:-1][-2:]):
        return
    if mask.dtype != torch.bool and form.queries is None:
        first = (slice(None), slice(0, 1), slice(0, 1))[4 - mask.dim() :]
        _set_mask(site, _writer(site).call(operator.getitem, site.arguments["attn_mask"], first))
        return
    slim = insert_key_mask(site, form)
    writer = _writer(site)
    index = (slice(None), None, None, slice(None))
    small = writer.call(operator.getitem, slim.keys, index)
    if slim.queries is not None:
        _blank_behind(site, slim)
    _set_mask(site, small)


def _blank_behind(site: Site, mask: KeyMask) -> None:
    """Blank padded queries behind a dense call."""
    users = list(site.node.users)
    behind = NodeWriter(site.node.next, site.tensor("query"))  # type: ignore[arg-type]
    index = (slice(None), None, slice(None), None)
    condition = behind.call(operator.getitem, mask.queries, index)
    out = behind.call(torch.where, condition, site.node, 0.0)
    for user in users:
        user.replace_input_with(site.node, out)


def _set_mask(site: Site, mask: fx.Node | None) -> None:
    old, node = site.arguments["attn_mask"], site.node
    if "attn_mask" in node.kwargs:
        node.kwargs = {**node.kwargs, "attn_mask": mask}
    else:
        node.args = (*node.args[:3], mask, *node.args[4:])
    site.arguments["attn_mask"] = mask
    erase_unused(old)


def erase_unused(node: fx.Node) -> None:
    """Erase a mask nobody reads any more, and what was computed for it alone.

    A write is a reader too, so that nothing with an effect is erased.
    """
    if node.users or op_name(node) not in RULES or not is_trusted(node):
        return
    inputs = node.all_input_nodes
    node.graph.erase_node(node)
    for each in inputs:
        erase_unused(each)


def _read_from_mask(
    writer: NodeWriter, mask: fx.Node, form: MaskForm
) -> tuple[fx.Node, fx.Node | None]:
    """Read the key mask off the mask itself, the only tensor at hand."""
    if example_value(mask).dtype != torch.bool:
        mask = writer.call(torch.eq, mask, 0)
    shape = shape_of(mask) or ()
    index: Any = (*(None,) * (4 - len(shape)), *(slice(None),) * len(shape))
    mask = writer.call(operator.getitem, mask, index)
    if form.queries is None:
        return writer.call(operator.getitem, mask, (slice(None), 0, 0)), None
    plane = writer.call(operator.getitem, mask, (slice(None), 0))
    return writer.call(torch.any, plane, -2), writer.call(torch.any, plane, -1)


def _writer(site: Site) -> NodeWriter:
    query = site.tensor("query")
    assert isinstance(query, FakeTensor)
    return NodeWriter(site.node, query)
