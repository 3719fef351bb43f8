"""Whatever goes wrong in a swap: bytes, version and digest stay, and the error names the tensor."""

from __future__ import annotations

import subprocess
import sys
from contextlib import suppress
from textwrap import dedent

import pytest
import torch

from rollmill.quant import NVFP4, ConfigError, ModelError, RollmillError, UnsupportedError, make_scheme
from rollmill.weight_sync import (
    CoverageError,
    NonFiniteError,
    PoisonedError,
    SessionBusyError,
    SessionClosedError,
    ShapeError,
    StaleVersionError,
    TransportError,
)

NVFP4_TOKEN = NVFP4()


@pytest.fixture(params=["staged", "host"])
def load(request, cold_load):
    """A cold load into a policy that swaps all or nothing."""
    return lambda scheme, weights: cold_load(scheme, weights, request.param)


@pytest.fixture
def unchanged(snapshot):
    """Checks that a policy serves what it served when this was made."""

    def watch(policy):
        served, version, digest = snapshot(policy), policy.version, policy.digest()

        def check():
            assert snapshot(policy) == served
            assert (policy.version, policy.digest(), policy.open_version) == (version, digest, None)
            policy.check_servable()

        return check

    return watch


def without(weights, *names):
    return {name: w for name, w in weights.items() if name not in names}


@pytest.mark.parametrize(
    "name", ["k_proj.weight", "experts.2.up_proj.weight", "experts.0.down_proj.weight", "v_proj.bias"]
)
def test_a_missing_tensor_of_a_touched_layer(scheme, name, load, unchanged, weights_a, weights_b):
    policy = load(scheme, weights_a)
    check = unchanged(policy)
    with pytest.raises(CoverageError, match=name.replace(".", r"\.")) as error:
        policy.update(without(weights_b, name), "1")
    assert error.value.missing == (name,)
    check()


def test_unknown_names_are_listed(scheme, load, unchanged, weights_a, weights_b):
    policy = load(scheme, weights_a)
    check = unchanged(policy)
    with pytest.raises(CoverageError, match="ghost") as error:
        policy.update({"ghost.weight": torch.ones(3), **weights_b, "other.bias": torch.ones(1)}, "1")
    assert error.value.unexpected == ("ghost.weight", "other.bias")
    check()


@pytest.mark.parametrize("name", ["norm.weight", "q_proj.weight", "experts.1.gate_proj.weight"])
def test_a_doubled_tensor(scheme, name, load, unchanged, weights_a, weights_b):
    policy = load(scheme, weights_a)
    check = unchanged(policy)
    with pytest.raises(CoverageError, match="duplicate") as error:
        policy.update([*weights_b.items(), (name, weights_b[name])], "1")
    assert error.value.duplicate == (name,)
    check()


def test_split_and_joined_forms_of_one_weight_are_a_double(load, unchanged, joined, weights_a, weights_b):
    policy = load(NVFP4_TOKEN, weights_a)
    check = unchanged(policy)
    both = {**weights_b, "experts.gate_up_proj": joined(weights_b)["experts.gate_up_proj"]}
    with pytest.raises(CoverageError, match="duplicate"):
        policy.update(both, "1")
    check()


