"""What a model computes by, besides the contents of its tensors: a graph has recorded it, and does not look again.

That is where the weights lie, the code of every module, and whatever Python attributes a forward may read: numbers,
settings, the strength of an adapter or of a control vector. Values are compared by what they are, tensors by where
they are, other objects by identity and by the plain values in them, classes by their functions and plain values. Not
seen are global variables, and what lies deeper in objects of other kinds.
"""

import dataclasses
import gc
import weakref
from collections.abc import Iterable, Mapping
from functools import lru_cache, partial
from types import FunctionType, MappingProxyType, MemberDescriptorType, MethodType, SimpleNamespace

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig

PLAIN = {bool, int, float, complex, str, bytes, type(None), torch.dtype, torch.device, torch.Size}
TENSORS = {Tensor, nn.Parameter}
MAPPINGS = (dict, MappingProxyType)
CONTAINERS = (tuple, list, set, frozenset, *MAPPINGS)
# Objects that are nothing but their fields.
RECORDS = (PreTrainedConfig, SimpleNamespace)
# What PyTorch keeps in every module: tensors and submodules are looked at by themselves, hooks in `obstacles.py`.
FIELDS_OF_TORCH = vars(nn.Module()).keys() - {"training"}
# What no forward reads.
UNREAD = {"generation_config", "speculation_stats", "warnings_issued"}


class Fingerprint:
    """
    Equal to another one if, and only if, the models are the same and compute alike, as far as can be seen.

    Nothing is kept alive that may refer to a model. Weak references stay, so that nothing new, which may lie at the
    same address, is taken for what is gone; what takes none is followed into all of its fields.

    Args:
        model (`nn.Module`): The model, as it is now.
    """

    def __init__(self, model: nn.Module):
        self._references, self._parts = [], []
        self._seen: dict[int, int] = {}  # what has been met, by its address, and as which
        self._kinds: dict[tuple[type, ...], int] = {}  # of values that were met together, and as which
        self._tensors: list[Tensor] = []
        self._add_all([model])
        for noted in *self._kinds, self._tensors:
            self._note(noted)
        self._parts = (*self._parts, *places_of(self._tensors))
        self._hash = hash(self._parts)
        del self._seen, self._kinds, self._tensors

    def __eq__(self, other) -> bool:
        return isinstance(other, Fingerprint) and self._parts == other._parts

    def __hash__(self) -> int:
        return self._hash

    def _add(self, value, kind: type) -> None:
        if kind in TENSORS:
            self._tensors.append(value)
        elif issubclass(kind, CONTAINERS):
            if self._meets(value):
                self._add_fields(value) if issubclass(kind, MAPPINGS) else self._add_all(value)
            else:  # elsewhere, or within itself
                self._parts.append(self._seen[id(value)])
        elif self._is_new(value):
            self._add_object(value, kind)

    def _add_all(self, values: Iterable) -> None:
        values = tuple(values)
        kinds = tuple(map(type, values))
        self._add_kinds(kinds)  # 1 and 1.0 are equal
        if PLAIN.issuperset(kinds):
            self._parts.append(values)
            return
        for value, kind in zip(values, kinds, strict=True):
            if kind in PLAIN:
                self._parts.append(value)
            else:
                self._add(value, kind)

    def _add_kinds(self, kinds: tuple[type, ...]) -> None:
        self._parts.append(self._kinds.setdefault(kinds, len(self._kinds)))

    def _add_fields(self, fields: Mapping) -> None:
        self._add_all(fields.keys())
        self._add_all(fields.values())

    def _note(self, values: Iterable) -> None:
        """Notes which tensors, classes or functions these are."""
        references = list(map(weakref.ref, values))
        self._references += references
        self._parts.append(tuple(map(id, references)))

    def _is_new(self, value) -> bool:
        """Notes which object this is; whether its contents have not been noted yet."""
        # There is one reference to an object, as long as there is any.
        reference = weakref.ref(value) if takes_weak_references(type(value)) else value
        self._parts.append(id(reference))
        if reference is not value or not gc.is_tracked(value):  # what is not tracked refers to nothing
            self._references.append(reference)
        return self._meets(value)

    def _meets(self, value) -> bool:
        """Whether for the first time."""
        place = len(self._seen)
        return self._seen.setdefault(id(value), place) == place

    def _add_object(self, value, kind: type) -> None:
        if issubclass(kind, nn.Module):
            self._add_module(value, kind)
        elif issubclass(kind, Tensor):
            self._add_tensor(value)
        elif kind is FunctionType:
            self._add_all([value.__defaults__, value.__kwdefaults__, *contents_of(value)])
        elif kind is MethodType:
            self._add_all([value.__func__, value.__self__])
        elif kind is partial:
            self._add_all([value.func, value.args, value.keywords])
        elif issubclass(kind, RECORDS):
            self._add_fields(vars(value))
        elif dataclasses.is_dataclass(kind):
            names = [each.name for each in dataclasses.fields(value)]
            self._add_fields(getattr(value, "__dict__", {}) | {name: getattr(value, name, None) for name in names})
        elif not takes_weak_references(kind) and kind not in weakref.ProxyTypes:
            self._add_fields(fields_of(value))
        elif not issubclass(kind, type):
            self._add_fields(simple_fields(value))

    def _add_module(self, module: nn.Module, kind: type) -> None:
        fields = vars(module)
        names = names_read(tuple(fields))
        self._add_kinds((kind,))
        self._parts.append(names)
        self._add_all([fields[name] for name in names])
        for base in kind.__mro__[: kind.__mro__.index(nn.Module)]:
            self._add_class(base)
        for tensors in module._parameters, module._buffers:
            if tensors:
                self._add_fields(tensors)
        if children := module._modules:
            self._parts.append(tuple(children.keys()))
            for child in children.values():
                if self._is_new(child):
                    self._add_object(child, type(child))

    def _add_class(self, kind: type) -> None:
        """The functions of a class and its plain values."""
        if not self._meets(kind):
            return
        fields = {name: value for name, value in vars(kind).items() if type(value) in PLAIN and name not in UNREAD}
        self._add_fields(fields)
        self._note([value for value in vars(kind).values() if type(value) is FunctionType])

    def _add_tensor(self, tensor: Tensor) -> None:
        if hasattr(tensor, "__tensor_flatten__"):  # one that is made of others has no place of its own
            self._add_all([getattr(tensor, name) for name in tensor.__tensor_flatten__()[0]])
        else:
            self._tensors.append(tensor)


