"""Bridges to bitsandbytes and torchao, through the libraries' own modules and forwards on the CPU."""

from __future__ import annotations

import copy
import subprocess
import sys
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import rankwise as rw
from rankwise.codecs.library import find_bridge, is_quantised, keep_stored
from rankwise.errors import TargetError
from rankwise.seeds import generator
from rankwise.store.fingerprint import fingerprint

IN, OUT = 64, 32


def gaussian(*shape: int, name: str = "") -> Tensor:
    return torch.randn(*shape, generator=generator(0, "test", name))


def filled(module: nn.Module) -> nn.Module:
    with torch.no_grad():
        module.weight.data = gaussian(*module.weight.shape, name="W")
        if isinstance(module, nn.Linear):
            module.bias.copy_(gaussian(module.out_features, name="bias"))
    return module


def bnb4(quant_type: str, nested: bool, embedding: bool = False) -> nn.Module:
    bnb = pytest.importorskip("bitsandbytes")
    if embedding:
        module = bnb.nn.Embedding4bit(OUT, IN, quant_type=quant_type)
        module.weight.compress_statistics = nested
    else:
        module = bnb.nn.Linear4bit(IN, OUT, compress_statistics=nested, quant_type=quant_type, compute_dtype=torch.float32)
    return filled(module).to("cpu")


def bnb8(embedding: bool = False, used: bool = False, floats: bool = False) -> nn.Module:
    bnb = pytest.importorskip("bitsandbytes")
    module = bnb.nn.Embedding8bit(OUT, IN) if embedding else bnb.nn.Linear8bitLt(IN, OUT, has_fp16_weights=floats)
    module = filled(module).to("cpu")
    if used:
        forward(module)
    return module


def torchao(kind: str, dtype: torch.dtype = torch.float32) -> nn.Module:
    q = pytest.importorskip("torchao.quantization")
    config = {
        "row": lambda: q.Int8WeightOnlyConfig(),
        "tensor": lambda: q.Int8WeightOnlyConfig(granularity=q.PerTensor()),
        "group": lambda: q.Int8WeightOnlyConfig(granularity=q.PerGroup(32)),
        "intx": lambda: q.IntxWeightOnlyConfig(weight_dtype=torch.int4, granularity=q.PerGroup(32)),
        "affine": lambda: q.IntxWeightOnlyConfig(weight_dtype=torch.int4, mapping_type=q.MappingType.ASYMMETRIC),
    }[kind]()
    module = filled(nn.Linear(IN, OUT)).to(dtype)
    q.quantize_(module, config)
    return module


def torchao_nf4() -> nn.Module:
    nf4 = pytest.importorskip("torchao.quantization.quantize_.workflows.nf4.nf4_tensor")
    module = filled(nn.Linear(IN, OUT))
    module.weight = nn.Parameter(nf4.to_nf4(module.weight.detach(), 64, 32), requires_grad=False)
    return module


#: name → (maker, relative error of one quantisation, is write∘read the identity on the stored bits)
MODULES: dict[str, tuple[Callable[[], nn.Module], float, bool]] = {
    "nf4": (lambda: bnb4("nf4", False), 0.12, True),
    "nf4-nested": (lambda: bnb4("nf4", True), 0.12, False),
    "fp4": (lambda: bnb4("fp4", False), 0.15, True),
    "fp4-nested": (lambda: bnb4("fp4", True), 0.15, False),
    "nf4-embedding": (lambda: bnb4("nf4", False, embedding=True), 0.12, True),
    "int8-fresh": (lambda: bnb8(), 0.01, False),
    "int8-used": (lambda: bnb8(used=True), 0.01, False),
    "int8-floats": (lambda: bnb8(floats=True, used=True), 1e-6, True),
    "int8-embedding": (lambda: bnb8(embedding=True), 0.01, False),
    "ao-row": (lambda: torchao("row"), 0.01, False),
    "ao-row-bf16": (lambda: torchao("row", torch.bfloat16), 0.01, False),
    "ao-tensor": (lambda: torchao("tensor"), 0.02, False),
    "ao-group": (lambda: torchao("group"), 0.01, False),
    "ao-int4": (lambda: torchao("intx"), 0.13, False),
    "ao-int4-affine": (lambda: torchao("affine"), 0.13, False),
    "ao-nf4": (torchao_nf4, 0.12, False),
}
everywhere = pytest.mark.parametrize("name", MODULES)


def forward(module: nn.Module) -> Tensor:
    """What the module computes of all its weight, whichever sort it is: num×dim, or x Wᵀ."""
    if isinstance(module, nn.Embedding):
        return module(torch.arange(OUT))
    return module(gaussian(5, IN, name="x").to(module.bias.dtype))


