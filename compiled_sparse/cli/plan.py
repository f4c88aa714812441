"""`compiled-sparse plan`: which mechanisms fit a model or a shape, and what they would gain."""

from __future__ import annotations

import argparse
import dataclasses
import json
from typing import Any

import torch

from compiled_sparse.chips import CHIPS
from compiled_sparse.chips import chip
from compiled_sparse.cli.arguments import Commands
from compiled_sparse.cli.arguments import add_text_argument
from compiled_sparse.cli.arguments import count
from compiled_sparse.cli.arguments import positive
from compiled_sparse.config import parse_spec
from compiled_sparse.errors import ConfigError
from compiled_sparse.layout import Text
from compiled_sparse.planning import NOTES
from compiled_sparse.planning import Plan
from compiled_sparse.planning import PlanRequest
from compiled_sparse.planning import PlanRow
from compiled_sparse.planning import plan
from compiled_sparse.presets import MODELS
from compiled_sparse.presets import geometry
from compiled_sparse.reasons import REASONS
from compiled_sparse.report import aligned

PLAN_VERSION = 1

_DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}
_SHAPE = ("grid", "heads", "head_dim", "layers", "text")
_SIZE = ("frames", "height", "width")


def add_parser(commands: Commands) -> None:
    """Add this command to the parser."""
    parser = commands.add_parser(
        "plan",
        help="which mechanisms fit a model, and what they would gain",
        description="Say for a published model, or for any shape, which mechanisms fit, how much "
        "of the work they leave and what that is predicted to gain. Nothing is computed.",
        epilog="examples:\n"
        "  compiled-sparse plan --model wan2.1-t2v-14b --frames 81 --height 720 --width 1280 "
        "--chip h100\n"
        "  compiled-sparse plan --grid 21 30 52 --heads 12 --head-dim 128 "
        "--mechanism vsa:sparsity=0.8\n"
        "  compiled-sparse plan --list",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    _add_shape_arguments(parser)
    parser.add_argument("--chip", metavar="NAME", help="GPU to plan for (default: this CPU)")
    parser.add_argument(
        "--tflops",
        type=positive,
        metavar="N",
        help="what dense attention reaches, as `bench` measures it, instead of the chip's figure",
    )
    parser.add_argument("--dtype", choices=_DTYPES, default="bfloat16", help="default %(default)s")
    parser.add_argument(
        "--batch", type=count(1), default=1, metavar="N", help="videos in a call (default 1)"
    )
    parser.add_argument("--training", action="store_true", help="with the backward")
    parser.add_argument(
        "--mechanism",
        action="append",
        default=[],
        metavar="SPEC",
        help="mechanism to plan for, such as vsa:sparsity=0.9; may be repeated (default: one of "
        "each at a density of about 0.1, and automatic mode)",
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.add_argument("--list", action="store_true", help="list the known models and chips")
    parser.set_defaults(run=run)


def _add_shape_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model", metavar="NAME", help="a published model, see --list")
    for name, what in zip(_SIZE, ("frames", "rows", "columns"), strict=True):
        text = f"{what} of the video (default: the model's usual size)"
        parser.add_argument(f"--{name}", type=count(1), metavar="N", help=text)
    parser.add_argument(
        "--grid",
        nargs=3,
        type=count(1),
        metavar=("T", "H", "W"),
        help="token grid after patching, instead of --model",
    )
    for name, what in (
        ("--heads", "query heads"),
        ("--head-dim", "channels of a head"),
        ("--layers", "attention calls over the video in a forward (default 1)"),
    ):
        parser.add_argument(name, type=count(1), metavar="N", help=f"with --grid: {what}")
    add_text_argument(parser, default=None)


def run(arguments: argparse.Namespace) -> int:
    """Plan and print what was found.

    Raises:
        ConfigError: if model and shape are both given, or neither.
        CompiledSparseError: if the request cannot be right.
    """
    if arguments.list:
        _print_known(arguments.json)
        return 0
    made = plan(_request(arguments))
    print(json.dumps(_to_dict(made)) if arguments.json else "\n".join(_lines(made)))
    return 0


def _request(arguments: argparse.Namespace) -> PlanRequest:
    shape = [name for name in _SHAPE if getattr(arguments, name) is not None]
    size = [name for name in _SIZE if getattr(arguments, name) is not None]
    needed = {"grid", "heads", "head_dim"}
    if bool(shape) == bool(arguments.model) or (shape and (size or not needed <= set(shape))):
        given = [f"--{name.replace('_', '-')}" for name in (*shape, *size)]
        raise ConfigError(
            "a plan is for a model or for a shape",
            got=", ".join(["--model"] * bool(arguments.model) + given) or "neither",
            expected="--model with or without --frames, --height and --width; or --grid, --heads "
            "and --head-dim with or without --layers and --text",
            next_step="pass --model wan2.1-t2v-14b, for instance; --list shows all models",
        )
    return PlanRequest(
        **(_shape_of_model(arguments) if arguments.model else _shape_as_given(arguments)),
        batch=arguments.batch,
        dtype=_DTYPES[arguments.dtype],
        training=arguments.training,
        chip=chip(arguments.chip) if arguments.chip else None,
        attention_tflops=arguments.tflops,
        configs=tuple(map(parse_spec, arguments.mechanism)),
    )


def _shape_of_model(arguments: argparse.Namespace) -> dict[str, Any]:
    model = geometry(arguments.model)
    shared = ("heads", "head_dim", "layers", "text")
    return {
        "model": model,
        "grid_thw": model.grid_thw(arguments.frames, arguments.height, arguments.width),
        **{name: getattr(model, name) for name in shared},
    }


def _shape_as_given(arguments: argparse.Namespace) -> dict[str, Any]:
    return {
        "grid_thw": tuple(arguments.grid),
        "heads": arguments.heads,
        "head_dim": arguments.head_dim,
        "layers": arguments.layers or 1,
        "text": Text(*(arguments.text or ())),
    }


def _to_dict(made: Plan) -> dict[str, Any]:
    request = made.request
    return {
        "version": PLAN_VERSION,
        "model": request.model and request.model.name,
        "model_notes": request.model and request.model.notes,
        "grid_thw": request.grid_thw,
        "text": dataclasses.asdict(request.text),
        "tokens": request.num_tokens,
        "layers": request.layers,
        "heads": request.heads,
        "head_dim": request.head_dim,
        "batch": request.batch,
        "dtype": _name_of(request.dtype),
        "training": request.training,
        "chip": request.chip and dataclasses.asdict(request.chip),
        "attention_tflops": request.attention_tflops,
        "attention_share": made.attention_share,
        "dense_ms": made.dense_milliseconds,
        "rows": [dataclasses.asdict(row) for row in made.rows],
        "notes": NOTES,
    }


def _lines(made: Plan) -> list[str]:
    request, dense = made.request, made.dense_milliseconds
    lines = [_shape_line(request)]
    if request.model is not None and request.model.notes:
        lines.append(request.model.notes)
    if request.chip is not None:
        lines.append(request.chip.describe())
    if made.attention_share is not None:
        lines.append(f"attention over the video: {made.attention_share:.0%} of the FLOPs")
    if dense is not None:
        lines.append(f"dense attention over the video: {dense:,.1f} ms, predicted")
    fitting = [row for row in made.rows if row.fits]
    refused = [row for row in made.rows if not row.fits]
    if fitting:
        lines += ["", *aligned([_cells(row, made) for row in fitting])]
    if refused:
        lines += ["", "does not fit:"]
        lines += [f"  {row.spec}: {row.reason} ({row.detail})" for row in refused]
        lines += [f"  {code}: {REASONS[code]}" for code in dict.fromkeys(r.reason for r in refused)]
    return [*lines, "", *NOTES]


def _shape_line(request: PlanRequest) -> str:
    text = request.text.before + request.text.after
    parts = [
        request.model.name if request.model else "",
        f"grid {'x'.join(map(str, request.grid_thw))}",
        f"{request.num_tokens:,} tokens" + (f", {text:,} of text" if text else ""),
        f"layers {request.layers}, heads {request.heads}, head_dim {request.head_dim}",
        f"batch {request.batch}, {_name_of(request.dtype)}",
        "forward and backward" if request.training else "forward",
    ]
    return ", ".join(filter(None, parts))


def _cells(row: PlanRow, made: Plan) -> dict[str, str]:
    cells = {
        "mechanism": row.mechanism,
        "tile": "x".join(map(str, row.tile)),
        "blocks": f"{row.blocks:,}",
        "padding": f"{row.padding:.1%}",
        "density": f"{row.density:.3f}",
        "gain": f"{row.gain:.1f}x",
    }
    if made.dense_milliseconds is not None:
        cells["ms"] = f"{row.milliseconds:,.1f}"
    if made.attention_share is not None:
        cells["whole model"] = f"{row.whole_gain:.1f}x"
    return {**cells, "spec": row.spec}


def _name_of(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _print_known(as_json: bool) -> None:
    if as_json:
        models = [dataclasses.asdict(model) for model in MODELS.values()]
        chips = [dataclasses.asdict(each) for each in CHIPS.values()]
        print(json.dumps({"version": PLAN_VERSION, "models": models, "chips": chips}))
        return
    rows = [
        {
            "model": model.name,
            "class": model.class_name,
            "usual video": str(model.size),
            "grid": "x".join(map(str, model.grid_thw())),
            "attention": model.kind,
        }
        for model in MODELS.values()
    ]
    print("\n".join([*aligned(rows), "", *(each.describe() for each in CHIPS.values())]))
