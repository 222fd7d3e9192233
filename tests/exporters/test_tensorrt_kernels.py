# SPDX-License-Identifier: Apache-2.0
"""Kernels that engines embed: PTX for Hopper in TensorRT's argument order, and what they change of our own kernels."""

import hashlib
import re
from dataclasses import replace
from pathlib import Path

import engine_cases as cases
import pytest
import torch
import triton
from hypothesis import given
from hypothesis import strategies as st
from paged_rows import Cache, expected_output

from modelopt_dms.exporters import ExportError
from modelopt_dms.exporters.tensorrt import kernels
from modelopt_dms.exporters.tensorrt.expressions import ceil_div, dims_of, evaluate
from modelopt_dms.exporters.tensorrt.ptx import check_signature, read, rewrite, schema, signature
from modelopt_dms.kernels import append, append_reference, decode
from modelopt_dms.kernels.gating import Decided
from modelopt_dms.kernels.layout import PAGE, PagePool, PageTables, RowLayout
from modelopt_dms.kernels.reference import Scoring
from modelopt_dms.kernels.variants import PTX_VERSION, assemble
from modelopt_dms.runtime.manifest import Kernel, Manifest, ManifestError
from modelopt_dms.runtime.operators import OPERATORS, Argument

NAMES = tuple(cases.MODELS)


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return cases.compile_elsewhere(tmp_path_factory.mktemp("engines"), *NAMES)


def every_kernel(exported: dict[str, Path]) -> list[tuple[Kernel, str]]:
    return [
        (kernel, (place / kernel.file).read_text())
        for place in exported.values()
        for kernel in Manifest.load(place).kernels
    ]


# PTX of real kernels


def test_parameters_are_inputs_then_numbers_then_outputs(exported: dict[str, Path]) -> None:
    found = every_kernel(exported)
    assert len(found) == len(NAMES) * len(OPERATORS)
    for kernel, ptx in found:
        operator = OPERATORS[kernel.operator]
        expected = [(f"in_{x.name}", "u64") for x in operator.inputs]
        expected += [(f"int_{i}", "u32") for i in range(len(kernel.integers))]
        expected += [(f"out_{x.name}", "u64") for x in operator.outputs]
        assert signature(ptx) == expected
        check_signature(operator, kernel, ptx)


def test_what_is_changed_in_place_is_reached_through_the_outputs_pointer(
    exported: dict[str, Path],
) -> None:
    for kernel, ptx in every_kernel(exported):
        body = ptx[ptx.index(".reqntid") :]
        for output in [x for x in OPERATORS[kernel.operator].outputs if not x.unchanged]:
            assert f"[out_{output.name}]" in body
            if output.aliases:
                assert f"in_{output.aliases}" not in body


def test_every_tensor_that_an_op_names_is_read(exported: dict[str, Path]) -> None:
    # Rows in the model's dtype have no scales to be encoded with.
    unread = {
        ("bf16", "DmsCacheUpdate", "scales"),
        ("fp16", "DmsCacheUpdate", "scales"),
        ("bf16", "DmsPrefillWrite", "scales"),
        ("fp16", "DmsPrefillWrite", "scales"),
        ("bf16", "DmsPrefillAttention", "scales"),
        ("fp16", "DmsPrefillAttention", "scales"),
    }
    found = set()
    for name, place in exported.items():
        for kernel in Manifest.load(place).kernels:
            operator = OPERATORS[kernel.operator]
            changed = {x.aliases for x in operator.outputs}
            body = (place / kernel.file).read_text()
            body = body[body.index(".reqntid") :]
            found |= {
                (name, kernel.operator, x.name)
                for x in operator.inputs
                if x.name not in changed and f"[in_{x.name}" not in body
            }
    assert found == unread


def test_ptx_assembles_without_spills_and_names_no_path(exported: dict[str, Path]) -> None:
    for kernel, ptx in every_kernel(exported):
        registers, spills = assemble(ptx, kernel.arch)
        assert (spills, registers <= 255) == (0, True), kernel
        assert ptx.startswith(f".version {PTX_VERSION / 10}\n.target sm_90a\n")
        assert not re.search(r"/|\.loc|\.file|debug", ptx)


