"""The fused RoPE against the model's."""

import pytest
import torch

from eagle3_mla.modeling_eagle3_mla import rotate
from eagle3_mla.training.rotary import fused_rotate


def random_case(width: int, dtype: torch.dtype, device: str):
    generator = torch.Generator().manual_seed(0)
    heads = torch.randn(2, 37, 3, width, dtype=torch.float64, generator=generator).to(device, dtype).transpose(1, 2)
    angles = torch.randn(2, 37, width // 2, generator=generator).repeat(1, 1, 2).to(device)
    return heads, (angles.cos(), angles.sin())


def compare_with_triton(width: int, dtype: torch.dtype, device: str, tolerance: float) -> None:
    from eagle3_mla.training.rotary_triton import rotate_heads

    heads, cos_sin = random_case(width, dtype, device)
    exact = heads.double().requires_grad_()
    expected = rotate(exact, [part.double() for part in cos_sin])
    torch.testing.assert_close(
        rotate_heads(heads, *cos_sin, inverse=False).double(), expected.detach(), atol=tolerance, rtol=tolerance
    )
    expected.backward(heads.double())
    gradient = rotate_heads(heads, *cos_sin, inverse=True)
    torch.testing.assert_close(gradient.double(), exact.grad, atol=tolerance, rtol=tolerance)


@pytest.mark.skipif(torch.cuda.is_available(), reason="the interpreter is for machines without a GPU")
@pytest.mark.parametrize("width", [8, 6, 64])
def test_the_rotation_kernel_turns_heads_and_gradients_in_the_interpreter(width):
    pytest.importorskip("triton")
    compare_with_triton(width, torch.float32, "cpu", 1e-6)


@pytest.mark.gpu
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 2e-2)], ids=str)
@pytest.mark.parametrize("width", [8, 6, 64, 128])
def test_the_rotation_kernel_turns_heads_and_gradients_on_a_gpu(width, dtype, tolerance):
    compare_with_triton(width, dtype, "cuda", tolerance)


def test_a_rotation_keeps_the_type_of_the_heads():
    heads, cos_sin = random_case(8, torch.bfloat16, "cpu")
    assert fused_rotate(heads, cos_sin).dtype == torch.bfloat16
