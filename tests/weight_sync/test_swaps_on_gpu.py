"""Sessions on a GPU: a side stream, a sender that uses its buffer again, faults, memory."""

from __future__ import annotations

import gc

import pytest
import torch

from rollmill.moe import MoeConfig, RoutedExperts
from rollmill.quant import BF16, QuantLinear, UnsupportedError, find_capability, make_scheme, plain_slot
from rollmill.weight_sync import NonFiniteError, Policy, StagingMemoryError, SyncPlan, TransportError

pytestmark = pytest.mark.gpu

MOE = MoeConfig(num_experts=8, top_k=2, hidden_size=256, intermediate_size=256)
LAYERS = 3
QKV = {"q_proj": 256, "k_proj": 64, "v_proj": 64}


@pytest.fixture(params=["bf16", "fp8_channel", "nvfp4_w4a16"])
def scheme(request):
    return make_scheme(request.param)


@pytest.fixture(params=["staged", "host", "streamed"])
def mode(request):
    return request.param


@pytest.fixture(autouse=True)
def _needs_a_gpu():
    try:
        find_capability("cuda")
    except UnsupportedError as error:
        pytest.skip(str(error))


@pytest.fixture
def without_collector():
    """What other tests left is gone, and a swap's memory does not wait for the garbage collector."""
    gc.collect()
    gc.disable()
    yield
    gc.enable()


def make_policy(scheme, mode="staged", device="cuda"):
    common = {"capability": find_capability(device), "dtype": torch.bfloat16}
    slots = [plain_slot(["norm"], [256], None, BF16, common["capability"], torch.bfloat16)]
    for layer in range(LAYERS):
        names = [f"{layer}.{name}" for name in QKV]
        slots += QuantLinear(names, list(QKV.values()), 256, scheme, fused=f"{layer}.qkv_proj", **common).slots
        slots += RoutedExperts(f"{layer}.experts", ("gate_proj", "up_proj", "down_proj"), MOE, scheme, **common).slots
    return Policy(SyncPlan(slots), mode)


def make_weights(seed, form="stacked"):
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return (torch.randn(shape, generator=generator) * 0.05).bfloat16()

    weights = {"norm.weight": normal(256)}
    for layer in range(LAYERS):
        weights |= {f"{layer}.{name}.weight": normal(rows, 256) for name, rows in QKV.items()}
        gate_up, down = normal(8, 512, 256), normal(8, 256, 256)
        if form == "stacked":
            weights |= {f"{layer}.experts.gate_up_proj": gate_up, f"{layer}.experts.down_proj": down}
            continue
        gate, up = gate_up.chunk(2, dim=1)
        parts = {"gate_proj": gate, "up_proj": up, "down_proj": down}
        weights |= {f"{layer}.experts.{e}.{name}.weight": w[e] for e in range(8) for name, w in parts.items()}
    return weights


def buckets(weights, size):
    """Views of one buffer on the GPU, which holds bucket after bucket, and NaN in between."""
    pairs = list(weights.items())
    groups = [pairs[start : start + size] for start in range(0, len(pairs), size)]
    buffer = torch.empty(max(sum(w.numel() for _, w in group) for group in groups), device="cuda").bfloat16()
    for group in groups:
        bucket, start = [], 0
        for name, weight in group:
            view = buffer[start : start + weight.numel()].view(weight.shape)
            view.copy_(weight)
            bucket.append((name, view))
            start += weight.numel()
        yield bucket
        buffer.fill_(float("nan"))


def swap(policy, weights, version, size=4):
    with policy.begin(version) as session:
        for bucket in buckets(weights, size):
            session.load(bucket)


def bytes_of(policy):
    return [t.cpu().view(-1).view(torch.uint8) for slot in policy.plan.slots for t in slot.tensors.values()]


def same(left, right):
    return all(torch.equal(a, b) for a, b in zip(left, right, strict=True))


@pytest.mark.parametrize("form", ["stacked", "apart"])
@pytest.mark.parametrize("size", [1, 7], ids=["bucket1", "bucket7"])
def test_one_buffer_used_again_gives_the_cpus_digest(scheme, mode, form, size):
    policy, cpu = make_policy(scheme, mode), make_policy(scheme, device="cpu")
    for seed in (1, 2, 3):
        swap(policy, make_weights(seed, form), str(seed), size)
        cpu.update(make_weights(seed), str(seed))
        assert policy.digest() == cpu.digest()
    cold = make_policy(scheme)
    cold.update({name: w.cuda() for name, w in make_weights(3).items()}, "3")
    assert same(bytes_of(policy), bytes_of(cold))


