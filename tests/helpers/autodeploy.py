# SPDX-License-Identifier: Apache-2.0
"""A double of what is used of TensorRT-LLM's AutoDeploy: names, signatures and the order of calls, from reading it.

docs/trtllm.md says which files, and of which versions. It proves our side of the interface only.
"""

import copy
import sys
from abc import ABC, abstractmethod
from collections.abc import Callable
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import torch
from accelerate import init_empty_weights
from safetensors.torch import load_file
from torch import Tensor
from torch.fx import GraphModule, Node
from torch.fx.graph import CodeGen
from transformers import AutoConfig, AutoModelForCausalLM

from modelopt_dms.exporters.trtllm.backend import AUTO_DEPLOY

ABSTRACT = (
    "get_attention_layout",
    "get_num_qkv_args",
    "get_source_attention_op",
    "get_cached_attention_op",
    "get_standard_metadata_args",
    "get_cache_initializers",
)


class BatchInfo:
    """Numbers of sequences and tokens: prompts, drafts, single tokens, in turns."""

    def __init__(self, batch_info_host: Tensor) -> None:
        self._batch_info = batch_info_host

    def get_num_sequences(self) -> tuple[int, ...]:
        return tuple(self._batch_info[:6:2].tolist())

    def get_num_tokens(self) -> tuple[int, ...]:
        return tuple(self._batch_info[1:6:2].tolist())


def _registry() -> Any:
    class Registry:
        entries: dict[str, Any] = {}

        @classmethod
        def register(cls, name: str) -> Callable[[Any], Any]:
            def decorate(what: Any) -> Any:
                assert name not in cls.entries
                cls.entries[name] = what
                return what

            return decorate

        @classmethod
        def has(cls, name: str) -> bool:
            return name in cls.entries

        @classmethod
        def get(cls, name: str) -> Any:
            return cls.entries[name]

    return Registry


class ResourceHandler(ABC):
    """Something that attention wants to have allocated."""

    @property
    def is_paged(self) -> bool:
        return False

    @abstractmethod
    def allocate(self, sequence_info: Any) -> Tensor: ...


def _descriptor(abstract: tuple[str, ...]) -> Any:
    methods = {name: classmethod(abstractmethod(lambda cls, *args: None)) for name in abstract}
    return type(ABC)("AttentionDescriptor", (ABC,), methods)


class AutoModelForCausalLMFactory:
    """Builds transformers' model of a checkpoint's config on the meta device, and loads its weights later."""

    _custom_model_mapping: dict[str, Any] = {"LlamaConfig": NotImplemented}

    def __init__(self, model: Path) -> None:
        self.model = str(model)

    def _build_model(self, device: str) -> Any:
        assert device == "meta"
        config = AutoConfig.from_pretrained(self.model)
        assert type(config).__name__ not in self._custom_model_mapping
        with init_empty_weights():
            return AutoModelForCausalLM.from_config(config).eval()

    def load(self) -> Any:
        """The model with its weights; whatever has none in the checkpoint is an error."""
        model = self._build_model("meta")
        stored = load_file(Path(self.model) / "model.safetensors")
        missing, _ = model.load_state_dict(stored, strict=False, assign=True)
        assert not missing, missing
        return model


def install(
    patch: Any, version: str = "1.3.0rc22", abstract: tuple[str, ...] = ABSTRACT, **replaced: Any
) -> SimpleNamespace:
    """Put modules where `import tensorrt_llm` finds them; `replaced` are other contents of theirs, None for none."""
    content = {
        "AttentionDescriptor": _descriptor(abstract),
        "AttentionRegistry": _registry(),
        "BatchInfo": BatchInfo,
        "ResourceHandler": ResourceHandler,
        "AutoModelForCausalLMFactory": AutoModelForCausalLMFactory,
        "ModelFactoryRegistry": _registry(),
    } | replaced
    places = {
        "tensorrt_llm": (),
        "tensorrt_llm._torch": (),
        AUTO_DEPLOY: (),
        f"{AUTO_DEPLOY}.custom_ops": (),
        f"{AUTO_DEPLOY}.custom_ops.attention_interface": tuple(content)[:4],
        f"{AUTO_DEPLOY}.models": (),
        f"{AUTO_DEPLOY}.models.hf": tuple(content)[4:],
    }
    for path, names in places.items():
        module = ModuleType(path)
        module.__path__ = []  # type: ignore[attr-defined]
        for name in names:
            if content[name] is not None:
                setattr(module, name, content[name])
        patch.setitem(sys.modules, path, module)
    patch.setattr(sys.modules["tensorrt_llm"], "__version__", version, raising=False)
    return SimpleNamespace(**content)


