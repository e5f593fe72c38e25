"""Attention to latents: the definition against the model's own layer, the kernels against the definition."""

from dataclasses import replace

import pytest
import torch

from eagle3_mla.configuration_eagle3_mla import Eagle3MLAConfig
from eagle3_mla.generation import latent_attention as module
from eagle3_mla.generation.latent_attention import DraftedSlots, UpProjections, attend_by_definition, attend_latents
from eagle3_mla.modeling_eagle3_mla import Eagle3MLARotaryEmbedding, LatentAttention

# Batch, query heads, key-value heads, new rows, latent, rope, head width, slots, drafted slots, padding.
SMALL_SHAPES = {
    "rotated": (2, 4, 2, 3, 64, 0, 8, 100, 6, True),
    "rotated-chunks": (1, 4, 2, 1, 96, 0, 24, 200, 0, False),
    "rotated-many-rows": (1, 8, 2, 20, 16, 0, 8, 90, 40, False),
    "rotated-one-slot": (3, 4, 4, 1, 32, 0, 16, 1, 1, False),
    "decoupled": (2, 4, 2, 3, 64, 16, 8, 300, 6, True),
    "rotated-some-rows": (2, 8, 2, 6, 96, 0, 8, 150, 9, True),  # 24 of a group
    "decoupled-chunks": (1, 4, 1, 10, 80, 24, 8, 100, 20, False),
    "decoupled-many-parts": (3, 2, 1, 1, 32, 32, 8, 1500, 0, True),
    "decoupled-more-drafted-than-held": (2, 4, 2, 3, 32, 16, 8, 20, 15, True),
}
# Every pair compiles its own kernel, and every number of rows another.
BIG_SHAPES = [
    (batch, 32, 8, width, latent, rope, 128, length, 0 if length == 1 else width, batch > 1)
    for latent in (64, 96, 128, 256, 512)
    for rope in (0, 64)
    for batch, width, length in [(1, 1, 1), (3, 4, 17), (1, 10, 300), (3, 1, 5000)]
] + [
    (1, 32, 8, 10, 64, 32, 64, 300, 10, False),
    (3, 32, 8, 4, 256, 32, 128, 5000, 4, True),
    (1, 16, 2, 10, 96, 128, 128, 5000, 10, False),
    (1, 32, 8, 10, 512, 128, 128, 300, 60, False),
    (1, 32, 8, 64, 256, 0, 96, 5000, 64, False),
    (1, 32, 8, 64, 256, 64, 96, 5000, 64, False),
]
TOLERANCES = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1.6e-2}


