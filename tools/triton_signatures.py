"""The Triton kernels as the launchers call them: types, constants, options; and what is asked of the machine code."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton.language as tl

from curveball_fused.backends.triton import activations as triton_activations
from curveball_fused.backends.triton import attention as triton_attention
from curveball_fused.backends.triton import batch_norm as triton_batch_norm
from curveball_fused.backends.triton import coefficients as triton_coefficients
from curveball_fused.backends.triton import cross_entropy as triton_cross_entropy
from curveball_fused.backends.triton import cross_entropy_kernels as triton_cross_entropy_kernels
from curveball_fused.backends.triton import damping as triton_damping
from curveball_fused.backends.triton import layer_norm as triton_layer_norm
from curveball_fused.backends.triton import losses as triton_losses
from curveball_fused.backends.triton import norms as triton_norms
from curveball_fused.backends.triton import parameters as triton_parameters
from curveball_fused.backends.triton import preconditioners as triton_preconditioners
from curveball_fused.backends.triton import reduce as triton_reduce
from curveball_fused.backends.triton import row_blocks as triton_rows
from curveball_fused.backends.triton import solve as triton_solve

DTYPES = {"fp16": torch.float16, "bf16": torch.bfloat16, "fp32": torch.float32, "fp64": torch.float64}
TYPES = {"fp16": tl.float16, "bf16": tl.bfloat16, "fp32": tl.float32, "fp64": tl.float64}


class Kernel(NamedTuple):
    """What to compile: types by parameter (others are None), and the launcher's options.

    The type of strides is a tuple, in which "1" stands for the number. `vectors` is how many 128-bit loads and stores a
    thread needs for all operands of the hot loops, if there are any; or of the whole code, if that is `straight`.
    """

    name: str
    function: Any
    types: dict[str, str | tuple[str, ...]]
    constants: dict[str, Any]
    warps: int
    vectors: tuple[int, int] = (0, 0)
    straight: bool = False
    stages: int = 3

    @property
    def registers(self) -> int:
        """The bound. 80 lets a multiprocessor of 65536 registers run three programs of 8 warps at once, 128 two."""
        if self.name.startswith(("update_", "dots", "precondition_")):
            wide = "fp64" in self.name or self.name.startswith("precondition_ fp32 bf16")
            return 128 if wide else 80
        return 255 if "attention" in self.name or "_norm fp64" in self.name else 144

    @property
    def may_spill(self) -> bool:
        """A few values, outside the hot loops: ptxas does so to fit one more warp."""
        names = ("mse", "bce", "cross_entropy", "_norm", "attention", "precondition_ fp64")
        return any(name in self.name for name in names)

    @property
    def fused(self) -> bool:
        """Whether the launcher allows fused multiply-add: where many elements are worked on."""
        return self.vectors != (0, 0) or "cross_entropy" in self.name


def kernels() -> list[Kernel]:
    """Every kernel, those over many elements in several dtypes."""
    scalar = dict(scalars="*fp64", new="*fp64")
    doubles = dict.fromkeys(
        ("low", "high", "factor", "minimum", "maximum", "beta", "rho", "lr", "theta", "average"), "fp64"
    )
    found = [
        Kernel("solve", triton_solve.solve_kernel, scalar | doubles | dict(loss="*fp32", products="*fp64"),
               dict(BETA_FIXED=False, RHO_FIXED=False, BOUNDED=True), 1),
        Kernel("adapt_damping", triton_damping.adapt_damping_kernel, scalar | doubles | dict(new_loss="*fp32"), {}, 1),
        Kernel("keep_coefficients", triton_coefficients.keep_coefficients_kernel,
               scalar | dict(loss="*fp32", slope="*fp64", room="*fp32", sign="fp64"), {}, 1),
        Kernel("finish update_", triton_parameters.finish_update_kernel,
               scalar | dict(partials="*fp64", bounds="*i64", lr="*fp64", groups="i32"),
               dict(BLOCK=triton_reduce.SUM_BLOCK), triton_parameters.WARPS),
        Kernel("finish dots", triton_reduce.sum_rows_kernel, dict(partials="*fp64", count="i32", result="*fp64"),
               dict(BLOCK=triton_reduce.SUM_BLOCK), triton_parameters.WARPS),
        Kernel("finish loss", triton_reduce.finish_kernel,
               dict(partials="*fp64", count="i32", divisor="*fp64", sign="fp64", loss="*fp64", result="*fp64"),
               dict(BLOCK=triton_reduce.SUM_BLOCK), triton_reduce.SUM_WARPS),
        Kernel("cross_entropy D", triton_rows.divisor_kernel,
               dict(target="*i64", divisors="*fp64", n="i64", classes="i32", ignore_index="i32"),
               dict(ACC=tl.float32, BLOCK=1024), 4),
    ]  # fmt: skip
    for dtypes in ("fp32 fp32 fp32", "bf16 fp32 bf16", "fp16 fp32 fp32", "fp64 fp64 fp64"):
        found.append(_update(*dtypes.split()))
    for dtypes in ("fp32 fp32", "fp32 bf16", "fp64 fp64"):
        found.append(_dots(*dtypes.split()))
    for dtypes in ("fp32 fp32", "fp32 bf16", "fp64 fp64"):
        found += [_precondition(*dtypes.split(), has_z, moves) for has_z in (True, False) for moves in (True, False)]
    for x in ("bf16", "fp32"):
        for second in (False, True):
            found += [_loss(x, second, bce) for bce in (False, True)]
            found += [_cross_entropy(x, second, classes) for classes in (10, 50257)]
    for x in ("bf16", "fp32"):
        found += [_layer_norm(x, length) for length in (64, 768, 4096, 16384)]
        found += [_batch_norm(x, what, last) for what in ("sums", "dy", "both") for last in (False, True)]
        found += [_attention(x, width) for width in (64, 128, 256)]
        found += [_activation(x, name) for name in ("gelu", "gelu_tanh", "silu")]
    found += [
        _without(_layer_norm("fp32", 768), "mean", "dbias"),
        _without(_layer_norm("bf16", 16384), "mean", "weight"),
    ]
    found += [_batch_norm("fp32", "eval", last) for last in (False, True)]
    found += [_attention(x, 64, masked=True) for x in ("bf16", "fp32")]
    found += [_layer_norm("fp64", 768), _batch_norm("fp64", "both", False), _batch_norm("fp64", "both", True)]
    return [*found, _attention("fp64", 64), _attention("fp64", 128), _activation("fp64", "gelu")]


def _list_options() -> dict[str, Any]:
    names = ("CHUNK", "BLOCK_MAIN", "BLOCK_TAIL")
    return {name: getattr(triton_parameters, name) for name in names}


def _accumulator(x: str) -> str:
    return "fp64" if x == "fp64" else "fp32"


def _vectors(block: int, warps: int, *dtypes: str) -> int:
    return sum(max(block // (32 * warps) * TYPES[dtype].primitive_bitwidth // 128, 1) for dtype in dtypes)


def _update(w: str, z: str, r: str) -> Kernel:
    types = dict(table="*i64", tensors="i32", scalars="*fp64", lr="*fp64", weight_decay="*fp64", partials="*fp64")
    constants = dict(W=TYPES[w], Z=TYPES[z], R=TYPES[r], **_list_options())
    block, warps = triton_parameters.BLOCK_MAIN, triton_parameters.WARPS
    vectors = _vectors(block, warps, w, z, r), _vectors(block, warps, w, z)
    return Kernel(f"update_ {w} {z} {r}", triton_parameters.update_kernel, types, constants, warps, vectors)


def _dots(z: str, r: str) -> Kernel:
    types = dict(table="*i64", tensors="i32", partials="*fp64", slots="i32")
    constants = dict(Z=TYPES[z], R=TYPES[r], **_list_options())
    block, warps = triton_parameters.BLOCK_MAIN, triton_parameters.WARPS
    return Kernel(
        f"dots {z} {r}", triton_parameters.dots_kernel, types, constants, warps, (_vectors(block, warps, z, r), 0)
    )


def _precondition(v: str, r: str, has_z: bool, moves: bool) -> Kernel:
    types = dict(table="*i64", tensors="i32", weight="*fp64", decay="fp64", eps="fp64", partials="*fp64", slots="i32")
    types |= dict(scalars="*fp64") if moves else {}
    block, warps = triton_preconditioners.block_main(DTYPES[v], DTYPES[r]), triton_parameters.WARPS
    constants = dict(U=TYPES[v], V=TYPES[v], R=TYPES[r], Z=TYPES[v], HAS_Z=has_z)
    constants |= _list_options() | dict(BLOCK_MAIN=block)
    vectors = _vectors(block, warps, *[v] * (1 + has_z), r), _vectors(block, warps, *[v] * (1 + moves))
    name = f"precondition_ {v} {r}{'' if has_z else ' -z'}{'' if moves else ' -scalars'}"
    return Kernel(name, triton_preconditioners.precondition_kernel, types, constants, warps, vectors)


def _loss(x: str, second: bool, bce: bool) -> Kernel:
    operands = ("x", "v", "u", "y") if second else ("x", "v", "y")
    types = dict.fromkeys(operands, f"*{x}") | dict(partials="*fp64", divisor="*fp64", sign="fp64", n="i64")
    types |= {} if second else {"c": f"*{x}"}
    constants = dict(
        weights=1,
        pos_weights=1,
        BCE=bce,
        ACC=TYPES[_accumulator(x)],
        BLOCK_MAIN=triton_losses.BLOCK_MAIN,
        BLOCK_TAIL=triton_losses.BLOCK_TAIL,
        VECTOR=128 // TYPES[x].primitive_bitwidth,
    )
    name = f"{'bce' if bce else 'mse'}_{'products' if second else 'cotangent'} {x}"
    block, warps = triton_losses.BLOCK_MAIN, triton_losses.WARPS
    vectors = _vectors(block, warps, *[x] * len(operands)), 0 if second else _vectors(block, warps, x)
    return Kernel(name, triton_losses.loss_kernel, types, constants, warps, vectors)


def _cross_entropy(x: str, second: bool, classes: int) -> Kernel:
    a = _accumulator(x)
    types = dict(
        x=f"*{x}", v=f"*{x}", target="*i64", row_stats=f"*{a}", divisors="*fp64", divisor="*fp64", partials="*fp64"
    )
    types |= dict(n="i64", classes="i32", ignore_index="i32", smoothing="fp64", sign="fp64")
    types |= dict(u=f"*{x}") if second else dict(c=f"*{x}")
    shape = triton_cross_entropy.shape_of(classes, TYPES[x].primitive_bitwidth // 8)
    warps = shape.pop("num_warps")
    function = triton_cross_entropy_kernels.products_kernel if second else triton_cross_entropy_kernels.cotangent_kernel
    name = f"cross_entropy_{'products' if second else 'cotangent'} {x} C={classes}"
    # The first sweep reads two operands, the second two or three.
    each = _vectors(shape["BLOCK_MAIN"], warps, x) if shape["ROWS"] == 1 else 0
    vectors = (5 * each, 0) if second else (4 * each, each)
    return Kernel(name, function, types, dict(ACC=TYPES[a], SMOOTH=False, **shape), warps, vectors)


def _unit(x: str) -> int:
    return 128 // TYPES[x].primitive_bitwidth


def _layer_norm(x: str, length: int) -> Kernel:
    types = dict.fromkeys(("dx", "x", "weight", "dweight", "dbias", "dy"), f"*{x}") | dict(n="i32", units="i32")
    types |= dict.fromkeys(("mean", "rstd"), f"*{_accumulator(x)}")
    shape = triton_layer_norm.rows_of(length)
    warps, whole = shape.pop("num_warps"), shape["WHOLE"]
    each = _vectors(shape["ROWS"] * shape["BLOCK"], warps, x)
    # x and dx, which a long row needs twice. Of the parameters a short row's may be loaded once for several rows.
    vectors = (2 * each if whole else 7 * each, each)
    constants = dict(UNIT=_unit(x), ACC=TYPES[_accumulator(x)], **shape)
    function = triton_layer_norm.layer_norm_kernel
    return Kernel(f"layer_norm {x} D={length}", function, types, constants, warps, vectors, straight=whole)


def _without(kernel: Kernel, *names: str) -> Kernel:
    """The kernel with None for some of its tensors."""
    types = {name: type for name, type in kernel.types.items() if name not in names}
    each = kernel.vectors[1]
    vectors = kernel.vectors[0] - (0 if kernel.straight else each * len({*names} - {"mean"})), each
    return kernel._replace(name=f"{kernel.name} -{' -'.join(names)}", types=types, vectors=vectors)


def _batch_norm(x: str, what: str, last: bool) -> Kernel:
    """Of 1024 numbers a channel and sample, or with the channel as the last dimension."""
    types = dict.fromkeys(("dx", "x"), f"*{x}") | dict.fromkeys(("mean", "rstd"), f"*{_accumulator(x)}")
    types |= dict.fromkeys(("rows", "planes", "units", "tiles", "parts", "count"), "i32")
    if what == "sums":
        types |= dict(partials="*fp64")
    else:
        types |= dict.fromkeys(("weight", "dweight", "dbias", "dy"), f"*{x}")
    if what == "dy":
        types |= dict(sums="*fp64")
    columns = triton_batch_norm.COLUMNS if last else 1024
    constants = dict(UNIT=_unit(x), ACC=TYPES[_accumulator(x)], LAST=last, TRAINING=what != "eval")
    constants |= dict(ROWS=triton_norms.BLOCK_TILE // columns, COLS=columns)
    each, stores = _vectors(triton_norms.BLOCK_TILE, triton_norms.WARPS, x), what != "sums"
    vectors = (4 * each if what == "both" else 2 * each, each if stores else 0)
    name = f"batch_norm {x} {what}{' channels last' if last else ''}"
    return Kernel(name, triton_batch_norm.batch_norm_kernel, types, constants, triton_norms.WARPS, vectors)


def _attention(x: str, width: int, masked: bool = False) -> Kernel:
    """With a mask, whose numbers are loaded as they lie in registers, so that the loop is not of vectors only."""
    tensors = ("dq", "dk", "dv", "q", "k", "v", "out", "dout")
    types: dict[str, Any] = dict.fromkeys(tensors, f"*{x}")
    types |= dict.fromkeys((f"{name}_strides" for name in tensors), ("i32", "i32", "i32", "1"))
    types |= dict(heads="i32", queries="i32", keys="i32", scale="fp64")
    shape = triton_attention.shape_of(width, width, TYPES[x].primitive_bitwidth // 8)
    warps, stages = shape.pop("num_warps"), shape.pop("num_stages")
    # The innermost loop loads k, dk, v and dv; or, over blocks of a wide D, q, dq, k and dk, none of them smaller.
    vectors = 4 * _vectors(shape["BLOCK_N"] * min(shape["BLOCK_D"], shape["BLOCK_E"]), warps, x), 0
    constants = dict(D=width, E=width, ACC=TYPES[_accumulator(x)], CAUSAL=True, **shape)
    if masked:
        types |= dict(mask=f"*{x}", mask_strides=("i32", "i32", "i32", "1"))
    name = f"attention {x} D={width}{' masked' if masked else ''}"
    function = triton_attention.attention_kernel
    return Kernel(name, function, types, constants, warps, vectors, straight=masked, stages=stages)


def _activation(x: str, name: str) -> Kernel:
    types = dict.fromkeys(("x", "y", "derivative"), f"*{x}") | dict(n="i64")
    block, warps = triton_activations.BLOCK, triton_activations.WARPS
    each = _vectors(block, warps, x)
    constants = dict(NAME=name, ACC=TYPES[_accumulator(x)], BLOCK=block)
    function = triton_activations.activation_kernel
    return Kernel(f"{name} {x}", function, types, constants, warps, (each, 2 * each), straight=True)
