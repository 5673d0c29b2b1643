"""Host reads, which make the host wait for the device and a CUDA graph impossible, found by name."""

from __future__ import annotations

import traceback
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from curveball_fused._torch_private import TorchDispatchMode, checks_errors, copies_to
from curveball_fused.curvature.torch_modes import first_line

_OURS, _TORCHS = Path(__file__).parents[1], Path(torch.__file__).parent
# Results whose value or shape the host must learn from the device.
_TAGS = {torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape}
_CHECKS = {checks_errors}  # of a decomposition, which has no such tag
_INDEXING = {torch.ops.aten.index, torch.ops.aten.index_put, torch.ops.aten.index_put_}


class HostRead(RuntimeError):
    """Something reads a tensor's values on the host."""


class NoHostReads(TorchDispatchMode):
    """Raise `HostRead` where values of a tensor on the device are about to be read on the host, or copied there.

    Where the device is the CPU, every tensor counts as one on the device, and copies are not noticed.

    Args:
        device: where the tensors are that must not be read.
    """

    def __init__(self, device: torch.device) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._device_type = device.type

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        reason = self._reason(func, args, kwargs)
        if reason:
            raise HostRead(f"{func} {reason}, at {_user_line(traceback.extract_stack())}")
        return func(*args, **kwargs)

    def _reason(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> str:
        """Return why a call has the host wait; empty if it does not."""
        tensors = [a for a in (*args, *kwargs.values()) if isinstance(a, Tensor)]
        devices = {t.device.type for t in tensors}
        if func.overloadpacket in _INDEXING:
            return "counts the elements of a mask" if self._device_type in devices and _has_mask(args) else ""
        if self._device_type in devices and (func.overloadpacket in _CHECKS or not _TAGS.isdisjoint(func.tags)):
            return "reads a value of the device on the host"
        if func is copies_to.default and "device" in kwargs and kwargs["device"] is not None:
            devices |= {torch.device(kwargs["device"]).type}
        copies = func in (copies_to.default, torch.ops.aten.copy_.default)
        if copies and len(devices) > 1 and not _is_quiet(func, args, kwargs):
            return f"copies between {' and '.join(sorted(devices))}"
        return ""


def refuse_host_reads(run: Callable[[], None], device: torch.device) -> str:
    """Run a step that is to be captured, and watch for what would have the host wait.

    Args:
        run: takes the step.
        device: of the parameters.

    Returns:
        The error by which the step failed otherwise, and where; empty if it did not. It is not raised, as not all that
        torch can do works while it is watched: what is really wrong shows in the next run, or in the capture.

    Raises:
        RuntimeError: the step reads values on the host; the message names the line.
    """
    try:
        with NoHostReads(device):
            run()
    except HostRead as error:
        raise RuntimeError(
            f"the step cannot be captured as a CUDA graph, as the host would have to wait for the device: {error}. "
            "Compute that on the device (torch.where, masked_fill, fixed shapes), or call optimizer.step."
        ) from error
    except Exception as error:
        return (
            f"{type(error).__name__}: {first_line(error)}, at {_user_line(traceback.extract_tb(error.__traceback__))}"
        )
    return ""


def _is_quiet(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    """Return whether a copy is from pinned memory and nobody waits for it."""
    source = args[0] if func is copies_to.default else args[1]
    waits = not kwargs.get("non_blocking", args[2] if len(args) > 2 else False)
    return source.device.type == "cpu" and not waits and source.is_pinned()


def _has_mask(args: tuple[Any, ...]) -> bool:
    return any(isinstance(i, Tensor) and i.dtype in (torch.bool, torch.uint8) for i in args[1])


def _user_line(stack: Iterable[traceback.FrameSummary]) -> str:
    """Return the innermost line of the stack that is neither torch's nor this package's."""
    for frame in reversed(list(stack)):
        path = Path(frame.filename)
        if _OURS not in path.parents and _TORCHS not in path.parents:
            return f"{frame.filename}:{frame.lineno}, in {frame.name}"
    return "an unknown line"
