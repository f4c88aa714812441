"""Queries, keys and values of a model in files, and the measurement of what is in them.

A folder holds one safetensors file for each attention call: tensors `q`, `k` and `v` as
[batch, heads, length, head_dim], and where some keys are padding `key_mask` [batch, length] as
uint8; the rest is metadata. Files of your own need the same.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from compiled_sparse.calibration.entries import open_entries
from compiled_sparse.calibration.mask_search import name_of_prompt
from compiled_sparse.calibration.measurements import CallKey
from compiled_sparse.calibration.measurements import Measurements
from compiled_sparse.calibration.offline import AttentionCall
from compiled_sparse.calibration.offline import measure_call
from compiled_sparse.calibration.run import ROWS
from compiled_sparse.calibration.run import Candidates
from compiled_sparse.calibration.run import as_candidates
from compiled_sparse.errors import CalibrationError
from compiled_sparse.errors import MissingExtraError
from compiled_sparse.layout import Text
from compiled_sparse.reference.video_calls import VideoCalls

FORMAT = "compiled_sparse captured attention"
VERSION = 1
NUM_DIMS = 4
_SUFFIX = ".safetensors"


class capture(VideoCalls):  # noqa: N801 - used like a function: with capture(...)
    """Write queries, keys and values of one call of an eager model to a folder, layer by layer.

        with calibration.capture("captured", grid_thw=(21, 30, 52), key=CallKey(step=10)):
            model(**inputs)

    The model computes what it always computes; one layer at a time is in memory. Which calls are
    written is what `reference.override` replaces: those over the whole layout.

    Args:
        directory: The folder; made if it is not there.
        grid_thw: Token grid of the video.
        text: Text tokens around the video.
        key: Which call of the model this is.

    Raises:
        CalibrationError: at the end of the block, if no call is as long as the layout.
        MissingExtraError: if safetensors is not installed.
    """

    def __init__(
        self,
        directory: str | Path,
        *,
        grid_thw: tuple[int, ...],
        text: Text | None = None,
        key: CallKey | None = None,
    ) -> None:
        super().__init__(grid_thw=grid_thw, text=text)
        self._save = _safetensors().torch.save_file
        self.directory = Path(directory)
        self.directory.mkdir(parents=True, exist_ok=True)
        self.key = key or CallKey()

    def __exit__(self, kind: Any, error: Any, trace: Any) -> None:
        """Check that something was captured, where nothing else went wrong."""
        super().__exit__(kind, error, trace)  # type: ignore[no-untyped-call]
        if kind is None and self.num_replaced == 0:
            raise CalibrationError(
                "nothing was captured",
                got=f"no self-attention over grid {self.grid_thw} and {self.text}",
                expected="calls of torch's scaled_dot_product_attention of this length, in eager "
                "code",
                next_step="correct grid_thw and text, and call the model without compiling it",
            )

    def replace(
        self, call: dict[str, Any], keys: Tensor | None, queries: Tensor | None, layer: int
    ) -> Tensor:
        """Write a call and return what it gives."""
        scale = call["scale"]
        about = _About(
            layer=layer,
            key=self.key,
            grid_thw=tuple(self.grid_thw),
            text=(self.text.before, self.text.after),
            scale=scale,
        )
        tensors = {name[0]: call[name].detach() for name in ("query", "key", "value")}
        if keys is not None:
            tensors["key_mask"] = keys.to(torch.uint8)
        contiguous = {name: tensor.contiguous().cpu() for name, tensor in tensors.items()}
        path = self.directory / about.file_name
        temporary = path.with_suffix(".part")
        self._save(contiguous, temporary, about.to_metadata())
        temporary.replace(path)
        output: Tensor = F.scaled_dot_product_attention(**call)
        return output


def measure_captured(
    directory: str | Path,
    candidates: Candidates,
    *,
    journal: str | Path | None = None,
    device: str | torch.device = "cpu",
    rows: int = ROWS,
    on_call: Callable[[CallKey], None] | None = None,
) -> Measurements:
    """Measure every candidate beside dense attention on queries, keys and values in files.

    One file is in memory at a time. Layers are called "layer.0", "layer.1", ... as a file says
    nothing of the module it is from.

    Args:
        directory: Folder of files written by `capture`, or of the same form.
        candidates: As for `measure`.
        journal: As for `measure`.
        device: Where to compute.
        rows: As for `measure`.
        on_call: Called after each call of the model.

    Raises:
        CalibrationError: if the folder holds no such file, a file is damaged or foreign, a call of
            the model lacks a layer, or a candidate does not fit.
        MissingExtraError: if safetensors is not installed.
    """
    configs = as_candidates(candidates)
    calls = _files_of(Path(directory))
    with open_entries(journal, configs, rows) as entries, torch.no_grad():
        for key, files in calls.items():
            if key not in entries:
                sites = (measure_call(_load(path, device), configs, rows) for path in files)
                entries.add(key, tuple(sites))
            if on_call is not None:
                on_call(key)
        return Measurements(candidates=configs, calls=entries.of(calls))


@dataclass(frozen=True, kw_only=True)
class _About:
    """What a file says about its tensors."""

    layer: int
    key: CallKey
    grid_thw: tuple[int, ...]
    text: tuple[int, int]
    scale: float | None

    @property
    def file_name(self) -> str:
        sample = name_of_prompt(self.key.sample)
        return f"{sample}_{self.key.branch}_step{self.key.step:03}_layer{self.layer:03}{_SUFFIX}"

    def to_metadata(self) -> dict[str, str]:
        body = json.dumps(asdict(self), sort_keys=True)
        return {"format": FORMAT, "version": str(VERSION), "call": body}

    @staticmethod
    def parse(text: str) -> _About:
        """Return what `to_metadata` made a text of; what is wrong with it raises as it comes."""
        body = json.loads(text)
        return _About(
            layer=int(body["layer"]),
            key=CallKey(**body["key"]),
            grid_thw=tuple(map(int, body["grid_thw"])),
            text=(int(body["text"][0]), int(body["text"][1])),
            scale=None if body["scale"] is None else float(body["scale"]),
        )


def _files_of(directory: Path) -> dict[CallKey, list[Path]]:
    """Return the files of each call of the model, by layer."""
    found: dict[CallKey, dict[int, Path]] = {}
    for path in sorted(directory.glob(f"*{_SUFFIX}")):
        with _opened(path) as (_, about):
            pass
        same = found.setdefault(about.key, {}).setdefault(about.layer, path)
        if same != path:
            raise _no_call(path, f"layer {about.layer} of {about.key}, as in {same.name}")
    incomplete = [key for key, layers in found.items() if set(layers) != set(range(len(layers)))]
    if not found or incomplete:
        raise CalibrationError(
            "a folder does not hold captured calls of a model",
            got=f"{directory}: "
            + (f"layers missing in {incomplete[0]}" if found else f"no *{_SUFFIX} file"),
            expected=f"*{_SUFFIX} files of layers 0, 1, ... for each call",
            next_step="write them with calibration.capture(directory, ...)",
        )
    return {key: [found[key][layer] for layer in sorted(found[key])] for key in sorted(found)}


def _load(path: Path, device: str | torch.device) -> AttentionCall:
    with _opened(path, device) as (file, about):
        has_mask = "key_mask" in file.keys()  # noqa: SIM118 - it is no mapping
        q, k, v = (file.get_tensor(name) for name in "qkv")
        mask = file.get_tensor("key_mask").bool() if has_mask else None
    call = AttentionCall(
        q=q,
        k=k,
        v=v,
        key_mask=mask,
        grid_thw=about.grid_thw,
        text=Text(*about.text),
        scale=about.scale,
        step=about.key.step,
        layer=about.layer,
        path=f"layer.{about.layer}",
    )
    if not _fits(call):
        shapes = ", ".join(
            str(tuple(tensor.shape)) for tensor in (q, k, v, mask) if tensor is not None
        )
        raise _no_call(path, f"{shapes} for grid {call.grid_thw} and {call.text}")
    return call


def _fits(call: AttentionCall) -> bool:
    """Whether the tensors are of one call over the grid and the text."""
    length = math.prod(call.grid_thw) + call.text.before + call.text.after
    q, k, mask = call.q, call.k, call.key_mask
    return (
        q.dim() == k.dim() == NUM_DIMS
        and k.shape[:3] == call.v.shape[:3]
        and (q.shape[0], length, q.shape[3]) == (k.shape[0], k.shape[2], k.shape[3])
        and q.shape[2] == length
        and q.shape[1] % max(1, k.shape[1]) == 0
        and q.dtype == k.dtype == call.v.dtype
        and (mask is None or mask.shape == (q.shape[0], length))
    )


@contextmanager
def _opened(path: Path, device: str | torch.device = "cpu") -> Iterator[tuple[Any, _About]]:
    """Open a file, and turn whatever is wrong with it into an error that names it."""
    safetensors = _safetensors()
    try:
        with safetensors.safe_open(path, framework="pt", device=str(device)) as file:
            said = file.metadata() or {}
            seen = (said.get("format"), said.get("version"))
            if seen == (FORMAT, str(VERSION)):
                yield file, _About.parse(said["call"])
                return
            found = f"format {seen[0]!r}, version {seen[1]!r}"
    except (OSError, KeyError, TypeError, ValueError, safetensors.SafetensorError) as error:
        found = f"{type(error).__name__}: {error}"
    raise _no_call(path, found)


def _no_call(path: Path, found: str) -> CalibrationError:
    return CalibrationError(
        "a file holds no captured attention call",
        got=f"{path}: {found}",
        expected=f"tensors q, k and v of one call, once in a folder, and metadata of {FORMAT!r}, "
        f"version {VERSION}",
        next_step="capture it again, or remove it from the folder",
    )


def _safetensors() -> Any:
    try:
        import safetensors.torch
    except ImportError:
        raise MissingExtraError(
            "safetensors", extra="calibrate", purpose="captured attention"
        ) from None
    return safetensors
