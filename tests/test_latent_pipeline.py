"""The pipeline of attention to latents, and the twins that stand in for few rows: what they take, how they are asked,
that they compile, and that they are right.
"""

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from test_latent_attention import compare_with_kernels, in_double, random_inputs

from eagle3_mla.generation.latent_attention import UpProjections, attend_by_definition

pytest.importorskip("triton")
from eagle3_mla.generation import latent_attention_triton, latent_pipeline
from eagle3_mla.generation.latent_parts import Parts

# As in `test_latent_attention.py`.
SHAPES = {
    "one-slot": (1, 32, 8, 1, 256, 0, 128, 1, 1, False),
    "one-row": (1, 32, 8, 1, 256, 0, 128, 5000, 1, False),
    "level-of-a-tree": (1, 32, 8, 10, 256, 0, 128, 5000, 60, False),
    "nothing-drafted": (1, 32, 8, 8, 256, 0, 128, 4096, 0, False),
    "narrow-latents-and-heads": (2, 16, 4, 7, 64, 0, 64, 700, 21, False),
    "padded-heads": (3, 8, 8, 30, 128, 0, 96, 333, 30, False),
    "several-tiles-of-rows": (2, 32, 8, 40, 256, 0, 128, 640, 64, False),
    "many-sequences": (40, 32, 8, 3, 256, 0, 128, 900, 3, False),
}
# With 132 multiprocessors 3,000 slots are 24 parts of two tiles.
TWIN_SHAPES = {
    "one-slot": (1, 32, 8, 1, 256, 0, 128, 1, 1, False),
    "less-than-a-tile": (1, 32, 8, 1, 256, 0, 128, 40, 3, False),
    "one-row": (1, 32, 8, 1, 256, 0, 128, 5000, 1, False),
    "two-rows": (1, 32, 8, 2, 256, 0, 128, 5000, 7, False),
    "nothing-drafted": (1, 32, 8, 1, 256, 0, 128, 4096, 0, False),
    "drafted-in-several-tiles-and-parts": (1, 32, 8, 2, 256, 0, 128, 3000, 200, False),
    "all-drafted": (1, 32, 8, 2, 256, 0, 128, 300, 300, False),
    "long": (1, 32, 8, 1, 256, 0, 128, 40000, 10, False),
    "narrow-latents-and-heads": (1, 16, 4, 2, 64, 0, 64, 700, 21, False),
    "padded-heads": (1, 8, 8, 8, 128, 0, 96, 3330, 30, False),
    "three-rows": (1, 24, 8, 1, 128, 0, 128, 2500, 2, False),
    "several-sequences": (3, 32, 8, 1, 256, 0, 128, 900, 3, False),
}


def recorded(monkeypatch, name: str):
    """What starts the kernel of this name, and a recorder in the kernel's place, on a GPU of 132 multiprocessors."""
    file = {"pipelined": "latent_pipeline_gluon", "twin": "latent_twins_gluon"}[name]
    gluon = pytest.importorskip(f"eagle3_mla.generation.{file}")
    monkeypatch.setattr(gluon, f"{name}_part_kernel", recorder := Recorder())
    monkeypatch.setattr(gluon, "sm_count", lambda device: 132)
    return getattr(gluon, f"{name}_parts"), recorder


class Recorder:
    """Stands in for a kernel and remembers how it was started."""

    def __getitem__(self, grid):
        self.grid = grid
        return self

    def __call__(self, *args, **sizes):
        self.args, self.sizes = args, sizes


@pytest.fixture
def on_hopper(monkeypatch):
    """The pipeline takes tensors of the CPU for those of a GPU that it knows."""
    monkeypatch.setattr(torch.Tensor, "is_cuda", property(lambda tensor: True))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setattr(latent_pipeline.triton, "__version__", "3.6.1")


def latents(*shape: int) -> torch.Tensor:
    return torch.zeros(*shape, dtype=torch.bfloat16)


def takes(query: torch.Tensor, c_kv: torch.Tensor) -> bool:
    return latent_pipeline.pipeline_takes(query, c_kv, num_groups=8)


