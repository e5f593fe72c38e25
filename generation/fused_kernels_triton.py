"""Triton kernels of the small operations between a captured round's matrix products: one instead of several.

    rotate               RoPE of queries and keys           `fused_rope.py`
    cos_sin              its angles, for the draft          `fused_rope.py`
    gate                 act(gate) * up of a gated MLP      `fused_mlp.py`
    write                keys and values into their slots   `slot_writing.py`
    normalise            RMSNorm                            `fused_norm.py`
    add_and_normalise    a sum and the RMSNorm behind it    `fused_residual.py`
    normalise_both       two RMSNorms side by side          `fused_draft_layer.py`

Sums and products are float32, and rounded wherever the operations they replace round.

Shapes: B batch, N positions, H heads, G key-value heads, K slots.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra import libdevice

BLOCK_HEADS = 4
BLOCK_GATES = 1024
BLOCK_NORM = 1024


def rotate(query: Tensor, key: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    """See `rotate_by_definition`; positions stand before heads in memory, as projections leave them."""
    batch_size, num_heads, num_positions, width = query.shape
    num_groups = key.shape[1]
    rotated_query = query.new_empty(batch_size, num_positions, num_heads, width).transpose(1, 2)
    rotated_key = key.new_empty(batch_size, num_positions, num_groups, width).transpose(1, 2)
    cos, sin = cos.expand(batch_size, -1, -1), sin.expand(batch_size, -1, -1)
    num_query_blocks = triton.cdiv(num_heads, BLOCK_HEADS)
    with torch.cuda.device_of(query):
        _rotate_kernel[num_query_blocks + triton.cdiv(num_groups, BLOCK_HEADS), num_positions, batch_size](
            query,
            key,
            cos,
            sin,
            rotated_query,
            rotated_key,
            *query.stride(),
            *key.stride(),
            *cos.stride(),
            *sin.stride(),
            *rotated_query.stride()[:3],
            *rotated_key.stride()[:3],
            num_heads,
            num_groups,
            num_query_blocks,
            HALF=width // 2,
            SECOND=cos.shape[-1] - width // 2,
            BLOCK_HALF=triton.next_power_of_2(width // 2),
            BLOCK=BLOCK_HEADS,
            num_warps=2,
            enable_fp_fusion=False,  # products are rounded before they are added
        )
    return rotated_query, rotated_key


@triton.jit
def _rotate_kernel(
    query_ptr,
    key_ptr,
    cos_ptr,
    sin_ptr,
    rotated_query_ptr,
    rotated_key_ptr,
    query_batch,
    query_head,
    query_position,
    query_column,
    key_batch,
    key_head,
    key_position,
    key_column,
    cos_batch,
    cos_position,
    cos_column,
    sin_batch,
    sin_position,
    sin_column,
    to_query_batch,
    to_query_head,
    to_query_position,
    to_key_batch,
    to_key_head,
    to_key_position,
    num_heads,
    num_groups,
    num_query_blocks,
    HALF: tl.constexpr,
    SECOND: tl.constexpr,
    BLOCK_HALF: tl.constexpr,
    BLOCK: tl.constexpr,
):
    block, position, batch = tl.program_id(0), tl.program_id(1).to(tl.int64), tl.program_id(2).to(tl.int64)
    column = tl.arange(0, BLOCK_HALF)
    cos_ptr += batch * cos_batch + position * cos_position
    sin_ptr += batch * sin_batch + position * sin_position
    is_column = column < HALF
    first_cos = tl.load(cos_ptr + column * cos_column, mask=is_column, other=0.0)
    second_cos = tl.load(cos_ptr + (SECOND + column) * cos_column, mask=is_column, other=0.0)
    first_sin = tl.load(sin_ptr + column * sin_column, mask=is_column, other=0.0)
    second_sin = tl.load(sin_ptr + (SECOND + column) * sin_column, mask=is_column, other=0.0)
    if block < num_query_blocks:
        head = block * BLOCK + tl.arange(0, BLOCK)
        _rotate_heads(
            query_ptr + batch * query_batch + position * query_position + head[:, None] * query_head,
            rotated_query_ptr + batch * to_query_batch + position * to_query_position + head[:, None] * to_query_head,
            query_column,
            (head < num_heads)[:, None] & is_column[None, :],
            column[None, :],
            first_cos[None, :],
            second_cos[None, :],
            first_sin[None, :],
            second_sin[None, :],
            HALF,
        )
    else:
        head = (block - num_query_blocks) * BLOCK + tl.arange(0, BLOCK)
        _rotate_heads(
            key_ptr + batch * key_batch + position * key_position + head[:, None] * key_head,
            rotated_key_ptr + batch * to_key_batch + position * to_key_position + head[:, None] * to_key_head,
            key_column,
            (head < num_groups)[:, None] & is_column[None, :],
            column[None, :],
            first_cos[None, :],
            second_cos[None, :],
            first_sin[None, :],
            second_sin[None, :],
            HALF,
        )


@triton.jit
def _rotate_heads(
    from_ptr,
    to_ptr,
    from_column,
    is_needed,
    column,
    first_cos,
    second_cos,
    first_sin,
    second_sin,
    HALF: tl.constexpr,
):
    first = tl.load(from_ptr + column * from_column, mask=is_needed, other=0.0)
    second = tl.load(from_ptr + (HALF + column) * from_column, mask=is_needed, other=0.0)
    low = _rounded_product(first, first_cos) - _rounded_product(second, first_sin)
    high = _rounded_product(second, second_cos) + _rounded_product(first, second_sin)
    tl.store(to_ptr + column, low, mask=is_needed)
    tl.store(to_ptr + HALF + column, high, mask=is_needed)


@triton.jit
def _rounded_product(left, right):
    """In float32, rounded to the type of the factors."""
    return (left.to(tl.float32) * right.to(tl.float32)).to(left.dtype).to(tl.float32)


def gate(gates: Tensor, values: Tensor, activation: str) -> Tensor:
    """See `gate_by_definition`."""
    gates, values = gates.contiguous(), values.contiguous()
    gated = torch.empty_like(gates)
    with torch.cuda.device_of(gates):
        _gate_kernel[(triton.cdiv(gates.numel(), BLOCK_GATES),)](
            gates, values, gated, gates.numel(), IS_SILU=activation == "silu", BLOCK=BLOCK_GATES
        )
    return gated


@triton.jit
def _exp_in_interpreter(x):
    return tl.exp(x)


@triton.jit
def _tanh_in_interpreter(x):
    return 2 / (1 + tl.exp(-2 * x)) - 1


# With the bits of PyTorch's; the interpreter does not have them.
_exp = _exp_in_interpreter if triton.knobs.runtime.interpret else libdevice.exp
_tanh = _tanh_in_interpreter if triton.knobs.runtime.interpret else libdevice.tanh


@triton.jit
def _gate_kernel(gates_ptr, values_ptr, gated_ptr, num_gates, IS_SILU: tl.constexpr, BLOCK: tl.constexpr):
    place = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    is_needed = place < num_gates
    gates = tl.load(gates_ptr + place, mask=is_needed, other=0.0)
    value = tl.load(values_ptr + place, mask=is_needed, other=0.0).to(tl.float32)
    x = gates.to(tl.float32)
    if IS_SILU:
        activated = tl.div_rn(x, 1 + _exp(-x))
    else:
        inner = 0.7978845608028654 * (x + 0.044715 * (x * x * x))  # the square root of 2 / pi
        activated = 0.5 * x * (1 + _tanh(inner))
    tl.store(gated_ptr + place, activated.to(gates.dtype).to(tl.float32) * value, mask=is_needed)


def write(keys: Tensor, values: Tensor, slots: Tensor, key_states: Tensor, value_states: Tensor) -> None:
    """
    See `write_by_definition`; slots that do not exist are left out.

    **Effects**: writes into `keys` and `values`.
    """
    batch_size, num_groups, num_positions, key_dim = key_states.shape
    value_dim = value_states.shape[-1]
    with torch.cuda.device_of(keys):
        _write_kernel[triton.cdiv(num_groups, BLOCK_HEADS), num_positions, batch_size](
            keys,
            values,
            slots,
            key_states,
            value_states,
            *keys.stride(),
            *values.stride(),
            *slots.stride(),
            *key_states.stride(),
            *value_states.stride(),
            num_groups,
            keys.shape[2],
            KEY_DIM=key_dim,
            VALUE_DIM=value_dim,
            BLOCK_DIM=triton.next_power_of_2(max(key_dim, value_dim)),
            BLOCK=BLOCK_HEADS,
            num_warps=2,
        )


@triton.jit
def _write_kernel(
    keys_ptr,
    values_ptr,
    slots_ptr,
    key_states_ptr,
    value_states_ptr,
    keys_batch,
    keys_head,
    keys_slot,
    keys_column,
    values_batch,
    values_head,
    values_slot,
    values_column,
    slots_batch,
    slots_position,
    key_batch,
    key_head,
    key_position,
    key_column,
    value_batch,
    value_head,
    value_position,
    value_column,
    num_groups,
    capacity,
    KEY_DIM: tl.constexpr,
    VALUE_DIM: tl.constexpr,
    BLOCK_DIM: tl.constexpr,
    BLOCK: tl.constexpr,
):
    position, batch = tl.program_id(1).to(tl.int64), tl.program_id(2).to(tl.int64)
    slot = tl.load(slots_ptr + batch * slots_batch + position * slots_position).to(tl.int64)
    head = (tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)).to(tl.int64)[:, None]
    column = tl.arange(0, BLOCK_DIM)[None, :]
    is_needed = (head < num_groups) & (slot >= 0) & (slot < capacity)
    if KEY_DIM > 0:
        is_key = is_needed & (column < KEY_DIM)
        source = key_states_ptr + batch * key_batch + position * key_position + head * key_head + column * key_column
        target = keys_ptr + batch * keys_batch + slot * keys_slot + head * keys_head + column * keys_column
        tl.store(target, tl.load(source, mask=is_key), mask=is_key)
    if VALUE_DIM > 0:
        is_value = is_needed & (column < VALUE_DIM)
        source = value_states_ptr + batch * value_batch + position * value_position + head * value_head
        target = values_ptr + batch * values_batch + slot * values_slot + head * values_head + column * values_column
        tl.store(target, tl.load(source + column * value_column, mask=is_value), mask=is_value)


def normalise(states: Tensor, weight: Tensor, eps: float, rounds_first: bool, adds_one: bool) -> Tensor:
    """See `normalise_by_definition`."""
    states = states.contiguous()
    normed = torch.empty_like(states)
    _launch_norm(None, states, weight, states, normed, eps, rounds_first, adds_one)
    return normed


def add_and_normalise(
    residual: Tensor, states: Tensor, weight: Tensor, eps: float, rounds_first: bool, adds_one: bool
) -> tuple[Tensor, Tensor]:
    """See `add_and_normalise_by_definition`."""
    residual, states = residual.contiguous(), states.contiguous()
    sums, normed = torch.empty_like(residual), torch.empty_like(residual)
    _launch_norm(residual, states, weight, sums, normed, eps, rounds_first, adds_one)
    return sums, normed


def _launch_norm(
    residual: Tensor | None, states, weight, sums, normed, eps: float, rounds_first: bool, adds_one: bool
) -> None:
    width = states.shape[-1]
    num_rows, block = states.numel() // width, triton.next_power_of_2(width)
    block_rows = max(1, BLOCK_NORM // block)
    with torch.cuda.device_of(states):
        _norm_kernel[(triton.cdiv(num_rows, block_rows),)](
            states if residual is None else residual,
            states,
            weight,
            sums,
            normed,
            eps,
            num_rows,
            width,
            HAS_RESIDUAL=residual is not None,
            ROUNDS_FIRST=rounds_first,
            ADDS_ONE=adds_one,
            BLOCK_ROWS=block_rows,
            BLOCK=block,
            num_warps=8 if block > 2048 else 4,
        )


@triton.jit
def _norm_kernel(
    residual_ptr,
    states_ptr,
    weight_ptr,
    sums_ptr,
    normed_ptr,
    eps,
    num_rows,
    width,
    HAS_RESIDUAL: tl.constexpr,
    ROUNDS_FIRST: tl.constexpr,
    ADDS_ONE: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = (tl.program_id(0) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)).to(tl.int64)[:, None]
    column = tl.arange(0, BLOCK)[None, :]
    place, is_needed = row * width + column, (row < num_rows) & (column < width)
    states = tl.load(states_ptr + place, mask=is_needed, other=0.0)
    weight = tl.load(weight_ptr + column, mask=column < width, other=0.0).to(tl.float32)
    if ADDS_ONE:
        weight += 1
    if HAS_RESIDUAL:
        residual = tl.load(residual_ptr + place, mask=is_needed, other=0.0)
        states = (residual.to(tl.float32) + states.to(tl.float32)).to(states.dtype)
        tl.store(sums_ptr + place, states, mask=is_needed)
    tl.store(normed_ptr + place, _normed(states, eps, width, ROUNDS_FIRST) * weight, mask=is_needed)


@triton.jit
def _normed(states, eps, width, ROUNDS_FIRST: tl.constexpr):
    wide = states.to(tl.float32)
    normed = wide * tl.rsqrt(tl.sum(wide * wide, axis=1) / width + eps)[:, None]
    return normed.to(states.dtype).to(tl.float32) if ROUNDS_FIRST else normed


def normalise_both(
    first: Tensor,
    second: Tensor,
    first_weight: Tensor,
    second_weight: Tensor,
    eps: float,
    rounds_first: bool,
    adds_one: bool,
) -> Tensor:
    """See `normalise_both_by_definition`."""
    first, second = first.contiguous(), second.contiguous()
    width = first.shape[-1]
    normed = first.new_empty(*first.shape[:-1], 2 * width)
    block = triton.next_power_of_2(width)
    with torch.cuda.device_of(first):
        _norm_both_kernel[first.numel() // width, 2](
            first,
            second,
            first_weight,
            second_weight,
            normed,
            eps,
            width,
            ROUNDS_FIRST=rounds_first,
            ADDS_ONE=adds_one,
            BLOCK=block,
            num_warps=8 if block > 2048 else 4,
        )
    return normed


@triton.jit
def _norm_both_kernel(
    first_ptr,
    second_ptr,
    first_weight_ptr,
    second_weight_ptr,
    normed_ptr,
    eps,
    width,
    ROUNDS_FIRST: tl.constexpr,
    ADDS_ONE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row, half = tl.program_id(0).to(tl.int64), tl.program_id(1)
    column = tl.arange(0, BLOCK)[None, :]
    is_column = column < width
    states_ptr, weight_ptr = first_ptr, first_weight_ptr
    if half == 1:
        states_ptr, weight_ptr = second_ptr, second_weight_ptr
    states = tl.load(states_ptr + row * width + column, mask=is_column, other=0.0)
    weight = tl.load(weight_ptr + column, mask=is_column, other=0.0).to(tl.float32)
    if ADDS_ONE:
        weight += 1
    normed = _normed(states, eps, width, ROUNDS_FIRST) * weight
    tl.store(normed_ptr + (2 * row + half) * width + column, normed, mask=is_column)


def cos_sin(positions: Tensor, inv_freq: Tensor, scaling: float, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Cosines and sines of the angles at `positions (B, N)`, `(B, N, d)` each; both halves are alike."""
    half = len(inv_freq)
    cos = torch.empty(*positions.shape, 2 * half, device=positions.device, dtype=dtype)
    sin = torch.empty_like(cos)
    with torch.cuda.device_of(cos):
        _cos_sin_kernel[positions.shape](
            positions,
            inv_freq,
            cos,
            sin,
            scaling,
            *positions.stride(),
            HALF=half,
            BLOCK_HALF=triton.next_power_of_2(half),
            num_warps=1,
        )
    return cos, sin


@triton.jit
def _cos_sin_kernel(
    positions_ptr,
    inv_freq_ptr,
    cos_ptr,
    sin_ptr,
    scaling,
    positions_batch,
    positions_row,
    HALF: tl.constexpr,
    BLOCK_HALF: tl.constexpr,
):
    batch, row = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64)
    position = tl.load(positions_ptr + batch * positions_batch + row * positions_row).to(tl.float32)
    column = tl.arange(0, BLOCK_HALF)
    is_column = column < HALF
    angle = position * tl.load(inv_freq_ptr + column, mask=is_column, other=0.0)
    place = (batch * tl.num_programs(1) + row) * 2 * HALF + column
    cos, sin = tl.cos(angle) * scaling, tl.sin(angle) * scaling
    tl.store(cos_ptr + place, cos, mask=is_column)
    tl.store(cos_ptr + place + HALF, cos, mask=is_column)
    tl.store(sin_ptr + place, sin, mask=is_column)
    tl.store(sin_ptr + place + HALF, sin, mask=is_column)