@pytest.mark.parametrize("form", ["stacked", "apart"])
def test_tensor_by_tensor_out_of_one_buffer(scheme, mode, form):
    policy, cpu = make_policy(scheme, mode), make_policy(scheme, device="cpu")
    for seed in (1, 2):
        policy.update((pair for bucket in buckets(make_weights(seed, form), 1) for pair in bucket), str(seed))
    cpu.update(make_weights(2), "2")
    assert policy.digest() == cpu.digest()


@pytest.mark.parametrize("mode", ["staged", "host"])
@pytest.mark.parametrize("form", ["stacked", "apart"])
def test_the_sender_fails_at_each_tenth(scheme, mode, form):
    policy, weights = make_policy(scheme, mode), make_weights(2, form)
    swap(policy, make_weights(1, form), "1")
    served, digest = bytes_of(policy), policy.digest()
    for tenth in range(10):

        def dying(tenth=tenth):
            for count, bucket in enumerate(buckets(weights, 1)):
                if count == len(weights) * tenth // 10:
                    raise ConnectionResetError("the trainer is gone")
                yield from bucket

        with pytest.raises(TransportError):
            policy.update(dying(), "2")
        assert (policy.version, policy.digest(), policy.open_version) == ("1", digest, None)
        assert same(bytes_of(policy), served)
        policy.check_servable()
    swap(policy, weights, "2")
    assert policy.version == "2"
    assert not same(bytes_of(policy), served)


@pytest.mark.parametrize("mode", ["staged", "host"])
@pytest.mark.parametrize("name", ["norm.weight", "1.k_proj.weight", "2.experts.down_proj"])
def test_what_is_not_finite_is_named_and_never_committed(scheme, mode, name):
    policy = make_policy(scheme, mode)
    swap(policy, make_weights(1), "1")
    served = bytes_of(policy)
    for value in (float("nan"), float("inf")):
        broken = make_weights(2)
        broken[name].flatten()[-3] = value
        with pytest.raises(NonFiniteError, match=name):
            swap(policy, broken, "2")
        assert policy.version == "1"
        assert same(bytes_of(policy), served)


def test_a_sender_does_not_wait_for_what_was_copied(scheme):
    """With the side stream held up, what arrives one by one is taken, and the caller's stream goes on."""
    policy = make_policy(scheme)
    weights = {name: w.cuda() for name, w in make_weights(1, "apart").items()}
    with policy.begin("1") as session:  # compiles what comes on first use
        session.load(weights)
    torch.cuda.synchronize()
    session = policy.begin("2")
    with torch.cuda.stream(policy.side.stream):
        torch.cuda._sleep(4_000_000_000)
    session.load(weights)
    torch.cuda.default_stream().synchronize()
    assert not policy.side.stream.query(), "the caller's stream waited for the side stream"
    session.commit()
    assert policy.version == "2"


def test_a_session_from_another_stream(scheme, mode):
    policy, other = make_policy(scheme, mode), torch.cuda.Stream()
    swap(policy, make_weights(1), "1")
    with torch.cuda.stream(other):
        swap(policy, make_weights(2), "2")
    cpu = make_policy(scheme, device="cpu")
    cpu.update(make_weights(2), "2")
    assert policy.digest() == cpu.digest()
    cold = make_policy(scheme)
    cold.update(make_weights(2), "2")
    assert same(bytes_of(policy), bytes_of(cold))


def test_memory_is_flat(scheme, mode, without_collector):
    policy, used = make_policy(scheme, mode), []
    for turn in range(12):
        swap(policy, make_weights(turn % 2, ("stacked", "apart")[turn // 2 % 2]), str(turn))
        torch.cuda.synchronize()
        used.append(torch.cuda.memory_allocated())
    assert len(set(used[4:])) == 1


def test_memory_that_runs_out_while_staging_says_what_would_fit():
    policy = make_policy(make_scheme("fp8_channel"))
    swap(policy, make_weights(1), "1")
    served, total = bytes_of(policy), torch.cuda.get_device_properties(0).total_memory
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    try:
        torch.cuda.set_per_process_memory_fraction((torch.cuda.memory_reserved() + 1) / total)
        with pytest.raises(StagingMemoryError, match=r"what fits: swap='host'.*'streamed'") as error:
            policy.update(make_weights(2), "2")
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    assert "GiB are free" in str(error.value)
    assert policy.version == "1"
    assert same(bytes_of(policy), served)
    policy.check_servable()
    policy.update(make_weights(2), "2")
    assert policy.version == "2"


def test_sleep_and_wake_in_every_mode(scheme, mode):
    policy = make_policy(scheme, mode)
    swap(policy, make_weights(1), "1")
    served = bytes_of(policy)
    before = torch.cuda.memory_allocated()
    policy.sleep()
    assert torch.cuda.memory_allocated() < before
    policy.wake()
    swap(policy, make_weights(1), "2")
    assert same(bytes_of(policy), served)
