"""Compiles attention to latents in Gluon for Hopper; prints kernel, products and shared bytes of each shape."""

import triton
from triton.backends.compiler import GPUTarget
from triton.experimental.gluon import language as gl
from triton.experimental.gluon._runtime import GluonASTSource

from eagle3_mla.generation import latent_pipeline_gluon as pipeline
from eagle3_mla.generation import latent_twins_gluon as twins
from eagle3_mla.generation.latent_tiles_gluon import BLOCK_SLOTS, NUM_WARPS
from eagle3_mla.generation.latent_tiles_triton import block_of

POINTERS = {
    "query": "bf16",
    "w_uk": "bf16",
    "inv_freq": "fp32",
    "sees": "i8",
    "positions": "i32",
    "lengths": "i32",
    "partial": "fp32",
    "maxima": "fp32",
    "totals": "fp32",
}
# Latent and head width.
SHAPES = ((256, 128), (128, 64), (64, 96))
OWN_CONSTANTS = {
    pipeline.pipelined_part_kernel: {
        "NUM_STAGES": pipeline.NUM_STAGES,
        "NUM_KEY_TILES": pipeline.NUM_KEY_TILES,
        "KEY_REGISTERS": pipeline.KEY_REGISTERS,
    },
    twins.twin_part_kernel: {
        "BLOCK_ROWS": twins.BLOCK_ROWS,
        "NUM_STAGES": twins.NUM_STAGES,
        "REGISTERS": twins.REGISTERS,
    },
}


def compiled(kernel, latent_dim: int, head_dim: int):
    """The kernel for bfloat16, as the first call compiles it."""
    layout = gl.NVMMASharedLayout.get_default_for([BLOCK_SLOTS, latent_dim], gl.bfloat16)
    types = {f"{name}_ptr": f"*{kind}" for name, kind in POINTERS.items()}
    types |= {"c_kv": f"tensordesc<bf16[{BLOCK_SLOTS}, {latent_dim}],{layout!r}>", "scaling": "fp32"}
    constants = {
        "NUM_GROUPS": 8,
        "LATENT_DIM": latent_dim,
        "KEY_DIM": head_dim // 2,
        "BLOCK_KEY": block_of(head_dim // 2),
        **OWN_CONSTANTS[kernel],
    }
    names = [parameter.name for parameter in kernel.params]
    signature = {name: "constexpr" if name in constants else types.get(name, "i32") for name in names}
    source = GluonASTSource(kernel, signature, {(names.index(name),): value for name, value in constants.items()})
    return triton.compile(source, target=GPUTarget("cuda", 90, 32), options={"num_warps": NUM_WARPS})


if __name__ == "__main__":
    for kernel in OWN_CONSTANTS:
        for shape in SHAPES:
            program = compiled(kernel, *shape)
            products = program.asm["ptx"].count("wgmma.mma_async")
            print(kernel.fn.__name__, products, program.metadata.shared)  # noqa: T201 (a command line)