def expected(module: nn.Module, W: Tensor) -> Tensor:
    return W if isinstance(module, nn.Embedding) else gaussian(5, IN, name="x") @ W.T + module.bias.float()


def tolerance(module: nn.Module) -> float:
    """What the forward rounds: x and y to bfloat16, or W to int8 at each call (``has_fp16_weights``)."""
    if isinstance(module, nn.Linear) and module.bias.dtype == torch.bfloat16:
        return 0.1
    return 0.2 if getattr(getattr(module, "state", None), "has_fp16_weights", False) else 1e-4


@everywhere
def test_read_is_what_the_forward_uses(name: str) -> None:
    module = MODULES[name][0]()
    bridge = find_bridge(module)
    W = bridge.read(module)
    assert W.shape == (OUT, IN) and W.dtype == torch.float32 and type(W) is Tensor and not W.requires_grad
    assert torch.allclose(forward(module).float(), expected(module, W), atol=tolerance(module) * 3)
    true = gaussian(OUT, IN, name="W")
    assert (W - true).norm() / true.norm() < MODULES[name][1]
    assert is_quantised(module)


@everywhere
def test_write_stores_what_it_returns_and_the_forward_follows(name: str) -> None:
    module, error, _ = MODULES[name][0](), *MODULES[name][1:]
    bridge, before = find_bridge(module), module.weight
    forward(module)
    new = gaussian(OUT, IN, name="new") * 3
    new[4] = 0.0
    stored = bridge.write(module, new)
    assert module.weight is before
    assert torch.equal(stored, bridge.read(module))
    assert (stored - new).norm() / new.norm() < error
    assert stored[4].abs().max() <= 0.2 * error * new.abs().max()
    assert torch.allclose(forward(module).float(), expected(module, stored), atol=tolerance(module) * 9)
    copies = [] if name == "ao-nf4" else [copy.deepcopy(module)]  # torchao clones an NF4Tensor by requantising it
    for again in (module, *copies):
        assert torch.equal(forward(again), forward(module)) and torch.equal(find_bridge(again).read(again), stored)


@everywhere
def test_restore_is_bit_exact_and_repeatable(name: str) -> None:
    module = MODULES[name][0]()
    bridge = find_bridge(module)
    y, W, saved = forward(module), bridge.read(module), bridge.snapshot(module)
    keys = saved_state(module)
    for _ in range(2):
        bridge.write(module, gaussian(OUT, IN, name="other") * 0.1)
        assert not torch.equal(forward(module), y)
        bridge.restore(module, saved)
        assert torch.equal(bridge.read(module), W) and torch.equal(forward(module), y)
        now = saved_state(module)
        assert list(now) == list(keys) and all(torch.equal(now[k], keys[k]) for k in keys)


def saved_state(module: nn.Module) -> dict[str, Tensor]:
    """The state dict as plain tensors, copied; bitsandbytes' embeddings have none."""
    if isinstance(module, nn.Embedding):
        return {"weight": module.weight.data.clone()}
    out: dict[str, Tensor] = {}
    for key, value in module.state_dict().items():
        if hasattr(value, "__tensor_flatten__"):
            out |= {f"{key}.{n}": getattr(value, n).clone() for n in value.__tensor_flatten__()[0]}
        else:
            out[key] = value.clone()
    return out


@everywhere
def test_writing_what_was_read_adds_no_more_than_a_quantisation(name: str) -> None:
    module, error, exact = MODULES[name][0](), *MODULES[name][1:]
    bridge = find_bridge(module)
    W = bridge.read(module)
    again = bridge.write(module, W)
    assert torch.equal(again, W) if exact else (again - W).norm() < error * W.norm()


@pytest.mark.parametrize("name", [n for n in MODULES if "embedding" not in n])
def test_input_gradient_flows_after_write(name: str) -> None:
    module = MODULES[name][0]()
    stored = find_bridge(module).write(module, gaussian(OUT, IN, name="new"))
    x = gaussian(5, IN, name="x").to(module.bias.dtype).requires_grad_()
    g = gaussian(5, OUT, name="g")
    (module(x).float() * g).sum().backward()
    assert torch.allclose(x.grad.float(), g @ stored, atol=3 * tolerance(module))


