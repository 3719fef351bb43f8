"""Units of a stack wait for each other, so that few calls quantize and pack them; nothing else changes by it."""

from __future__ import annotations

import random

import pytest
import torch

from rollmill.moe import MoeConfig, RoutedExperts
from rollmill.quant import BF16, FP8, NVFP4, JoinedLayout, UnsupportedError, find_capability, make_scheme
from rollmill.quant.kernels.exact import ExactKernel
from rollmill.weight_sync import CoverageError, NonFiniteError, Policy, SyncPlan
from rollmill.weight_sync.clock import Clock
from rollmill.weight_sync.pending import Backlog
from rollmill.weight_sync.staging import SlotStaging

EIGHT = MoeConfig(num_experts=8, top_k=2, hidden_size=64, intermediate_size=32)
UNIT = {"w13": 2 * 64 * 64, "w2": 2 * 64 * 32}  # BF16 bytes of an expert
EVERYTHING = 1 << 20


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request):
    try:
        find_capability(request.param)
    except UnsupportedError as error:
        pytest.skip(str(error))
    return request.param


def make_policy(scheme, mode="staged", backlog=EVERYTHING, joined=None, master=None, device="cpu"):
    experts = RoutedExperts(
        "experts",
        ("gate", "up", "down"),
        EIGHT,
        scheme,
        capability=find_capability(device),
        dtype=torch.bfloat16,
        joined=joined,
    )
    policy = Policy(SyncPlan(experts.slots), mode, master)
    policy.backlog = backlog
    return policy


def stacked_weights(seed):
    generator = torch.Generator().manual_seed(seed)
    shapes = {"experts.gate_up_proj": (8, 64, 64), "experts.down_proj": (8, 64, 32)}
    return {name: (torch.randn(shape, generator=generator) * 0.05).bfloat16() for name, shape in shapes.items()}


def apart(weights):
    """One tensor an expert and projection, as checkpoints have them."""
    gate, up = weights["experts.gate_up_proj"].chunk(2, dim=1)
    named = {"gate": gate, "up": up, "down": weights["experts.down_proj"]}
    return {f"experts.{e}.{name}.weight": w[e] for e in range(8) for name, w in named.items()}


def shuffled(weights, seed=3):
    names = list(weights)
    random.Random(seed).shuffle(names)
    return {name: weights[name] for name in names}


def bytes_of(policy):
    return [t.cpu().view(torch.uint8).numpy().tobytes() for slot in policy.plan.slots for t in slot.tensors.values()]


@pytest.fixture
def calls(monkeypatch):
    """How many units every call of the quantizer and of the packer was given."""
    counted = {"quantize": [], "prepare": []}
    for scheme in (NVFP4, FP8):

        def quantize(self, weight, shape, original=scheme.quantize):
            counted["quantize"].append(len(weight))
            return original(self, weight, shape)

        monkeypatch.setattr(scheme, "quantize", quantize)
    original = ExactKernel.prepare

    def prepare(self, matrices):
        counted["prepare"].append(len(matrices["weight"]))
        return original(self, matrices)

    monkeypatch.setattr(ExactKernel, "prepare", prepare)
    return counted


@pytest.mark.parametrize("name", ["nvfp4", "fp8", "fp8_channel"])
@pytest.mark.parametrize("form", ["stacked", "apart"])
def test_a_stack_is_quantized_and_packed_in_one_call(name, form, calls):
    weights = stacked_weights(1)
    make_policy(make_scheme(name)).update(weights if form == "stacked" else apart(weights), "1")
    assert calls == {"quantize": [8, 8], "prepare": [8, 8]}


@pytest.mark.parametrize(
    ("units", "runs"), [(0, [1] * 8), (1, [1] * 8), (3, [3, 3, 2]), (7, [4, 4]), (8, [8])], ids=str
)
@pytest.mark.parametrize("form", ["stacked", "apart"])
def test_runs_are_as_long_as_the_backlog_allows(form, units, runs, calls):
    policy = make_policy(NVFP4(), backlog=units * UNIT["w13"])
    weights = {"experts.gate_up_proj": stacked_weights(1)["experts.gate_up_proj"]}
    if form == "apart":
        weights = {n: w for n, w in apart(stacked_weights(1)).items() if "down" not in n}
    with policy.begin("1") as session:
        session.load(weights)
        assert calls["quantize"] == runs
        session.load({"experts.down_proj": stacked_weights(1)["experts.down_proj"]})