@pytest.mark.parametrize(
    ("name", "shape"),
    [
        ("q_proj.weight", (96, 63)),
        ("q_proj.weight", (95, 64)),
        ("experts.3.down_proj.weight", (48, 64)),
        ("norm.weight", (65,)),
        ("experts.gate_up_proj", (5, 96, 64)),
        ("experts.gate_up_proj", (4, 95, 64)),
        ("qkv_proj.weight", (159, 64)),
    ],
    ids=str,
)
def test_a_misshaped_tensor(scheme, name, shape, load, unchanged, weights_a, weights_b):
    policy = load(scheme, weights_a)
    check = unchanged(policy)
    with pytest.raises(ShapeError, match=name.replace(".", r"\.")):
        policy.update({**weights_b, name: torch.zeros(shape)} if name in weights_b else {name: torch.zeros(shape)}, "1")
    check()


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")], ids=str)
@pytest.mark.parametrize("name", ["norm.weight", "v_proj.weight", "experts.2.up_proj.weight", "q_proj.bias"])
def test_a_non_finite_tensor(scheme, name, value, load, unchanged, weights_a, weights_b):
    policy = load(scheme, weights_a)
    check = unchanged(policy)
    broken = weights_b[name].clone()
    broken.flatten()[-1] = value
    with pytest.raises(NonFiniteError, match=name.replace(".", r"\.")):
        policy.update({**weights_b, name: broken}, "1")
    check()


@pytest.mark.parametrize("tensor", ["weight_scale", "weight_scale_2", "input_scale"])
def test_a_non_finite_scale(tensor, load, unchanged, weights_a):
    policy = load(NVFP4("static"), weights_a)
    check = unchanged(policy)
    value = torch.tensor(float("nan"))
    if tensor == "weight_scale":
        value = torch.full((1000, 65), 0x7F, dtype=torch.uint8).view(torch.float8_e4m3fn)
    with pytest.raises(NonFiniteError, match=f"odd_proj.{tensor}"):
        policy.update({f"odd_proj.{tensor}": value}, "1")
    check()


@pytest.mark.parametrize("missing", ["weight_scale", "weight_scale_2"])
def test_a_missing_weight_scale_is_named(missing, load, unchanged, weights_a):
    policy = load(NVFP4_TOKEN, weights_a)
    check = unchanged(policy)
    stored = {
        "odd_proj.weight": torch.zeros(1000, 520, dtype=torch.uint8),
        "odd_proj.weight_scale": torch.ones(1000, 65).to(torch.float8_e4m3fn),
        "odd_proj.weight_scale_2": torch.tensor(1.0),
    }
    with pytest.raises(CoverageError) as error:
        policy.update(without(stored, f"odd_proj.{missing}"), "1")
    assert error.value.missing == (f"odd_proj.{missing}",)
    check()


def test_another_format_is_refused(load, unchanged, weights_a):
    policy = load(NVFP4_TOKEN, weights_a)
    check = unchanged(policy)
    with pytest.raises(UnsupportedError, match="odd_proj.weight is stored in fp8"):
        policy.update({"odd_proj.weight": torch.zeros(1000, 1040, dtype=torch.float8_e4m3fn)}, "1")
    check()


def test_one_weight_in_two_formats_is_refused(load, unchanged, weights_a, weights_b):
    policy = load(NVFP4_TOKEN, weights_a)
    check = unchanged(policy)
    mixed = {"q_proj.weight": weights_b["q_proj.weight"], "k_proj.weight": torch.zeros(32, 32, dtype=torch.uint8)}
    with pytest.raises(ShapeError, match="k_proj.weight"):
        policy.update(mixed, "1")
    check()


def test_integers_are_no_weights(load, unchanged, weights_a):
    policy = load(NVFP4_TOKEN, weights_a)
    check = unchanged(policy)
    with pytest.raises(ShapeError, match=r"norm\.weight: torch\.int64"):
        policy.update({"norm.weight": torch.ones(64, dtype=torch.int64)}, "1")
    check()


def send_all(policy, source):
    with policy.begin("1") as session:
        for bucket in source:
            session.load(bucket)


@pytest.mark.parametrize("mode", ["bucket", "iterator"])
def test_the_source_dies_at_each_bucket(mode, load, unchanged, buckets, weights_a, weights_b):
    policy = load(NVFP4_TOKEN, weights_a)
    check = unchanged(policy)
    count = len(list(buckets(weights_b, 2)))
    for deadly in range(count):

        def dying(deadly=deadly):
            for index, bucket in enumerate(buckets(weights_b, 2)):
                if index == deadly:
                    raise ConnectionResetError("the trainer is gone")
                yield bucket

        if mode == "bucket":
            with pytest.raises(ConnectionResetError):
                send_all(policy, dying())
        else:
            with pytest.raises(TransportError, match="last tensor received") as error:
                policy.update((pair for bucket in dying() for pair in bucket), "1")
            if deadly:
                assert list(weights_b)[2 * deadly - 1] in str(error.value)
        check()