@pytest.mark.parametrize("name", ["nf4", "nf4-nested", "int8-used", "ao-row"])
def test_written_weight_survives_the_state_dict(name: str) -> None:
    module = MODULES[name][0]()
    stored = find_bridge(module).write(module, gaussian(OUT, IN, name="new"))
    fresh = MODULES[name][0]()
    if name.startswith("nf4"):
        state = module.state_dict()
        parts = {k.removeprefix("weight."): v for k, v in state.items() if k.startswith("weight.")}
        fresh.weight = type(fresh.weight).from_prequantized(state["weight"], parts, device="cpu", module=fresh)
    elif name == "int8-used":
        fresh = bnb8()
        fresh.load_state_dict(module.state_dict())
    else:
        fresh.load_state_dict(module.state_dict(), assign=True)
    assert torch.equal(find_bridge(fresh).read(fresh), stored)


@pytest.mark.parametrize("nested", [False, True])
def test_processor_packing_of_4bit_is_read_and_left(nested: bool) -> None:
    """The form that inference leaves on AVX512-bf16 machines, made here by the library's own function."""
    F = pytest.importorskip("bitsandbytes.functional")
    bnb = pytest.importorskip("bitsandbytes")
    module, plain = (
        filled(bnb.nn.Linear4bit(256, 64, quant_type="nf4", compress_statistics=nested, compute_dtype=torch.float32)).to("cpu")
        for _ in range(2)
    )
    bridge = find_bridge(module)
    W = bridge.read(module)
    module.weight.data, module.weight.quant_state = F._convert_weight_packed_for_cpu(module.weight.data, module.weight.quant_state)
    assert torch.allclose(bridge.read(module), W, rtol=2**-8, atol=0) and not torch.equal(bridge.read(module), W)
    again = bnb.nn.Linear4bit(256, 64, bias=False, quant_type="nf4", compress_statistics=nested).to("cpu")
    again.weight.data, again.weight.quant_state = module.weight.data.clone(), copy.deepcopy(module.weight.quant_state)
    bridge.settle(again)
    stored = {k: v.clone() for k, v in again.state_dict().items() if not k.startswith("bias")}
    read = bnb.nn.Params4bit.from_prequantized(
        stored.pop("weight"), {k.removeprefix("weight."): v for k, v in stored.items()}, device="cpu"
    )
    fresh = bnb.nn.Linear4bit(256, 64, bias=False)
    fresh.weight = read
    assert torch.equal(bridge.read(fresh), bridge.read(module)), "what is saved after a forward is what acted in it"
    saved, packed = bridge.snapshot(module), module.weight.data.clone()
    new, x = gaussian(64, 256, name="new"), gaussian(5, 256, name="x")
    assert torch.equal(bridge.write(module, new), bridge.write(plain, new))
    assert module.weight.quant_state.nested == nested and module.weight.quant_state.dtype == torch.float32
    assert torch.equal(module(x), plain(x))
    bridge.restore(module, saved)
    assert torch.equal(module.weight.data, packed) and module.weight.quant_state.packing_format_for_cpu


def willing(module: nn.Module) -> nn.Module:
    """As on a processor with AVX512-bf16, where bitsandbytes repacks a 4-bit weight at the first inference forward."""
    module.support_avx512bf16_for_cpu = True
    return module


@pytest.mark.parametrize("shape", [(256, 64), (96, 40)], ids=["divides", "odd"])
def test_an_adapted_4bit_linear_is_never_repacked(shape: tuple[int, int]) -> None:
    bnb = pytest.importorskip("bitsandbytes")
    net = nn.Sequential(
        willing(filled(bnb.nn.Linear4bit(*shape, quant_type="nf4", compute_dtype=torch.float32)).to("cpu")), nn.Linear(shape[1], 3)
    ).eval()
    bridge, x = find_bridge(net[0]), gaussian(2, shape[0], name="x")
    W, codes, print_ = bridge.read(net[0]), net[0].weight.data.clone(), fingerprint(net)
    adapter = rw.attach(net, {"r": 2, "targets": ["0"]})
    with torch.no_grad(), rw.view(net, {}):
        y = net[0](x)
    assert torch.allclose(y, x @ W.T + net[0].bias, atol=1e-4)
    assert torch.equal(net[0].weight.data, codes) and torch.equal(bridge.read(net[0]), W) and fingerprint(net) == print_
    adapter.detach()
    with torch.no_grad():
        net(x)
    assert torch.equal(net[0].weight.data, codes), "the bits that detaching gave back"


