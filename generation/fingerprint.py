"""What a model computes by, besides the contents of its tensors: a graph has recorded it, and does not look again.

That is where the weights lie, the code of every module, and whatever Python attributes a forward may read: numbers,
settings, the strength of an adapter or of a control vector. Values are compared by what they are, tensors by where
they are, other objects by identity and by the plain values in them, classes by their functions and plain values. Not
seen are global variables, and what lies deeper in objects of other kinds.
"""

import dataclasses
import gc
import weakref
from collections.abc import Mapping
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
        self._kinds: dict[type, None] = {}
        self._functions, self._modules, self._tensors, self._classes = [], [], [], set()
        values = [model]
        while values:
            values = self._add_all(values)
        noted = [*self._kinds, *self._functions, *self._modules, *self._tensors]
        references = list(map(weakref.ref, noted))
        self._references += references
        self._parts += [*map(id, references), *places_of(self._tensors)]
        self._parts = tuple(self._parts)
        self._hash = hash(self._parts)
        del self._seen, self._kinds, self._functions, self._modules, self._tensors, self._classes

    def __eq__(self, other) -> bool:
        return isinstance(other, Fingerprint) and self._parts == other._parts

    def __hash__(self) -> int:
        return self._hash

    def _add_all(self, values: list) -> list:
        """Notes values; returns what is in those of them that have not been noted before."""
        kinds, contents = tuple(map(type, values)), []
        self._kinds |= dict.fromkeys(kinds)
        self._parts.append(tuple(map(id, kinds)))  # 1 and 1.0 are equal
        for value, kind in zip(values, kinds, strict=True):
            if kind in PLAIN:
                self._parts.append(value)
            elif kind in TENSORS:
                self._tensors.append(value)
            elif issubclass(kind, nn.Module):
                contents += self._add_module(value, kind)
            elif self._is_new(value, kind):
                contents += self._add_object(value, kind)
        return contents

    def _is_new(self, value, kind: type) -> bool:
        """Notes which object this is, a container by its place; whether its contents have not been noted yet."""
        is_new = self._meets(value)
        if not issubclass(kind, CONTAINERS):
            # There is one reference to an object, as long as there is any.
            reference = weakref.ref(value) if takes_weak_references(kind) else value
            self._parts.append(id(reference))
            if reference is not value or not gc.is_tracked(value):  # what is not tracked refers to nothing
                self._references.append(reference)
        elif not is_new:
            self._parts.append(self._seen[id(value)])
        return is_new

    def _meets(self, value) -> bool:
        """Whether for the first time."""
        place = len(self._seen)
        return self._seen.setdefault(id(value), place) == place

    def _add_module(self, module: nn.Module, kind: type) -> list:
        """Notes the names of what is in a module, and its class; returns what is in it."""
        self._modules.append(module)
        if not self._meets(module):
            return []
        if kind not in self._classes:
            self._add_classes(kind)
        fields = vars(module)
        names = names_read(tuple(fields))
        parameters, buffers, children = module._parameters, module._buffers, module._modules
        self._parts += [names, tuple(parameters.keys()), tuple(buffers.keys()), tuple(children.keys())]
        return [*map(fields.get, names), *parameters.values(), *buffers.values(), *children.values()]

    def _add_classes(self, kind: type) -> None:
        """Notes the functions of a class of modules and its plain values, and those that it inherits."""
        for base in kind.__mro__[: kind.__mro__.index(nn.Module)]:
            if base not in self._classes:
                self._classes.add(base)
                fields = vars(base).items()
                plain = {name: value for name, value in fields if type(value) in PLAIN and name not in UNREAD}
                functions = [value for _, value in fields if type(value) is FunctionType]
                self._functions += functions
                self._parts += [tuple(plain), *map(type, plain.values()), *plain.values(), *map(id, functions)]

    def _add_object(self, value, kind: type) -> list:
        """Notes how much is in an object of any other kind; returns that."""
        if issubclass(kind, Tensor) and not hasattr(value, "__tensor_flatten__"):
            self._tensors.append(value)
            return []
        contents = contents_of(value, kind)
        self._parts.append(len(contents))
        return contents


@lru_cache(maxsize=1024)
def names_read(names: tuple[str, ...]) -> tuple[str, ...]:
    """Of the names of a module's fields those that its forward may read."""
    return tuple(name for name in names if name not in FIELDS_OF_TORCH and name not in UNREAD)


def contents_of(value, kind: type) -> list:
    """What is in an object that is no module."""
    if kind is FunctionType:
        return [value.__defaults__, value.__kwdefaults__, *enclosed_by(value)]
    if kind is MethodType:
        return [value.__func__, value.__self__]
    if kind is partial:
        return [value.func, value.args, value.keywords]
    if issubclass(kind, Tensor):  # one that is made of others has no place of its own
        return [getattr(value, name) for name in value.__tensor_flatten__()[0]]
    if issubclass(kind, type):
        return []
    if issubclass(kind, CONTAINERS) and not issubclass(kind, MAPPINGS):
        return list(value)
    fields = value if issubclass(kind, MAPPINGS) else fields_of(value, kind)
    return [*fields.keys(), *fields.values()]


def enclosed_by(function: FunctionType) -> list:
    """What a function has taken from where it was defined."""
    contents = []
    for cell in function.__closure__ or ():
        try:
            contents.append(cell.cell_contents)
        except ValueError:  # nothing yet
            contents.append(None)
    return contents


def fields_of(value, kind: type) -> Mapping:
    """The fields of a record, and of what takes no weak reference; of any other object those that are simple."""
    if issubclass(kind, RECORDS):
        return vars(value)
    if dataclasses.is_dataclass(kind):
        names = [each.name for each in dataclasses.fields(value)]
        return getattr(value, "__dict__", {}) | {name: getattr(value, name, None) for name in names}
    fields = all_fields(value)
    if takes_weak_references(kind) or kind in weakref.ProxyTypes:
        return {name: each for name, each in fields.items() if isinstance(each, Tensor) or is_simple(each)}
    return fields


def all_fields(value) -> dict:
    """The fields of any object, those outside of its dictionary included: slots, and what a type of C shows."""
    members = [
        name for kind in type(value).__mro__ for name, each in vars(kind).items() if type(each) is MemberDescriptorType
    ]
    return {name: getattr(value, name, None) for name in [*getattr(value, "__dict__", ()), *members]}


def takes_weak_references(kind: type) -> bool:
    """Whether objects of this kind can be referred to without being kept alive."""
    return kind.__weakrefoffset__ != 0


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