def test_a_kernel_that_spills_is_noticed() -> None:
    stores = "".join(f"ld.global.f32 %f{i}, [%rd0+{4 * i}];" for i in range(400))
    uses = "".join(f"st.global.f32 [%rd0+{4 * i}], %f{399 - i};" for i in range(400))
    text = (
        ".version 8.7\n.target sm_90a\n.address_size 64\n.visible .entry x(.param .u64 p)\n"
        ".reqntid 1024\n{ .reg .f32 %f<400>; .reg .b64 %rd<2>; ld.param.u64 %rd0, [p];"
        f"{stores} bar.sync 0; {uses} ret; }}"
    )
    assert assemble(text, "sm_90a")[1] > 0


def test_launches_fit_hopper(exported: dict[str, Path]) -> None:
    for kernel, _ in every_kernel(exported):
        assert kernel.threads in (32, 64, 128, 256)
        assert kernel.shared <= 227 << 10


def test_grids_and_numbers_are_those_of_our_own_launches(exported: dict[str, Path]) -> None:
    made = cases.MODELS["bf16"]
    known = cases.sizes(made, batch=3, tokens=200)
    found = {x.operator: x for x in Manifest.load(exported["bf16"]).kernels}
    launches = {}
    for name, operator in OPERATORS.items():
        dims = dims_of(operator.inputs, [cases.shape(x, known) for x in operator.inputs])
        grid = tuple(evaluate(x, dims) for x in found[name].grid)
        launches[name] = grid, [evaluate(x, dims) for x in found[name].integers]
    assert launches == {
        "DmsCacheUpdate": ((6, 1, 1), [4]),
        "DmsDecodePartial": ((cases.PROGRAMS, 1, 1), [6, 4]),
        "DmsDecodeCombine": ((6, 4, 1), []),
        "DmsPrefillAttention": ((24, 2, 1), [200, 20, 4, 4]),
        "DmsPrefillWrite": ((6, 13, 1), [200, 4]),
    }


def test_kernels_remember_what_they_were_compiled_for(exported: dict[str, Path]) -> None:
    for name, place in exported.items():
        expected = cases.attributes(cases.MODELS[name])
        for kernel in Manifest.load(place).kernels:
            operator = OPERATORS[kernel.operator]
            assert kernel.attributes == {x: expected[x] for x in operator.attributes}


# Where PTX and op, or file and manifest, part


@pytest.fixture
def one(exported: dict[str, Path]) -> tuple[Kernel, str, Path]:
    place = exported["fp8"]
    kernel = next(x for x in Manifest.load(place).kernels if x.operator == "DmsDecodePartial")
    return kernel, (place / kernel.file).read_text(), place


def test_an_op_that_changed_is_noticed(one: tuple[Kernel, str, Path]) -> None:
    kernel, ptx, _ = one
    operator = OPERATORS[kernel.operator]
    swapped = (operator.inputs[1], operator.inputs[0], *operator.inputs[2:])
    for changed, message in (
        (replace(operator, inputs=swapped), r"parameter 0 is in_q \(u64\), expected in_keys"),
        (
            replace(operator, inputs=operator.inputs[:-1]),
            r"parameter 5 is in_live \(u64\), expected int_0",
        ),
        (
            replace(operator, outputs=(*operator.outputs, Argument("more", "int32", ("B",)))),
            r"parameter 12 is nothing, expected out_more",
        ),
    ):
        with pytest.raises(ExportError, match=message):
            check_signature(changed, kernel, ptx)