def test_a_base_that_inference_has_repacked_is_refused() -> None:
    F, bnb = pytest.importorskip("bitsandbytes.functional"), pytest.importorskip("bitsandbytes")
    layer = filled(bnb.nn.Linear4bit(64, 32, quant_type="nf4", compute_dtype=torch.float32)).to("cpu")
    layer.weight.data, layer.weight.quant_state = F._convert_weight_packed_for_cpu(layer.weight.data, layer.weight.quant_state)
    net = nn.Sequential(layer, nn.Linear(32, 3))
    for refused in (keep_stored, lambda n: rw.attach(n, {"targets": ["1"]}), lambda n: rw.load(n, "any")):
        with pytest.raises(TargetError, match="repacked this Linear4bit"):
            refused(net)
    assert "rankwise" not in net._modules


def test_storage_dtype_and_state_dtype_are_kept() -> None:
    bnb = pytest.importorskip("bitsandbytes")
    module = (
        bnb.nn.Linear4bit(IN, OUT, quant_type="nf4", quant_storage=torch.bfloat16, compute_dtype=torch.bfloat16)
        .to(torch.bfloat16)
        .to("cpu")
    )
    bridge, new = find_bridge(module), gaussian(OUT, IN, name="new")
    assert module.weight.dtype == torch.bfloat16 and module.weight.quant_state.dtype == torch.bfloat16
    stored = bridge.write(module, new)
    assert module.weight.dtype == torch.bfloat16 and module.weight.quant_state.dtype == torch.bfloat16
    assert (stored - new).norm() < 0.12 * new.norm()
    assert module(gaussian(2, IN, name="x").bfloat16()).dtype == torch.bfloat16


@everywhere
def test_wrong_values_are_refused_before_anything_changes(name: str) -> None:
    module = MODULES[name][0]()
    bridge = find_bridge(module)
    W = bridge.read(module)
    for bad in (W.T.contiguous(), W[1:], W.long(), W * float("inf")):
        with pytest.raises(TargetError, match=bridge.name):
            bridge.write(module, bad)
    assert torch.equal(bridge.read(module), W)


@everywhere
def test_a_snapshot_is_a_copy(name: str) -> None:
    """Codes overwritten in place, as loading a state dict does, do not reach the snapshot."""
    module = MODULES[name][0]()
    bridge = find_bridge(module)
    W, saved = bridge.read(module), bridge.snapshot(module)
    weight = module.weight
    inner = weight.__tensor_flatten__()[0] if hasattr(weight, "__tensor_flatten__") else []
    held = [getattr(weight, n) for n in inner] or [weight.data, getattr(weight, "SCB", None), getattr(weight, "absmax", None)]
    with torch.no_grad():
        for part in (p for p in held if isinstance(p, Tensor)):
            part.zero_()
    assert not torch.equal(bridge.read(module), W)
    bridge.restore(module, saved)
    assert torch.equal(bridge.read(module), W)


def test_the_cached_codes_of_a_float_weight_are_dropped_in_eval() -> None:
    module = bnb8(floats=True).eval()
    module.weight.requires_grad_(False)  # the library has no CPU kernel for its gradient here
    bridge, saved = find_bridge(module), find_bridge(module).snapshot(module)
    with torch.no_grad():
        y = forward(module)
        stored = bridge.write(module, gaussian(OUT, IN, name="new"))
        assert torch.allclose(forward(module), expected(module, stored), atol=0.6)
        bridge.restore(module, saved)
        assert torch.equal(forward(module), y)


def test_bfloat16_int8_is_read_at_the_precision_it_is_stored() -> None:
    module = torchao("row", torch.bfloat16)
    weight = module.weight
    assert torch.equal(find_bridge(module).read(module), weight.qdata.float() * weight.scale)
    assert not torch.equal(weight.qdata.float() * weight.scale, weight.dequantize().float())


def test_affine_weights_are_written_affine() -> None:
    module = torchao("affine")
    new = gaussian(OUT, IN, name="new")
    new[:, :60] = new[:, :60].abs()
    stored = find_bridge(module).write(module, new * 3)
    assert (module.weight.zero_point != 0).float().mean() > 0.8
    assert torch.allclose(find_bridge(module).write(module, stored), stored, rtol=1e-4, atol=1e-4)


def test_the_stored_weight_is_read_where_a_property_hides_it() -> None:
    module = bnb4("nf4", False)
    W = find_bridge(module).read(module)
    module.__class__ = type("Reading", (type(module),), {"weight": property(lambda self: torch.ones(2))})
    assert torch.equal(find_bridge(module).read(module), W)


def test_a_snapshot_before_the_first_forward_is_restored_after_it() -> None:
    module = bnb8()
    bridge, W = find_bridge(module), find_bridge(module).read(module)
    saved = bridge.snapshot(module)
    y = forward(module)
    bridge.write(module, W * 2)
    bridge.restore(module, saved)
    assert module.weight.CB is None and torch.equal(bridge.read(module), W) and torch.equal(forward(module), y)


