"""Where the target lives while the draft trains: on one device, on several of one process, or sharded over processes.

Whatever is chosen, a process trains its whole draft on its own device, and what it reads of the target comes there. A
sharded target keeps embeddings, final norm and output head whole on every process (training reads them one by one) and
spreads its decoder layers by FSDP2: each is gathered while it runs and dropped behind itself.
"""

import torch
from accelerate import PartialState
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from transformers import AutoModelForCausalLM, PreTrainedModel, TrainingArguments

from ..modeling_eagle3_mla import decoder_layers
from .arguments import DraftArguments
from .files import intact_weights
from .target import Teacher, keeps_documents_apart


def load_target(settings: DraftArguments, device: torch.device) -> PreTrainedModel:
    """
    The target in evaluation mode, without gradients.

    Args:
        settings ([`DraftArguments`]): Which target, in which dtype, and how it is placed.
        device (`torch.device`): The draft's. Half precision is slow on a CPU, so float32 is the default there.

    Raises:
        ValueError: If `--target-device-map` meets several processes, `--shard-target` a single one, the weights cannot
            be read, or the devices are too small for them.
    """
    check_placement(settings)
    dtype = settings.target_dtype
    if dtype == "auto" and device.type == "cpu":
        dtype = "float32"
    with intact_weights(settings.model_path):
        target = AutoModelForCausalLM.from_pretrained(
            settings.model_path, dtype=dtype, device_map=settings.target_device_map
        )
    target.requires_grad_(False).eval()
    if settings.target_device_map is not None:
        check_nothing_is_offloaded(target)
        return target
    if settings.shard_target:
        shard_layers(target, device)
    return target.to(device)


def check_placement(settings: DraftArguments) -> None:
    """
    Raises:
        ValueError: If the placement does not fit the number of processes.
    """
    num_processes = PartialState().num_processes
    if settings.target_device_map is not None and num_processes > 1:
        raise ValueError(
            f"`--target-device-map` needs a single process, got {num_processes}: each would claim all devices. Start "
            "one process, or spread the target over the processes with `--shard-target True`."
        )
    if settings.shard_target and num_processes == 1:
        raise ValueError(
            "`--shard-target` needs at least 2 processes, got 1. Start them with `torchrun` or `accelerate launch`, "
            "or spread the target over the devices of one process with `--target-device-map auto`."
        )


def check_has_decoder(target: PreTrainedModel) -> None:
    """
    Requires that the target's decoder can be run without its output head, since training applies that in parts.

    Raises:
        NotImplementedError: If transformers does not tell the two apart, as for Llama 4.
    """
    if target.get_decoder() is target:
        raise NotImplementedError(
            f"The target {type(target).__name__} is not supported in training: training runs its decoder without its "
            "output head, and transformers gives the whole model for the decoder (`get_decoder()`)."
        )


def claim_devices(settings: DraftArguments, args: TrainingArguments) -> None:
    """Keeps the Trainer from copying the draft to the devices that a device map gives to the target."""
    if settings.target_device_map is not None and args.n_gpu > 1:
        args._n_gpu = 1


def try_packing_together(teacher: Teacher) -> None:
    """Finds out on all processes at once whether the target keeps packed documents apart.

    Each gathers the layers of a sharded target for all: one that tried it alone, with its first packed batch, would
    wait for the others for ever.
    """
    teacher.keeps_documents_apart = keeps_documents_apart(teacher.target)


def check_nothing_is_offloaded(target: PreTrainedModel) -> None:
    """
    Refuses a target of which parts would travel from the host or the disk at every step.

    Raises:
        ValueError: Names the first part that found no room.
    """
    placed = getattr(target, "hf_device_map", {})
    offloading = {"disk"} if set(placed.values()) <= {"cpu", "disk"} else {"cpu", "disk"}
    for name, device in placed.items():
        if device in offloading:
            raise ValueError(
                f"`--target-device-map` leaves no device memory for {name}: it would be read from the {device} at "
                "every step. Give more devices or a smaller `--target-dtype`, or store the target's features first."
            )


def shard_layers(target: PreTrainedModel, device: torch.device) -> None:
    """Spreads the weights of the decoder layers over all processes. **Effects**: the target is changed in place."""
    mesh = init_device_mesh(device.type, (PartialState().num_processes,))
    layers = decoder_layers(target)
    inside = {parameter for layer in layers for parameter in layer.parameters()}
    for layer in layers:
        fully_shard(layer, mesh=mesh, reshard_after_forward=True)
    # The root lets the layers share their streams; it shards nothing itself.
    decoder = target.get_decoder()
    fully_shard(decoder, mesh=mesh, ignored_params=set(decoder.parameters()) - inside)