def test_a_manifest_that_describes_another_kernel_is_noticed(
    one: tuple[Kernel, str, Path],
) -> None:
    kernel, ptx, _ = one
    operator = OPERATORS[kernel.operator]
    for changed, message in (
        (replace(kernel, integers=kernel.integers[:1]), r"parameter 7 is int_1 \(u32\), expected"),
        (replace(kernel, entry="other"), "the entry is DmsDecodePartial, expected other"),
        (replace(kernel, threads=64), "not a kernel of 64 threads"),
        (replace(kernel, arch="sm_100a"), "not compiled for sm_100a"),
    ):
        with pytest.raises(ExportError, match=message):
            check_signature(operator, changed, ptx)


def test_ptx_whose_parameters_moved_is_noticed(one: tuple[Kernel, str, Path]) -> None:
    kernel, ptx, _ = one
    operator = OPERATORS[kernel.operator]
    first, second = "\t.param .u64 in_q,\n", "\t.param .u64 in_keys,\n"
    assert first + second in ptx
    for changed in (
        ptx.replace(first + second, second + first),
        ptx.replace(first, ""),
        ptx.replace("\t.param .u32 int_1", "\t.param .u64 int_1"),
    ):
        with pytest.raises(ExportError, match="parameter .* is .*expected"):
            check_signature(operator, kernel, changed)


def test_a_changed_or_missing_file_is_noticed(
    one: tuple[Kernel, str, Path], tmp_path: Path
) -> None:
    kernel, ptx, place = one
    operator = OPERATORS[kernel.operator]
    assert read(operator, kernel, place) == ptx
    with pytest.raises(ManifestError, match="is missing, the kernel of .*; export again"):
        read(operator, kernel, tmp_path)
    (tmp_path / "kernels").mkdir()
    (tmp_path / kernel.file).write_text(ptx.replace("add", "sub", 1))
    with pytest.raises(ManifestError, match="was changed since the export"):
        read(operator, kernel, tmp_path)
    assert kernel.sha256 == hashlib.sha256(ptx.encode()).hexdigest()


# Rewriting

RAW = """.version 8.7
.target sm_90a
.visible .entry _k(
	.param .u64 .ptr .global .align 1 _k_param_0,
	.param .u32 _k_param_1,
	.param .u64 .ptr .global .align 1 _k_param_10,
	.param .u64 .ptr .global .align 1 _k_param_2
)
.reqntid 32
{
	.loc	1 3 4                           // k.py:3:4
	ld.param.b64 	%rd1, [_k_param_0];
	ld.param.b64 	%rd2, [_k_param_10];
	// begin inline asm
	ret;
}
	.file	1 "/home/someone/k.py"
	.section	.debug_abbrev
	{
.b8 1                                   // Abbreviation Code
	}
"""
COMBINE = OPERATORS["DmsDecodeCombine"]
PARAMETERS = [("in_whole", "u64"), ("int_0", "u32"), ("out_out", "u64")]


def test_rewriting_orders_names_and_drops_what_is_unknown_and_unused() -> None:
    made = rewrite(RAW, COMBINE, PARAMETERS, 1)
    assert signature(made) == schema(COMBINE, 1)
    assert made.splitlines()[-6:] == [
        ".reqntid 32",
        "{",
        "\tld.param.b64 \t%rd1, [in_whole];",
        "\tld.param.b64 \t%rd2, [out_out];",
        "\tret;",
        "}",
    ]


def test_rewriting_refuses_what_it_does_not_know() -> None:
    used = RAW.replace("\tret;", "\tld.param.b64 \t%rd3, [_k_param_2];\n\tret;")
    with pytest.raises(ExportError, match="uses _k_param_2, which is none of its tensors"):
        rewrite(used, COMBINE, PARAMETERS, 1)
    with pytest.raises(ExportError, match="DmsDecodeCombine has no parameter in_q"):
        rewrite(RAW, COMBINE, [("in_q", "u64"), *PARAMETERS[1:]], 1)
    with pytest.raises(ExportError, match=r"parameters are .*, expected \['u64', 'u64'\]"):
        rewrite(RAW, COMBINE, [PARAMETERS[0], PARAMETERS[2]], 1)
    with pytest.raises(ExportError, match="PTX with 2 entries"):
        rewrite(RAW + RAW, COMBINE, PARAMETERS, 1)