@lru_cache(maxsize=1024)
def names_read(names: tuple[str, ...]) -> tuple[str, ...]:
    """Of the names of a module's fields those that its forward may read."""
    return tuple(name for name in names if name not in FIELDS_OF_TORCH and name not in UNREAD)


def contents_of(function: FunctionType) -> list:
    """What a function has taken from where it was defined."""
    contents = []
    for cell in function.__closure__ or ():
        try:
            contents.append(cell.cell_contents)
        except ValueError:  # nothing yet
            contents.append(None)
    return contents


def takes_weak_references(kind: type) -> bool:
    """Whether objects of this kind can be referred to without being kept alive."""
    return kind.__weakrefoffset__ != 0


def fields_of(value) -> dict:
    """The fields of any object, those outside of its dictionary included: slots, and what a type of C shows."""
    members = [
        name for kind in type(value).__mro__ for name, each in vars(kind).items() if type(each) is MemberDescriptorType
    ]
    return {name: getattr(value, name, None) for name in [*getattr(value, "__dict__", ()), *members]}


def simple_fields(value) -> dict:
    """The fields of any object that are plain values, a container's of them, or tensors; no other one is followed."""
    return {name: each for name, each in fields_of(value).items() if isinstance(each, Tensor) or is_simple(each)}


def is_simple(value) -> bool:
    """Whether it is a plain value, or a container of such."""
    if isinstance(value, MAPPINGS):
        return PLAIN.issuperset(map(type, value.values()))
    return type(value) in PLAIN or (isinstance(value, CONTAINERS) and PLAIN.issuperset(map(type, value)))


def places_of(tensors: list[Tensor]) -> list:
    """Where tensors lie, and how; 0 for those of a kind that lies in no one place."""
    try:
        return [*map(Tensor.data_ptr, tensors), *map(Tensor.stride, tensors)]
    except RuntimeError:
        strided = [tensor for tensor in tensors if tensor.layout is torch.strided]
        return [(tensor.data_ptr(), tensor.stride()) for tensor in strided] + [tensor.layout for tensor in tensors]
