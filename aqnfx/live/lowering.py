"""From a graph of Dynamo to a graph that passes take: ATen operations, weights by their names, nothing changed in place."""

from __future__ import annotations

import operator
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.fx.traceback as fx_traceback
from torch import Tensor, nn
from torch._dispatch.python import enable_python_dispatcher
from torch._higher_order_ops.wrap import tag_activation_checkpoint
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.fx import Graph, GraphModule, Interpreter, Node
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils import _pytree as pytree

from aqnfx.graph.edit import copy_graph, inline, output_node
from aqnfx.graph.functional import changes_unseen, functional_of, is_in_place, value_of
from aqnfx.graph.opkinds import op_kind
from aqnfx.graph.program import Program, Signature
from aqnfx.graph.render import fingerprint
from aqnfx.graph.tags import get_tag, is_float, tensor_value, update_tag
from aqnfx.graph.verify import verify
from aqnfx.graph.wrappers import own_name

_CHECKPOINT = "tag_activation_checkpoint"
_PATH = re.compile(r"^L\['\w+'\]\.?")  # the local variable that holds the model
_BATCHED = ("input_ids", "inputs_embeds", "pixel_values", "input_features", "decoder_input_ids", "attention_mask")


@dataclass(frozen=True, slots=True, kw_only=True)
class Names:
    """What the modules and weights of a model are called, by their identity."""

    modules: Mapping[int, str]
    tensors: Mapping[int, str]

    @classmethod
    def of(cls, model: nn.Module) -> Names:
        """Collect the names of ``model``; of what goes by several names the first counts."""
        modules: dict[int, str] = {}
        for name, module in model.named_modules(remove_duplicate=False):
            modules.setdefault(id(module), own_name(name))
        tensors: dict[int, str] = {}
        for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
            tensors.setdefault(id(tensor), own_name(name))
        return cls(modules=modules, tensors=tensors)


@dataclass(frozen=True, slots=True, kw_only=True)
class Region:
    """A part of a graph that is computed again in the backward pass: the options that its call had."""

    options: Mapping[str, Any]


@dataclass(frozen=True, kw_only=True, eq=False)
class Lowered:
    """A Program made of a graph of Dynamo, and how to call it: its inputs are those of the graph that are no weights.

    ``inputs``: per input of the Program its place among the graph's; ``weights``: attribute name -> such a place.
    ``regions``: number -> what is computed again in the backward pass; nodes have the number as their block.
    """

    program: Program
    inputs: tuple[int, ...]
    weights: Mapping[str, int]
    regions: Mapping[int, Region]
    sources: tuple[Any, ...]


def lower(captured: GraphModule, examples: Sequence[Any], names: Names, *, title: str, root: str = "") -> Lowered:
    """Return the Program of a captured graph.

    ``examples`` are its inputs as Dynamo gives them to a backend, ``root`` is the module whose code it is. Operations are
    those that ``torch.export`` records (ATen before autograd): passes see what they see in a Program, and it can be trained.
    """
    fakes = [node.meta["example_value"] for node in captured.graph.nodes if node.op == "placeholder"]
    mode = next((v.fake_mode for v in fakes if isinstance(v, FakeTensor)), None) or FakeTensorMode()
    bodies: dict[str, Region] = {}
    flat = _with_bodies_inlined(captured, bodies)
    with fx_traceback.preserve_node_meta(), mode, enable_python_dispatcher():
        traced = make_fx(
            lambda *values: Interpreter(flat).run(*values), pre_dispatch=True, _allow_non_fake_inputs=True
        )(*fakes)
        graph = traced.graph
        _tidy(graph)
    inputs, weights, attributes = _unlift(traced, captured, examples, names)
    regions = _name_modules(graph, names, bodies, root)
    module = GraphModule(attributes, graph, class_name="Live")
    module.train(False)
    verify(module, after="capture")
    values = tuple(node.meta["val"] for node in graph.nodes if node.op == "placeholder")
    _, in_spec = pytree.tree_flatten((values, {}))
    _, out_spec = pytree.tree_flatten(output_node(graph).args[0])
    program = Program(
        module=module, original=fingerprint(graph), source={"name": title, "origin": "dynamo"},
        signature=Signature(in_spec=in_spec, out_spec=out_spec, names=tuple(f"input_{i}" for i in inputs), defaults=values),
    )  # fmt: skip
    placeholders = [node for node in captured.graph.nodes if node.op == "placeholder"]
    return Lowered(
        program=program, inputs=inputs, weights=weights, regions=regions,
        sources=tuple(getattr(node, "_dynamo_source", None) for node in placeholders),
    )  # fmt: skip