# Expressions


@given(st.dictionaries(st.sampled_from("BKHTPE"), st.integers(1, 4096), min_size=6))
def test_expressions_are_pythons(dims: dict[str, int]) -> None:
    for text in ("B * K", "P", "7", "E // 64", "B * K + T - 3", "(B + K) * H", "T - E - P"):
        assert evaluate(text, dims) == eval(text, {}, dims)
    assert evaluate("ceil(T / 128)", dims) == (dims["T"] + 127) // 128
    assert evaluate("ceil((T + B) / K) * 2", dims) == ceil_div(dims["T"] + dims["B"], dims["K"]) * 2


def test_expressions_take_symbols() -> None:
    class Symbol(str):
        def __mul__(self, other: "Symbol") -> "Symbol":  # type: ignore[override]
            return Symbol(f"({self}*{other})")

    found = evaluate(
        "2 * ceil(T / 16)",
        {"T": Symbol("t")},
        lambda n: Symbol(n),
        lambda a, b: Symbol(f"up({a},{b})"),
    )
    assert found == "(2*up(t,16))"


@pytest.mark.parametrize(
    "text",
    [
        "",
        "B *",
        "B / K",
        "__import__('os')",
        "ceil(B)",
        "ceil(B * K)",
        "B ** K",
        "2.5",
        "-B",
        "B[0]",
    ]
    + ["floor(B / K)", "ceil(B / K, 2)", "True", "'B'", "B if K else 1"],
)
def test_anything_else_is_refused(text: str) -> None:
    with pytest.raises(ExportError):
        evaluate(text, {"B": 1, "K": 2})


def test_an_unknown_name_is_named() -> None:
    with pytest.raises(ExportError, match="Q is none of B, K"):
        evaluate("B * Q", {"B": 1, "K": 2})


# Models without kernels


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"dtype": "float32"}, "dtype='float32': .*float16 or bfloat16"),
        ({"key_number": "nvfp4"}, "key_number='nvfp4': .*plain, fp8, int8"),
        ({"heads": 260, "kv_heads": 2}, "260 heads on 2 KV heads; .*at most 64"),
        ({"heads": 5}, "5 heads on 2 KV heads; expected a multiple"),
    ],
)
def test_models_without_kernels_are_refused(changes: dict, message: str) -> None:
    with pytest.raises(ExportError, match=message):
        kernels.layer_shape(replace(cases.MODELS["bf16"], **changes))


def test_sinks_are_refused() -> None:
    with pytest.raises(ExportError, match="sinks"):
        kernels.compile_kernels(
            cases.MODELS["bf16"], Scoring(1.0, None, torch.zeros(8)), chunk=128, programs=6
        )


def test_programs_fill_a_gpu() -> None:
    assert kernels.decode_programs(cases.MODELS["bf16"], 132) == 264
    assert kernels.decode_programs(cases.MODELS["fp8"], 114) == 342


# What engines change of the kernels, interpreted


@pytest.mark.parametrize("shift", [0, 1])
def test_appending_without_a_free_list_is_appending_where_pages_are_there(shift: int) -> None:
    torch.manual_seed(shift)
    B, K, D, steps = 2, 1, 16, 85
    layout = RowLayout("plain", D, torch.float32)
    active = torch.tensor([True, False])
    ours, theirs = (
        (
            PagePool.make(40, layout, layout, torch.device("cpu")),
            PageTables.make(B, K, 3, 5, shift, active.clone()),
        )
        for _ in range(2)
    )
    for pool, lists in (ours, theirs):  # as a host does, in front
        lists.table.copy_(torch.arange(1, 1 + B * K * 3).view(B, K, 3))
        pool.counters.fill_(40 - B * K * 3)
    for step in range(steps):
        k, v = torch.randn(2, B, K, D)
        evict = torch.rand(B, K) < 0.15
        active[1] = step % 3 == 0
        for _, lists in (ours, theirs):
            lists.active.copy_(active)
        _append_without_free_list(k, v, evict, *ours)
        append_reference.append_token(k, v, Decided(evict), *theirs)
    for name in ("table", "live", "seen", "ring_slot", "ring_evict"):
        assert torch.equal(getattr(ours[1], name), getattr(theirs[1], name)), name
    assert int(ours[1].live.max()) > PAGE
    assert int(ours[1].live[0].max()) < steps - 3
    # Page 0 is where lists without pages write, and nobody reads.
    assert torch.equal(ours[0].keys[1:], theirs[0].keys[1:])
    assert torch.equal(ours[0].values[1:], theirs[0].values[1:])