def test_the_pipeline_takes_what_it_was_tried_with(on_hopper, monkeypatch):
    query, c_kv = latents(2, 32, 10, 128), latents(2, 1, 500, 256)
    assert takes(query, c_kv)
    assert takes(query, latents(2, 2, 500, 64)[:, :1])
    assert not takes(query, latents(2, 1, 500, 512))
    assert not takes(query, latents(2, 1, 500, 96))
    assert not takes(latents(2, 32, 10, 32), c_kv)
    assert takes(latents(2, 32, 10, 96), c_kv)
    assert not takes(latents(2, 32, 10, 130), c_kv), "keys of 256 entries have no room"
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (10, 0))
    assert not takes(query, c_kv)


def test_few_rows_have_the_pipeline_in_long_texts_alone(on_hopper):
    """Its products have 64 rows, whoever asks for them."""
    long = latent_pipeline.LONG_CAPACITY
    assert takes(latents(1, 32, 1, 128), latents(1, 1, long, 256))
    assert not takes(latents(1, 32, 1, 128), latents(1, 1, long - 1, 256))
    assert not takes(latents(2, 32, 4, 128), latents(2, 1, long, 256))
    assert takes(latents(2, 32, 5, 128), latents(2, 1, 64, 256))


def test_the_pipeline_waits_for_versions_of_triton_that_it_knows(on_hopper, monkeypatch, caplog):
    monkeypatch.setattr(latent_pipeline.triton, "__version__", "3.7.99")
    with caplog.at_level("INFO", logger=latent_pipeline.logger.name):
        for _ in range(2):
            assert not takes(latents(1, 32, 10, 128), latents(1, 1, 500, 256))
    message = "Attention to latents has a faster kernel for this GPU, tried with Triton 3.6.x, not 3.7.99."
    assert [record.message for record in caplog.records] == [message]


def test_slots_that_the_device_cannot_copy_by_itself_are_left_to_the_other_kernel(on_hopper):
    query, wide = latents(2, 32, 10, 128), latents(2, 1, 500, 264)
    assert takes(query, wide[..., :256])
    assert not takes(query, wide[..., 1:257]), "16 bytes are 8 elements"
    assert not takes(query, latents(2, 1, 500, 257)[..., :256])
    in_pieces = torch.as_strided(latents(200000), (2, 1, 300, 256), (90000, 90000, 256, 1))
    assert not takes(query, in_pieces), "a sequence begins within a row of the one before"
    assert takes(query[:1], in_pieces[:1]), "one sequence alone is a matrix anyhow"
    assert not takes(query, latents(2, 1, 0, 256)), "no slots are no matrix"
    assert not takes(query, latents(2, 1, 1, 256).expand(-1, -1, 500, -1)), "nor is one row again and again"


def test_few_rows_of_one_long_text_have_the_twins(on_hopper):
    long = latent_pipeline.TWIN_CAPACITY

    def are_faster(query: torch.Tensor, c_kv: torch.Tensor) -> bool:
        return latent_pipeline.twins_are_faster(query, c_kv, num_groups=8)

    query, c_kv = latents(1, 32, 2, 128), latents(1, 1, long, 256)
    assert are_faster(query, c_kv)
    assert takes(query, c_kv), "what decides on GPUs and compilers has no objection"
    assert not are_faster(query, latents(1, 1, long - 1, 256))
    assert not are_faster(latents(1, 32, 3, 128), c_kv), "12 rows"
    assert not are_faster(latents(2, 32, 1, 128), latents(2, 1, long, 256))