@pytest.mark.parametrize("backlog", [3 * UNIT["w2"], 3 * UNIT["w13"], EVERYTHING], ids=str)
@pytest.mark.parametrize("mode", ["staged", "streamed"])
@pytest.mark.parametrize("form", ["apart", "shuffled", "reversed", "stacked"])
def test_the_same_bytes_and_digests_as_one_by_one(scheme, form, mode, backlog, snapshot):
    expected, policy = make_policy(scheme, backlog=0), make_policy(scheme, mode, backlog)
    scales = {}
    if scheme.activation == "static":
        scales = {name.replace("weight", "input_scale"): torch.tensor(0.01) for name in apart(stacked_weights(1))}
    for seed in (1, 2):
        weights = stacked_weights(seed)
        sent = {
            "stacked": weights,
            "apart": apart(weights),
            "shuffled": shuffled(apart(weights)),
            "reversed": dict(reversed(apart(weights).items())),
        }[form]
        expected.update({**apart(weights), **scales}, str(seed))
        with policy.begin(str(seed)) as session:
            for name, weight in {**sent, **scales}.items():
                buffer = weight.clone()
                session.load([(name, buffer)])
                buffer.fill_(float("nan"))  # the sender's, who uses it again
        assert policy.digest() == expected.digest()
        assert policy.digest_of(sent) == expected.digest()
    assert snapshot(policy) == snapshot(expected)


@pytest.mark.parametrize("form", ["apart", "stacked"])
def test_a_bucket_that_is_made_as_it_is_read_may_use_one_buffer(form, device, snapshot):
    """Each tensor takes the memory of the one before, while the bucket is being loaded."""
    policy, weights = make_policy(NVFP4(), device=device), stacked_weights(1)
    sent = apart(weights) if form == "apart" else weights
    buffer = torch.empty(max(w.numel() for w in sent.values()), dtype=torch.bfloat16, device=device)

    def lazily():
        for name, weight in sent.items():
            view = buffer[: weight.numel()].view(weight.shape)
            view.copy_(weight)
            yield name, view
            buffer.fill_(float("nan"))

    with policy.begin("1") as session:
        session.load(lazily())
    expected = make_policy(NVFP4())
    expected.update(weights, "1")
    assert policy.digest() == expected.digest()