def test_the_sender_overwrites_its_buffer_after_hand_over(scheme, cold_load, snapshot, weights_a, weights_b):
    policy, sent = cold_load(scheme, weights_a), {name: w.clone() for name, w in weights_b.items()}
    with policy.begin("1") as session:
        session.load(sent.items())
        for tensor in sent.values():
            tensor.fill_(float("inf"))
    assert snapshot(policy) == snapshot(cold_load(scheme, weights_b))


def test_a_failed_session_is_closed(cold_load, weights_a, weights_b):
    policy = cold_load(NVFP4_TOKEN, weights_a)
    session = policy.begin("1")
    with pytest.raises(ShapeError):
        session.load([("norm.weight", torch.ones(3))])
    with pytest.raises(SessionClosedError):
        session.load([("norm.weight", weights_b["norm.weight"])])
    with pytest.raises(SessionClosedError):
        session.commit()
    policy.update(weights_b, "1")
    assert policy.version == "1"


@pytest.mark.parametrize(
    "item", [("norm.weight", [1.0]), "norm.weight", ("norm.weight",), (1, torch.ones(1)), 7], ids=repr
)
def test_pairs_are_checked(item, load, unchanged, weights_a):
    policy = load(NVFP4_TOKEN, weights_a)
    check = unchanged(policy)
    with pytest.raises(ShapeError, match="pairs"):
        policy.update([item], "1")
    check()


def test_a_bucket_may_be_a_dict(cold_load, snapshot, weights_a, weights_b):
    policy = cold_load(NVFP4_TOKEN, weights_a)
    with policy.begin("1") as session:
        session.load(weights_b)
    assert snapshot(policy) == snapshot(cold_load(NVFP4_TOKEN, weights_b))


def test_one_session_at_a_time(cold_load, weights_a):
    policy = cold_load(NVFP4_TOKEN, weights_a)
    with policy.begin("1"), pytest.raises(SessionBusyError, match="'1'"):
        policy.begin("2")
    policy.begin("2").abort()
    assert policy.version == "1"


@pytest.mark.parametrize("mode", ["staged", "host", "streamed"])
def test_an_equal_version(mode, cold_load, unchanged, weights_a, weights_b):
    policy = cold_load(NVFP4_TOKEN, weights_a, mode=mode)
    policy.update(weights_b, "17")
    check = unchanged(policy)
    report = policy.update(dict(reversed(weights_b.items())), "17")
    assert report.status == "unchanged"
    check()
    with pytest.raises(StaleVersionError, match="'17'"):
        policy.update(weights_a, "17")
    check()


def test_versions_count_up_when_unnamed(cold_load, weights_a):
    policy = cold_load(NVFP4_TOKEN, weights_a)
    policy.update(weights_a, "41")
    assert policy.update(weights_a, None).version == "42"