@pytest.mark.parametrize(
    ("num_rows", "capacity", "expected"), [(2, 16384, "twins"), (2, 16383, "pipeline"), (3, 16384, "pipeline")]
)
def test_the_faster_kernel_is_started(on_hopper, monkeypatch, num_rows, capacity, expected):
    pipeline = pytest.importorskip("eagle3_mla.generation.latent_pipeline_gluon")
    twins = pytest.importorskip("eagle3_mla.generation.latent_twins_gluon")
    started = []
    monkeypatch.setattr(pipeline, "pipelined_parts", lambda *args: started.append("pipeline"))
    monkeypatch.setattr(twins, "twin_parts", lambda *args: started.append("twins"))
    monkeypatch.setattr(latent_attention_triton, "join_parts", lambda *args, **sizes: latents(1, 1, 1, 1))
    projections = UpProjections(latents(1, 64, 64), latents(1, 64, 64), torch.ones(32), 1.0)
    query, c_kv, lengths = latents(1, 4, num_rows, 64), latents(1, 1, capacity, 64), torch.tensor([9]).int()
    latent_attention_triton.attend(query, c_kv, c_kv[..., :0], projections, lengths, 1.0, None, None)
    assert started == [expected]


def test_padded_texts_and_other_gpus_have_the_other_kernel(monkeypatch):
    gluon = pytest.importorskip("eagle3_mla.generation.latent_pipeline_gluon")
    monkeypatch.setattr(gluon, "pipelined_parts", lambda *args: pytest.fail("the pipeline ran"))
    compare_with_kernels((2, 4, 2, 3, 64, 0, 64, 100, 6, False), torch.float16, "cpu")
    monkeypatch.setattr(latent_attention_triton, "pipeline_takes", lambda *args: True)
    compare_with_kernels((2, 4, 2, 3, 64, 0, 64, 100, 6, True), torch.float16, "cpu")
    compare_with_kernels((2, 4, 2, 3, 64, 32, 64, 100, 6, False), torch.float16, "cpu")


@pytest.mark.parametrize(("start", "num_rows"), [("pipelined", 10), ("twin", 2)])
def test_the_kernel_is_told_where_the_slots_of_every_sequence_are(monkeypatch, start, num_rows):
    """Caches are parts of longer ones: the rows of a matrix which holds more than their slots."""
    start, recorder = recorded(monkeypatch, start)
    inputs = random_inputs((3, 16, 4, num_rows, 64, 0, 64, 500, 20, False), torch.float16)
    c_kv = inputs["c_kv"].new_zeros(3, 2, 700, 64)[:, 1:, 100:600].copy_(inputs["c_kv"])
    drafted = latent_attention_triton.drafted_inputs(inputs["drafted"], inputs["lengths"])
    w_uk, inv_freq = inputs["projections"].w_uk, inputs["projections"].inv_freq
    parts = start(inputs["query"], c_kv, w_uk, inv_freq, inputs["lengths"], 0.5, drafted)

    assert parts.sums.shape == (3, 8, 16, num_rows, 64), "as many parts as tiles of 64 slots"
    assert parts.maxima.shape == parts.totals.shape == (3, 8, 16, num_rows)
    assert recorder.grid == (4, 8 if num_rows == 10 else 4, 3)
    cache, rows_per_sequence = recorder.args[1], recorder.args[14]
    assert (cache.shape, cache.strides, cache.block_shape) == ([2 * 1400 + 500, 64], [64, 1], [64, 64])
    matrix = torch.as_strided(c_kv, cache.shape, cache.strides)
    for sequence in range(3):
        rows = matrix[sequence * rows_per_sequence :][:500]
        torch.testing.assert_close(rows, c_kv[sequence, 0], rtol=0, atol=0, equal_nan=True)