@pytest.mark.parametrize("name", ["bf16", "fp8", "fp8_channel", "nvfp4"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("transposed", [False, True], ids=["rows", "transposed"])
@pytest.mark.parametrize("interleaved", [False, True], ids=["apart", "interleaved"])
def test_stacks_in_other_layouts_and_dtypes(name, dtype, transposed, interleaved, snapshot):
    scheme, sent = make_scheme(name), {name: w.to(dtype) for name, w in stacked_weights(1).items()}
    weights = {name: w.bfloat16() for name, w in sent.items()}  # float16 has no room for the smallest
    if interleaved:
        gate, up = sent["experts.gate_up_proj"].chunk(2, dim=1)
        sent["experts.gate_up_proj"] = torch.stack([gate, up], dim=2).flatten(1, 2)
    if transposed:
        sent = {name: w.mT.contiguous() for name, w in sent.items()}
    policy = make_policy(scheme, joined=JoinedLayout(transposed=transposed, interleaved=interleaved))
    expected = make_policy(scheme, backlog=0)
    policy.update(sent, "1")
    expected.update(apart(weights), "1")
    assert snapshot(policy) == snapshot(expected)


def test_the_senders_stack_is_neither_kept_nor_changed(snapshot):
    policy, expected = (make_policy(BF16, backlog=b, master="host") for b in (EVERYTHING, 0))
    weights = stacked_weights(1)
    sent = {name: w.clone() for name, w in weights.items()}
    with policy.begin("1") as session:
        session.load(sent)
        assert all(torch.equal(sent[name], w) for name, w in weights.items())
        for tensor in sent.values():
            tensor.fill_(7.0)
    expected.update(apart(weights), "1")
    assert snapshot(policy) == snapshot(expected)
    for slot, other in zip(policy.plan.slots, expected.plan.slots, strict=True):
        for ours, theirs in zip(policy.master.weights[slot], expected.master.weights[other], strict=True):
            assert torch.equal(ours, theirs)


@pytest.mark.parametrize("limit", [0, 2 * UNIT["w13"], 5 * UNIT["w13"]], ids=str)
def test_what_waits_stays_within_the_limit(limit):
    backlog, policy = Backlog(limit), make_policy(NVFP4())
    stagings = {slot: SlotStaging(slot, Clock(), backlog) for slot in policy.plan.slots}
    for name, weight in shuffled(apart(stacked_weights(1))).items():
        target = policy.plan.resolve(name)
        assert stagings[target.slot].receive(name, target.tensor, target.unit, target.shard, weight)
        runs = {id(run): run for staging in stagings.values() for run in staging.runs.values()}.values()
        waiting = sum(t.nbytes for run in runs if run.count > 1 for t in run.matrices.values())
        assert waiting == limit - backlog.left <= limit
    assert backlog.left == limit
    assert not any(staging.missing() for staging in stagings.values())


@pytest.mark.parametrize("name", ["bf16", "fp8", "fp8_channel", "nvfp4"])
@pytest.mark.parametrize("form", ["apart", "stacked"])
def test_a_gpu_gives_the_cpus_digests(name, form, device):
    policies = [make_policy(make_scheme(name), device=place) for place in (device, "cpu")]
    for policy in policies:
        weights = stacked_weights(1)
        policy.update(weights if form == "stacked" else shuffled(apart(weights)), "1")
    assert policies[0].digest() == policies[1].digest()


@pytest.mark.parametrize("value", [float("nan"), float("inf")], ids=str)
@pytest.mark.parametrize("form", ["apart", "stacked"])
@pytest.mark.parametrize("scheme", ["bf16", "fp8", "fp8_channel", "nvfp4"])
def test_what_is_not_finite_is_named(scheme, form, value, device):
    policy = make_policy(make_scheme(scheme), device=device)
    policy.update(stacked_weights(1), "1")
    served, digest = bytes_of(policy), policy.digest()
    broken = stacked_weights(2)
    broken["experts.gate_up_proj"][5, 40, 3] = value
    name = "experts.gate_up_proj" if form == "stacked" else "experts.5.up.weight"
    with pytest.raises(NonFiniteError, match=name):
        policy.update(broken if form == "stacked" else apart(broken), "2")
    assert (bytes_of(policy), policy.digest(), policy.version) == (served, digest, "1")


def test_what_is_not_finite_is_named_though_its_neighbours_are_missing():
    policy = make_policy(NVFP4())
    policy.update(stacked_weights(1), "1")
    with pytest.raises(NonFiniteError, match=r"experts\.3\.gate\.weight"):
        policy.update({"experts.3.gate.weight": torch.full((32, 64), float("inf"))}, "2")
    with pytest.raises(CoverageError) as error:
        policy.update({n: w for n, w in apart(stacked_weights(2)).items() if "experts.3.up" not in n}, "2")
    assert error.value.missing == ("experts.3.up.weight",)
    assert policy.version == "1"


@pytest.mark.parametrize("form", ["apart", "stacked"])
@pytest.mark.parametrize("first", ["apart", "stacked"])
def test_a_stack_that_comes_twice_is_a_double(first, form):
    policy, weights = make_policy(NVFP4()), stacked_weights(1)
    both = {"apart": list(apart(weights).items()), "stacked": list(weights.items())}
    with pytest.raises(CoverageError, match="duplicate"):
        policy.update(both[first] + both[form][:1], "1")


@pytest.mark.parametrize("served", ["nvfp4", "bf16"])
def test_quantized_experts_among_others(served, snapshot):
    """Two experts come as ModelOpt stores them, one of them where its neighbours have begun to wait in BF16."""
    weights, scheme = apart(stacked_weights(1)), NVFP4()
    sent = dict(weights)
    for expert in (0, 5):
        for shard in ("gate", "up", "down"):
            name = f"experts.{expert}.{shard}"
            shape = make_policy(scheme).plan.resolve(f"{name}.weight").slot.shape.unit
            rows = weights[f"experts.{expert}.down.weight"]
            if shard != "down":
                rows = torch.cat([weights[f"experts.{expert}.{s}.weight"] for s in ("gate", "up")])
            stored = scheme.quantize(rows, shape)
            part = slice(32, 64) if shard == "up" else slice(0, 32 if shard == "gate" else 64)
            sent[f"{name}.weight"] = stored["weight"][part]
            sent[f"{name}.weight_scale"] = stored["weight_scale"][part]
            sent[f"{name}.weight_scale_2"] = stored["weight_scale_2"][0]
    policies = [make_policy(make_scheme(served), backlog=backlog) for backlog in (EVERYTHING, 0)]
    for policy in policies:
        policy.update(sent, "1")
    assert snapshot(policies[0]) == snapshot(policies[1])
    assert policies[0].digest() == policies[1].digest()
    if served == "nvfp4":
        expected = make_policy(scheme)
        expected.update(weights, "1")
        assert snapshot(policies[0]) == snapshot(expected)
