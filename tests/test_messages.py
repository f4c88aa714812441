"""The wording of the errors of the leaves: what was wrong, got, expected, and what to do next.

A raise statement without a case here fails `test_every_error_has_a_case_for_its_wording`.
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from dataclasses import replace
from importlib.metadata import EntryPoint
from pathlib import Path
from typing import Any
from typing import ClassVar

import calibration_cases
import distributed_cases
import measuring_cases
import pytest
import torch
from messages import Case
from messages import assert_wording
from messages import raise_statements
from messages import raised_at
from modules import TinyDiT
from modules import dit_inputs

import compiled_sparse as cs
from compiled_sparse import cli
from compiled_sparse import errors
from compiled_sparse import registry
from compiled_sparse.checkpoints import load_with_gates
from compiled_sparse.checkpoints import to_diffusers
from compiled_sparse.chips import chip
from compiled_sparse.cli import entry
from compiled_sparse.cli import explain as explain_command
from compiled_sparse.cli.compilers import InnerCompilerError
from compiled_sparse.cli.compilers import require_inductor
from compiled_sparse.cli.tune import tune_tiles
from compiled_sparse.config import Auto
from compiled_sparse.config import MechanismConfig
from compiled_sparse.config import parse_spec
from compiled_sparse.environment import _parse
from compiled_sparse.guard import Finding
from compiled_sparse.guard import report_findings
from compiled_sparse.layout import BlockLayout
from compiled_sparse.mechanisms import sta
from compiled_sparse.mechanisms.block_selector import block_selector_mechanism
from compiled_sparse.mechanisms.contract import build_metadata
from compiled_sparse.mechanisms.sta import MECHANISM
from compiled_sparse.options import parse_options
from compiled_sparse.planning import PlanRequest
from compiled_sparse.planning import plan
from compiled_sparse.policy import as_policy
from compiled_sparse.policy_density import policy_density
from compiled_sparse.presets import geometry
from compiled_sparse.sparsity import num_selected
from compiled_sparse.sparsity import truncated_top_k

MODULES = (
    "block_map",
    "checkpoints",
    "chips",
    "cli/attention_bench",
    "cli/compilers",
    "cli/mechanism",
    "cli/plan",
    "cli/plot",
    "cli/tune",
    "config",
    "config_sla",
    "config_vmoba",
    "config_vsa",
    "environment",
    "export",
    "flex",
    "geometry",
    "guard",
    "policy",
    "metadata",
    "layout",
    "options",
    "planning",
    "policy_density",
    "presets",
    "registry",
    "sparsity",
    "spread",
    "tile_order",
    "cli/entry",
    "cli/explain",
    "mechanisms/block_selector",
    "mechanisms/contract",
    *distributed_cases.MODULES,
    *calibration_cases.MODULES,
    *measuring_cases.MODULES,
)

STRAY = EntryPoint("stb", f"{sta.__name__}:MECHANISM", registry.ENTRY_POINT_GROUP)


@dataclass(frozen=True, kw_only=True)
class Undefaulted(MechanismConfig):
    """A config whose name alone would say too little."""

    name: ClassVar[str] = "undefaulted"
    keep: float


TABLE = cs.WindowTable(windows=((1, 1, 1), (3, 3, 3)), choice=(((0,),), ((1,),)))


def exported(*, dynamic: bool = False) -> torch.export.ExportedProgram:
    model, inputs = TinyDiT(1).requires_grad_(False), dit_inputs()
    axes = {2: torch.export.Dim("frames")} if dynamic else None
    shapes = {"video": axes, "text": None, "step": None}
    return torch.export.export(model, inputs, dynamic_shapes=shapes, strict=False)


def enter_metadata(**arguments: Any) -> None:
    with cs.metadata(**arguments):
        pass


def run_command(*arguments: str) -> int:
    """Run a command without catching its errors."""
    parsed = cli.build_parser().parse_args(arguments)
    status: int = parsed.run(parsed)
    return status


SMALL = ("--grid", "4", "4", "4", "--heads", "1", "--head-dim", "16")


def require_inductor_without_a_compiler() -> None:
    no_compiler = {"cpp.cxx": (None, "no-compiler"), "force_disable_caches": True}
    with torch._inductor.config.patch(no_compiler):
        require_inductor(otherwise="do without")


def tune_without_a_gpu() -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.cuda, "is_available", lambda: False)
        tune_tiles(Path("tiles.json"))


def explain_nothing() -> None:
    no_arguments = dict.fromkeys(("entry", "policy", "grid", "text", "step", "num_steps", "html"))
    explain_command.run(argparse.Namespace(demo=False, **no_arguments))


def attach_to_a_wrapped_model() -> None:
    store = torch.distributed.HashStore()
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    try:
        wrapped = torch.nn.parallel.DistributedDataParallel(TinyDiT())
        cs.attach(wrapped, cs.VSA(gate="to_gate_compress"))
    finally:
        torch.distributed.destroy_process_group()


LINEAR = torch.nn.Linear(2, 2, bias=False)
TOKENS = torch.zeros(1, 2, 6, 4)

CASES = {
    "text": Case(
        errors.LayoutError,
        "Text.before is not a token count",
        "-1",
        "integer of at least 0",
        "Text(before=",
        lambda: cs.Text(before=-1),
    ),
    "attaching after wrapping": Case(
        errors.AttachError,
        "already spread over processes, which would not share what is added now",
        "DistributedDataParallel at the root; 2 layers to add, the first 'module.blocks.0.attn1.to",
        "no fully_shard, parallelize_module or DDP",
        "call cs.attach(model, policy) first",
        attach_to_a_wrapped_model,
    ),
    "axes": Case(
        errors.LayoutError,
        "grid and tile have different numbers of axes",
        "grid (4, 4), tile (2,)",
        "one tile side per grid axis",
        "a tile with 2 sides",
        lambda: BlockLayout((4, 4), (2,)),
    ),
    "extents": Case(
        errors.LayoutError,
        "grid is not a tuple of axis lengths",
        "(0,)",
        "1 to 3 positive integers",
        "like (21, 30, 52)",
        lambda: BlockLayout((0,), (2,)),
    ),
    "window values": Case(
        errors.ConfigError,
        "STA.window_thw is not made of positive integers",
        "(0, 3, 3)",
        "1 to 3 positive integers",
        "window_thw=(3, 3, 3)",
        lambda: cs.STA(window_thw=(0, 3, 3)),
    ),
    "window lengths": Case(
        errors.ConfigError,
        "windows of different lengths",
        "((3, 3), (3,))",
        "the same number of axes for every head",
        "one (T, H, W) triple",
        lambda: cs.STA(window_thw=((3, 3), (3,))),
    ),
    "window and tile": Case(
        errors.ConfigError,
        "different numbers of axes",
        "window_thw=(3,), tile_thw=(6, 8, 8)",
        "one tile side per window axis",
        'tile_thw="auto"',
        lambda: cs.STA(window_thw=(3,)),
    ),
    "sparsity of a mechanism without": Case(
        errors.ConfigError,
        "sta has no sparsity that could be replaced",
        "sparsity=0.5",
        "sparsity=None",
        "by its window",
        lambda: cs.STA().check_sparsity(0.5),
    ),
    "block and window": Case(
        errors.ConfigError,
        "SWBA has a value that is not a positive integer",
        "block=0, window=4",
        "integers of at least 1",
        "block=256, window=4",
        lambda: cs.SWBA(block=0),
    ),
    "mechanism": Case(
        errors.UnknownMechanismError,
        "unknown mechanism",
        "'stta'",
        "one of auto, dense, sage_sla, sla, sta, swba, vmoba, vsa",
        "STA(...)",
        lambda: parse_spec("stta"),
    ),
    "field": Case(
        errors.ConfigFormatError,
        "unknown field of mechanism 'sta'",
        "windw",
        "tile_thw, window_thw",
        "correct the field name",
        lambda: parse_spec("sta:windw=3x3x3"),
    ),
    "no fields": Case(
        errors.ConfigFormatError,
        "unknown field of mechanism 'dense'",
        "a",
        "(none)",
        "correct the field name",
        lambda: parse_spec("dense:a=1"),
    ),
    "spec part": Case(
        errors.ConfigFormatError,
        "part of a spec string is not key=value",
        "'3x3'",
        "name:key=value",
        "sta:window_thw=3x3x3",
        lambda: parse_spec("sta:3x3"),
    ),
    "version": Case(
        errors.ConfigFormatError,
        "another format version",
        "version 7",
        "version 1",
        "to_json()",
        lambda: MechanismConfig.from_dict({"version": 7}),
    ),
    "no JSON": Case(
        errors.ConfigFormatError,
        "not a JSON document",
        "'{'",
        "a JSON object",
        "check the file",
        lambda: MechanismConfig.from_json("{"),
    ),
    "no object": Case(
        errors.ConfigFormatError,
        "not an object",
        "list",
        '"version"',
        "to_json()",
        lambda: MechanismConfig.from_json("[]"),
    ),
    "unreachable": Case(
        errors.ConfigError,
        "empty or can never be reached",
        "['*', 'a']",
        '"*" last',
        'put the rule "*" at the end',
        lambda: cs.Policy({"*": "sta", "a": "sta"}),
    ),
    "no rules": Case(
        errors.ConfigFormatError,
        "holds no policy",
        "['version']",
        '"rules"',
        "Policy.to_json()",
        lambda: cs.Policy.from_json('{"version": 1}'),
    ),
    "unread file": Case(
        errors.ConfigFormatError,
        "policy file cannot be read",
        "missing.json: No such file",
        "readable JSON file",
        "check the path",
        lambda: as_policy("missing.json"),
    ),
    "no mapping": Case(
        errors.ConfigError,
        "policy rules are not a mapping",
        "'sta'",
        "a mapping, or pairs",
        'Policy({"*": "sta"})',
        lambda: cs.Policy("sta"),
    ),
    "rule": Case(
        errors.ConfigError,
        "neither a config nor a spec string",
        "3",
        "STA(...)",
        '"blocks.*.attn1"',
        lambda: as_policy({"*": 3}),
    ),
    "metadata": Case(
        errors.LayoutError,
        "metadata without a grid",
        "grid_thw=None",
        "the token grid",
        "grid_thw=(T, H, W)",
        lambda: enter_metadata(text=cs.Text(1)),
    ),
    "step": Case(
        errors.MetadataError,
        "step is out of range",
        "-1",
        "an integer of at least 0",
        "or leave it out",
        lambda: enter_metadata(step=-1),
    ),
    "step of steps": Case(
        errors.MetadataError,
        "the step is not one of the steps",
        "step=4, num_steps=4",
        "the first step is 0",
        "correct num_steps",
        lambda: enter_metadata(step=4, num_steps=4),
    ),
    "inner": Case(
        errors.UnknownOptionError,
        "unknown inner compiler",
        "'gcc'",
        "inductor, aot_eager, eager",
        '"inner": "inductor"',
        lambda: parse_options({"inner": "gcc"}),
    ),
    "mode": Case(
        errors.UnknownOptionError,
        "unknown mode",
        "'fast'",
        "one of default, ",
        "inductor's own options",
        lambda: parse_options({"mode": "fast"}),
    ),
    "option": Case(
        errors.UnknownOptionError,
        "unknown option",
        "polixy",
        "policy, inner, mode, strict",
        "did you mean policy",
        lambda: parse_options({"polixy": "sta"}),
    ),
    "far option": Case(
        errors.UnknownOptionError,
        "unknown option",
        "zzzzqqqq",
        "torch._inductor.config",
        "remove it",
        lambda: parse_options({"zzzzqqqq": 1}),
    ),
    "config and grid": Case(
        errors.LayoutError,
        "the grid and the config have different numbers of axes",
        "grid (4, 4), window_thw=(3, 3, 3)",
        "a grid of 3 axes",
        "2 sides",
        lambda: cs.STA().resolve_tile((4, 4)),
    ),
    "automatic numbers": Case(
        errors.ConfigError,
        "Auto has a number out of range",
        "window_fraction=1.5",
        "0 < window_fraction <= 1",
        "window_fraction=0.6",
        lambda: Auto(window_fraction=1.5),
    ),
    "unnamed mechanism": Case(
        errors.ConfigError,
        "without a name or without one definition",
        "name ''",
        "a config class with a name",
        "set `name`",
        lambda: replace(MECHANISM, config=MechanismConfig),
    ),
    "mechanism name": Case(
        errors.ConfigError,
        "two mechanisms of one name",
        "'dense' for Dense",
        "a name that no other mechanism has",
        "change `name`",
        lambda: registry.register(replace(MECHANISM, config=cs.Dense)),
    ),
    "entry point": Case(
        errors.UnknownMechanismError,
        "the entry point 'stb' gives no mechanism of this name",
        "compiled_sparse.mechanisms.sta:MECHANISM",
        "called like the entry point",
        "uninstall the package",
        lambda: registry._load(STRAY),
    ),
    "kind of a glob": Case(
        errors.ConfigError,
        "prefixed by something that is no kind of call",
        "'cross:*'",
        "self:, joint:",
        '"joint:*"',
        lambda: cs.Policy({"cross:*": "sta"}),
    ),
    "count of steps": Case(
        errors.ConfigError,
        "Policy.dense_first_steps is not a count",
        "-1",
        "an integer of at least 0",
        "dense_first_steps=0",
        lambda: cs.Policy({"*": "sta"}, dense_first_steps=-1),
    ),
    "field of a policy": Case(
        errors.ConfigFormatError,
        "unknown field of a policy",
        "dense_steps",
        "rules, dense_first_steps",
        "correct the field name",
        lambda: cs.Policy.from_json('{"version": 2, "policy": {"rules": {}, "dense_steps": 1}}'),
    ),
    "quality level": Case(
        errors.ConfigError,
        "unknown quality level",
        "'best'",
        "exact, careful, balanced, fast",
        '"balanced"',
        lambda: cs.quality("best"),
    ),
    "VMoBA value": Case(
        errors.ConfigError,
        "VMoBA.moba_threshold_type is out of range",
        "'block'",
        "'query_head', 'head_global', 'overall' in mode topk",
        "docs/vmoba.md",
        lambda: cs.VMoBA(moba_select_mode="topk", moba_threshold_type="block"),
    ),
    "VMoBA file field": Case(
        errors.ConfigFormatError,
        "unknown field of a VMoBA config",
        "moba_topk",
        "moba_select_mode, moba_threshold",
        "correct or remove",
        lambda: cs.VMoBA.from_published({"moba_topk": 3}),
    ),
    "VMoBA file": Case(
        errors.ConfigFormatError,
        "config file cannot be read",
        "no/such.json",
        "JSON file of a VMoBA config",
        "check the path",
        lambda: cs.VMoBA.from_published("no/such.json"),
    ),
    "VMoBA grid": Case(
        errors.LayoutError,
        "VMoBA is written for the grid of a video",
        "grid (4, 4)",
        "3 axes (T, H, W)",
        "grid_thw=(1, H, W)",
        lambda: cs.VMoBA().resolve_tile((4, 4)),
    ),
    "VMoBA chunk": Case(
        errors.LayoutError,
        "a temporal chunk holds no token",
        "temporal_chunk_size=0.01 on grid (4, 4, 4)",
        "at least one token",
        "larger temporal_chunk_size",
        lambda: cs.VMoBA(temporal_chunk_size=0.01).resolve_tile((4, 4, 4)),
    ),
    "environment": Case(
        errors.UnknownMechanismError,
        "COMPILED_SPARSE_BACKEND is set to something unknown",
        "'stta'",
        "SLIDING_TILE_ATTN",
        "unset it",
        lambda: _parse("stta"),
    ),
    "default of a config": Case(
        errors.ConfigError,
        "fields without a default",
        "Undefaulted: keep",
        "the mechanism's name alone is a policy too",
        "a default",
        lambda: replace(MECHANISM, config=Undefaulted),
    ),
    "name of an op": Case(
        errors.ConfigError,
        "not the name of a mechanism and its op",
        "name 'sta', config.name 'dense', runtime inputs ['time']",
        "step, sparsity, layer, windows",
        'set `name = "sta"`',
        lambda: block_selector_mechanism(
            "sta", cs.Dense, print, density=print, runtime_inputs=("time",)
        ),
    ),
    "latents and patch": Case(
        errors.LayoutError,
        "latents and patch have different numbers of axes",
        "raw_latent_shape (1, 16, 4, 8, 8), patch_size (1, 2, 2)",
        "one patch side per axis",
        "latents.shape[2:]",
        lambda: build_metadata(step=0, raw_latent_shape=(1, 16, 4, 8, 8), patch_size=(1, 2, 2)),
    ),
    "sparsity of a mechanism": Case(
        errors.MetadataError,
        "sparsity is out of range",
        "1.5",
        "a number from 0 to 1",
        "pass sparsity as",
        lambda: num_selected(10, 1.5),
    ),
    "no state dict": Case(
        errors.CheckpointError,
        "the state dict is not a mapping of names",
        "'wan.safetensors'",
        "model.state_dict()",
        "load a file first",
        lambda: to_diffusers("wan.safetensors"),
    ),
    "two names of a parameter": Case(
        errors.CheckpointError,
        "two names of the checkpoint mean one parameter",
        "'blocks.0.to_q.bias' and 'blocks.0.attn1.to_q.bias', both 'blocks.0.attn1.to_q.bias'",
        "each parameter once",
        "remove one",
        lambda: to_diffusers({"blocks.0.to_q.bias": 0, "blocks.0.attn1.to_q.bias": 0}),
    ),
    "no model to load": Case(
        errors.CheckpointError,
        "a checkpoint is loaded into a module",
        "'wan'",
        "an nn.Module",
        "pipe.transformer",
        lambda: load_with_gates("wan", [], {}),
    ),
    "path of a gate": Case(
        errors.CheckpointError,
        "a gate or projection is not a linear layer of the model",
        "'gate', with 0 linear layers",
        "nn.Linear modules with a weight, or of modules that wrap one",
        "blocks.0.attn1.to_gate_compress",
        lambda: load_with_gates(LINEAR, ["gate"], {}),
    ),
    "sparsity for SLA": Case(
        errors.ConfigError,
        "a sparsity for SageSLA is out of range",
        "sparsity=1.5",
        "in [0, 1)",
        "keeps a tenth",
        lambda: cs.SageSLA().with_sparsity(1.5),
    ),
    "gates without a place": Case(
        errors.CheckpointError,
        "the checkpoint has gates or projections that the model lacks",
        "1 (blocks.0.to_gate_compress.bias)",
        "without them the pictures are wrong",
        "load with the handle",
        lambda: load_with_gates(LINEAR, [], {"blocks.0.to_gate_compress.bias": 0}),
    ),
    "another checkpoint": Case(
        errors.CheckpointError,
        "the checkpoint does not fit the model",
        "missing: 1 (weight); unexpected: 4 (a, b, c, ...)",
        "but those of gates",
        "strict=False",
        lambda: load_with_gates(LINEAR, [], dict.fromkeys("abcd")),
    ),
    "shapes of a checkpoint": Case(
        errors.CheckpointError,
        "other shapes than the model's",
        "weight: (3, 2) for (2, 2)",
        "the same shapes",
        "the configuration of the checkpoint",
        lambda: load_with_gates(LINEAR, [], {"weight": torch.zeros(3, 2)}),
    ),
    "no memory to load": Case(
        errors.CheckpointError,
        "there are tensors without memory",
        "on the meta device: 1 (weight of the checkpoint)",
        "hold numbers",
        "to_empty",
        lambda: load_with_gates(LINEAR, [], {"weight": torch.zeros(2, 2, device="meta")}),
    ),
    "guard values": Case(
        errors.ConfigError,
        "Guard has a value out of range",
        "calls=0",
        "calls >= 1",
        "Guard(calls=2",
        lambda: cs.Guard(calls=0),
    ),
    "guard": Case(
        errors.ConfigError,
        "options['guard'] is no guard",
        "'yes'",
        "calls, max_relative_error, on_failure, rows",
        '{"guard": {"calls": 2',
        lambda: parse_options({"guard": "yes"}),
    ),
    "guard failure": Case(
        errors.GuardError,
        "1 of 1 sparse calls failed the guard",
        "blocks.0: relative error 0.7",
        "relative error up to 0.5",
        "a wider window",
        lambda: report_findings(
            cs.Guard(on_failure="raise"), [Finding("blocks.0", 0, 0.7, dense_is_finite=True)]
        ),
    ),
    "steps of a program": Case(
        errors.ExportError,
        "an exported program knows no denoising steps",
        "dense at steps 0-7",
        "a policy without dense steps",
        "keep the exported program for the dense steps",
        lambda: cs.rewrite_exported(exported(), "balanced"),
    ),
    "values of a call": Case(
        errors.ExportError,
        "is handed no values of the call",
        "step, windows",
        "a mechanism whose pattern is fixed",
        "one window instead of a table",
        lambda: cs.rewrite_exported(exported(), cs.STA(window_thw=TABLE, tile_thw=(2, 3, 2))),
    ),
    "open sizes": Case(
        errors.ExportError,
        "a size that the program leaves open would be fixed",
        "an automatic tile",
        "static sizes",
        "tile_thw=(6, 8, 8)",
        lambda: cs.rewrite_exported(exported(dynamic=True), cs.STA(tile_thw="auto")),
    ),
    "strict": Case(
        errors.UnknownOptionError,
        "strict is neither True nor False",
        "'no'",
        "True or False",
        '{"strict": True}',
        lambda: parse_options({"strict": "no"}),
    ),
    "no mechanism": Case(
        errors.ConfigError,
        "this is no mechanism",
        "None",
        "registry.Mechanism",
        "block_selector_mechanism",
        lambda: registry.register(None),
    ),
    "text of a layout": Case(
        errors.LayoutError,
        "text is not a Text",
        "10",
        "Text(before=..., after=...)",
        "text=cs.Text(after=",
        lambda: enter_metadata(grid_thw=(2, 2, 2), text=10),
    ),
    "no program": Case(
        errors.ExportError,
        "this is no exported program",
        "None",
        "torch.export.export returns",
        "torch.export.export(model, inputs)",
        lambda: cs.rewrite_exported(None, "sta"),
    ),
    "decomposed program": Case(
        errors.ExportError,
        "attention calls have been taken apart",
        "dialect ATEN",
        "as torch.export.export returns it",
        "rewrite it first",
        lambda: cs.rewrite_exported(exported().run_decompositions(), "sta"),
    ),
    "gate of a mechanism without": Case(
        errors.ConfigError,
        "sta takes no gate",
        "a gate tensor",
        "gate=None",
        "such as VSA()",
        lambda: cs.STA().check_gate(True),
    ),
    "sparsity of a config": Case(
        errors.ConfigError,
        "VSA.sparsity is out of range",
        "1.0",
        "a number in [0, 1)",
        "pass sparsity=0.9",
        lambda: cs.VSA(sparsity=1.0),
    ),
    "name of a gate": Case(
        errors.ConfigError,
        "VSA.gate is no name of a module",
        "'a b'",
        '"ungated", or the name',
        'gate="to_gate_compress"',
        lambda: cs.VSA(gate="a b"),
    ),
    "tile and grid": Case(
        errors.LayoutError,
        "the grid and the tile have different numbers of axes",
        "grid (30, 52), tile_thw=(4, 4, 4)",
        "a grid of 3 axes",
        "a tile with 2 sides",
        lambda: cs.VSA().resolve_tile((30, 52)),
    ),
    "gate too many": Case(
        errors.ConfigError,
        "a gate is given to an ungated config",
        'VSA(gate="ungated")',
        "one of the two",
        "leave the gate out",
        lambda: cs.VSA(gate="ungated").check_gate(True),
    ),
    "gate too few": Case(
        errors.ConfigError,
        "names a learned gate and none is given",
        "VSA(gate='to_gate_compress')",
        "[batch, query heads, length, head_dim]",
        "for the sparse branch alone",
        lambda: cs.VSA(gate="to_gate_compress").check_gate(False),
    ),
    "windows per head": Case(
        errors.ConfigError,
        "does not have one window per query head",
        "3 windows for 4 heads",
        "1 or 4 windows",
        "one per query head",
        lambda: cs.STA(window_thw=((3, 3, 3),) * 3).check_heads(4),
    ),
    "sides of blocks": Case(
        errors.ConfigError,
        "the blocks of queries and keys have different numbers of axes",
        "block_q=(4, 8, 4), block_k=64",
        "two boxes with as many sides",
        "block_k=(4, 4, 4)",
        lambda: cs.SLA(block_q=(4, 8, 4)),
    ),
    "share of blocks": Case(
        errors.ConfigError,
        "SLA.topk_ratio is out of range",
        "0",
        "a number in (0, 1]",
        "topk_ratio=0.1",
        lambda: cs.SLA(topk_ratio=0),
    ),
    "feature map": Case(
        errors.ConfigError,
        "SLA.feature_map is not known",
        "'hedgehog'",
        "one of 'softmax', 'elu', 'relu'",
        'feature_map="softmax"',
        lambda: cs.SLA(feature_map="hedgehog"),
    ),
    "name of a projection": Case(
        errors.ConfigError,
        "SLA.proj is no name of a module",
        "'a b'",
        "None, or the name",
        "proj=(weight, bias)",
        lambda: cs.SLA(proj="a b"),
    ),
    "blocks and grid": Case(
        errors.LayoutError,
        "the grid and the blocks have different numbers of axes",
        "grid (21, 30, 52), block_q=128, block_k=64",
        "a grid of 1 axes",
        "blocks with 3 sides",
        lambda: cs.SLA().resolve_tile((21, 30, 52)),
    ),
    "projection too many": Case(
        errors.ConfigError,
        "a projection is given to a config without a linear branch",
        "SLA(proj=None)",
        "one of the two",
        "leave proj= out",
        lambda: cs.SLA(proj=None).check_projection((0, 0)),
    ),
    "projection of a mechanism without": Case(
        errors.ConfigError,
        "sta takes no projection",
        "a projection",
        "proj=None",
        "leave",
        lambda: cs.STA().check_projection((0, 0)),
    ),
    "projection that is no pair": Case(
        errors.ConfigError,
        "proj is no pair of weight and bias",
        "Linear",
        "(weight [head_dim, head_dim], bias [head_dim] or None)",
        "proj=(linear.weight, linear.bias)",
        lambda: cs.SLA().check_projection(LINEAR),
    ),
    "values of a quantised config": Case(
        errors.ConfigError,
        "SageSLA.values is not known",
        "'int4'",
        "one of 'auto', 'float8', 'float16'",
        'values="auto"',
        lambda: cs.SageSLA(values="int4"),
    ),
    "block of a map": Case(
        errors.ConfigError,
        "block_q is not a positive integer",
        "0",
        "tokens of a block, at least 1",
        "block_q=64",
        lambda: cs.get_block_map(TOKENS, TOKENS, 0.5, block_q=0),
    ),
    "tokens of a map": Case(
        errors.ShapeError,
        "x has no tokens in heads",
        "x of shape (1, 2, 0, 4)",
        "[batch, heads, length, head_dim]",
        "reshape x",
        lambda: cs.mean_pool(TOKENS[:, :, :0], 4),
    ),
    "name of an entry": Case(
        entry.EntryError,
        "this names no function",
        "'model.py'",
        "FILE.py:FUNCTION or package.module:function",
        "model.py:build",
        lambda: entry.load_entry("model.py"),
    ),
    "file of an entry": Case(
        entry.EntryError,
        "there is no such file",
        "nowhere.py",
        "a Python file",
        "check the path",
        lambda: entry.load_entry("nowhere.py:build"),
    ),
    "module of an entry": Case(
        entry.EntryError,
        "there is no such module",
        "nowhere",
        "can be imported from here",
        "FILE.py:FUNCTION",
        lambda: entry.load_entry("nowhere.models:build"),
    ),
    "function of an entry": Case(
        entry.EntryError,
        "math has no function pi",
        "float",
        "a function that takes nothing",
        "define pi() in math",
        lambda: entry.load_entry("math:pi"),
    ),
    "entry that fails": Case(
        entry.EntryError,
        "math:sin failed",
        "TypeError: math.sin() takes exactly one argument (0 given) (",
        "runs to its end",
        "correct it",
        lambda: entry.load_entry("math:sin")(),
    ),
    "what an entry returns": Case(
        entry.EntryError,
        "time:time returned no model with its inputs",
        "float",
        "(model, kwargs) or (model, args, kwargs)",
        "return the module",
        lambda: entry.load_model("time:time"),
    ),
    "models to explain": Case(
        errors.ConfigError,
        "one model is explained at a time",
        "no model",
        "FILE.py:FUNCTION, or --demo",
        "explain model.py:build",
        explain_nothing,
    ),
    "ratio of a map": Case(
        errors.MetadataError,
        "ratio is out of range",
        "1.5",
        "a number from 0 to 1",
        "pass ratio as",
        lambda: truncated_top_k(10, 1.5),
    ),
    **distributed_cases.CASES,
    **calibration_cases.CASES,
    **measuring_cases.CASES,
    "size of a video": Case(
        errors.LayoutError,
        "wan2.1-t2v-14b has no token grid for this number of frames",
        "frames=80",
        "1 + a multiple of 4",
        "frames=77 or 81",
        lambda: geometry("wan2.1-t2v-14b").grid_thw(80),
    ),
    "plan for nothing": Case(
        errors.ConfigError,
        "a plan is for a model or for a shape",
        "--model, --grid",
        "or --grid, --heads and --head-dim",
        "--list shows all models",
        lambda: run_command("plan", "--model", "mochi-1", "--grid", "1", "2", "3"),
    ),
    "arguments of another picture": Case(
        errors.ConfigError,
        "these arguments are not for this picture",
        "--query-tile, --window with --order",
        "--grid, --tile",
        "leave out --query-tile, --window",
        lambda: run_command("plot", "--order", "--window", "1", "--query-tile", "1"),
    ),
    "a picture of too little": Case(
        errors.ConfigError,
        "this picture needs to know more of the model",
        "--policy without --layers, --steps",
        "--heads, --layers, --steps",
        "add --layers N and --steps N",
        lambda: run_command("plot", "--policy", "sta", "--heads", "2"),
    ),
    "densities of another grid": Case(
        errors.ConfigError,
        "the policy does not fit these calls",
        "axes_mismatch (config has 3, grid has 2)",
        "takes this grid",
        "pass the grid and the heads of the model",
        lambda: policy_density("sta", grid_thw=(8, 8), heads=1, layers=1, steps=1),
    ),
    "densities of one path": Case(
        errors.ConfigError,
        "do not tell one layer from another",
        "'blocks'",
        "{layer} in it",
        "blocks.{layer}.attn1",
        lambda: policy_density("sta", grid_thw=(8, 8), heads=1, layers=1, steps=1, paths="blocks"),
    ),
    "densities of other paths": Case(
        errors.ConfigError,
        "no rule of the policy that may make something sparse",
        "rules for single.*; self calls at blocks.0.attn1 to blocks.1.attn1",
        "a rule that matches some layer",
        "pass the module paths of the model",
        lambda: policy_density({"single.*": "sta"}, grid_thw=(8, 8, 8), heads=1, layers=2, steps=1),
    ),
    "two mechanisms": Case(
        errors.ConfigError,
        "--mechanism says all there is to say",
        "--mechanism vsa and --tile",
        "--mechanism, or --window and --tile",
        "--mechanism sta:window_thw=3x3x3",
        lambda: run_command("bench", "--mechanism", "vsa", "--tile", "1", "2", "3"),
    ),
    "nothing to time": Case(
        errors.ConfigError,
        "there is nothing sparse to time",
        "dense: policy_dense",
        "a mechanism that takes this grid",
        "compiled-sparse plan",
        lambda: run_command("bench", "--mechanism", "dense"),
    ),
    "chunks for flex": Case(
        errors.ConfigError,
        "flex_attention has no form of what this mechanism selects",
        "vmoba:",
        "lists key blocks for blocks of queries",
        "leave --flex out",
        lambda: run_command("bench", *SMALL, "--flex", "--mechanism", "vmoba"),
    ),
    "blocks for flex": Case(
        errors.LayoutError,
        "flex_attention takes full blocks only",
        "grid (4, 4, 4) in blocks of (4, 4, 4) queries and (4, 4, 4) keys, text 0 + 3",
        "blocks that divide the grid, and text of whole blocks",
        "leave flex_attention out",
        lambda: run_command("bench", *SMALL, "--flex", "--mechanism", "vsa", "--text", "0", "3"),
    ),
    "no compiler": Case(
        InnerCompilerError,
        "inductor does not work on this machine",
        "no-compiler",
        "a C++ compiler that inductor finds",
        "apt install g++), or do without",
        require_inductor_without_a_compiler,
    ),
    "tuning": Case(
        errors.DeviceError,
        "tiles are measured on a GPU, and there is none",
        "torch.cuda.is_available() is False",
        "a CUDA or ROCm device",
        "the machine that the table is for",
        tune_without_a_gpu,
    ),
    "rate of dense attention": Case(
        errors.ConfigError,
        "attention_tflops is no rate",
        "0.0",
        "a number above 0, in TFLOP/s",
        "what dense attention reaches",
        lambda: plan(PlanRequest(grid_thw=(4, 4, 4), heads=1, head_dim=64, attention_tflops=0.0)),
    ),
    "chip": Case(
        errors.UnknownModelError,
        "this chip is not known",
        "'gtx1080'",
        "one of a100, rtx4090",
        "what dense attention reaches in TFLOP/s",
        lambda: chip("gtx1080"),
    ),
    "published model": Case(
        errors.UnknownModelError,
        "the geometry of this model is not known",
        "'wan3'",
        "wan2.1-t2v-1.3b, wan2.1-t2v-14b",
        "give grid, heads and head size yourself",
        lambda: geometry("wan3"),
    ),
}


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_a_message_says_what_got_expected_and_next(case: Case) -> None:
    assert_wording(case)


def test_every_error_has_a_case_for_its_wording() -> None:
    assert raise_statements(MODULES) == raised_at(CASES.values())


def test_every_error_class_is_also_a_builtin_error() -> None:
    classes = [
        each
        for each in vars(errors).values()
        if isinstance(each, type) and each is not errors.CompiledSparseError
    ]
    assert len(classes) >= 13
    builtin = (ValueError, TypeError, RuntimeError, ImportError)
    assert all(issubclass(each, errors.CompiledSparseError) for each in classes)
    assert all(issubclass(each, builtin) for each in classes)


def test_a_missing_extra_names_the_command_that_installs_it() -> None:
    error = errors.MissingExtraError("rich", extra="report", purpose="the coloured table")
    assert isinstance(error, ImportError)
    assert str(error).splitlines() == [
        "the coloured table needs the optional package 'rich'",
        "  got:      import rich failed",
        "  expected: rich installed",
        "  next:     pip install 'compiled_sparse[report]'",
    ]