def _with_bodies_inlined(captured: GraphModule, bodies: dict[str, Region]) -> GraphModule:
    """Return a copy in which the bodies of gradient checkpointing stand in the graph, marked in their module stacks.

    What a pass sees is then one graph, and an operation has the same number in its module as without checkpointing.
    """
    graph, _ = copy_graph(captured.graph)
    flat = GraphModule(captured, graph)
    for node in list(graph.nodes):
        if getattr(node.target, "__name__", "") != _CHECKPOINT:
            continue
        body = getattr(captured, str(node.args[0].target))
        mark = f"aqnfx_region_{len(bodies) + 1}"
        bodies[mark] = Region(options=dict(node.kwargs))
        for inner in body.graph.nodes:
            if inner.op == "get_attr":  # a constant of the body goes to the graph that the body is now part of
                name = f"{mark}_{inner.target}".replace(".", "_")
                setattr(flat, name, getattr(body, str(inner.target)))
                inner.target = name
        before = set(graph.nodes)
        results = inline(node, body.graph, node.args[1:])
        for new in set(graph.nodes) - before:
            new.meta["nn_module_stack"] = {**new.meta.get("nn_module_stack", {}), mark: (mark, mark)}
        for user in list(node.users):
            user.replace_all_uses_with(results[user.args[1]])
            graph.erase_node(user)
        graph.erase_node(node)
    flat.recompile()
    return flat


def _tidy(graph: Graph) -> None:
    """Make arithmetic functional, and drop what nothing reads.

    Where others see what is changed in place (an input of the graph, a view), the new value is an operation, which passes may
    perturb, and is then copied to its place.
    """
    for node in list(graph.nodes):
        if not is_in_place(node):
            continue
        if node.target is torch.ops.aten.detach_.default:
            node.replace_all_uses_with(node.args[0])
            graph.erase_node(node)
        elif op_kind(node.target) is not None and is_float(node) and (functional := functional_of(node.target)) is not None:
            known = value_of(functional, node)
            if changes_unseen(node) and known.dtype == node.meta["val"].dtype:
                node.target = functional
                continue
            with graph.inserting_before(node):
                # A copy: what the gradient of the operation reads must not be what the copy below changes.
                before = graph.call_function(torch.ops.aten.clone.default, (node.args[0],))
                value = graph.call_function(functional, (before, *node.args[1:]), node.kwargs)
            before.meta, value.meta = dict(node.args[0].meta), {**node.meta, "val": known}
            before.meta["nn_module_stack"] = node.meta.get("nn_module_stack", {})
            node.target, node.args, node.kwargs = torch.ops.aten.copy_.default, (node.args[0], value), {}
    graph.eliminate_dead_code()