@pytest.mark.parametrize("fault", ["missing", "dies", "nan", "unknown"])
def test_a_failed_streamed_swap_poisons_until_a_full_one(fault, cold_load, snapshot, weights_a, weights_b):
    policy = cold_load(NVFP4_TOKEN, weights_a, mode="streamed")
    broken = {
        "missing": without(weights_b, "experts.3.down_proj.weight"),
        "nan": {**weights_b, "experts.3.down_proj.weight": torch.full((64, 48), float("nan"))},
        "unknown": {**weights_b, "ghost": torch.ones(1)},
        "dies": weights_b,
    }[fault]

    def source():
        for index, pair in enumerate(broken.items()):
            if fault == "dies" and index == 5:
                raise OSError("gone")
            yield pair

    with pytest.raises(RollmillError):
        policy.update(source(), "1")
    assert policy.version is None
    with pytest.raises(PoisonedError, match="failed half-way"):
        policy.check_servable()
    with pytest.raises(CoverageError):  # a part cannot cure it
        policy.update({"norm.weight": weights_b["norm.weight"]}, "2")
    with pytest.raises(PoisonedError):
        policy.check_servable()
    policy.update(weights_b, "3")
    policy.check_servable()
    assert policy.version == "3"
    assert snapshot(policy) == snapshot(cold_load(NVFP4_TOKEN, weights_b))


def test_a_streamed_swap_is_not_served_before_it_ends(cold_load, weights_a, weights_b):
    policy = cold_load(NVFP4_TOKEN, weights_a, mode="streamed")
    with policy.begin("1") as session:
        policy.check_servable()  # nothing has been written yet
        session.load(list(weights_b.items())[:1])
        with pytest.raises(PoisonedError, match="has not finished"):
            policy.check_servable()
        session.load(list(weights_b.items())[1:])
    policy.check_servable()


def test_a_tied_tensor_must_equal_its_twin(load, unchanged, weights_a, weights_b):
    policy = load(make_scheme("bf16"), weights_a)
    policy.plan.tied["twin.weight"] = "norm.weight"
    policy.update({"twin.weight": weights_b["norm.weight"], "norm.weight": weights_b["norm.weight"]}, "1")
    check = unchanged(policy)
    with pytest.raises(ModelError, match="twin.weight is tied to norm.weight"):
        policy.update({"twin.weight": weights_a["norm.weight"], "norm.weight": weights_b["norm.weight"]}, "2")
    check()


def test_a_vector_has_no_quantized_form(load, unchanged, weights_a, weights_b):
    """An FP8 norm once went through, was dequantized to a matrix, and tore the commit."""
    policy = load(NVFP4_TOKEN, weights_a)
    check = unchanged(policy)
    norm = {"norm.weight": torch.zeros(64, dtype=torch.float8_e4m3fn), "norm.weight_scale": torch.tensor(1.0)}
    with pytest.raises(UnsupportedError, match="norm.weight: a vector has no fp8 form"):
        policy.update({**weights_b, **norm}, "1")
    check()


@pytest.mark.parametrize("mode", ["staged", "streamed"])
def test_an_interrupted_commit_serves_nothing_until_a_full_swap(
    mode, cold_load, snapshot, weights_a, weights_b, monkeypatch
):
    """Ctrl-C among the copies of a commit: a mixture of two versions must not answer."""
    policy = cold_load(NVFP4_TOKEN, weights_a, mode=mode)
    last, commit = policy.plan.slots[-1], type(policy.plan.slots[-1]).commit

    def interrupted(slot, *staged):
        if slot is last:
            raise KeyboardInterrupt
        commit(slot, *staged)

    with monkeypatch.context() as patched:
        patched.setattr(type(last), "commit", interrupted)
        with pytest.raises(KeyboardInterrupt):
            policy.update(weights_b, "1")
    assert (policy.version, policy.open_version) == (None, None)
    with pytest.raises(PoisonedError):
        policy.check_servable()
    policy.update(weights_b, "1")
    policy.check_servable()
    assert snapshot(policy) == snapshot(cold_load(NVFP4_TOKEN, weights_b))


def test_a_partial_streamed_session_is_safe(cold_load, weights_a, weights_b):
    policy = cold_load(NVFP4_TOKEN, weights_a, mode="streamed")
    policy.update({"norm.weight": weights_b["norm.weight"]}, "1")
    policy.check_servable()
    assert policy.version == "1"