def test_no_more_programs_are_started_than_run_at_once(monkeypatch):
    start, recorder = recorded(monkeypatch, "pipelined")
    for num_rows, batch_size, num_parts in ((1, 1, 16), (17, 1, 8), (1, 8, 2), (1, 40, 1)):
        query, c_kv = latents(batch_size, 32, num_rows, 128), latents(batch_size, 1, 3000, 256)
        lengths = torch.full((batch_size,), 3000, dtype=torch.int32)
        drafted = latent_attention_triton.drafted_inputs(None, lengths)
        start(query, c_kv, latents(8, 128, 256), torch.ones(64), lengths, 1.0, drafted)
        assert recorder.grid == (8 * -(-4 * num_rows // 64), num_parts, batch_size)


@pytest.mark.parametrize(
    ("num_slots", "batch_size", "num_programs"), [(1, 1, 1), (129, 1, 2), (3000, 1, 16), (3000, 8, 2), (3000, 40, 1)]
)
def test_twins_have_two_parts_a_program(monkeypatch, num_slots, batch_size, num_programs):
    start, recorder = recorded(monkeypatch, "twin")
    query, c_kv = latents(batch_size, 32, 2, 128), latents(batch_size, 1, num_slots, 256)
    lengths = torch.full((batch_size,), num_slots, dtype=torch.int32)
    drafted = latent_attention_triton.drafted_inputs(None, lengths)
    parts = start(query, c_kv, latents(8, 128, 256), torch.ones(64), lengths, 1.0, drafted)
    assert recorder.grid == (8, num_programs, batch_size)
    assert parts.sums.shape[1] == 2 * num_programs
    assert parts.block_slots == 64


@pytest.mark.skipif(torch.cuda.is_available(), reason="the interpreter is for machines without a GPU")
@pytest.mark.parametrize("length", [264 * 64, 130 * 64 + 1, 64, 0])
def test_all_parts_of_twins_are_joined(length):
    """There are twice as many as programs run at once; what is not read is missing from the text without a trace."""
    query, c_kv, w_uv = torch.zeros(1, 2, 1, 8), torch.zeros(1, 1, 264 * 64, 16), torch.randn(1, 8, 16)
    parts = Parts.empty(query, c_kv, 1, block_slots=64, max_programs=132, parts_per_program=2)
    assert parts.sums.shape[1] == 264
    parts.sums.fill_(float("nan"))
    parts.maxima.fill_(float("nan"))
    parts.totals.fill_(float("nan"))
    num_tiles = -(-length // 64)
    num_written = -(-num_tiles // max(1, -(-num_tiles // 264)))
    parts.sums[:, :num_written].normal_()
    parts.maxima[:, :num_written].normal_()
    parts.totals[:, :num_written].uniform_(1, 2)
    output = latent_attention_triton.join_parts(parts, torch.tensor([length]).int(), w_uv, num_slots=264 * 64)

    weights = parts.maxima[0, :num_written].double().exp2()  # (P, H, W)
    total = (weights * parts.totals[0, :num_written]).sum(dim=0).clamp(min=1e-9)
    latent = (weights[..., None] * parts.sums[0, :num_written]).sum(dim=0) / total[..., None]
    expected = torch.einsum("hwc,dc->whd", latent, w_uv[0].double())
    torch.testing.assert_close(output[0].double(), expected, rtol=1e-5, atol=1e-5)


def test_the_kernels_compile_for_hopper():
    """There need not be one: what is found here is that Gluon has changed, or that tiles have outgrown the GPU."""
    pytest.importorskip("eagle3_mla.generation.latent_pipeline_gluon")
    program = Path(__file__).with_name("compile_pipeline.py")
    # In a process of its own: in this one Triton's interpreter has taken the functions of other kernels.
    environment = os.environ | {"TRITON_INTERPRET": "0"}
    ran = subprocess.run([sys.executable, program], env=environment, capture_output=True, text=True, check=False)
    assert ran.returncode == 0, ran.stderr
    kernels = [line.split() for line in ran.stdout.splitlines()]
    assert [name for name, *_ in kernels] == 3 * ["pipelined_part_kernel"] + 3 * ["twin_part_kernel"]
    for _name, num_products, shared_bytes in kernels:
        assert int(num_products) > 0
        assert int(shared_bytes) <= 227 * 1024


@pytest.fixture
def pipeline(monkeypatch):
    """Takes few rows, too; skips where it does not run."""
    monkeypatch.setattr(latent_pipeline, "is_worth_it", lambda *args: True)
    monkeypatch.setattr(latent_attention_triton, "twins_are_faster", lambda *args: False)
    query = torch.zeros(1, 32, 1, 128, dtype=torch.bfloat16, device="cuda")
    if not takes(query, torch.zeros(1, 1, 64, 256, dtype=torch.bfloat16, device="cuda")):
        pytest.skip("the pipeline runs on Hopper, and with versions of Triton that it knows")


@pytest.fixture
def twins(pipeline, monkeypatch):
    """Take short texts and several, too; skips where the pipeline does."""
    from eagle3_mla.generation import latent_pipeline_gluon

    monkeypatch.setattr(latent_attention_triton, "twins_are_faster", lambda *args: True)
    monkeypatch.setattr(latent_attention_triton, "split_parts", lambda *args: pytest.fail("the other kernel ran"))
    monkeypatch.setattr(latent_pipeline_gluon, "pipelined_parts", lambda *args: pytest.fail("the pipeline ran"))


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("shape", SHAPES)
def test_the_pipeline_computes_the_definition(pipeline, monkeypatch, shape, dtype):
    monkeypatch.setattr(latent_attention_triton, "split_parts", lambda *args: pytest.fail("the other kernel ran"))
    compare_with_kernels(SHAPES[shape], dtype, "cuda")


@pytest.mark.gpu
@pytest.mark.parametrize("shape", SHAPES)
def test_the_other_kernel_computes_it_too(monkeypatch, shape):
    monkeypatch.setattr(latent_attention_triton, "pipeline_takes", lambda *args: False)
    compare_with_kernels(SHAPES[shape], torch.bfloat16, "cuda")


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("shape", TWIN_SHAPES)
def test_twins_compute_the_definition(twins, shape, dtype):
    compare_with_kernels(TWIN_SHAPES[shape], dtype, "cuda")


@pytest.mark.gpu
@pytest.mark.parametrize("length", [1, 2, 63, 64, 65, 127, 129, 4095, 4097, 9999])
def test_twins_read_nothing_behind_a_text(twins, length):
    """Most of a cache is: room for what comes, which may hold anything."""
    inputs = random_inputs((1, 32, 8, 2, 256, 0, 128, 20000, 5, False), torch.bfloat16, "cuda")
    inputs["c_kv"][:, :, length:] = float("nan")
    inputs["lengths"].fill_(length)
    expected = attend_by_definition(**in_double(inputs))
    output = latent_attention_triton.attend(*inputs.values()).double()
    assert (output - expected).abs().max() <= 1.6e-2 * expected.abs().max().clamp(min=0.5)


@pytest.mark.gpu
def test_one_captured_graph_of_twins_serves_a_growing_cache(twins):
    inputs = random_inputs((1, 32, 8, 1, 256, 0, 128, 17000, 4, False), torch.bfloat16, "cuda")
    inputs["c_kv"] = inputs["c_kv"].nan_to_num()
    latent_attention_triton.attend(*inputs.values())
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        output = latent_attention_triton.attend(*inputs.values())
    for length in (5, 64, 66, 2047, 2052, 9000, 17000):
        inputs["lengths"].fill_(length)
        graph.replay()
        expected = attend_by_definition(**in_double(inputs))
        assert (output.double() - expected).abs().max() <= 1.6e-2 * expected.abs().max().clamp(min=0.5)


@pytest.mark.gpu
@pytest.mark.parametrize("kernel", ["pipeline", "twins"])
def test_a_kernel_is_as_exact_far_into_a_text(request, kernel):
    """Angles are turned from tile to tile, 1,600 times for the last of these, or 800 times by each of the twins."""
    request.getfixturevalue(kernel)
    inputs = random_inputs((33, 8, 4, 1, 64, 0, 64, 102400, 1, False), torch.bfloat16, "cuda")
    inputs["c_kv"] = inputs["c_kv"].nan_to_num()
    some = {name: inputs[name][:2] for name in ("query", "c_kv", "k_rope", "lengths")}
    some["drafted"] = replace(
        inputs["drafted"], **{n: getattr(inputs["drafted"], n)[:2] for n in ("sees", "positions")}
    )
    expected = attend_by_definition(**in_double(inputs | some))
    output = latent_attention_triton.attend(*inputs.values())[:2].double()
    assert (output - expected).abs().max() <= 1.6e-2 * expected.abs().max().clamp(min=0.5)