def _unlift(
    traced: GraphModule, captured: GraphModule, examples: Sequence[Any], names: Names
) -> tuple[tuple[int, ...], dict[str, int], dict[str, Any]]:
    """Replace inputs that are weights by attributes of their names; put the input that tells the batch size first."""
    graph = traced.graph
    placeholders = [node for node in graph.nodes if node.op == "placeholder"]
    titles = [str(node.target) for node in captured.graph.nodes if node.op == "placeholder"]
    weights: dict[str, int] = {}
    attributes: dict[str, Any] = {
        str(node.target): getattr(traced, str(node.target)) for node in graph.nodes if node.op == "get_attr"
    }
    data: list[int] = []
    first = next(iter(graph.nodes))
    for index, (node, example) in enumerate(zip(placeholders, examples, strict=True)):
        name = names.tensors.get(id(example)) if isinstance(example, Tensor) else None
        if name is None:
            data.append(index)
            continue
        with graph.inserting_before(first):
            attribute = graph.create_node("get_attr", name)  # get_attr() would look for it in the module that was traced
        attribute.meta["val"] = node.meta["val"]
        node.replace_all_uses_with(attribute)
        if first is node:
            first = node.next
        graph.erase_node(node)
        weights[name], attributes[name] = index, example
    order = sorted(data, key=lambda index: _rank(titles[index], placeholders[index]))
    for index in order:  # graph order is the order of the arguments
        placeholders[index].meta.setdefault("nn_module_stack", {})
        first.prepend(placeholders[index]) if placeholders[index] is not first else None
        first = placeholders[index].next
    return tuple(order), weights, attributes


def _rank(title: str, node: Node) -> tuple[int, int]:
    """Return how well an input tells the batch size: by its name, else as the first tensor that has two dimensions."""
    value = tensor_value(node)
    if value is None:
        return 3, 0
    for place, name in enumerate(_BATCHED):
        if name in title and value.dim() >= 2:
            return 0, place
    return (1, 0) if value.dim() >= 2 else (2, 0)


def _name_modules(graph: Graph, names: Names, bodies: Mapping[str, Region], root: str) -> dict[int, Region]:
    """Give the module stack of every node the names that the model has for its modules; number what is recomputed."""
    regions = {int(mark.rpartition("_")[2]): region for mark, region in bodies.items()}
    for node in graph.nodes:
        stack = {"root": (root, "")} if root else {}  # Dynamo leaves out the module that it starts from
        for key, (path, kind) in (node.meta.get("nn_module_stack") or {}).items():
            if key in bodies:
                update_tag(node, block=int(key.rpartition("_")[2]))
                continue
            identity = str(key).split("@")[0]
            name = names.modules.get(int(identity)) if identity.isdigit() else None
            if name is not None:
                stack[key] = (name, kind)
            elif not names.modules:  # nobody knows: Dynamo's own path
                stack[key] = (_PATH.sub("", path).replace("._modules['", ".").replace("']", ""), kind)
        node.meta["nn_module_stack"] = stack
    return regions


def with_regions(module: GraphModule, regions: Mapping[int, Region]) -> GraphModule:
    """Return the module with every region of :class:`Lowered` as a call that is computed again in the backward pass."""
    graph = module.graph
    if not regions:
        return module
    for number, region in regions.items():
        inside = [node for node in graph.nodes if node.op == "call_function" and get_tag(node).block == number]
        if not inside:
            continue
        members = set(inside)
        needed = dict.fromkeys(n for node in inside for n in node.all_input_nodes if n not in members)
        given = [node for node in inside if any(user not in members for user in node.users)]
        body, mapping = Graph(), dict[Node, Node]()
        for node in needed:
            mapping[node] = body.placeholder(node.name)
            mapping[node].meta = dict(node.meta)
        for node in inside:
            mapping[node] = body.node_copy(node, mapping.__getitem__)
        body.output(tuple(mapping[node] for node in given))
        name = f"recomputed_{number}"
        setattr(module, name, GraphModule({}, body))
        with graph.inserting_after(inside[-1]):  # where gradients are as enabled as they are in the region
            reference = graph.get_attr(name)
        with graph.inserting_after(reference):
            call = graph.call_function(tag_activation_checkpoint, (reference, *needed), dict(region.options))
        after = call
        for place, node in enumerate(given):
            with graph.inserting_after(after):
                after = graph.call_function(operator.getitem, (call, place))
            after.meta = dict(node.meta)
            for user in [user for user in node.users if user not in members]:
                user.replace_input_with(node, after)
        for node in reversed(inside):
            graph.erase_node(node)
    module.graph.lint()
    module.recompile()
    return module