def random_inputs(shape, dtype: torch.dtype, device: str = "cpu") -> dict:
    """Arguments of `attend_latents`: as in a decoder, slots beyond the lengths hold what nobody must read."""
    batch_size, num_heads, num_groups, num_rows, latent, rope, head_dim, num_slots, num_drafted, is_padded = shape
    generator = torch.Generator().manual_seed(0)

    def normal(*size) -> torch.Tensor:
        return torch.randn(*size, generator=generator, dtype=torch.float64).to(device, dtype)

    def integers(low: int, high: int, *size) -> torch.Tensor:
        return torch.randint(low, high, size, generator=generator, dtype=torch.int32).to(device)

    lengths = integers(max(1, num_slots - 7), num_slots + 1, batch_size)
    c_kv, k_rope = normal(batch_size, 1, num_slots, latent), normal(batch_size, 1, num_slots, rope)
    for sequence, length in enumerate(lengths.tolist()):
        c_kv[sequence, :, length:], k_rope[sequence, :, length:] = float("nan"), float("nan")
    sees = torch.rand(batch_size, num_rows, num_drafted, generator=generator) < 0.5
    sees[..., -1:] = True
    inv_freq = 10000.0 ** -(torch.arange(0, head_dim, 2, dtype=torch.float32, device=device) / head_dim)
    w_uk, w_uv = (normal(num_groups, head_dim, latent) * latent**-0.5 for _ in range(2))
    query_dim = head_dim + rope
    return {
        # A view whose heads lie side by side, as projections leave them.
        "query": normal(batch_size, num_rows, num_heads, query_dim).transpose(1, 2),
        "c_kv": c_kv,
        "k_rope": k_rope,
        "projections": UpProjections(w_uk, w_uv, inv_freq, 1.1) if rope == 0 else UpProjections(w_uk, w_uv),
        "lengths": lengths,
        "scaling": query_dim**-0.5,
        "drafted": DraftedSlots(sees.to(device), integers(0, num_slots, batch_size, num_drafted)),
        "first_slots": integers(0, 1 + num_slots // 9, batch_size) if is_padded else None,
    }


def in_double(inputs: dict) -> dict:
    """The same numbers in float64."""
    exact = {name: inputs[name].double() for name in ("query", "c_kv", "k_rope")}
    matrices = {name: getattr(inputs["projections"], name).double() for name in ("w_uk", "w_uv")}
    return inputs | exact | {"projections": replace(inputs["projections"], **matrices)}


def compare_with_kernels(shape, dtype: torch.dtype, device: str) -> None:
    from eagle3_mla.generation.latent_attention_triton import attend

    inputs = random_inputs(shape, dtype, device)
    expected = attend_by_definition(**in_double(inputs))
    error = (attend(*inputs.values()).double() - expected).abs().max()
    assert error <= TOLERANCES[dtype] * expected.abs().max().clamp(min=0.5)


@pytest.mark.skipif(torch.cuda.is_available(), reason="the interpreter is for machines without a GPU")
@pytest.mark.parametrize("shape", SMALL_SHAPES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_kernels_compute_the_definition_in_the_interpreter(shape, dtype):
    """The interpreter multiplies no bfloat16 matrices."""
    pytest.importorskip("triton")
    compare_with_kernels(SMALL_SHAPES[shape], dtype, "cpu")


@pytest.mark.gpu
@pytest.mark.parametrize("shape", [*SMALL_SHAPES.values(), *BIG_SHAPES], ids=str)
def test_kernels_compute_the_definition_on_a_gpu_in_bfloat16(shape):
    compare_with_kernels(shape, torch.bfloat16, "cuda")


@pytest.mark.gpu
@pytest.mark.parametrize("shape", [*SMALL_SHAPES.values(), BIG_SHAPES[6], BIG_SHAPES[-2], BIG_SHAPES[-1]], ids=str)
def test_kernels_compute_the_definition_on_a_gpu_in_float16(shape):
    compare_with_kernels(shape, torch.float16, "cuda")


def take_keys_for_64_rows(monkeypatch) -> None:
    """As for caches of more than 16384 slots."""
    from eagle3_mla.generation import latent_rotated_triton

    monkeypatch.setattr(latent_rotated_triton, "LONG_CAPACITY", 0)


@pytest.mark.skipif(torch.cuda.is_available(), reason="the interpreter is for machines without a GPU")
@pytest.mark.parametrize("is_padded", [False, True])
def test_keys_made_once_for_many_rows_of_a_long_text_in_the_interpreter(monkeypatch, is_padded):
    pytest.importorskip("triton")
    take_keys_for_64_rows(monkeypatch)
    compare_with_kernels((2, 8, 2, 20, 48, 0, 8, 290, 40, is_padded), torch.float16, "cpu")


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(
    "shape", [(1, 32, 8, 10, 256, 0, 128, 5000, 60, False), (3, 32, 8, 20, 128, 0, 64, 3000, 20, True)], ids=str
)
def test_keys_made_once_for_many_rows_of_a_long_text_on_a_gpu(monkeypatch, shape, dtype):
    take_keys_for_64_rows(monkeypatch)
    compare_with_kernels(shape, dtype, "cuda")


@pytest.mark.gpu
@pytest.mark.parametrize("rope", [0, 64])
def test_one_captured_graph_serves_a_growing_cache(rope):
    inputs = random_inputs((2, 32, 8, 4, 256, rope, 128, 3000, 8, False), torch.bfloat16, "cuda")
    inputs["c_kv"], inputs["k_rope"] = inputs["c_kv"].nan_to_num(), inputs["k_rope"].nan_to_num()
    attend_latents(**inputs)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        output = attend_latents(**inputs)
    for lengths in ([9, 3000], [64, 65], [2999, 1024]):
        inputs["lengths"].copy_(torch.tensor(lengths, dtype=torch.int32))
        graph.replay()
        expected = attend_by_definition(**in_double(inputs))
        torch.testing.assert_close(output.double(), expected, atol=1.6e-2, rtol=1.6e-2)


def layer_and_inputs(rope: int) -> tuple[LatentAttention, dict]:
    """The model's attention, with what it takes for four prompt rows and a tree of three, two of its rows siblings."""
    config = Eagle3MLAConfig(
        vocab_size=40,
        draft_vocab_size=30,
        hidden_size=32,
        intermediate_size=48,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        mla_latent_dim=16,
        mla_rope_dim=rope,
        attn_implementation="eager",
    )
    attention = LatentAttention(config, layer_idx=0).double()
    positions = torch.tensor([[0, 1, 2, 3, 4, 5, 5]])
    cos_sin = Eagle3MLARotaryEmbedding(config)(positions, torch.float64)
    sees = torch.tensor([[[1, 0, 0], [1, 1, 0], [1, 0, 1]]]).bool()
    visible = torch.cat([torch.ones(1, 3, 4, dtype=torch.bool), sees], dim=2)
    mask = torch.zeros(1, 1, 3, 7, dtype=torch.float64).masked_fill_(~visible[:, None], -1e300)
    return attention, {"rows": torch.randn(1, 7, 64).double(), "cos_sin": cos_sin, "sees": sees, "mask": mask}


@pytest.mark.parametrize("num_padding", [0, 3])
@pytest.mark.parametrize("rope", [0, 8])
def test_the_definition_is_the_attention_of_the_model(rope, num_padding):
    attention, inputs = layer_and_inputs(rope)
    cos_sin = inputs["cos_sin"]
    memory = attention.remember(inputs["rows"], cos_sin)
    new_cos_sin = tuple(part[:, 4:] for part in cos_sin)
    query = attention.ask(inputs["rows"][:, 4:], new_cos_sin)
    expected = attention.attend_absorbed(query, memory, cos_sin, inputs["mask"])

    # Padding in front and room behind.
    c_kv, k_rope = (torch.nn.functional.pad(part, (0, 0, num_padding, 2), value=float("nan")) for part in memory)
    positions = torch.tensor([[4, 5, 5]], dtype=torch.int32)
    projections = UpProjections(*attention.up_projections(c_kv))
    if rope == 0:
        rotary = Eagle3MLARotaryEmbedding(attention.config)
        rotary(positions, torch.float64)
        projections = replace(projections, inv_freq=rotary.inv_freq, attention_scaling=rotary.attention_scaling)
    heads = attend_latents(
        query,
        c_kv,
        k_rope,
        projections,
        lengths=torch.tensor([7 + num_padding], dtype=torch.int32),
        scaling=attention.scaling,
        drafted=DraftedSlots(inputs["sees"], positions),
        first_slots=torch.tensor([num_padding], dtype=torch.int32),
    )
    torch.testing.assert_close(heads, expected, atol=1e-12, rtol=1e-12)


def test_a_row_that_sees_nothing_gets_zeros():
    inputs = random_inputs(SMALL_SHAPES["decoupled"], torch.float32)
    inputs["first_slots"] = inputs["lengths"].clone()
    assert attend_latents(**inputs).eq(0).all()


@pytest.mark.parametrize("shape", ["rotated", "decoupled"])
def test_a_length_beyond_the_slots_is_their_number(shape):
    """The drafted slots are the last ones that there are."""
    inputs = random_inputs(SMALL_SHAPES[shape], torch.float64)
    num_slots = inputs["c_kv"].shape[2]
    inputs["c_kv"], inputs["k_rope"] = inputs["c_kv"].nan_to_num(), inputs["k_rope"].nan_to_num()
    lengths = torch.full_like(inputs["lengths"], num_slots)
    expected = attend_latents(**inputs | {"lengths": lengths})
    for beyond in (1, num_slots):
        found = attend_latents(**inputs | {"lengths": lengths + beyond})
        torch.testing.assert_close(found, expected, rtol=0, atol=0)


@pytest.mark.skipif(torch.cuda.is_available(), reason="the interpreter is for machines without a GPU")
@pytest.mark.parametrize("shape", ["rotated", "rotated-wide", "decoupled"])
def test_kernels_take_a_length_beyond_the_slots_as_the_definition_does(shape):
    pytest.importorskip("triton")
    from eagle3_mla.generation.latent_attention_triton import attend

    inputs = random_inputs(SMALL_SHAPES[shape], torch.float32)
    inputs["c_kv"], inputs["k_rope"] = inputs["c_kv"].nan_to_num(), inputs["k_rope"].nan_to_num()
    inputs["lengths"] = inputs["lengths"] + 5
    expected = attend_by_definition(**in_double(inputs))
    torch.testing.assert_close(attend(*inputs.values()).double(), expected, atol=1e-5, rtol=0)


def test_shapes_that_do_not_fit_are_refused():
    inputs = random_inputs(SMALL_SHAPES["rotated"], torch.float32)
    with pytest.raises(ValueError, match=r"The type of `lengths` must be torch.int32, got torch.int64."):
        attend_latents(**inputs | {"lengths": inputs["lengths"].long()})
    with pytest.raises(ValueError, match=r"The width of `query` must be 8, got 7."):
        attend_latents(**inputs | {"query": inputs["query"][..., :7]})
    with pytest.raises(ValueError, match=r"`projections.inv_freq` must be given where R = 0"):
        attend_latents(**inputs | {"projections": replace(inputs["projections"], inv_freq=None)})
    with pytest.raises(ValueError, match=r"`drafted.positions` must be given where R = 0"):
        attend_latents(**inputs | {"drafted": replace(inputs["drafted"], positions=None)})


@pytest.mark.skipif(torch.cuda.is_available(), reason="the interpreter is for machines without a GPU")
def test_positions_far_into_a_text_are_as_exact_as_near_ones():
    pytest.importorskip("triton")
    from eagle3_mla.generation.latent_attention_triton import attend

    inputs = random_inputs(SMALL_SHAPES["rotated"], torch.float32)
    # Only the drafted slots are held, far apart.
    inputs["first_slots"] = inputs["lengths"] - 6
    positions = torch.tensor([[131071, 131050, 99999, 65536, 65535, 17]] * 2, dtype=torch.int32)
    inputs["drafted"] = replace(inputs["drafted"], positions=positions)
    expected = attend_by_definition(**in_double(inputs))
    torch.testing.assert_close(attend(*inputs.values()).double(), expected, atol=1e-5, rtol=0)


@pytest.mark.skipif(torch.cuda.is_available(), reason="the interpreter is for machines without a GPU")
def test_lengths_that_are_a_view_do_not_pass_for_padding():
    pytest.importorskip("triton")
    from eagle3_mla.generation.latent_attention_triton import attend

    inputs = random_inputs(SMALL_SHAPES["rotated-one-slot"], torch.float32)
    expected = attend_by_definition(**in_double(inputs))
    inputs["lengths"] = inputs["lengths"].repeat_interleave(2)[::2]
    torch.testing.assert_close(attend(*inputs.values()).double(), expected, atol=1e-5, rtol=0)


def on_gpu(dtype: torch.dtype = torch.bfloat16, width: int = 64):
    class OnGPU:
        is_cuda, device, shape = True, torch.device("cuda"), (1, 1, 1, width)

    OnGPU.dtype = dtype
    return OnGPU


@pytest.fixture
def hopper(monkeypatch):
    monkeypatch.setattr(module, "shared_memory", lambda device: 228 * 1024)


def test_a_gpu_whose_kernels_cannot_run_takes_the_definition_and_says_why(hopper, monkeypatch):
    messages = []
    monkeypatch.setattr(module.logger, "warning_once", messages.append)
    monkeypatch.setattr(module, "can_run_kernels", lambda device: device.type == "cuda")
    assert not module.runs_on_triton(on_gpu(torch.float32), on_gpu(), on_gpu())
    reason = "they take float16 and bfloat16, not torch.float32"
    assert messages == [f"Attention to latents runs without its kernels, which is slower: {reason}."]
    assert module.runs_on_triton(on_gpu(), on_gpu(), on_gpu())
    assert len(messages) == 1


def test_what_the_kernels_were_not_made_for_is_named(hopper, monkeypatch):
    assert "not torch.float32" in module.kernel_obstacle(on_gpu(torch.float32), on_gpu(), on_gpu())
    assert "not of 72" in module.kernel_obstacle(on_gpu(), on_gpu(width=72), on_gpu())
    assert "not of 1024" in module.kernel_obstacle(on_gpu(), on_gpu(width=1024), on_gpu())
    assert "R up to 128, not 256" in module.kernel_obstacle(on_gpu(), on_gpu(), on_gpu(width=256))
    monkeypatch.setattr(module, "shared_memory", lambda device: 99 * 1024)
    assert "this GPU has 101376" in module.kernel_obstacle(on_gpu(), on_gpu(), on_gpu())