def _append_without_free_list(
    k: torch.Tensor, v: torch.Tensor, evict: torch.Tensor, pool: PagePool, lists: PageTables
) -> None:
    layouts = (pool.key_layout, pool.value_layout)
    append._append_kernel[(lists.batch * lists.heads,)](
        k, v, evict.view(torch.uint8), None, None, None, None, lists.active.view(torch.uint8),
        lists.scales, None, None, lists.table.shape[2], pool.keys, pool.values, None, None, lists.table,
        lists.live, lists.seen, lists.ring_slot, lists.ring_evict.view(torch.uint8), None,
        *[None] * 7,
        **append._append_constants(layouts, lists.heads, lists.window, lists.shift, 0),
        **append._linear_constants(0, True, True, 0.0, 0.0, 0),
        num_warps=1,
    )  # fmt: skip


def test_a_list_without_a_page_writes_where_nobody_reads() -> None:
    layout = RowLayout("plain", 16, torch.float32)
    pool = PagePool.make(4, layout, layout, torch.device("cpu"))
    lists = PageTables.make(1, 2, 1, 5, 0, torch.ones(1, dtype=torch.bool))
    lists.table[0, 1, 0] = 2
    k, v = torch.randn(2, 1, 2, 16)
    _append_without_free_list(k, v, torch.zeros(1, 2, dtype=torch.bool), pool, lists)
    assert torch.equal(pool.keys[2, 0], k[0, 1])
    assert torch.equal(pool.keys[0, 0], k[0, 0])
    assert pool.keys[[1, 3, 4]].abs().sum() == 0
    assert lists.table.tolist() == [[[0], [2]]]
    assert pool.counters.tolist() == [4, 4]


@pytest.mark.parametrize("programs", [1, 2, 3, 7, 40])
def test_joining_copies_what_one_program_had_whole(programs: int) -> None:
    live = [[300, 1, 64], [0, 0, 0], [65, 129, 7], [0, 200, 0]]
    cache = Cache(live, (16, 16))
    group, D = 3, 16
    q = torch.randn(4, 3 * group, D)
    scoring = Scoring(0.3)
    out, whole = (torch.full((4, 3 * group, D), float("nan")) for _ in range(2))
    partial = torch.full((programs, 2, group, D), float("nan"))
    partial_lse = torch.full((programs, 2, group), float("nan"))
    spans = torch.full((12, 2), 1 << 20, dtype=torch.int32)  # as bad as memory can be
    shape = decode._shape(
        cache.pool.key_layout,
        cache.pool.value_layout,
        3,
        group,
        scoring,
        triton.language.float32,
        False,
    )
    pool, lists = cache.pool, cache.lists
    decode._decode[(programs,)](
        q, pool.keys, None, pool.values, None, lists.table, lists.live, lists.scales, None, 12,
        lists.table.shape[2], whole, partial, partial_lse, spans, **shape, LISTS=4, num_warps=4,
    )  # fmt: skip
    decode._combine[(12, group)](
        partial, partial_lse, spans, lists.live, None, whole, out,
        HEADS=3, GROUP=group, ROWS=16, BLOCKS=1, DV=D, WIDTH=D, PARTS=decode.PARTS,
    )  # fmt: skip
    expected = expected_output(q, cache.keys, cache.values, lists.live, scoring)
    torch.testing.assert_close(out.double(), expected, atol=2e-5, rtol=2e-5)
    assert (out[1] == 0).all()