def test_torchs_own_quantised_linear_is_refused() -> None:
    model = torch.ao.quantization.quantize_dynamic(nn.Sequential(nn.Linear(4, 4)), dtype=torch.qint8)
    with pytest.raises(TargetError, match=r"torch\.ao"):
        find_bridge(model[0])


def test_a_class_made_on_the_fly_is_seen_through() -> None:
    module = bnb4("nf4", True)
    module.__class__ = type("Adapted", (type(module),), {"__module__": "rankwise.attach"})
    assert find_bridge(module).name == "bitsandbytes-4bit"


def test_not_yet_quantised_is_said() -> None:
    bnb = pytest.importorskip("bitsandbytes")
    for module in (bnb.nn.Linear4bit(IN, OUT), bnb.nn.Linear8bitLt(IN, OUT, has_fp16_weights=False)):
        with pytest.raises(TargetError, match=r"\.to\(device\)"):
            find_bridge(module).read(module)


class Halves(Tensor):
    """A subclass of a library nobody knows: stores twice the value, decodes by halving."""

    @staticmethod
    def __new__(cls, inner: Tensor) -> Halves:
        return torch.Tensor._make_wrapper_subclass(cls, inner.shape, dtype=inner.dtype)

    def __init__(self, inner: Tensor) -> None:
        self.inner = inner

    def __tensor_flatten__(self) -> tuple[list[str], None]:
        return ["inner"], None

    def dequantize(self) -> Tensor:
        return self.inner / 2

    @classmethod
    def __torch_dispatch__(cls, func: Callable, types: tuple, args: tuple = (), kwargs: dict | None = None) -> object:
        if func is torch.ops.aten.detach.default:
            return Halves(args[0].inner)
        raise NotImplementedError(str(func))


def test_any_dequantizing_subclass_is_read_but_not_written() -> None:
    module, inner = nn.Linear(IN, OUT), gaussian(OUT, IN)
    module.weight = nn.Parameter(Halves(inner.clone()), requires_grad=False)
    bridge = find_bridge(module)
    assert not bridge.writable and torch.equal(bridge.read(module), inner / 2)
    with pytest.raises(TargetError, match="Halves"):
        bridge.write(module, inner)
    saved = bridge.snapshot(module)
    module.weight.inner.zero_()
    bridge.restore(module, saved)
    assert torch.equal(bridge.read(module), inner / 2)


def foreign(package: str) -> nn.Module:
    module = type("FancyLinear", (nn.Module,), {"__module__": package})()
    module.register_buffer("packed", torch.zeros(4, dtype=torch.int32))
    return module


@pytest.mark.parametrize(
    "package",
    ["gptqmodel.nn_modules.qlinear.torch", "hqq.core.quantize", "awq.modules.linear", "bitsandbytes.nn.modules"],
)
def test_unknown_quantised_modules_are_refused_by_name(package: str) -> None:
    with pytest.raises(TargetError, match=f"{package}.FancyLinear"):
        find_bridge(foreign(package))
    assert is_quantised(foreign(package))


def test_unknown_storage_is_refused_by_dtype_or_name() -> None:
    for dtype in (torch.int8, torch.float8_e4m3fn, torch.uint8):
        module = nn.Linear(4, 4)
        module.weight = nn.Parameter(torch.zeros(4, 4).to(dtype), requires_grad=False)
        with pytest.raises(TargetError, match=str(dtype)):
            find_bridge(module)
    module = foreign("elsewhere")
    assert find_bridge(module) is None
    module.register_buffer("qweight", torch.zeros(2, dtype=torch.int32))
    with pytest.raises(TargetError, match="qweight"):
        find_bridge(module)


def test_float_modules_and_containers_have_no_bridge() -> None:
    floats = [nn.Linear(4, 4), nn.Linear(4, 4).bfloat16(), nn.Linear(4, 4, device="meta"), nn.Embedding(3, 4)]
    for module in (
        *floats,
        nn.Conv2d(2, 2, 3),
        nn.LayerNorm(4),
        nn.BatchNorm1d(3),
        nn.Dropout(),
        nn.Sequential(bnb8()),
    ):
        assert find_bridge(module) is None and not is_quantised(module)


def test_detection_imports_no_library() -> None:
    code = (
        "import sys, torch, rankwise.catalogue as c; from rankwise.codecs.library import find_bridge;"
        "find_bridge(torch.nn.Linear(2, 2)); c.methods('codec');"
        "assert not {'bitsandbytes', 'torchao', 'transformers'} & set(sys.modules), 'heavy import'"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)