class Engine:
    """Puts cached attention into a graph, owns its tensors, and runs ragged batches on sequence slots."""

    def __init__(self, graph: GraphModule, descriptor: Any, slots: int, max_seq_len: int) -> None:
        """Change a copy of what `export` returned."""
        self.info = SimpleNamespace(
            max_num_state_slots=slots, max_seq_len=max_seq_len, device="cpu"
        )
        self.descriptor = descriptor
        self.caches: dict[str, Tensor] = {}
        self.graph = copy.deepcopy(graph)
        self._insert()

    def _insert(self) -> None:
        graph, descriptor = self.graph.graph, self.descriptor
        source = descriptor.get_source_attention_op()
        nodes = [x for x in graph.nodes if x.target in (source, source.default)]
        assert nodes, "the graph has no node that the backend replaces"
        metadata = [self._input(name) for name in descriptor.get_standard_metadata_args()]
        for node in nodes:
            handlers = descriptor.get_cache_initializers(node, None)
            caches = []
            for suffix, handler in handlers.items():
                assert isinstance(handler, ResourceHandler) and not handler.is_paged
                name = f"r{len(self.caches)}_{suffix}"
                self.caches[name] = handler.allocate(self.info)
                caches.append(self._input(name))
            own = node.args[: descriptor.get_num_qkv_args()]
            given = (*own, *metadata, *caches, *descriptor.get_constants(node))
            with graph.inserting_before(node):
                cached = graph.call_function(descriptor.get_cached_attention_op(), args=given)
            node.replace_all_uses_with(cached)
            graph.erase_node(node)
        graph.lint()
        self.graph.recompile()

    def _input(self, name: str) -> Node:
        last = [x for x in self.graph.graph.nodes if x.op == "placeholder"][-1]
        with self.graph.graph.inserting_after(last):
            return self.graph.graph.placeholder(name)

    @torch.inference_mode()
    def step(
        self, prompts: list[tuple[int, int, list[int]]], singles: list[tuple[int, int, int]] = ()
    ) -> list[Tensor]:
        """Logits [t, V] of each sequence of a batch.

        Args:
            prompts: (slot, position of the first token, tokens) of prompts or parts of them.
            singles: (slot, position, token) of sequences that decode.
        """
        parts = [*prompts, *((slot, at, [token]) for slot, at, token in singles)]
        lengths = torch.tensor([0, *(len(x) for _, _, x in parts)])
        ids = torch.tensor([token for _, _, tokens in parts for token in tokens], dtype=torch.int32)
        places = torch.cat([torch.arange(at, at + len(x)) for _, at, x in parts])
        tokens = sum(len(x) for _, _, x in prompts)
        counts = [len(prompts), tokens, 0, 0, len(singles), len(singles), *[0] * 6]
        metadata = {
            "batch_info_host": torch.tensor(counts, dtype=torch.int32),
            "cu_seqlen_host": lengths.cumsum(0).to(torch.int32),
            "input_pos_host": torch.tensor([at for _, at, _ in parts], dtype=torch.int32),
            "slot_idx_host": torch.tensor([slot for slot, _, _ in parts]),
        }
        shape = (1, -1) if prompts else (-1, 1)
        wanted = {name: metadata[name] for name in self.descriptor.get_standard_metadata_args()}
        (out,) = self.graph(
            input_ids=ids.view(shape), position_ids=places.view(shape), **wanted, **self.caches
        )
        return list(out.flatten(0, 1).split(lengths[1:].tolist()))


def export(model: Any) -> GraphModule:
    """The graph of a model, with input_ids and position_ids of any shape [B, T]."""

    class Logits(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = model

        def forward(self, input_ids: Tensor, position_ids: Tensor) -> Tensor:
            return self.model(
                input_ids=input_ids, position_ids=position_ids, use_cache=False
            ).logits

    ids = torch.ones(2, 4, dtype=torch.int32)
    places = torch.arange(4).repeat(2, 1)
    shape = {0: torch.export.Dim.DYNAMIC, 1: torch.export.Dim.DYNAMIC}
    with torch.inference_mode():
        program = torch.export.export(
            Logits(),
            args=(),
            kwargs={"input_ids": ids, "position_ids": places},
            dynamic_shapes={"input_ids": shape, "position_ids": shape},
            strict=False,
        )
    module: Any = program.module(check_guards=False)
    # Inputs by name, and no checks of shapes: prompts come as [1, tokens], single tokens as [sequences, 1].
    module._forward_pre_hooks.clear()
    module.graph.set_codegen(CodeGen())
    module.recompile()
    return module