def test_a_promised_digest_leaves_the_open_session_alone(cold_load, weights_a, weights_b):
    policy = cold_load(NVFP4_TOKEN, weights_a)
    session = policy.begin("5")
    promised = policy.digest_of(weights_b)
    with pytest.raises(SessionBusyError, match="'5'"):
        policy.begin("6")
    session.load(weights_b)
    assert session.commit().digest == promised


@pytest.mark.parametrize("version", [1, "", b"1", 1.5], ids=repr)
def test_versions_are_strings(version, load, unchanged, weights_a, weights_b):
    policy = load(NVFP4_TOKEN, weights_a)
    check = unchanged(policy)
    with pytest.raises(ConfigError, match="version"):
        policy.update(weights_b, version)
    check()


def test_unnamed_versions_never_repeat(cold_load, weights_a, weights_b):
    policy = cold_load(NVFP4_TOKEN, weights_a, mode="streamed")
    assert [policy.update(weights_a, version).version for version in ("3", "a", None, "2", None)] == [
        "3",
        "a",
        "4",
        "2",
        "5",
    ]
    with pytest.raises(CoverageError):
        policy.update({**weights_b, "ghost": torch.ones(1)}, None)
    assert policy.update(weights_b, None).version == "6"


def test_float32_that_overflows_bf16(load, unchanged, weights_a, weights_b):
    policy = load(NVFP4_TOKEN, weights_a)
    check = unchanged(policy)
    with pytest.raises(NonFiniteError, match="norm.weight"):
        policy.update({**weights_b, "norm.weight": torch.full((64,), 3.4e38)}, "1")
    check()


@pytest.mark.parametrize(
    ("name", "value"),
    [("odd_proj.input_scale", 0.0), ("odd_proj.input_scale", -1.0), ("odd_proj.weight_scale_2", -1.0)],
)
def test_scales_are_positive(name, value, load, unchanged, weights_a):
    policy = load(NVFP4("static"), weights_a)
    check = unchanged(policy)
    with pytest.raises(NonFiniteError, match=f"{name} must be positive"):
        policy.update({name: torch.tensor(value)}, "1")
    check()


def test_a_swallowed_error_does_not_pass_for_a_commit(cold_load, weights_a):
    policy = cold_load(NVFP4_TOKEN, weights_a)
    with pytest.raises(SessionClosedError, match="aborted"), policy.begin("1") as session, suppress(ShapeError):
        session.load([("norm.weight", torch.ones(3))])
    assert policy.version == "cold"


def test_memory_that_runs_out_while_staging():
    """A real allocation failure, under an address-space limit, in a process of its own."""
    script = """
        import resource, torch
        from rollmill.quant import BF16, find_capability, plain_slot
        from rollmill.weight_sync import Policy, StagingMemoryError, SyncPlan

        torch.set_num_threads(1)
        cpu, rows = find_capability("cpu"), 16 << 20
        slots = [plain_slot([name], [rows], None, BF16, cpu, torch.bfloat16) for name in "abcd"]
        policy = Policy(SyncPlan(slots))
        one = torch.ones(rows, dtype=torch.bfloat16)
        policy.update({f"{name}.weight": one for name in "abcd"}, "0")
        digest = policy.digest()
        used = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (used + (80 << 20), resource.RLIM_INFINITY))
        try:
            policy.update({f"{name}.weight": one for name in "abcd"}, "1")
        except StagingMemoryError as error:
            print("refused:", error)
        resource.setrlimit(resource.RLIMIT_AS, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
        assert policy.version == "0" and policy.digest() == digest and policy.open_version is None
        assert all((slot.tensors["weight"] == 1).all() for slot in slots)
        policy.update({f"{name}.weight": one * 2 for name in "abcd"}, "1")
        print("served:", policy.version)
    """
    done = subprocess.run([sys.executable, "-c", dedent(script)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "refused: memory ran out while staging" in done.stdout
    assert ".weight" in done.stdout
    assert "served: 1" in done.stdout
