# SPDX-License-Identifier: Apache-2.0
"""A recording double of the `tensorrt` module, made from the surface of the real bindings.

It has the classes, enum members, methods and properties that the bindings have, and nothing else; it takes arguments
as their signatures do, by name and type, and no others. What a call does is said by `behaviours`; a call without one
is a failure. Engines run what they are given on the memory at the addresses that were bound.
"""

import ctypes
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from modelopt_dms.runtime.manifest import Manifest
from modelopt_dms.runtime.state import dtype_of, shape_of

Behaviour = Callable[..., Any]
BINDINGS = "tensorrt_bindings.tensorrt."
TYPES = {
    "float32": "FLOAT",
    "float16": "HALF",
    "bfloat16": "BF16",
    "int8": "INT8",
    "int32": "INT32",
    "int64": "INT64",
    "bool": "BOOL",
}
STREAM = 77


class Member:
    """A member of an enum: an integer only for those who ask, as pybind11's are."""

    def __init__(self, name: str, value: int) -> None:
        self.name, self._value = name, value

    def __int__(self) -> int:
        return self._value

    def __repr__(self) -> str:
        return self.name


class Double:
    """The module, and what was done with it.

    Attributes:
        module: to be put in place of `tensorrt`.
        calls: names, such as "Builder.create_network", with the arguments by name.
    """

    def __init__(self, surface: dict[str, Any], behaviours: dict[str, Behaviour]) -> None:
        self.calls: list[tuple[str, dict[str, Any]]] = []
        self._classes: dict[str, type] = {}
        self._behaviours = behaviours
        self.module = ModuleType("tensorrt")
        self.module.__version__ = surface["version"]  # type: ignore[attr-defined]
        for name, described in sorted(surface["classes"].items()):
            self._classes[name] = self._class(name, described)
        for name, made in self._classes.items():
            holder, _, last = name.rpartition(".")
            setattr(self._classes[holder] if holder else self.module, last, made)
        for name in behaviours:
            owner, _, member = name.rpartition(".")
            described = surface["classes"][owner]
            assert member in described["methods"] or member in described["properties"], name

    def make(self, name: str, *args: Any, **facts: Any) -> Any:
        """An object that user code cannot make itself."""
        made = self._classes[name].__new__(self._classes[name], *args)
        vars(made).update(facts)
        if args:
            bytearray.__init__(made, *args)
        return made

    def named(self, name: str) -> list[dict[str, Any]]:
        """The arguments of all calls of this name."""
        return [arguments for x, arguments in self.calls if x == name]

    def _class(self, name: str, described: dict[str, Any]) -> type:
        if "members" in described:
            made = type(name, (Member,), {})
            members = {x: made(x, y) for x, y in described["members"].items()}
            return type(name, (), {"__members__": members, "member": made, **members})
        # The real one is a buffer, which Python code can only inherit.
        bases = (bytearray,) if name == "IHostMemory" else ()
        content: dict[str, Any] = {"__setattr__": _refuse}
        for member, overloads in described["methods"].items():
            content[member] = self._method(f"{name}.{member}", overloads)
        content.setdefault("__init__", _no_constructor)
        for member, settable in described["properties"].items():
            content[member] = self._property(f"{name}.{member}", member, settable)
        return type(name, bases, content)

    def _method(self, name: str, overloads: list[list[list[Any]]]) -> Behaviour:
        def call(this: Any, *args: Any, **kwargs: Any) -> Any:
            arguments = self._bind(name, overloads, (this, *args), kwargs)
            self.calls.append((name, arguments))
            if name.endswith(".__init__") and name not in self._behaviours:
                return None
            assert name in self._behaviours, f"the double does not know what {name} does"
            return self._behaviours[name](this, **arguments)

        return call

    def _property(self, name: str, member: str, settable: bool) -> property:
        def get(this: Any) -> Any:
            return self._behaviours[name](this)

        def put(this: Any, value: Any) -> None:
            self.calls.append((f"{name}=", {"value": value}))

        return property(get, put if settable else None)

    def _bind(
        self, name: str, overloads: list[Any], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> dict[str, Any]:
        """Arguments by name, without self."""
        for parameters in overloads:
            names = [x[0] for x in parameters]
            given = dict(zip(names, args, strict=False)) | kwargs
            fits = (
                len(args) <= len(names)
                and set(given) <= set(names)
                and len(given) == len(args) + len(kwargs)
                and all(default or x in given for x, _, default in parameters)
                and all(self._is(given[x], kind) for x, kind, _ in parameters if x in given)
            )
            if fits:
                return {x: y for x, y in given.items() if x != names[0]}
        raise TypeError(f"{name}: incompatible arguments {args[1:]} {kwargs}; it takes {overloads}")

    def _is(self, value: Any, kind: str) -> bool:
        if kind.startswith(BINDINGS):
            name = kind.removeprefix(BINDINGS)
            if name == "Dims":
                return isinstance(value, tuple | list) and all(type(x) is int for x in value)
            made = self._classes[name]
            return isinstance(value, getattr(made, "member", made))
        plain: dict[str, Any] = {
            "str": str,
            "bool": bool,
            "tuple": tuple,
            "list": list,
            "int": int,
            "typing.SupportsInt": int,
            "buffer": bytes | bytearray,
            "typing_extensions.Buffer": bytes | bytearray,
        }
        return kind in plain and isinstance(value, plain[kind])


def _refuse(this: Any, name: str, value: Any) -> None:
    """Objects of the bindings take no attributes of others; what user code derives from them does."""
    own = getattr(type(this), name, None)
    if name == "__class__":  # the bindings' way to cast
        object.__setattr__(this, name, value)
    elif isinstance(own, property):
        own.__set__(this, value)
    elif "__setattr__" in vars(type(this)):
        raise AttributeError(f"{type(this).__name__} has no attribute {name}")
    else:
        object.__setattr__(this, name, value)


def _no_constructor(this: Any, *args: Any) -> None:
    raise TypeError(f"{type(this).__name__}: No constructor defined!")


class FakeGpu:
    """In place of a GPU: the CPU's memory, and work that is done at once."""

    def __init__(self, capability: str = "9.0", free_bytes: int = 1 << 30) -> None:
        self.device = torch.device("cpu")
        self.name = "H200 (none)"
        self.capability = capability
        self.free_bytes = free_bytes
        self.replays = 0

    @contextmanager
    def on_stream(self) -> Iterator[int]:
        yield STREAM

    def capture(self, work: Callable[[int], None]) -> Callable[[], None]:
        def replay() -> None:
            self.replays += 1
            work(STREAM)

        return replay


Graphs = Callable[[str, dict[str, Tensor]], dict[str, Tensor]]


class World:
    """What the double does: parses and builds anything, and runs engines that are named after their phase.

    Attributes:
        double: of the module.
        parsed: models that the parser was given, with their paths.
        errors: (node, text) that the parser finds; it fails if there are any.
        build_error: what the builder logs when it fails; it succeeds if it is None.
        known_cache: whether timing caches are accepted.
        profiles: by phase, the (least, most) shapes of the inputs that an engine takes.
        ports: changes of what engines say about themselves: name -> (dtype, shape).
    """

    def __init__(self, surface: dict[str, Any], manifest: Manifest, graphs: Graphs | None) -> None:
        self.manifest, self.graphs = manifest, graphs
        self.parsed: list[tuple[bytes, str]] = []
        self.errors: list[tuple[str, str]] = []
        self.build_error: str | None = None
        self.known_cache = True
        self.profiles: dict[str, dict[str, tuple[tuple[int, ...], tuple[int, ...]]]] = {}
        self.ports: dict[str, tuple[str, tuple[int, ...]]] = {}
        behaviours = {**self._building(), **self._running()}
        if "IAttention" in surface["classes"]:
            behaviours |= self._attending()
        self.double = Double(surface, behaviours)

    def _building(self) -> dict[str, Behaviour]:
        def make(name: str) -> Behaviour:
            return lambda this, **_: self.double.make(name)

        def nothing(this: Any, **_: Any) -> None:
            return None

        return {
            "Builder.__init__": lambda this, logger: vars(this).update(told=logger),
            "Builder.create_network": make("INetworkDefinition"),
            "Builder.create_builder_config": make("IBuilderConfig"),
            "Builder.create_optimization_profile": lambda this: self.double.make(
                "IOptimizationProfile", shapes={}
            ),
            "Builder.build_serialized_network": self._build,
            "IBuilderConfig.set_memory_pool_limit": nothing,
            "IBuilderConfig.set_preview_feature": nothing,
            "IBuilderConfig.add_optimization_profile": lambda this, profile: vars(this).update(
                profile=profile.shapes
            ),
            "IBuilderConfig.create_timing_cache": make("ITimingCache"),
            "IBuilderConfig.set_timing_cache": lambda this, **_: self._accepts(),
            "IBuilderConfig.get_timing_cache": make("ITimingCache"),
            "ITimingCache.serialize": lambda this: self.double.make("IHostMemory", b"times"),
            "IOptimizationProfile.set_shape": lambda this, **x: this.shapes.update(
                {x["input"]: (x["min"], x["max"])}
            ),
            "OnnxParser.parse": self._parse,
            "OnnxParser.num_errors": lambda this: len(self.errors),
            "OnnxParser.get_error": lambda this, index: self.double.make(
                "ParserError", index=index
            ),
            "ParserError.node_name": lambda this: self.errors[this.index][0],
            "ParserError.desc": lambda this: self.errors[this.index][1],
        }

    def _attending(self) -> dict[str, Behaviour]:
        """A network's second layer is attention."""

        def kind(this: Any) -> Any:
            kinds = self.double.module.LayerType  # type: ignore[attr-defined]
            return kinds.ATTENTION_OUTPUT if this.index == 1 else kinds.SCATTER

        return {
            "INetworkDefinition.num_layers": lambda this: 3,
            "INetworkDefinition.get_layer": lambda this, index: self.double.make(
                "ILayer", index=index
            ),
            "ILayer.type": kind,
            "IAttentionOutputLayer.attention": lambda this: self.double.make("IAttention"),
        }

    def _running(self) -> dict[str, Behaviour]:
        return {
            "Runtime.deserialize_cuda_engine": self._load,
            "ICudaEngine.num_io_tensors": lambda this: len(self._io(this)),
            "ICudaEngine.get_tensor_name": lambda this, index: list(self._io(this))[index],
            "ICudaEngine.get_tensor_mode": self._mode,
            "ICudaEngine.get_tensor_dtype": lambda this, name: self._dtype(self._io(this)[name][0]),
            "ICudaEngine.get_tensor_shape": lambda this, name: self._io(this)[name][1],
            "ICudaEngine.create_execution_context": self._context,
            "IExecutionContext.set_input_shape": self._shape,
            "IExecutionContext.set_tensor_address": self._address,
            "IExecutionContext.execute_async_v3": self._execute,
        }

    def _accepts(self) -> bool:
        accepted, self.known_cache = self.known_cache, True
        return accepted

    def _parse(self, this: Any, model: bytes, path: str) -> bool:
        self.parsed.append((model, path))
        return not self.errors

    def _build(self, this: Any, network: Any, config: Any) -> Any:
        if self.build_error is not None:
            severity = self.double.module.ILogger.Severity  # type: ignore[attr-defined]
            this.told.log(severity.WARNING, "only a warning")
            this.told.log(severity.ERROR, self.build_error)
            return None
        phase = self.parsed[-1][1].rpartition("/")[2].removesuffix(".onnx")
        self.profiles[phase] = config.profile
        return self.double.make("IHostMemory", phase.encode())

    def _load(self, this: Any, serialized_engine: bytes) -> Any:
        phase = bytes(serialized_engine).decode()
        if phase not in self.manifest.phases:
            return None
        return self.double.make("ICudaEngine", phase=self.manifest.phases[phase], phase_name=phase)

    def _io(self, engine: Any) -> dict[str, tuple[str, tuple[int, ...]]]:
        found = {
            x.name: (x.dtype, tuple(-1 if isinstance(d, str) else d for d in x.shape))
            for x in (*engine.phase.inputs, *engine.phase.outputs)
        }
        return found | self.ports

    def _dtype(self, name: str) -> Any:
        return getattr(self.double.module.DataType, TYPES[name])  # type: ignore[attr-defined]

    def _mode(self, this: Any, name: str) -> Any:
        modes = self.double.module.TensorIOMode  # type: ignore[attr-defined]
        return modes.INPUT if name in {x.name for x in this.phase.inputs} else modes.OUTPUT

    def _context(self, this: Any) -> Any:
        return self.double.make(
            "IExecutionContext", engine_made=this, shapes={}, addresses={}, runs=[]
        )

    def _shape(self, this: Any, name: str, shape: tuple[int, ...]) -> bool:
        this.shapes[name] = shape
        least, most = self.profiles[this.engine_made.phase_name].get(name, ((), ()))
        return len(shape) == len(least) and all(
            x <= y <= z for x, y, z in zip(least, shape, most, strict=True)
        )

    def _address(self, this: Any, name: str, memory: int) -> bool:
        this.addresses[name] = memory
        # torch aligns memory of the CPU by 64; rows of a batch slot would not be.
        return name in self._io(this.engine_made) and memory % 64 == 0

    def _execute(self, this: Any, stream_handle: int) -> bool:
        assert stream_handle == STREAM
        phase = this.engine_made.phase
        batch, pages = this.shapes["input_ids"][0], this.shapes["keys.0"][0]
        tensors = {}
        for port in (*phase.inputs, *phase.outputs):
            shape = shape_of(port, batch, pages)
            assert this.shapes.get(port.name, shape) == shape, port.name
            tensors[port.name] = at(this.addresses[port.name], shape, dtype_of(port))
            if getattr(port, "aliases", None) is not None:
                assert this.addresses[port.name] == this.addresses[port.aliases], port.name
        assert self.graphs is not None
        given = self.graphs(
            this.engine_made.phase_name, {x.name: tensors[x.name] for x in phase.inputs}
        )
        for name, value in given.items():
            tensors[name].copy_(value)
        return True


def at(address: int, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """The tensor that lies at an address."""
    size = math.prod(shape) * dtype.itemsize
    memory = (ctypes.c_char * size).from_address(address)
    return torch.frombuffer(memory, dtype=dtype).view(shape)
